"""SINet's modules against slow float64 versions of the paper's equations, its invariants, and its
complexity."""

import math
import re

import pytest
import torch
import torch.nn as nn

import sinet
from common import batch_hard_triplet, settings
from conftest import check_gradients, close, maps, multiply_adds, parameters, randomize, wake
from sinet import (
    ROWS,
    ChannelAttentionLayer,
    CrossPropagationModule,
    GlobalContextBlock,
    IntegrationDistributionModule,
    KernelGenerationModule,
    NonLocalBlock,
    SINet,
    SalientToBroadModule,
    SuppressOperation,
    mutual_information_loss,
)

SIZES = pytest.mark.parametrize("C, H, W", [(8, 5, 4), (12, 8, 3)])
LENGTHS = pytest.mark.parametrize("T", [3, 4, 8])


# ------------------------------------------------------ the equations, slowly: one clip, with loops


def slow_cal(cal, x):  # Eq. 1-2; x (T, C, H, W)
    T, C, H, W = x.shape
    gap = torch.stack(
        [
            sum(x[t, c, i, j] for t in range(T) for i in range(H) for j in range(W)) / (T * H * W)
            for c in range(C)
        ]
    )
    inner = torch.stack(
        [
            sum(x[t, c, i, j] for t in range(T) for i in range(1, H - 1) for j in range(1, W - 1))
            / (T * (H - 2) * (W - 2))
            for c in range(C)
        ]
    )
    w_se = torch.sigmoid(cal.excite.weight @ torch.relu(cal.squeeze.weight @ gap))
    return torch.stack(
        [
            torch.stack([(1.0 if gap[c] < inner[c] else 0.0) * w_se[c] * x[t, c] for c in range(C)])
            for t in range(T)
        ]
    )


def slow_attention(kgm, p):  # 1x1 conv, BN over the batch, ReLU; p (B, s, C, H, W)
    conv, bn = kgm.attention[0], kgm.attention[1]
    a = torch.einsum("kc,bschw->bskhw", conv.weight[:, :, 0, 0], p)
    mean, var = a.mean((0, 1, 3, 4)), a.var((0, 1, 3, 4), correction=0)
    a = (a - mean[:, None, None]) / (var[:, None, None] + bn.eps).sqrt() * bn.weight[
        :, None, None
    ] + bn.bias[:, None, None]
    return a.clamp(min=0)


def slow_kernel(a, p):  # a (s, k*k, H, W), p (s, C, H, W) -> (k*k, C)
    (s, K, H, W), C = a.shape, p.shape[1]
    a = a.clone()
    for t in range(s):
        for i in range(H):
            for j in range(W):
                total = a[t, :, i, j].sum()
                if total > 0:
                    a[t, :, i, j] /= total
    kernel = torch.zeros(K, C, dtype=a.dtype)
    for n in range(K):
        total = a[:, n].sum()
        for t in range(s):
            for i in range(H):
                for j in range(W):
                    if total > 0:
                        kernel[n] += a[t, n, i, j] / total * p[t, :, i, j]
    return kernel


