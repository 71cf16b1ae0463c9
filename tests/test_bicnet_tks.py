"""BiCnet-TKS: the modules against slow float64 versions of the paper's equations, and the
invariants, variants and complexity of the network."""

import copy
import functools
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from bicnet_tks import (
    RECIPE,
    ROWS,
    BiCnet,
    BranchBatchNorm,
    CrossScalePath,
    DiverseAttentionsOperation,
    TemporalKernelSelection,
    build,
    divergence_loss,
    losses,
)
from common import batch_hard_triplet, row_of, settings
from conftest import check_gradients, close, maps, multiply_adds, parameters, randomize, wake

SIZES = pytest.mark.parametrize("C, H, W", [(8, 4, 6), (16, 8, 4)])
DIFFERENT = [name for name, row in ROWS.items() if not row.same]


def network(row="bicnet-tks", num_classes=3, **changes):
    """The network of a variant as the script builds it, by default for frames of 64x32."""
    changes = {"height": 64, "width": 32, "weights": "none", **changes}
    return build(settings(RECIPE, ROWS, row, **changes), num_classes)


def meta(row="bicnet-tks", **changes):
    """The same for 256x128 frames and 625 identities, on the meta device."""
    with torch.device("meta"):
        return network(row, 625, **{"height": 256, "width": 128, **changes})


# ------------------------------------------------------------- the equations, slowly, with loops


