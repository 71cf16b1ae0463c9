"""Distances, the triplet loss, CMC/mAP and re-ranking against slow definitions; feature extraction;
the counter."""

import csv
import math
import os
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import common
from common import (
    batch_hard_triplet,
    cmc_and_map,
    complexity,
    distance_blocks,
    evaluate,
    extract,
    match_ranks,
    rerank,
)
from data import UserError, load_dataset, normalize, read_clip, split_consecutive, split_segments


def slow_distance(a, b, metric):
    a, b = a.double(), b.double()
    if metric == "euclidean":
        return math.sqrt(sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist())))
    return 1 - sum(x * y for x, y in zip(a.tolist(), b.tolist())) / (a.norm() * b.norm()).item()


def distances(a, b, metric="cosine"):
    return torch.cat([d for _, d in distance_blocks(a, b, metric)])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_distances(metric):
    """The tolerance: a square is a sum of some ten float32 products of about 10, and its root
    divides the error by twice the distance."""
    a, b = torch.randn(7, 5), torch.randn(9, 5)
    expected = torch.tensor([[slow_distance(x, y, metric) for y in b] for x in a])
    torch.testing.assert_close(distances(a, b, metric), expected, atol=1e-5, rtol=1e-5)
    blocks = list(distance_blocks(a, b, metric, block_size=3))
    assert [len(d) for _, d in blocks] == [3, 3, 1] and [rows.start for rows, _ in blocks] == [
        0,
        3,
        6,
    ]
    assert torch.equal(
        torch.cat([d for _, d in blocks]),
        torch.cat([d for _, d in distance_blocks(a, b, metric, block_size=3)]),
    )
    with pytest.raises(ValueError, match="metric"):
        next(distance_blocks(a, b, "manhattan"))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_near_duplicates(metric, dtype):
    """Vectors of 4,096 numbers, as M3D's two streams have them: products of them in float32 have an
    error that is larger than the distances of near duplicates. Far more rows than a block."""
    a = torch.randn(40, 4096).to(dtype)
    found = distances(a, a.repeat(120, 1), metric)
    assert found.dtype == torch.float32 and found.shape == (40, 4800)
    assert (found.diag() == 0).all() and (found[:, 4760:].diag() == 0).all()
    for noise in (1e-1, 1e-3, 1e-5):
        b = a.double() + noise * torch.randn(40, 4096)
        expected = (a.double() - b).norm(dim=1)
        if metric == "cosine":
            units = [nn.functional.normalize(x.double(), dim=1) for x in (a, b)]
            expected = (units[0] - units[1]).square().sum(1) / 2
        found = distances(a, b, metric).diag().double()
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)


def test_a_vector_of_zeros_is_at_distance_one():
    a = torch.stack([torch.zeros(8), torch.ones(8)])
    assert distances(a, a).tolist() == [[1, 1], [1, 0]]


def slow_triplet(x, pids, margin):
    losses = []
    for i in range(len(x)):
        positives = [
            slow_distance(x[i], x[j], "cosine")
            for j in range(len(x))
            if j != i and pids[j] == pids[i]
        ]
        negatives = [
            slow_distance(x[i], x[j], "cosine") for j in range(len(x)) if pids[j] != pids[i]
        ]
        if positives and negatives:
            losses.append(max(0.0, margin + max(positives) - min(negatives)))
    return sum(losses) / max(1, len(losses))


@pytest.mark.parametrize(
    "pids",
    [
        [0, 0, 1, 1, 2, 2],
        [0, 0, 0, 1, 2, 2],
        [0, 1, 2, 3, 4, 5],
        [1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 1],
    ],
)
def test_triplet(pids):
    x = torch.randn(6, 8, requires_grad=True)
    loss = batch_hard_triplet(x, torch.tensor(pids), 0.3)
    assert abs(loss.item() - slow_triplet(x.detach(), pids, 0.3)) < 1e-5
    loss.backward()
    assert x.grad.isfinite().all()
    assert (x.grad.abs().sum() > 0) == (loss.item() > 0)