def slow_suppression(q, kernel, beta, scale):  # Eq. 3-4; q (C, H, W), kernel (k*k, C) -> (H, W)
    C, H, W = q.shape
    k = math.isqrt(len(kernel))
    r = torch.zeros(H, W, dtype=q.dtype)
    for y in range(H):
        for x in range(W):
            for dy in range(k):
                for dx in range(k):
                    yy, xx = min(max(y + dy - k // 2, 0), H - 1), min(
                        max(x + dx - k // 2, 0), W - 1
                    )
                    r[y, x] += q[:, yy, xx] @ kernel[dy * k + dx]
    r /= {"none": 1, "window": k * k, "window+channels": k * k * math.sqrt(C)}[scale]
    R = r.exp() / r.exp().sum()
    return torch.stack(
        [
            torch.stack(
                [
                    torch.exp(beta * min(1 / (H * W * R[y, x]) - 1, torch.tensor(0.0)))
                    for x in range(W)
                ]
            )
            for y in range(H)
        ]
    )


def slow_cpm(x, y, s, alpha):  # Eq. 5-6; x (T, C, H, W), y (T - s, C, H, W)
    T = len(x)
    lost = sum((x[j] - y[j - s]).mean((1, 2)) for j in range(s, T))
    seen = sum(x[j].mean((1, 2)) for j in range(s))
    return torch.stack(
        [
            x[i] + alpha * lost[:, None, None] if i < s else y[i - s] + alpha * seen[:, None, None]
            for i in range(T)
        ]
    )


def slow_sbm(sbm, x, cal=True, cpm=True, beta=5.0, alpha=0.1, scale="window"):
    s = sbm.split
    weighted = torch.stack([slow_cal(sbm.cal, clip) for clip in x]) if cal else x
    attention, out = slow_attention(sbm.kgm, weighted[:, :s]), []
    for clip, w, a in zip(x, weighted, attention):
        kernel = slow_kernel(a, w[:s])
        y = torch.stack(
            [slow_suppression(w[i], kernel, beta, scale) * clip[i] for i in range(s, len(clip))]
        )
        out.append(slow_cpm(clip, y, s, alpha if cpm else 0.0))
    return torch.stack(out)


# ---------------------------------------------------------------------------------------------- SBM


@SIZES
@LENGTHS
def test_cal(T, C, H, W):
    cal, x = randomize(ChannelAttentionLayer(C)), maps(T, C, H, W)
    out = cal(x)
    close(out, torch.stack([slow_cal(cal, clip) for clip in x]))
    kept = (out != 0).any((1, 3, 4))
    assert kept.any() and not kept.all()  # both kinds of channels occurred


def test_cal_drops_channels_of_equal_values():
    """Eq. 1 is strict: a constant map is not stronger in its centre, whatever the rounding does."""
    x = torch.linspace(0.01, 30, 64)[None, None, :, None, None].expand(2, 4, -1, 7, 5)
    assert not ChannelAttentionLayer(64)(x).any()


@SIZES
@LENGTHS
@pytest.mark.parametrize("k", [1, 3])
def test_kgm(T, C, H, W, k):
    kgm, p = randomize(KernelGenerationModule(C, kernel_size=k)), maps(T, C, H, W)
    close(kgm(p), torch.stack([slow_kernel(a, clip) for a, clip in zip(slow_attention(kgm, p), p)]))


@SIZES
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("scale", ["none", "window", "window+channels"])
def test_suppress_operation(C, H, W, k, scale):
    q, kernel = maps(3, C, H, W), 0.3 * torch.randn(2, k * k, C, dtype=torch.float64)
    s = SuppressOperation(beta=4.0, scale=scale)(q, kernel)
    assert s.shape == (2, 3, 1, H, W) and 0 < s.min() < s.max() <= 1
    close(
        s[:, :, 0],
        torch.stack(
            [
                torch.stack([slow_suppression(f, kern, 4.0, scale) for f in clip])
                for clip, kern in zip(q, kernel)
            ]
        ),
    )


@SIZES
@LENGTHS
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(cal=False),
        dict(cpm=False),
        dict(kernel_size=1),
        dict(beta=2.0, alpha=0.3, scale="none"),
        dict(scale="window+channels"),
    ],
)
def test_sbm(T, C, H, W, options):
    sbm, x = randomize(SalientToBroadModule(C, split=T - 2, **options)), 0.3 * maps(T, C, H, W)
    options.pop("kernel_size", None)
    out = sbm(x)
    assert out.shape == x.shape
    close(out, slow_sbm(sbm, x, **options))


def test_sbm_suppresses_what_the_former_frames_found():
    """A region that all frames share is suppressed in the later frames, more strongly with a higher
    beta, and the former frames gain what was removed."""
    x = torch.full((1, 3, 4, 6, 6), 0.1)
    x[..., 2:4, 2:4] = 1.0
    kernel, means = x[0, 0, :, 2, 2].expand(1, 9, 4), []
    for beta in (1.0, 5.0):
        s = SuppressOperation(beta=beta, scale="window+channels")(x[:, 1:], kernel)
        assert s[..., 2:4, 2:4].max() < s[..., 0, 0].min() == 1
        means.append(s.mean())
    assert means[1] < means[0]
    z = CrossPropagationModule(alpha=0.1)(x[:, :1], x[:, 1:], s)
    assert (z[:, :1] > x[:, :1]).all() and z.shape == x.shape
    same = CrossPropagationModule(alpha=0.0)(x[:, :1], x[:, 1:], s)
    close(same, torch.cat([x[:, :1], s * x[:, 1:]], 1))


