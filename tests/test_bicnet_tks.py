"""BiCnet-TKS' modules against slow float64 versions of the paper's equations, its invariants, and its complexity."""
import math
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import bicnet_tks
from bicnet_tks import ROW_RECIPE, VARIANTS, BiCnet, CrossScalePath, DiverseAttentionsOperation, TemporalKernelSelection, divergence_loss
from common import batch_hard_triplet, complexity
from conftest import check_gradients, close, maps, parameters, randomize, wake

SIZES = pytest.mark.parametrize("C, H, W", [(8, 4, 6), (16, 8, 4)])


# ------------------------------------------------------------------------------------- the equations, slowly, with loops

def slow_csp(csp, big, small, alpha):                             # Eq. 2; big (B, M, C, H, W), small (B, alpha M, C, H/2, W/2)
    (B, M, C, H, W), w = big.shape, csp.conv.weight[:, :, 0, 0]   # (alpha C, C)
    out = small.clone()
    for b in range(B):
        for m in range(M):
            for i in range(H // 2):
                for j in range(W // 2):
                    pooled = torch.stack([max(big[b, m, c, 2 * i + y, 2 * j + x] for y in (0, 1) for x in (0, 1)) for c in range(C)])
                    mixed = w @ pooled
                    for a in range(alpha):                        # big frame m feeds the small frames alpha m ... alpha m + alpha - 1
                        out[b, alpha * m + a, :, i, j] += mixed[a * C:(a + 1) * C]
    return out


def slow_bn(bn, o):                                               # over the batch; o (B, C)
    mean, var = o.mean(0), ((o - o.mean(0)) ** 2).mean(0)
    return (o - mean) / (var + bn.eps).sqrt() * bn.weight + bn.bias


def softmax(values):
    e = [torch.exp(v - max(values)) for v in values]
    return torch.stack([v / sum(e) for v in e])


def slow_dao(dao, x):                                             # Eq. 3; x (B, M, C, H, W)
    B, M, C, H, W = x.shape
    a, attended = torch.zeros(B, M, H * W, dtype=x.dtype), torch.zeros(B, M, C, dtype=x.dtype)
    for b in range(B):
        for k in range(M):
            if k == 0:
                scores = [sum(x[b, 0, c, p // W, p % W] for c in range(C)) / C for p in range(H * W)]
            else:
                conv, _, fc = dao.attention[k - 1]
                compressed = torch.stack([conv.weight[0, :, 0, 0] @ x[b, k, :, p // W, p % W] for p in range(H * W)])
                scores = list(fc.weight @ compressed)
            a[b, k] = softmax(scores)
            attended[b, k] = sum(a[b, k, p] * x[b, k, :, p // W, p % W] for p in range(H * W))
    return x + slow_bn(dao.bn, attended.flatten(0, 1)).view(B, M, C, 1, 1), a.view(B, M, H, W)


def slow_divergence(a):                                           # Eq. 4-5; a (M, H, W)
    M = len(a)
    return -1 / (M - 1) * sum(1 / k * sum(1 - (a[k] * a[l]).sum() for l in range(k)) for k in range(1, M))


def slow_tks(tks, maps, kernels, grid, selected):                 # Eq. 6-8
    (h, w), C, K = grid, maps[0].shape[2], len(kernels)
    B, frames = maps[0].shape[0], [m[:, t] for m in maps for t in range(m.shape[1])]
    T = len(frames)
    x = torch.zeros(B, T, C, h, w, dtype=maps[0].dtype)
    for t, f in enumerate(frames):
        H, W = f.shape[2] // h, f.shape[3] // w
        for i in range(h):
            for j in range(w):
                x[:, t, :, i, j] = f[:, :, i * H:(i + 1) * H, j * W:(j + 1) * W].mean((2, 3))
    y = torch.zeros(K, B, T, C, h, w, dtype=x.dtype)
    for n, (path, k) in enumerate(zip(tks.paths, kernels)):
        dilation = (k - 1) // 2
        for t in range(T):
            for tap in (-1, 0, 1):
                if 0 <= t + tap * dilation < T:
                    y[n, :, t] += torch.einsum("oc,bchw->bohw", path.weight[:, :, tap + 1], x[:, t + tap * dilation])
    if selected:
        u = y.sum(0).mean((1, 3, 4))                              # Eq. 6: (B, C)
        s = slow_bn(tks.squeeze[1], u @ tks.squeeze[0].weight.T).clamp(min=0)
        e = [torch.exp(s @ W_i.T) for W_i in tks.weights.weight.chunk(K)]
        g = [e_i / sum(e) for e_i in e]                           # Eq. 7
    else:
        g = [torch.full((B, C), 1 / K, dtype=x.dtype)] * K
    z = sum(g_i[:, None, :, None, None] * y_i for g_i, y_i in zip(g, y))       # Eq. 8
    z = slow_bn(tks.bn, z.movedim(2, 4).reshape(-1, C)).view(B, T, h, w, C).movedim(4, 2)
    out, t = [], 0
    for m in maps:
        up = F.interpolate(z[:, t:t + m.shape[1]].flatten(0, 1), m.shape[3:], mode="nearest").view_as(m)
        out, t = [*out, m + up], t + m.shape[1]
    return out


# --------------------------------------------------------------------------------------------------- fast against slow

@SIZES
@pytest.mark.parametrize("M, alpha", [(1, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_csp(C, H, W, M, alpha, layout):
    csp, big, small = randomize(CrossScalePath(C, alpha)), maps(M, C, H, W), maps(alpha * M, C, H // 2, W // 2)
    fast = csp(*(x.flatten(0, 1).contiguous(memory_format=layout).unflatten(0, x.shape[:2]) for x in (big, small)))
    close(fast, slow_csp(csp, big, small, alpha))


@SIZES
@pytest.mark.parametrize("M", [1, 2, 6])
def test_dao(C, H, W, M):
    dao, x = randomize(DiverseAttentionsOperation(C, M, H, W)), maps(M, C, H, W, B=3)
    (out, a), (slow, slow_a) = dao(x), slow_dao(dao, x)
    close(out, slow)
    close(a, slow_a)
    close(a.sum((2, 3)), torch.ones(3, M, dtype=a.dtype))         # attention maps sum to one
    assert len(dao.attention) == M - 1
    start = DiverseAttentionsOperation(C, M, H, W)
    assert torch.equal(start(x.float())[0], x.float())            # starts as identity
    with pytest.raises(ValueError, match="DAO was built for"):
        dao(x[..., :-1])


@pytest.mark.parametrize("M", [2, 3, 6])
def test_divergence_loss(M):
    a = torch.rand(3, M, 4, 5, dtype=torch.float64)
    close(divergence_loss(a), sum(slow_divergence(clip) for clip in a) / 3)
    disjoint = torch.eye(20, dtype=torch.float64)[:M].view(1, M, 4, 5)
    assert divergence_loss(disjoint) + 1 == 0                     # 0 up to the constant -1 of Eq. 4
    same = disjoint[:, :1].expand(-1, M, -1, -1)
    assert divergence_loss(same) == 0 and divergence_loss(torch.full((1, M, 4, 5), 1 / 20)).item() == pytest.approx(1 / 20 - 1)
    assert divergence_loss(a[:, :1]) == 0                         # one frame: no pair


KERNELS = pytest.mark.parametrize("kernels, selected", [((3,), False), ((3, 5), True), ((5, 7), False), ((3, 5, 7), True)])


@SIZES
@KERNELS
@pytest.mark.parametrize("grid", [(4, 2), (2, 1)])
def test_tks(C, H, W, kernels, selected, grid):
    tks = randomize(TemporalKernelSelection(C, kernels, grid, reduction=4, select=selected))
    branches = maps(2, C, 2 * H, 2 * W, B=3), maps(6, C, H, W, B=3)
    for fast, slow in zip(tks(*branches), slow_tks(tks, branches, kernels, grid, selected), strict=True):
        close(fast, slow)
    close(tks(branches[1])[0], slow_tks(tks, branches[1:], kernels, grid, selected)[0])        # of a single branch


def test_tks_selection_weights():
    tks = randomize(TemporalKernelSelection(8, (3, 5, 7), reduction=4))
    y = torch.randn(3, 3, 8, 24, dtype=torch.float64)
    g = tks.select(y)
    assert g.shape == (3, 3, 8) and (g > 0).all()
    close(g.sum(1), torch.ones(3, 8, dtype=g.dtype))              # one over the paths, for every clip and channel
    tk = TemporalKernelSelection(8, (3, 5, 7), reduction=4, select=False)
    assert tk.weights is None and (tk.select(y) == 1 / 3).all()
    assert TemporalKernelSelection(8, (5,)).weights is None       # one path: nothing to select


def test_tks_properties():
    x = maps(8, 16, 8, 4).float()
    tks = TemporalKernelSelection(16, reduction=2)
    assert torch.equal(tks(x)[0], x)                              # starts as identity
    wake(tks).eval()
    reach = (tks(x)[0] - tks(torch.cat([x[:, :4], x[:, 4:5] + 1, x[:, 5:]], 1))[0]).abs().amax((0, 2, 3, 4))
    assert (reach > 0).all()                                      # selection looks at the whole clip
    nn.init.zeros_(tks.weights.weight)                            # without it a frame sees 2 frames to each side: kernel 5
    reach = (tks(x)[0] - tks(torch.cat([x[:, :4], x[:, 4:5] + 1, x[:, 5:]], 1))[0]).abs().amax((0, 2, 3, 4))
    assert [i for i in range(8) if reach[i] > 1e-6] == [2, 3, 4, 5, 6]
    for kernels in ((4,), (3, 1)):
        with pytest.raises(ValueError, match="odd kernels"):
            TemporalKernelSelection(16, kernels)
    with pytest.raises(ValueError, match="4x2 equal regions, which 6x4 does not allow"):
        tks(torch.zeros(1, 2, 16, 6, 4))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_input_stays_finite(value, dtype):
    big, small = (torch.full((2, M, 16, 8 // s, 4 // s), value, dtype=dtype, requires_grad=True) for M, s in ((2, 1), (4, 2)))
    csp, tks, dao = (wake(m).to(dtype) for m in (CrossScalePath(16, 2), TemporalKernelSelection(16, grid=(2, 1)), DiverseAttentionsOperation(16, 4, 4, 2)))
    y, a = dao(tks(big, csp(big, small))[1])
    (y.float().sum() + divergence_loss(a.float())).backward()
    assert y.isfinite().all() and big.grad.isfinite().all() and small.grad.isfinite().all() and y.dtype == dtype


# ------------------------------------------------------------------------------------------------ objective and network

def test_objective():
    embedding, logits, pids = torch.randn(4, 6), torch.randn(4, 3), torch.tensor([0, 0, 2, 2])
    attention = [torch.rand(4, 2, 3, 3), torch.rand(4, 6, 2, 2)]
    args = type("Args", (), dict(margin=0.5, divergence=0.01))
    loss, parts = bicnet_tks.objective((embedding, logits, attention), pids, args)
    base = F.cross_entropy(logits, pids) + batch_hard_triplet(embedding, pids, 0.5)
    torch.testing.assert_close(loss, base + 0.01 * (divergence_loss(attention[0]) + divergence_loss(attention[1])) / 2)
    torch.testing.assert_close(bicnet_tks.objective((embedding, logits, []), pids, args)[0], base)


def meta(variant):
    with torch.device("meta"):
        return BiCnet(625, ROW_RECIPE.get(variant, {}).get("frames", 8), **VARIANTS[variant][0])


# Convolutions of CSP: 3 C^2 for C = 256, 512, 1024. DAO: 1024 + (16 8)^2 for one frame, 5 (1024 + (8 4)^2) for five, two BNs.
# TKS: 3 C^2 for each path, selection C C/16 (1 + K) and BN, BN.
TRUNK, CSP, DAO = 23_508_032, 4_128_768, 27_648 + 2 * 2 * 1024
TKS = {(C, K): 3 * C * C * K + (C * (C // 16) * (1 + K) + 2 * (C // 16) if K > 1 else 0) + 2 * C for C in (256, 512, 1024, 2048) for K in (1, 2, 3)}
BICNET = TRUNK + CSP + DAO
EXPECTED = {row: TRUNK for row in VARIANTS if row.startswith(("base", "height", "tb-alpha"))} | {"tb": TRUNK}
EXPECTED |= {"tb+csp": TRUNK + CSP, "tb+csp+ao": BICNET, "tb+csp+dao": BICNET, "bicnet-tk": BICNET + 3 * 512 * 512 * 2 + 1024}
EXPECTED |= {row: BICNET + TKS[512, 2] for row in ("bicnet-tks", "tks-stage2", "tks-k35", "tks-k37", "tks-k57")}
EXPECTED |= {row: BICNET + TKS[512, 1] for row in ("tks-k3", "tks-k5", "tks-k7")} | {"tks-k357": BICNET + TKS[512, 3]}
EXPECTED |= {"tks-stage1": BICNET + TKS[256, 2], "tks-stage3": BICNET + TKS[1024, 2], "tks-stage4": BICNET + TKS[2048, 2],
             "tks-stage23": BICNET + TKS[512, 2] + TKS[1024, 2]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters(variant):
    """Next to the printed figures, which are truncated to 0.1 million; some rows are printed 0.1 lower."""
    assert set(EXPECTED) == set(VARIANTS)
    count, printed = parameters(meta(variant)), VARIANTS[variant][1][3]
    assert count == EXPECTED[variant]
    lower = variant in ("tks-k3", "tks-k5", "tks-k7", "bicnet-tk", "tks-stage4")
    assert round(math.floor(count / 1e5) / 10 - printed, 1) == (0.1 if lower else 0)


def test_parameters_without_batchnorm_and_dao():
    """The integers that the printed figures were derived from; BN and DAO are told apart."""
    def count(row):
        model = meta(row)
        added = sum(p.numel() for m in [*model.modules()] if isinstance(m, TemporalKernelSelection) for bn in m.modules()
                    if isinstance(bn, nn.BatchNorm1d) for p in bn.parameters())
        return parameters(model) - added - DAO * bool(model.dao)
    assert count("tb+csp") == 27_636_800 and count("bicnet-tks") == 29_258_816 and count("bicnet-tk") == 29_209_664
    assert count("tks-k3") == 28_423_232 and count("tks-k357") == 30_061_632 and count("tks-stage1") == 28_042_304
    assert count("tks-stage3") == 34_124_864 and count("tks-stage4") == 53_589_056 and count("tks-stage23") == 35_746_880
    assert sum(p.numel() for p in meta("tb+csp+dao").dao.parameters()) == 27_648 + 4_096


def test_multiply_adds():
    """Of a frame, convolutions only, small frames resized at the input; the paper prints 1.02, 4.08, 0.25, 1.81 and 1.89."""
    macs = {row: complexity(meta(row), frames := ROW_RECIPE.get(row, {}).get("frames", 8), 256, 128)[1] / frames / 1e9 for row in VARIANTS}
    assert [round(macs[row], 3) for row in ("base-s", "base-b", "height-64", "tb", "tb+csp")] == [1.013, 4.053, 0.253, 1.773, 1.849]
    assert macs["height-256+128+64"] == pytest.approx((macs["base-b"] + macs["base-s"] + macs["height-64"]) / 3, rel=1e-9)
    for alpha in (1, 2, 3, 4):
        assert macs[f"tb-alpha{alpha}"] == pytest.approx((macs["base-b"] + alpha * macs["base-s"]) / (1 + alpha), rel=1e-9)
    csp = sum(3 * C * C * (64 // s) * (32 // s) // 4 for C, s in ((256, 1), (512, 2), (1024, 4))) * 2 / 8  # pooled big frames, 2 of 8
    assert macs["tb+csp"] - macs["tb"] == pytest.approx(csp / 1e9, rel=1e-6)
    attention = (2 * (1024 * 128 + 128 ** 2) - 1024 * 128 - 128 ** 2 + 5 * (1024 * 32 + 32 ** 2) + (2 * 128 + 6 * 32) * 1024) / 8
    assert macs["tb+csp+dao"] * 1e9 - macs["tb+csp"] * 1e9 == pytest.approx(attention, abs=1)      # DAO: scores, and sums of A * D
    path = 3 * 512 * 512 * 8 / 1e9                                # 4 x 2 regions
    assert macs["bicnet-tks"] - macs["tb+csp+dao"] == pytest.approx(2 * path, rel=0.01)
    for more, less in (("tks-k357", "tks-k35"), ("tks-k35", "tks-k3")):
        assert macs[more] - macs[less] == pytest.approx(path, rel=0.02)
    for row, (_, figures) in VARIANTS.items():                    # printed: a full-size stem and the work of BN on top
        if not row.startswith(("tks", "bicnet")):
            assert -0.015 < figures[2] - macs[row] < 0.05, row
    with torch.device("meta"):                                    # the printed +0.05 a path fits regions of 4 x 2 pixels, an 8 x 8 grid
        eight = [complexity(BiCnet(625, tks=(2,), kernels=kernels, grid=(8, 8)), 8, 256, 128)[1] / 8e9 for kernels in ((3,), (3, 5), (3, 5, 7))]
    assert [round(value, 2) for value in eight] == [1.9, 1.95, 2.0]


@pytest.mark.parametrize("N, H, W, pool", [(8, 64, 32, "avg"), (4, 128, 96, "max")])
def test_network(N, H, W, pool):
    model, clips = wake(BiCnet(5, N, H, W, pool=pool)).to(memory_format=torch.channels_last), torch.randn(4, N, 3, H, W)
    embedding, logits, attention = model(clips)
    assert embedding.shape == (4, 2048) and logits.shape == (4, 5)
    assert [a.shape for a in attention] == [(4, N // 4, H // 16, W // 16), (4, N * 3 // 4, H // 32, W // 32)]
    args = type("Args", (), dict(margin=0.5, divergence=0.01))
    check_gradients(model, bicnet_tks.objective((embedding, logits, attention), torch.tensor([0, 0, 1, 1]), args)[0])
    model.eval()
    with torch.no_grad():
        out = model(clips)
        assert out.shape == (4, 2048)
        torch.testing.assert_close(model(clips[1:2]), out[1:2], atol=1e-3, rtol=1e-3)          # clips do not mix


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs(variant):
    N = ROW_RECIPE.get(variant, {}).get("frames", 8)
    model = BiCnet(3, N, 128, 64, **VARIANTS[variant][0])
    embedding, logits, attention = model(torch.randn(2, N, 3, 128, 64))
    assert embedding.isfinite().all() and logits.shape == (2, 3)
    assert len(attention) == (2 if model.dao and variant != "tb+csp+ao" else 0)


def test_where_the_modules_stand():
    def places(variant):
        model = meta(variant)
        return list(model.csp), list(model.tks), len(model.dao)
    assert places("bicnet-tks") == (["layer1", "layer2", "layer3"], ["layer2"], 2)
    assert places("tb") == ([], [], 0) and places("tks-stage23")[1] == ["layer2", "layer3"] and places("tb+csp") == (["layer1", "layer2", "layer3"], [], 0)


def test_branches():
    """Eq. 1: the first N / (1 + alpha) frames are seen at full size, the others at half of it, by the same network."""
    model, base = (BiCnet(3, **VARIANTS[row][0]).eval() for row in ("tb", "base-b"))
    base.load_state_dict(model.state_dict())
    clips = torch.randn(1, 8, 3, 64, 32)
    f_d = base(clips[:, :2].repeat(1, 4, 1, 1, 1))
    halves = F.interpolate(clips[:, 2:].flatten(0, 1), (32, 16), mode="bilinear", antialias=True)[None]
    small = BiCnet(3, 6, 32, 16, **VARIANTS["base-b"][0]).eval()
    small.load_state_dict(model.state_dict())
    f_c = small(halves)
    torch.testing.assert_close(model(clips), (f_d + f_c) / 2, atol=1e-4, rtol=1e-3)            # BN is affine in eval mode


def test_variants_start_as_two_branches_with_csp():
    """TKS and DAO start as identity."""
    full, csp = BiCnet(3, 8, 64, 32).eval(), BiCnet(3, 8, 64, 32, **VARIANTS["tb+csp"][0]).eval()
    csp.load_state_dict(full.state_dict(), strict=False)
    clips = torch.randn(1, 8, 3, 64, 32)
    torch.testing.assert_close(full(clips), csp(clips))


@pytest.mark.parametrize("arguments, options, says", [
    ((6, 256, 128), {}, r"1:3: a clip needs 4, 8, 12 \.\.\. frames, not 6"),
    ((8, 256, 128), dict(shares=(1, 2), csp=False), r"1:2: a clip needs 3, 6, 9 \.\.\. frames, not 8"),
    ((8, 100, 128), {}, r"heights of 64, 128, 192 \.\.\. and widths of 32, 64, 96 \.\.\. pixels, not 100x128"),
    ((8, 64, 32), dict(tks=(3,)), r"heights of 128, 256, 384 \.\.\. and widths of 64, 128, 192"),
    ((8, 192, 96), dict(tks=(4,)), r"heights of 128, 256, 384"),
    *(((12, 256, 128), dict(shares=shares), f"CSP joins two branches .* not {':'.join(map(str, shares))}") for shares in ((1,), (0, 1), (2, 3), (1, 1, 1))),
])
def test_network_refuses(arguments, options, says):
    with pytest.raises(ValueError, match=says):
        BiCnet(5, *arguments, **options)


@pytest.mark.parametrize("tks", [(), (1,), (2,), (3,), (4,), (2, 3)])
@pytest.mark.parametrize("csp", [True, False])
def test_the_sizes_that_are_said_to_fit_fit(tks, csp):
    with pytest.raises(ValueError) as error:
        BiCnet(3, 4, 1, 1, tks=tks, csp=csp)
    H, W = map(int, re.search(r"heights of (\d+), .* widths of (\d+), ", str(error.value)).groups())
    model = BiCnet(3, 4, H, W, tks=tks, csp=csp).eval()
    assert model(torch.randn(1, 4, 3, H, W)).isfinite().all()
