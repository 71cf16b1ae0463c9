"""What the five papers share beside the data, and what a run needs beside the paper."""
import argparse
import contextlib
import copy
import datetime
import json
import math
import os
import re
import signal
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from data import (CHUNK, DATA_SETS, NO_MATCH, SPLIT_SETS, AllClips, Parser, Tracklet, TrainClips,
                  UserError, first_line, last_line, load_dataset, load_file, locked, normalize,
                  printable, progress, read_clip, replacing, save_rows)


# ------------------------------------------------------------------------------- losses and metrics

def at_least_float32(x):
    """Returns x in float32 if its dtype is less precise (autocast, `.half()`), else unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def batch_hard_triplet(embeddings, pids, margin):
    """Returns the batch-hard triplet loss (Hermans et al., 2017) with the cosine distance, 1 - cos:
    the mean over the anchors of [margin + d(hardest positive) - d(hardest negative)]+.

    An anchor without a positive or without a negative is left out of the mean.

    Args:
        embeddings: tensor (N, D).
        pids: tensor (N,), the identities.
        margin: by how much the hardest negative should be farther away than the hardest positive.
    """
    x = F.normalize(at_least_float32(embeddings), dim=1)
    distances = 1 - x @ x.T
    same = pids[:, None] == pids
    positive = same & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    # -inf for an anchor without a positive, inf for one without a negative: the hinge is 0 for both
    hardest_positive = distances.masked_fill(~positive, -math.inf).amax(1)
    hardest_negative = distances.masked_fill(same, math.inf).amin(1)
    hinge = (margin + hardest_positive - hardest_negative).relu()
    # If one anchor has no negative, the batch has a single identity and no anchor has a negative.
    # The sum is then 0, so that it does not matter how many anchors are counted.
    return hinge.sum() / positive.any(1).sum().clamp(min=1)


# A squared distance below ROUNDING * (|a|^2 + |b|^2) is a rounding error and is set to 0, so that
# equal vectors have a distance of exactly 0. The same holds for 1 - cos below ROUNDING.
ROUNDING = 1e-14


def distance_blocks(a, b, metric="cosine", *, block_size=512):
    """Yields the distances between the rows of a and the rows of b, one block of rows at a time, as
    (slice of the rows of a, float32 tensor (rows, N)).

    A distance is a small difference of large terms, a dot product and squared norms. In float32
    their rounding errors are as large as the distances of near duplicates. The terms are therefore
    computed in float64.

    Args:
        a: tensor (M, D).
        b: tensor (N, D).
        metric: "cosine" for 1 - cos, in [0, 2], or "euclidean".
        block_size: largest number of rows in a block.

    Raises ValueError for another metric.
    """
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric must be 'cosine' or 'euclidean', not {metric!r}")
    norm_a = torch.linalg.vector_norm(a, dim=1, dtype=torch.float64)
    norm_b = torch.linalg.vector_norm(b, dim=1, dtype=torch.float64)
    for start in range(0, len(a), block_size):
        rows = slice(start, min(start + block_size, len(a)))
        part = a[rows].double()
        norm = norm_a[rows, None]
        distances = torch.empty(len(part), len(b), device=a.device)
        for first in range(0, len(b), 1024):  # in pieces: a float64 copy of b needs much memory
            columns = slice(first, first + 1024)
            block = part @ b[columns].double().T
            # The operations below are in place, which is much faster.
            if metric == "cosine":
                # 1 - a b / (|a| |b|)
                block.div_(norm.clamp(min=1e-12)).div_(norm_b[columns].clamp(min=1e-12))
                block.neg_().add_(1)
                block.masked_fill_(block < ROUNDING, 0)
            else:
                # |a|^2 + |b|^2 - 2 a b
                squared_norms = norm ** 2 + norm_b[columns] ** 2
                block.mul_(-2).add_(squared_norms)
                block.masked_fill_(block < squared_norms.mul_(ROUNDING), 0).sqrt_()
            distances[:, columns] = block
        yield rows, distances


def to_numpy(values):
    """Returns a list, an array or a tensor on any device as a NumPy array. bfloat16, which NumPy
    does not have, becomes float32."""
    if not torch.is_tensor(values):
        return np.asarray(values)
    if values.dtype == torch.bfloat16:
        values = values.float()
    return values.numpy(force=True)


def in_ranking(pid, cam, g_pids, g_cams):
    """Returns which gallery entries a query is ranked against, a boolean array (G,).

    This is MARS' protocol: entries of the query's own identity and camera are left out, and so is
    junk, whose pid is -1.
    """
    same_camera = (g_pids == pid) & (g_cams == cam)
    junk = g_pids == -1
    return ~(same_camera | junk)


def match_ranks(distances, q_pids, q_cams, g_pids, g_cams):
    """Returns the ranks of the true matches of each query, a list of ascending integer arrays. The
    best rank is 0. Equal distances rank in the order of the gallery, see also `in_ranking`.

    Args:
        distances: (Q, G), from the queries to the gallery entries.
        q_pids, q_cams: identities and cameras of the queries, (Q,).
        g_pids, g_cams: identities and cameras of the gallery entries, (G,).

    All arguments may be lists, arrays or tensors. Raises UserError for distances that are not
    finite.
    """
    q_pids, q_cams, g_pids, g_cams = map(to_numpy, (q_pids, q_cams, g_pids, g_cams))
    ranks_of_queries = []
    for row, pid, cam in zip(distances, q_pids, q_cams, strict=True):
        row = to_numpy(row)
        if not np.isfinite(row).all():
            raise UserError(f"the distances of a query (identity {pid}, camera {cam}) contain NaN "
                            "or infinity and cannot be ranked; check that the features are finite")
        kept = in_ranking(pid, cam, g_pids, g_cams)
        row = row[kept]
        is_match = g_pids[kept] == pid
        # to sort the values is faster than a stable argsort, which only equal distances need
        ranking = np.sort(row)
        matches = np.sort(row[is_match])
        ranks = np.searchsorted(ranking, matches)
        has_ties = np.searchsorted(ranking, matches, "right") > ranks + 1
        if has_ties.any():
            ranks = np.flatnonzero(is_match[row.argsort(kind="stable")])
        ranks_of_queries.append(ranks)
    return ranks_of_queries


def average_precision(ranks):
    """Returns the mean, over the matches of a query, of the precision at the match, which is not
    interpolated. ranks: one array of `match_ranks`, not empty."""
    return float(np.mean(np.arange(1, len(ranks) + 1) / (ranks + 1)))


def distances_and_ranks(distances, q_pids, q_cams, g_pids, g_cams):
    """Yields (distances to the gallery, ranks of the true matches) for each query.

    distances: a (Q, G) matrix, or the blocks of it that `distance_blocks` yields. The other
    arguments are those of `match_ranks`.
    """
    q_pids, q_cams, g_pids, g_cams = map(to_numpy, (q_pids, q_cams, g_pids, g_cams))
    blocks = distances
    is_matrix = hasattr(distances, "shape")
    if isinstance(distances, (list, tuple)):  # of rows, or of blocks, which are pairs
        is_matrix = not isinstance(distances[0], tuple)
    if is_matrix:
        blocks = [(slice(None), distances)]
    for rows, block in blocks:
        block = to_numpy(block)
        ranks = match_ranks(block, q_pids=q_pids[rows], q_cams=q_cams[rows],
                            g_pids=g_pids, g_cams=g_cams)
        yield from zip(block, ranks)


def cmc_and_map(distances, q_pids, q_cams, g_pids, g_cams, *, top=20):
    """Returns the CMC curve, mAP and the number of queries that have a match.

    CMC[k - 1] is the share of the queries with a match among their first k gallery entries, for k
    from 1 to `top`. CMC and mAP are in [0, 1] and leave out the queries that have no match at all.
    The other arguments are those of `distances_and_ranks`. Raises UserError for distances that are
    not finite, and when no query has a match.
    """
    found = []
    for _, ranks in distances_and_ranks(distances, q_pids=q_pids, q_cams=q_cams,
                                        g_pids=g_pids, g_cams=g_cams):
        if len(ranks):
            found.append(ranks)
    if not found:
        raise UserError("no query has a match in the gallery; a match is an entry of the same "
                        "identity from another camera")
    first_ranks = np.array([ranks[0] for ranks in found])
    cmc = (first_ranks[:, None] < np.arange(1, top + 1)).mean(0)
    mean_ap = float(np.mean([average_precision(ranks) for ranks in found]))
    return cmc, mean_ap, len(found)


def smallest_indices(distances, k):
    """Returns the indices of the k smallest entries of each row of a float32 matrix (M, N), in
    ascending order. Equal entries rank in the order of their indices, where `topk` alone would
    take any order."""
    values, indices = distances.topk(min(k + 1, distances.shape[1]), largest=False)
    tied = (values[:, 1:] == values[:, :-1]).any(1)
    # The bit patterns of floats sort like the floats unless both are negative. Shifted by 32 bits,
    # with the index in the lower bits, they make keys that are never equal.
    bits = distances[tied].view(torch.int32).long()
    keys = bits * 2 ** 32 + torch.arange(distances.shape[1], device=distances.device)
    indices[tied] = keys.topk(indices.shape[1], largest=False).indices
    return indices[:, :k]


def rerank(query_features, gallery_features, metric="cosine", *, k1=20, k2=6, original_weight=0.3):
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017): returns new distances (Q, G), the weighted
    sum of the original distance d and the Jaccard distance of the k-reciprocal neighbours.

    d is the cosine or the squared Euclidean distance, divided by the largest distance of its query.
    A sample comes first in its own list of neighbours and is not counted among the k1. Equally
    distant neighbours rank in the order of the features.

    Two details follow the paper and differ from its authors' code: the encoding V is not divided by
    its sum, and the neighbours R(q, k1/2) of a neighbour q are added if at least 2/3 of them are in
    R(p, k1); the code asks for more than 2/3.

    Args:
        query_features: tensor (Q, D).
        gallery_features: tensor (G, D).
        metric: "cosine" or "euclidean".
        k1: number of neighbours for the reciprocal sets.
        k2: number of neighbours over which local query expansion averages, the sample included.
        original_weight: weight of d, in [0, 1]; the paper's lambda.
    """
    from scipy.sparse import csr_array
    x = torch.cat([query_features, gallery_features])
    Q, n = len(query_features), len(x)
    exponent = 2 if metric == "euclidean" else 1
    k1 = min(k1, n - 1)
    k2 = min(k2, n)

    def sparse(values, rows, columns):
        return csr_array((values, (rows, columns)), shape=(n, n))

    neighbours = torch.empty(n, k1 + 1, dtype=torch.long)
    farthest = torch.empty(n)
    for rows, d in distance_blocks(x, x, metric):
        # -1: a sample comes before its exact duplicates
        d[torch.arange(len(d)), torch.arange(rows.start, rows.stop)] = -1
        neighbours[rows] = smallest_indices(d, k1 + 1).cpu()
        farthest[rows] = d.amax(1).cpu() ** exponent
    if not farthest.any():  # all features are equal: neighbours are arbitrary, all distances 0
        return np.zeros((Q, n - Q), np.float32)
    farthest[farthest == 0] = 1
    neighbours = neighbours.numpy()
    farthest = farthest.numpy()

    def reciprocal(k):
        """R(p, k): the neighbours of p that have p among their own k nearest neighbours."""
        nearest = neighbours[:, :k + 1]
        of_neighbours = nearest[nearest]  # (n, k + 1, k + 1): the neighbours of each neighbour
        mutual = (of_neighbours == np.arange(n)[:, None, None]).any(2)
        p = np.repeat(np.arange(n), mutual.sum(1))
        return sparse(np.ones(len(p), np.float32), p, nearest[mutual])

    full = reciprocal(k1)
    half = reciprocal(round(k1 / 2))
    # how many of R(q, k1/2) are in R(p, k1), for each q in R(p, k1)
    overlap = (full @ half.T).multiply(full).tocoo()
    is_large = overlap.data >= 2 / 3 * half.sum(1)[overlap.col]
    expansion = sparse(overlap.data[is_large], overlap.row[is_large], overlap.col[is_large])
    # R*(p, k1): R(p, k1) and every R(q, k1/2) of which at least 2/3 are in it
    p, members = (full + expansion @ half).nonzero()
    weights = np.empty(len(p), np.float32)
    for chunk in np.array_split(np.arange(len(p)), 1 + len(p) // 1000):
        a = x[p[chunk]].double()
        b = x[members[chunk]].double()
        if metric == "cosine":
            d = 1 - (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1)
            d[d < ROUNDING] = 0
        else:
            d = (a - b).square().sum(1)
        weights[chunk] = np.exp(-d.cpu().numpy() / farthest[p[chunk]])
    V = sparse(weights, p, members)
    # local query expansion: the mean of V over the k2 nearest
    p = np.repeat(np.arange(n), k2)
    V = sparse(np.full(n * k2, 1 / k2, V.dtype), p, neighbours[:, :k2].ravel()) @ V

    gallery_columns = V[Q:].tocsc()
    total = V.sum(1)
    reranked = np.empty((Q, n - Q), np.float32)
    for rows, d in distance_blocks(x[:Q], x[Q:], metric):
        for query, row in zip(range(rows.start, rows.stop), d.cpu().numpy() ** exponent):
            entries = slice(V.indptr[query], V.indptr[query + 1])
            minima = sums_of_minima(V.data[entries], gallery_columns[:, V.indices[entries]])
            jaccard = 1 - minima / (total[query] + total[Q:] - minima)
            original = original_weight * row / farthest[query]
            reranked[query] = original + (1 - original_weight) * jaccard
    return reranked


def sums_of_minima(values, columns):
    """Returns the sum over the columns of min(the value of the column, entry), for each row of a
    sparse matrix.

    values: one number for each column, at least 0; columns: a csc_array (rows, columns), which is
    overwritten.
    """
    values = np.repeat(values, np.diff(columns.indptr))  # one for each entry that is stored
    columns.data = np.minimum(columns.data, values)
    return columns.sum(1)


# --------------------------------------------------------------------------------------- evaluation
# A network that is evaluated takes clips (B, T, 3, H, W) and returns embeddings (B, D), in eval
# mode. It may have two methods: finish(features) is applied to the tracklets' mean embeddings, and
# test_parts() returns [(network, frames in a clip)], whose features a test concatenates.

def as_tracklets(tracklets):
    """Returns a list of `Tracklet`. A bare list of frames becomes a Tracklet of identity 0 and
    camera 0.

    Raises UserError for a path, which is no list of frames, and for a tracklet without frames,
    which has no mean embedding.
    """
    found = []
    for number, tracklet in enumerate(tracklets, 1):
        if isinstance(tracklet, (str, os.PathLike)):
            raise UserError(f"tracklet {number} is a path ({tracklet}), but a tracklet is a list "
                            "of frames")
        if not hasattr(tracklet, "frames"):
            tracklet = Tracklet(tracklet, pid=0, cam=0)
        if len(tracklet.frames) == 0:
            raise UserError(f"tracklet {number} of {len(tracklets)} (identity {tracklet.pid}, "
                            f"camera {tracklet.cam}) has no frames")
        found.append(tracklet)
    return found


@torch.no_grad()
def extract(model, tracklets, *, split_clips, clip_length, size, batch_size=32, workers=0,
            amp=False):
    """Returns the features of whole tracklets, float32 (N, D): the means of their clips'
    embeddings.

    A batch may hold clips of several tracklets, so that all batches but the last are full. Several
    processes share the batches, and each returns the features of all tracklets.

    Args:
        model: the network, see the top of this section.
        tracklets: each a `Tracklet`, or its frames alone. Frames are image files, or crops in RGB:
            uint8 arrays or tensors (h, w, 3) of any sizes, or a single array or tensor
            (n, h, w, 3).
        split_clips: function of (n, T) that returns the clips of a tracklet of n frames, an array
            of frame indices (clips, T); a script's SPLIT.
        clip_length: number of frames in a clip, T.
        size: (height, width) to which the frames are resized.
        batch_size: number of clips in a forward pass.
        workers: number of processes that load images; 0 loads them in this one.
        amp: True runs the network with bfloat16 autocast.

    Raises UserError for tracklets and frames that cannot be used.
    """
    tracklets = as_tracklets(tracklets)
    device = next(model.parameters()).device
    was_training = model.training
    clips = AllClips(tracklets, split_clips, clip_length, size)
    starts = range(0, len(clips), batch_size)
    batches = [range(i, min(i + batch_size, len(clips))) for i in starts]
    # The processes take the batches in turn. Each gets equally many: some repeat one at the end.
    own_batches = torch.utils.data.DistributedSampler(
        batches, num_replicas=world_size(), rank=process_rank(), shuffle=False)
    loader = torch.utils.data.DataLoader(
        clips, batch_sampler=[batches[i] for i in own_batches], num_workers=workers,
        worker_init_fn=ignore_terminal_signals, pin_memory=device.type == "cuda",
        generator=torch.Generator())
    tracklet_of_clip = torch.tensor([number for number, _ in clips.clips], device=device)
    if world_size() > 1:  # the BatchNorm statistics of the processes may differ: take the first's
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    model.eval()
    sums = None
    with progress(what="features", total=len(clips), unit=" clips", leave=False,
                  hidden=process_rank() > 0) as bar:
        # the n-th batches of all processes together are the n-th of these slices of clips
        slices = tracklet_of_clip.split(batch_size * world_size())
        for (images, _), owners in zip(loader, slices):
            raise_if_stopped()
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                x = model(normalize(images.to(device, non_blocking=True))).float()
            if world_size() > 1:  # the last batch may be smaller, but all must have one shape
                x = gather(F.pad(x, (0, 0, 0, batch_size - len(x))))
            if sums is None:
                sums = x.new_zeros(len(tracklets), x.shape[1])
            sums.index_add_(0, owners, x[:len(owners)])
            bar.update(len(owners))
    model.train(was_training)
    features = sums / tracklet_of_clip.bincount()[:, None]
    if hasattr(model, "finish"):
        features = model.finish(features)
    return features


def networks_of_test(model, clip_length):
    """Returns [(network, frames in a clip)] whose features a test concatenates."""
    if hasattr(model, "test_parts"):
        return model.test_parts()
    return [(model, clip_length)]


def tracklet_features(model, dataset, *, split_clips, clip_length, size, **extraction):
    """Returns the features of the query tracklets (Q, D) and of the gallery tracklets (G, D).

    dataset: a `Dataset`; extraction: further arguments of `extract`, which explains the others.
    Raises UserError for features that are not finite.
    """
    # by their first frame: a query that is also in the gallery is computed once
    tracklets = {t.frames[0]: t for t in as_tracklets(dataset.query + dataset.gallery)}
    parts = []
    for network, length in networks_of_test(model, clip_length):
        parts.append(extract(network, [*tracklets.values()], split_clips=split_clips,
                             clip_length=length, size=size, **extraction))
    features = torch.cat(parts, 1)
    if not features.isfinite().all():
        raise UserError("the features are not finite: the weights are damaged or the training "
                        "diverged")
    row_of_frame = {first: row for row, first in enumerate(tracklets)}

    def features_of(part):
        return features[[row_of_frame[t.frames[0]] for t in part]]

    return features_of(dataset.query), features_of(dataset.gallery)


def evaluate(model, dataset, *, split_clips, clip_length, size, metric="cosine", use_rerank=False,
             label="test", export_folder=None, **extraction):
    """Prints mAP and CMC of the test part and returns them, in percent: {"mAP": 84.6, "rank-1":
    88.8, "rank-5": ..., "rank-10": ..., "rank-20": ...}.

    Args:
        model, split_clips, clip_length, size, extraction: arguments of `extract`.
        dataset: a `Dataset` with query and gallery.
        metric: "cosine" or "euclidean".
        use_rerank: True ranks by the distances of `rerank`.
        label: what the printed line begins with.
        export_folder: where `write_export` writes features and rankings; None for nowhere. With a
            folder, a test part without any match is no error: the features are written, and an
            empty dict is returned.

    Raises UserError when nothing can be ranked.
    """
    start = time.time()
    queries, gallery = tracklet_features(model, dataset, split_clips=split_clips,
                                         clip_length=clip_length, size=size, **extraction)
    reranked = rerank(queries, gallery, metric) if use_rerank else None

    def distances():
        return distance_blocks(queries, gallery, metric) if reranked is None else reranked

    def export():
        if export_folder and process_rank() == 0:
            write_export(Path(export_folder), dataset, query_features=queries,
                         gallery_features=gallery, distances=distances(), is_reranked=use_rerank)

    if export_folder and not dataset.has_a_match():
        print(f"{label}: nothing can be ranked: {NO_MATCH}", flush=True)
        export()
        return {}
    cmc, mean_ap, matched = cmc_and_map(distances(), *dataset.ids())
    result = {"mAP": 100 * mean_ap}
    for k in (1, 5, 10, 20):
        result[f"rank-{k}"] = 100 * float(cmc[k - 1])
    takes_all_frames = split_clips(clip_length + 1, clip_length).size > clip_length
    if takes_all_frames:
        how = "all frames"
    else:
        how = f"whole clips of {clip_length} frames"
    if use_rerank:
        how += ", re-ranked"
    cmc_text = "  ".join(f"CMC-{k} {result[f'rank-{k}']:.1f}" for k in (1, 5, 10, 20))
    counts = f"{matched:,} queries"
    if matched < len(queries):
        counts += f", {len(queries) - matched:,} more without a match are not counted"
    print(f"{label}, {how}:  mAP {result['mAP']:.1f}   {cmc_text}   "
          f"({counts}, {len(gallery):,} gallery tracklets, {time.time() - start:.0f} s)",
          flush=True)
    export()
    return result


def write_export(folder, dataset, *, query_features, gallery_features, distances, is_reranked):
    """Writes features.npz, the features of the test part, and queries.csv, which has a line for
    each query: its average precision, the rank of its first match and its first ten gallery
    tracklets. A tracklet is named by its first frame.

    Args:
        folder: a Path, made where it is missing.
        dataset: a `Dataset` with query and gallery.
        query_features: tensor (Q, D).
        gallery_features: tensor (G, D).
        distances: a (Q, G) matrix or its blocks, as `distances_and_ranks` takes them.
        is_reranked: whether the distances are those of `rerank`, which the printed line then says.
    """
    q_pids, q_cams, g_pids, g_cams = dataset.ids()
    queries = [str(t.frames[0]) for t in dataset.query]
    gallery = [str(t.frames[0]) for t in dataset.gallery]
    with replacing(folder / "features.npz") as file:
        np.savez(file, query_features=query_features.numpy(force=True), query_pids=q_pids,
                 query_cams=q_cams, query_tracklets=queries,
                 gallery_features=gallery_features.numpy(force=True), gallery_pids=g_pids,
                 gallery_cams=g_cams, gallery_tracklets=gallery)
    lines = []
    found = distances_and_ranks(distances, q_pids=q_pids, q_cams=q_cams, g_pids=g_pids,
                                g_cams=g_cams)
    for i, (row, ranks) in enumerate(found):
        kept = np.flatnonzero(in_ranking(q_pids[i], q_cams[i], g_pids, g_cams))
        nearest = [gallery[j] for j in kept[row[kept].argsort(kind="stable")[:10]]]
        line = {"query": queries[i], "AP": "", "rank": ""}
        if len(ranks):
            line["AP"] = 100 * average_precision(ranks)
            line["rank"] = ranks[0] + 1
        for place in range(10):
            line[place + 1] = nearest[place] if place < len(nearest) else None
        lines.append(line)
    save_rows(lines, folder / "queries.csv")
    note = ""
    if is_reranked:
        note = ("; queries.csv uses the re-ranked distances, and features.npz holds the features "
                "alone, whose own distances give another order")
    print(f"wrote features.npz and queries.csv into {folder}{note}", flush=True)


# ----------------------------------------------------------------------------------- rows and flags

COSTS = {  # what a paper prints of a row beside its accuracy, and the unit
    "million_parameters": "million parameters",
    "more_megabytes": "MB of parameters more than the 2D network",
    "gflops_a_frame": "GFLOPs a frame",
    "gflops_of_4_frames": "GFLOPs of 4 frames",
    "more_gflops": "GFLOPs more than the baseline",
}


class Row:
    """A row of a paper's table: its place and name there; the name of the row that it equals, or
    settings of the recipe, and as printed (mAP, rank-1), None for one that is not, and COSTS."""

    def __init__(self, about, same=None, **given):
        self.about, self.same = about, same
        self.figures = {name: given.pop(name) for name in DATA_SETS if name in given}
        self.costs = {name: given.pop(name) for name in COSTS if name in given}
        self.settings = given


def row_of(rows, name):
    """The row of this name, or the one that it equals."""
    return rows[rows[name].same or name]


# what the small run says of these goes before what a row says: a row's schedule is made for MARS
SCHEDULE = ("epochs", "ids", "clips", "lr", "lr_step")
IMAGENET = "resnet50-0676ba61.pth"  # torchvision's file of --weights imagenet


def changed(rows, name, small):
    """What the row `name` changes."""
    return {key: value for key, value in row_of(rows, name).settings.items()
            if not (small and key in SCHEDULE)}


def settings(recipe, rows, name, small=False, **others):
    """The recipe, or that of the small run, with what the row `name` and `others` change."""
    values = {key: entry[1 if small else 0] for key, entry in recipe.items()}
    return argparse.Namespace(**{"variant": name, "resume": None, **values,
                                 **changed(rows, name, small), **others})


LEAST = {"epochs": 1, "ids": 2, "clips": 1, "frames": 1, "height": 1, "width": 1, "lr_step": 1,
         "checkpoint_every": 1, "figure_tracklets": 1}  # of the others 0
MOST = {"erase": 1, "frames": 1024, "ids": 4096, "clips": 4096, "height": 8192, "width": 8192,
        "epochs": 10 ** 5, "k": 99, "kernels": 999, "resolutions": 999, "learners": 64,
        "s_h": 999, "s_w": 999}
ABOVE_ZERO = {"beta", "temperature"}  # their least value, 0, is not taken itself
FLAGS = {  # beside a recipe: (what holds when the user says nothing, meaning[, choices])
    "data": ("synthetic", "data set", tuple(DATA_SETS)),
    "small": (None, "take the recipe of the small run (synthetic: yes; others: no)"),
    "root": ("datasets", "folder that holds the data sets, ROOT/mars ..., or the set itself"),
    "split": ("0", "of ilids and prid; all: in turn, with the mean", (*"0123456789", "all")),
    "chunk": (None, "cut training tracklets into pieces of so many frames, 0: do not (data.CHUNK)"),
    "workers": (None, "loader processes (up to 8 with a GPU, else 0)"),
    "gpu": (None, "number of the GPU, or cpu (the first GPU, else the CPU)"),
    "amp": (False, "bfloat16 autocast"),
    "compile": (False, "torch.compile, where a compiler is there"),
    "seed": (0, "of weights, batches and augmentation"),
    "output": (None, "folder for log.csv, args.json, last.pt (runs/SCRIPT-DATA[-VARIANT])"),
    "init": (None, "start from the network of another run, this last.pt (then --weights none)"),
    "resume": (None, "go on with this last.pt or folder; auto, or no RESUME: with --output's"),
    "checkpoint_every": (1, "write last.pt and log.csv after every N epochs"),
    "eval_every": (0, "also evaluate after every N epochs; 0: at the end only"),
    "eval_first": (None, "evaluate before the training, too (synthetic: yes; others: no)"),
    "tensorboard": (False, "also write the log for TensorBoard, into the output folder"),
    "rerank": (False, "k-reciprocal re-ranking in the evaluation"),
    "evaluate": (False, "only evaluate, with --resume or as initialised"),
    "export": (None, "evaluate (--no-evaluate: train), write features.npz, queries.csv there"),
    "figure": (None, "only draw what the network does, into this folder"),
    "figure_tracklets": (3, "query tracklets to draw"),
    "figure_format": ("png", "of the pictures; pdf, svg: for papers", ("png", "pdf", "svg")),
    "beside": (None, "last.pt of another row of the script, drawn above the first (with --figure)"),
    "complexity": (False, "only print parameters and FLOPs of all variants"),
    "plan": (False, "only print what would be trained and tested: the recipe, the data set, steps"),
}
# what a checkpoint does not say, and what may differ from it when a run goes on or is evaluated
HERE = {"eval_first", "evaluate", "export", "figure", "figure_tracklets", "figure_format", "beside",
        "complexity", "plan", "gpu", "workers", "resume", "compile", "output", "chosen",
        "tensorboard"}
GOING_ON = {*HERE, "root", "epochs", "checkpoint_every", "eval_every"}
EVALUATED = {*FLAGS, *SCHEDULE, "erase", "weights"}


def typed(key, value):
    """A setting as it is typed."""
    if isinstance(value, bool):
        key, value = key if value else f"no_{key}", ()
    values = value if isinstance(value, (tuple, list)) else [value]
    return " ".join(["--" + key.replace("_", "-"), *map(str, values)])


PATHS = {"root", "output", "resume", "init", "export", "figure", "beside", "weights", "init_2d",
         "join"}  # flags in which ~ is the home folder, also behind a =, where the shell leaves it


def add_flag(group, key, default, meaning, choices=None):
    """A flag of the kind of its default: int, float, str, bool, a tuple of one kind, or None."""
    one = (default or [None])[0] if isinstance(default, tuple) else default
    options = {"choices": choices, "metavar": "VARIANT" if key == "variant" else None}
    if isinstance(one, bool) or key in ("small", "eval_first"):
        options = {"action": argparse.BooleanOptionalAction}
    elif isinstance(one, (int, float)) or key in ("chunk", "workers"):
        kind = int if one is None else type(one)
        least, most = LEAST.get(key, 0), MOST.get(key, 2 ** 31)

        def number(text):
            value = kind(text)
            if not least <= value <= most or value == 0 and key in ABOVE_ZERO:
                raise ValueError
            return value
        number.__name__ = f"{kind.__name__} of {least} to {most}"
        if key in ABOVE_ZERO:
            number.__name__ = f"{kind.__name__} above {least}, to {most}"
        options["type"] = number
    if key in PATHS:
        options["type"] = os.path.expanduser
    if isinstance(default, tuple):
        options["nargs"] = "*"
    if key == "resume":
        options.update(nargs="?", const="auto")
    return group.add_argument(typed(key, ()), help=meaning.replace("%", "%%"), **options)


def flag_kinds(recipe, rows):
    """What argparse knows of each flag, {name: its action}."""
    parser = Parser()
    kinds = {"variant": add_flag(parser, "variant", None, "", rows)}
    for key, (default, *_) in recipe.items():
        kinds[key] = add_flag(parser, key, default, "", *recipe[key][3:])
    for key, (default, _, *choices) in FLAGS.items():
        kinds[key] = add_flag(parser, key, default, "", *choices)
    return kinds


def is_taken(flag, value):
    """Whether a value is one that this flag, an action of argparse, gives for some text."""
    if isinstance(flag, argparse.BooleanOptionalAction):
        return isinstance(value, bool)
    values = [value]
    if flag.nargs == "*":
        if not isinstance(value, (tuple, list)):
            return False
        values = value
    kind = flag.type or str
    for one in values:
        try:
            if type(one) is not type(kind(str(one))) or kind(str(one)) != one:
                return False
            os.fsencode(str(one))
        except ValueError:  # no number within its limits, or no text that a file name can have
            return False
        if one == "" or "\0" in str(one):
            return False
        if flag.choices is not None and one not in flag.choices:
            return False
    return True


# What only a training takes from a recipe: a test or a picture has no use for it. Losses are named
# here as the recipes name them.
OF_A_TRAINING = {"epoch", "erase", "epochs", "lr", "lr_step", "momentum", "weight_decay", "margin",
                 "lambda1", "temperature", "loss", "divergence", "stages"}
NEEDS = {  # flag: what a command must do so that the flag has an effect in it, see below
    **dict.fromkeys(("beside", "figure_tracklets", "figure_format"), "draws"),
    **dict.fromkeys((*sorted(OF_A_TRAINING), "chunk", "eval_every", "checkpoint_every",
                     "eval_first", "tensorboard"), "trains"),
    **dict.fromkeys(("evaluate", "export", "compile"), "trains or tests"),
    **dict.fromkeys(("init", "weights"), "starts"),
    "seed": "draws numbers",
    "resume": "goes on",
}


def refuse_without_effect(chosen, evaluate, saved, resumed):
    """UserError for a flag that has no effect in what the command does. A flag that repeats what
    the checkpoint says, or that says what it does not, is not refused.

    chosen: the flags that the user has given; evaluate: whether nothing is trained; saved: the
    settings in the checkpoint of --resume; resumed: whether there is one.
    """
    draws = chosen.get("figure") is not None
    named = chosen.get("resume") not in (None, "auto")  # not what the same command has begun
    only = "--figure" if draws else "--evaluate" if "evaluate" in chosen else "--export"
    holds = {  # what is needed: (whether it is there, what the line says otherwise)
        "draws": (draws, "has no effect without --figure"),
        "trains": (not evaluate, f"is for a training, and with {only} nothing is trained"),
        "trains or tests": (not draws, "has no effect with --figure, which only draws"),
        "starts": (not resumed or not evaluate and not named,
                   "has no effect with --resume, because the network is that of the checkpoint"),
        "draws numbers": (not resumed or not evaluate,
                          f"has no effect with {only} and --resume: nothing is random there"),
        "goes on": (not named or chosen.get("split") != "all",
                    "a file has no effect with --split all, where every split has one of its own"),
    }
    for key, needed in NEEDS.items():
        if key not in chosen or chosen[key] is False or key in saved and saved[key] == chosen[key]:
            continue
        there, says = holds[needed]
        fills_in = resumed and key in OF_A_TRAINING and key not in saved
        if not there and not fills_in:
            raise UserError(f"{typed(key, ())}: {says}")


def describe(rows):
    """The rows of a script for --help: what they are, their figures as printed, what they set."""
    for name, row in rows.items():
        figures = [f"{data} {mAP or '-'} / {first}" for data, (mAP, first) in row.figures.items()]
        figures += [f"{figure} {COSTS[cost]}" for cost, figure in row.costs.items()]
        sets = [typed(*setting) for setting in row.settings.items()]
        says = [f"{name}  {row.about}", ", ".join(figures) or "no figure", " ".join(sets)]
        if row.same:
            says = [f"{says[0]} (the same as {row.same})"]
        for n, line in enumerate(says):
            yield textwrap.fill(line, 79, initial_indent="      " if n else "  ",
                                subsequent_indent="      ", break_on_hyphens=False)


def parse_args(recipe, rows, text, script, release=None):
    """A script's command line; what is left out comes from --resume, the row, the recipe."""
    first, script = next(iter(rows)), Path(script)
    parser = Parser(
        description=textwrap.fill(text.split("\n")[0], 79), usage="%(prog)s [--flag value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        epilog="variants: their place in the paper, mAP / rank-1 as printed, what they set:\n"
               + "\n".join(describe(rows)))
    group = parser.add_argument_group("recipe", "(the paper's value; that of the small run)")
    for key, (paper, small, meaning, *choices) in recipe.items():
        values = [" ".join(map(str, v)) if isinstance(v, tuple) else f"{v}" for v in (paper, small)]
        values = values[0] + f"; small run {values[1]}" * (small != paper)
        add_flag(group, key, paper, f"{meaning} ({values})", *choices)
    group = parser.add_argument_group("run")
    add_flag(group, "variant", None, "row of the paper's tables, see below (the first)", rows)
    for key, (default, meaning, *choices) in FLAGS.items():
        known = default is not None and default is not False
        add_flag(group, key, default, meaning + f" ({default})" * known, *choices)
    chosen = {key: tuple(value) if isinstance(value, list) else value
              for key, value in vars(parser.parse_args()).items()}
    for key, value in chosen.items():
        if value == "" or isinstance(value, tuple) and "" in value:
            raise UserError(f"{typed(key, ())}: no such file or name: the value is empty")
    if chosen.get("complexity") and len(chosen) > 1:
        other = next(key for key in chosen if key != "complexity")
        raise UserError(f"{typed(other, ())}: has no effect with --complexity, which prints one "
                        "table of all rows")
    default = {key: value for key, (value, *_) in FLAGS.items()}
    run = argparse.Namespace(**{**default, **chosen})
    evaluate = chosen.get("evaluate", run.export is not None) or run.figure is not None
    needed = {}
    # a run that goes on does not read --init's file again: it may be gone
    if run.init and release and (run.resume is None or os.path.exists(run.init)):
        needed = release_settings(run.init, release, chosen)
    data, resume = run.data, run.resume
    variant = needed.get("variant", chosen.get("variant", first))
    folder = f"runs/{script.stem}-{data}" + f"-{variant}" * (variant != first)
    if data in SPLIT_SETS and run.split != "all":
        folder += f"/split-{run.split}"
    output, checkpoint, saved = run.output or folder, None, {}
    if resume == "auto":
        last = f"{output}/last.pt"
        resume = last if evaluate or os.path.exists(last) else None
    elif resume and os.path.isdir(resume):
        resume += "/last.pt"
    if resume is not None and run.split != "all":
        but = EVALUATED if evaluate else GOING_ON | {"init", "weights", "amp", "rerank"}
        checkpoint = load_checkpoint(resume, script.name, rows, chosen, but, not evaluate, release,
                                     recipe=recipe, given=chosen)
        saved = checkpoint["args"]
        output = run.output or str(Path(resume).parent)
        data, variant = chosen.get("data", saved["data"]), saved["variant"]
        if data == "synthetic" and "root" not in chosen and saved["root"] != default["root"]:
            # a folder that a file names is not made
            load_dataset(data, saved["root"], training=False, images=False)
    refuse_without_effect(chosen, evaluate, saved, checkpoint is not None)
    if "split" in chosen and data not in SPLIT_SETS:
        raise UserError(f"--split: {data} has no splits, {' and '.join(SPLIT_SETS)} have")
    if run.split == "all" and evaluate:
        raise UserError("--split all: is for training, not for --evaluate, --export, --figure")
    small = chosen.get("small", saved.get("small", saved.get("data", data) == "synthetic"))
    row = vars(settings(recipe, rows, variant, small))
    if chosen.get("release") and not saved:
        given = changed(rows, variant, small)
        row.update({k: v for k, v in release.settings.items() if k not in given})
    row.update({key: value for key, value in needed.items() if key in recipe})
    if run.init:
        row["weights"] = "none"
    return argparse.Namespace(**{
        **default, "chunk": CHUNK.get(f"{script.stem} {data}", CHUNK.get(data, 0)), "small": small,
        "eval_first": data == "synthetic", **row, **saved, **chosen, "resume": resume,
        "evaluate": evaluate, "output": output, "chosen": [*chosen], "script": script.name,
        "checkpoint": checkpoint, "released": release, "recipe": recipe,
        "printed": row_of(rows, variant).figures.get(data)})


def release_settings(path, release, chosen):
    """The settings that --init needs for a file of the authors' release, of any other file none;
    UserError when the user has chosen others."""
    file = read_checkpoint(path, "", release)
    needed = file["args"] if file.get("release") else {}
    for key in sorted((chosen.keys() & needed.keys()) - {"data", "root", "small"}):
        if chosen[key] != needed[key]:
            raise UserError(f"--init {path}: is a network of {typed(key, needed[key])}, not "
                            f"{typed(key, chosen[key])}")
    return needed


def part_of(args, rows, folder, variant=None, **changes):
    """The arguments of a part of a run, in a folder of its own, where it goes on: with what the row
    `variant` sets (but a schedule that the user chose) and `changes`."""
    part = argparse.Namespace(**{**vars(args), "output": f"{args.output}/{folder}", "resume": None})
    if variant:
        row = changed(rows, variant, args.small)
        vars(part).update({k: v for k, v in row.items() if k not in {*SCHEDULE} & {*args.chosen}})
        part.variant, part.printed = variant, row_of(rows, variant).figures.get(args.data)
    vars(part).update(changes, export=args.export and f"{args.export}/{folder}")
    last = f"{part.output}/last.pt"
    if os.path.exists(last):
        part.checkpoint = load_checkpoint(last, args.script, rows, vars(part), GOING_ON,
                                          recipe=args.recipe, given=args.chosen)
        part.resume, epochs = last, len(part.checkpoint["history"])
        if epochs > part.epochs:
            raise UserError(f"{last}: has {epochs} epochs, --epochs says {part.epochs}")
    return part


def run_script(train, build, *, recipe, rows, release, text, script):
    """What a command line asks for, of the parts of a script."""
    args = parse_args(recipe, rows, text, script, release)
    if args.complexity:
        complexity_table(rows, recipe, build)
        return
    without_memory(build, args, 2)  # refuses settings that do not go together, before data are read
    if args.split == "all" and not args.plan:
        all_splits(train, args, rows)
    else:
        train(args)


def all_splits(train, args, rows):
    """--split all: train(arguments) of the splits in turn, but for finished ones, and the mean,
    beside the paper's figures of the row."""
    results = []
    for split in map(str, range(10)):
        one = part_of(args, rows, f"split-{split}", split=split)
        history = one.checkpoint["history"] if one.checkpoint else []
        done = len(history) == args.epochs and history[-1]["mAP"] != ""
        results.append(history[-1] if done else train(one))
        print(f"split {split}: mAP {results[-1]['mAP']:.1f}   CMC-1 {results[-1]['rank-1']:.1f}"
              f"   of {args.variant}" + " (finished before)" * done, flush=True)
    values = np.array([[result[key] for key in ("mAP", "rank-1")] for result in results])
    (mean_ap, first), (d_map, d_first) = values.mean(0), values.std(0, ddof=1)
    print(f"10 splits: mAP {mean_ap:.1f} +- {d_map:.1f}   rank-1 {first:.1f} +- {d_first:.1f}"
          f"   of {args.variant}; {in_the_paper(args.printed)}")


def without_memory(build, args, num_classes):
    """A script's network for these settings without memory for its weights, and without those of
    files; UserError when the settings do not go together."""
    changes = {"weights": "none", "init_2d": None, "join": (), "evaluate": False}
    try:
        with torch.device("meta"):
            return build(argparse.Namespace(**{**vars(args), **changes}), num_classes)
    except ValueError as error:
        raise UserError(f"{error}; see --frames, --height, --width and the recipe") from None


def plan(args, *, recipe, sampler, split, metric, build, loss_weights):
    """--plan: prints what the command would train and test, without training and without images.

    sampler, split, metric, build, loss_weights: those of the script.
    """
    splits = args.split == "all"
    dataset = load_dataset(args.data, args.root, 0 if splits else int(args.split), args.chunk,
                           training=not args.evaluate and args.data != "synthetic",  # draws none
                           images=False)
    model = without_memory(build, args, dataset.num_identities or 1)
    parameters, macs = complexity(model, args.frames, args.height, args.width)
    print(f"{Path(args.script).stem} {args.variant} on {args.data}: {parameters:,} parameters, "
          f"{macs / 1e9:.3f} GFLOPs (multiply-adds) a clip of {args.frames} frames of "
          f"{args.height}x{args.width}")
    print(dataset.summary())
    if args.evaluate:
        print("no training: only a test")
    else:
        batch = args.ids * args.clips
        steps = len(make_sampler(sampler, [t.pid for t in dataset.train], args))
        shown = f", all {args.epoch}" if "epoch" in args else ", all tracklets once"
        print(f"an epoch: {steps:,} steps of {batch} clips{shown}: {steps * batch:,} clips, "
              f"{steps * batch * args.frames:,} frames")
        print(f"in all: {args.epochs:,} epochs, {steps * args.epochs:,} steps"
              + (" for each of ten splits" if splits else ""))
        print("learning rate:")
        for first in range(1, args.epochs + 1, args.lr_step):
            last = min(first + args.lr_step - 1, args.epochs)
            rate = args.lr * 0.1 ** ((first - 1) // args.lr_step)
            print(f"  epochs {first} to {last}: {rate:.3g}")
        weights = loss_weights(args)
        print("loss: " + " + ".join(f"{weight:g} x {name}" for name, weight in weights.items()
                                    if weight))
    tracklets = {t.frames[0]: t for t in dataset.query + dataset.gallery}.values()
    parts = networks_of_test(model, args.frames)
    clips = [split(len(t.frames), frames) for _, frames in parts for t in tracklets]
    when = "" if args.evaluate else f" after epoch {args.epochs}"
    if args.eval_every and not args.evaluate:
        when += f" and every {args.eval_every} epochs"
    print(f"test{when}: {len(dataset.query):,} queries in {len(dataset.gallery):,} gallery "
          f"tracklets, {metric} distance; reads {len(tracklets):,} tracklets in "
          f"{sum(map(len, clips)):,} clips of {sum(clip.size for clip in clips):,} frames")
    print(in_the_paper(args.printed))
    print("recipe:")
    for key, (_, _, meaning, *_) in recipe.items():
        value = getattr(args, key)
        if value in (None, (), []):
            value = "(none)"
        print(f"  {typed(key, value):32} {meaning}")


# ----------------------------------------------------------------------------------- a training run

class Run:
    """What a training run needs beside the paper. args: of `parse_args`; `history`: the log's rows;
    `steps`, `totals`: those of the present epoch, and its losses' sums."""

    def __init__(self, args):
        self.printed = vars(args).pop("printed", None)
        self.checkpoint = vars(args).pop("checkpoint", None)
        self.release = vars(args).pop("released", None)
        vars(args).pop("recipe", None)
        self.args, self.device = args, pick_device(args.gpu)
        self.cuda = self.device.type == "cuda"
        if args.amp and self.cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
            print("--amp: this GPU has no bfloat16, it is emulated and slow", flush=True)
        if args.workers is None:
            args.workers = min(8, (os.cpu_count() or 1) // world_size()) if self.cuda else 0
        torch.manual_seed(args.seed)
        torch.backends.cudnn.benchmark = True  # sizes are fixed
        self.size, self.batch = (args.height, args.width), args.ids * args.clips
        self.extraction = dict(batch_size=self.batch, workers=args.workers, amp=args.amp)
        self.last, self.log_file = Path(args.output) / "last.pt", Path(args.output) / "log.csv"
        self.history = self.checkpoint["history"] if self.checkpoint else []
        self.origin = "untrained"  # of the network that `prepare` is given, in words
        self.steps, self.totals, self.states = 0, {}, {}
        self.board, self.shown = None, 0  # TensorBoard's writer, rows that it has
        self.can_be_tested = True  # whether any query has a match

    @contextlib.contextmanager
    def setting_up(self):
        """The first process of each machine runs the block before the others: it may download."""
        weights, hub = self.args.weights, Path(torch.hub.get_dir(), "checkpoints")
        file = hub / IMAGENET if weights == "imagenet" else Path(weights)
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        if world_size() > 1 and not first:
            dist.barrier()
        if not self.args.resume and weights == "imagenet" and file.exists():
            load_file(file)  # for its checksums
        elif not self.args.resume and weights not in ("imagenet", "none"):
            self.args.weights = backbone_weights(file)  # which `resnet50` takes, too
        try:
            with contextlib.redirect_stderr(sys.stdout):  # torch.hub reports the download there
                yield
        except ValueError as error:
            raise UserError(f"{error}; see --frames, --height, --width and the recipe") from None
        except (OSError, RuntimeError) as error:
            # those of torch.hub: no connection, no room, another checksum
            of_the_file = isinstance(error, OSError) or "hash" in str(error)
            if self.args.resume or weights != "imagenet" or not of_the_file:
                raise
            raise UserError(f"--weights {weights}: torchvision's ResNet-50 cannot be had "
                            f"({first_line(error)}): put {IMAGENET} into {hub}, name it, or use "
                            "--weights none (a run's checkpoint goes to --resume)") from None
        finally:
            self.args.weights = weights
        if world_size() > 1 and first:
            dist.barrier()

    def num_classes(self, dataset):
        """Identities of the classifier: the data set's, or in an evaluation the checkpoint's."""
        self.can_be_tested = dataset.has_a_match()
        here = dataset.num_identities or 1  # an evaluation may do without a training part
        self.num_identities = saved = self.checkpoint["num_classes"] if self.checkpoint else here
        if not self.args.evaluate and saved != here:
            raise UserError(f"{self.args.resume}: was trained on {saved} identities, "
                            f"{self.args.data} has {here}")
        return saved

    def prepare(self, model):
        """The network on the device, with the weights of --resume, and compiled with --compile."""
        args = self.args
        parameters, macs = complexity(model, args.frames, *self.size)
        print(f"{args.variant}: {parameters:,} parameters, {macs / 1e9:.3f} GFLOPs (multiply-adds) "
              f"a clip of {args.frames} frames of {args.height}x{args.width}")
        if world_size() > 1 and self.cuda:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for layer in model.to(self.device).modules():
            if isinstance(layer, torch.nn.Conv2d):  # 5-dimensional weights cannot be
                layer.to(memory_format=torch.channels_last)
        if self.checkpoint:
            restore(args.resume, self.checkpoint, model=model)
            self.origin = trained_for(self.checkpoint)
        elif args.init:
            start_from(args.init, model, self.release, args)
            self.origin = f"from {printable(args.init)}"
        else:
            self.origin = printable(getattr(model, "origin", self.origin))
        if args.evaluate and not args.resume and self.origin.startswith("untrained"):
            self.name_trained_networks()
        if args.compile and not args.figure:
            try:  # a small function shows whether it works
                torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=self.device))
                model.compile()
            except Exception as error:  # of many kinds
                print(f"--compile: goes on without ({first_line(error)})", flush=True)
        return model

    def name_trained_networks(self):
        """Says that an untrained network is shown, and which trained ones lie where a run of these
        settings writes: they may be what was meant."""
        folder = Path(self.args.output)
        print(f"{self.args.variant} is shown untrained, because there is no --resume", flush=True)
        for last in sorted([*folder.glob("last.pt"), *folder.glob("*/last.pt")]):
            name = printable(last)
            print(f"  {name} holds a trained network: --resume {name} shows it", flush=True)

    def loader(self, tracklets, sampler, sample):
        """Batches of training clips and their identities; see PKSampler, TrainClips."""
        args, pids = self.args, [t.pid for t in tracklets]
        sampler = make_sampler(sampler, pids, args)
        print(f"an epoch has {len(sampler):,} steps of {self.batch} clips, {args.epochs:,} epochs "
              f"have {args.epochs * len(sampler):,}", flush=True)
        return torch.utils.data.DataLoader(
            TrainClips(tracklets, sample, args.frames, self.size, erase=args.erase),
            batch_sampler=sampler,
            num_workers=args.workers, persistent_workers=args.workers > 0,
            worker_init_fn=ignore_terminal_signals, pin_memory=self.cuda, generator=torch.Generator())

    def start(self, **states):
        """Begins to train, or goes on; states: of a checkpoint. Returns this process' network."""
        args = self.args
        going_on = self.checkpoint and Path(args.resume).resolve() == self.last.resolve()
        if not going_on and (self.last.exists() or self.log_file.exists()):
            raise UserError(f"{args.output} holds a run already: go on with --resume {self.last}, "
                            "or name another --output")
        self.states = states = {**states, "random": RandomStates()}
        if self.checkpoint:
            restore(args.resume, self.checkpoint, **states)
            self.steps, self.totals = self.checkpoint["progress"]
            step = f", step {self.steps} of the next," * bool(self.steps)
            print(f"going on after epoch {len(self.history)}{step} of {printable(args.resume)}")
            if self.history:  # by an earlier process; otherwise torch warns of a schedule that
                states["optimizer"]._opt_called = True  # goes on before the optimiser does
        if args.clips == 1 and "margin" in vars(args) and vars(args).get("loss") != "xent":
            zero = "the triplet loss is"
            if vars(args).get("lambda2"):
                zero = "the triplet loss and L_mi are"
            print(f"--clips 1: {zero} 0, because no batch has two clips of an identity, which it "
                  "takes to compare them", flush=True)
        catch_signals()
        if process_rank() == 0:
            self.file = locked(self.last.with_name("args.json"), json.dumps(vars(args), indent=2))
            if self.checkpoint:  # a kill may have left an older log
                save_rows(self.history, self.log_file)
            if args.tensorboard:
                try:
                    from torch.utils.tensorboard import SummaryWriter
                    self.board = SummaryWriter(args.output, purge_step=0)  # the log is written anew
                except ImportError as error:
                    print(f"--tensorboard: goes on without ({first_line(error)})", flush=True)
                self.show()
        self.evaluates_first = args.eval_first and not self.checkpoint and self.can_be_tested
        self.checkpoint = None  # its memory
        model = states["model"]
        return model if world_size() == 1 else torch.nn.parallel.DistributedDataParallel(model)

    def epochs(self):
        """The epochs to train; the last complete one again, for what comes behind its batches."""
        return range(max(1, len(self.history) + bool(self.steps)), self.args.epochs + 1)

    def batches(self, loader, epoch):
        """The batches of an epoch, from the step that was reached; a signal ends the run."""
        if epoch <= len(self.history):
            return
        sampler, start, first = loader.batch_sampler, time.time(), self.steps
        if not 0 <= self.steps < len(sampler):
            raise UserError(f"{self.args.resume}: this training set has no step {self.steps}")
        sampler.set_epoch(epoch, self.steps)
        with progress(what=f"epoch {epoch}/{self.args.epochs}", total=len(loader) * self.batch,
                      unit=" clips", hidden=process_rank() > 0, leave=False,
                      bar_format="{desc} |{bar}| {remaining} left, {rate_noinv_fmt}{postfix}"
                      ) as bar:
            for batch in loader:
                yield [part.to(self.device, non_blocking=True) for part in batch]
                bar.update(self.batch)
                if not self.cuda or self.steps % 10 == 0 or world_size() == 1 and _asked:
                    bar.set_postfix(loss=self.means()["loss"])  # which waits for a GPU
                    if stop_asked():  # as this does, with several processes
                        break
        sampler.set_epoch(epoch)
        line = None
        if self.steps == len(sampler):
            row = {"lr": self.states["optimizer"].param_groups[0]["lr"], **self.means()}
            speed = (self.steps - first) * self.batch / (time.time() - start)
            says = "  ".join(f"{k} {v:.3g}" for k, v in row.items())
            line = (f"epoch {epoch}/{self.args.epochs}: {says}  ({time.time() - start:.0f} s, "
                    f"{speed:.3g} clips/s)")
            row = {"epoch": epoch, **row, "mAP": "", "rank-1": ""}
            if self.history and [*row] != [*self.history[0]]:
                raise UserError(f"{self.args.resume}: its log has other columns than this training"
                                f": {', '.join(self.history[0])}, not {', '.join(row)}")
            self.history.append(row)
            self.steps, self.totals = 0, {}
        asked = stop_asked()
        kept = (asked or epoch == self.args.epochs or self.test_is_due(epoch)
                or epoch % self.args.checkpoint_every == 0)
        if kept:
            self.save()
        elif line:
            line += f", not in {self.last.name} yet"
        if line:  # the epoch is done when it is kept
            print(line, flush=True)
        if asked := asked or stop_asked():
            raise Stop(asked)

    def backward(self, loss):
        """Gradients of the whole batch's loss; DistributedDataParallel takes their mean."""
        (loss * world_size()).backward()

    def log(self, parts):
        """Counts a step and adds up the parts of its loss, on the device: nothing waits for it."""
        self.steps += 1
        parts = {name: part.detach().double() for name, part in parts.items()}
        for name, value in {"loss": sum(parts.values()), **parts}.items():
            self.totals[name] = self.totals.get(name, 0.0) + value

    def means(self):
        """Reads the sums of the present epoch's losses; UserError when the loss is not finite."""
        self.totals = {name: float(total) for name, total in self.totals.items()}
        means = {name: total / self.steps for name, total in self.totals.items()}
        if not math.isfinite(means["loss"]):
            says = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
            raise UserError(f"epoch {len(self.history) + 1}, step {self.steps}: the loss is not "
                            f"finite ({says}); last.pt, if any, is good; try a smaller --lr")
        return means

    def save(self):
        """Writes last.pt and log.csv; refuses weights that are not finite."""
        if not all(p.isfinite().all() for p in self.states["model"].parameters()):
            raise UserError(f"epoch {len(self.history) + bool(self.steps)}: the weights are not "
                            "finite; last.pt, if any, is good; try a smaller --lr")
        if process_rank() == 0:
            states = {name: target.state_dict() for name, target in self.states.items()}
            with writing():
                with replacing(self.last) as file:
                    torch.save({"script": self.args.script, "args": vars(self.args),
                                "num_classes": self.num_identities, "history": self.history,
                                "progress": (self.steps, self.totals), **states}, file)
                save_rows(self.history, self.log_file)
                self.show()

    def show(self):
        """Adds the log's new rows to TensorBoard's file; the last one again, with its test."""
        for row in self.history[self.shown:] if self.board else ():
            for key in row.keys() - {"epoch"}:
                if row[key] != "":
                    self.board.add_scalar(key, row[key], row["epoch"])
            self.board.flush()
            self.shown = row["epoch"] - 1

    def test_is_due(self, epoch):
        """After the last epoch and every --eval-every epochs, when it was not tested before."""
        every = self.args.eval_every
        due = epoch == self.args.epochs or every and epoch % every == 0
        if not self.can_be_tested:  # then there is only something to export
            due = epoch == self.args.epochs and self.args.export
        return due and self.history[-1]["mAP"] == ""

    def test(self, model, dataset, split, metric):
        """`evaluate` of the test part; the result of an epoch goes into its row of the log."""
        if self.states and self.history:  # of a training
            self.origin = f"after epoch {len(self.history)}"
        label = f"{self.args.variant}, {self.origin}"
        last = self.args.evaluate or len(self.history) == self.args.epochs
        if not self.can_be_tested and not self.args.export:
            if "evaluate" in self.args.chosen:
                raise UserError(f"{self.args.data} in {self.args.root}: {NO_MATCH}; --export "
                                "writes the features nevertheless")
            return {}  # the last part of a training, which goes without its test
        result = evaluate(model, dataset, split_clips=split, clip_length=self.args.frames,
                          size=self.size, metric=metric, use_rerank=self.args.rerank, label=label,
                          export_folder=self.args.export if last else None, **self.extraction)
        if result and self.states and self.history:
            self.history[-1].update({key: result[key] for key in ("mAP", "rank-1")})
            self.save()
            if asked := stop_asked():
                raise Stop(asked)
        elif result and self.args.evaluate and not self.origin.startswith("untrained"):
            self.beside_the_paper(result)
        return result

    def beside_the_paper(self, result):
        """Prints the result of a trained network beside the paper's figures of its row."""
        print(f"{self.args.variant} on {self.args.data}, {self.origin}: mAP {result['mAP']:.1f}, "
              f"rank-1 {result['rank-1']:.1f}; {in_the_paper(self.printed)}", flush=True)

    def finish(self):
        """Prints the last epoch's result beside the paper's figures of the row, and returns it."""
        result = self.history[-1]
        if result["mAP"] != "":
            self.origin = f"after epoch {len(self.history)}"
            self.beside_the_paper(result)
        return result


def make_sampler(sampler, pids, args):
    """A script's sampler for these labels of training tracklets, with the settings in args."""
    options = {"shows": args.epoch} if "epoch" in args else {}
    return sampler(pids, args.ids, args.clips, seed=args.seed, rank=process_rank(), world=world_size(),
                   **options)


def trained_for(checkpoint):
    """For how long the network of a checkpoint was trained, in words."""
    if checkpoint.get("release"):
        return "the authors' release"
    epochs, (steps, _) = len(checkpoint["history"]), checkpoint.get("progress", (0, {}))
    if steps:
        return f"after {steps} steps of epoch {epochs + 1}"
    return f"after epoch {epochs}" if epochs else "untrained"


def in_the_paper(printed):
    """What a paper prints for a row, (mAP, rank-1) or None, in words."""
    printed = zip(("mAP", "rank-1"), printed or ())
    figures = ", ".join(f"{name} {value}" for name, value in printed if value is not None)
    return f"as printed in the paper: {figures}" if figures else "the paper prints no figure"


class RandomStates:
    """torch's random generators, of the GPUs that are there, too."""

    def state_dict(self):
        return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]

    def load_state_dict(self, states):
        torch.set_rng_state(states[0])
        torch.cuda.set_rng_state_all(states[1:][:torch.cuda.device_count()])