def test_released_cpm_takes_means():
    """As in the authors' release: the mean of the former frames, and the mean of the later ones
    weighted by 1 - S. A clip in which nothing is suppressed passes nothing on."""
    x, s = maps(4, 3, 5, 2), torch.rand(2, 3, 1, 5, 2, dtype=torch.float64)
    s[1] = 1
    z = CrossPropagationModule(alpha=0.2, release=True)(x[:, :1], x[:, 1:], s)
    for b in range(2):
        taken, weight = torch.zeros(3, dtype=torch.float64), 0.0
        for later, kept in zip(x[b, 1:], s[b, :, 0]):
            for i in range(5):
                for j in range(2):
                    taken += (1 - kept[i, j]) * later[:, i, j]
                    weight += 1 - kept[i, j]
        lost = taken / weight if weight > 0 else taken
        close(z[b, 0], x[b, 0] + 0.2 * lost[:, None, None])
        seen = x[b, 0].mean((1, 2))
        close(z[b, 1:], s[b] * x[b, 1:] + 0.2 * seen[:, None, None])


def test_scaled_suppression_is_broad_and_that_of_the_paper_is_one_position():
    """For rectified features with the channels of layer3 and maps of 8x4, as random weights give
    them, the softmax of the plain sum is one-hot."""
    q, kernel = maps(3, 1024, 8, 4, B=4), maps(1, 1024, 3, 3, B=4).flatten(3)[:, 0].transpose(1, 2)

    def positions_below(limit, scale):  # of the 32 of a frame, on average
        s = SuppressOperation(beta=5.0, scale=scale)(q, kernel / 2)
        return (s < limit).sum((3, 4)).double().mean()

    assert positions_below(0.9, "none") < 3 and positions_below(0.1, "none") >= 1
    assert positions_below(0.9, "window+channels") > 8
    assert positions_below(0.1, "window+channels") == 0


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sbm_is_finite_on_flat_input(value, dtype):
    sbm, x = SalientToBroadModule(8, 2).to(dtype), torch.full(
        (2, 4, 8, 4, 4), value, dtype=dtype, requires_grad=True
    )
    z = sbm(x)
    z.square().sum().backward()
    assert (
        z.isfinite().all()
        and x.grad.isfinite().all()
        and all(p.grad.isfinite().all() for p in sbm.parameters() if p.grad is not None)
    )
    s = sbm.so(
        torch.zeros(2, 2, 8, 4, 4, dtype=dtype), sbm.kgm(torch.zeros(2, 2, 8, 4, 4, dtype=dtype))
    )
    assert (s == 1).all()  # nothing is salient, so nothing is suppressed


def test_suppression_is_finite_where_the_softmax_vanishes():
    q = torch.zeros(1, 1, 1, 4, 4)
    q[..., 0, 0] = 1e4
    q.requires_grad_()
    s = SuppressOperation(beta=5.0)(q, torch.ones(1, 1, 1))
    s.sum().backward()
    assert s.min() > 0 and s.max() == 1 and q.grad.isfinite().all()


def test_gradients_reach_every_parameter_of_sbm():
    sbm = randomize(SalientToBroadModule(12, 2))
    sbm(maps(4, 12, 6, 5)).square().sum().backward()
    for name, p in sbm.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_sbm_on_invalid_arguments():
    with pytest.raises(ValueError, match="more than 2 frames"):
        SalientToBroadModule(8, 2)(torch.zeros(1, 2, 8, 4, 4))
    with pytest.raises(ValueError, match="at least 3x3"):
        SalientToBroadModule(8, 2)(torch.zeros(1, 3, 8, 2, 4))
    with pytest.raises(ValueError, match="a split of at least 1, not 0"):
        SalientToBroadModule(8, split=0)
    with pytest.raises(ValueError, match="an odd kernel size of at least 1, not 2"):
        SalientToBroadModule(8, split=1, kernel_size=2)


# ---------------------------------------------------------------------------------- IDM and Table 3


