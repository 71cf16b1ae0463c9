"""M3D's modules against slow float64 versions of the paper's equations, its invariants, and its complexity."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import m3d
from common import complexity
from conftest import check_gradients, close, maps, parameters, randomize, wake
from m3d import ROW_RECIPE, VARIANTS, InflatedConv, M3DLayer, P3DConv, ResidualAttentionLayer, TwoStreamM3D

SIZES = pytest.mark.parametrize("C, H, W", [(8, 4, 3), (16, 3, 5)])
LENGTHS = pytest.mark.parametrize("T", [1, 2, 4, 8, 16])
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


# ------------------------------------------------------------------------------------- the equations, slowly, with loops

def slow_temporal(x, matrices, dilation):                         # Eq. 5; x (B, T, C, H, W), matrices of the taps -1, 0, 1
    y = torch.zeros(*x.shape[:2], matrices[0].shape[0], *x.shape[3:], dtype=x.dtype)
    for t in range(x.shape[1]):
        for a in (-1, 0, 1):
            if 0 <= t + a * dilation < x.shape[1]:
                y[:, t] += torch.einsum("oc,bchw->bohw", matrices[a + 1], x[:, t + a * dilation])
    return y


def slow_m3d(layer, x):                                           # Eq. 4; x (B, T, C, H, W)
    s = layer.spatial(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    y = s.clone()
    for i, w in enumerate(layer.temporal, 1):
        matrices = [w.weight[:, :, a, 0, 0] for a in range(3)] if layer.per_tap else [w.weight[:, :, 0, 0]] * 3
        y += slow_temporal(s, matrices, i)
    return y


def slow_bn(bn, x):                                               # x (B, C) or (B, C, H, W)
    dims = [0, *range(2, x.ndim)]
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean = x.mean(dims, keepdim=True)
    var = ((x - mean) ** 2).mean(dims, keepdim=True)
    return (x - mean) / (var + bn.eps).sqrt() * bn.weight.view(shape) + bn.bias.view(shape)


def slow_ral(ral, x):                                             # Eq. 7-12; x (B, T, C, H, W)
    B, T, C, H, W = x.shape
    m = torch.ones_like(x)
    if "s" in ral.branches:
        conv1, bn, _, conv2 = ral.branches["s"]
        x_s = sum(x[:, t] for t in range(T)) / T                  # Eq. 9
        s = torch.relu(slow_bn(bn, F.conv2d(F.pad(x_s, (1, 1, 1, 1)), conv1.weight))) * conv2.weight + conv2.bias   # Eq. 10
        m = m * s[:, None]
    for name, pooled, shape in (("c", sum(x[:, t, :, i, j] for t in range(T) for i in range(H) for j in range(W)) / (T * H * W), (B, 1, C, 1, 1)),  # Eq. 11
                                ("t", sum(x[:, :, c, i, j] for c in range(C) for i in range(H) for j in range(W)) / (C * H * W), (B, T, 1, 1, 1))):
        if name in ral.branches:
            conv1, bn, _, conv2 = ral.branches[name]
            m = m * (torch.relu(slow_bn(bn, pooled @ conv1.weight.T)) @ conv2.weight.T + conv2.bias).view(shape)    # Eq. 12
    return x / 2 + 1 / (1 + torch.exp(-m)) * x                    # Eq. 8, Eq. 7


# --------------------------------------------------------------------------------------------------- fast against slow

@SIZES
@LENGTHS
@pytest.mark.parametrize("per_tap", [False, True])
@LAYOUTS
def test_m3d_layer(C, H, W, T, per_tap, layout):
    conv = nn.Conv2d(C, 6, 3, 1, 1, bias=False)
    layer, x = randomize(M3DLayer(conv, T, per_tap)), maps(T, C, H, W)
    assert len(layer.temporal) == (T - 1) // 2                    # Eq. 6
    start = M3DLayer(conv.float(), T, per_tap)                    # starts as the convolution
    torch.testing.assert_close(start(x.flatten(0, 1).float()), conv(x.flatten(0, 1).float()))
    conv.double()
    close(layer(x.flatten(0, 1).contiguous(memory_format=layout)).unflatten(0, (2, T)), slow_m3d(layer, x))


def test_m3d_layer_with_one_kernel_per_tap_is_p3d_c():
    """"If we set n = 1, the M3D layer equals to P3D-C"."""
    conv, x = nn.Conv2d(8, 8, 3, 1, 1, bias=False), maps(4, 8, 4, 3).flatten(0, 1)
    layer, p3d = randomize(M3DLayer(conv, 4, per_tap=True)), P3DConv(conv, 4, "c").double()
    p3d.temporal.weight.data = layer.temporal[0].weight.data
    close(layer(x), p3d(x))


def test_m3d_layer_reach():
    """n = 3 covers 7 frames, as the paper says."""
    layer = M3DLayer(nn.Conv2d(4, 4, 1, bias=False), 8)
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(8, 4, 2, 2)
    changed = x.clone()
    changed[4] += 1
    moved = (layer(x) - layer(changed)).abs().amax((1, 2, 3)) > 1e-6
    assert moved.nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 6, 7]


@SIZES
@LENGTHS
@pytest.mark.parametrize("branches", ["sct", "s", "c", "t", "ct"])
def test_ral(C, H, W, T, branches):
    ral, x = randomize(ResidualAttentionLayer(C, T, 4, branches)), maps(T, C, H, W, B=3)
    close(ral(x), slow_ral(ral, x))


@pytest.mark.parametrize("branches", ["sct", "s", "c", "t", "ct"])
def test_ral_starts_as_identity_and_learns(branches):
    ral, x = ResidualAttentionLayer(16, 4, branches=branches), torch.randn(3, 4, 16, 5, 3)
    y = ral(x)
    torch.testing.assert_close(y, x, atol=1e-6, rtol=1e-6)        # M = 1/2
    optimizer = torch.optim.SGD(ral.parameters(), 0.5)
    for step in range(3):                                         # the zero of one branch hides the others for two steps only
        optimizer.zero_grad()
        (ral(x) - 1.2 * x).square().mean().backward()
        if not step:
            assert any(p.grad.abs().sum() > 0 for p in ral.parameters())
        optimizer.step()
    check_gradients(ral, (ral(x) - 1.2 * x).square().mean())
    assert not torch.allclose(ral(x), x)
    for wrong in ("", "sx"):
        with pytest.raises(ValueError, match="branches s, c and t"):
            ResidualAttentionLayer(16, 4, branches=wrong)


@SIZES
@LENGTHS
@LAYOUTS
@pytest.mark.parametrize("stride", [1, 2])
def test_i3d_and_p3d(C, H, W, T, layout, stride):
    x = maps(T, C, H, W)
    frames = x.flatten(0, 1).contiguous(memory_format=layout)
    conv = nn.Conv2d(C, 6, 3, stride, 1, bias=False).double()
    i3d = InflatedConv(conv, T).double()
    close(i3d(frames), conv(frames))                              # all start as the 2D convolution
    randomize(i3d)
    expected = torch.zeros_like(i3d(frames)).unflatten(0, (2, T))
    for t in range(T):
        for a in range(3):
            if 0 <= t + a - 1 < T:
                expected[:, t] += F.conv2d(x[:, t + a - 1], i3d.conv.weight[:, :, a], None, stride, 1)
    close(i3d(frames).unflatten(0, (2, T)), expected)
    for kind in "abc":
        p3d = P3DConv(conv, T, kind).double()
        close(p3d(frames), conv(frames))
        randomize(p3d)
        s = p3d.spatial(frames).unflatten(0, (2, T))
        matrices = [p3d.temporal.weight[:, :, a, 0, 0] for a in range(3)]
        t = slow_temporal(x[..., ::stride, ::stride] if kind == "b" else s, matrices, 1)
        close(p3d(frames).unflatten(0, (2, T)), t if kind == "a" else s + t)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_input_stays_finite(value, dtype):
    x = torch.full((2, 4, 16, 4, 4), value, dtype=dtype, requires_grad=True)
    ral, layer = ResidualAttentionLayer(16, 4), M3DLayer(nn.Conv2d(16, 16, 3, 1, 1, bias=False), 4)
    for p in (*ral.parameters(), *layer.parameters()):
        nn.init.normal_(p, std=0.5)
    y = layer.to(dtype)(ral.to(dtype)(x).flatten(0, 1))
    y.float().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and y.dtype == dtype


# ------------------------------------------------------------------------------------------------------------- network

def network(variant, T=None, num_classes=625, **options):
    row = ROW_RECIPE.get(variant, {})
    return TwoStreamM3D(num_classes, T or row.get("frames", 8), row.get("stream", "two"), **{**VARIANTS[variant][0], **options})


def meta(variant, **options):
    with torch.device("meta"):
        return network(variant, **options)


# RAL: s 9 C + 2 + 2, c C C/16 + 2 C/16 + C/16 C + C, t (T = 8) 8 4 + 2 4 + 4 8 + 8, after stages of C = 256, 512, 1024
TRUNK, M3D, I3D, P3D = 23_508_032, 1_044_480, 22_653_312, 3_772_416
RAL = {"s": sum(9 * C + 4 for C in (256, 512, 1024)), "c": sum(2 * C * C // 16 + C // 8 + C for C in (256, 512, 1024)), "t": 3 * 80}
EXPECTED = {"2d": TRUNK, "m3d": TRUNK + M3D, "m3d-t16": TRUNK + M3D * 7 // 3, "m3d+ral": TRUNK + M3D + sum(RAL.values()),
            "two-stream": 2 * TRUNK + M3D + sum(RAL.values())}
EXPECTED |= {f"m3d+ral-{branch}": TRUNK + M3D + count for branch, count in RAL.items()}
EXPECTED |= {f"{name}{t}": TRUNK + added for t in ("", "-t16") for name, added in (("i3d", I3D), ("p3d-a", P3D), ("p3d-b", P3D), ("p3d-c", P3D))}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters(variant):
    """The paper prints 95.7 MB for the 2D network, which no count gives, and differences to it: +4.2, +90.6, +15.2 MB."""
    assert set(EXPECTED) == set(VARIANTS)
    count, printed = parameters(meta(variant)), VARIANTS[variant][1][2:]
    assert count == EXPECTED[variant]
    if variant == "2d":
        assert round(count * 4 / 1e6, 2) == 94.03
    elif printed and variant != "m3d-t16":                        # printed as +4.2 MB for T = 16, too, where Eq. 6 gives n = 7
        assert abs((count - TRUNK) * 4 / 1e6 - (printed[0] - 95.7)) < (0.12 if variant.startswith("p3d") else 0.05)   # 15.09 MB, no BN


def test_per_tap_parameters_and_multiply_adds():
    assert parameters(meta("m3d", per_tap=True)) == TRUNK + 3 * M3D
    base = complexity(meta("2d", T=8), 8, 256, 128)[1]
    added = 3 * 8 * sum(C * C * h * w for C, h, w in ((64, 64, 32), (128, 32, 16), (256, 16, 8), (512, 8, 4)))
    assert complexity(meta("m3d"), 8, 256, 128)[1] == base + added and base == 8 * complexity(meta("2d"), 1, 256, 128)[1]


@pytest.mark.parametrize("T, H, W, pool", [(4, 64, 48, "avg"), (8, 70, 33, "max"), (1, 64, 32, "avg")])
def test_network(T, H, W, pool):
    model, clips = wake(TwoStreamM3D(5, T, pool=pool)), torch.randn(4, T, 3, H, W)
    for module in model.modules():                                # away from the zeros of the initialisation
        if isinstance(module, M3DLayer):
            for w in module.temporal:
                nn.init.normal_(w.weight, std=0.01)
        if isinstance(module, ResidualAttentionLayer):
            for branch in module.branches.values():
                nn.init.normal_(branch[3].weight)
    outputs = model(clips)
    assert {name: logits.shape for name, logits in outputs.items()} == {"spatial": (4, 5), "temporal": (4, 5)}
    loss, parts = m3d.objective(outputs, torch.tensor([0, 0, 1, 1]), None)
    xent = [-sum(logits[b].log_softmax(0)[b // 2] for b in range(4)) / 4 for logits in outputs.values()]
    torch.testing.assert_close(loss, sum(xent))
    check_gradients(model, loss)
    model.eval()
    with torch.no_grad():
        out = model(clips)
        assert out.shape == (4, 4096)
        torch.testing.assert_close(model(clips[1:2]), out[1:2], atol=1e-3, rtol=1e-3)          # clips do not mix
    with pytest.raises(ValueError, match=f"clips of {T} frames, not {T + 1}"):
        model(torch.randn(1, T + 1, 3, H, W))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs(variant):
    model = network(variant, num_classes=3)
    outputs = model(torch.randn(2, model.frames, 3, 64, 32))
    assert all(logits.shape == (2, 3) and logits.isfinite().all() for logits in outputs.values())


@pytest.mark.parametrize("variant", list(VARIANTS)[2:])
def test_every_3d_variant_starts_as_the_2d_network(variant):
    """Zero temporal kernels: the same features, initialised from a 2D network."""
    base = wake(network("2d", 4, 3)).eval()
    state = {k.removeprefix("streams.spatial.net."): v for k, v in base.state_dict().items() if k.startswith("streams.spatial.net.")}
    model = network(variant, 4, 3, init_2d=state).eval()
    clips = torch.randn(1, 4, 3, 64, 32)
    a, b = model.streams["temporal"](clips), base.streams["spatial"](clips)
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
    for module in model.modules():                                # and what was compared is at work: other kernels, other features
        if isinstance(module, (M3DLayer, P3DConv)):
            for p in module.temporal.parameters():
                nn.init.normal_(p, std=0.1)
        elif isinstance(module, InflatedConv):
            nn.init.normal_(module.conv.weight, std=0.1)
    assert not torch.allclose(model.streams["temporal"](clips), b, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("options, says", [(dict(stream="both"), "streams are spatial, temporal or two"), (dict(layer="p3d"), "layers are 2d, m3d")])
def test_network_refuses(options, says):
    with pytest.raises(ValueError, match=says):
        TwoStreamM3D(5, 4, **options)


def test_where_the_modules_stand():
    model = meta("two-stream")
    assert [name for name, m in model.streams["temporal"].named_modules() if isinstance(m, M3DLayer)] == [f"net.layer{i}.0.conv2" for i in (1, 2, 3, 4)]
    assert list(model.streams["temporal"].ral) == ["layer1", "layer2", "layer3"] and not list(model.streams["spatial"].ral)
    assert not any(isinstance(m, M3DLayer) for m in model.streams["spatial"].modules())
    shared = {id(p) for p in model.streams["spatial"].parameters()} & {id(p) for p in model.streams["temporal"].parameters()}
    assert not shared
    assert sum(isinstance(m, InflatedConv) for m in meta("i3d").modules()) == 17 and sum(isinstance(m, P3DConv) for m in meta("p3d-a").modules()) == 16