# -------------------------------------------------------------------------------------- checkpoints

class Release:
    """Trained weights that the authors of a paper offer for download, and what they need.

    Args:
        read: a function of a state_dict -> (the row of the script that it is, the settings of the
            recipe that its shapes give, the state_dict in the script's names), or None where the
            state_dict is not of the authors' release.
        settings: what --release sets in the recipe, beside the form of the modules.
    """

    def __init__(self, read, **settings):
        self.read = read
        self.settings = settings

    def checkpoint(self, file, script):
        """The contents of a file as a checkpoint of this script, or None where it is none of the
        authors' release."""
        state = state_dict_in(file)
        found = None
        if all(map(torch.is_tensor, state.values())):
            found = without_prefix(state, lambda part: self.read(part) is not None)
        if found is None:
            return None
        variant, shaped, model = self.read(found)
        args = {"data": "mars", "root": FLAGS["root"][0], "variant": variant, "small": False,
                **self.settings, **shaped, "release": True}
        return {"script": script, "args": args, "num_classes": len(model["classifier.weight"]),
                "history": [], "model": model, "release": True}


# the dictionaries in which training programs wrap a state_dict
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "module",
            "backbone", "weights", "params")


def state_dict_in(file):
    """The state_dict in what a file holds: the usual dictionaries around it are opened."""
    for _ in range(9):  # anything can be in a file, a dictionary that holds itself, too
        wrapped = [file[name] for name in WRAPPERS if isinstance(file.get(name), dict)]
        if wrapped:
            file = wrapped[0]
    return file


