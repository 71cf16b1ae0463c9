"""M3D's modules against slow float64 versions of the paper's equations, its invariants, its recipe
and rows, and its complexity."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import m3d
from common import parse_args, settings
from common import tracklet_features as features_of
from conftest import (
    TINY,
    check_gradients,
    close,
    maps,
    multiply_adds,
    parameters,
    randomize,
    read_log,
    wake,
)
from data import Tracklet, UserError, load_dataset, normalize, read_clip, split_whole
from m3d import (
    RECIPE,
    ROWS,
    InflatedConv,
    M3DLayer,
    P3DConv,
    ResidualAttentionLayer,
    Stream,
    TwoStreamM3D,
    identity_batchnorm_after_relu,
)

SIZES = pytest.mark.parametrize("C, H, W", [(8, 4, 3), (16, 3, 5)])
LENGTHS = pytest.mark.parametrize("T", [1, 2, 4, 8, 16])
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


@pytest.fixture
def float64():
    """Networks are made and run in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------- the equations, slowly, with loops


def slow_temporal(x, matrices, dilation):
    """Eq. 5; x (B, T, C, H, W), matrices of the taps -1, 0, 1."""
    y = torch.zeros(*x.shape[:2], matrices[0].shape[0], *x.shape[3:], dtype=x.dtype)
    for t in range(x.shape[1]):
        for a in (-1, 0, 1):
            if 0 <= t + a * dilation < x.shape[1]:
                y[:, t] += torch.einsum("oc,bchw->bohw", matrices[a + 1], x[:, t + a * dilation])
    return y


def slow_m3d(layer, x):
    """Eq. 4; x (B, T, C, H, W)."""
    s = layer.spatial(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    y = s.clone()
    for i, w in enumerate(layer.temporal, 1):
        if layer.per_tap:
            matrices = [w.weight[:, :, a, 0, 0] for a in range(3)]
        else:
            matrices = [w.weight[:, :, 0, 0]] * 3
        y += slow_temporal(s, matrices, i)
    return y


def slow_bn(bn, x):
    """x (B, C) or (B, C, H, W), with the statistics of the batch."""
    dims = [0, *range(2, x.ndim)]
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean = x.mean(dims, keepdim=True)
    var = ((x - mean) ** 2).mean(dims, keepdim=True)
    return (x - mean) / (var + bn.eps).sqrt() * bn.weight.view(shape) + bn.bias.view(shape)


def slow_ral(ral, x):
    """Eq. 7-12 as printed; x (B, T, C, H, W)."""
    B, T, C, H, W = x.shape
    places = [(i, j) for i in range(H) for j in range(W)]
    m = torch.ones_like(x)
    if "s" in ral.branches:
        conv1, bn, _, conv2 = ral.branches["s"]
        x_s = sum(x[:, t] for t in range(T)) / T  # Eq. 9
        s = torch.relu(slow_bn(bn, F.conv2d(F.pad(x_s, (1, 1, 1, 1)), conv1.weight)))
        s = s * conv2.weight + conv2.bias  # Eq. 10
        m = m * s[:, None]
    # Eq. 11, and the same over channels for the temporal branch
    x_c = sum(x[:, t, :, i, j] for t in range(T) for i, j in places) / (T * H * W)
    x_t = sum(x[:, :, c, i, j] for c in range(C) for i, j in places) / (C * H * W)
    for name, pooled, shape in (("c", x_c, (B, 1, C, 1, 1)), ("t", x_t, (B, T, 1, 1, 1))):
        if name in ral.branches:
            conv1, bn, _, conv2 = ral.branches[name]
            hidden = torch.relu(slow_bn(bn, pooled @ conv1.weight.T))
            m = m * (hidden @ conv2.weight.T + conv2.bias).view(shape)  # Eq. 12
    M = 1 / (1 + torch.exp(-m))  # Eq. 8
    return x / 2 + M * x  # Eq. 7


# ----------------------------------------------------------------------------- fast against slow


@SIZES
@LENGTHS
@pytest.mark.parametrize("per_tap", [False, True])
@LAYOUTS
def test_m3d_layer(C, H, W, T, per_tap, layout):
    conv = nn.Conv2d(C, 6, 3, 1, 1, bias=False).double()
    x = maps(T, C, H, W)
    frames = x.flatten(0, 1).contiguous(memory_format=layout)
    layer = M3DLayer(conv, T, per_tap=per_tap)
    assert len(layer.temporal) == (T - 1) // 2  # Eq. 6
    close(layer(frames), conv(frames))  # starts as the convolution
    randomize(layer)
    close(layer(frames).unflatten(0, (2, T)), slow_m3d(layer, x))


def test_m3d_layer_with_one_kernel_per_tap_is_p3d_c():
    """ "If we set n = 1, the M3D layer equals to P3D-C"."""
    conv, x = nn.Conv2d(8, 8, 3, 1, 1, bias=False), maps(4, 8, 4, 3).flatten(0, 1)
    layer, p3d = randomize(M3DLayer(conv, 4, per_tap=True)), P3DConv(conv, 4, "c").double()
    p3d.temporal.weight.data = layer.temporal[0].weight.data
    close(layer(x), p3d(x))


def test_m3d_layer_reach():
    """n = 3 covers 7 frames, as the paper says."""
    layer = randomize(M3DLayer(nn.Conv2d(4, 4, 1, bias=False), 8))
    x = torch.randn(8, 4, 2, 2, dtype=torch.float64)
    changed = x.clone()
    changed[4] += 1
    moved = (layer(x) - layer(changed)).abs().amax((1, 2, 3)) > 1e-9
    assert moved.nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 6, 7]


