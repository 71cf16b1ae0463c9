"""STRF's modules against slow float64 versions of the paper's equations, its invariants, and its complexity."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import strf
from common import batch_hard_triplet, complexity
from conftest import check_gradients, close, maps, parameters, randomize, wake
from strf import (COARSE, DYNAMIC, FINE, STATIC, STRF, VARIANTS, FactorizedAttentionMask, FeatureFactorizationModule, InflatedConv, P3DConv,
                  STRFNet)

SIZES = pytest.mark.parametrize("C, H, W", [(16, 4, 3), (32, 2, 5)])
LENGTHS = pytest.mark.parametrize("T", [1, 2, 4, 8, 16])


# ------------------------------------------------------------------------------------- the equations, slowly, with loops

def slow_pool(x, dimension, r, pool):                             # Eq. 4 or 6; x (T, c, H, W), same size, nothing beyond the edges
    (T, _, H, W), reach = x.shape, r // 2
    rt, rs = (reach, 0) if dimension == "t" else (0, reach)
    out = torch.zeros_like(x)
    for t in range(T):
        for i in range(H):
            for j in range(W):
                window = [x[u, :, a, b] for u in range(max(0, t - rt), min(T, t + rt + 1)) for a in range(max(0, i - rs), min(H, i + rs + 1))
                          for b in range(max(0, j - rs), min(W, j + rs + 1))]
                window = torch.stack(window)
                out[t, :, i, j] = window.amax(0) if pool == "max" else window.mean(0)
    return out


def slow_mask(fam, f, dimension, r, pool="max", kappa=4.0, normalize=True):    # Eq. 2-3; f (T, C, H, W)
    T, C, H, W = f.shape
    h = torch.einsum("oc,tchw->tohw", fam.h.weight[:, :, 0, 0], f)
    g = slow_pool(h, dimension, r, pool)
    columns = [torch.cat([g[t, :, p // W, p % W] for t in range(T)]) for p in range(H * W)]
    if normalize:
        columns = [c / c.norm().clamp(min=1e-12) for c in columns]
    m = torch.zeros(H * W, H * W, dtype=f.dtype)
    for q in range(H * W):
        e = [torch.exp(kappa * (columns[p] @ columns[q])) for p in range(H * W)]
        for p in range(H * W):
            m[p, q] = e[p] / sum(e)                               # over rows
    return m


def slow_apply(m, f):                                             # Eq. 1: (c t x hw) (hw x hw)
    T, C, H, W = f.shape
    return (f.reshape(T * C, H * W) @ m).view(T, C, H, W)


def slow_strf(unit, f, factors, resolutions, pools, order):       # Eq. 5, 7, 8
    spec = {DYNAMIC: ("t", resolutions[0], pools[0]), STATIC: ("t", resolutions[1], pools[0]),
            FINE: ("s", resolutions[0], pools[1]), COARSE: ("s", resolutions[1], pools[1])}

    def factorize(d, f):
        chosen = [name for name in factors if spec[name][0] == d]
        if not chosen:
            return None
        return sum(slow_apply(slow_mask(mask, f, *spec[name]), f) for name, mask in zip(chosen, unit.ffm[d].masks, strict=True))
    if order == "parallel":
        return sum(y for y in (factorize("t", f), factorize("s", f)) if y is not None)
    for d in order:
        y = factorize(d, f)
        f = f if y is None else y
    return f


# --------------------------------------------------------------------------------------------------- fast against slow

@SIZES
@LENGTHS
@pytest.mark.parametrize("dimension, r, pool, normalize", [("t", 1, "max", True), ("t", 3, "max", True), ("t", 5, "avg", True), ("s", 3, "max", True),
                                                           ("s", 3, "avg", False), ("s", 5, "max", True)])
def test_fam(C, H, W, T, dimension, r, pool, normalize):
    fam = randomize(FactorizedAttentionMask(C, dimension, r, pool, reduction=8, normalize=normalize))
    f = maps(T, C, H, W) / (1 if normalize else 10)
    m = fam(f)
    close(m, torch.stack([slow_mask(fam, clip, dimension, r, pool, 4.0, normalize) for clip in f]))
    close(m.sum(1), torch.ones_like(m[:, 0]))                     # stochastic along the rows: columns sum to one


ALL = (DYNAMIC, STATIC, FINE, COARSE)


@SIZES
@LENGTHS
@pytest.mark.parametrize("factors, resolutions, pools, order", [
    (ALL, (1, 3), ("max", "max"), "ts"), (ALL, (1, 3), ("max", "max"), "st"), (ALL, (1, 3), ("max", "avg"), "parallel"), (ALL, (3, 5), ("avg", "max"), "ts"),
    ((FINE,), (1, 3), ("max", "max"), "ts"), ((STATIC,), (1, 3), ("max", "max"), "ts"), ((COARSE, STATIC), (1, 3), ("max", "max"), "ts")])
def test_strf(C, H, W, T, factors, resolutions, pools, order):
    unit, f = randomize(STRF(C, factors, resolutions, pools, order, reduction=8)), maps(T, C, H, W)
    close(unit(f), torch.stack([slow_strf(unit, clip, factors, resolutions, pools, order) for clip in f]))
    frames = f.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, T))
    close(unit(frames), unit(f))
    assert unit(frames).flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_strf_properties():
    f = torch.rand(2, 4, 16, 3, 4)
    ffm = FeatureFactorizationModule([FactorizedAttentionMask(16, "t", 1)])
    y = ffm(f).flatten(3)
    low, high = f.flatten(3).amin(3), f.flatten(3).amax(3)        # every position becomes a weighted average of the frame's own positions
    assert (y >= low[..., None] - 1e-5).all() and (y <= high[..., None] + 1e-5).all()
    same = f[:, :, :, :1, :1].expand(-1, -1, -1, 3, 4)            # of equal positions the average is the same again
    torch.testing.assert_close(ffm(same), same)
    a, b = STRF(16, resolutions=(1, 1), order="ts"), STRF(16, (DYNAMIC, FINE), order="parallel")
    torch.testing.assert_close(a(same), 4 * same)                 # two masks each, one after the other, no scaling
    torch.testing.assert_close(b(same), 2 * same)
    assert sum(p.numel() for p in STRF(128).parameters()) == 4_096 and sum(p.numel() for p in STRF(256).parameters()) == 16_384


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_input_stays_finite(value, dtype):
    f = torch.full((2, 4, 16, 4, 4), value, dtype=dtype, requires_grad=True)
    y = STRF(16).to(dtype)(f)
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

    def temporal(x, weight, stride=1, padding=0):                 # slowly: weight (O, C, 3, k, k), x (B, T, C, H, W)
        y = 0
        for a in (-1, 0, 1):
            moved = torch.zeros_like(x)
            for t in range(T):
                if 0 <= t + a < T:
                    moved[:, t] = x[:, t + a]
            y = y + F.conv2d(moved.flatten(0, 1), weight[:, :, a + 1], None, stride, padding)
        return y
    for unit in (None, randomize(STRF(16, reduction=8))):
        i3d = InflatedConv(conv, T, unit).double()
        seen = unit(x) if unit else x
        close(i3d(frames), conv(seen.flatten(0, 1)))              # the rest starts as the 2D convolution
        nn.init.normal_(i3d.conv.weight)
        close(i3d(frames), temporal(seen, i3d.conv.weight, stride, 1))
        for kind in "abc":
            p3d = P3DConv(conv, T, kind, unit).double()
            if not unit or kind != "a":
                close(p3d(frames), conv(frames))
            nn.init.normal_(p3d.temporal.weight)
            s = conv(frames).unflatten(0, (2, T))
            seen = x if kind == "b" else s
            t = temporal(unit(seen) if unit else seen, p3d.temporal.weight, stride if kind == "b" else 1)
            close(p3d(frames), t if kind == "a" else s.flatten(0, 1) + t)


# ------------------------------------------------------------------------------------------------ objective and network

def test_objective():
    embedding, logits, pids = torch.randn(4, 6), torch.randn(4, 3), torch.tensor([0, 0, 2, 2])
    loss, parts = strf.objective((embedding, logits), pids, type("Args", (), dict(margin=0.3)))
    torch.testing.assert_close(loss, F.cross_entropy(logits, pids) + batch_hard_triplet(embedding, pids, 0.3))


def meta(variant):
    with torch.device("meta"):
        return STRFNet(625, 8, **VARIANTS[variant][0])


def unit(width, factors=4):
    return factors * width * width // 16


P3D, I3D, TRUNK = 2 * 3 * 128 ** 2 + 3 * 3 * 256 ** 2, 2 * 18 * 128 ** 2 + 3 * 18 * 256 ** 2, 23_508_032
BASE = TRUNK + P3D
FULL = BASE + 2 * unit(128) + 3 * unit(256)
EXPECTED = {row: FULL for row in VARIANTS} | {"i3d": TRUNK + I3D, "strf-i3d": TRUNK + I3D + FULL - BASE, "p3da": BASE, "p3db": BASE, "p3dc": BASE}
EXPECTED |= {f"p3dc+{name}": BASE + (2 * unit(128) + 3 * unit(256)) // 4 for name in ("fine", "coarse", "dynamic", "static")}
EXPECTED |= {f"p3dc+{name}": BASE + (2 * unit(128) + 3 * unit(256)) // 2 for name in ("fine+coarse", "dynamic+static", "fine+dynamic", "coarse+static")}
STAGE = {1: 2 * unit(64), 2: 2 * unit(128), 3: 3 * unit(256), 4: 2 * unit(512)}
MORE = {1: 2 * 3 * 64 ** 2, 2: 0, 3: 0, 4: 2 * 3 * 512 ** 2}      # stages 1 and 4 become 3D where STRF stands in them
EXPECTED |= {f"stage{stages}": BASE + sum(STAGE[int(s)] + MORE[int(s)] for s in stages) for stages in ("1", "12", "23", "123", "234", "1234")}
HEAD = 625 * 2048 + 625


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters(variant):
    count, printed = parameters(meta(variant)), (VARIANTS[variant][1] or ())[2:]
    assert count == EXPECTED[variant]
    if printed:
        assert round((count + HEAD) / 1e6, 2) == printed[0]


def test_parameters_as_the_paper_counts():
    """With the 625-way classifier and no neck BN; the paper prints 28.92, 28.97, 25.48 and 25.53 million."""
    model = meta("strf-p3dc")
    assert sum(p.numel() for p in model.classifier.parameters()) == HEAD
    counts = [parameters(meta(row)) + HEAD for row in ("i3d", "strf-i3d", "p3dc", "strf-p3dc")]
    assert counts == [28_917_425, 28_974_769, 25_476_785, 25_534_129]


def test_multiply_adds():
    """A unit: four 1x1 convolutions, four C = kappa T^T T and, the masks of a dimension being added, two products f M."""
    base, full = (complexity(meta(row), 8, 224, 112)[1] for row in ("p3dc", "strf-p3dc"))
    expected = 0
    for width, positions, blocks in ((128, 28 * 14, 2), (256, 14 * 7, 3)):
        h, covariance, product = width * width // 16 * positions * 8, width // 16 * 8 * positions ** 2, width * 8 * positions ** 2
        expected += blocks * (4 * h + 4 * covariance + 2 * product)
    assert full - base == expected


@pytest.mark.parametrize("T, H, W, pool, layer", [(4, 64, 48, "avg", "p3d-c"), (8, 70, 33, "max", "i3d"), (1, 64, 32, "avg", "p3d-a"), (2, 48, 32, "avg", "p3d-b")])
def test_network(T, H, W, pool, layer):
    model, clips = wake(STRFNet(5, T, layer, pool=pool)), torch.randn(4, T, 3, H, W)
    for module in model.modules():                                # away from the zeros of the initialisation
        if isinstance(module, P3DConv):
            nn.init.normal_(module.temporal.weight, std=0.01)
    embedding, logits = model(clips)
    assert embedding.shape == (4, 2048) and logits.shape == (4, 5)
    check_gradients(model, strf.objective((embedding, logits), torch.tensor([0, 0, 1, 1]), type("Args", (), dict(margin=0.3)))[0])
    model.eval()
    with torch.no_grad():
        out = model(clips)
        assert out.shape == (4, 2048)
        torch.testing.assert_close(model(clips[1:2]), out[1:2], atol=1e-3, rtol=1e-3)          # clips do not mix
    with pytest.raises(ValueError, match=f"clips of {T} frames, not {T + 1}"):
        model(torch.randn(1, T + 1, 3, H, W))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs(variant):
    model = STRFNet(3, 4, **VARIANTS[variant][0])
    embedding, logits = model(torch.randn(2, 4, 3, 64, 32))
    assert embedding.isfinite().all() and logits.shape == (2, 3)


@pytest.mark.parametrize("variant", ["i3d", "p3da", "p3db", "p3dc", "strf-p3db", "strf-p3dc"])
def test_3d_variants_start_as_the_2d_network(variant):
    """Zero temporal kernels: the features of the 2D network; STRF in front of a zero kernel changes nothing either."""
    model = wake(STRFNet(3, 4, **VARIANTS[variant][0])).eval()
    clips = torch.randn(1, 4, 3, 64, 32)
    out = model(clips)
    awake = copy.deepcopy(model)                                  # what is compared is at work: other kernels, other features
    for module in awake.modules():
        if isinstance(module, (P3DConv, InflatedConv)):
            nn.init.normal_(module.temporal.weight if isinstance(module, P3DConv) else module.conv.weight, std=0.1)
    assert not torch.allclose(awake(clips), out, atol=1e-2, rtol=1e-2)
    for stage in (model.layer2, model.layer3):
        for block in stage:
            if isinstance(block.conv2, InflatedConv):
                block.conv2, conv = nn.Conv2d(block.conv2.conv.in_channels, block.conv2.conv.out_channels, 3, block.conv2.conv.stride[1:], 1, bias=False), block.conv2.conv
                block.conv2.weight = nn.Parameter(conv.weight[:, :, 1].detach())
            elif isinstance(block.conv2, P3DConv):
                block.conv2 = block.conv2.spatial
    torch.testing.assert_close(model(clips), out, atol=1e-3, rtol=1e-4)


def test_what_the_rows_change_reaches_the_units():
    def units(variant):
        return [m for m in meta(variant).modules() if isinstance(m, STRF)]
    for row, r in (("resolutions-11", (1, 1)), ("resolutions-13", (1, 3)), ("resolutions-15", (1, 5)), ("resolutions-35", (3, 5))):
        for unit in units(row):
            assert [mask.window for mask in unit.ffm["t"].masks] == [(r[0], 1, 1), (r[1], 1, 1)]
            assert [mask.window for mask in unit.ffm["s"].masks] == [(1, r[0], r[0]), (1, r[1], r[1])]
    for t in ("max", "avg"):
        for s in ("max", "avg"):
            assert {(d, mask.pool) for unit in units(f"pool-t-{t}-s-{s}") for d in "ts" for mask in unit.ffm[d].masks} == {("t", t), ("s", s)}
    assert [{unit.order for unit in units(f"order-{order}")} for order in ("ts", "st", "parallel")] == [{"ts"}, {"st"}, {"parallel"}]
    assert [list(units(f"p3dc+{name}")[0].ffm) for name in ("fine", "dynamic", "fine+dynamic")] == [["s"], ["t"], ["t", "s"]]


@pytest.mark.parametrize("make, says", [
    (lambda: STRF(16, ("t-slow",)), "STRF takes one or more"), (lambda: STRF(16, ()), "STRF takes one or more"), (lambda: STRF(16, order="t"), "order ts, st or parallel"),
    (lambda: STRF(16, resolutions=(1, 2)), "an odd resolution"), (lambda: STRF(16, pools=("max", "sum")), "pool max or avg"), (lambda: STRF(8), "at least 16 channels"),
    (lambda: STRFNet(5, layer="2d"), "3D layers are"), (lambda: STRFNet(5, stages=(5,)), "stages 1 to 4")])
def test_wrong_arguments(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_where_strf_stands():
    def places(variant, kind):
        return [name.removesuffix(".strf") for name, m in meta(variant).named_modules() if isinstance(m, kind)]
    five = ["layer2.0.conv2", "layer2.2.conv2", "layer3.0.conv2", "layer3.2.conv2", "layer3.4.conv2"]
    assert places("strf-p3dc", STRF) == places("p3dc", P3DConv) == places("i3d", InflatedConv) == five and not places("p3dc", STRF)
    assert places("stage1", STRF) == ["layer1.0.conv2", "layer1.2.conv2"] and places("stage1", P3DConv) == ["layer1.0.conv2", "layer1.2.conv2", *five]
    assert places("stage234", STRF)[-2:] == ["layer4.0.conv2", "layer4.2.conv2"]