def without_prefix(state, fits):
    """The part of a state_dict for which the function `fits` is true, or None: all of it, or what
    has a prefix in common, such as "module." or "backbone.", without the prefix."""
    parts = [state]
    while parts:
        for part in parts:
            if fits(part):
                return part
        shorter = []
        for part in parts:
            inner = {}
            for name, value in part.items():
                first, dot, rest = str(name).partition(".")
                if dot:
                    inner.setdefault(first, {})[rest] = value
            shorter += inner.values()
        parts = shorter
    return None


def difference(state, own):
    """In words, how a state_dict differs from the network's own: the first name that only one of
    them has, or the first shape."""
    says = []
    for name in [name for name in state if name not in own][:1]:
        says.append(f"it has {name!r}, which the network has not")
    for name in [name for name in own if name not in state][:1]:
        says.append(f"it lacks {name!r}")
    if not says:
        for name, value in own.items():
            theirs, ours = getattr(state[name], "shape", None), value.shape
            if theirs != ours:
                has = "no shape" if theirs is None else f"the shape {list(theirs)}"
                return f"its {name!r} has {has}, that of the network {list(ours)}"
    return ", and ".join(says)


def backbone_weights(path):
    """The state_dict in a file of --weights, in the names of torchvision's ResNet-50, without its
    classifier; prints what else is in the file. UserError when it does not fit."""
    with torch.device("meta"):
        net = torchvision.models.resnet50()
    own = {name: value for name, value in net.state_dict().items() if not name.startswith("fc.")}
    layers = {name.partition(".")[0] for name in own}
    needed = {name for name in own if not name.endswith("num_batches_tracked")}  # old files: none
    everything = state_dict_in(load_file(path))
    state = (without_prefix(everything, lambda part: needed <= part.keys())
             or without_prefix(everything, lambda part: "conv1.weight" in part) or everything)
    theirs, others = {}, []
    for name, value in state.items():
        first = str(name).partition(".")[0]
        if first in layers:
            theirs[name] = value
        elif first != "fc":
            others.append(first)
    wrong = difference(theirs, {name: own[name] for name in own if name in needed | theirs.keys()})
    if wrong:
        raise UserError(f"--weights {path}: does not fit torchvision's ResNet-50: {wrong} (the "
                        f"first entry of the file is {next(iter(everything), None)!r})")
    prefix = next(str(name).removesuffix("conv1.weight") for name, value in everything.items()
                  if value is state["conv1.weight"])
    names = map(str, everything)
    others += [name.partition(".")[0] for name in names if not name.startswith(prefix)]
    if others:
        parts = textwrap.shorten(", ".join(dict.fromkeys(others)), 160)
        print(f"--weights {path}: not taken from it: {parts}")
    return theirs