@SIZES
@LENGTHS
@pytest.mark.parametrize("reduction", [2, 4])
def test_idm(T, C, H, W, reduction):
    idm = randomize(IntegrationDistributionModule(C, T, H, W, reduction=reduction))
    x = maps(T, C, H, W)
    m = T * H * W
    out = []
    for clip in x:
        f = torch.stack(
            [
                torch.stack(
                    [clip[t, c, i, j] for t in range(T) for i in range(H) for j in range(W)]
                )
                for c in range(C)
            ]
        )
        g_d, g_i, l_i, l_d = (
            idm.g_d.weight[:, :, 0, 0],
            idm.g_i.weight[:, :, 0, 0],
            idm.l_i.weight.T,
            idm.l_d.weight.T,
        )
        f = g_d @ g_i @ f @ (l_i @ l_d + torch.eye(m, dtype=f.dtype)) + f  # Eq. 7
        out.append(
            torch.stack(
                [
                    torch.stack([f[c, t * H * W : (t + 1) * H * W].view(H, W) for c in range(C)])
                    for t in range(T)
                ]
            )
        )
    close(idm(x), torch.stack(out))


def test_idm_starts_as_identity_and_learns():
    idm, x = IntegrationDistributionModule(8, 4, 3, 2), maps(4, 8, 3, 2).float()
    assert torch.equal(idm(x), x)
    (idm(x) * torch.randn_like(x)).sum().backward()
    assert idm.g_d.weight.grad.abs().sum() > 0
    idm = randomize(idm)
    idm.zero_grad()
    idm(x.double()).square().sum().backward()
    for name, p in idm.named_parameters():
        assert p.grad.abs().sum() > 0, name
    for value in (0.0, 1.0):
        assert idm(torch.full((1, 4, 8, 3, 2), value, dtype=torch.float64)).isfinite().all()
    for shape in ((8, 8, 3, 2), (4, 8, 2, 3), (4, 4, 3, 2)):  # the second has as many positions
        with pytest.raises(ValueError, match=re.escape(f"(4, 8, 3, 2), not {shape}")):
            idm(torch.zeros(1, *shape))


@SIZES
@pytest.mark.parametrize("affinity", ["softmax", "ones", "inverse"])
def test_non_local(C, H, W, affinity):
    def lin(layer, f):
        return layer.weight[:, :, 0, 0] @ f + layer.bias[:, None]

    block, x = randomize(NonLocalBlock(C, affinity=affinity)).eval(), maps(3, C, H, W)
    out = []
    for clip in x:
        f = clip.transpose(0, 1).flatten(1)  # (C, m)
        g, m, y = lin(block.g, f), f.shape[1], []
        if affinity != "ones":
            theta, phi = lin(block.theta, f), lin(block.phi, f)
        for i in range(m):
            if affinity == "ones":
                w = torch.full((m,), 1 / m, dtype=f.dtype)
            else:
                e = torch.stack([theta[:, i] @ phi[:, j] for j in range(m)])
                w = (-e if affinity == "inverse" else e).exp()
                w = w / w.sum()
            y.append(sum(w[j] * g[:, j] for j in range(m)))
        bn = block.out[1]
        z = (
            lin(block.out[0], torch.stack(y, 1)) / math.sqrt(1 + bn.eps) * bn.weight[:, None]
            + bn.bias[:, None]
            + f
        )
        out.append(z.view(C, 3, H, W).transpose(0, 1))
    close(block(x), torch.stack(out))
    fresh = NonLocalBlock(C, affinity=affinity)
    assert torch.equal(fresh(x.float()), x.float())


@SIZES
def test_global_context(C, H, W):
    block, x = randomize(GlobalContextBlock(C, reduction=4)), maps(3, C, H, W)
    out = []
    for clip in x:
        f = clip.transpose(0, 1).flatten(1)
        e = torch.exp(block.mask.weight[0, :, 0, 0] @ f + block.mask.bias)
        context = sum(e[j] / e.sum() * f[:, j] for j in range(f.shape[1]))
        out.append(clip + block.transform(context)[None, :, None, None])
    close(block(x), torch.stack(out))
    assert torch.equal(GlobalContextBlock(C, reduction=4)(x.float()), x.float())


# ---------------------------------------------------------------------------------------- objective