def slow_csp(csp, big, small, alpha):
    """Eq. 2; big (B, M, C, H, W), small (B, alpha M, C, H/2, W/2)."""
    (B, M, C, H, W), w = big.shape, csp.conv.weight[:, :, 0, 0]  # (alpha C, C)
    out = small.clone()
    for b in range(B):
        for m in range(M):
            for i in range(H // 2):
                for j in range(W // 2):
                    window = big[b, m, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                    pooled = torch.stack([max(window[c].flatten()) for c in range(C)])
                    mixed = w @ pooled
                    for a in range(alpha):  # big frame m feeds alpha m ... alpha m + alpha - 1
                        out[b, alpha * m + a, :, i, j] += mixed[a * C : (a + 1) * C]
    return out


def slow_bn(bn, o):
    """Over the batch; o (B, C)."""
    mean, var = o.mean(0), ((o - o.mean(0)) ** 2).mean(0)
    return (o - mean) / (var + bn.eps).sqrt() * bn.weight + bn.bias


def softmax(values):
    e = [torch.exp(v - max(values)) for v in values]
    return torch.stack([v / sum(e) for v in e])


def slow_dao(dao, x):
    """Eq. 3; x (B, M, C, H, W)."""
    B, M, C, H, W = x.shape
    a = torch.zeros(B, M, H * W, dtype=x.dtype)
    attended = torch.zeros(B, M, C, dtype=x.dtype)
    for b in range(B):
        for k in range(M):
            pixels = [x[b, k, :, p // W, p % W] for p in range(H * W)]
            if k == 0:
                scores = [sum(pixel[c] for c in range(C)) / C for pixel in pixels]
            else:
                conv, _, fc = dao.attention[k - 1]
                compressed = torch.stack([conv.weight[0, :, 0, 0] @ pixel for pixel in pixels])
                scores = list(fc.weight @ compressed)
            a[b, k] = softmax(scores)
            attended[b, k] = sum(a[b, k, p] * pixels[p] for p in range(H * W))
    return x + slow_bn(dao.bn, attended.flatten(0, 1)).view(B, M, C, 1, 1), a.view(B, M, H, W)


def slow_divergence(a):
    """Eq. 4-5; a (M, H, W)."""
    M, total = len(a), 0
    for k in range(1, M):
        total = total + sum(1 - (a[k] * a[n]).sum() for n in range(k)) / k
    return -total / (M - 1)


def slow_tks(tks, maps, kernels, grid, select=True, bottleneck=True, excite_bn=True):
    """Eq. 6-8."""
    (h, w), C, K = grid, maps[0].shape[2], len(kernels)
    B, frames = maps[0].shape[0], [m[:, t] for m in maps for t in range(m.shape[1])]
    T = len(frames)
    x = torch.zeros(B, T, C, h, w, dtype=maps[0].dtype)
    for t, f in enumerate(frames):
        H, W = f.shape[2] // h, f.shape[3] // w
        for i in range(h):
            for j in range(w):
                x[:, t, :, i, j] = f[:, :, i * H : (i + 1) * H, j * W : (j + 1) * W].mean((2, 3))
    y = torch.zeros(K, B, T, C, h, w, dtype=x.dtype)
    for n, (path, k) in enumerate(zip(tks.paths, kernels)):
        dilation = (k - 1) // 2
        for t in range(T):
            for tap in (-1, 0, 1):
                if 0 <= t + tap * dilation < T:  # zeros before and after the clip
                    tapped = x[:, t + tap * dilation]
                    y[n, :, t] += torch.einsum("oc,bchw->bohw", path.weight[:, :, tap + 1], tapped)
    if select and K > 1:
        u = y.sum(0).mean((1, 3, 4))  # Eq. 6: (B, C)
        if bottleneck:
            u = slow_bn(tks.squeeze[1], u @ tks.squeeze[0].weight.T).clamp(min=0)
        e = [torch.exp(u @ w_i.T) for w_i in tks.w.weight.chunk(K)]
        g = [e_i / sum(e) for e_i in e]  # Eq. 7
    else:
        g = [torch.full((B, C), 1 / K, dtype=x.dtype)] * K
    z = sum(g_i[:, None, :, None, None] * y_i for g_i, y_i in zip(g, y))  # Eq. 8
    if excite_bn:
        z = slow_bn(tks.bn, z.movedim(2, 4).reshape(-1, C)).view(B, T, h, w, C).movedim(4, 2)
    out, t = [], 0
    for m in maps:
        z_m = z[:, t : t + m.shape[1]].flatten(0, 1)
        out.append(m + F.interpolate(z_m, m.shape[3:], mode="nearest").view_as(m))
        t += m.shape[1]
    return out


# --------------------------------------------------------------------------- fast against slow


@SIZES
@pytest.mark.parametrize("M, alpha", [(1, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_csp(C, H, W, M, alpha, layout):
    csp = randomize(CrossScalePath(C, alpha=alpha))
    branches = maps(M, C, H, W), maps(alpha * M, C, H // 2, W // 2)
    fast = csp(*(x.flatten(0, 1).contiguous(memory_format=layout).view_as(x) for x in branches))
    close(fast, slow_csp(csp, *branches, alpha))


@SIZES
@pytest.mark.parametrize("M", [1, 2, 6])
def test_dao(C, H, W, M):
    dao, x = randomize(DiverseAttentionsOperation(C, M, H, W)), maps(M, C, H, W, B=3)
    out, a = dao(x)
    slow, slow_a = slow_dao(dao, x)
    close(out, slow)
    close(a, slow_a)
    close(a.sum((2, 3)), torch.ones(3, M, dtype=a.dtype))  # attention maps sum to one
    assert len(dao.attention) == M - 1
    start = DiverseAttentionsOperation(C, M, H, W)
    assert torch.equal(start(x.float())[0], x.float())  # starts as identity
    with pytest.raises(ValueError, match="DAO was built for"):
        dao(x[..., :-1])


@pytest.mark.parametrize("M", [2, 3, 6])
def test_divergence_loss(M):
    a = torch.rand(3, M, 4, 5, dtype=torch.float64)
    close(divergence_loss(a), sum(slow_divergence(clip) for clip in a) / 3)
    disjoint = torch.eye(20, dtype=torch.float64)[:M].view(1, M, 4, 5)
    assert divergence_loss(disjoint) + 1 == 0  # 0 up to the constant -1 of Eq. 4
    same = disjoint[:, :1].expand(-1, M, -1, -1)
    assert divergence_loss(same) == 0
    even = torch.full((1, M, 4, 5), 1 / 20, dtype=torch.float64)
    assert divergence_loss(even).item() == pytest.approx(1 / 20 - 1, rel=1e-12)
    assert divergence_loss(a[:, :1]) == 0  # one frame: no pair


def test_the_divergence_loss_reaches_a_1():
    """A_1 has no parameters. Its gradient flows into the maps of the first frame, and that of the
    other attention maps into the maps of their frames."""
    dao, d = randomize(DiverseAttentionsOperation(8, 3, 4, 2)), maps(3, 8, 4, 2).requires_grad_()
    divergence_loss(dao(d)[1]).backward()
    assert (d.grad.abs().sum((0, 2, 3, 4)) > 0).all()


KERNELS = pytest.mark.parametrize(
    "kernels, select",
    [((3,), False), ((3,), True), ((3, 5), True), ((5, 7), False), ((3, 5, 7), True)],
)
FORMS = pytest.mark.parametrize(
    "forms",
    [
        {},
        dict(bottleneck=False),  # W_i is C x C, as in the paper
        dict(excite_bn=False),  # E_t = U(Z_t) + F_t, as in the paper
        dict(bottleneck=False, excite_bn=False),
    ],
)


@SIZES
@KERNELS
@FORMS
@pytest.mark.parametrize("grid", [(4, 2), (2, 1)])
def test_tks(C, H, W, kernels, select, grid, forms):
    tks = TemporalKernelSelection(
        C, kernels=kernels, grid=grid, reduction=4, select=select, **forms
    )
    for p in randomize(tks).parameters():
        p.data *= 0.3  # W_i u of C x C stays below the largest exponent
    branches = maps(2, C, 2 * H, 2 * W, B=3), maps(6, C, H, W, B=3)
    slow = slow_tks(tks, branches, kernels, grid, select, **forms)
    for fast, expected in zip(tks(*branches), slow, strict=True):
        close(fast, expected)
    (alone,) = slow_tks(tks, branches[1:], kernels, grid, select, **forms)
    close(tks(branches[1])[0], alone)  # a single branch


@FORMS
def test_tks_selection_weights(forms):
    tks = randomize(TemporalKernelSelection(8, kernels=(3, 5, 7), reduction=4, **forms))
    y = torch.randn(3, 3, 8, 24, dtype=torch.float64)
    g = tks.selection_weights(y)
    assert g.shape == (3, 3, 8) and (g > 0).all()
    close(g.sum(1), torch.ones(3, 8, dtype=g.dtype))  # over the paths, for each clip and channel
    tk = TemporalKernelSelection(8, kernels=(3, 5, 7), reduction=4, select=False, **forms)
    assert tk.w is None and (tk.selection_weights(y) == 1 / 3).all()
    single = TemporalKernelSelection(8, kernels=(5,), reduction=4, **forms)
    assert single.w is None  # there is nothing to select


def test_tks_in_the_papers_form_has_w_i_of_c_x_c():
    def names(**forms):
        tks = TemporalKernelSelection(8, kernels=(3, 5), reduction=4, **forms)
        return {name for name, _ in tks.named_parameters() if "paths" not in name}

    squeeze = {"squeeze.0.weight", "squeeze.1.weight", "squeeze.1.bias"}
    assert names() == {*squeeze, "w.weight", "bn.weight", "bn.bias"}
    assert names(bottleneck=False) == {"w.weight", "bn.weight", "bn.bias"}
    assert names(excite_bn=False) == {*squeeze, "w.weight"}
    assert names(bottleneck=False, excite_bn=False) == {"w.weight"}
    full = TemporalKernelSelection(8, kernels=(3, 5), bottleneck=False, reduction=4)
    assert full.w.weight.shape == (16, 8)


def test_tks_properties():
    x = maps(8, 16, 8, 4)
    tks = TemporalKernelSelection(16, reduction=2).double()
    assert torch.equal(tks(x)[0], x)  # starts as identity
    assert not torch.equal(TemporalKernelSelection(16, excite_bn=False).double()(x)[0], x)
    wake(tks).eval()
    changed = torch.cat([x[:, :4], x[:, 4:5] + 1, x[:, 5:]], 1)
    reach = (tks(x)[0] - tks(changed)[0]).abs().amax((0, 2, 3, 4))
    assert (reach > 0).all()  # selection looks at the whole clip
    nn.init.zeros_(tks.w.weight)  # without it a frame sees 2 frames to each side: kernel 5
    reach = (tks(x)[0] - tks(changed)[0]).abs().amax((0, 2, 3, 4))
    assert [i for i in range(8) if reach[i] > 1e-9] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(kernels=(4,)), r"kernels, which are odd and at least 3, not \(4,\)"),
        (dict(kernels=(3, 1)), r"kernels, which are odd and at least 3, not \(3, 1\)"),
        (dict(kernels=()), r"one or more kernels, .* not \(\)"),
        (dict(grid=(4,)), "grid must be h and w"),
        (dict(grid=(0, 2)), "grid must be h and w"),
        (dict(grid=()), "grid must be h and w"),
        (dict(grid=(1, 1, 1)), "grid must be h and w"),
        (dict(reduction=0), "reduction must be from 1 to 16, not 0"),
        (dict(reduction=17), "reduction must be from 1 to 16, not 17"),
    ],
)
def test_tks_refuses(options, says):
    with pytest.raises(ValueError, match=says):
        TemporalKernelSelection(16, **options)


def test_tks_refuses_other_maps():
    with pytest.raises(ValueError, match="cannot divide a map of 6x4 into 4x2 equal regions"):
        TemporalKernelSelection(16)(torch.zeros(1, 2, 16, 6, 4))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_input_stays_finite(value, dtype):
    big = torch.full((2, 2, 16, 8, 4), value, dtype=dtype, requires_grad=True)
    small = torch.full((2, 4, 16, 4, 2), value, dtype=dtype, requires_grad=True)
    csp = CrossScalePath(16, alpha=2).to(dtype)
    tks = wake(TemporalKernelSelection(16, grid=(2, 1))).to(dtype)
    dao = wake(DiverseAttentionsOperation(16, 4, 4, 2)).to(dtype)
    y, a = dao(tks(big, csp(big, small))[1])
    (y.float().sum() + divergence_loss(a.float())).backward()
    assert y.isfinite().all() and y.dtype == dtype
    assert big.grad.isfinite().all() and small.grad.isfinite().all()


# ---------------------------------------------------------------------------------- the losses


def test_losses():
    embedding, logits, pids = torch.randn(4, 6), torch.randn(4, 3), torch.tensor([0, 0, 2, 2])
    attention = [torch.rand(4, 2, 3, 3), torch.rand(4, 6, 2, 2)]
    args = settings(RECIPE, ROWS, "bicnet-tks")
    assert (args.margin, args.divergence) == (0.5, 0.01)
    parts = losses((embedding, logits, attention), pids, args)
    assert list(parts) == ["xent", "triplet", "div"]
    assert torch.equal(parts["xent"], F.cross_entropy(logits, pids))
    assert torch.equal(parts["triplet"], batch_hard_triplet(embedding, pids, 0.5))
    mean = (divergence_loss(attention[0]) + divergence_loss(attention[1])) / 2
    assert torch.equal(parts["div"], 0.01 * mean)
    without_dao = settings(RECIPE, ROWS, "tb+csp")
    alone = losses((embedding, logits, []), pids, without_dao)
    assert list(alone) == ["xent", "triplet"]
    args.margin, args.divergence = 0.7, 0.3
    parts = losses((embedding, logits, attention), pids, args)
    assert torch.equal(parts["triplet"], batch_hard_triplet(embedding, pids, 0.7))
    assert torch.equal(parts["div"], 0.3 * mean)
    args.divergence = 0.0
    assert list(losses((embedding, logits, attention), pids, args)) == ["xent", "triplet"]


# -------------------------------------------------------------------- branches' own statistics


def test_a_branch_has_its_own_statistics_and_shares_the_weights():
    bn = nn.BatchNorm2d(3).double()
    nn.init.uniform_(bn.running_mean)
    own, before = BranchBatchNorm(bn, 2), bn.running_mean.clone()
    x = 1 + torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)  # the maps of each branch
    for i in (0, 1):
        own.active_branch = i
        assert torch.equal(own(x[i]), copy.deepcopy(bn)(x[i]))  # in training, as any BatchNorm
    for i in (0, 1):  # each average saw its own branch alone
        rows = x[i].movedim(1, 3).reshape(-1, 3)
        close(own.per_branch[i].running_mean, 0.9 * before + 0.1 * rows.mean(0))
        close(own.per_branch[i].running_var, 0.9 + 0.1 * rows.var(0))
    own.eval()
    for i in (0, 1):
        own.active_branch = i
        rows = x[i].movedim(1, 3)
        bn_i = own.per_branch[i]
        slow = (rows - bn_i.running_mean) / (bn_i.running_var + bn.eps).sqrt()
        close(own(x[i]), slow.movedim(3, 1))
    assert {id(p) for p in own.parameters()} == {id(bn.weight), id(bn.bias)}


def test_own_statistics(one_backbone):
    """In training only the running statistics differ. In eval mode each branch is normalised by its
    own statistics, as by a network for each branch."""
    flags = dict(csp=False, dao=False, tks=(), frames=4)
    torch.manual_seed(1)
    shared = network("tb", **flags).double()
    torch.manual_seed(1)
    own = network("tb", **flags, own_statistics=True).double()
    assert len(list(own.parameters())) == len(list(shared.parameters()))
    assert sum(isinstance(m, BranchBatchNorm) for m in own.modules()) == len(own.branch_norms) == 53
    clips = torch.randn(2, 4, 3, 64, 32, dtype=torch.float64)
    for mine, theirs in zip(own(clips)[:2], shared(clips)[:2]):
        close(mine, theirs)
    own.eval()
    halves = F.interpolate(clips[:, 1:].flatten(0, 1), (32, 16), mode="bilinear", antialias=True)
    features = []
    for i, frames in enumerate((clips[:, :1], halves.unflatten(0, (2, 3)))):
        state = {
            name.replace(f"per_branch.{i}.", ""): value
            for name, value in own.state_dict().items()
            if f"per_branch.{1 - i}." not in name
        }
        size = dict(frames=frames.shape[1], height=frames.shape[3], width=frames.shape[4])
        base = network("base-b", **size).double().eval()
        base.load_state_dict(state)
        features.append(base(frames))
    close(own(clips), (features[0] + features[1]) / 2)  # the neck is affine in eval mode
    for norm in own.branch_norms:
        norm.per_branch[0], norm.per_branch[1] = norm.per_branch[1], norm.per_branch[0]
    assert (own(clips) - (features[0] + features[1]) / 2).abs().max() > 1e-3


def test_a_network_with_own_statistics_can_be_kept_copied_and_synchronised():
    own = network(own_statistics=True)
    for p in own.buffers():
        if p.is_floating_point():
            nn.init.uniform_(p, 0.5, 1.5)
    other = network(own_statistics=True)
    state = own.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    other.load_state_dict(state)
    clips = torch.randn(1, 8, 3, 64, 32)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(own))
    for model in (own, other, synchronised):
        weights = {bn.weight for norm in model.branch_norms for bn in norm.per_branch}
        assert len(model.branch_norms) == len(weights) == 53
        assert all(norm in [*model.modules()] for norm in model.branch_norms[:3])
    with torch.no_grad():
        assert torch.equal(own.eval()(clips), other.eval()(clips))


# --------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(
    "N, H, W, changes",
    [
        (8, 64, 32, {}),
        (4, 64, 96, dict(pool="max")),
        (4, 64, 32, dict(own_statistics=True)),
        (4, 64, 32, dict(bottleneck=False, excite_bn=False, csp_stages=(1, 2, 3, 4))),
    ],
)
def test_network(N, H, W, changes, one_backbone):
    model = network(num_classes=5, frames=N, height=H, width=W, **changes)
    model = wake(model).double().to(memory_format=torch.channels_last)
    clips = torch.randn(4, N, 3, H, W, dtype=torch.float64)
    embedding, logits, attention = model(clips)
    assert embedding.shape == (4, 2048) and logits.shape == (4, 5)
    big, small = (4, N // 4, H // 16, W // 16), (4, N * 3 // 4, H // 32, W // 32)
    assert [a.shape for a in attention] == [big, small]
    args = settings(RECIPE, ROWS, "bicnet-tks")
    parts = losses((embedding, logits, attention), torch.tensor([0, 0, 1, 1]), args)
    check_gradients(model, sum(parts.values()))
    model.eval()
    with torch.no_grad():
        out = model(clips)
        assert out.shape == (4, 2048)
        close(model(clips[1:2]), out[1:2])  # clips do not mix


@pytest.mark.parametrize("row", DIFFERENT)
def test_every_row_runs(row, one_backbone):
    args = settings(RECIPE, ROWS, row)
    H, W = (128, 64) if {3, 4} & {*args.tks} else (64, 32)
    model = network(row, height=H, width=W)
    with torch.no_grad():
        embedding, logits, attention = model(torch.randn(2, args.frames, 3, H, W))
    assert embedding.isfinite().all() and logits.shape == (2, 3)
    assert len(attention) == (2 if args.dao else 0)
    parts = losses((embedding, logits, attention), torch.tensor([0, 1]), args)
    assert ("div" in parts) == (args.dao and row != "tb+csp+ao")


@pytest.mark.parametrize(
    "row, changes",
    [
        ("base-b", dict(tks=(1, 2, 3, 4), kernels=(7,), dao=True)),
        ("base-s", dict(tks=(2,), grid=(2, 1), select=False)),
        ("height-256+128+64", dict(dao=True, tks=(2,), grid=(1, 1), own_statistics=True)),
        ("tb-alpha4", dict(csp=True, dao=True, reduction=4)),
        ("tb", dict(csp=True, csp_stages=(2,), tks=(1,), bottleneck=False)),
        ("tks-k357", dict(excite_bn=False, csp=False, divergence=0.0)),
        ("bicnet-tk", dict(csp_stages=(1, 2, 3, 4), own_statistics=True)),
    ],
)
def test_settings_combine(row, changes, one_backbone):
    args = settings(RECIPE, ROWS, row, **changes)
    model = network(row, **changes)
    outputs = model(torch.randn(2, args.frames, 3, 64, 32))
    loss = sum(losses(outputs, torch.tensor([0, 1]), args).values())
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters())


def test_after_which_stages_the_modules_come():
    def places(row, **changes):
        model = meta(row, **changes)
        return list(model.csp), list(model.tks), len(model.dao)

    three = ["layer1", "layer2", "layer3"]
    assert places("bicnet-tks") == (three, ["layer2"], 2)
    assert places("tb") == ([], [], 0)
    assert places("tb+csp") == (three, [], 0)
    assert places("tks-stage23")[1] == ["layer2", "layer3"]
    assert places("bicnet-tks", csp_stages=(1, 2, 3, 4))[0] == [*three, "layer4"]


def test_branches():
    """Eq. 1: the same network processes the first N / (1 + alpha) frames at full size and the
    others at half the size."""
    model, base = network("tb").double().eval(), network("base-b").double().eval()
    base.load_state_dict(model.state_dict())
    clips = torch.randn(1, 8, 3, 64, 32, dtype=torch.float64)
    f_d = base(clips[:, :2].repeat(1, 4, 1, 1, 1))
    halves = F.interpolate(clips[:, 2:].flatten(0, 1), (32, 16), mode="bilinear", antialias=True)
    small = network("base-b", frames=6, height=32, width=16).double().eval()
    small.load_state_dict(model.state_dict())
    f_c = small(halves[None])
    close(model(clips), (f_d + f_c) / 2)  # BN is affine in eval mode


def test_the_network_starts_as_two_branches_with_csp():
    """TKS and DAO start as the identity."""
    full, csp = network().double().eval(), network("tb+csp").double().eval()
    csp.load_state_dict(full.state_dict(), strict=False)
    clips = torch.randn(1, 8, 3, 64, 32, dtype=torch.float64)
    close(full(clips), csp(clips))


JOINS = "CSP needs shares of two branches .* not "


@pytest.mark.parametrize(
    "size, options, says",
    [
        ((6, 256, 128), {}, "frames must be a multiple of 4, .* the ratio 1:3, not 6"),
        (
            (8, 256, 128),
            dict(shares=(1, 2), csp_stages=()),
            "frames must be a multiple of 3, .* the ratio 1:2, not 8",
        ),
        (
            (8, 100, 128),
            {},
            "height must be a multiple of 64 and width a multiple of 32 .* not 100x128",
        ),
        (
            (8, 64, 32),
            dict(tks=(3,)),
            "height must be a multiple of 128 and width a multiple of 64 .* not 64x32",
        ),
        ((8, 192, 96), dict(tks=(4,)), "height must be a multiple of 128"),
        ((12, 256, 128), dict(shares=(1,)), JOINS + "1$"),
        ((12, 256, 128), dict(shares=(0, 1)), JOINS + "0:1$"),
        ((12, 256, 128), dict(shares=(1, 0)), JOINS + "1:0$"),
        ((12, 256, 128), dict(shares=(2, 3)), JOINS + "2:3$"),
        ((12, 256, 128), dict(shares=(1, 1, 1)), JOINS + "1:1:1$"),
        ((8, 256, 128), dict(shares=()), r"at least one branch, not \(\)"),
        ((8, 256, 128), dict(shares=(0, 0), csp_stages=()), r"at least one branch, not \(0, 0\)"),
        ((8, 256, 128), dict(tks=(5,)), r"tks must be different stages from 1 to 4, not \(5,\)"),
        ((8, 256, 128), dict(tks=(0,)), "tks must be different stages"),
        ((8, 256, 128), dict(tks=(2, 2)), "tks must be different stages"),
        ((8, 256, 128), dict(csp_stages=(4, 5)), "csp_stages must be different stages"),
        ((8, 256, 128), dict(grid=(4,)), r"grid must be h and w, .* not \(4,\)"),
        ((8, 256, 128), dict(grid=(4, 0)), r"grid must be h and w, .* not \(4, 0\)"),
        ((8, 256, 128), dict(kernels=(3, 4)), r"odd and at least 3, not \(3, 4\)"),
        ((8, 256, 128), dict(kernels=()), r"odd and at least 3, not \(\)"),
        ((8, 256, 128), dict(reduction=0), "reduction must be from 1 to 512, not 0"),
    ],
)
def test_network_refuses(size, options, says):
    with pytest.raises(ValueError, match=says), torch.device("meta"):
        BiCnet(5, *size, **options)


@pytest.mark.parametrize("tks", [(), (1,), (2,), (3,), (4,), (2, 3)])
@pytest.mark.parametrize("csp_stages", [(), (1,), (1, 2, 3), (4,)])
def test_the_sizes_that_the_error_names_fit(tks, csp_stages):
    with pytest.raises(ValueError) as error:
        BiCnet(3, 4, 1, 1, tks=tks, csp_stages=csp_stages)
    says = r"height must be a multiple of (\d+) and width a multiple of (\d+)"
    H, W = map(int, re.search(says, str(error.value)).groups())
    with torch.device("meta"):
        model = BiCnet(3, 4, H, W, tks=tks, csp_stages=csp_stages).eval()
        assert model(torch.empty(1, 4, 3, H, W)).shape == (1, 2048)


# ------------------------------------------------------------------------- rows and complexity


def test_the_rows_name_what_their_tables_vary():
    tables = {"tb-alpha": "shares", "height-": "shares", "tks-k": "kernels", "tks-stage": "tks"}
    for name in ROWS:
        for start, setting in tables.items():
            if name.startswith(start):
                set_there = setting in row_of(ROWS, name).settings
                assert set_there or ROWS[name].same == "bicnet-tks", name
    for name in ("bicnet-tks", "base-s", "base-b", "tb", "tb+csp", "tb+csp+ao", "bicnet-tk"):
        assert {"shares", "csp", "dao", "tks"} <= row_of(ROWS, name).settings.keys(), name
    for name in ROWS:  # Table 1 is the only one beyond MARS
        figures = row_of(ROWS, name).results
        assert set(figures) == (
            {"mars", "duke", "lsvid"} if row_of(ROWS, name) is ROWS["bicnet-tks"] else {"mars"}
        )
    assert ROWS["bicnet-tks"].results["duke"] == (96.1, 96.3)
    assert ROWS["bicnet-tks"].results["lsvid"] == (75.1, 84.6)
    same = {name: row.same for name, row in ROWS.items() if row.same}
    assert same == {
        "height-256": "base-b",
        "height-128": "base-s",
        "tb-alpha0": "base-b",
        "tb-alpha3": "tb",
        "tb-alpha-inf": "base-s",
        "tks-k35": "bicnet-tks",
        "tks-stage2": "bicnet-tks",
    }


# Convolutions of CSP: 3 C^2 for C = 256, 512, 1024. DAO: 1024 + (16 8)^2 for one frame,
# 5 (1024 + (8 4)^2) for five, two BNs. TKS: 3 C^2 for each path, selection C C/16 (1 + K) and BN,
# BN.
TRUNK, CSP, DAO = 23_508_032, 4_128_768, 27_648 + 2 * 2 * 1024
BICNET = TRUNK + CSP + DAO


def tks_parameters(C, K):
    selection = C * (C // 16) * (1 + K) + 2 * (C // 16) if K > 1 else 0
    return 3 * C * C * K + selection + 2 * C


EXPECTED = {
    **{row: TRUNK for row in ROWS if row.startswith(("base", "height", "tb-alpha"))},
    "tb": TRUNK,
    "tb+csp": TRUNK + CSP,
    "tb+csp+ao": BICNET,
    "tb+csp+dao": BICNET,
    "bicnet-tk": BICNET + 3 * 512 * 512 * 2 + 1024,
    **{
        row: BICNET + tks_parameters(512, 2)
        for row in ("bicnet-tks", "tks-stage2", "tks-k35", "tks-k37", "tks-k57")
    },
    **{row: BICNET + tks_parameters(512, 1) for row in ("tks-k3", "tks-k5", "tks-k7")},
    "tks-k357": BICNET + tks_parameters(512, 3),
    "tks-stage1": BICNET + tks_parameters(256, 2),
    "tks-stage3": BICNET + tks_parameters(1024, 2),
    "tks-stage4": BICNET + tks_parameters(2048, 2),
    "tks-stage23": BICNET + tks_parameters(512, 2) + tks_parameters(1024, 2),
}


@pytest.mark.parametrize("row", ROWS)
def test_parameters(row):
    assert set(EXPECTED) == set(ROWS)
    assert parameters(meta(row)) == EXPECTED[row]


def test_parameters_without_batchnorm_and_dao():
    """Integers that the paper's values agree with: without DAO and the BatchNorms of TKS."""

    def count(row):
        model, added = meta(row), 0
        for tks in model.tks.values():
            for bn in tks.modules():
                if isinstance(bn, nn.BatchNorm1d):
                    added += sum(p.numel() for p in bn.parameters())
        return parameters(model) - added - DAO * bool(model.dao)

    expected = {
        "tb+csp": 27_636_800,
        "bicnet-tks": 29_258_816,
        "bicnet-tk": 29_209_664,
        "tks-k3": 28_423_232,
        "tks-k357": 30_061_632,
        "tks-stage1": 28_042_304,
        "tks-stage3": 34_124_864,
        "tks-stage4": 53_589_056,
        "tks-stage23": 35_746_880,
    }
    assert {row: count(row) for row in expected} == expected
    assert sum(p.numel() for p in meta("tb+csp+dao").dao.parameters()) == 27_648 + 4_096


def test_parameters_of_the_papers_forms():
    """The numbers that the docstring gives. Statistics for each branch add no parameter."""
    full = meta("tks-stage4", bottleneck=False)
    w = 2 * 2048**2
    assert parameters(full) == BICNET + 2 * 3 * 2048**2 + w + 2 * 2048 == 61_227_072
    assert parameters(meta("tb+csp", csp_stages=(1, 2, 3, 4))) == TRUNK + CSP + 3 * 2048**2
    assert 3 * 2048**2 == 12_582_912
    assert parameters(meta(excite_bn=False)) == EXPECTED["bicnet-tks"] - 2 * 512
    assert parameters(meta(own_statistics=True)) == EXPECTED["bicnet-tks"]


@functools.cache
def macs_a_frame(row, **changes):
    """10^9 multiply-adds of the convolutions and matrix products for an average frame."""
    args = settings(RECIPE, ROWS, row)
    model = meta(row, **changes)
    return multiply_adds(model, args.frames, 256, 128) / args.frames / 1e9


def test_multiply_adds():
    """Of a frame, with small frames resized at the input. The paper has 1.02, 4.08, 0.25, 1.81 and
    1.89 for the first five."""
    macs = {row: macs_a_frame(row) for row in DIFFERENT}
    computed = [round(macs[row], 3) for row in ("base-s", "base-b", "height-64", "tb", "tb+csp")]
    assert computed == [1.013, 4.053, 0.253, 1.773, 1.849]
    base, half = macs["base-b"], macs["base-s"]
    three = (base + half + macs["height-64"]) / 3
    assert macs["height-256+128+64"] == pytest.approx(three, rel=1e-9)
    for alpha, row in enumerate(("tb-alpha1", "tb-alpha2", "tb", "tb-alpha4"), 1):
        assert macs[row] == pytest.approx((base + alpha * half) / (1 + alpha), rel=1e-9)
    csp = 0
    for C, s in ((256, 1), (512, 2), (1024, 4)):  # pooled big frames, 2 of 8
        csp += 3 * C * C * (64 // s) * (32 // s) // 4 * 2 / 8
    assert macs["tb+csp"] - macs["tb"] == pytest.approx(csp / 1e9, rel=1e-6)
    scores = 1024 * 128 + 128**2 + 5 * (1024 * 32 + 32**2)
    products = (2 * 128 + 6 * 32) * 1024  # sums of A * D
    dao = (macs["tb+csp+dao"] - macs["tb+csp"]) * 1e9
    assert dao == pytest.approx((scores + products) / 8, abs=1)
    path = 3 * 512 * 512 * 8 / 1e9  # 4 x 2 regions
    assert macs["bicnet-tks"] - macs["tb+csp+dao"] == pytest.approx(2 * path, rel=0.01)
    for more, less in (("tks-k357", "bicnet-tks"), ("bicnet-tks", "tks-k3")):
        assert macs[more] - macs[less] == pytest.approx(path, rel=0.02)
    # the paper's values also have a full-size stem and the work of BatchNorm
    for row, value in gflops_in_the_paper().items():
        if not row.startswith(("tks", "bicnet")):
            assert -0.015 < value - macs[row] < 0.05, row
    kernels = ((3,), (3, 5), (3, 5, 7))
    eight = [macs_a_frame("bicnet-tks", kernels=k, grid=(8, 8)) for k in kernels]
    # as in the paper, each path adds 0.05
    assert [round(value, 2) for value in eight] == [1.9, 1.95, 2.0]


def gflops_in_the_paper():
    return {row: row_of(ROWS, row).costs["gflops_a_frame"] for row in DIFFERENT}