def read_checkpoint(path, script, release):
    """The contents of a file that a run of ours, or where there is one the authors' release, has
    written, as a checkpoint of ours."""
    file = load_file(path)
    file.pop("release", None)  # a run does not write it: it marks what was read below
    try:
        return (release and release.checkpoint(file, script)) or file
    except Exception:  # anything can be in a file
        raise UserError(f"{path}: has the names of the authors' release, but another form"
                        ) from None


def load_checkpoint(path, script, rows, flags, but, training=True, release=None, *, recipe, given):
    """A checkpoint of `script`, as a run writes it, with these flags, but for those in `but`.

    recipe: that of the script; given: the names of the flags that the user has given, which fill in
    what a file of an earlier version lacks.
    """
    checkpoint = read_checkpoint(path, script, release)
    try:
        model = checkpoint["model"] = state_dict_in({"model": checkpoint["model"]})
        saved, classes = checkpoint["args"], checkpoint["num_classes"]
        history, columns = checkpoint["history"], []
        steps, totals = checkpoint.get("progress", (0, {}))
        values = [value for row in history for value in row.values() if value != ""]
        if history:
            columns = ["epoch", "lr", *[*history[0]][2:-2], "mAP", "rank-1"]
            if "loss" not in columns or not totals.keys() <= {*columns}:
                raise ValueError
        if not (checkpoint["script"] == script and saved["data"] in DATA_SETS
                and saved["variant"] in rows and isinstance(saved["root"], str)
                and [row["epoch"] for row in history] == [*range(1, len(history) + 1)]
                and all([*row] == columns for row in history)
                and all(isinstance(v, (int, float)) for v in [steps, *totals.values(), *values])
                and (not model or classes in [len(w) for w in model.values() if w.dim()])):
            raise ValueError
    except Exception:  # anything can be in a file
        says = f"{path}: not a checkpoint of {script}, as a run writes it"
        if "args" not in checkpoint:
            first = next(iter(state_dict_in(checkpoint)), None)
            says += f" (its first entry is {first!r}); weights without settings go to --init"
        raise UserError(says) from None
    checkpoint["args"] = settings_of(path, checkpoint, recipe, rows, given)
    saved = checkpoint["args"]
    if training and not {"optimizer", "scheduler", "progress", "random"} <= checkpoint.keys():
        raise UserError(f"{path}: holds the network only: it can be evaluated, not trained further "
                        "(--init starts another training from it)")
    for key in sorted(flags.keys() & saved.keys() - but):
        if flags[key] != saved[key]:
            raise UserError(f"{path}: was trained with {typed(key, saved[key])}, not "
                            f"{typed(key, flags[key])}")
    return checkpoint