def test_mutual_information_loss():
    B, T, t = 6, 4, 0.07
    pids, frames = torch.tensor([3, 1, 3, 1, 1, 2]), torch.randn(B, T, 10, dtype=torch.float64)

    def s(a, i, b, j):
        return torch.cosine_similarity(frames[a, i], frames[b, j], 0)

    terms = []
    for a in range(B):
        for i in range(T):
            negatives = sum(
                torch.exp(s(a, i, b, j) / t)
                for b in range(B)
                if pids[b] == pids[a]
                for j in range(T)
                if j != i
            )
            for b in range(B):
                if b != a and pids[b] == pids[a]:
                    e = torch.exp(s(a, i, b, i) / t)
                    terms.append(-torch.log(e / (e + negatives)))
    assert (
        abs(mutual_information_loss(frames, pids).item() - torch.stack(terms).mean().item()) < 1e-5
    )
    order = torch.randperm(B)
    torch.testing.assert_close(
        mutual_information_loss(frames[order], pids[order]), mutual_information_loss(frames, pids)
    )
    single = frames.clone().requires_grad_()
    loss = mutual_information_loss(single, torch.arange(B))  # every identity once: no positive pair
    loss.backward()
    assert loss == 0 and single.grad.isfinite().all()
    for length, temperature in ((4, 1e-6), (4, 1e-3), (4, 100.0), (1, 0.07)):  # 1: no negatives
        frames = torch.randn(4, length, 10, requires_grad=True)
        loss = mutual_information_loss(frames, torch.tensor([0, 0, 1, 1]), temperature=temperature)
        loss.backward()
        assert loss.isfinite() and frames.grad.isfinite().all(), temperature
    # the frames of a clip differ and the clips agree: nearly 0
    distinct = torch.eye(T, 10)[None].repeat(2, 1, 1)
    assert (
        mutual_information_loss(distinct, torch.tensor([0, 0]))
        < 1e-4
        < mutual_information_loss(torch.ones(2, T, 10), torch.tensor([0, 0]))
    )


# ------------------------------------------------------------------------------------------ network


def network(variant="sinet", num_classes=625, **others):
    """The network of a variant as a run builds it."""
    return sinet.build(settings(sinet.RECIPE, ROWS, variant, weights="none", **others), num_classes)


def meta(variant="sinet"):
    with torch.device("meta"):
        return network(variant)


