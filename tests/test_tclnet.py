"""TCLNet's modules against slow float64 versions of the paper's equations, its invariants, and its
complexity."""

import functools
import math
import types

import pytest
import torch
import torch.nn as nn

import tclnet
from common import batch_hard_triplet, settings
from conftest import check_gradients, close, maps, multiply_adds, parameters, randomize, wake
from tclnet import (
    RECIPE,
    ROWS,
    BlockBinarization,
    CorrelationLayer,
    NonLocalBlock,
    SaliencyErasingOperation,
    TCLNet,
    TemporalConv,
    TemporalSaliencyBoosting,
    TemporalSaliencyErasing,
    probability_map,
    query_and_memory,
)

SIZES = pytest.mark.parametrize("D, H, W", [(8, 6, 4), (12, 8, 5)])
BASE = dict(learners=1, tsb=())
OWN_ROWS = [name for name, row in ROWS.items() if not row.same]  # without the aliases


# ----------------------------------------------- the equations, slowly: one frame, with loops


def slow_correlation(w, x, f, scaled):  # Eq. 3; w (D1, D), x (D, H, W), f (D1,)
    D, H, W = x.shape
    r = torch.zeros(H, W, dtype=x.dtype)
    projected = w.T @ f
    for i in range(H):
        for j in range(W):
            r[i, j] = sum(x[d, i, j] * projected[d] for d in range(D))
    return r / math.sqrt(D) if scaled else r