def settings_of(path, checkpoint, recipe, rows, given):
    """The settings in a checkpoint that a run takes from it, each of which must be a value that its
    flag takes; UserError otherwise, and when one of the recipe is neither in the file nor among the
    flags that are given. The authors' release has few settings: it takes those of the recipe."""
    saved, kinds = checkpoint["args"], flag_kinds(recipe, rows)
    taken = {key: saved[key] for key in kinds if key in saved and key not in HERE}
    for key, value in taken.items():
        absent = value is None and (key == "init" or key in recipe and recipe[key][0] is None)
        if not (absent or is_taken(kinds[key], value)) or (key, value) == ("split", "all"):
            says = textwrap.shorten(repr(value), 60)
            raise UserError(f"{path}: its setting {key} is {says}, which {typed(key, ())} does not "
                            "take")
    missing = [typed(key, ()) for key in recipe if key not in saved and key not in given]
    if missing and not checkpoint.get("release"):
        raise UserError(f"{path}: lacks settings that an earlier version did not have: give them "
                        f"as flags, {' '.join(missing)}, with the values of that run (in Python as "
                        "arguments of load)")
    return taken


def alike(a, b):
    """Whether a has the form of b: the same types and lengths, and the keys of b."""
    if isinstance(b, dict):
        a, b = [a.get(key) for key in b], [*b.values()]
    if isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return isinstance(a, type(b)) or a is None and b is True  # fused, of older checkpoints