def test_triplet_of_equal_embeddings_is_the_margin():
    x = torch.ones(4, 3, requires_grad=True)
    loss = batch_hard_triplet(x, torch.tensor([0, 0, 1, 1]), 0.4)
    loss.backward()
    assert abs(loss.item() - 0.4) < 1e-6 and x.grad.isfinite().all()


def slow_cmc_map(d, q_pids, q_cams, g_pids, g_cams, top):
    cmc, aps = [], []
    for q in range(len(q_pids)):
        ranking = sorted(range(len(g_pids)), key=lambda g: (d[q][g], g))
        ranking = [
            g
            for g in ranking
            if g_pids[g] != -1 and not (g_pids[g] == q_pids[q] and g_cams[g] == q_cams[q])
        ]
        hits = [g_pids[g] == q_pids[q] for g in ranking]
        if not any(hits):
            continue
        cmc.append([any(hits[:k]) for k in range(1, top + 1)])
        aps.append(np.mean([sum(hits[: k + 1]) / (k + 1) for k in range(len(hits)) if hits[k]]))
    return np.mean(cmc, 0), np.mean(aps), len(aps)


@pytest.mark.parametrize("seed", range(30))
def test_cmc_and_map(seed):
    rng = np.random.default_rng(seed)
    Q, G = rng.integers(1, 15), rng.integers(5, 60)
    d = rng.integers(0, rng.choice([2, 5, 1000]), (Q, G)).astype(np.float32)  # many ties
    q_pids, g_pids = rng.integers(1, 8, Q), rng.integers(
        -1, 7, G
    )  # junk, distractors, pid 7 has no match
    q_cams, g_cams = rng.integers(1, 4, Q), rng.integers(1, 4, G)
    g_cams[g_pids == 3] = 1  # seen by one camera only
    q_pids[0], q_cams[0], g_pids[0], g_cams[0] = 1, 1, 1, 2  # at least one query has a match
    expected = slow_cmc_map(d, q_pids, q_cams, g_pids, g_cams, 20)
    for given in (d, ((slice(i, i + 4), d[i : i + 4]) for i in range(0, Q, 4))):
        cmc, mean_ap, matched = cmc_and_map(given, q_pids, q_cams, g_pids, g_cams, top=20)
        np.testing.assert_allclose(cmc, expected[0], atol=1e-12)
        assert abs(mean_ap - expected[1]) < 1e-12 and matched == expected[2]


def test_ties_rank_in_gallery_order():
    (ranks,) = match_ranks(
        np.zeros((1, 4)),
        np.array([1]),
        np.array([1]),
        np.array([2, 1, 2, 1]),
        np.array([2, 2, 2, 2]),
    )
    assert ranks.tolist() == [1, 3]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_cmc_and_map_takes_ids_and_distances_of_any_kind(kind):
    d = torch.tensor([[0.5, 0.25, 2.0, 1.0], [0.5, 1.0, 0.125, 4.0]])
    ids = [kind(x) for x in ([1, 2], [1, 1], [1, 1, 2, 2], [2, 1, 2, 3])]
    expected = slow_cmc_map(d.tolist(), *ids, 4)
    for given in (d, d.bfloat16(), d.half(), d.double(), d.numpy(), d.tolist(),
                  [(slice(0, 1), d[:1].bfloat16()), (slice(1, 2), d[1:].bfloat16())]):
        cmc, mean_ap, matched = cmc_and_map(given, *ids, top=4)
        np.testing.assert_allclose(cmc, expected[0])
        assert abs(mean_ap - expected[1]) < 1e-12 and matched == 2
    assert [ranks.tolist() for ranks in match_ranks(d.bfloat16(), *ids)] == [[0], [0, 3]]


def test_what_cannot_be_ranked_is_an_error():
    for d in (np.full((2, 3), np.nan), np.array([[0.1, 0.2, 0.3], [0.1, np.inf, 0.3]])):
        for given in (d, torch.tensor(d), [(slice(0, 1), d[:1]), (slice(1, 2), d[1:])]):
            with pytest.raises(UserError, match="contain NaN or infinity"):
                cmc_and_map(given, [1, 1], [1, 1], [1, 1, 2], [1, 2, 2])
    with pytest.raises(UserError, match="no query has a match"):
        cmc_and_map(np.zeros((1, 2)), [1], [1], [1, 2], [1, 2])