@SIZES
@LENGTHS
@pytest.mark.parametrize("branches", ["sct", "s", "c", "t", ("c", "t")])
@pytest.mark.parametrize("reduction", [2, 4])
def test_ral(C, H, W, T, branches, reduction):
    ral = randomize(ResidualAttentionLayer(C, T, reduction=reduction, branches=branches))
    x = maps(T, C, H, W, B=3)
    close(ral(x), slow_ral(ral, x))


@pytest.mark.parametrize("branches", ["sct", "s", "c", "t", "ct"])
def test_ral_starts_as_identity_and_learns(branches):
    ral, x = ResidualAttentionLayer(16, 4, branches=branches), torch.randn(3, 4, 16, 5, 3)
    assert torch.equal(ral(x), x)  # M = 1/2
    optimizer = torch.optim.SGD(ral.parameters(), 0.5)
    for step in range(3):  # the zero of one branch hides the others for two steps only
        optimizer.zero_grad()
        (ral(x) - 1.2 * x).square().mean().backward()
        if not step:
            assert any(p.grad.abs().sum() > 0 for p in ral.parameters())
        optimizer.step()
    check_gradients(ral, (ral(x) - 1.2 * x).square().mean())
    assert not torch.allclose(ral(x), x)


def test_ral_refuses():
    for wrong in ("", (), "sx", ("s", "x")):
        with pytest.raises(ValueError, match="at least one of the branches s, c and t"):
            ResidualAttentionLayer(16, 4, branches=wrong)
    for wrong in (0, 17):
        with pytest.raises(ValueError, match=f"a reduction of 1 to 16, not {wrong}"):
            ResidualAttentionLayer(16, 4, reduction=wrong)


@SIZES
@LENGTHS
@LAYOUTS
@pytest.mark.parametrize("stride", [1, 2])
def test_i3d_and_p3d(C, H, W, T, layout, stride):
    x = maps(T, C, H, W)
    frames = x.flatten(0, 1).contiguous(memory_format=layout)
    conv = nn.Conv2d(C, 6, 3, stride, 1, bias=False).double()
    i3d = InflatedConv(conv, T).double()
    close(i3d(frames), conv(frames))  # all start as the 2D convolution
    randomize(i3d)
    expected = torch.zeros_like(i3d(frames)).unflatten(0, (2, T))
    for t in range(T):
        for a in range(3):
            if 0 <= t + a - 1 < T:
                kernel = i3d.conv.weight[:, :, a]
                expected[:, t] += F.conv2d(x[:, t + a - 1], kernel, None, stride, 1)
    close(i3d(frames).unflatten(0, (2, T)), expected)
    for kind in "abc":
        p3d = P3DConv(conv, T, kind).double()
        close(p3d(frames), conv(frames))
        randomize(p3d)
        s = p3d.spatial(frames).unflatten(0, (2, T))
        matrices = [p3d.temporal.weight[:, :, a, 0, 0] for a in range(3)]
        t = slow_temporal(x[..., ::stride, ::stride] if kind == "b" else s, matrices, 1)
        close(p3d(frames).unflatten(0, (2, T)), t if kind == "a" else s + t)