def restore(path, checkpoint, **objects):
    """load_state_dict of each object from the checkpoint; UserError when one does not fit."""
    for name, target in objects.items():
        own, state = target.state_dict(), checkpoint[name]
        wrong = ""
        try:
            if isinstance(target, torch.nn.Module):
                state = without_prefix(state, lambda part: part.keys() == own.keys()) or state
                wrong = difference(state, own)
            target.load_state_dict(state)
            shapes = [(value.shape, p.shape) for p, state in getattr(target, "state", {}).items()
                      for value in state.values() if value is not None]
            if not (alike(target.state_dict(), own) and all(a in ((), b) for a, b in shapes)):
                raise ValueError("other types or shapes than a run writes")
        except Exception as error:  # a state of another network raises many kinds
            says = wrong or last_line(error)
            raise UserError(f"{path}: its {name} does not fit ({says})") from None


def start_from(path, model, release=None, args=None):
    """Loads into the network what a file has of its names and shapes, and prints the rest. The file
    is a run's last.pt, one of the authors' release, or holds weights alone. The classifier is taken
    only from a run on the data set and the split of args: elsewhere the identities are others."""
    file = read_checkpoint(path, "", release)
    own = model.state_dict()
    theirs = part_of_network(path, file, "", own)
    wrong = other_identities(file, args)
    same = {name for name, value in theirs.items()
            if name in own and getattr(value, "shape", None) == own[name].shape}
    taken = {name: theirs[name] for name in same
             if not (wrong and name.startswith("classifier."))}
    if not same:
        raise UserError(f"{path}: holds nothing of this network: {difference(theirs, own)}")
    model.load_state_dict(taken, strict=False)
    print(f"starting from {path}")
    for says, names in (("as initialised", own), ("not taken from it", theirs)):
        parts = dict.fromkeys(name.rpartition(".")[0] for name in names if name not in taken)
        if parts:
            print(f"  {says}: {printable(textwrap.shorten(', '.join(parts), 160))}")
    classifier = [name for name in own if name.startswith("classifier.")]
    if classifier and not wrong and not same.issuperset(classifier):
        wrong = "its shape is another one"
    if classifier and wrong:
        print(f"  the classifier is left out, because {printable(wrong)}")
    elif classifier:
        print("  the classifier is kept, because the file was also trained on "
              f"{printable(identities(vars(args)))}")