def slow_binarization(r, block, stride):  # r (H, W)
    H, W = r.shape
    h, w = block
    best, positions = None, 0
    for top in range(0, H - h + 1, stride[0]):
        for left in range(0, W - w + 1, stride[1]):
            total = sum(r[top + a, left + b] for a in range(h) for b in range(w))
            positions += 1
            if best is None or total > best[0]:
                best = total, top, left
    assert positions == ((H - h) // stride[0] + 1) * ((W - w) // stride[1] + 1)  # N_pos
    mask = torch.ones(H, W, dtype=r.dtype)
    for a in range(h):
        for b in range(w):
            mask[best[1] + a, best[2] + b] = 0
    return mask


def slow_bn(bn, o):  # over the batch; o (B, D)
    mean = o.mean(0)
    var = ((o - mean) ** 2).mean(0)
    return (o - mean) / (var + bn.eps).sqrt() * bn.weight + bn.bias


def slow_seo(seo, x, f, block, stride, scaled=True):  # Eq. 3-5; x (B, D, H, W), f: list of (B, D1)
    erased, attended = [], []
    for n, frame in enumerate(x):
        D, H, W = frame.shape
        r_all = torch.ones(H, W, dtype=x.dtype)
        b_all = torch.ones(H, W, dtype=x.dtype)
        for vectors in f:
            r = slow_correlation(seo.correlation.w.weight.T, frame, vectors[n], scaled)
            r_all = r_all * r
            b_all = b_all * slow_binarization(r, block, stride)
        e = torch.exp(r_all - r_all.max())
        gate = e / e.sum() * b_all
        erased.append(frame * b_all)
        attended.append(sum(gate[i, j] * frame[:, i, j] for i in range(H) for j in range(W)))
    return torch.stack(erased) + slow_bn(seo.bn, torch.stack(attended))[:, :, None, None]


def slow_map(x, t, tau):  # Eq. 6; x (T, D, H, W) -> A (T, H, W) of frame t
    T, D, H, W = x.shape
    q = sum(x[t, :, i, j] for i in range(H) for j in range(W)) / (H * W)
    a = torch.zeros(T, H, W, dtype=x.dtype)
    for s in range(T):
        for i in range(H):
            for j in range(W):
                m = x[s, :, i, j]
                if s != t:
                    a[s, i, j] = torch.exp(tau * (q / q.norm()) @ (m / m.norm().clamp(min=1e-12)))
    return a / a.sum()


def slow_tsb(tsb, x, tau):  # Fig. 3; x (B, T, D, H, W)
    B, T, D, H, W = x.shape
    o = torch.zeros(B, T, D, dtype=x.dtype)
    for b in range(B):
        for t in range(T):
            a = slow_map(x[b], t, tau)
            for s in range(T):
                o[b, t] += sum(a[s, i, j] * x[b, s, :, i, j] for i in range(H) for j in range(W))
    return x + slow_bn(tsb.bn, o.flatten(0, 1)).view(B, T, D, 1, 1)


# --------------------------------------------------------------------- fast against slow: SEO


@SIZES
@pytest.mark.parametrize("scaled", [True, False])
def test_correlation(D, H, W, scaled):
    layer, x = randomize(CorrelationLayer(D, 10, scaled=scaled)), maps(2, D, H, W)[:, 0]
    f = torch.randn(2, 3, 10, dtype=torch.float64)
    w = layer.w.weight.T
    expected = [
        torch.stack([slow_correlation(w, x[b], f[b, k], scaled) for k in range(3)])
        for b in range(2)
    ]
    close(layer(x, f), torch.stack(expected))


@pytest.mark.parametrize("stop", [True, False])
def test_gradient_of_the_previous_vectors(stop):
    """In the paper's form Eq. 3 passes it on; by default it stops there, and w still gets its own.
    """
    layer, x = randomize(CorrelationLayer(8, 10, stop_gradient=stop)), maps(1, 8, 3, 3)[:, 0]
    f = torch.randn(2, 1, 10, dtype=torch.float64, requires_grad=True)
    layer(x, f).square().sum().backward()
    assert layer.w.weight.grad.any()
    if stop:
        assert f.grad is None
        return
    g = f.detach().clone().requires_grad_()
    slow = [slow_correlation(layer.w.weight.T.detach(), x[b], g[b, 0], True) for b in range(2)]
    torch.stack(slow).square().sum().backward()
    close(f.grad, g.grad)


@pytest.mark.parametrize("stop", [True, False])
def test_the_stop_of_the_gradient_in_the_network(stop):
    """The second learner's gradient reaches the first learner through Eq. 3, or it does not."""
    tse = TemporalSaliencyErasing(
        nn.Identity(),
        [Learner(8, 10) for _ in range(2)],
        channels=8,
        feature_size=10,
        erased_block=(2, 4),
        stop_gradient=stop,
    )
    c = wake(tse)(torch.rand(3, 2, 8, 6, 4))
    c[:, :, 1].square().sum().backward()
    assert bool(tse.learners[0].conv.weight.grad.any()) != stop


@pytest.mark.parametrize(
    "H, W, block, stride",
    [
        (16, 8, (3, 8), (1, 1)),
        (8, 6, (2, 3), (1, 1)),
        (9, 7, (4, 3), (2, 2)),
        (7, 5, (1, 1), (3, 2)),
    ],
)
def test_binarization(H, W, block, stride):
    layer = BlockBinarization(block, block_stride=stride)
    r = torch.randn(2, 3, H, W, dtype=torch.float64)
    mask = layer(r)
    expected = [
        torch.stack([slow_binarization(r[b, k], block, stride) for k in range(3)]) for b in range(2)
    ]
    close(mask, torch.stack(expected))
    assert ((1 - mask).sum((2, 3)) == block[0] * block[1]).all()


def test_binarization_at_edges_and_ties():
    layer = BlockBinarization((3, 8))
    for row in range(16):  # a peak in any row: always three whole rows, also at the edges
        r = torch.zeros(1, 1, 16, 8)
        r[..., row, :] = 1
        mask = layer(r)[0, 0]
        assert mask.sum() == 16 * 8 - 24
        assert not mask[max(0, row - 2)].any()  # of equal blocks the first
        assert (mask == mask[:, :1]).all() and not mask[row].any()
    assert (layer(torch.zeros(2, 16, 8))[:, :3] == 0).all()  # all equal
    assert BlockBinarization((16, 8))(torch.randn(1, 16, 8)).sum() == 0
    with pytest.raises(ValueError, match="block of 3x8 does not fit into maps of 16x7"):
        layer(torch.zeros(1, 16, 7))
    for block, stride in (((0, 8), (1, 1)), ((3, 8), (1, 0))):
        with pytest.raises(ValueError, match="blocks and strides of at least 1x1, not"):
            BlockBinarization(block, block_stride=stride)


@SIZES
@pytest.mark.parametrize("previous", [0, 1, 3])
@pytest.mark.parametrize("scaled", [True, False])
def test_seo(D, H, W, previous, scaled):
    block, stride = (2, W), (1, 1)
    seo = randomize(SaliencyErasingOperation(D, 10, erased_block=block, scaled=scaled))
    x = maps(1, D, H, W, B=3)[:, 0]
    f = torch.randn(3, previous, 10, dtype=torch.float64) / 4
    close(seo(x, f), slow_seo(seo, x, f.unbind(1), block, stride, scaled))


# --------------------------------------------------------------------- fast against slow: TSE


class Learner(nn.Module):
    """Keeps what it sees."""

    def __init__(self, D, D1):
        super().__init__()
        self.conv = nn.Conv2d(D, D1, 1)

    def forward(self, x):
        self.seen = x
        return self.conv(x).relu()


def make_tse(learners, channels, *, shared=None, erased_block=(2, 4), **options):
    return TemporalSaliencyErasing(
        shared or nn.Identity(),
        learners,
        channels=channels,
        feature_size=10,
        erased_block=erased_block,
        **options,
    )


@SIZES
@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("N, T", [(1, 2), (2, 4), (3, 3), (4, 8)])
def test_tse(D, H, W, N, T, pool):
    """Eq. 1-2 and 7, segment after segment and frame after frame; f_k is the average with either
    pooling. BN's statistics are those of the whole batch, so that its output is set to zero here.
    """
    learners = [Learner(D, 10) for _ in range(N)]
    tse = randomize(make_tse(learners, D, erased_block=(2, W), pool=pool))
    if N > 1:
        nn.init.zeros_(tse.seo.bn.weight)
        nn.init.zeros_(tse.seo.bn.bias)
        w = tse.seo.correlation.w.weight.T
    x = maps(T, D, H, W)
    expected = torch.zeros(2, T // N, N, 10, dtype=x.dtype)
    for b in range(2):
        for segment in range(T // N):
            previous = []
            for n in range(N):
                frame = erased = x[b, segment * N + n]
                for f in previous:
                    r = slow_correlation(w, frame, f, True)
                    erased = erased * slow_binarization(r, (2, W), (1, 1))
                y = tse.learners[n].conv(erased[None]).relu()[0]
                previous.append(y.mean((1, 2)))
                expected[b, segment, n] = previous[-1] if pool == "avg" else y.amax((1, 2))
    close(tse(x), expected)


def test_a_learner_never_sees_what_was_erased():
    D, H, W = 8, 6, 4
    learners = [Learner(D, 10) for _ in range(3)]
    tse = make_tse(learners, D, erased_block=(2, W)).double()
    x = torch.rand(2, 3, D, H, W, dtype=torch.float64) + 0.1
    tse(x)
    places = [(learner.seen > 0).all(1).flatten(1).sum(1) for learner in tse.learners]
    assert (places[0] == H * W).all() and (places[1] == H * W - 2 * W).all()
    assert (places[2] <= H * W - 2 * W).all()
    erased = (tse.learners[1].seen == 0).all(1)
    f = tse.learners[0](x[:, 0]).mean((2, 3))[:, None]
    r = tse.seo.correlation(x[:, 1], f)
    mask = tse.seo.binarization(r)[:, 0]
    assert (mask == ~erased).all()
    changed = x.clone()  # what is in the erased block does not reach the second learner
    changed[:, 1] += 1e-4 * torch.rand_like(changed[:, 1]) * erased[:, None]
    seen = tse.learners[1].seen
    tse(changed)
    assert torch.equal(tse.learners[1].seen, seen)
    inside = []  # nor does it through BN(sum of G * F): G is 0 there
    tse.seo.bn.register_forward_pre_hook(lambda module, args: inside.append(args[0]))
    tse.seo(x[:, 1], f)
    gate = r.flatten(1).softmax(1).unflatten(1, (H, W)) * mask
    close(inside[0], torch.einsum("bdhw,bhw->bd", x[:, 1] * mask[:, None], gate))


def test_tse_gradients_reach_w():
    learners = [Learner(8, 10) for _ in range(3)]
    tse = wake(make_tse(learners, 8, shared=nn.Conv2d(8, 8, 1)))
    check_gradients(tse, tse(torch.rand(3, 3, 8, 6, 4)).square().mean())


def test_tse_on_single_images():
    """Sec. 4.3: one image, repeated over the learners."""
    learners = [Learner(8, 10) for _ in range(2)]
    tse = make_tse(learners, 8).eval()
    image = torch.rand(3, 1, 8, 6, 4)
    features = tse(image)
    assert features.shape == (3, 1, 2, 10)
    assert torch.equal(features, tse(image.repeat(1, 2, 1, 1, 1)))
    assert torch.equal(tse.learners[0].seen, image[:, 0])
    assert (tse.learners[1].seen == 0).any()
    model = TCLNet(5, 1, 64, 48, tsb=()).eval()
    assert model(torch.randn(2, 1, 3, 64, 48)).shape == (2, 4096)
    with pytest.raises(ValueError, match="at least 2 frames, not 1"):
        TCLNet(5, 1, 64, 48)


def test_tse_refuses():
    learners = [Learner(8, 10) for _ in range(2)]
    tse = make_tse(learners, 8)
    with pytest.raises(ValueError, match="multiple of 2 frames, not 3"):
        tse(torch.rand(2, 3, 8, 6, 4))


# --------------------------------------------------------- fast against slow: TSB and Table 4


def full_map(x, tau=5.0):  # (B, T, D, H, W) -> (B, T, T, H, W)
    B, T, D, H, W = x.shape
    query, memory = query_and_memory(x)
    return probability_map(query, memory, tau=tau).view(B, T, T, H, W)


@SIZES
@pytest.mark.parametrize("T", [2, 3, 8])
@pytest.mark.parametrize("tau", [5.0, 1.0])
def test_tsb(D, H, W, T, tau):
    tsb, x = randomize(TemporalSaliencyBoosting(D, tau=tau)), maps(T, D, H, W)
    expected = [torch.stack([slow_map(clip, t, tau) for t in range(T)]) for clip in x]
    close(full_map(x, tau), torch.stack(expected))
    close(tsb(x), slow_tsb(tsb, x, tau))


def test_tsb_properties():
    x = torch.rand(2, 4, 8, 6, 4, dtype=torch.float64)
    tsb = TemporalSaliencyBoosting(8).double()
    assert torch.equal(tsb(x), x)  # starts as identity
    wake(tsb)
    order = torch.tensor([2, 0, 3, 1])  # the others are a set: order plays no role
    close(tsb(x[:, order]), tsb(x)[:, order])
    tsb.eval()
    own = x.clone()
    own[:, 0] *= 2  # a frame is not in its own memory: doubled, it finds the same
    close((tsb(own) - own)[:, 0], (tsb(x) - x)[:, 0])
    a = full_map(x)
    assert not a.diagonal(dim1=1, dim2=2).any()
    close(a.sum((2, 3, 4)), torch.ones(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least 2 frames, not 1"):
        tsb(x[:, :1])


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_input_stays_finite(value, dtype):
    x = torch.full((2, 4, 8, 6, 4), value, dtype=dtype, requires_grad=True)
    tsb = wake(TemporalSaliencyBoosting(8)).to(dtype)
    learners = [Learner(8, 10) for _ in range(2)]
    tse = wake(make_tse(learners, 8)).to(dtype)
    y = tse(tsb(x))
    y.float().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and y.dtype == dtype


def test_non_local():
    block, x = randomize(NonLocalBlock(8)), maps(3, 8, 4, 3)
    out = []
    for clip in x:
        f = clip.transpose(0, 1).flatten(1)  # (C, m)

        def linear(layer, f):
            return layer.weight[:, :, 0, 0] @ f + layer.bias[:, None]

        theta, phi, g = (linear(layer, f) for layer in (block.theta, block.phi, block.g))
        y = []
        for i in range(f.shape[1]):
            e = torch.stack([torch.exp(theta[:, i] @ phi[:, j]) for j in range(f.shape[1])])
            y.append(sum(e[j] / e.sum() * g[:, j] for j in range(f.shape[1])))
        out.append(linear(block.out[0], torch.stack(y, 1)))
    z = slow_bn(block.out[1], torch.stack(out).transpose(1, 2).flatten(0, 1))
    close(block(x), x + z.view(2, 3, 4, 3, 8).movedim(4, 2))
    fresh = NonLocalBlock(8)
    assert torch.equal(fresh(x.float()), x.float())


def test_temporal_convolution():
    x = maps(3, 8, 4, 3)
    conv = nn.Conv2d(8, 6, 1, bias=False).double()
    temporal = TemporalConv(conv, 3).double()
    close(temporal(x.flatten(0, 1)), conv(x.flatten(0, 1)))  # the 1x1 convolution at the start
    randomize(temporal)
    y = torch.zeros(2, 3, 6, 4, 3, dtype=x.dtype)
    for t in range(3):
        for a in range(3):
            if 0 <= t + a - 1 < 3:
                tap = temporal.conv.weight[:, :, a, 0, 0]
                y[:, t] += torch.einsum("oc,bchw->bohw", tap, x[:, t + a - 1])
    close(temporal(x.flatten(0, 1)), y.flatten(0, 1))


# ----------------------------------------------------------------------------------- the losses


def test_losses():
    embeddings, logits = torch.randn(4, 2, 6), torch.randn(4, 2, 3)
    pids = torch.tensor([0, 0, 2, 2])
    args = types.SimpleNamespace(loss="xent+tri", margin=0.4)
    parts = tclnet.losses((embeddings, logits), pids, args)
    log_p = logits.double().log_softmax(2)
    xent = -sum(log_p[b, n, pids[b]] for b in range(4) for n in range(2)) / 4
    # float32 against float64: 8 terms, each below 10 and rounded some 10 times by at most 6e-8
    assert abs(parts["xent"].item() - xent.item()) < 8 * 10 * 10 * 6e-8
    triplets = [batch_hard_triplet(embeddings[:, n], pids, 0.4) for n in range(2)]
    assert parts["triplet"] == triplets[0] + triplets[1]
    args.margin = 0.6
    assert tclnet.losses((embeddings, logits), pids, args)["triplet"] > parts["triplet"]
    args.loss = "xent"
    alone = tclnet.losses((embeddings, logits), pids, args)
    assert list(alone) == ["xent"] and alone["xent"] == parts["xent"]


# --------------------------------------------------------------------- the rows and their costs


def meta(variant, **changes):
    with torch.device("meta"):
        return tclnet.build(settings(RECIPE, ROWS, variant, weights="none", **changes), 625)


SEO_BN = 2 * 1024  # not in the paper's values: see "erased map" in the docstring of tclnet.py
NL_MORE = 2_048 + 3 * 512 + 1024  # BatchNorm and biases, which the paper's values allow
EXPECTED = {
    "base": 23_508_032,
    "base+tse-wo-seo": 27_970_624,
    "base+tse": 30_067_776 + SEO_BN,
    "base+tse-n3": 34_530_368 + SEO_BN,
    "base+tse-n4": 38_992_960 + SEO_BN,
    "base+tsb": 23_509_056,
    "tclnet": 30_068_800 + SEO_BN,
    "tclnet-tsb1": 30_068_288 + SEO_BN,
    "tclnet-tsb3": 30_069_824 + SEO_BN,
    "tclnet-tsb23": 30_070_848 + SEO_BN,
    "base+nl": 25_605_184 + NL_MORE,
    "base+tse+nl": 32_164_928 + NL_MORE + SEO_BN,
    "base+3d": 32_166_976,
}
EXPECTED |= {row: EXPECTED["base"] for row in ("base+dropblock", "base+re", "base+tse-n1")}
EXPECTED |= {row: EXPECTED["base+tse"] for row in ("base+tse-n2", "base+tse+re")}
EXPECTED |= {f"base+tse-he{h_e}": EXPECTED["base+tse"] for h_e in (2, 3, 4, 5)}
EXPECTED |= {row: EXPECTED["tclnet"] for row in ("tclnet-xent", "tclnet-tsb2")}


@pytest.mark.parametrize("variant", ROWS)
def test_parameters(variant):
    assert set(EXPECTED) == set(ROWS)
    assert parameters(meta(variant)) == EXPECTED[variant]


@functools.cache
def macs(variant):
    args = settings(RECIPE, ROWS, variant)
    return multiply_adds(meta(variant), args.frames, args.height, args.width)


def test_multiply_adds():
    """Convolutions and matrix products of a clip at 256x128."""
    assert macs("base") == macs("base+tse-wo-seo") == 16_213_082_112
    # the pairs (n, k) of Eq. 3, and the sum of G * F
    for row, N, frames in (("base+tse", 2, 4), ("base+tse-n3", 3, 3), ("base+tse-n4", 4, 4)):
        pairs = frames // N * (N * (N - 1) // 2)
        added = pairs * (2048 * 1024 + 1024 * 128) + frames * 1024 * 128
        assert macs(row) == macs("base") * frames // 4 + added
    # all 4 frames against all 4, the paper's +0.008
    assert macs("base+tsb") - macs("base") == 2 * 4 * 4 * 512 * 512
    assert macs("base+nl") - macs("base") == 1_342_177_280
    assert macs("base+3d") - macs("base") == 6_509_559_808


def test_rows():
    for row in OWN_ROWS:
        assert set(ROWS[row].settings) <= set(RECIPE)
        assert ROWS[row].settings["loss"] == ("xent+tri" if row == "tclnet" else "xent")
    assert settings(RECIPE, ROWS, "base+tse-n3", small=True).frames == 3
    assert settings(RECIPE, ROWS, "base+tse+re", small=True).erase == 0.5
    for variant in ROWS:  # a row of every kind can be built on the small run's size, too
        with torch.device("meta"):
            tclnet.build(settings(RECIPE, ROWS, variant, small=True), 5)


@pytest.mark.parametrize("variant", OWN_ROWS)
def test_every_variant_runs(variant, one_backbone):
    args = settings(RECIPE, ROWS, variant, weights="none", height=128, width=32)
    model = tclnet.build(args, 3)
    with torch.no_grad():
        embeddings, logits = model(torch.randn(2, args.frames, 3, 128, 32))
    assert embeddings.isfinite().all() and logits.shape == (2, args.learners, 3)


# ---------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("T, H, W, pool", [(4, 64, 48, "avg"), (2, 70, 33, "max")])
def test_network(T, H, W, pool, one_backbone):
    model = wake(TCLNet(5, T, H, W, pool=pool)).double().to(memory_format=torch.channels_last)
    clips = torch.randn(4, T, 3, H, W, dtype=torch.float64)
    embeddings, logits = model(clips)
    assert embeddings.shape == (4, 2, 2048) and logits.shape == (4, 2, 5)
    args = types.SimpleNamespace(margin=0.4, loss="xent+tri")
    parts = tclnet.losses((embeddings, logits), torch.tensor([0, 0, 1, 1]), args)
    check_gradients(model, sum(parts.values()))
    model.eval()
    with torch.no_grad():
        out = model(clips)
        assert out.shape == (4, 4096)
        close(model(clips[1:2]), out[1:2])  # clips do not mix
        v = model.finish(out)
    assert v.shape == (4, 4096)  # each learner's vector is L2-normalised
    close(v.view(4, 2, 2048).norm(dim=2), torch.ones(4, 2, dtype=torch.float64))


def test_the_average_over_a_tracklet_comes_before_the_l2_normalisation():
    """Sec. 3.3: v_i is the average over all segments of the tracklet, then BN, L2, concatenation;
    slowly, for a tracklet of two clips whose features differ in length."""
    model = TCLNet(3, 4, 64, 48).double().eval()
    for neck in model.neck:
        for tensor in (neck.running_mean, neck.weight, neck.bias):
            nn.init.normal_(tensor)
        nn.init.uniform_(neck.running_var, 0.5, 2)
    c = torch.randn(2, 2, 2, 2048, dtype=torch.float64)  # clip, segment, learner: instead of TSE's
    c[1] *= 5
    model.tse.register_forward_hook(lambda module, args, output: c)
    with torch.no_grad():
        outputs = model(torch.randn(2, 4, 3, 64, 48, dtype=torch.float64))
        v = model.finish(outputs.mean(0, keepdim=True))[0]
        old = model.finish(outputs).mean(0)  # every clip normalised by itself
        expected = []
        for n, neck in enumerate(model.neck):
            v_n = sum(c[b, k, n] for b in range(2) for k in range(2)) / 4
            v_n = (v_n - neck.running_mean) / (neck.running_var + neck.eps).sqrt()
            v_n = v_n * neck.weight + neck.bias
            expected.append(v_n / v_n.norm())
    close(v, torch.cat(expected))
    lengths = outputs.view(2, 2, 2048).norm(dim=2)
    assert (lengths[1] > 1.5 * lengths[0]).all()
    assert torch.cosine_similarity(old, v, 0) < 0.99


def test_the_places_of_the_modules():
    assert list(meta("tclnet").after) == ["layer2"]
    assert list(meta("tclnet-tsb23").after) == ["layer2", "layer3"]
    assert isinstance(meta("base+nl").after["layer3"], NonLocalBlock)
    assert len(meta("base").after) == 0 and meta("base").tse.seo is None
    assert meta("base+tse-wo-seo").tse.seo is None


def test_settings_reach_the_network():
    changes = dict(h_e=5, w_e=4, s_h=2, s_w=3, tau=2.0, scaled=False, stop_gradient=False)
    model = meta("tclnet", pool="max", **changes)
    seo = model.tse.seo
    assert seo.binarization.erased_block == (5, 4)
    assert seo.binarization.block_stride == (2, 3)
    assert not seo.correlation.scaled and not seo.correlation.stop_gradient
    assert model.after["layer2"].tau == 2.0 and model.tse.pool == "max"
    assert meta("tclnet", seo=False).tse.seo is None
    seo = meta("tclnet").tse.seo
    assert seo.correlation.scaled and seo.correlation.stop_gradient


@pytest.mark.parametrize(
    "height, width, block",
    [
        (256, 128, (3, 8)),
        (128, 64, (2, 4)),
        (384, 192, (5, 12)),
        (64, 32, (1, 2)),
        (256, 100, (3, 7)),
    ],
)
def test_the_erased_block_scales_with_the_map(height, width, block):
    with torch.device("meta"):
        assert TCLNet(5, 4, height, width).tse.seo.binarization.erased_block == block


def test_learners_without_erasing_start_as_the_baseline():
    """With the zeros of the initialisation TSB adds nothing, and the first learner is the
    backbone."""
    base = TCLNet(3, 4, 64, 48, **BASE).double().eval()
    tcl = TCLNet(3, 4, 64, 48, tsb=(1, 2, 3), seo=False).double().eval()
    missing, unexpected = tcl.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected
    tcl.tse.learners[1].load_state_dict(base.tse.learners[0].state_dict())
    clips = torch.randn(1, 1, 3, 64, 48, dtype=torch.float64).expand(-1, 4, -1, -1, -1)
    close(tcl(clips)[:, :2048], base(clips))
    close(tcl(clips)[:, 2048:], base(clips))


@pytest.mark.parametrize(
    "arguments, options, says",
    [
        ((3, 256, 128), {}, "2 learners take clips of 2, 4, 6 ... frames, not 3"),
        ((1, 256, 128), {}, "at least 2 frames, not 1"),
        ((4, 16, 128), {}, "can cover the whole 1x8 map of 16x128"),
        ((4, 256, 128), dict(erased_block=(16, 8)), "can cover the whole 16x8 map"),
        ((4, 256, 128), dict(erased_block=(17, 8)), "1x1 to 16x8 positions .* not 17x8"),
        ((4, 256, 128), dict(erased_block=(3, 9)), "1x1 to 16x8 positions .* not 3x9"),
        ((4, 256, 128), dict(erased_block=(0, 8)), "1x1 to 16x8 positions .* not 0x8"),
        ((4, 256, 128), dict(block_stride=(0, 1)), "a block of 3x8 and a stride of 0x1"),
        ((6, 32, 16), dict(learners=3), "2 erased block.s. of 1x1 can cover the whole 2x1 map"),
        (
            (6, 256, 128),
            dict(learners=3, erased_block=(16, 4)),
            "2 erased block.s. of 16x4 can cover",
        ),
        ((4, 256, 128), dict(learners=0), "1 learner or more, not 0"),
        ((4, 256, 128), dict(tsb=(2, 4)), "after stages 1, 2 and 3, not .2, 4."),
        ((4, 256, 128), dict(extra="3d"), "one learner"),
        ((4, 256, 128), dict(extra="nl", tsb=(3,)), "takes the place of the TSB after stage 3"),
    ],
)
def test_network_refuses(arguments, options, says):
    with torch.device("meta"):
        with pytest.raises(ValueError, match=says):
            TCLNet(5, *arguments, **options)
        assert TCLNet(5, *arguments, **BASE)  # the baseline takes any


# ---------------------------------------------------------------------------------- the picture


def picture_rows(model, T):
    """The rows of the picture, each with a panel for each frame and the scale; and their maps."""
    frames = torch.randint(0, 256, (T, 3, 64, 48), dtype=torch.uint8)
    _, rows = tclnet.picture(model, frames[None] / 255, frames)
    assert all(len(panels(0, 1)) == max(T, 2) + 1 for *_, panels in rows.values())
    return rows, [maps for maps, *_ in rows.values()]


def test_the_picture_shows_a_of_the_first_frame():
    """Fig. 3 (b): A of Eq. 6 over the other frames; the first learner has no R."""
    model, inputs = TCLNet(3, 4, 64, 48), []
    model.after["layer2"].register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    rows, (seen, r, erased, a) = picture_rows(model, 4)
    assert list(rows)[3].startswith("TSB after layer2") and model.training
    assert [len(maps) for maps in (seen, r, erased, a)] == [4, 2, 2, 3]
    slow = slow_map(inputs[0][0].double(), 0, 5.0)[1:]
    # float32 against float64: exponents within 5, from dot products of 512 terms, each rounded by
    # at most 6e-8 of a sum of absolute values that is at most 1 for unit vectors
    assert ((torch.stack(a) - slow).abs() <= 2 * 5 * 2 * 512 * 6e-8 * slow).all()
    assert all(block.sum() == 1 * 3 for block in erased)


def test_the_picture_of_other_rows(one_backbone):
    for options, T, count in (
        (BASE, 4, 1),
        (dict(tsb=(), seo=False), 4, 1),
        (dict(tsb=(), extra="nl"), 4, 3),
        (dict(tsb=(1, 3), learners=4), 4, 5),
        (dict(tsb=()), 1, 3),  # the image, once for each learner
    ):
        rows, _ = picture_rows(TCLNet(3, T, 64, 48, **options), T)
        assert len(rows) == count