def slow_rerank(q, g, metric, k1, k2, weight):
    """Zhong et al., Sec. 3: sets in Python, every step as in the text."""
    x = torch.cat([q, g])
    n = len(x)
    d = np.array([[slow_distance(a, b, metric) for b in x] for a in x])
    d = d ** (1 if metric == "cosine" else 2)
    d /= d.max(1, keepdims=True)
    ranking = [sorted(range(n), key=lambda j: (j != i, d[i, j])) for i in range(n)]

    def near(p, k):
        return set(ranking[p][: k + 1])

    def reciprocal(p, k):
        return {j for j in near(p, k) if p in near(j, k)}

    V = np.zeros((n, n))
    for p in range(n):
        members = set(reciprocal(p, k1))
        for j in reciprocal(p, k1):
            half = reciprocal(j, round(k1 / 2))
            if len(reciprocal(p, k1) & half) >= 2 / 3 * len(half):
                members |= half
        for j in members:
            V[p, j] = math.exp(-d[p, j])
    V = np.array([np.mean([V[j] for j in ranking[p][:k2]], 0) for p in range(n)])
    jaccard = [
        [1 - np.minimum(V[i], V[j]).sum() / np.maximum(V[i], V[j]).sum() for j in range(len(q), n)]
        for i in range(len(q))
    ]
    return weight * d[: len(q), len(q) :] + (1 - weight) * np.array(jaccard)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k1, k2, weight", [(6, 3, 0.3), (20, 6, 0.3), (4, 1, 0.0), (4, 6, 0.3)])
def test_rerank(metric, k1, k2, weight):
    centres = torch.randn(6, 8)
    q, g = centres + 0.3 * torch.randn(6, 8), centres.repeat(5, 1) + 0.3 * torch.randn(30, 8)
    np.testing.assert_allclose(
        rerank(q, g, metric, k1=k1, k2=k2, original_weight=weight),
        slow_rerank(q, g, metric, k1, k2, weight),
        atol=2e-5,
    )


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_rerank_of_duplicates(metric):
    """A sample comes first in its own list, also before duplicates with smaller numbers, which the
    queries of MARS have in the gallery. Here there are more duplicates than places in a list. All
    others rank in the order of the features."""
    x = torch.randn(4, 8)
    q, g = x[[0, 1, 0]], torch.cat([x, x[:2], x[2:3] + 0.1, x[:1]])
    for k1, k2 in ((1, 1), (2, 1), (2, 2)):
        np.testing.assert_allclose(
            rerank(q, g, metric, k1=k1, k2=k2, original_weight=0.3),
            slow_rerank(q, g, metric, k1, k2, 0.3),
            atol=2e-5,
        )


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("value, queries, gallery", [(1.0, 3, 6), (0.37, 3, 60), (1e-9, 2, 9)])
def test_rerank_of_equal_features(metric, value, queries, gallery):
    """As of a network that collapsed: no NaN, and the gallery stays in its order."""
    q, g = torch.full((queries, 8), value), torch.full((gallery, 8), value)
    d = rerank(q, g, metric)
    assert d.shape == (queries, gallery) and np.isfinite(d).all() and (d == d[0, 0]).all()
    pids, cams = [1] * queries, [1] * queries
    (ranks, *_) = match_ranks(d, pids, cams, [2] * (gallery - 1) + [1], [2] * gallery)
    assert ranks.tolist() == [gallery - 1]


def clips_of(split, size=(64, 32)):
    """How a tracklet is cut into clips of four frames, as `extract` and `evaluate` take it."""
    return {"split_clips": split, "clip_length": 4, "size": size}