def other_identities(file, args):
    """Why the classifier in a file is not one of the identities of a run with these args, in words;
    "" when it is."""
    saved = file.get("args")
    if file.get("release"):
        return "the authors' release does not say on which data set it was trained"
    if args is None or not isinstance(saved, dict) or "data" not in saved:
        return "the file does not say on which data set it was trained"
    theirs, ours = identities(saved), identities(vars(args))
    return "" if theirs == ours else f"the file was trained on {theirs}, and this run is on {ours}"


def identities(settings):
    """Whose identities a run has with these settings, in words: those of a data set, of its split
    where it has several, and of a folder where the data set's name alone does not say it."""
    data = settings["data"]
    if data in SPLIT_SETS:
        return f"{data}, split {settings.get('split')}"
    if data in ("folder", "synthetic"):
        return f"{data} in {os.path.abspath(str(settings.get('root')))}"
    return str(data)


def part_of_network(path, checkpoint, prefix, names=()):
    """The weights in a checkpoint whose names start with prefix, without it. names: some that a
    network has, by which a prefix of the whole is known, see `without_prefix`."""
    model = state_dict_in(checkpoint)

    def fits(part):
        if names:
            return not part.keys().isdisjoint(names)
        return any(str(name).startswith(prefix) for name in part)
    part = without_prefix(model, fits) or {}
    state = {k.removeprefix(prefix): part[k] for k in part if str(k).startswith(prefix)}
    if not state:
        says = f"holds no {prefix.rstrip('.') or 'network'} of a run"
        if names and any(map(torch.is_tensor, model.values())):
            says = f"holds nothing of this network: {difference(model, names)}"
        elif model:
            says += f" (its first entry is {next(iter(model))!r})"
        raise UserError(f"{path}: {says}")
    return state


def load_part(path, prefix, module=None):
    """The weights in a run's last.pt whose names start with prefix, loaded into module, if any."""
    state = part_of_network(path, load_file(path), prefix)
    if module:
        restore(path, {"network": state}, network=module)
    return state


def load_network(path, build, given=None, *, recipe, rows, release, script):
    """A script's network of a checkpoint, in eval mode on the CPU; `.args` has its settings. given:
    settings {name: value} that a file of an earlier version lacks."""
    given = given or {}
    if not given.keys() <= recipe.keys():
        raise TypeError(f"load takes settings of the recipe, not {', '.join(given)}")
    checkpoint = load_checkpoint(path, Path(script).name, rows, given, set(),
                                 training=False, release=release, recipe=recipe, given=given)
    saved = {**given, **checkpoint["args"]}
    row = settings(recipe, rows, saved["variant"], saved.get("small", saved["data"] == "synthetic"))
    args = argparse.Namespace(**{**vars(row), **saved, "resume": str(path)})
    try:
        model = build(args, checkpoint["num_classes"])
    except ValueError as error:
        raise UserError(f"{path}: its settings do not go together ({last_line(error)})") from None
    if checkpoint["model"].get("neck.weight", torch.empty(0)).dtype == torch.float64:
        model.double()
    restore(path, checkpoint, model=model)
    model.args, model.origin = args, trained_for(checkpoint)
    return model.eval()


# ------------------------------------------------------------------------- processes, signals, exit
# torchrun starts `world` of them, with a `rank` from 0 each; without it there is one, of rank 0.

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def pick_device(gpu=None):
    """The device of this process, by --gpu; under torchrun the process joins the group, too."""
    count, processes = torch.cuda.device_count(), int(os.environ.get("WORLD_SIZE", 1))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    asked, gpu = gpu, gpu and gpu.lower()
    if gpu and gpu.startswith("cuda"):  # torch's names: cuda is the first one, cuda:1 the second
        gpu = "0" if gpu == "cuda" else gpu.removeprefix("cuda:") or gpu
    there = f"there are GPUs 0 to {count - 1}" if count else "no GPU is there"
    if gpu and gpu != "cpu" and not re.fullmatch("[0-9]+", gpu):
        raise UserError(f"--gpu {asked}: {there}; everything here runs on CUDA or CPU, so that "
                        "--gpu takes the number of a GPU with CUDA, or cpu")
    if processes > 1 and gpu != "cpu" and (gpu or 0 < count < here):
        raise UserError(f"--gpu {asked}: torchrun gives every process its own GPU, here are {here} "
                        f"processes and {count} GPUs: leave --gpu out, or say --gpu cpu")
    gpu = gpu or (os.environ.get("LOCAL_RANK", "0") if count else "cpu")
    if gpu not in ("cpu", *map(str, range(count))):
        raise UserError(f"--gpu {asked or gpu}: {there}")
    device = torch.device("cpu" if gpu == "cpu" else f"cuda:{gpu}")
    cuda = device.type == "cuda"
    if processes > 1 and not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(device)
        # the others wait while the first one downloads or draws; torchrun ends them when one dies
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))
    name = torch.cuda.get_device_name(device) if cuda else f"{count or 'no'} GPU found"
    print(f"device: {device} ({name})" + f", {processes} processes" * (processes > 1))
    return device


def gather(outputs):
    """The outputs of all processes, tensors or lists and dicts of them, joined along the batch.
    Gradients flow into this process' part only, and add up to those of a single process."""
    if world_size() == 1:
        return outputs
    if isinstance(outputs, dict):
        return {name: gather(part) for name, part in outputs.items()}
    if isinstance(outputs, (tuple, list)):
        return [gather(part) for part in outputs]
    parts = [torch.empty_like(outputs, memory_format=torch.contiguous_format)
             for _ in range(world_size())]
    dist.all_gather(parts, outputs.detach().contiguous())
    parts[process_rank()] = outputs
    return torch.cat(parts)


class Stop(Exception):
    """A signal asked for the end of a run; the argument is its number."""


_asked = 0
_writing = False


def catch_signals():
    """From here on signals are only noted, for `stop_asked`, but for a second Ctrl-C, which ends
    the program at once, unless it is `writing`."""
    def note(number, _):
        global _asked
        second = number == _asked == signal.SIGINT
        if second and not _writing and world_size() == 1:  # torchrun may send it twice
            raise KeyboardInterrupt
        _asked = _asked or number
    for number in signal.Signals:  # no SIGHUP on Windows
        hung_up = number.name == "SIGHUP" and signal.getsignal(number) != signal.SIG_IGN  # nohup
        if hung_up or number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, note)


@contextlib.contextmanager
def writing():
    """The block, which takes a second or two, is not cut short by a second Ctrl-C."""
    global _writing
    _writing = True
    try:
        yield
    finally:
        _writing = False


def ignore_terminal_signals(_):
    """worker_init_fn: a signal to the group of a run's processes is not for loaders' workers."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def raise_if_stopped():
    """Raises Stop when a signal asked any of the processes to stop. All of them call it together.
    """
    asked = stop_asked()
    if asked:
        raise Stop(asked)


def stop_asked():
    """The signal that asked any of the processes to stop, or 0; all of them call it together."""
    if world_size() == 1:
        return _asked
    asked = torch.tensor(_asked, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return int(asked)


def tell_torchrun(line):
    """torchrun prints some fifty lines when a process ends with an error. It quotes, as the last
    one, what the first process that failed wrote into the file that it names: here our line."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        told = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": int(time.time())}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": told}))


def command_line(main):
    """Runs a script's main(). What a user can cause ends in one line and an exit code."""
    if os.environ.get("RANK", "0") != "0":  # only the first process prints
        sys.stdout = open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no text
    code, again = 2, "the same command with --resume goes on"
    try:
        main()
        sys.stdout.flush()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except UserError as error:
        message = str(error)
        if any(word.startswith(("--local-rank", "--local_rank")) for word in sys.argv[1:]):
            message = ("python -m torch.distributed.launch adds --local-rank, which this script "
                       "does not take: use torchrun in its place, with the same flags")
    except Stop as stop:
        code = 128 + stop.args[0]
        message = f"stopped by {signal.Signals(*stop.args).name}; {again}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code, message = 141, "ended, because its output is read no more"
    except (RuntimeError, MemoryError) as error:
        # when a loader process was killed the cause tells by what
        says = f"{error} {error.__cause__}".lower()
        if isinstance(error, MemoryError) or "out of memory" in says or "cpuallocator" in says:
            message = "out of memory: use fewer --ids or --clips, smaller frames, or --amp"
        elif "open files" in says or "ancdata" in says:
            code, message = 1, ("the loader processes need more open files than are allowed: use "
                                "fewer --workers, or raise the limit (ulimit -n 4096); "
                                f"{again}, from the last checkpoint")
        elif re.search("bus error|shared memory|file </torch_", says):
            code, message = 1, ("a loader process found no room in the shared memory, through "
                                "which batches come: use fewer --workers, or give it more (docker "
                                f"run --shm-size 8g); {again}, from the last checkpoint")
        elif re.search(r"dataloader worker \(pid.*(killed by signal|exited unexpectedly)", says):
            code, why = 1, "a loader process was killed, out of memory perhaps: use fewer --workers"
            if _asked:  # the signal was sent to every process
                code, why = 128 + _asked, f"stopped by {signal.Signals(_asked).name} in a step"
            message = f"{why}; {again}, from the last checkpoint"
        elif dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in says):
            code, message = 1, f"another process is gone ({first_line(error)})"
        else:
            raise
    process = process_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))
    if code == 2 and os.environ.get("LOCAL_RANK", "0") != "0":
        # A refused setting is refused by all processes. The first one of a machine says it, and
        # torchrun ends the others, which wait for that: if another process ended sooner, torchrun
        # would end the first one before it says anything.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    line = Path(sys.argv[0]).name + (f": process {process}: " if process else ": ") + message
    print(printable(line), file=sys.stderr, flush=True)
    tell_torchrun(printable(line))
    sys.stdout.flush()
    if dist.is_initialized():
        os._exit(code)  # the usual end can wait for processes gone
    sys.exit(code)


# --------------------------------------------------------------------------------------- complexity

def complexity(model, T, height, width, without=()):
    """(learnable parameters, multiply-adds of a clip's convolutions and matrix products, in eval
    mode), counted without computing; without: first names of parts without whose parameters."""
    shadow = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.empty(1, T, 3, height, width, device="meta"))
    counted = (p for name, p in model.named_parameters() if not name.startswith(without))
    return sum(p.numel() for p in counted), counter.get_total_flops() // 2


def complexity_table(rows, recipe, build):
    """Prints the parameters and GFLOPs of every row, in Markdown, beside what the paper prints."""
    print("The parameters are those without neck, classifier and projection. The GFLOPs are\n"
          "multiply-adds of convolutions and matrix products.\n")
    table = [["variant", "clip", "parameters", "GFLOPs a clip", "a frame", "in the paper"]]
    for name in rows:
        args = settings(recipe, rows, name, weights="none")
        with torch.device("meta"):
            model = build(args, num_classes=1)
        parameters, macs = complexity(model, args.frames, args.height, args.width,
                                      without=("neck", "classifier", "projection"))
        printed = [f"{value} {COSTS[cost]}" for cost, value in row_of(rows, name).costs.items()]
        table.append([name, f"{args.frames}x{args.height}x{args.width}", f"{parameters:,}",
                      f"{macs / 1e9:.3f}", f"{macs / 1e9 / args.frames:.3f}", ", ".join(printed)])
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in [table[0], ["-" * width for width in widths], *table[1:]]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


# ----------------------------------------------------------------------------------------- pictures
# A sheet is rows of (label, panels); a panel is a function that draws into a matplotlib Axes. A row
# of a script's picture: its numbers, a list of tensors; some that its range shall have, too; and a
# function (low, high) -> panels.

