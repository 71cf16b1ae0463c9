"""STRF's modules against slow float64 versions of the paper's equations, its invariants, its rows
and its complexity."""

import copy
import functools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import strf
from common import batch_hard_triplet, row_of, settings
from conftest import check_gradients, close, maps, multiply_adds, parameters, randomize, wake
from strf import (
    ROWS,
    STRF,
    FactorizedAttentionMask,
    FeatureFactorizationModule,
    InflatedConv,
    NonLocalBlock,
    P3DConv,
    SelfProductMask,
    STRFNet,
)

FINE, COARSE, DYNAMIC, STATIC = "s-fine", "s-coarse", "t-dynamic", "t-static"
SIZES = pytest.mark.parametrize("C, H, W", [(16, 4, 3), (32, 2, 5)])
LENGTHS = pytest.mark.parametrize("T", [1, 2, 4, 8, 16])


# ------------------------------------------------------------- the equations, slowly, with loops


def slow_pool(x, dimension, r, pool):
    """Eq. 4 or 6; x (T, c, H, W), same size, nothing beyond the edges."""
    (T, _, H, W), reach = x.shape, r // 2
    rt, rs = (reach, 0) if dimension == "t" else (0, reach)
    out = torch.zeros_like(x)
    for t in range(T):
        for i in range(H):
            for j in range(W):
                window = torch.stack(
                    [
                        x[u, :, a, b]
                        for u in range(max(0, t - rt), min(T, t + rt + 1))
                        for a in range(max(0, i - rs), min(H, i + rs + 1))
                        for b in range(max(0, j - rs), min(W, j + rs + 1))
                    ]
                )
                out[t, :, i, j] = window.amax(0) if pool == "max" else window.mean(0)
    return out