@SIZES
@LENGTHS
@LAYOUTS
def test_p3d_a_with_batch_norm(C, H, W, T, layout):
    """T(relu(bn(S(x)))), which starts as relu(bn(S(x)))."""
    x = maps(T, C, H, W)
    frames = x.flatten(0, 1).contiguous(memory_format=layout)
    conv, bn = nn.Conv2d(C, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
    p3d = P3DConv(conv, T, "a", bn=bn).double()
    close(p3d(frames), slow_bn(bn, conv(frames)).relu())
    randomize(p3d)
    s = slow_bn(bn, p3d.spatial(frames)).relu().unflatten(0, (2, T))
    matrices = [p3d.temporal.weight[:, :, a, 0, 0] for a in range(3)]
    close(p3d(frames).unflatten(0, (2, T)), slow_temporal(s, matrices, 1))


def test_the_batch_norm_behind_p3d_a_starts_as_identity():
    """In eval mode exactly, in training for inputs of a normal distribution."""
    bn = nn.BatchNorm2d(6).double()
    bn.weight.data = torch.tensor([1.0, 0.5, -2.0, 1.0, 0.3, 0.0], dtype=torch.float64)
    bn.bias.data = torch.tensor([0.0, 1.0, 0.5, -1.0, 0.9, 0.4], dtype=torch.float64)
    quantiles = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    x = torch.special.ndtri(quantiles).view(-1, 1, 1, 1).expand(-1, 6, 1, 1)
    identity = identity_batchnorm_after_relu(bn)
    a = bn(x).relu()
    # the sum over quantiles is within 1e-4 of the integral
    torch.testing.assert_close(identity.running_mean, a.mean((0, 2, 3)), atol=1e-4, rtol=0)
    variance = a.var((0, 2, 3), correction=0)
    torch.testing.assert_close(identity.running_var, variance, atol=3e-4, rtol=0)
    out = identity.train()(a)
    torch.testing.assert_close(out, a, atol=0.01, rtol=0.001)
    identity = identity_batchnorm_after_relu(bn).eval()
    close(identity(a), a)
    assert torch.equal(bn.weight[:3], torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_input_stays_finite(value, dtype):
    x = torch.full((2, 4, 16, 4, 4), value, dtype=dtype, requires_grad=True)
    ral = ResidualAttentionLayer(16, 4)
    layer = M3DLayer(nn.Conv2d(16, 16, 3, 1, 1, bias=False), 4)
    p3d = P3DConv(nn.Conv2d(16, 16, 3, 1, 1, bias=False), 4, "a", bn=nn.BatchNorm2d(16))
    for p in (*ral.parameters(), *layer.parameters(), *p3d.parameters()):
        nn.init.normal_(p, std=0.5)
    y = p3d.to(dtype)(layer.to(dtype)(ral.to(dtype)(x).flatten(0, 1)))
    y.float().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and y.dtype == dtype


def test_layers_refuse():
    for wrong in (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, bias=False, groups=4)):
        with pytest.raises(ValueError, match="one group and no bias"):
            InflatedConv(wrong, 4)
    with pytest.raises(ValueError, match="kind a, b or c, not d"):
        P3DConv(nn.Conv2d(4, 4, 3, bias=False), 4, "d")


# --------------------------------------------------------------------------------------- network


def network(variant, num_classes=625, **changes):
    return m3d.build(settings(RECIPE, ROWS, variant, weights="none", **changes), num_classes)


def meta(variant, **changes):
    with torch.device("meta"):
        return network(variant, **changes)


# RAL: s 9 C + 2 + 2, c C C/16 + 2 C/16 + C/16 C + C, t (T = 8) 8 4 + 2 4 + 4 8 + 8, after stages
# of C = 256, 512, 1024. P3D: 3 C C for each 3x3 convolution; P3D-A's BatchNorms: 2 C.
TRUNK, M3D, I3D, P3D = 23_508_032, 1_044_480, 22_653_312, 3_772_416
P3D_A = P3D + 2 * (3 * 64 + 4 * 128 + 6 * 256 + 3 * 512)
RAL = {
    "s": sum(9 * C + 4 for C in (256, 512, 1024)),
    "c": sum(2 * C * C // 16 + C // 8 + C for C in (256, 512, 1024)),
    "t": 3 * 80,
}
EXPECTED = {
    "2d": TRUNK,
    "m3d": TRUNK + M3D,
    "m3d-t16": TRUNK + M3D * 7 // 3,
    "m3d-all-blocks": TRUNK + P3D,
    "m3d+ral": TRUNK + M3D + sum(RAL.values()),
    "two-stream": 2 * TRUNK + M3D + sum(RAL.values()),
}
for branch, count in RAL.items():
    EXPECTED[f"m3d+ral-{branch}"] = TRUNK + M3D + count
for length in ("", "-t16"):
    for layer, added in (("i3d", I3D), ("p3d-a", P3D_A), ("p3d-b", P3D), ("p3d-c", P3D)):
        EXPECTED[layer + length] = TRUNK + added


@pytest.mark.parametrize("variant", ROWS)
def test_parameters(variant):
    assert set(EXPECTED) == set(ROWS)
    assert parameters(meta(variant)) == EXPECTED[variant]


def test_parameters_of_settings():
    assert parameters(meta("m3d", per_tap=True)) == TRUNK + 3 * M3D
    assert parameters(meta("p3d-a", p3d_a_linear=True)) == TRUNK + P3D
    assert parameters(meta("m3d", all_blocks=True, per_tap=True)) == TRUNK + 3 * P3D
    ral = sum(2 * C * C // 8 + C // 4 + C for C in (256, 512, 1024))
    assert parameters(meta("m3d+ral-c", reduction=8)) == TRUNK + M3D + ral
    assert parameters(meta("i3d", ral=("s",))) == TRUNK + I3D + RAL["s"]


def test_multiply_adds():
    def macs(variant, **changes):
        args = settings(RECIPE, ROWS, variant, **changes)
        return multiply_adds(meta(variant, **changes), args.frames, 256, 128)

    places = ((64, 64, 32), (128, 32, 16), (256, 16, 8), (512, 8, 4))
    added = 3 * 8 * sum(C * C * h * w for C, h, w in places)
    base = macs("2d", frames=8)
    assert macs("m3d") == base + added
    assert base == 8 * macs("2d")


@pytest.mark.parametrize(
    "T, H, W, pool", [(4, 33, 48, "avg"), (5, 38, 33, "max"), (1, 64, 32, "avg")]
)
def test_network(T, H, W, pool, float64, one_backbone):
    model, clips = wake(TwoStreamM3D(5, T, pool=pool)), torch.randn(2, T, 3, H, W)
    for module in model.modules():  # away from the zeros of the initialisation
        if isinstance(module, M3DLayer):
            for w in module.temporal:
                nn.init.normal_(w.weight, std=0.01)
        if isinstance(module, ResidualAttentionLayer):
            for branch in module.branches.values():
                nn.init.normal_(branch[3].weight)
    outputs = model(clips)
    shapes = {name: logits.shape for name, logits in outputs.items()}
    assert shapes == {"spatial": (2, 5), "temporal": (2, 5)}
    parts = m3d.losses(outputs, torch.tensor([0, 1]), SimpleNamespace(stream="two"))
    assert list(parts) == ["xent-spatial", "xent-temporal"]
    for part, logits in zip(parts.values(), outputs.values()):
        xent = -sum(logits[b].log_softmax(0)[b] for b in range(2)) / 2
        # the loss is taken in float32: some ten roundings of 2^-24 of numbers below 4
        assert abs(part.item() - xent.item()) < 1e-5
    check_gradients(model, sum(parts.values()))
    model.eval()
    with torch.no_grad():
        out = model(clips)
        assert out.shape == (2, 4096)
        close(model(clips[1:2]), out[1:2])  # clips do not mix
    with pytest.raises(ValueError, match=f"clips of {T} frames, not {T + 1}"):
        model(torch.randn(1, T + 1, 3, H, W))


@pytest.mark.parametrize("variant", ROWS)
def test_every_variant_runs(variant, one_backbone):
    model = network(variant, 3)
    with torch.no_grad():
        outputs = model(torch.randn(2, model.frames, 3, 33, 32))
    for logits in outputs.values():
        assert logits.shape == (2, 3) and logits.isfinite().all()


def test_the_embedding_is_eq_1_to_3(float64):
    """[f_s, f_t], each the mean over its frames after its own neck."""
    model, clips = wake(TwoStreamM3D(3, 4)).eval(), torch.randn(2, 4, 3, 33, 32)
    single = Stream(4).eval()
    single.net.load_state_dict(model.streams["spatial"].net.state_dict())
    with torch.no_grad():
        f_s = sum(single(clips[:, t : t + 1]) for t in range(4)) / 4  # Eq. 2
        f_t = model.streams["temporal"](clips)
        f_st = torch.cat([model.neck["spatial"](f_s), model.neck["temporal"](f_t)], 1)
        close(model(clips), f_st)


@pytest.fixture(scope="module")
def base():
    """A 2D stream with statistics of its own."""
    torch.manual_seed(1)
    base = wake(Stream(4)).double().eval()
    for module in base.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return base


@pytest.mark.parametrize(
    "variant", [*(row for row in list(ROWS)[2:] if not row.endswith("-t16")), "p3d-a linear"]
)
def test_every_3d_variant_starts_as_the_2d_network(variant, base, float64, one_backbone):
    """The same features in eval mode, initialised from a 2D network; of 4 frames, for which a row
    of 16 is that of 8."""
    variant, *linear = variant.split()
    args = settings(RECIPE, ROWS, variant)
    model = Stream(
        4,
        layer=args.layer,
        ral=args.ral,
        init_2d=base.net.state_dict(),
        all_blocks=args.all_blocks,
        p3d_a_linear=bool(linear),
    ).eval()
    clips = torch.randn(1, 4, 3, 33, 32)
    with torch.no_grad():
        a, b = model(clips), base(clips)
        close(a, b)
        for module in model.modules():  # and what was compared is at work
            if isinstance(module, (M3DLayer, P3DConv)):
                for p in module.temporal.parameters():
                    nn.init.normal_(p, std=0.1)
            elif isinstance(module, InflatedConv):
                nn.init.normal_(module.conv.weight, std=0.1)
        assert not torch.allclose(model(clips), b, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(stream="both"), "streams are spatial, temporal or two"),
        (dict(layer="p3d"), "layers are 2d, m3d"),
        (dict(ral="x"), "at least one of the branches"),
        (dict(reduction=512), "a reduction of 1 to 256, not 512"),
        (dict(stream="spatial", init_2d={}), "init_2d is for the temporal stream"),
        (dict(init_2d={"conv1.weight": torch.zeros(1)}), "init_2d does not fit the 2D stream"),
    ],
)
def test_network_refuses(options, says):
    with pytest.raises(ValueError, match=says):
        TwoStreamM3D(5, 4, **options)


def test_where_the_modules_stand():
    def places(model, kind):
        return [name for name, m in model.named_modules() if isinstance(m, kind)]

    model = meta("two-stream")
    spatial, temporal = model.streams["spatial"], model.streams["temporal"]
    assert places(temporal, M3DLayer) == [f"net.layer{i}.0.conv2" for i in (1, 2, 3, 4)]
    assert list(temporal.ral) == ["layer1", "layer2", "layer3"] and not list(spatial.ral)
    assert not places(spatial, (M3DLayer, InflatedConv, P3DConv))
    shared = {id(p) for p in spatial.parameters()} & {id(p) for p in temporal.parameters()}
    assert not shared
    assert len(places(meta("i3d"), InflatedConv)) == 17
    assert len(places(meta("m3d-all-blocks"), M3DLayer)) == 16
    for name in ("p3d-a", "p3d-b", "p3d-c"):
        assert len(places(meta(name), P3DConv)) == 16
    between = [m.between for m in meta("p3d-a").modules() if isinstance(m, P3DConv)]
    assert all(isinstance(m, nn.Sequential) for m in between)
    for model in (meta("p3d-a", p3d_a_linear=True), meta("p3d-c")):
        between = [m.between for m in model.modules() if isinstance(m, P3DConv)]
        assert all(isinstance(m, nn.Identity) for m in between)


# ---------------------------------------------------------------------- recipe, rows, --init-2d


def arguments(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["m3d.py", *flags])
    return parse_args(RECIPE, ROWS, m3d.__doc__, m3d.__file__)


def test_the_command_line(monkeypatch):
    args = arguments(monkeypatch, "--data", "mars")
    assert (args.stream, args.layer, args.ral, args.frames) == ("two", "m3d", ("s", "c", "t"), 8)
    assert (args.ids, args.lr, args.lr_step, args.epochs) == (24, 0.01, 300, 400)
    assert args.paper_result == (74.06, 84.39)
    args = arguments(monkeypatch, "--data", "mars", "--variant", "2d")
    assert (args.stream, args.layer, args.ral, args.frames) == ("spatial", "2d", (), 1)
    assert (args.ids, args.lr, args.lr_step, args.epochs) == (128, 0.001, 10, 20)
    args = arguments(monkeypatch, "--data", "prid", "--variant", "p3d-a-t16", "--p3d-a-linear")
    assert (args.frames, args.ids, args.p3d_a_linear, args.paper_result) == (16, 12, True, None)
    args = arguments(monkeypatch, "--variant", "m3d", "--ral", "s", "t", "--per-tap")
    assert (args.ral, args.per_tap, args.frames, args.ids) == (("s", "t"), True, 3, 8)
    args = arguments(monkeypatch, "--ral", "--all-blocks", "--reduction", "8")
    assert (args.ral, args.all_blocks, args.reduction) == ((), True, 8)
    with torch.device("meta"):
        assert not m3d.build(args, 5).streams["temporal"].ral
    args = arguments(monkeypatch, "--variant", "m3d-t16")
    assert (args.frames, args.ids, args.lr) == (16, 8, 0.0015)  # the small run's schedule


def test_init_2d(tmp_path):
    path = tmp_path / "2d.pt"
    base = network("2d", 3)
    torch.save({"model": base.state_dict()}, path)
    model = network("m3d", 5, init_2d=str(path))
    mine = model.streams["temporal"].net.state_dict()
    for name, value in base.streams["spatial"].net.state_dict().items():
        place = name if name in mine else name.replace("conv2", "conv2.spatial")
        assert torch.equal(mine[place], value), name
    path.unlink()
    assert meta("m3d", init_2d=str(path), resume="last.pt")  # a checkpoint brings its weights
    with pytest.raises(UserError, match="2d.pt: no such file"):
        meta("m3d", init_2d=str(path))
    for wrong in ({}, {"model": 3}, {"model": {"streams.temporal.net.x": torch.zeros(1)}}):
        torch.save(wrong, path)
        says = "2d.pt: contains no weights named streams.spatial.net.. of a run"
        with pytest.raises(UserError, match=says):
            meta("m3d", init_2d=str(path))
    torch.save({"model": {"streams.spatial.net.x": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="init_2d does not fit the 2D stream"):
        meta("m3d", init_2d=str(path))


# ------------------------------------------------------------------------------------ the picture


@pytest.mark.parametrize("per_tap", [False, True])
def test_the_picture_has_a_map_for_each_frame(per_tap, one_backbone):
    model = network("m3d", 3, frames=4, per_tap=per_tap).eval()
    nn.init.normal_(model.streams["temporal"].net.layer1[0].conv2.temporal[0].weight, std=0.1)
    images = torch.randint(0, 256, (4, 3, 64, 32), dtype=torch.uint8)
    rows = m3d.picture(model, normalize(images[None]), images)[1]
    (label,) = [label for label in rows if label.startswith("stage 1: what the temporal kernels")]
    maps, *_ = rows[label]
    assert [m.shape for m in maps] == 4 * [(16, 8)]


# ----------------------------------------------------------------------------------- three stages


def test_in_the_test_the_2d_stream_sees_every_frame(small_root):
    """[f_s, f_t] of a tracklet: the means over all still frames, and over the whole clips of T."""
    model = wake(network("two-stream", 3, frames=4)).eval()
    dataset = load_dataset("synthetic", small_root)
    long = next(t for t in dataset.query if len(t.frames) % 4 and 4 < len(t.frames) < 8)
    short = Tracklet(long.frames[1:4], long.pid, long.cam)
    dataset = dataset._replace(query=[long], gallery=[short])
    clips = {"split_clips": split_whole, "clip_length": 4, "size": (64, 32)}
    found = torch.cat(features_of(model, dataset, **clips))
    for tracklet, clip, feature in (
        (long, [0, 1, 2, 3], found[0]),
        (short, [0, 1, 2, 0], found[1]),
    ):
        frames = normalize(read_clip(tracklet.frames, (64, 32)))
        with torch.no_grad():
            spatial = [model.streams["spatial"](frame[None, None]) for frame in frames]
            f_s = model.neck["spatial"](sum(spatial) / len(spatial))
            f_t = model.neck["temporal"](model.streams["temporal"](frames[clip][None]))
        expected = torch.cat([f_s, f_t], 1)[0]
        # float32: sums of at most 7 features near 1, of networks that run in other batches
        torch.testing.assert_close(feature, expected, atol=1e-4, rtol=1e-4)


def test_stages(run, small_root, tmp_path):
    """The 2D stream, the M3D stream that starts from it, and both in one test; what was trained
    before is left alone, and each stage can be run and evaluated by itself."""
    test = ("--root", small_root, *TINY, "--ids", 6, "--frames", 2)
    small = (*test, "--epochs", 1)
    done = run("m3d.py", *small, "--in-stages", "--output", "x")
    assert done.returncode == 0, done.stderr
    folders = [tmp_path / "x/2d", tmp_path / "x/temporal"]
    first, second = (torch.load(f / "last.pt", weights_only=True) for f in folders)
    settings_of = [
        {k: c["args"][k] for k in ("stream", "layer", "frames", "chunk", "variant")}
        for c in (first, second)
    ]
    assert settings_of == [
        dict(stream="spatial", layer="2d", frames=1, chunk=1, variant="2d"),
        dict(stream="temporal", layer="m3d", frames=2, chunk=0, variant="m3d+ral"),
    ]
    assert first["model"].keys() & second["model"].keys() == set()
    dataset = load_dataset("synthetic", small_root)
    frames = sum(len(t.frames) for t in dataset.train)
    counts = re.findall(r"^  train +6 +([\d,]+)", done.stdout, re.M)
    assert counts == [f"{frames:,}", f"{len(dataset.train)}", f"{len(dataset.train)}"]
    both = done.stdout.splitlines()[-1]
    joined = [f"x/{stage}/last.pt" for stage in ("2d", "temporal")]
    results = re.findall(r"^(.*), (?:all frames|only whole clips).*:  mAP", done.stdout, re.M)
    assert results == [
        "2d, untrained",
        "2d, after epoch 1",
        "m3d+ral, untrained except for the 2D stream of x/2d/last.pt",
        "m3d+ral, after epoch 1",
        f"two-stream, joined from {joined[0]} and {joined[1]}",
    ]
    assert both.startswith(f"two-stream on synthetic, {results[-1].split(', ')[1]}: mAP ")
    assert both.endswith("; the paper reports no result")
    alone = run("m3d.py", *test, "--evaluate", "--join", *joined)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.splitlines()[-1] == both

    (folders[1] / "last.pt").unlink()
    (folders[1] / "log.csv").unlink()
    rest = run("m3d.py", *small, "--in-stages", "--output", "x")
    assert rest.returncode == 0 and rest.stdout.count("last.pt after epoch 1\n") == 1
    assert rest.stdout.splitlines()[-1] == both
    assert len(read_log(folders[1])) == 1
    other = run("m3d.py", *small, "--in-stages", "--output", "x", "--lr", 0.5)
    assert other.returncode == 2 and "was trained with --lr" in other.stderr


def test_join(tmp_path, one_backbone):
    """Two checkpoints: their streams and necks."""
    paths, saved = [tmp_path / "2d.pt", tmp_path / "m3d.pt"], {}
    for path, variant in zip(paths, ("2d", "m3d+ral")):
        state = {k: v + 1 for k, v in network(variant, 3, frames=3).state_dict().items()}
        torch.save({"model": state}, path)
        saved |= state
    others = dict(frames=3, evaluate=True, join=paths, weights="not read")
    joined = m3d.build(settings(RECIPE, ROWS, "two-stream", **others), 5).state_dict()
    assert joined.keys() == saved.keys()
    for name, value in saved.items():
        assert name.startswith("classifier") or torch.equal(joined[name], value), name


def test_join_refuses(refuses, small_root, tmp_path, one_backbone):
    torch.save({"model": network("2d", 3).state_dict()}, tmp_path / "2d.pt")
    two = ("--join", "2d.pt", "2d.pt")
    for flags, says in (
        (two, "--join takes two checkpoints"),
        (("--evaluate", "--join", "2d.pt"), "--join takes two checkpoints"),
        (("--evaluate", "--variant", "m3d", *two), "--join takes two checkpoints"),
        (("--evaluate", *two), "2d.pt: contains no weights named streams.temporal.* of a run"),
    ):
        refuses(("--root", small_root, *flags), says, script="m3d.py")


def test_an_untrained_network_beside_two_trained_stages(monkeypatch, tmp_path, capsys):
    """--evaluate alone shows an untrained network; a line says how the stages are shown."""
    monkeypatch.setattr(m3d, "train", lambda args: None)
    monkeypatch.chdir(tmp_path)
    files = [Path(f"runs/m3d-mars/{stage}/last.pt") for stage in ("2d", "temporal")]
    says = (
        "to evaluate the two trained streams as one network, add "
        f"--join {files[0]} {files[1]}\n"
    )
    for file, expected in zip((*files, None), ("", "", says)):
        m3d.train_in_stages(arguments(monkeypatch, "--data", "mars", "--evaluate"))
        assert capsys.readouterr().out == expected
        if file:
            file.parent.mkdir(parents=True)
            file.touch()
    join = ("--evaluate", "--join", *map(str, files))
    for flags in (join, ("--evaluate", "--variant", "m3d")):
        m3d.train_in_stages(arguments(monkeypatch, "--data", "mars", *flags))
        assert not capsys.readouterr().out


def test_the_stages_take_their_own_recipes(monkeypatch, tmp_path):
    """The 2D stream that of its row, but for a schedule that is given; both what else is given."""
    parts = []
    monkeypatch.setattr(m3d, "train", parts.append)
    monkeypatch.chdir(tmp_path)
    flags = ("--data", "mars", "--lr", "0.5", "--height", "64", "--layer", "p3d-c", "--frames", "4")
    m3d.train_in_stages(arguments(monkeypatch, *flags, "--ral", "s"))
    assert (parts[0].ral, parts[1].ral) == ((), ("s",))
    seen = [
        (
            p.variant,
            p.epochs,
            p.ids,
            p.lr,
            p.lr_step,
            p.chunk,
            p.height,
            p.layer,
            p.frames,
            p.stream,
        )
        for p in parts
    ]
    assert seen[0] == ("2d", 20, 128, 0.5, 10, 1, 64, "2d", 1, "spatial")
    assert seen[1] == ("m3d+ral", 400, 24, 0.5, 300, 0, 64, "p3d-c", 4, "temporal")
    assert parts[1].init_2d == "runs/m3d-mars/2d/last.pt"
    assert parts[0].paper_result == (62.54, 76.43)
    assert parts[2].join == [parts[1].init_2d, "runs/m3d-mars/temporal/last.pt"]
    assert parts[2].evaluate and parts[2].stream == "two"
    assert parts[2].paper_result == (74.06, 84.39)
    parts.clear()
    m3d.train_in_stages(arguments(monkeypatch, "--no-evaluate", "--in-stages", "--export", "x"))
    assert [part.export for part in parts] == ["x/2d", "x/temporal", "x/both"]
    start = ("--init-2d", "x"), ("--init", "x"), ("--export", "x")
    for flags in (("--no-in-stages",), ("--evaluate",), ("--variant", "m3d"), *start):
        parts.clear()
        m3d.train_in_stages(arguments(monkeypatch, "--data", "mars", *flags))
        assert len(parts) == 1