def watch(model, clips, *modules):
    """Runs the network on clips; of each module a list of its calls, (inputs, output)."""
    calls, training = {module: [] for module in modules}, model.training
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for module in calls:
            hook = module.register_forward_hook(lambda own, *call: calls[own].append(call))
            hooks.enter_context(hook)
        model.eval()(clips)
    model.train(training)
    return [*calls.values()]


def energy(x):
    """Maps (T, C, H, W) -> their root mean square over the channels, divided by its mean over each
    map, so that frames and networks can be compared by where it is high, (T, H, W)."""
    x = x.float().square().mean(1).sqrt()
    return x / x.mean((1, 2), keepdim=True).clamp(min=1e-12)


def photo(image, head="", **look):
    """A panel: an image (3, H, W), uint8; look: of the rectangle around it, as of a Patch."""
    def panel(ax):
        ax.imshow(image.permute(1, 2, 0).cpu().numpy())
        ax.axvspan(*ax.get_xlim(), fill=False, clip_on=False, **look)
        ax.set_title(head, size=9, pad=3)
        ax.set_axis_off()
    return panel


def overlays(frames, maps, heads=None, limits=()):
    """A row: maps (h, w), of any sizes, from blue to red over grey frames (3, H, W), uint8, and the
    scale. A cell lies around its middle in a ResNet, (i H / h, j W / w): the first ones are cut in
    half. One that is NaN is black; a frame without a map, None, is as it was, but hatched."""
    def panels(low, high):
        from matplotlib import cm, colors
        colours, drawn = cm.ScalarMappable(colors.Normalize(low, high), "jet"), []
        for frame, m, head in zip(frames.cpu(), maps, heads or [""] * len(maps)):
            if m is not None:
                y, x = ((torch.arange(size) * n / size).round().long().clamp(max=n - 1)
                        for n, size in zip(m.shape, frame.shape[1:]))
                cells = torch.from_numpy(colours.to_rgba(m.float().cpu().numpy())[..., :3])
                cells = cells.permute(2, 0, 1)[:, y[:, None], x]
                frame = (127 * cells + 0.5 * frame.float().mean(0)).byte()
            drawn.append(photo(frame, head, color="white", hatch="//" * (m is None)))

        def scale(ax):
            ax.set_box_aspect(12)
            ax.figure.colorbar(colours, ax, format="%.3g")
        return [*drawn, scale]
    return [m for m in maps if m is not None], limits, panels


def bars(charts, heads):
    """A row: charts of numbers as bars 1, 2, 3 and so on, on one axis."""
    def panel(ax, k, low, high):
        ax.bar(range(1, len(charts[k]) + 1), charts[k].tolist())
        ax.locator_params("x", integer=True, nbins=4, min_n_ticks=1)
        ax.set(box_aspect=1.2, ylim=(min(low, 0), 1.05 * max(high, 0)))
        ax.set_title(heads[k], size=9, pad=3)
        ax.tick_params(labelright=k == len(charts) - 1)

    def panels(*limits):
        return [lambda ax, k=k: panel(ax, k, *limits) for k in range(len(charts))]
    return charts, (), panels


def compare(pictures):
    """Rows for a sheet from pictures of networks, [(name, title, {label: row})]: those of a label
    beneath each other, with one range of all their numbers. It is at least 5 % of their mean size,
    as less is noise; a row whose own numbers span less than 1 % of it is not drawn, but said."""
    drawn = []
    for label in dict.fromkeys(label for *_, rows in pictures[::-1] for label in rows):
        same = [(name, *rows[label]) for name, _, rows in pictures if label in rows]
        numbers = [torch.cat([m.float().cpu().flatten() for m in row[1]]) for row in same]
        numbers = [x[x.isfinite()] for x in numbers]
        every = torch.cat([*numbers, torch.tensor(same[0][2], dtype=torch.float32)])
        low, high = every.aminmax()
        more = max(0.05 * every.abs().mean() - (high - low), 0) / 2
        for (name, _, _, panels), x in zip(same, numbers):
            says = f"{name}: {label}" if len(pictures) > 1 else label
            if x.max() - x.min() > 0.01 * x.abs().mean():
                drawn.append((says, panels(float(low - more), float(high + more))))
            else:
                drawn.append((f"Not drawn, as it is {x.mean():.3g} everywhere: {says}", []))
    return drawn


def curves(lines, last, under):
    """A panel: lines, {name: {whole number: value}}, from 1 to the last, and what is below."""
    def panel(ax):
        for name, points in lines.items():
            ax.plot(points.keys(), points.values(), "o-", ms=4, label=name)
        ax.locator_params("x", integer=True)
        ax.set(box_aspect=0.5, xlabel=under, xlim=(0.5, last + 0.5))
        ax.legend()
    return panel


def sheet(title, rows, path, height=1.3):
    """Draws rows of (label, panels of this height in inches) below a title, into a file."""
    from matplotlib.figure import Figure
    figure = Figure((1, 1))  # one inch: positions are inches, and the picture grows beyond it
    figure.text(0, 0.2, textwrap.fill(title, 56, break_on_hyphens=False), size="large")
    top = 0.0
    for label, panels in rows:
        x, axes = 1.8, []
        for panel in panels:
            ax = figure.add_axes((x, top - height, 9, height), anchor="W")
            ax.yaxis.tick_right()
            panel(ax)
            axes.append(ax)
            x = ax.get_tightbbox().x1 / figure.dpi + 0.1
        rise = max([ax.get_tightbbox().y1 / figure.dpi - top for ax in axes], default=0)
        for ax in axes:  # their heads stand above them
            ax.set_position(ax.get_position(True).translated(0, -rise))
        text = figure.text(0, top - rise, textwrap.fill(label, 21 if panels else 70), va="top")
        top = min(part.get_tightbbox().y0 for part in (text, *axes)) / figure.dpi - 0.1
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], bbox_inches="tight")
    print(f"wrote {path}", flush=True)


def figures(run, model, dataset, split, metric, picture, load):
    """--figure: of some queries the script's `picture`, and the training's curves; then, with the
    features of the test, the ranked lists and two charts."""
    args, size, history = run.args, run.size, run.history
    q_pids, q_cams, g_pids, g_cams = ids = dataset.ids()
    nowhere = [np.zeros(len(g_pids))] * len(q_pids)
    matched = [i for i, ranks in enumerate(match_ranks(nowhere, *ids)) if len(ranks)]
    if not matched:
        raise UserError(f"{args.data} in {args.root}: there is no ranking to draw, {NO_MATCH}")
    queries = {i: f"query-{i + 1}-person-{q_pids[i]}-camera-{q_cams[i]}" for i in
               matched[::len(matched) // args.figure_tracklets or 1][:args.figure_tracklets]}

    def draw(title, rows, name, height=1.3):
        sheet(title, rows, Path(args.figure, f"{name}.{args.figure_format}"), height)

    models, titles = [(args.variant, model)], [f"{args.variant}, {run.origin}"]
    if args.beside:
        other = load(args.beside).to(run.device)
        own = other.args
        if (own.height, own.width) != size or own.frames not in (1, args.frames):
            raise UserError(f"--beside {args.beside}: is for {own.frames} frames of {own.height}x"
                            f"{own.width}, not for {args.frames} of {args.height}x{args.width}")
        models.insert(0, (own.variant, other))
        titles.insert(0, f"{own.variant}, {other.origin}")
    for i, name in queries.items() if not process_rank() else ():
        query = dataset.query[i]
        clip = split(len(query.frames), args.frames)[0]
        frames = read_clip([query.frames[k] for k in clip], size)
        clips = normalize(frames[None].to(run.device))
        pictures = [(variant, *picture(network, clips, frames)) for variant, network in models]
        panels = [photo(frame, f"frame {n}") for n, frame in enumerate(frames, 1)]
        rows = [(f"person {query.pid}, camera {query.cam}", panels), *compare(pictures)]
        draw(f"{pictures[-1][1]}; {' and '.join(titles)}, on {args.data}", rows, name)
    if len(history) > 1 and not process_rank():
        lines = {key: {row["epoch"]: row[key] for row in history if row[key] != ""}
                 for key in history[0] if key not in ("epoch", "lr")}
        tested = {key: lines.pop(key) for key in ("mAP", "rank-1")}
        charts = (("loss, the sum of its weighted parts", lines),
                  ("mAP and rank-1 in %, where measured", tested))
        rows = [(label, [curves(chart, len(history), "epoch")]) for label, chart in charts
                if any(chart.values())]
        draw(f"Training of {args.variant} on {args.data}", rows, "training", 1.9)

    q, g = tracklet_features(model, dataset, split_clips=split, clip_length=args.frames, size=size,
                             **run.extraction)
    if process_rank():
        return
    d = rerank(q, g, metric) if args.rerank else \
        next(distance_blocks(q, g, metric, len(q)))[1].numpy(force=True)
    state = f"{args.variant} on {args.data}, {run.origin}" + ", re-ranked" * args.rerank

    def strip(label, tracklet, colour):
        places = np.linspace(0, len(tracklet.frames) - 1, 6).astype(int)
        frames = read_clip([tracklet.frames[k] for k in places], size)
        panel = photo(torch.cat([*frames], 2), color=colour, linewidth=6)
        who = f"person {tracklet.pid}" if tracklet.pid else "distractor"
        return f"{label}: {who}, camera {tracklet.cam}", [panel]

    for i, name in queries.items():
        rows = [strip("query", dataset.query[i], "black")]
        ranking = [j for j in np.argsort(d[i], kind="stable")  # as that of match_ranks
                   if (g_pids[j], g_cams[j]) != (q_pids[i], q_cams[i])]
        right = [g_pids[j] == q_pids[i] for j in ranking]
        for k in sorted({*range(min(8, len(right))), right.index(True)}):
            verdict, colour = ("right", "green") if right[k] else ("wrong", "red")
            verdict += ", the first" * (k > 7)
            label = f"{k + 1}. {verdict}, distance {d[i, ranking[k]]:.3f}"
            rows.append(strip(label, dataset.gallery[ranking[k]], colour))
        draw(f"Ranked list; {state}", rows, f"{name}-ranked", 1)

    cmc, mean_ap, _ = cmc_and_map(d, *ids)
    says = f"rank-1 {100 * cmc[0]:.1f}, mAP {100 * mean_ap:.1f}"
    chart = curves({says: dict(enumerate(100 * cmc, 1))}, len(cmc), "rank")
    draw(f"CMC; {state}", [("% of queries matched up to a rank", [chart])], "cmc", 1.9)

    def pca(ax):
        people, markers, shown = [*np.unique(q_pids)[:10]], "os^Dv<>PXphd*H8", {}
        for part, x, edge in (dataset.gallery, g, "none"), (dataset.query, q, "black"):
            shown.update({t.frames[0]: (t, v, edge) for t, v in zip(part, x.float().cpu())
                          if t.pid in people})  # once: queries are in the gallery, too
        x = torch.stack([v for _, v, _ in shown.values()])
        x = F.normalize(x) if metric == "cosine" else x
        x = x @ torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:2].T
        for (t, _, edge), place in zip(shown.values(), x.tolist()):
            ax.plot(*place, markers[t.cam % 15], color=f"C{people.index(t.pid)}",
                    markeredgecolor=edge, ms=9)
        for k, pid in enumerate(people):
            ax.plot([], [], "s", color=f"C{k}", label=f"person {pid}")
        for cam in sorted({t.cam for t, *_ in shown.values()}):
            ax.plot([], [], markers[cam % 15], color="grey", label=f"camera {cam}")
        ax.plot([], [], "o", color="none", markeredgecolor="black", label="query")
        ax.set(box_aspect=1, xticks=[], yticks=[])
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    draw(f"PCA; {state}", [("tracklets of ten people of the test", [pca])], "pca", 2.9)