class Mean(nn.Module):
    """A stand-in network: the mean colours of a clip, and its frames' positions weighted, so that
    order matters."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.seen = []

    def forward(self, clips):
        assert not self.training
        self.seen.append(len(clips))
        weights = torch.arange(1, clips.shape[1] + 1, dtype=clips.dtype, device=clips.device)
        return self.scale * torch.cat(
            [clips.mean((1, 3, 4)), (clips.mean((2, 3, 4)) * weights).sum(1, keepdim=True)], 1
        )


@pytest.mark.parametrize("split", [split_consecutive, split_segments])
@pytest.mark.parametrize("workers", [0, 1])
def test_extract_packs_clips_and_equals_one_tracklet_at_a_time(small_root, split, workers):
    tracklets, model = load_dataset("synthetic", small_root).gallery, Mean().train()
    options = clips_of(split)
    x = extract(model, tracklets, **options, batch_size=5, workers=workers)
    clips = sum(-(-len(t.frames) // 4) for t in tracklets)
    assert model.seen == [5] * (clips // 5) + [clips % 5] * (
        clips % 5 > 0
    )  # full batches across tracklets
    assert model.training  # left as it was
    model.eval()
    for i, t in enumerate(tracklets):
        batch = torch.stack(
            [read_clip([t.frames[f] for f in clip], (64, 32)) for clip in split(len(t.frames), 4)]
        )
        torch.testing.assert_close(x[i], model(normalize(batch)).mean(0), atol=1e-5, rtol=1e-5)


def test_evaluate(small_root, capsys, monkeypatch):
    dataset, calls = load_dataset("synthetic", small_root), []
    monkeypatch.setattr(
        common,
        "extract",
        lambda model, tracklets, *a, **k: calls.append(tracklets)
        or extract(model, tracklets, *a, **k),
    )
    options = clips_of(split_segments)
    result = evaluate(Mean(), dataset, **options, label="here", batch_size=4)
    assert len(calls[0]) == len(dataset.gallery)  # queries are not extracted twice
    q, g = (
        extract(Mean(), part, **options)
        for part in (dataset.query, dataset.gallery)
    )
    arrays = [
        np.array([getattr(t, key) for t in part])
        for part in (dataset.query, dataset.gallery)
        for key in ("pid", "cam")
    ]
    cmc, mean_ap, _ = slow_cmc_map(distances(q, g).tolist(), *arrays, 20)
    assert abs(result["mAP"] - 100 * mean_ap) < 1e-6 and abs(result["rank-5"] - 100 * cmc[4]) < 1e-6
    out = capsys.readouterr().out
    assert (
        out.startswith("here, all frames:  mAP ")
        and "CMC-20" in out
        and f"{result['mAP']:.1f}" in out
    )
    evaluate(Mean(), dataset, **options, use_rerank=True)
    assert "re-ranked" in capsys.readouterr().out


def read_export(folder):
    """The arrays of features.npz and the rows of queries.csv."""
    with open(folder / "queries.csv", newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    with np.load(folder / "features.npz") as arrays:  # without pickle
        return dict(arrays), rows


@pytest.mark.parametrize("use_rerank", [False, True])
def test_export(small_root, tmp_path, capsys, monkeypatch, use_rerank):
    """Its APs and ranks are those of the printed line; its lists leave out what the ranks leave
    out; also where distances come in blocks and a name is no plain text."""
    dataset = load_dataset("synthetic", small_root)
    odd = (os.fsdecode(b'caf\xe9, "a".jpg'),)
    last, lone = dataset.gallery[-1], dataset.query[0]
    gallery = [*dataset.gallery, last._replace(pid=-1)]  # junk
    query = [*dataset.query, lone._replace(pid=10 ** 6)]  # without a match
    dataset = dataset._replace(query=query, gallery=gallery)
    x = torch.randn(len(query) + len(gallery), 5)
    parts = x.split([len(query), len(gallery)])
    monkeypatch.setattr(common, "tracklet_features", lambda *_, **__: parts)
    blocks = common.distance_blocks
    monkeypatch.setattr(common, "distance_blocks", lambda *a: blocks(*a, block_size=3))
    dataset.query[1] = dataset.query[1]._replace(frames=odd)
    options = dict(clips_of(split_segments), metric="euclidean", use_rerank=use_rerank)
    with monkeypatch.context() as patch:
        patch.setattr(common, "process_rank", lambda: 1)
        evaluate(None, dataset, **options, export_folder=tmp_path / "new/a")
    assert "wrote" not in capsys.readouterr().out and not (tmp_path / "new").exists()
    result = evaluate(None, dataset, **options, export_folder=tmp_path / "new/a")
    says, out = f"wrote features.npz and queries.csv into {tmp_path / 'new/a'}", capsys.readouterr()
    assert says in out.out and ("the re-ranked distances" in out.out) == use_rerank
    arrays, rows = read_export(tmp_path / "new/a")
    assert sorted(p.name for p in (tmp_path / "new/a").iterdir()) == ["features.npz", "queries.csv"]
    q, g = parts
    for part, tracklets, features in (("query", query, q), ("gallery", gallery, g)):
        assert np.array_equal(arrays[f"{part}_features"], features.numpy())
        assert arrays[f"{part}_pids"].tolist() == [t.pid for t in tracklets]
        assert arrays[f"{part}_cams"].tolist() == [t.cam for t in tracklets]
        assert arrays[f"{part}_tracklets"].tolist() == [str(t.frames[0]) for t in tracklets]
    assert [row["query"] for row in rows] == arrays["query_tracklets"].tolist()
    assert (rows[-1]["AP"], rows[-1]["rank"]) == ("", "") != (rows[0]["AP"], rows[0]["rank"])
    matched = [row for row in rows if row["AP"]]
    assert np.mean([float(row["AP"]) for row in matched]) == pytest.approx(result["mAP"], abs=1e-9)
    for k in (1, 5, 10):
        share = np.mean([int(row["rank"]) <= k for row in matched])
        assert 100 * share == pytest.approx(result[f"rank-{k}"])
    d = rerank(q, g, "euclidean") if use_rerank else distances(q, g, "euclidean").numpy()
    where = {str(t.frames[0]): t for t in reversed(gallery)}
    for row, t, own in zip(rows, query, d):
        seen = [j for j in np.argsort(own, kind="stable") if gallery[j].pid != -1
                and (gallery[j].pid, gallery[j].cam) != (t.pid, t.cam)]
        listed = [row[str(k)] for k in range(1, 11)]
        expected = [str(gallery[j].frames[0]) for j in seen[:10]]
        assert listed == expected + [""] * (10 - len(expected))
        if row["rank"] and int(row["rank"]) <= 10:
            pids = [where[name].pid == t.pid for name in listed]
            assert pids.index(True) == int(row["rank"]) - 1


def crops(frames):
    """The pixels of files, as a tracker has them: uint8 (h, w, 3)."""
    return [read_clip([frame], (64, 32))[0].permute(1, 2, 0).numpy() for frame in frames]


@pytest.mark.parametrize("workers", [0, 1])
def test_extract_takes_crops_that_are_in_memory(small_root, workers):
    """Lists of arrays and of tensors, and one of either, beside files: all the same embeddings."""
    tracklets = load_dataset("synthetic", small_root).gallery[:5]
    options = dict(clips_of(split_consecutive, size=(48, 40)), workers=workers)
    expected = extract(Mean(), tracklets, **options)
    first, second, third, fourth, fifth = (crops(t.frames) for t in tracklets)
    second[0].flags.writeable = False
    given = [
        [frame[..., ::-1].copy()[..., ::-1] for frame in first],  # as from OpenCV's BGR
        np.stack(second),
        [torch.tensor(frame) for frame in third],
        torch.tensor(np.stack(fourth)),
        tracklets[4]._replace(frames=fifth),
    ]
    assert torch.equal(extract(Mean(), given, **options), expected)
    files = [list(t.frames) for t in tracklets]
    assert torch.equal(extract(Mean(), files, **options), expected)
    sizes = [np.full((h, 30, 3), 7, np.uint8) for h in (60, 50, 70)]  # a tracker's boxes differ
    x = extract(Mean(), [sizes], **options)
    torch.testing.assert_close(x, extract(Mean(), [np.full((3, 9, 9, 3), 7, np.uint8)], **options))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("empty", [(), [], np.zeros((0, 8, 8, 3), np.uint8)])
def test_a_tracklet_without_frames_is_named(small_root, place, empty):
    dataset = load_dataset("synthetic", small_root)
    tracklets = dataset.gallery[:2]
    tracklets.insert(place, dataset.gallery[2]._replace(frames=empty, pid=8, cam=3))
    options = clips_of(split_consecutive)
    says = rf"tracklet {place + 1} of 3 \(identity 8, camera 3\) has no frames"
    with pytest.raises(UserError, match=says):
        extract(Mean(), tracklets, **options)
    with pytest.raises(UserError, match="tracklet 1 of 1 .* has no frames"):
        extract(Mean(), [empty], **options)
    with pytest.raises(UserError, match="there are no tracklets"):
        extract(Mean(), [], **options)
    with pytest.raises(UserError, match="identity 8, camera 3"):
        evaluate(Mean(), dataset._replace(gallery=tracklets), **options)


@pytest.mark.parametrize(
    "frames, says",
    [
        (np.zeros((2, 8, 8, 3), np.float32), "float32"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"\(3, 8, 8\)"),
        (np.zeros((8, 8, 3), np.uint8), r"\(8, 3\)"),
        ([np.zeros((0, 8, 3), np.uint8)], r"\(0, 8, 3\)"),
        (torch.zeros(2, 8, 8, 4, dtype=torch.uint8), r"\(8, 8, 4\)"),
        ("frame.jpg", "is a list of frames"),
    ],
)
def test_extract_refuses_other_crops(frames, says):
    with pytest.raises(UserError, match=says):
        extract(Mean(), [frames], **clips_of(split_consecutive))


def test_evaluate_refuses_features_that_are_not_finite(small_root):
    model = Mean()
    model.scale.data.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        evaluate(model, load_dataset("synthetic", small_root), **clips_of(split_segments))


def test_the_deviation_of_the_splits_is_that_of_a_sample(monkeypatch, capsys):
    """Ten splits are a sample of all that could be drawn: divided by 9, not by 10."""
    def part_of(args, rows, name, split):
        return SimpleNamespace(split=int(split), checkpoint=None, epochs=1)

    monkeypatch.setattr(common, "part_of", part_of)
    values = [10 * split for split in range(10)]
    results = [{"mAP": value, "rank-1": value / 2} for value in values]
    common.train_all_splits(lambda args: results[args.split],
                            SimpleNamespace(epochs=1, variant="base", paper_result=None), {})
    deviation = statistics.stdev(values)
    assert abs(deviation - statistics.pstdev(values)) > 1
    expected = f"base, mean of 10 splits: mAP 45.0 +- {deviation:.1f}, "
    expected += f"rank-1 22.5 +- {deviation / 2:.1f}; the paper reports no result"
    assert expected in capsys.readouterr().out


def test_complexity():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.line = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Linear(8, 5)

        def forward(self, clips):
            return self.line(self.conv(clips.flatten(0, 1)).mean((2, 3)))

    net = Net()
    counted = complexity(net, clip_length=2, height=10, width=6)
    assert counted == (8 * 27 + 45, 2 * (8 * 27 * 60 + 40))
    assert net.conv.weight.device.type == "cpu" and net.training


class Finishing(Mean):
    """A network whose eval mode gives what can be averaged, and `finish` what can be compared."""

    def finish(self, features):
        return nn.functional.normalize(features, dim=1)


def test_a_network_finishes_what_was_averaged(small_root):
    tracklets = load_dataset("synthetic", small_root).gallery
    plain = extract(Mean(), tracklets, **clips_of(split_consecutive))
    finished = extract(Finishing(), tracklets, **clips_of(split_consecutive))
    assert torch.equal(finished, nn.functional.normalize(plain, dim=1))