def slow_columns(f, normalize):
    """f (T, C, H, W) as a matrix ct x hw, a list of its columns."""
    T, C, H, W = f.shape
    columns = [torch.cat([f[t, :, p // W, p % W] for t in range(T)]) for p in range(H * W)]
    return [c / c.norm().clamp(min=1e-12) for c in columns] if normalize else columns


def slow_mask(fam, f, dimension, r, pool="max", kappa=4.0, normalize=True):
    """Eq. 2-3; f (T, C, H, W)."""
    T, C, H, W = f.shape
    h = torch.einsum("oc,tchw->tohw", fam.h.weight[:, :, 0, 0], f)
    columns = slow_columns(slow_pool(h, dimension, r, pool), normalize)
    m = torch.zeros(H * W, H * W, dtype=f.dtype)
    for q in range(H * W):
        e = [torch.exp(kappa * (columns[p] @ columns[q])) for p in range(H * W)]
        for p in range(H * W):
            m[p, q] = e[p] / sum(e)  # over rows
    return m


def slow_self_product(f, normalize=True):
    """Fig. 6 (a): f^T f / (h w); f (T, C, H, W)."""
    columns = slow_columns(f, normalize)
    n = len(columns)
    return torch.stack([torch.stack([a @ b / n for b in columns]) for a in columns])


def slow_apply(m, f):
    """Eq. 1: (ct x hw) (hw x hw)."""
    T, C, H, W = f.shape
    return (f.reshape(T * C, H * W) @ m).view(T, C, H, W)


def slow_strf(unit, f, factors, resolutions, pools, order, fam=True, **options):
    """Eq. 5, 7, 8."""
    spec = {
        DYNAMIC: ("t", resolutions[0], pools[0]),
        STATIC: ("t", resolutions[1], pools[0]),
        FINE: ("s", resolutions[0], pools[1]),
        COARSE: ("s", resolutions[1], pools[1]),
    }

    def factorize(d, f):
        chosen = [name for name in factors if spec[name][0] == d]
        if not chosen:
            return None
        if not fam:
            return slow_apply(slow_self_product(f, **options), f)
        masks = zip(chosen, unit.ffm[d].masks, strict=True)
        return sum(slow_apply(slow_mask(mask, f, *spec[n], **options), f) for n, mask in masks)

    if order == "parallel":
        return sum(y for y in (factorize("t", f), factorize("s", f)) if y is not None)
    for d in order:
        y = factorize(d, f)
        f = f if y is None else y
    return f


# -------------------------------------------------------------------------------- fast against slow


class Fixed(nn.Module):
    """A mask that is the same for all maps."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, f):
        return self.mask


@SIZES
@LENGTHS
def test_eq_1(C, H, W, T):
    f, m = maps(T, C, H, W), torch.randn(2, H * W, H * W, dtype=torch.float64)
    expected = torch.stack([slow_apply(*pair) for pair in zip(m, f)])
    close(FeatureFactorizationModule([Fixed(m)])(f), expected)


@SIZES
@LENGTHS
@pytest.mark.parametrize(
    "dimension, r, pool, normalize",
    [
        ("t", 1, "max", True),
        ("t", 3, "max", True),
        ("t", 5, "avg", True),
        ("s", 3, "max", True),
        ("s", 3, "avg", False),
        ("s", 5, "max", True),
    ],
)
def test_fam(C, H, W, T, dimension, r, pool, normalize):
    fam = FactorizedAttentionMask(
        C, dimension=dimension, resolution=r, pool=pool, reduction=8, normalize=normalize
    )
    randomize(fam)
    f = maps(T, C, H, W) / (1 if normalize else 10)
    m = fam(f)
    close(m, torch.stack([slow_mask(fam, clip, dimension, r, pool, 4.0, normalize) for clip in f]))
    close(m.sum(1), torch.ones_like(m[:, 0]))  # stochastic along the rows: columns sum to one


ALL = (DYNAMIC, STATIC, FINE, COARSE)


@SIZES
@pytest.mark.parametrize("T", [1, 2, 8])
@pytest.mark.parametrize(
    "factors, resolutions, pools, order",
    [
        (ALL, (1, 3), ("max", "max"), "ts"),
        (ALL, (1, 3), ("max", "max"), "st"),
        (ALL, (1, 3), ("max", "avg"), "parallel"),
        (ALL, (3, 5), ("avg", "max"), "ts"),
        ((FINE,), (1, 3), ("max", "max"), "ts"),
        ((STATIC,), (1, 3), ("max", "max"), "ts"),
        ((COARSE, STATIC), (1, 3), ("max", "max"), "ts"),
    ],
)
def test_strf(C, H, W, T, factors, resolutions, pools, order):
    unit = STRF(
        C, factors=factors, resolutions=resolutions, pools=pools, order=order, reduction=8
    )
    f = maps(T, C, H, W)
    randomize(unit)
    slow = [slow_strf(unit, clip, factors, resolutions, pools, order) for clip in f]
    close(unit(f), torch.stack(slow))
    frames = f.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, T))
    close(unit(frames), unit(f))
    assert unit(frames).flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@SIZES
@pytest.mark.parametrize("order", ["ts", "st", "parallel"])
@pytest.mark.parametrize("normalize, kappa, reduction", [(True, 1.5, 4), (False, 0.1, 16)])
def test_the_settings_of_eq_2_and_3(C, H, W, order, normalize, kappa, reduction):
    """n, kappa and the printed form without normalisation."""
    options = dict(kappa=kappa, normalize=normalize)
    unit = randomize(STRF(C, order=order, reduction=reduction, **options))
    f = maps(4, C, H, W) / 10
    slow = [slow_strf(unit, x, ALL, (1, 3), ("max", "max"), order, **options) for x in f]
    close(unit(f), torch.stack(slow))


@SIZES
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("normalize", [True, False])
def test_without_fam(C, H, W, T, normalize):
    """Fig. 6 (a): f times itself, once for each dimension, and nothing to learn."""
    f = maps(T, C, H, W)
    masks = torch.stack([slow_self_product(clip, normalize) for clip in f])
    close(SelfProductMask(normalize=normalize)(f), masks)
    for factors, order in ((ALL, "ts"), (ALL, "parallel"), ((COARSE,), "ts")):
        unit = STRF(C, factors=factors, order=order, normalize=normalize, fam=False)
        assert not list(unit.parameters())
        options = dict(fam=False, normalize=normalize)
        slow = [slow_strf(unit, x, factors, (1, 3), ("max", "max"), order, **options) for x in f]
        close(unit(f), torch.stack(slow))


@SIZES
def test_non_local(C, H, W):
    block, x = randomize(NonLocalBlock(C)).eval(), maps(3, C, H, W)

    def lin(layer, f):
        return layer.weight[:, :, 0, 0] @ f + layer.bias[:, None]

    out = []
    for clip in x:
        f = clip.transpose(0, 1).flatten(1)  # (C, m)
        theta, phi, g = lin(block.theta, f), lin(block.phi, f), lin(block.g, f)
        y = []
        for i in range(f.shape[1]):
            w = torch.stack([theta[:, i] @ phi[:, j] for j in range(f.shape[1])]).softmax(0)
            y.append(sum(w[j] * g[:, j] for j in range(f.shape[1])))
        bn = block.out[1]
        z = lin(block.out[0], torch.stack(y, 1)) / (1 + bn.eps) ** 0.5
        z = z * bn.weight[:, None] + bn.bias[:, None] + f
        out.append(z.view(C, 3, H, W).transpose(0, 1))
    close(block(x), torch.stack(out))
    fresh = NonLocalBlock(C)
    assert torch.equal(fresh(x.float()), x.float())


def test_strf_properties():
    f = torch.rand(2, 4, 16, 3, 4, dtype=torch.float64)
    fam = FactorizedAttentionMask(16, dimension="t", resolution=1)
    ffm = FeatureFactorizationModule([fam]).double()
    y = ffm(f).flatten(3)
    # every position becomes a weighted average of the frame's own positions
    low, high = f.flatten(3).amin(3), f.flatten(3).amax(3)
    assert (y >= low[..., None] - 1e-9).all() and (y <= high[..., None] + 1e-9).all()
    # of equal positions the average is the same again
    same = f[:, :, :, :1, :1].expand(-1, -1, -1, 3, 4)
    close(ffm(same), same)
    assert sum(p.numel() for p in STRF(128).parameters()) == 4_096
    assert sum(p.numel() for p in STRF(256).parameters()) == 16_384


@pytest.mark.parametrize("order", ["ts", "st", "parallel"])
def test_a_constant_map_comes_out_fourfold(order):
    """Two masks of each dimension, whose columns sum to one, added: 2 x 2 or 2 + 2."""
    constant = torch.rand(2, 4, 16, 1, 1, dtype=torch.float64).expand(-1, -1, -1, 5, 4)
    for resolutions in ((1, 1), (1, 3), (3, 5)):
        for normalize in (True, False):
            unit = STRF(16, resolutions=resolutions, order=order, normalize=normalize)
            close(randomize(unit)(constant), 4 * constant)
    close(STRF(16, factors=(COARSE,), order=order).double()(constant), constant)
    # one mask of each dimension
    factor = 2 if order == "parallel" else 1
    close(STRF(16, factors=(DYNAMIC, FINE), order=order).double()(constant), factor * constant)
    close(STRF(16, fam=False, order=order).double()(constant), factor * constant)


def test_where_the_factor_of_four_goes():
    """In I3D and P3D-A to the BatchNorm after the convolution, which removes it in training only;
    in P3D-B and P3D-C into the gradient of the temporal kernel, which is zero at the start."""
    constant = torch.rand(2, 4, 16, 1, 1, dtype=torch.float64).expand(-1, -1, -1, 5, 4)
    frames = constant.flatten(0, 1)
    point = nn.Conv2d(16, 16, 1, bias=False).double()  # keeps maps constant
    makers = {"i3d": lambda strf: InflatedConv(point, 4, strf=strf).double()}
    for kind in "abc":
        makers[kind] = lambda strf, kind=kind: P3DConv(point, 4, kind, strf=strf).double()
    for name, make in makers.items():
        with_strf, plain = make(STRF(16)), make(None)
        norm = nn.BatchNorm2d(16, eps=1e-15).double()
        if name in ("i3d", "a"):
            close(with_strf(frames), 4 * plain(frames))
            close(norm(with_strf(frames)), norm(plain(frames)))
            norm.reset_running_stats()
            close(norm.eval()(with_strf(frames)), 4 * norm(plain(frames)))
        else:
            close(with_strf(frames), plain(frames))
            for layer in (with_strf, plain):
                layer(frames).square().sum().backward()
            close(with_strf.temporal.weight.grad, 4 * plain.temporal.weight.grad)


def test_dynamic_and_fine_are_one_architecture():
    """Where r_tau is 1, as in Table 4, both of these networks are the same; the static and the
    coarse one are not."""
    f = maps(4, 16, 5, 4)
    for a, b, same in ((DYNAMIC, FINE, True), (STATIC, COARSE, False)):
        first = randomize(STRF(16, factors=(a,), resolutions=(1, 3)))
        second = STRF(16, factors=(b,), resolutions=(1, 3)).double()
        second.ffm["s"].load_state_dict(first.ffm["t"].state_dict())
        assert torch.equal(first(f), second(f)) == same
    for name in ("fine", "dynamic"):
        assert meta(f"p3dc+{name}") and row_of(ROWS, f"p3dc+{name}").results["mars"][0] == 85.20


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fam", [True, False])
def test_constant_input_stays_finite(value, dtype, fam):
    f = torch.full((2, 4, 16, 4, 4), value, dtype=dtype, requires_grad=True)
    y = STRF(16, fam=fam).to(dtype)(f)
    y.float().sum().backward()
    assert y.isfinite().all() and f.grad.isfinite().all() and y.dtype == dtype


@pytest.mark.parametrize("order", ["ts", "st", "parallel"])
def test_strf_gradients(order):
    unit = STRF(32, order=order)
    check_gradients(unit, unit(torch.randn(2, 4, 32, 4, 3)).square().mean())


@LENGTHS
@pytest.mark.parametrize("stride", [1, 2])
def test_i3d_and_p3d_with_and_without_strf(T, stride):
    x = maps(T, 16, 4, 6)
    frames = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    conv = nn.Conv2d(16, 16, 3, stride, 1, bias=False).double()

    def temporal(x, weight, stride=1, padding=0):
        """Slowly: weight (O, C, 3, k, k), x (B, T, C, H, W)."""
        y = 0
        for a in (-1, 0, 1):
            moved = torch.zeros_like(x)
            for t in range(T):
                if 0 <= t + a < T:
                    moved[:, t] = x[:, t + a]
            y = y + F.conv2d(moved.flatten(0, 1), weight[:, :, a + 1], None, stride, padding)
        return y

    for unit in (None, randomize(STRF(16, reduction=8)), randomize(NonLocalBlock(16)).eval()):
        i3d = InflatedConv(conv, T, strf=unit).double()
        seen = unit(x) if unit else x
        close(i3d(frames), conv(seen.flatten(0, 1)))  # the rest starts as the 2D convolution
        nn.init.normal_(i3d.conv.weight)
        close(i3d(frames), temporal(seen, i3d.conv.weight, stride, 1))
        for kind in "abc":
            p3d = P3DConv(conv, T, kind, strf=unit).double()
            if not unit or kind != "a":
                close(p3d(frames), conv(frames))
            nn.init.normal_(p3d.temporal.weight)
            s = conv(frames).unflatten(0, (2, T))
            seen = x if kind == "b" else s
            steps = stride if kind == "b" else 1
            t = temporal(unit(seen) if unit else seen, p3d.temporal.weight, steps)
            close(p3d(frames), t if kind == "a" else s.flatten(0, 1) + t)


# ----------------------------------------------------------------------------- losses and network


def test_losses():
    """Eq. 9, with the margin of the recipe."""
    embedding, logits, pids = torch.randn(4, 6), torch.randn(4, 3), torch.tensor([0, 0, 2, 2])
    for margin in (0.3, 0.7):
        args = settings(strf.RECIPE, ROWS, "strf-p3dc", margin=margin)
        parts = strf.losses((embedding, logits), pids, args)
        assert set(parts) == {"xent", "triplet"}
        assert torch.equal(parts["xent"], F.cross_entropy(logits, pids))
        assert torch.equal(parts["triplet"], batch_hard_triplet(embedding, pids, margin))


def network(name="strf-p3dc", num_classes=3, **changes):
    args = settings(strf.RECIPE, ROWS, name, weights="none", **changes)
    return strf.build(args, num_classes)


def meta(name="strf-p3dc", **changes):
    with torch.device("meta"):
        return network(name, 625, **changes)


def unit(width, factors=4):
    return factors * width * width // 16


def nonlocal_parameters(c):
    """theta, phi and g with bias, out with bias, BatchNorm."""
    return 3 * (c * c // 2 + c // 2) + c * c // 2 + c + 2 * c


TRUNK = 23_508_032
P3D = 2 * 3 * 128**2 + 3 * 3 * 256**2
I3D = 2 * 18 * 128**2 + 3 * 18 * 256**2
BASE = TRUNK + P3D
UNITS = 2 * unit(128) + 3 * unit(256)
FULL = BASE + UNITS
STAGE = {1: 2 * unit(64), 2: 2 * unit(128), 3: 3 * unit(256), 4: 2 * unit(512)}
# stages 1 and 4 become 3D where STRF stands in them
MORE = {1: 2 * 3 * 64**2, 2: 0, 3: 0, 4: 2 * 3 * 512**2}
EXPECTED = {row: FULL for row in ROWS}
EXPECTED |= {"i3d": TRUNK + I3D, "strf-i3d": TRUNK + I3D + UNITS}
EXPECTED |= {"p3da": BASE, "p3db": BASE, "p3dc": BASE, "strf-nofam": BASE}
EXPECTED["p3dc+nonlocal"] = BASE + 2 * nonlocal_parameters(128) + 3 * nonlocal_parameters(256)
for one in ("fine", "coarse", "dynamic", "static"):
    EXPECTED[f"p3dc+{one}"] = BASE + UNITS // 4
for two in ("fine+coarse", "dynamic+static", "fine+dynamic", "coarse+static"):
    EXPECTED[f"p3dc+{two}"] = BASE + UNITS // 2
for digits in ("1", "12", "23", "123", "234", "1234"):
    EXPECTED[f"stage{digits}"] = BASE + sum(STAGE[int(s)] + MORE[int(s)] for s in digits)


@pytest.mark.parametrize("variant", ROWS)
def test_parameters(variant):
    assert set(EXPECTED) == set(ROWS)
    assert parameters(meta(variant)) == EXPECTED[variant]


def test_parameters_that_the_text_prints():
    # "~0.5 million" and "~5 million" are about ten times what STRF and non-local add
    assert UNITS == 57_344 and EXPECTED["p3dc+nonlocal"] - BASE == 463_360


@functools.cache
def macs(variant):
    return multiply_adds(meta(variant), 8, 224, 112)


# width of a unit, positions of its maps, number of such units behind S (P3D-A and P3D-C)
PLACES = ((128, 28 * 14, 2), (256, 14 * 7, 3))


def unit_macs(places):
    """Four 1x1 convolutions, four C = kappa T^T T and, the masks of a dimension being added, two
    products f M."""
    total = 0
    for width, positions, blocks in places:
        h = width * width // 16 * positions * 8
        covariance = width // 16 * 8 * positions**2
        product = width * 8 * positions**2
        total += blocks * (4 * h + 4 * covariance + 2 * product)
    return total


def test_multiply_adds():
    base = macs("p3dc")
    assert macs("strf-p3dc") - base == unit_macs(PLACES)
    # without FAM f^T f and f M for both dimensions
    assert macs("strf-nofam") - base == sum(n * 4 * c * 8 * p * p for c, p, n in PLACES)
    attention = sum(n * c * (8 * p) ** 2 for c, p, n in PLACES)
    projections = sum(n * 2 * c * c * 8 * p for c, p, n in PLACES)
    assert macs("p3dc+nonlocal") - base == attention + projections


def test_p3db_and_i3d_have_the_unit_before_the_stride():
    """In block 1 of stage 2 on 1,568 positions instead of 392, in that of stage 3 on 392 instead of
    98."""
    places = ((128, 1568, 1), (128, 392, 1), (256, 392, 1), (256, 98, 2))
    for layer, moved in (("p3da", False), ("p3db", True), ("p3dc", False), ("i3d", True)):
        more = macs(f"strf-{layer}") - macs(layer)
        assert more == unit_macs(places if moved else PLACES), layer


def normal_temporal_weights(model, std):
    for module in model.modules():
        if isinstance(module, P3DConv):
            nn.init.normal_(module.temporal.weight, std=std)
        elif isinstance(module, InflatedConv):
            nn.init.normal_(module.conv.weight, std=std)


@pytest.mark.parametrize(
    "T, H, W, pool, layer",
    [
        (4, 48, 33, "avg", "p3d-c"),
        (3, 38, 33, "max", "i3d"),
        (1, 64, 32, "avg", "p3d-a"),
        (2, 48, 32, "avg", "p3d-b"),
    ],
)
def test_network(T, H, W, pool, layer, one_backbone):
    model, clips = wake(STRFNet(5, T, layer=layer, pool=pool)), torch.randn(4, T, 3, H, W)
    if layer != "i3d":
        normal_temporal_weights(model, 0.01)  # away from the zeros of the initialisation
    embedding, logits = outputs = model(clips)
    assert embedding.shape == (4, 2048) and logits.shape == (4, 5)
    args = settings(strf.RECIPE, ROWS, "strf-p3dc")
    check_gradients(model, sum(strf.losses(outputs, torch.tensor([0, 0, 1, 1]), args).values()))
    model = model.double().eval()
    with torch.no_grad():
        both = model(clips[:2].double())
        assert both.shape == (2, 2048)
        close(model(clips[1:2].double()), both[1:])  # clips do not mix
    with pytest.raises(ValueError, match=f"clips of {T} frames, not {T + 1}"):
        model(torch.randn(1, T + 1, 3, H, W))


@pytest.mark.parametrize("variant", [name for name in ROWS if not ROWS[name].same])
def test_every_variant_runs(variant, one_backbone):
    with torch.no_grad():
        embedding, logits = network(variant, frames=4)(torch.randn(2, 4, 3, 48, 32))
    assert embedding.isfinite().all() and logits.shape == (2, 3)


@pytest.mark.parametrize(
    "variant", ["i3d", "p3da", "p3db", "p3dc", "strf-p3db", "strf-p3dc", "p3dc+nonlocal"]
)
def test_3d_variants_start_as_the_2d_network(variant, one_backbone):
    """Zero temporal kernels: the features of the 2D network; STRF in front of a zero kernel changes
    nothing either."""
    model = wake(network(variant, frames=4)).double().eval()
    clips = torch.randn(1, 4, 3, 48, 32, dtype=torch.float64)
    out = model(clips)
    awake = copy.deepcopy(model)
    normal_temporal_weights(awake, 0.1)
    changed = awake(clips)  # what is compared is at work: other kernels, other features
    assert not torch.allclose(changed, out, atol=1e-2, rtol=1e-2)
    for stage in (model.layer2, model.layer3):
        for block in stage:
            if isinstance(block.conv2, InflatedConv):
                conv = block.conv2.conv
                plain = nn.Conv2d(
                    conv.in_channels, conv.out_channels, 3, conv.stride[1:], 1, bias=False
                )
                plain.weight = nn.Parameter(conv.weight[:, :, 1].detach())
                block.conv2 = plain
            elif isinstance(block.conv2, P3DConv):
                block.conv2 = block.conv2.spatial
    close(model(clips), out)


# --------------------------------------------------------------------------- recipe, rows and flags


@pytest.mark.parametrize("variant", ["strf-p3dc", "strf-p3db"])
def test_the_shapes_in_the_docstring(variant):
    model, shapes = meta(variant), {}

    def note(name):
        def hook(module, inputs, output):
            shapes[name] = tuple(output.shape[-3:])

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    model.eval()(torch.empty(1, 8, 3, 224, 112, device="meta"))
    wanted = {"stem": (64, 56, 28), "layer1": (256, 56, 28), "layer2": (512, 28, 14)}
    wanted |= {"layer3": (1024, 14, 7), "layer4": (2048, 14, 7)}
    first, then = (128, 28, 14), (256, 14, 7)
    wanted |= {"layer2.0.conv2.strf": first, "layer2.2.conv2.strf": first}
    wanted |= {f"layer3.{i}.conv2.strf": then for i in (0, 2, 4)}
    if variant == "strf-p3db":
        wanted |= {"layer2.0.conv2.strf": (128, 56, 28), "layer3.0.conv2.strf": (256, 28, 14)}
    for name, shape in wanted.items():
        assert shapes[name] == shape, name
        assert " x ".join(map(str, shape)) in STRFNet.__doc__
    assert sum(isinstance(m, STRF) for m in model.modules()) == 5


def units(variant, **changes):
    return [m for m in meta(variant, **changes).modules() if isinstance(m, STRF)]


def test_what_the_rows_change_reaches_the_units():
    for row, r in (
        ("resolutions-11", (1, 1)),
        ("resolutions-13", (1, 3)),
        ("resolutions-15", (1, 5)),
        ("resolutions-35", (3, 5)),
    ):
        for unit in units(row):
            t, s = unit.ffm["t"].masks, unit.ffm["s"].masks
            assert [mask.window for mask in t] == [(r[0], 1, 1), (r[1], 1, 1)]
            assert [mask.window for mask in s] == [(1, r[0], r[0]), (1, r[1], r[1])]
    for t in ("max", "avg"):
        for s in ("max", "avg"):
            seen = {
                (d, mask.pool)
                for unit in units(f"pool-t-{t}-s-{s}")
                for d in "ts"
                for mask in unit.ffm[d].masks
            }
            assert seen == {("t", t), ("s", s)}
    for order in ("ts", "st", "parallel"):
        assert {unit.order for unit in units(f"order-{order}")} == {order}
    dimensions = [list(units(f"p3dc+{name}")[0].ffm) for name in ("fine", "dynamic")]
    assert dimensions == [["s"], ["t"]]
    assert list(units("p3dc+fine+dynamic")[0].ffm) == ["t", "s"]
    for unit in units("strf-nofam"):
        assert [type(ffm.masks[0]) for ffm in unit.ffm.values()] == 2 * [SelfProductMask]
    model = meta("p3dc+nonlocal")
    assert sum(isinstance(m, NonLocalBlock) for m in model.modules()) == 5
    assert not units("p3dc+nonlocal")


def test_every_setting_reaches_its_module():
    """All in one network, which no row has, and none of them is forgotten here."""
    changes = dict(
        layer="p3d-b",
        stages=(1, 4),
        blocks=(2, 3, 6),
        factors=(STATIC, FINE),
        resolutions=(3, 7),
        pools=("avg", "max"),
        order="parallel",
        reduction=8,
        kappa=2.0,
        normalize=False,
        pool="avg",
        frames=5,
    )
    model = network(**changes)
    assert model.frames == 5 and model.pool == "avg"
    places = {name: m for name, m in model.named_modules() if isinstance(m, P3DConv)}
    # stages 1 and 4 have three blocks, stage 2 four, stage 3 six
    wanted = ["layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2", "layer3.5"]
    assert list(places) == [f"{name}.conv2" for name in [*wanted, "layer4.1", "layer4.2"]]
    assert {m.kind for m in places.values()} == {"b"}
    for name, module in places.items():
        assert (module.strf is not None) == (name[5] in "14")
        if module.strf:
            static, fine = module.strf.ffm["t"].masks, module.strf.ffm["s"].masks
            assert module.strf.order == "parallel" and len(static) == len(fine) == 1
            assert (static[0].window, static[0].pool) == ((7, 1, 1), "avg")
            assert (fine[0].window, fine[0].pool) == ((1, 3, 3), "max")
            for mask in (static[0], fine[0]):
                assert (mask.kappa, mask.normalize) == (2.0, False)
                assert mask.h.out_channels == mask.h.in_channels // 8
    assert not units("strf-nofam", normalize=False)[0].ffm["t"].masks[0].normalize
    training = {"height", "width", "ids", "clips", "erase", "epochs", "lr", "lr_step"}
    training |= {"weight_decay", "weights", "margin", "epoch"}
    assert set(strf.RECIPE) == {*changes, *training, "attention", "fam"}


def test_the_printed_figures():
    """Tables 2 to 5 and Sec. 3.3."""

    def figures(name):
        return row_of(ROWS, name).results

    table2 = {
        "i3d": (82.70, 88.50, 95.20, 95.40),
        "strf-i3d": (83.10, 88.70, 95.20, 95.90),
        "p3da": (83.20, 88.90, 95.00, 95.00),
        "strf-p3da": (85.40, 89.80, 95.60, 96.00),
        "p3db": (83.00, 88.80, 95.40, 95.30),
        "strf-p3db": (85.60, 90.30, 96.40, 97.40),
        "p3dc": (83.10, 88.50, 95.30, 95.30),
        "strf-p3dc": (86.10, 90.30, 96.20, 97.20),
    }
    for name, printed in table2.items():
        assert (*figures(name)["mars"], *figures(name)["duke"]) == printed
    assert figures("strf-p3dc")["ilids"] == (None, 89.30)
    others = {
        "p3dc+nonlocal": (84.8, 89.9),
        "p3dc+fine": (85.20, 89.70),
        "p3dc+coarse": (85.10, 89.90),
        "p3dc+dynamic": (85.20, 89.90),
        "p3dc+static": (85.10, 90.00),
        "p3dc+fine+coarse": (85.50, 90.10),
        "p3dc+dynamic+static": (85.30, 89.70),
        "p3dc+fine+dynamic": (85.40, 90.00),
        "p3dc+coarse+static": (85.70, 90.10),
        "stage1": (83.40, 88.80),
        "stage12": (83.60, 89.00),
        "stage123": (84.70, 89.30),
        "stage234": (85.50, 90.00),
        "stage1234": (83.70, 88.70),
    }
    for name, printed in others.items():
        assert figures(name) == {"mars": printed}
    same = {name for name, row in ROWS.items() if row.same == "strf-p3dc"}
    assert same == {"stage23", "resolutions-13", "pool-t-max-s-max", "order-ts"}
    assert all(not figures(name) for name in set(ROWS) - {*table2, *others, *same})
    for name, row in ROWS.items():
        assert set(row.settings) <= set(strf.RECIPE), name


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: STRF(16, factors=("t-slow",)), "factors must be one or more of t-dynamic"),
        (lambda: STRF(16, factors=()), "factors must be one or more"),
        (lambda: STRF(16, factors=(FINE, FINE)), "each once"),
        (lambda: STRF(16, order="t"), "order must be ts, st or parallel, not t"),
        (lambda: STRF(16, resolutions=(1, 2)), "an odd number, at least 1, not 2"),
        (lambda: STRF(16, resolutions=(-1, 3)), "an odd number, at least 1, not -1"),
        (lambda: STRF(16, resolutions=(3, 1)), "r_tau <= r_sigma"),
        (lambda: STRF(16, resolutions=(3,)), "r_tau <= r_sigma"),
        (lambda: STRF(16, pools=("max", "sum")), "must be max or avg, not sum"),
        (lambda: STRF(16, pools=("max",)), "one for time and one for space"),
        (lambda: STRF(8), "the reduction of 8 channels must be from 1 to 8, not 16"),
        (lambda: STRF(8, reduction=0), "from 1 to 8, not 0"),
        (
            lambda: FactorizedAttentionMask(16, dimension="x", resolution=1),
            "dimension must be t or s, not x",
        ),
        (lambda: STRFNet(5, layer="2d"), "layer must be i3d, p3d-a, p3d-b or p3d-c, not 2d"),
        (lambda: STRFNet(5, stages=(5,)), "stages must be numbers from 1 to 4"),
        (lambda: STRFNet(5, attention="gc"), "attention must be strf or nonlocal, not gc"),
        (lambda: STRFNet(5, attention="nonlocal", fam=False), "no FAM to leave out"),
        (lambda: STRFNet(5, stages=(2,), blocks=(5, 6)), "stage 2 has blocks 1 to 4, and none of"),
        (lambda: STRFNet(5, blocks=()), "stage 2 has blocks 1 to 4, and none of"),
    ],
)
def test_wrong_arguments(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("options", [{"stages": ()}, {"attention": "nonlocal"}])
def test_an_unknown_argument_of_strf_is_refused_where_no_unit_is_built(options):
    with pytest.raises(TypeError, match="no argument kapa"):
        STRFNet(5, kapa=3, **options)


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--resolutions", 1), "r_tau <= r_sigma"),
        (("--resolutions", 1, 4), "an odd number, at least 1, not 4"),
        (("--pools", "max"), "one for time and one for space"),
        (("--factors",), "factors must be one or more"),
        (("--reduction", 512), "from 1 to 128, not 512"),
        (("--attention", "nonlocal", "--no-fam"), "no FAM to leave out"),
        (("--stages", 1, "--blocks", 6), "stage 1 has blocks 1 to 3"),
        (("--stages", 5), "--stages"),
        (("--order", "tt"), "--order"),
    ],
)
def test_wrong_flags_are_one_line(refuses, small_root, flags, says):
    refuses(("--root", small_root, *flags), says, script="strf.py")


def test_where_strf_stands():
    def places(variant, kind, **changes):
        modules = meta(variant, **changes).named_modules()
        return [name.removesuffix(".strf") for name, m in modules if isinstance(m, kind)]

    five = [f"layer2.{i}.conv2" for i in (0, 2)] + [f"layer3.{i}.conv2" for i in (0, 2, 4)]
    assert places("strf-p3dc", STRF) == places("p3dc", P3DConv) == places("i3d", InflatedConv)
    assert places("strf-p3dc", STRF) == places("p3dc+nonlocal", NonLocalBlock) == five
    assert not places("p3dc", STRF)
    one = ["layer1.0.conv2", "layer1.2.conv2"]
    assert places("stage1", STRF) == one and places("stage1", P3DConv) == [*one, *five]
    assert places("stage234", STRF)[-2:] == ["layer4.0.conv2", "layer4.2.conv2"]
    # --blocks 1 2 3 4 5 6: "We then replace stage 2 and stage 3", as printed
    every = [f"layer{stage}.{i}.conv2" for stage, n in ((2, 4), (3, 6)) for i in range(n)]
    assert places("strf-p3dc", STRF, blocks=(1, 2, 3, 4, 5, 6)) == every


@pytest.mark.parametrize(
    "variant, masks", [("strf-p3dc", 4), ("strf-nofam", 2), ("p3dc+nonlocal", 0), ("p3dc", 0)]
)
def test_the_picture_has_the_masks_of_the_first_units(variant, masks, one_backbone):
    """A map for each frame, and for each stage with STRF every mask on the first frame, with the
    middle position left out: the row of the mask of Eq. 3 for it."""
    model = network(variant, frames=4).eval()
    frames = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    clips, seen = torch.randn(1, 4, 3, 64, 64), []
    for module in model.layer3.modules():
        if type(module).__name__ in ("FactorizedAttentionMask", "SelfProductMask"):
            module.register_forward_hook(lambda own, x, m: seen.append(m))
    _, rows = strf.picture(model, clips, frames)
    stages = [2, 3] if masks else []
    assert [label[:7] for label in rows] == ["last ma", *(f"stage {n}" for n in stages)]
    assert [len(panels(0, 1)) for *_, panels in rows.values()] == [5] + [masks + 1] * len(stages)
    if masks:
        [label] = [label for label in rows if label.startswith("stage 3")]
        shown, *_ = rows[label]
        for drawn, m in zip(shown, seen):
            H, W = drawn.shape
            own = m[0, :, H // 2 * W + W // 2].view(H, W)
            assert drawn[H // 2, W // 2].isnan() and drawn.isnan().sum() == 1
            assert torch.equal(drawn[drawn.isfinite()], own[drawn.isfinite()])