# C = 512 at layer2, m = 4*32*16; C = 1024 at layer3. SBM: SE 2*C*C/4, attention C*k^2 and BN 2*k^2.
IDM = {r: 2 * 512 * (512 // r) + 2 * 2048 * (2048 // r) for r in (2, 4, 8, 16)}
SBM = {k: 2 * 1024 * 256 + 1024 * k * k + 2 * k * k for k in (1, 3, 5, 7)}
TRUNK = 23_508_032
EXPECTED = {
    "sinet": TRUNK + 2 * IDM[4] + 3 * SBM[3],
    "base": TRUNK,
    "base+sbm": TRUNK + 3 * SBM[3],
    "base+idm": TRUNK + 4_456_448,
    "base+1idm": TRUNK + 2_228_224,
    "base+2idm": TRUNK + 4_456_448,
    "base+3idm": TRUNK + 3 * 2_228_224,
    "base+sbm-cal": TRUNK + 3 * (SBM[3] - 524_288),
    "base+sbm-cpm": TRUNK + 3 * SBM[3],
    "base+sbm-samepos": TRUNK + 3 * SBM[3],
    "base+sbm-k1": TRUNK + 3 * SBM[1],
    "base+sbm-k3": TRUNK + 3 * SBM[3],
    "base+sbm-k5": TRUNK + 3 * SBM[5],
    "base+sbm-k7": TRUNK + 3 * SBM[7],
    "base+idm-r2": TRUNK + 2 * IDM[2],
    "base+idm-r4": TRUNK + 2 * IDM[4],
    "base+idm-r8": TRUNK + 2 * IDM[8],
    "base+idm-r16": TRUNK + 2 * IDM[16],
    "base+nonlocal": TRUNK + 2 * (4 * 512 * 256 + 3 * 256 + 512 + 1024),
    "base+nonlocal-inverse": TRUNK + 2 * (4 * 512 * 256 + 3 * 256 + 512 + 1024),
    "base+nonlocal-ones": TRUNK + 2 * (2 * 512 * 256 + 256 + 512 + 1024),
    "base+gc": TRUNK + 2 * (512 + 1 + 2 * 512 * 32 + 32 + 512 + 64),
}


@pytest.mark.parametrize("variant", ROWS)
def test_parameters(variant):
    assert set(EXPECTED) == set(ROWS)
    assert parameters(meta(variant)) == EXPECTED[variant]


def test_multiply_adds():
    """In the paper the IDMs add 1.081 GFLOPs and the SBMs 0.014, for 4 frames of 256x128."""
    base = multiply_adds(meta("base"), 4, 256, 128)
    assert round(base / 4e9, 3) == 4.053  # for a frame: the convolutions of the trunk alone
    idms = multiply_adds(meta("base+idm"), 4, 256, 128) - base
    assert idms == 2 * 536_870_912  # 1.074e9; the paper's 1.081 counts some element-wise work
    sbms = multiply_adds(meta("base+sbm"), 4, 256, 128) - base
    attention = products = responses = 0
    for s in (1, 2, 3):
        attention, products, responses = (
            attention + 9 * 1024 * 128 * s,
            products + 9 * 1024 * 128 * s,
            responses + 9 * 1024 * 128 * (4 - s),
        )
    assert sbms == attention + products + responses + 3 * 524_288
    assert attention + responses == 14_155_776  # the paper's 0.014e9: the convolutions alone
    assert multiply_adds(meta("sinet"), 4, 256, 128) == base + idms + sbms


def test_multiply_adds_of_non_local_blocks():
    base = multiply_adds(meta("base"), 4, 256, 128)
    nonlocal_block = multiply_adds(meta("base+nonlocal"), 4, 256, 128) - base
    assert nonlocal_block == 2 * (4 * 512 * 256 * 2048 + 2 * 256 * 2048**2)
    assert 2 * 4 * 512 * 256 * 2048 == 2_147_483_648  # its projections alone: 3 % below the paper's


@pytest.mark.parametrize("T, H, W, pool", [(4, 64, 48, "avg"), (6, 70, 33, "max")])
def test_network(T, H, W, pool, one_backbone):
    model = SINet(5, T, H, W, pool=pool).to(memory_format=torch.channels_last)
    clips = torch.randn(4, T, 3, H, W)
    for module in wake(model).modules():  # away from the zeros of the initialisation
        if isinstance(module, IntegrationDistributionModule):
            nn.init.normal_(module.g_d.weight, std=0.01)
    embedding, logits, frames = outputs = model(clips)
    assert embedding.shape == (4, 2048) and logits.shape == (4, 5) and frames.shape == (4, T, 2048)
    pids, args = torch.tensor([0, 0, 1, 1]), settings(sinet.RECIPE, ROWS, "sinet")
    check_gradients(model, sum(sinet.losses(outputs, pids, args).values()))
    model = model.double().eval()
    with torch.no_grad():
        whole = model(clips.double())
        assert whole.shape == (4, 2048)
        close(model(clips[1:2].double()), whole[1:2])  # clips do not mix


def test_losses_are_weighted_and_configured():
    """Eq. 8: every weight of the recipe is applied, and each term is that of its own definition."""
    outputs = torch.randn(6, 16), torch.randn(6, 3), torch.randn(6, 4, 8)
    pids = torch.tensor([0, 0, 1, 1, 2, 2])
    args = settings(
        sinet.RECIPE, ROWS, "sinet", lambda1=0.7, lambda2=0.3, margin=0.5, temperature=0.2
    )
    parts = sinet.losses(outputs, pids, args)
    assert torch.equal(parts["xent"], nn.functional.cross_entropy(outputs[1], pids))
    assert torch.equal(parts["triplet"], 0.7 * batch_hard_triplet(outputs[0], pids, 0.5))
    l_mi = mutual_information_loss(outputs[2], pids, temperature=0.2)
    assert torch.equal(parts["mi"], 0.3 * l_mi)
    assert set(sinet.losses(outputs[:2], pids, args)) == {"xent", "triplet"}
    # the release takes the sum over the identities, whatever their order and however many clips
    args.release = True
    for pids in ([0, 0, 1, 1, 2, 2], [2, 1, 2, 1, 1, 0], [1] * 6):
        pids = torch.tensor(pids)
        l_mi = mutual_information_loss(outputs[2], pids, temperature=0.2)
        assert torch.equal(
            sinet.losses(outputs, pids, args)["mi"], 0.3 * (len(pids.unique()) * l_mi)
        )


def test_variants_without_sbm_have_no_projection():
    for name in ROWS:
        row = settings(sinet.RECIPE, ROWS, name)
        assert (row.lambda2 > 0) == row.sbm
        assert (meta(name).projection is not None) == row.sbm


def test_the_projection_takes_the_frames_after_the_neck():
    """They are normalised over all frames of the batch, as in the authors' release."""
    model, seen = SINet(5, 4, 48, 48, pool="avg").double(), []
    model.projection = nn.Identity()
    model.layer4[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    _, _, frames = model(torch.randn(3, 4, 3, 48, 48, dtype=torch.float64))
    vectors = seen[0].mean((2, 3))
    expected = (vectors - vectors.mean(0)) / (vectors.var(0, unbiased=False) + 1e-5).sqrt()
    close(frames.flatten(0, 1), expected)


def test_every_setting_reaches_its_module():
    model = network(
        num_classes=3,
        height=64,
        width=64,
        sbm_blocks=(1, 5),
        sbm_splits=(2, 1),
        k=5,
        beta=2.0,
        alpha=0.4,
        scale="none",
        se_reduction=16,
        idms=1,
        reduction=8,
    )
    first, second = model.after["layer3_1"][0], model.after["layer3_5"][0]
    assert first.split == 2 and second.split == 1
    assert first.so.beta == 2.0 and first.cpm.alpha == 0.4 and first.so.scale == "none"
    assert first.kgm.attention[0].out_channels == 25 and first.cal.squeeze.out_features == 64
    idm = model.after["layer2_4"][0]
    assert idm.g_i.out_channels == 64 and idm.l_i.out_features == idm.l_i.in_features // 8
    assert set(model.after) == {"layer2_4", "layer3_1", "layer3_5"}
    plain = network(num_classes=3, cal=False, cpm=False).after["layer3_2"][0]
    assert plain.cal is None and plain.cpm.alpha == 0.0


@pytest.mark.parametrize("variant", ROWS)
def test_every_variant_runs(variant, one_backbone):
    model = network(variant, 3, height=48, width=40)
    with torch.no_grad():
        embedding, logits, *frames = model(torch.randn(2, 4, 3, 48, 40))
    assert embedding.isfinite().all() and logits.shape == (2, 3)
    assert len(frames) == settings(sinet.RECIPE, ROWS, variant).sbm


def test_which_blocks_the_modules_follow():
    def places(variant):
        return {block: len(modules) for block, modules in meta(variant).after.items()}

    one = {"layer2_2": 1, "layer2_4": 1, "layer3_2": 1, "layer3_4": 1, "layer3_6": 1}
    assert places("sinet") == one
    assert places("base+sbm-samepos") == {"layer3_6": 3}
    assert places("base") == {} and places("base+1idm") == {"layer2_4": 1}
    after = meta("sinet").after
    assert [after[f"layer3_{i}"][0].split for i in (2, 4, 6)] == [1, 2, 3]


def test_a_network_with_idms_starts_as_the_baseline():
    """G^D is zero."""
    torch.manual_seed(1)
    base = SINet(3, 4, 48, 48, sbm=False, idms=0).double().eval()
    idm = SINet(3, 4, 48, 48, sbm=False).double().eval()
    idm.load_state_dict(base.state_dict(), strict=False)
    clips = torch.randn(1, 4, 3, 48, 48, dtype=torch.float64)
    close(idm(clips), base(clips))


@pytest.mark.parametrize("release, smallest", [(False, 33), (True, 37)])
def test_the_smallest_frames_of_cal(release, smallest):
    """Smaller ones are refused when the network is built, not in its forward pass."""
    network = SINet(5, 4, smallest, smallest, release=release).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 4, 3, smallest, smallest)).shape == (1, 2048)
    with pytest.raises(ValueError, match=f"at least {smallest}x{smallest} pixels"):
        SINet(5, 4, smallest, smallest - 1, release=release)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((3, 256, 128), "at least 4 frames, not 3"),
        ((4, 32, 128), "at least 33x33 pixels, not 32x128"),
    ],
)
def test_network_on_invalid_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        SINet(5, *arguments)
    assert SINet(5, *arguments, sbm=False, idms=0)  # the baseline takes any
    with pytest.raises(ValueError, match="none, window or window.channels, not channels"):
        SINet(5, scale="channels")
    with pytest.raises(ValueError, match="0 to 3 IDMs, not 4"):
        SINet(5, idms=4)
    with pytest.raises(ValueError, match="not 2 splits for 3 blocks"):
        SINet(5, sbm_splits=(1, 2))
    with pytest.raises(ValueError, match=r"blocks 1 to 6 of layer3, not \(2, 4, 7\)"):
        SINet(5, sbm_blocks=(2, 4, 7))
