"""Code that the five scripts share. Data sets and clips are in data.py.

The sections, in the order in which a reader of a script needs them:

    losses and metrics          triplet loss, distances, CMC and mAP, re-ranking
    evaluation                  features of tracklets, the result of a test, --export
    rows and flags              the variants in the papers' tables, settings, flags, --plan
    a training run              `Run`, whose methods `train` calls, and what these call
    checkpoints                 reading last.pt, other weights, and the authors' release
    processes, signals, exit    torchrun, Ctrl-C, the one line for an error
    complexity                  parameters and multiply-adds
    pictures                    --figure

Every script defines these names, and passes to the functions here what they need of them:

    RECIPE, ROWS                its settings, which are flags, and the variants in the tables
    SAMPLER, SAMPLE             how a training batch and the frames of a training clip are drawn
    SPLIT, METRIC               how a test tracklet is cut into clips, and the distance of the test
    RELEASE                     the authors' trained weights, a `Release`, or None
    build, load, picture        functions that make a network, read one from a file, and draw one
    losses, loss_weights        functions for the losses of a batch, and for their weights in --plan
    make_optimizer, train       functions for the optimiser, and for the training loop
    main                        function that calls `run_script`
"""
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
from typing import Callable, NamedTuple

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
                block.div_(norm.clamp(min=1e-12))
                block.div_(norm_b[columns].clamp(min=1e-12))
                block.neg_()
                block.add_(1)
                block.masked_fill_(block < ROUNDING, 0)
            else:
                # |a|^2 + |b|^2 - 2 a b
                squared_norms = norm ** 2 + norm_b[columns] ** 2
                block.mul_(-2)
                block.add_(squared_norms)
                rounding_error = squared_norms.mul_(ROUNDING)
                block.masked_fill_(block < rounding_error, 0)
                block.sqrt_()
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


def ranked_entries(pid, cam, g_pids, g_cams):
    """Returns which gallery entries a query is ranked against, a boolean array (G,).

    This is MARS' protocol: entries of the query's own identity and camera are left out, and so is
    junk, whose pid is -1.
    """
    same_camera = (g_pids == pid) & (g_cams == cam)
    junk = g_pids == -1
    return ~(same_camera | junk)


def match_ranks(distances, q_pids, q_cams, g_pids, g_cams):
    """Returns the ranks of the true matches of each query, a list of ascending integer arrays. The
    best rank is 0. Ties rank in gallery order. The entries that `ranked_entries` leaves out are not
    ranked.

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
        is_ranked = ranked_entries(pid, cam, g_pids, g_cams)
        row = row[is_ranked]
        is_match = g_pids[is_ranked] == pid
        # np.sort and searchsorted are faster than a stable argsort, which only ties need
        ranking = np.sort(row)
        matches = np.sort(row[is_match])
        ranks = np.searchsorted(ranking, matches)
        has_ties = np.searchsorted(ranking, matches, "right") > ranks + 1
        if has_ties.any():
            ranks = np.flatnonzero(is_match[row.argsort(kind="stable")])
        ranks_of_queries.append(ranks)
    return ranks_of_queries


def average_precision(ranks):
    """Returns the average precision of a query, without interpolation: the mean of the precision at
    each of its matches. ranks: one array of `match_ranks`, not empty."""
    num_matches_so_far = np.arange(1, len(ranks) + 1)
    precisions = num_matches_so_far / (ranks + 1)
    return float(np.mean(precisions))


def distances_and_ranks(distances, q_pids, q_cams, g_pids, g_cams):
    """Yields (distances to the gallery, ranks of the true matches) for each query.

    distances: a (Q, G) matrix, a list of its rows, or its blocks as `distance_blocks` yields them.
    The other arguments are those of `match_ranks`.
    """
    q_pids, q_cams, g_pids, g_cams = map(to_numpy, (q_pids, q_cams, g_pids, g_cams))
    is_matrix = hasattr(distances, "shape")
    if isinstance(distances, (list, tuple)):
        is_matrix = not isinstance(distances[0], tuple)  # a block is a pair (slice, distances)
    blocks = [(slice(None), distances)] if is_matrix else distances
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
    is_among_first_k = first_ranks[:, None] < np.arange(1, top + 1)  # (queries, top)
    cmc = is_among_first_k.mean(0)
    mean_ap = float(np.mean([average_precision(ranks) for ranks in found]))
    return cmc, mean_ap, len(found)


def smallest_indices(distances, k):
    """Returns the indices of the k smallest entries of each row of a float32 matrix (M, N), in
    ascending order. Equal entries rank in the order of their indices, where `topk` alone would
    take any order. At most one entry of a row may be negative (see below)."""
    values, indices = distances.topk(min(k + 1, distances.shape[1]), largest=False)
    tied = (values[:, 1:] == values[:, :-1]).any(1)
    # Rows with equal entries are sorted by integers instead. Read as integers, the bits of two
    # floats compare like the floats, unless both floats are negative; at most one entry of a row
    # is. Shifted by 32 bits, with the index in the lower bits, they make keys that are never
    # equal.
    bits = distances[tied].view(torch.int32).long()
    keys = bits * 2 ** 32 + torch.arange(distances.shape[1], device=distances.device)
    indices[tied] = keys.topk(indices.shape[1], largest=False).indices
    return indices[:, :k]


def rerank(query_features, gallery_features, metric="cosine", *, k1=20, k2=6, original_weight=0.3):
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017): returns new distances, a float32 array
    (Q, G). They are the weighted sum of the original distance d and the Jaccard distance of the
    k-reciprocal neighbours.

    Queries and gallery together are the samples. d is the cosine or the squared Euclidean distance
    of a sample p from another, divided by the largest distance of p from any sample. p comes first
    in its own list of neighbours and is not counted among the k1. Equally distant neighbours rank
    in the order of the features.

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
    num_neighbours = max(k1 + 1, k2)

    def sparse(values, rows, columns):
        return csr_array((values, (rows, columns)), shape=(n, n))

    neighbours = torch.empty(n, num_neighbours, dtype=torch.long)
    largest_distance = torch.empty(n)
    for rows, d in distance_blocks(x, x, metric):
        own_columns = torch.arange(rows.start, rows.stop)
        d[torch.arange(len(d)), own_columns] = -1  # a sample comes before its exact duplicates
        neighbours[rows] = smallest_indices(d, num_neighbours).cpu()
        largest_distance[rows] = d.amax(1).cpu() ** exponent
    if not largest_distance.any():  # all features are equal: all distances are 0
        return np.zeros((Q, n - Q), np.float32)
    largest_distance[largest_distance == 0] = 1
    neighbours = neighbours.numpy()
    largest_distance = largest_distance.numpy()

    def reciprocal(k):
        """R(p, k): the neighbours of p that have p among their own k nearest neighbours."""
        nearest = neighbours[:, :k + 1]
        neighbours_of_neighbours = nearest[nearest]  # (n, k + 1, k + 1)
        sample = np.arange(n)[:, None, None]
        is_mutual = (neighbours_of_neighbours == sample).any(2)
        p = np.repeat(np.arange(n), is_mutual.sum(1))
        return sparse(np.ones(len(p), np.float32), p, nearest[is_mutual])

    R_full = reciprocal(k1)
    R_half = reciprocal(round(k1 / 2))
    # how many of R(q, k1/2) are in R(p, k1), for each q in R(p, k1)
    overlap = (R_full @ R_half.T).multiply(R_full).tocoo()
    needed = 2 / 3 * R_half.sum(1)
    is_large = overlap.data >= needed[overlap.col]
    expansion = sparse(overlap.data[is_large], overlap.row[is_large], overlap.col[is_large])
    # R*(p, k1) is R(p, k1) together with every R(q, k1/2), q in R(p, k1), that has at least 2/3 of
    # its members in R(p, k1)
    p, members = (R_full + expansion @ R_half).nonzero()
    weights = np.empty(len(p), np.float32)
    num_chunks = 1 + len(p) // 1000  # in pieces, because the features of all pairs need much memory
    for chunk in np.array_split(np.arange(len(p)), num_chunks):
        a = x[p[chunk]].double()
        b = x[members[chunk]].double()
        if metric == "cosine":
            d = 1 - (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1)
            d[d < ROUNDING] = 0
        else:
            d = (a - b).square().sum(1)
        weights[chunk] = np.exp(-d.cpu().numpy() / largest_distance[p[chunk]])
    V = sparse(weights, p, members)
    # local query expansion: the mean of V over the k2 nearest
    p = np.repeat(np.arange(n), k2)
    mean_of_nearest = sparse(np.full(n * k2, 1 / k2, V.dtype), p, neighbours[:, :k2].ravel())
    V = mean_of_nearest @ V

    gallery_columns = V[Q:].tocsc()
    total = V.sum(1)
    reranked = np.empty((Q, n - Q), np.float32)
    for rows, d in distance_blocks(x[:Q], x[Q:], metric):
        for query, row in zip(range(rows.start, rows.stop), d.cpu().numpy() ** exponent):
            entries = slice(V.indptr[query], V.indptr[query + 1])  # the stored ones of V[query]
            minima = sums_of_minima(V.data[entries], gallery_columns[:, V.indices[entries]])
            # 1 - sum of min(a, b) / sum of max(a, b); max(a, b) is a + b - min(a, b)
            jaccard = 1 - minima / (total[query] + total[Q:] - minima)
            original = original_weight * row / largest_distance[query]
            reranked[query] = original + (1 - original_weight) * jaccard
    return reranked


def sums_of_minima(values, columns):
    """Returns sum_j min(values[j], columns[i, j]) for each row i of a sparse matrix.

    values: one number for each column, at least 0; columns: a csc_array (rows, columns), which is
    overwritten.
    """
    values = np.repeat(values, np.diff(columns.indptr))  # one for each entry that is stored
    columns.data = np.minimum(columns.data, values)
    return columns.sum(1)


# --------------------------------------------------------------------------------------- evaluation
# A network that is evaluated takes clips (B, T, 3, H, W) and returns embeddings (B, D), in eval
# mode. It may have two methods: finish(features) is applied to the tracklets' mean embeddings (in
# TCLNet), and test_parts() returns the networks that a test runs (in M3D), see `networks_of_test`.

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


def as_current_device(device):
    """Returns a context in which a GPU is torch's current device. A DataLoader pins its batches for
    the current device, and would otherwise take up memory on the first GPU, too."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return contextlib.nullcontext()


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
    if not tracklets:
        raise UserError("there are no tracklets to extract features from")
    device = next(model.parameters()).device
    was_training = model.training
    clips = AllClips(tracklets, split_clips, clip_length, size)
    starts = range(0, len(clips), batch_size)
    batches = [range(i, min(i + batch_size, len(clips))) for i in starts]
    # The processes take the batches in turn. All get the same number of batches; if they do not
    # divide evenly, the sampler repeats some of the first batches at the end.
    own_batches = torch.utils.data.DistributedSampler(
        batches, num_replicas=world_size(), rank=process_rank(), shuffle=False)
    loader = torch.utils.data.DataLoader(
        clips, batch_sampler=[batches[i] for i in own_batches], num_workers=workers,
        worker_init_fn=ignore_terminal_signals, pin_memory=device.type == "cuda",
        generator=torch.Generator())
    tracklet_of_clip = torch.tensor([number for number, _ in clips.clips], device=device)
    # BatchNorm's running statistics may differ between the processes: use those of rank 0
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    model.eval()
    sums = None
    with as_current_device(device), progress(what="features", total=len(clips), unit=" clips",
                                             leave=False, hidden=process_rank() > 0) as bar:
        # in step n the processes together compute the clips of slices[n], in the order of ranks
        slices = tracklet_of_clip.split(batch_size * world_size())
        for (images, _), owners in zip(loader, slices):
            raise_if_stopped()
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                x = model(normalize(images.to(device, non_blocking=True))).float()
            if world_size() > 1:
                # the last batch may be smaller, but all must have one shape: add rows of zeros
                missing = batch_size - len(x)
                x = gather(F.pad(x, (0, 0, 0, missing)))
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
    """Returns the networks that a test runs, as [(network, clip length)]. The test concatenates
    their features."""
    if hasattr(model, "test_parts"):
        return model.test_parts()
    return [(model, clip_length)]


def tracklet_features(model, dataset, *, split_clips, clip_length, size, **extract_options):
    """Returns the features of the query tracklets (Q, D) and of the gallery tracklets (G, D).

    dataset: a `Dataset`. The other arguments are passed to `extract`. Raises UserError for features
    that are not finite.
    """
    # keyed by the first frame, so that a query that is also in the gallery is computed once
    tracklets = {t.frames[0]: t for t in as_tracklets(dataset.query + dataset.gallery)}
    parts = []  # the features of each network of the test
    for network, length in networks_of_test(model, clip_length):
        parts.append(extract(network, [*tracklets.values()], split_clips=split_clips,
                             clip_length=length, size=size, **extract_options))
    features = torch.cat(parts, 1)
    if not features.isfinite().all():
        raise UserError("the features are not finite: the weights are damaged or the training "
                        "diverged")
    row_of_frame = {first: row for row, first in enumerate(tracklets)}

    def features_of(wanted):
        return features[[row_of_frame[t.frames[0]] for t in wanted]]

    return features_of(dataset.query), features_of(dataset.gallery)


def evaluate(model, dataset, *, split_clips, clip_length, size, metric="cosine", use_rerank=False,
             label="test", export_folder=None, **extract_options):
    """Prints mAP and CMC of the test part and returns them, in percent: {"mAP": 84.6, "rank-1":
    88.8, "rank-5": ..., "rank-10": ..., "rank-20": ...}.

    Args:
        model, split_clips, clip_length, size, extract_options: passed to `extract`.
        dataset: a `Dataset` with query and gallery.
        metric: "cosine" or "euclidean".
        use_rerank: True ranks by the distances of `rerank`.
        label: what the printed line begins with.
        export_folder: where `write_export` writes features and rankings; None for nowhere. If it
            is given and no query has a match, these are still written and {} is returned, instead
            of a UserError.

    Raises UserError when nothing can be ranked.
    """
    start = time.time()
    queries, gallery = tracklet_features(model, dataset, split_clips=split_clips,
                                         clip_length=clip_length, size=size, **extract_options)
    if use_rerank:
        reranked = rerank(queries, gallery, metric)

    def distances():
        if use_rerank:
            return reranked
        return distance_blocks(queries, gallery, metric)

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
    # Some scripts test all frames of a tracklet, others drop those at its end that do not fill a
    # clip. A tracklet of one frame more than a clip shows which of the two this script does.
    takes_all_frames = split_clips(clip_length + 1, clip_length).size > clip_length
    if takes_all_frames:
        protocol = "all frames"
    else:
        protocol = f"only whole clips of {clip_length} frames"
    if use_rerank:
        protocol += ", re-ranked"
    cmc_text = "  ".join(f"CMC-{k} {result[f'rank-{k}']:.1f}" for k in (1, 5, 10, 20))
    counts = f"{matched:,} queries"
    if matched < len(queries):
        counts += f" ({len(queries) - matched:,} others have no match)"
    print(f"{label}, {protocol}:  mAP {result['mAP']:.1f}   {cmc_text}   "
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
        is_reranked: True if the distances come from `rerank`; only changes the printed message.
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
        ranked = np.flatnonzero(ranked_entries(q_pids[i], q_cams[i], g_pids, g_cams))
        order = row[ranked].argsort(kind="stable")
        nearest = [gallery[j] for j in ranked[order[:10]]]
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
        note = ("; queries.csv uses the re-ranked distances, and the features in features.npz "
                "alone give another ranking")
    print(f"wrote features.npz and queries.csv into {folder}{note}", flush=True)


# ----------------------------------------------------------------------------------- rows and flags
# A script has a RECIPE, {setting: (the paper's value, the small run's value, help[, choices])}, and
# ROWS, {variant: Row}. Every setting of the recipe is a flag of the same name, beside those in
# FLAGS. `parse_flags` reads the flags that the user has given, and `resolve_settings` determines
# the values of all other settings.

# costs that the papers' tables report besides the accuracy, {name: unit, as printed}
COSTS = {
    "million_parameters": "million parameters",
    "more_megabytes": "MB of parameters more than the 2D network",
    "gflops_a_frame": "GFLOPs per frame",
    "gflops_of_4_frames": "GFLOPs for 4 frames",
    "more_gflops": "GFLOPs more than the baseline",
}


class Row:
    """A row of a table in a paper: a variant of its network, and the results in the paper.

    Args:
        about: the table and the name of the row there, such as "Table 2: base. + SBM".
        same: name of another row that is the same variant; nothing else is given then.
        given: keyword arguments of three kinds. A name in DATA_SETS is a result of the paper,
            (mAP, rank-1), with None for a number that it does not report; a name in COSTS is a
            cost; any other name is a setting of the recipe that the variant changes.
    """

    def __init__(self, about: str, same: str | None = None, **given):
        self.about = about
        self.same = same
        self.settings = {}
        self.results = {}
        self.costs = {}
        for name, value in given.items():
            if name in DATA_SETS:
                self.results[name] = value
            elif name in COSTS:
                self.costs[name] = value
            else:
                self.settings[name] = value


class Setting(NamedTuple):
    """An entry of a recipe: a number or a choice of the paper, which is also a flag."""
    paper: object             # the paper's value
    small: object             # the value of the small run
    help: str
    choices: tuple | None = None


class Flag(NamedTuple):
    """A flag that is not in a recipe."""
    default: object           # if no other source has a value; None: the help says what happens
    help: str
    kind: type                # int, str or bool
    choices: tuple | None = None


def row_of(rows, name):
    """Returns the row of this name; if its `same` names another row, that row."""
    return rows[rows[name].same or name]


# In the small run, a row does not override these settings: the rows' values are meant for MARS.
SCHEDULE_AND_BATCH = ("epochs", "ids", "clips", "lr", "lr_step")


def row_settings(rows, name, small):
    """Returns the settings of the recipe that the row of this name changes. In the small run,
    SCHEDULE_AND_BATCH are left out."""
    kept = {}
    for key, value in row_of(rows, name).settings.items():
        if not (small and key in SCHEDULE_AND_BATCH):
            kept[key] = value
    return kept


def settings(recipe, rows, name, small=False, **others):
    """Returns the settings of a variant as a Namespace, as `build` of a script takes them.

    Args:
        recipe, rows: RECIPE and ROWS of a script.
        name: the variant, a name in rows.
        small: True takes the values of the small run.
        others: settings that override the recipe and the row.
    """
    values = {"variant": name, "resume": None}
    for key, entry in recipe.items():
        setting = Setting(*entry)
        values[key] = setting.small if small else setting.paper
    values.update(row_settings(rows, name, small))
    values.update(others)
    return argparse.Namespace(**values)


FLAGS = {
    "data": Flag("synthetic", "data set", str, tuple(DATA_SETS)),
    "small": Flag(None, "take the small recipe, for a quick run (default: only with --data "
                  "synthetic)", bool),
    "root": Flag("datasets", "folder that contains the data sets (ROOT/mars, ...), or the folder "
                 "of the data set itself", str),
    "split": Flag("0", "which train/test split of ilids and prid; all: the ten splits one after "
                  "another, and their mean", str, (*"0123456789", "all")),
    "chunk": Flag(None, "cut training tracklets into chunks of this many frames; 0: do not cut "
                  "(default: by data set, see CHUNK in data.py)", int),
    "workers": Flag(None, "number of processes that load images (default: up to 8 with a GPU, "
                    "else 0)", int),
    "gpu": Flag(None, "number of the GPU, or cpu (default: the first GPU, or the CPU if there is "
                "none)", str),
    "amp": Flag(False, "train and test with bfloat16 autocast", bool),
    "compile": Flag(False, "compile the network with torch.compile, if a compiler is available",
                    bool),
    "seed": Flag(0, "random seed of the initial weights, the batches and the augmentation", int),
    "output": Flag(None, "folder for log.csv, args.json and last.pt (default: "
                   "runs/SCRIPT-DATA[-VARIANT][/split-SPLIT], or the folder of --resume FILE)",
                   str),
    "init": Flag(None, "start from the weights in this file: last.pt of another run, or a file "
                 "with weights only; implies --weights none", str),
    "resume": Flag(None, "continue from this last.pt (a file, or the folder that holds it); "
                   "without a value, or with auto: from last.pt in the --output folder if it "
                   "exists", str),
    "checkpoint_every": Flag(1, "write last.pt and log.csv after every N epochs", int),
    "eval_every": Flag(0, "also evaluate after every N epochs; 0: only after the last one", int),
    "eval_first": Flag(None, "also evaluate before the training (default: only with --data "
                       "synthetic)", bool),
    "tensorboard": Flag(False, "also write the log for TensorBoard, into the output folder", bool),
    "rerank": Flag(False, "evaluate with k-reciprocal re-ranking", bool),
    "evaluate": Flag(False, "only evaluate: the network of --resume or --init, or an untrained "
                     "one without them", bool),
    "export": Flag(None, "write features.npz and queries.csv into this folder; implies --evaluate "
                   "(add --no-evaluate to train first)", str),
    "figure": Flag(None, "draw figures of the network into this folder, and do nothing else", str),
    "figure_tracklets": Flag(3, "number of query tracklets to draw", int),
    "figure_format": Flag("png", "file format of the pictures; pdf and svg are for papers", str,
                          ("png", "pdf", "svg")),
    "beside": Flag(None, "with --figure: last.pt of another variant of this script, whose pictures "
                   "are drawn above those of this one", str),
    "complexity": Flag(False, "only print the parameters and FLOPs of all variants", bool),
    "plan": Flag(False, "only print what would be trained and tested: recipe, data set, number of "
                 "steps", bool),
}
# The constants below, down to TRAINING_ONLY, say more about single settings. A new flag, and a new
# setting of a recipe, may have to be added to some of them.

# the smallest values of settings; 0 for all other settings
MINIMUM = {"epochs": 1, "ids": 2, "clips": 1, "frames": 1, "height": 1, "width": 1, "lr_step": 1,
           "checkpoint_every": 1, "figure_tracklets": 1}
# the largest values of settings; 2 ** 31 for all other settings
MAXIMUM = {"erase": 1, "frames": 1024, "ids": 4096, "clips": 4096, "height": 8192, "width": 8192,
           "epochs": 10 ** 5, "k": 99, "kernels": 999, "resolutions": 999, "learners": 64,
           "s_h": 999, "s_w": 999}
ABOVE_ZERO = {"beta", "temperature"}  # numbers that must be greater than their minimum, 0
# Flags that may hold a path: ~ is expanded here, because the shell does not do so in --root=~/x.
PATH_FLAGS = {"root", "output", "resume", "init", "export", "figure", "beside", "weights",
              "init_2d", "join"}

# Settings that are never restored from a checkpoint.
NOT_RESTORED = {"eval_first", "evaluate", "export", "figure", "figure_tracklets", "figure_format",
                "beside", "complexity", "plan", "gpu", "workers", "resume", "compile", "output",
                "chosen", "tensorboard"}
# Settings that the user may change when a run is resumed, or when its network is evaluated.
MAY_CHANGE_ON_RESUME = {*NOT_RESTORED, "root", "epochs", "checkpoint_every", "eval_every"}
MAY_CHANGE_ON_EVALUATE = {*FLAGS, *SCHEDULE_AND_BATCH, "erase", "weights"}

# Settings of the recipes that only a training uses; neither a test nor a picture depends on them.
TRAINING_ONLY = {"epoch", "erase", "epochs", "lr", "lr_step", "momentum", "weight_decay", "margin",
                 "lambda1", "temperature", "loss", "divergence", "in_stages"}


def as_flag(name, value=()):
    """Returns a setting as it is typed on a command line, such as "--beta 3.0" or "--no-sbm".
    Without a value, returns only the name of the flag."""
    flag = "--" + name.replace("_", "-")
    if value is True:
        return flag
    if value is False:
        return "--no-" + flag.removeprefix("--")
    if not isinstance(value, (tuple, list)):
        value = [value]
    return " ".join([flag, *map(str, value)])


def with_or_without(name, value):
    """Returns "with" and a setting as it is typed, or "without" and its flag if the value is
    None."""
    if value is None:
        return f"without {as_flag(name)}"
    return f"with {as_flag(name, value)}"


def number_type(name, kind):
    """Returns an argparse type for this setting: a function that converts text to a number and
    checks it against MINIMUM and MAXIMUM. kind: int or float."""
    least = MINIMUM.get(name, 0)
    most = MAXIMUM.get(name, 2 ** 31)
    wanted = f"a number from {least} to {most}"
    if kind is int:
        wanted = f"a whole number from {least} to {most}"
    if name in ABOVE_ZERO:
        wanted = f"a number above {least}, at most {most}"

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        is_within = least <= value <= most
        if not is_within or (value == 0 and name in ABOVE_ZERO):
            raise argparse.ArgumentTypeError(f"takes {wanted}, not {text!r}")
        return value
    return convert


def add_flag(group, name, default, help_text, *, kind=None, choices=None):
    """Adds a flag to a parser or a group of it, and returns its argparse action.

    Args:
        group: the parser or its group.
        name: the setting's name.
        default: the setting's default, of which only the type is used. A flag whose default is a
            tuple accepts several values. Without `kind`, None makes the flag accept a string.
        help_text: for --help.
        kind: int, float, str or bool; None takes the type of the default.
        choices: the values that the flag takes, if these are few.
    """
    if kind is None:
        example = default
        if isinstance(default, tuple):
            example = default[0] if default else None
        kind = str if example is None else type(example)
    help_text = help_text.replace("%", "%%")
    if kind is bool:
        return group.add_argument(as_flag(name), help=help_text,
                                  action=argparse.BooleanOptionalAction)
    options = {"choices": choices}
    if kind in (int, float):
        options["type"] = number_type(name, kind)
    if name in PATH_FLAGS:
        options["type"] = os.path.expanduser
    if isinstance(default, tuple):
        options["nargs"] = "*"
    if name == "variant":
        options["metavar"] = "VARIANT"  # there are too many choices for the line of --help
    if name == "resume":
        options.update(nargs="?", const="auto")
    return group.add_argument(as_flag(name), help=help_text, **options)


def flag_accepts(action, value):
    """Returns whether a value is one that the flag of this argparse action gives when it is typed.
    A checkpoint may hold only such values."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return isinstance(value, bool)
    values = [value]
    if action.nargs == "*":
        if not isinstance(value, (tuple, list)):
            return False
        values = value
    convert = action.type or str
    for one in values:
        try:
            typed = convert(str(one))
            os.fsencode(str(one))
        except (argparse.ArgumentTypeError, ValueError):
            return False  # out of range, or not encodable as a file name
        if type(one) is not type(typed) or one != typed:
            return False
        if one == "" or "\0" in str(one):
            return False
        if action.choices is not None and one not in action.choices:
            return False
    return True


def variant_help(rows):
    """Yields the lines of --help about the variants: what they are, their results in the paper, and
    the flags that they set."""
    def indented(text, indent):
        return textwrap.fill(text, 79, initial_indent=indent, subsequent_indent="      ",
                             break_on_hyphens=False)

    for name, row in rows.items():
        if row.same:
            yield indented(f"{name}  {row.about} (the same as {row.same})", "  ")
            continue
        results = [f"{data} {mean_ap or '-'} / {rank1}"
                   for data, (mean_ap, rank1) in row.results.items()]
        results += [f"{value} {COSTS[cost]}" for cost, value in row.costs.items()]
        yield indented(f"{name}  {row.about}", "  ")
        yield indented(", ".join(results) or "no result in the paper", "      ")
        flags = [as_flag(setting, value) for setting, value in row.settings.items()]
        yield indented(" ".join(flags), "      ")


def make_parser(recipe, rows, title):
    """Returns the parser of a script's command line, and the argparse action of every setting,
    {name: action}. Flags that are not given get no value."""
    parser = Parser(
        description=textwrap.fill(title, 79), usage="%(prog)s [--flag value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        epilog="variants: their place in the paper, mAP / rank-1 there, and the flags they set:\n"
               + "\n".join(variant_help(rows)))

    def shown(value):
        return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    actions = {}
    group = parser.add_argument_group(
        "recipe", "The default is the paper's value. Where the small run has another, it follows.")
    for name, entry in recipe.items():
        setting = Setting(*entry)
        values = shown(setting.paper)
        if setting.small != setting.paper:
            values += f"; small run {shown(setting.small)}"
        actions[name] = add_flag(group, name, setting.paper, f"{setting.help} ({values})",
                                 choices=setting.choices)
    group = parser.add_argument_group("run")
    actions["variant"] = add_flag(
        group, "variant", None, "variant of the network, listed below (default: the first)",
        choices=rows)
    for name, flag in FLAGS.items():
        text = flag.help
        if flag.default is not None and flag.default is not False:
            text += f" (default: {flag.default})"
        actions[name] = add_flag(group, name, flag.default, text, kind=flag.kind,
                                 choices=flag.choices)
    return parser, actions


def parse_flags(recipe, rows, title):
    """Returns the flags that the user has given, {name: value}; UserError for wrong ones."""
    parser, _ = make_parser(recipe, rows, title)
    chosen = {}
    for name, value in vars(parser.parse_args()).items():
        if isinstance(value, list):
            value = tuple(value)
        values = value if isinstance(value, tuple) else (value,)
        if "" in values:
            raise UserError(f"{as_flag(name)}: the value is empty")
        chosen[name] = value
    others = [name for name in chosen if name != "complexity"]
    if chosen.get("complexity") and others:
        raise UserError(f"{as_flag(others[0])} has no effect with --complexity, which prints one "
                        "table of all variants")
    return chosen


def parse_args(recipe, rows, text, script, *, release=None):
    """Returns all settings of the command that the user has typed, a Namespace.

    Args:
        recipe, rows: RECIPE and ROWS of the script.
        text: the script's docstring; its first line is the title in --help.
        script: the script's file.
        release: the script's `Release`, or None.
    """
    chosen = parse_flags(recipe, rows, text.split("\n")[0])
    return resolve_settings(chosen, recipe=recipe, rows=rows, script=script, release=release)


def resolve_settings(chosen, *, recipe, rows, script, release):
    """Returns all settings of a run, a Namespace.

    In order of precedence, they come from the user's flags, the checkpoint of --resume, the
    authors' network of --init, the variant, the authors' settings with --release, and the recipe.

    Args:
        chosen: the flags that the user has given, {name: value}.
        recipe, rows: RECIPE and ROWS of the script.
        script: the script's file.
        release: the script's `Release`, or None.
    """
    script = Path(script)
    defaults = {name: flag.default for name, flag in FLAGS.items()}
    flags = {**defaults, **chosen}
    evaluate = only_evaluates(chosen)
    required = {}  # settings that the authors' weights given to --init require
    if flags["init"] and release:
        # a run that is resumed does not need the file of --init any more
        is_gone = flags["resume"] is not None and not os.path.exists(flags["init"])
        if not is_gone:
            required = settings_of_release(flags["init"], release, chosen)
    data = flags["data"]
    first = next(iter(rows))
    variant = required.get("variant", chosen.get("variant", first))
    output = flags["output"]
    if output is None:
        output = f"runs/{script.stem}-{data}"
        if variant != first:
            output += f"-{variant}"
        if data in SPLIT_SETS and flags["split"] != "all":
            output += f"/split-{flags['split']}"

    resume = flags["resume"]
    if resume == "auto":
        last = f"{output}/last.pt"
        resume = None
        if evaluate or os.path.exists(last):
            resume = last
    elif resume and os.path.isdir(resume):
        resume += "/last.pt"
    checkpoint = None
    saved = {}
    if resume is not None and flags["split"] != "all":
        # A run that has no parts may also change these two settings. The parts of a run (see
        # `part_of`) must agree in them, because a mean over different settings says nothing.
        may_differ = MAY_CHANGE_ON_RESUME | {"amp", "rerank"}
        if evaluate:
            may_differ = MAY_CHANGE_ON_EVALUATE
        if flags["resume"] != "auto":  # refused below, whatever their values
            may_differ = may_differ | {"init", "weights"}
        checkpoint = load_checkpoint(resume, script=script.name, recipe=recipe, rows=rows,
                                     expected=chosen, may_differ=may_differ, chosen=chosen,
                                     for_training=not evaluate, release=release)
        saved = checkpoint["args"]
        output = flags["output"] or str(Path(resume).parent)
        data = chosen.get("data", saved["data"])
        variant = saved["variant"]
        if data == "synthetic" and "root" not in chosen and saved["root"] != defaults["root"]:
            # The checkpoint names this folder, the user does not: raise an error if it is missing,
            # rather than create it.
            load_dataset(data, saved["root"], training=False, images=False)

    refuse_flags_without_effect(chosen, evaluate=evaluate, saved=saved,
                                is_resumed=checkpoint is not None)
    if "split" in chosen and data not in SPLIT_SETS:
        raise UserError(f"--split: {data} has no splits, only {' and '.join(SPLIT_SETS)} have")
    if flags["split"] == "all" and evaluate:
        raise UserError("--split all is for training, not for --evaluate, --export, --figure")

    if "small" in chosen:
        small = chosen["small"]
    elif "small" in saved:
        small = saved["small"]
    else:
        small = saved.get("data", data) == "synthetic"
    # Each of the sources below overrides those above it.
    values = {**defaults, "small": small, "eval_first": data == "synthetic"}
    values["chunk"] = CHUNK.get(data, 0)
    if release and data in release.chunk:
        values["chunk"] = release.chunk[data]
    values.update(vars(settings(recipe, rows, variant, small)))
    if chosen.get("release") and not saved:
        values.update(release.settings)
        values.update(row_settings(rows, variant, small))
    for name, value in required.items():
        if name in recipe:
            values[name] = value
    if flags["init"]:
        values["weights"] = "none"
    values.update(saved)
    values.update(chosen)
    names = [*chosen]
    if chosen.get("evaluate") is False:  # --no-evaluate asks for no evaluation
        names.remove("evaluate")
    # No source overrides these: they are determined above, or given by the script.
    values.update(resume=resume, evaluate=evaluate, output=output, chosen=names,
                  script=script.name)
    # These are not settings; `Run` removes them from the Namespace.
    values.update(checkpoint=checkpoint, authors_release=release, recipe=recipe,
                  paper_result=row_of(rows, variant).results.get(data))
    return argparse.Namespace(**values)


def only_evaluates(chosen):
    """Returns whether a command with these flags {name: value} tests or draws a network and trains
    nothing."""
    if chosen.get("figure") is not None:
        return True
    # --export implies --evaluate, unless the user has given --no-evaluate
    return chosen.get("evaluate", "export" in chosen)


def settings_of_release(path, release, chosen):
    """Returns the settings that the authors' released weights in a file of --init require, {name:
    value}; {} for any other file. Raises UserError if a flag contradicts one."""
    file = read_file_or_release(path, script="", release=release)
    if not file.get("release"):
        return {}
    required = file["args"]
    for key in sorted((chosen.keys() & required.keys()) - {"data", "root", "small"}):
        if chosen[key] != required[key]:
            raise UserError(f"--init {path}: the network in this file is one with "
                            f"{as_flag(key, required[key])}; leave out "
                            f"{as_flag(key, chosen[key])}")
    return required


def refuse_flags_without_effect(chosen, *, evaluate, saved, is_resumed):
    """Raises UserError for a flag that has no effect in what the command does. Allowed are flags
    that repeat the checkpoint's value, flags that turn something off, such as --no-compile, and
    flags for training settings that an older checkpoint does not have.

    Args:
        chosen: the flags that the user has given, {name: value}.
        evaluate: whether nothing is trained.
        saved: the settings in the checkpoint of --resume, {} without one.
        is_resumed: whether there is a checkpoint.
    """
    draws = chosen.get("figure") is not None
    # True for --resume FILE. With --resume auto the same command first starts a run and later
    # continues it, so it may have flags that only matter at the start, such as --init.
    resumes_a_file = chosen.get("resume") not in (None, "auto")
    if draws:
        mode = "--figure"
    elif "evaluate" in chosen:
        mode = "--evaluate"
    else:
        mode = "--export"
    rules = [  # (flags, whether they have an effect, the message otherwise)
        (("beside", "figure_tracklets", "figure_format"),
         draws,
         "has no effect without --figure"),
        ((*sorted(TRAINING_ONLY), "chunk", "eval_every", "checkpoint_every", "eval_first",
          "tensorboard"),
         not evaluate,
         f"is for training, but with {mode} nothing is trained"),
        (("evaluate", "export", "compile"),
         not draws,
         "has no effect with --figure, which only draws"),
        (("init", "weights"),
         not is_resumed or (not evaluate and not resumes_a_file),
         "has no effect with --resume, because the network is that of the checkpoint"),
        (("seed",),
         not is_resumed or not evaluate,
         f"has no effect with {mode} and --resume, because nothing is random there"),
        (("resume",),
         not resumes_a_file or chosen.get("split") != "all",
         "FILE has no effect with --split all, because each split resumes from its own last.pt"),
    ]
    for names, have_an_effect, message in rules:
        for name in names:
            if have_an_effect or name not in chosen or chosen[name] is False:
                continue
            repeats_checkpoint = name in saved and saved[name] == chosen[name]
            is_missing_there = is_resumed and name in TRAINING_ONLY and name not in saved
            if not (repeats_checkpoint or is_missing_there):
                raise UserError(f"{as_flag(name)} {message}")


def run_script(train, build, *, recipe, rows, release, text, script):
    """Does what the command line asks for.

    Args:
        train: function that takes the settings and trains or shows a network.
        build: function (settings, number of identities) that returns the network.
        recipe, rows: RECIPE and ROWS of the script.
        release: the script's `Release`, or None.
        text: the script's docstring; its first line is the title in --help.
        script: the script's file.
    """
    args = parse_args(recipe, rows, text, script, release=release)
    if args.complexity:
        print_complexity_table(rows, recipe, build)
        return
    build_on_meta_device(build, args, 2)  # refuses wrong combinations before data are read
    if args.split == "all" and not args.plan:
        train_all_splits(train, args, rows)
    else:
        train(args)


def part_of(args, rows, folder, variant=None, **changes):
    """Returns the settings of one part of a run (a split of --split all, or a stage of M3D). If its
    folder has a last.pt, the part is resumed.

    Args:
        args: the settings of the whole run.
        rows: ROWS of the script.
        folder: name of the part's folder in that of the run.
        variant: variant of the part. Its settings override the run's, except a schedule or batch
            given by the user. None keeps the run's variant.
        changes: further settings of the part.

    Raises UserError when the part has begun with other settings.
    """
    part = copy.copy(args)
    part.output = f"{args.output}/{folder}"
    part.resume = None
    if args.export:
        part.export = f"{args.export}/{folder}"
    if variant:
        for key, value in row_settings(rows, variant, args.small).items():
            if not (key in SCHEDULE_AND_BATCH and key in args.chosen):
                setattr(part, key, value)
        part.variant = variant
        part.paper_result = row_of(rows, variant).results.get(args.data)
    vars(part).update(changes)
    last = f"{part.output}/last.pt"
    if os.path.exists(last):
        part.checkpoint = load_checkpoint(last, script=args.script, recipe=args.recipe, rows=rows,
                                          expected=vars(part), may_differ=MAY_CHANGE_ON_RESUME,
                                          chosen=args.chosen)
        part.resume = last
    return part


def train_all_splits(train, args, rows):
    """--split all: trains the ten splits one after another, each in its own folder, skipping those
    that are finished, unless --export needs their networks. Prints the mean and the standard
    deviation of the results."""
    results = []
    for split in map(str, range(10)):
        part = part_of(args, rows, f"split-{split}", split=split)
        history = part.checkpoint["history"] if part.checkpoint else []
        is_finished = len(history) == args.epochs and history[-1]["mAP"] != "" and not args.export
        result = history[-1] if is_finished else train(part)
        results.append([result["mAP"], result["rank-1"]])
        note = " (finished before)" if is_finished else ""
        print(f"{args.variant}, split {split}: mAP {result['mAP']:.1f}, "
              f"rank-1 {result['rank-1']:.1f}{note}", flush=True)
    mean_ap, rank1 = np.mean(results, 0)
    deviation_of_ap, deviation_of_rank1 = np.std(results, 0, ddof=1)
    print(f"{args.variant}, mean of 10 splits: mAP {mean_ap:.1f} +- {deviation_of_ap:.1f}, "
          f"rank-1 {rank1:.1f} +- {deviation_of_rank1:.1f}; {paper_result_text(args.paper_result)}")


# the flags to check when a network raises ValueError for its settings; used in error messages
SIZE_FLAGS = "--frames, --height, --width and the other settings of the recipe"


def build_on_meta_device(build, args, num_classes):
    """Returns a script's network for these settings, on the meta device: no memory is taken for its
    weights, and no file is read. Raises UserError for settings that do not go together."""
    args = copy.copy(args)
    vars(args).update(weights="none", init_2d=None, join=(), evaluate=False)
    try:
        with torch.device("meta"):
            return build(args, num_classes)
    except ValueError as error:
        raise UserError(f"{error}; check {SIZE_FLAGS}") from None


def plan(args, *, recipe, sampler, split, metric, build, loss_weights):
    """--plan: prints what the command would train and test. Trains nothing and reads no images.

    Args:
        args: the settings, of `parse_args`.
        recipe: RECIPE of the script.
        sampler: class of the batch sampler, SAMPLER of the script.
        split: function (n, T) that cuts a test tracklet into clips, SPLIT of the script.
        metric: "cosine" or "euclidean", METRIC of the script.
        build: function (settings, number of identities) that returns the network.
        loss_weights: function of the settings that returns {name of a loss: weight}.
    """
    number = 0 if args.split == "all" else int(args.split)
    # training=True would create a synthetic data set that is missing
    training = not args.evaluate and args.data != "synthetic"
    dataset = load_dataset(args.data, args.root, split=number, chunk=args.chunk,
                           training=training, images=False)
    model = build_on_meta_device(build, args, dataset.num_identities or 1)
    print(f"{Path(args.script).stem} {args.variant} on {args.data}: {costs_in_words(model, args)}")
    print(dataset.summary())
    if args.evaluate:
        print("nothing is trained: the network is evaluated only")
    else:
        print_training_plan(args, dataset, sampler, loss_weights(args))
    print_test_plan(args, dataset, split, networks_of_test(model, args.frames), metric=metric)
    print(paper_result_text(args.paper_result))
    print("recipe:")
    for key, entry in recipe.items():
        value = getattr(args, key)
        if value in (None, (), []):
            value = "(none)"
        print(f"  {as_flag(key, value):32} {Setting(*entry).help}")


def print_training_plan(args, dataset, sampler, weights):
    """Prints the part of --plan about the training: the number of steps, the learning rates and the
    losses. weights: {name of a loss: its weight}."""
    batch = args.ids * args.clips
    steps = len(make_sampler(sampler, [t.pid for t in dataset.train], args))
    shown = "show every tracklet at least once"
    if "epoch" in args:  # not in M3D's recipe
        shown = f"go through the {args.epoch}"
    print(f"an epoch: {steps:,} steps of {batch} clips, which {shown}, in all {steps * batch:,} "
          f"clips with {steps * batch * args.frames:,} frames")
    total = f"in all: {args.epochs:,} epochs, {steps * args.epochs:,} steps"
    if args.split == "all":
        total += " for each of ten splits"
    print(total)
    print("learning rate:")
    for first in range(1, args.epochs + 1, args.lr_step):  # the schedule of `train` in the scripts
        last = min(first + args.lr_step - 1, args.epochs)
        rate = args.lr * 0.1 ** ((first - 1) // args.lr_step)
        print(f"  epochs {first} to {last}: {rate:.3g}")
    terms = [f"{weight:g} x {name}" for name, weight in weights.items() if weight]
    print("loss: " + " + ".join(terms))


def print_test_plan(args, dataset, split_clips, networks, *, metric):
    """Prints the part of --plan about the test: when it is run and how much it reads. networks:
    [(network, clip length)]."""
    # keyed by the first frame, so that a query that is also in the gallery is counted once
    tracklets = {t.frames[0]: t for t in dataset.query + dataset.gallery}.values()
    num_clips = num_frames = 0
    for _, length in networks:
        for tracklet in tracklets:
            clips = split_clips(len(tracklet.frames), length)
            num_clips += len(clips)
            num_frames += clips.size
    when = ""
    if not args.evaluate:
        when = f" after epoch {args.epochs}"
        if args.eval_every:
            when += f" and every {args.eval_every} epochs"
    print(f"test{when}: {len(dataset.query):,} queries, {len(dataset.gallery):,} gallery "
          f"tracklets, {metric} distance; reads {len(tracklets):,} tracklets in "
          f"{num_clips:,} clips, {num_frames:,} frames in all")


def paper_result_text(result):
    """Returns what a paper reports for a variant, (mAP, rank-1) or None, in words."""
    reported = []
    for name, value in zip(("mAP", "rank-1"), result or ()):
        if value is not None:
            reported.append(f"{name} {value}")
    if not reported:
        return "the paper reports no result"
    return f"in the paper: {', '.join(reported)}"


# ----------------------------------------------------------------------------------- a training run

IMAGENET_FILE = "resnet50-0676ba61.pth"  # what torchvision downloads for --weights imagenet


class Run:
    """The parts of a training loop that are the same for all papers: device, checkpoints, log,
    evaluation and resuming. `train` in a script shows the order of the calls.

    Args:
        args: the settings, of `parse_args` or `part_of`.

    Attributes that the loop and the pictures use:
        args: the settings.
        device: the torch device.
        size: (height, width) of the frames.
        extract_options: the arguments batch_size, workers and amp of `extract`, a dict.
        evaluates_first: whether the network is tested before the training; set by `start`.
        history: the rows of log.csv so far, a list of dicts.
        before_training: {"mAP": percent, "rank-1": percent} of the network before its training, {}
            where it was not tested.
        origin: a phrase that says how the network was trained, such as "after epoch 3".

    Some of the attributes that only the methods use:
        steps: number of steps of the current epoch so far.
        loss_sums: sums of the losses of these steps, {name: number or tensor}.
    """

    def __init__(self, args):
        self.paper_result = vars(args).pop("paper_result", None)
        self.checkpoint = vars(args).pop("checkpoint", None)
        self.authors_release = vars(args).pop("authors_release", None)
        vars(args).pop("recipe", None)
        self.args = args
        self.device = pick_device(args.gpu)
        self.cuda = self.device.type == "cuda"
        if args.amp and self.cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
            print("--amp: this GPU does not support bfloat16; it is emulated, which is slow",
                  flush=True)
        if args.workers is None:
            args.workers = 0
            if self.cuda:
                args.workers = min(8, (os.cpu_count() or 1) // world_size())
        torch.manual_seed(args.seed)
        torch.backends.cudnn.benchmark = True  # worth it, because all clips have the same size
        self.size = (args.height, args.width)
        self.batch_size = args.ids * args.clips
        self.extract_options = {"batch_size": self.batch_size, "workers": args.workers,
                                "amp": args.amp}
        self.checkpoint_file = Path(args.output) / "last.pt"
        self.log_file = Path(args.output) / "log.csv"
        self.history = self.checkpoint["history"] if self.checkpoint else []
        self.before_training = {}
        if self.checkpoint:
            self.before_training = self.checkpoint.get("before_training", {})
        self.origin = "untrained"
        self.steps = 0
        self.loss_sums = {}
        self.states = {}  # {name: object with state_dict} of a checkpoint; set by `start`
        self.tensorboard = None  # a SummaryWriter
        self.num_logged = 0  # rows of the history that are written to TensorBoard for good
        self.can_be_tested = True  # whether any query has a match; set by `num_classes`

    @contextlib.contextmanager
    def setting_up(self):
        """A context in which a script makes the data set and the network: the first process of each
        machine runs it before the others do, because it may download weights or make data.

        A file of --weights is read on entry, unless the run is resumed: inside the context
        `args.weights` holds its state_dict. Errors about the settings or a download are raised as
        UserError.
        """
        args = self.args
        weights = args.weights
        cache = Path(torch.hub.get_dir(), "checkpoints")
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        if world_size() > 1 and not is_first:
            dist.barrier()
        if not args.resume:  # a checkpoint brings its own weights
            if weights not in ("imagenet", "none"):
                args.weights = backbone_weights(weights)  # `resnet50` takes a state_dict, too
            elif weights == "imagenet" and (cache / IMAGENET_FILE).exists():
                load_file(cache / IMAGENET_FILE)  # compares checksums, which torchvision does not
        try:
            with contextlib.redirect_stderr(sys.stdout):  # torch.hub reports a download to stderr
                yield
        except ValueError as error:
            raise UserError(f"{error}; check {SIZE_FLAGS}") from None
        except (OSError, RuntimeError) as error:
            # torch.hub raises OSError without a connection or disk space, and RuntimeError for a
            # wrong checksum
            is_about_file = isinstance(error, OSError) or "hash" in str(error)
            if args.resume or weights != "imagenet" or not is_about_file:
                raise
            raise UserError(f"--weights {weights}: the weights of torchvision's ResNet-50 are not "
                            f"available ({first_line(error)}): put {IMAGENET_FILE} into {cache}, "
                            "name the file with --weights, or use --weights none (for the "
                            "checkpoint of a run there is --resume)") from None
        finally:
            args.weights = weights
        if world_size() > 1 and is_first:
            dist.barrier()

    def num_classes(self, dataset):
        """Returns the number of identities of the classifier: that of the checkpoint, or else that
        of the data set. Raises UserError when a training is resumed on another number.

        Also keeps this number for the checkpoint, and whether the data set can be tested.
        """
        self.can_be_tested = dataset.has_a_match()
        here = dataset.num_identities or 1  # for an evaluation there may be no training part
        self.num_identities = here
        if self.checkpoint:
            self.num_identities = self.checkpoint["num_classes"]
        if not self.args.evaluate and self.num_identities != here:
            raise UserError(f"{self.args.resume}: was trained on {self.num_identities} identities, "
                            f"but {self.args.data} has {here}")
        return self.num_identities

    def prepare(self, model):
        """Returns the network on the device, in channels_last, with the weights of --resume or
        --init, and compiled with --compile."""
        args = self.args
        print(f"{args.variant}: {costs_in_words(model, args)}")
        if world_size() > 1 and self.cuda:
            # BatchNorm then takes its statistics over the batches of all processes
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for layer in model.to(self.device).modules():
            if isinstance(layer, torch.nn.Conv2d):  # the format is for weights of four dimensions
                layer.to(memory_format=torch.channels_last)
        if self.checkpoint:
            restore(args.resume, self.checkpoint, model=model)
            self.origin = trained_for(self.checkpoint)
        elif args.init:
            load_matching_weights(args.init, model, self.authors_release, args)
            self.origin = f"from {printable(args.init)}"
        else:
            self.origin = printable(getattr(model, "origin", "untrained"))
        if args.evaluate and not args.resume and self.origin.startswith("untrained"):
            print_trained_checkpoints(args)
        if args.compile and not args.figure:
            compile_if_possible(model, self.device)
        return model

    def loader(self, tracklets, sampler, sample):
        """Returns the DataLoader of the training, whose batches are clips and their identities.

        Args:
            tracklets: the training part, a list of `Tracklet`.
            sampler: class of the batch sampler, SAMPLER of a script.
            sample: function (n, T, rng) that draws the frames of a clip, SAMPLE of a script.
        """
        args = self.args
        batches = make_sampler(sampler, [t.pid for t in tracklets], args)
        print(f"{len(batches):,} steps of {self.batch_size} clips in an epoch, "
              f"{args.epochs * len(batches):,} in {args.epochs:,} epochs", flush=True)
        return torch.utils.data.DataLoader(
            TrainClips(tracklets, sample, args.frames, self.size, erase=args.erase),
            batch_sampler=batches, num_workers=args.workers, persistent_workers=args.workers > 0,
            worker_init_fn=ignore_terminal_signals, pin_memory=self.cuda,
            generator=torch.Generator())

    def start(self, **states):
        """Starts the training or resumes it, and returns the network to call in this process.

        states: the objects whose state a checkpoint holds: model, optimizer, scheduler. Raises
        UserError when the output folder holds another run, or the checkpoint does not fit.
        """
        args = self.args
        is_resumed_here = False
        if self.checkpoint:
            is_resumed_here = Path(args.resume).resolve() == self.checkpoint_file.resolve()
        if not is_resumed_here and (self.checkpoint_file.exists() or self.log_file.exists()):
            raise UserError(f"{args.output} already holds a run: resume it with --resume "
                            f"{self.checkpoint_file}, or name another --output")
        self.states = {**states, "random": RandomStates()}
        if self.checkpoint:
            restore(args.resume, self.checkpoint, **self.states)
            self.steps, self.loss_sums = self.checkpoint["progress"]
            print(f"resuming {printable(args.resume)} {trained_for(self.checkpoint)}")
            if self.history:
                # The optimiser has made steps in an earlier process. torch does not know, and
                # would warn that the schedule makes a step before the optimiser does.
                states["optimizer"]._opt_called = True
        warn_without_triplets(args)
        record_signals()
        if process_rank() == 0:
            # args.json stays locked until the process ends, so that no other run writes here
            self.lock = locked(self.checkpoint_file.with_name("args.json"),
                               json.dumps(vars(args), indent=2))
            if self.checkpoint:
                # a run that was killed between its checkpoint and its log has left an older log
                save_rows(self.history, self.log_file)
            if args.tensorboard:
                self.start_tensorboard()
        self.evaluates_first = args.eval_first and not self.checkpoint and self.can_be_tested
        self.checkpoint = None  # frees its memory
        model = states["model"]
        if world_size() > 1:
            return torch.nn.parallel.DistributedDataParallel(model)
        return model

    def epochs(self):
        """Returns the epochs to train. A run that is resumed after a finished epoch begins with
        that epoch once more: `batches` yields nothing for it, and only its test, if one is due, and
        its scheduler step are made up for."""
        first = self.current_epoch()
        return range(max(1, first), self.args.epochs + 1)

    def current_epoch(self):
        """Returns the number of the epoch of the last step; 0 before the first step of all."""
        finished = len(self.history)
        if self.steps:
            return finished + 1
        return finished

    def batches(self, loader, epoch):
        """Yields the remaining batches of an epoch, moved to the device, and then calls
        `end_epoch`, which after a signal writes a checkpoint and raises `Stop`."""
        if epoch <= len(self.history):  # it was finished before the run was resumed
            return
        sampler = loader.batch_sampler
        if not 0 <= self.steps < len(sampler):
            raise UserError(f"{self.args.resume}: was stopped after step {self.steps}, but an "
                            f"epoch of this training set has {len(sampler)} steps")
        start_time = time.time()
        first_step = self.steps
        sampler.set_epoch(epoch, first_step)
        with progress(what=f"epoch {epoch}/{self.args.epochs}",
                      total=len(loader) * self.batch_size, unit=" clips",
                      hidden=process_rank() > 0, leave=False,
                      bar_format="{desc} |{bar}| {remaining} left, {rate_noinv_fmt}{postfix}"
                      ) as bar:
            for batch in loader:
                yield [part.to(self.device, non_blocking=True) for part in batch]
                bar.update(self.batch_size)
                # Reading the loss synchronises with the GPU, and checking for signals with the
                # other processes, so on a GPU both happen only every 10 steps.
                has_own_signal = world_size() == 1 and _stop_signal != 0
                if not self.cuda or self.steps % 10 == 0 or has_own_signal:
                    bar.set_postfix(loss=self.mean_losses()["loss"])
                    if stop_signal():
                        break
        sampler.set_epoch(epoch)  # len(sampler) counts the batches of the whole epoch again
        seconds = time.time() - start_time
        self.end_epoch(epoch, is_complete=self.steps == len(sampler), seconds=seconds,
                       num_clips=(self.steps - first_step) * self.batch_size)

    def end_epoch(self, epoch, *, is_complete, seconds, num_clips):
        """Adds an epoch to the log, writes a checkpoint if one is due, and prints the line of the
        epoch. Raises `Stop` after a signal.

        Args:
            epoch: its number.
            is_complete: False when a signal has ended its batches.
            seconds, num_clips: duration and number of clips since the epoch was started or
                resumed.
        """
        line = ""
        if is_complete:
            values = {"lr": self.states["optimizer"].param_groups[0]["lr"], **self.mean_losses()}
            self.add_to_history(epoch, values)
            text = "  ".join(f"{name} {value:.3g}" for name, value in values.items())
            line = (f"epoch {epoch}/{self.args.epochs}: {text}  ({seconds:.0f} s, "
                    f"{num_clips / seconds:.3g} clips/s)")
        signal_number = stop_signal()
        is_due = is_complete and (epoch == self.args.epochs or self.test_is_due(epoch)
                                  or epoch % self.args.checkpoint_every == 0)
        if is_due or signal_number:
            self.save()
        elif line:
            line += f", not yet in {self.checkpoint_file.name}"
        if line:  # printed only now: an epoch is done when its checkpoint is written
            print(line, flush=True)
        if signal_number:
            raise Stop(signal_number)
        raise_if_stopped()

    def add_to_history(self, epoch, values):
        """Adds the row of an epoch to the history, and begins the next epoch. values: {name:
        number}. Raises UserError when the earlier rows have other columns."""
        row = {"epoch": epoch, **values, "mAP": "", "rank-1": ""}
        if self.history and [*row] != [*self.history[0]]:
            raise UserError(f"{self.args.resume}: the columns of its log are "
                            f"{', '.join(self.history[0])}, but those of this training are "
                            f"{', '.join(row)}")
        self.history.append(row)
        self.steps = 0
        self.loss_sums = {}

    def backward(self, loss):
        """Computes the gradients of the loss of the whole batch.

        With several processes, each has gradients only through its own part of the batch (see
        `gather`), so the gradients must be summed. DistributedDataParallel averages them; the
        factor undoes this.
        """
        (loss * world_size()).backward()

    def log(self, parts):
        """Counts a step and adds its losses to the sums of the epoch. parts: {name: scalar tensor}.
        The sums stay on the device, so that nothing waits for a GPU."""
        self.steps += 1
        values = {name: part.detach().double() for name, part in parts.items()}
        values = {"loss": sum(values.values()), **values}
        for name, value in values.items():
            self.loss_sums[name] = self.loss_sums.get(name, 0.0) + value

    def mean_losses(self):
        """Returns the means of the losses of the current epoch so far, {name: number}. Raises
        UserError when the loss is not finite."""
        self.loss_sums = {name: float(total) for name, total in self.loss_sums.items()}
        means = {name: total / self.steps for name, total in self.loss_sums.items()}
        if not math.isfinite(means["loss"]):
            text = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
            raise UserError(f"epoch {len(self.history) + 1}, step {self.steps}: the loss is not "
                            f"finite ({text}); the last checkpoint, if there is one, is not "
                            "affected; try a smaller --lr")
        return means

    def save(self):
        """Writes last.pt and log.csv. Raises UserError when a weight is not finite."""
        if not all(p.isfinite().all() for p in self.states["model"].parameters()):
            raise UserError(f"epoch {self.current_epoch()}: the weights are not finite; the last "
                            "checkpoint, if there is one, is not affected; try a smaller --lr")
        if process_rank() == 0:
            states = {name: target.state_dict() for name, target in self.states.items()}
            with without_interrupts():
                with replacing(self.checkpoint_file) as file:
                    torch.save({"script": self.args.script, "args": vars(self.args),
                                "num_classes": self.num_identities, "history": self.history,
                                "before_training": self.before_training,
                                "progress": (self.steps, self.loss_sums), **states}, file)
                save_rows(self.history, self.log_file)
                self.write_tensorboard()

    def start_tensorboard(self):
        """Opens the log for TensorBoard, or says that it is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            print(f"--tensorboard: not available ({first_line(error)}); the training continues "
                  "without it", flush=True)
            return
        # purge_step=0 hides the points of an earlier process: all rows are written again
        self.tensorboard = SummaryWriter(self.args.output, purge_step=0)
        self.write_tensorboard()

    def write_tensorboard(self):
        """Writes the new rows of the history for TensorBoard. The last row is written again next
        time, because its test may not be done yet."""
        if self.tensorboard is None:
            return
        for row in self.history[self.num_logged:]:
            for key in row.keys() - {"epoch"}:
                if row[key] != "":
                    self.tensorboard.add_scalar(key, row[key], row["epoch"])
            self.tensorboard.flush()
            self.num_logged = row["epoch"] - 1

    def test_is_due(self, epoch):
        """Returns whether a test follows this epoch, which is complete: after the last one and
        after every --eval-every epochs, unless the epoch was tested already. --export makes a test
        after the last epoch in any case, even where there is nothing to test."""
        is_last = epoch == self.args.epochs
        if is_last and self.args.export is not None:
            return True
        is_due = is_last
        if self.args.eval_every:
            is_due = is_last or epoch % self.args.eval_every == 0
        return is_due and self.can_be_tested and self.history[-1]["mAP"] == ""

    def test(self, model, dataset, split, metric):
        """Tests the network, adds the result to the row of the epoch if there is one, and returns
        it; {} where no query has a match.

        Args:
            model: the network.
            dataset: a `Dataset`.
            split: function (n, T) that cuts a tracklet into clips, SPLIT of a script.
            metric: "cosine" or "euclidean", METRIC of a script.
        """
        args = self.args
        belongs_to_epoch = bool(self.states and self.history)
        if belongs_to_epoch:
            self.origin = f"after epoch {len(self.history)}"
        if not self.can_be_tested and not args.export:
            if "evaluate" in args.chosen:
                raise UserError(f"{args.data} in {args.root}: {NO_MATCH}; with --export the "
                                "features are written all the same")
            return {}  # the last stage of M3D is only a test, and is skipped without a match
        is_last = args.evaluate or len(self.history) == args.epochs
        result = evaluate(model, dataset, split_clips=split, clip_length=args.frames,
                          size=self.size, metric=metric, use_rerank=args.rerank,
                          label=f"{args.variant}, {self.origin}",
                          export_folder=args.export if is_last else None, **self.extract_options)
        if result and belongs_to_epoch:
            self.history[-1].update({key: result[key] for key in ("mAP", "rank-1")})
            self.save()
            raise_if_stopped()
        elif result and self.states:  # a test before the first epoch
            self.before_training = {key: result[key] for key in ("mAP", "rank-1")}
        elif result and args.evaluate and not self.origin.startswith("untrained"):
            self.print_with_paper(result)
        return result

    def print_with_paper(self, result):
        """Prints the result of a trained network next to that in the paper for its variant."""
        print(f"{self.args.variant} on {self.args.data}, {self.origin}: mAP {result['mAP']:.1f}, "
              f"rank-1 {result['rank-1']:.1f}; {paper_result_text(self.paper_result)}", flush=True)

    def finish(self):
        """Prints the last epoch's test result next to that in the paper. Returns the epoch's row of
        the log."""
        result = self.history[-1]
        if result["mAP"] != "":
            self.origin = f"after epoch {len(self.history)}"
            self.print_with_paper(result)
        return result


def compile_if_possible(model, device):
    """Compiles a network with torch.compile, or says why this machine cannot."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))  # a small trial
        model.compile()
    except Exception as error:  # torch.compile raises many kinds of exceptions
        print(f"--compile: failed ({first_line(error)}); the run continues without it", flush=True)


def print_trained_checkpoints(args):
    """Prints that an untrained network is evaluated, and the checkpoints in the output folder of
    these settings: one of them may be what the user had in mind."""
    print(f"{args.variant} is untrained here, because --resume was not given", flush=True)
    folder = Path(args.output)
    for last in sorted([*folder.glob("last.pt"), *folder.glob("*/last.pt")]):
        name = printable(last)
        print(f"  {name} contains a trained network; to evaluate it: --resume {name}", flush=True)


def warn_without_triplets(args):
    """Prints that losses which compare clips of an identity are 0 with --clips 1."""
    if args.clips > 1 or "margin" not in args or vars(args).get("loss") == "xent":
        return
    are_zero = "the triplet loss is"
    if vars(args).get("lambda2"):  # the weight of SINet's mutual information loss L_mi
        are_zero = "the triplet loss and L_mi are"
    print(f"--clips 1: {are_zero} 0, because no batch has two clips of an identity to compare",
          flush=True)


def make_sampler(sampler, pids, args):
    """Returns the batch sampler of a training.

    sampler: its class, SAMPLER of the script; pids: the identities of the training tracklets; args:
    the settings.
    """
    options = {}
    if "epoch" in args:  # what an epoch shows, a setting of some recipes
        options["shows"] = args.epoch
    return sampler(pids, args.ids, args.clips, seed=args.seed, rank=process_rank(),
                   world=world_size(), **options)


class RandomStates:
    """The states of torch's random generators, on the CPU and on all GPUs, as a checkpoint holds
    them: a list of the CPU's state and then one state per GPU."""

    def state_dict(self):
        return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]

    def load_state_dict(self, states):
        cpu_state, *gpu_states = states
        torch.set_rng_state(cpu_state)
        num_gpus = torch.cuda.device_count()
        torch.cuda.set_rng_state_all(gpu_states[:num_gpus])  # there may be fewer than there were


def trained_for(checkpoint):
    """Returns how long the network of a checkpoint was trained, in words."""
    if checkpoint.get("release"):
        return "the authors' release"
    epochs = len(checkpoint["history"])
    steps, _ = checkpoint.get("progress", (0, {}))
    if steps:
        return f"after {steps} steps of epoch {epochs + 1}"
    if epochs:
        return f"after epoch {epochs}"
    return "untrained"


# -------------------------------------------------------------------------------------- checkpoints
# last.pt of a run is a dict:
#
#     script            file name of the script
#     args              {name: value} of all settings
#     num_classes       number of identities of the classifier
#     history           the rows of log.csv, a list of dicts; mAP and rank-1 of an epoch that was
#                       not tested are ""
#     before_training   test result before the training, {} if there was no such test
#     progress          (steps done in the unfinished epoch, {name of a loss: its sum over these})
#     model, optimizer, scheduler, random
#                       states, as `state_dict` returns them; random is that of `RandomStates`

class Release:
    """Trained weights that the authors of a paper offer for download, and how they become a
    checkpoint of the script.

    Args:
        read: function of a state_dict; returns None if the state_dict is not the authors',
            otherwise (variant, settings inferred from the shapes, state_dict with the script's
            names).
        chunk: {data set: default of --chunk}, for the data sets whose training tracklets the
            authors cut into pieces of another length than that of CHUNK in data.py. It holds with
            and without --release.
        settings: settings of the recipe that --release changes; --release also changes the
            modules, in the script's `build`.
    """

    def __init__(self, read, *, chunk=None, **settings):
        self.read = read
        self.chunk = chunk or {}
        self.settings = settings

    def to_checkpoint(self, file, script):
        """Returns the contents of a file, a dict, as a checkpoint of a script, or None if it is not
        of the authors' release."""
        state = state_dict_in(file)
        if not all(map(torch.is_tensor, state.values())):
            return None
        state = without_prefix(state, lambda part: self.read(part) is not None)
        if state is None:
            return None
        variant, inferred, model = self.read(state)
        args = {"data": "mars", "root": FLAGS["root"].default, "variant": variant, "small": False}
        args.update(self.settings)
        args.update(inferred)
        args["release"] = True
        return {"script": script, "args": args, "num_classes": len(model["classifier.weight"]),
                "history": [], "model": model, "release": True}


# the dictionaries in which training programs wrap a state_dict
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "module",
            "backbone", "weights", "params")


def state_dict_in(file):
    """Returns the state_dict in the contents of a file, a dict: the usual wrappers are opened."""
    for _ in range(9):  # not forever: a file may hold a dict that holds itself
        wrapped = [file[name] for name in WRAPPERS if isinstance(file.get(name), dict)]
        if wrapped:
            file = wrapped[0]
    return file


def without_prefix(state, fits):
    """Returns the part of a state_dict for which the function `fits` is true, or None. A part is
    all of it, or the entries with a common prefix, such as "module." or "backbone.", without this
    prefix."""
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


def describe_mismatch(state, own):
    """Returns in words how a state_dict differs from `own`, that of the network: its first
    name that the network does not have and the first name that it lacks or, if the names agree, the
    first shape that is different. Returns "" without a difference."""
    more = [name for name in state if name not in own]
    missing = [name for name in own if name not in state]
    differences = []
    if more:
        differences.append(f"it has {more[0]!r}, which the network does not have")
    if missing:
        differences.append(f"it lacks {missing[0]!r}")
    if differences:
        return ", and ".join(differences)
    for name, value in own.items():
        shape = getattr(state[name], "shape", None)
        if shape != value.shape:
            has = "no shape" if shape is None else f"the shape {list(shape)}"
            return f"its {name!r} has {has}, that of the network {list(value.shape)}"
    return ""


def backbone_weights(path):
    """Returns the state_dict in a file of --weights, in the names of torchvision's ResNet-50 and
    without its classifier. Prints what else is in the file; raises UserError if it does not fit."""
    with torch.device("meta"):
        net = torchvision.models.resnet50()
    own = {name: value for name, value in net.state_dict().items() if not name.startswith("fc.")}
    layers = {name.partition(".")[0] for name in own}
    # files of old versions of torch have no num_batches_tracked
    required = {name for name in own if not name.endswith("num_batches_tracked")}
    everything = state_dict_in(load_file(path))
    state = without_prefix(everything, lambda part: required <= part.keys())
    if state is None:  # for the message: the part that comes closest
        state = without_prefix(everything, lambda part: "conv1.weight" in part) or everything
    weights = {}
    unused = []
    for name, value in state.items():
        first = str(name).partition(".")[0]
        if first in layers:
            weights[name] = value
        elif first != "fc":
            unused.append(first)
    expected = {name: value for name, value in own.items() if name in required or name in weights}
    wrong = describe_mismatch(weights, expected)
    if wrong:
        raise UserError(f"--weights {path}: does not fit torchvision's ResNet-50: {wrong} (the "
                        f"first entry of the file is {next(iter(everything), None)!r})")
    # Find the prefix that `without_prefix` has removed: the name of the same tensor in the file
    # still has it.
    for name, value in everything.items():
        if value is state["conv1.weight"]:
            prefix = str(name).removesuffix("conv1.weight")
            break
    for name in map(str, everything):
        if not name.startswith(prefix):
            unused.append(name.partition(".")[0])
    if unused:
        names = textwrap.shorten(", ".join(dict.fromkeys(unused)), 160)
        print(f"--weights {path}: in the file, but not used: {names}")
    return weights


def read_file_or_release(path, *, script, release):
    """Returns the contents of a file, a dict. A file of the authors' release is converted to a
    checkpoint of the script; anything else is neither converted nor checked.

    script: the file name of the script; release: its `Release`, or None.
    """
    file = load_file(path)
    file.pop("release", None)  # no run writes this entry: it marks what is converted below
    if release is None:
        return file
    try:
        converted = release.to_checkpoint(file, script)
    except Exception:  # the tensors may have any names and shapes
        raise UserError(f"{path}: looks like a file of the authors' release, but its tensors have "
                        "other names or shapes") from None
    return file if converted is None else converted


def load_checkpoint(path, *, script, recipe, rows, expected, may_differ, chosen, for_training=True,
                    release=None):
    """Returns a checkpoint of a script whose contents and settings are checked. Its `args` are the
    settings that a run takes from it.

    Args:
        path: the file, last.pt of a run or, with a `release`, that of the authors.
        script: the file name of the script.
        recipe, rows: RECIPE and ROWS of the script.
        expected: settings {name: value} that must equal those in the checkpoint where it has them.
        may_differ: names of settings that are exempt from this.
        chosen: names of the flags given by the user; a setting of the recipe that an older
            checkpoint lacks must be among them.
        for_training: whether optimizer, scheduler, progress and random must be there, and the
            epochs must not be more than expected.
        release: the script's `Release`, or None.

    Raises UserError if the file is not such a checkpoint or contradicts `expected`.
    """
    checkpoint = read_file_or_release(path, script=script, release=release)
    try:
        # the weights may be in a wrapper of their own
        checkpoint["model"] = state_dict_in({"model": checkpoint["model"]})
        is_ours = is_checkpoint(checkpoint, script, rows)
    except Exception:  # the file may hold any objects
        is_ours = False
    if not is_ours:
        message = f"{path}: not a checkpoint of {script}"
        if "args" not in checkpoint:
            first = next(iter(state_dict_in(checkpoint)), None)
            message += (f" (its first entry is {first!r}); to load weights without settings, use "
                        "--init")
        raise UserError(message)
    saved = checked_settings(path, checkpoint, recipe=recipe, rows=rows, chosen=chosen)
    checkpoint["args"] = saved
    if for_training and not {"optimizer", "scheduler", "progress", "random"} <= checkpoint.keys():
        raise UserError(f"{path}: contains only the network, so that it can be evaluated but "
                        "not resumed; --init starts a new training from it")
    compared = (expected.keys() & saved.keys()) - may_differ
    for name in sorted(compared):
        if expected[name] != saved[name]:
            raise UserError(f"{path}: was trained {with_or_without(name, saved[name])}, not "
                            f"{with_or_without(name, expected[name])}")
    if for_training:
        steps, _ = checkpoint["progress"]
        begun = len(checkpoint["history"]) + (steps > 0)
        if begun > expected.get("epochs", begun):
            raise UserError(f"{path}: stopped {trained_for(checkpoint)}, but --epochs says "
                            f"{expected['epochs']}")
    return checkpoint


def is_checkpoint(file, script, rows):
    """Returns whether a file holds what a run of the script writes. Checks only script, variant,
    data set, root, progress, history and number of classes; `checked_settings` and `restore` check
    the rest. Other contents may also raise an exception of any kind."""
    args = file["args"]
    if file["script"] != script or args["variant"] not in rows:
        return False
    if args["data"] not in DATA_SETS or not isinstance(args["root"], str):
        return False
    steps, loss_sums = file.get("progress", (0, {}))
    numbers = [steps, *loss_sums.values(), *file.get("before_training", {}).values()]
    num_classes = file["num_classes"]
    history = file["history"]
    if not isinstance(history, (list, tuple)):
        return False
    if history:
        losses = [*history[0]][2:-2]  # between the columns that every log has
        columns = ["epoch", "lr", *losses, "mAP", "rank-1"]
        if "loss" not in losses or not loss_sums.keys() <= {*columns}:
            return False
        for epoch, row in enumerate(history, 1):
            if [*row] != columns or row["epoch"] != epoch:
                return False
            numbers += [value for value in row.values() if value != ""]
    if not all(isinstance(number, (int, float)) for number in numbers):
        return False
    model = file["model"]
    if not model:
        return True
    # the classifier has one row for each class, whatever its name is
    return num_classes in [len(weight) for weight in model.values() if weight.dim()]


def checked_settings(path, checkpoint, *, recipe, rows, chosen):
    """Returns the settings in a checkpoint that a run takes from it, {name: value}.

    Raises UserError for a value that the flag of the setting does not take, and when a setting of
    the recipe is neither in the checkpoint nor among the names of flags in `chosen`. A file of the
    authors' release has few settings: the others are those of the recipe.
    """
    saved = checkpoint["args"]
    taken = {}
    _, actions = make_parser(recipe, rows, "")
    for name, action in actions.items():
        if name not in saved or name in NOT_RESTORED:
            continue
        value = saved[name]
        may_be_none = name == "init"
        if name in recipe:
            may_be_none = Setting(*recipe[name]).paper is None
        is_absent = value is None and may_be_none
        is_all_splits = name == "split" and value == "all"  # which no single run has
        if is_all_splits or not (is_absent or flag_accepts(action, value)):
            shown = textwrap.shorten(repr(value), 60)
            raise UserError(f"{path}: its setting {name} is {shown}, which {as_flag(name)} does "
                            "not take")
        taken[name] = value
    missing = [as_flag(name) for name in recipe if name not in saved and name not in chosen]
    if missing and not checkpoint.get("release"):
        raise UserError(f"{path}: was written by an earlier version, without these settings: "
                        f"{' '.join(missing)}. Give them as flags, with the values of that run (in "
                        "Python as arguments of load)")
    return taken


def same_structure(value, reference):
    """Returns whether a value has the types and lengths of a reference, also inside its lists and
    dicts. A dict may have more keys than that of the reference."""
    if isinstance(reference, dict):
        value = [value.get(key) for key in reference]
        reference = [*reference.values()]
    if isinstance(reference, (list, tuple)):
        return len(value) == len(reference) and all(map(same_structure, value, reference))
    if value is None and reference is True:
        return True  # older checkpoints hold None for the optimiser's `fused`
    return isinstance(value, type(reference))


def restore(path, checkpoint, **objects):
    """Loads the states in a checkpoint into objects of the same names. Raises UserError when one
    does not fit. path: the file, for the message."""
    for name, target in objects.items():
        state = checkpoint[name]
        wrong = ""
        try:
            own = target.state_dict()
            if isinstance(target, torch.nn.Module):
                state = without_prefix(state, lambda part: part.keys() == own.keys()) or state
                wrong = describe_mismatch(state, own)
            target.load_state_dict(state)
            check_restored(target, own)
        except Exception as error:  # a state of another network raises many kinds of exceptions
            reason = wrong or last_line(error)
            raise UserError(f"{path}: its {name} does not fit ({reason})") from None


def check_restored(target, own):
    """Raises ValueError if the loaded state has other types or shapes than it should have. own: the
    object's state_dict before loading."""
    fits = same_structure(target.state_dict(), own)
    for parameter, state in getattr(target, "state", {}).items():  # of an optimiser
        for value in state.values():
            if value is not None and value.shape not in ((), parameter.shape):
                fits = False
    if not fits:
        raise ValueError("its types or shapes are not those that a run writes")


def load_matching_weights(path, model, release, args):
    """--init: loads the weights of a file that match the network in name and shape. Prints which
    weights of the network and of the file were left over.

    The classifier is only taken if the file was trained on the same identities, that is on the data
    set and the split of this run.

    Args:
        path: last.pt of a run, a file of the authors' release, or one of weights alone.
        model: the network.
        release: the script's `Release`, or None.
        args: the settings of this run.
    """
    file = read_file_or_release(path, script="", release=release)
    own = model.state_dict()
    state = weights_with_prefix(path, file, "", own)
    matching = {}
    for name, value in state.items():
        if name in own and getattr(value, "shape", None) == own[name].shape:
            matching[name] = value
    if not matching:
        raise UserError(f"{path}: has no weights that fit this network: "
                        f"{describe_mismatch(state, own)}")
    classifier = [name for name in own if name.startswith("classifier.")]
    reason_unused = why_identities_differ(file, args)
    if classifier and not reason_unused and not matching.keys() >= {*classifier}:
        reason_unused = "its shape is different"
    used = matching
    if reason_unused:
        used = {name: matching[name] for name in matching if not name.startswith("classifier.")}
    model.load_state_dict(used, strict=False)
    print(f"starting from {path}")

    def print_unused(text, names):
        layers = dict.fromkeys(name.rpartition(".")[0] for name in names if name not in used)
        if layers:
            print(f"  {text}: {printable(textwrap.shorten(', '.join(layers), 160))}")

    print_unused("keeps its initialisation", own)
    print_unused("in the file, but not used", state)
    if classifier and reason_unused:
        print(f"  the classifier of the file is not used, because {printable(reason_unused)}")
    elif classifier:
        print("  the classifier of the file is used, because it was also trained on "
              f"{printable(describe_identities(vars(args)))}")


def why_identities_differ(file, args):
    """Returns in words why the classifier in a file was not trained on the identities of a run with
    these settings; "" if it was."""
    saved = file.get("args")
    if file.get("release"):
        return "the authors' release does not say on which data set it was trained"
    if not isinstance(saved, dict) or "data" not in saved:
        return "the file does not say on which data set it was trained"
    theirs = describe_identities(saved)
    ours = describe_identities(vars(args))
    if theirs == ours:
        return ""
    return f"the file was trained on {theirs}, and this run is on {ours}"


def describe_identities(values):
    """Describes the set of identities of a run with these settings {name: value}, for comparison
    and messages: the data set, plus the split if it has splits, plus the folder for `folder` and
    `synthetic`."""
    data = values["data"]
    if data in SPLIT_SETS:
        return f"{data}, split {values.get('split')}"
    if data in ("folder", "synthetic"):
        return f"{data} in {os.path.abspath(str(values.get('root')))}"
    return str(data)


def weights_with_prefix(path, checkpoint, prefix, network_state=None):
    """Returns the weights in a checkpoint whose names start with a prefix, without the prefix.

    Args:
        path: the file, for the message.
        checkpoint: its contents.
        prefix: such as "streams.spatial."; "" takes all weights.
        network_state: state_dict of the network, or None if it is not known.

    In the file the names may have another prefix before this one, such as "module.", which is
    removed. The right part of the file is the one that has a name of network_state or, if this is
    None, a name that begins with `prefix`.

    Raises UserError when there are no such weights.
    """
    model = state_dict_in(checkpoint)

    def fits(part):
        if network_state:
            return not part.keys().isdisjoint(network_state)
        return any(str(name).startswith(prefix) for name in part)

    part = without_prefix(model, fits) or {}
    state = {}
    for name, value in part.items():
        if str(name).startswith(prefix):
            state[str(name).removeprefix(prefix)] = value
    if state:
        return state
    message = f"contains no weights named {prefix}* of a run"
    if not prefix:
        message = "contains no weights of a network"
    if network_state and any(map(torch.is_tensor, model.values())):
        message = f"has no weights that fit this network: {describe_mismatch(model, network_state)}"
    elif model:
        message += f" (its first entry is {next(iter(model))!r})"
    raise UserError(f"{path}: {message}")


def load_part(path, prefix, module=None):
    """Returns the weights in a run's last.pt whose names start with a prefix, without the prefix,
    and loads them into a module if one is given. Raises UserError when they do not fit."""
    state = weights_with_prefix(path, load_file(path), prefix)
    if module:
        restore(path, {"network": state}, network=module)
    return state


def load_network(path, build, given=None, *, recipe, rows, release, script):
    """Returns the network of a checkpoint, in eval mode on the CPU. Its settings are in its `args`,
    and `origin` says how it was trained.

    Args:
        path: the file, last.pt of a run or that of the authors' release.
        build: function (settings, number of identities) that returns the network.
        given: settings {name: value} that a checkpoint of an earlier version lacks.
        recipe, rows, release: RECIPE, ROWS and RELEASE of the script.
        script: the script's file.

    Raises UserError for a file that is none of these, and TypeError for settings that are not in
    the recipe.
    """
    given = given or {}
    if not given.keys() <= recipe.keys():
        raise TypeError(f"load takes settings of the recipe, not {', '.join(given)}")
    checkpoint = load_checkpoint(path, script=Path(script).name, recipe=recipe, rows=rows,
                                 expected=given, may_differ=set(), chosen=given,
                                 for_training=False, release=release)
    saved = checkpoint["args"]
    small = saved.get("small", saved["data"] == "synthetic")
    args = settings(recipe, rows, saved["variant"], small, **given)
    vars(args).update(saved, resume=str(path))
    try:
        model = build(args, checkpoint["num_classes"])
    except ValueError as error:
        raise UserError(f"{path}: its settings do not go together ({last_line(error)})") from None
    if checkpoint["model"].get("neck.weight", torch.empty(0)).dtype == torch.float64:
        model.double()  # a file in float64 gives a network in float64
    restore(path, checkpoint, model=model)
    model.args = args
    model.origin = trained_for(checkpoint)
    return model.eval()


# ------------------------------------------------------------------------- processes, signals, exit
# torchrun starts world_size() processes with the ranks 0, 1 and so on. Without it there is a single
# process of rank 0. A training batch has --ids x --clips clips in all, and every process runs an
# equal part of it. In a test, every process runs batches of its own.

def world_size():
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank():
    """Returns the rank of this process. Only the process of rank 0 prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def pick_device(gpu=None):
    """Returns the device of this process and prints it. A GPU becomes torch's current device. Under
    torchrun, the process then joins the others.

    gpu: what --gpu says: the number of a GPU, also as "cuda:1", or "cpu". None: the first GPU
    (under torchrun, the GPU of LOCAL_RANK), or the CPU if there is no GPU. Raises UserError for a
    device that is not available.
    """
    num_gpus = torch.cuda.device_count()
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine
    there = "no GPU was found"
    if num_gpus:
        there = f"there are GPUs 0 to {num_gpus - 1}" if num_gpus > 1 else "there is GPU 0"
    if gpu is None:
        if num_processes > 1 and 0 < num_gpus < num_here:
            raise UserError(f"torchrun needs a GPU for each process, but here are {num_here} "
                            f"processes and {num_gpus} GPUs: start fewer processes, or use --gpu "
                            "cpu")
        name = os.environ.get("LOCAL_RANK", "0") if num_gpus else "cpu"
    else:
        name = gpu.lower()
        if name == "cuda":  # torch's name of the first GPU
            name = "0"
        elif name.startswith("cuda:") and name != "cuda:":
            name = name.removeprefix("cuda:")
        if name != "cpu" and not re.fullmatch("[0-9]+", name):
            raise UserError(f"--gpu {gpu}: {there}; --gpu takes the number of a CUDA GPU, or cpu")
        if num_processes > 1 and name != "cpu":
            raise UserError(f"--gpu {gpu}: torchrun gives every process a GPU of its own: leave "
                            "--gpu out, or use --gpu cpu")
    if name not in ("cpu", *map(str, range(num_gpus))):
        raise UserError(f"--gpu {gpu or name}: {there}")
    device = torch.device("cpu" if name == "cpu" else f"cuda:{name}")
    on_gpu = device.type == "cuda"
    if on_gpu:
        # This comes first, because NCCL, a DataLoader that pins memory, and torch's questions about
        # "the" GPU, such as whether it supports bfloat16, all take the current device.
        torch.cuda.set_device(device)
    if num_processes > 1 and not dist.is_initialized():
        # Long, because the other processes wait while the first one downloads weights or makes
        # data. When a process dies, torchrun ends the others.
        timeout = datetime.timedelta(hours=2)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    if on_gpu:
        what = torch.cuda.get_device_name(device)
    elif num_gpus:
        what = f"{num_gpus} GPUs found, but not used"
    else:
        what = "no GPU found"
    line = f"device: {device} ({what})"
    if num_processes > 1:
        line += f", {num_processes} processes"
    print(line)
    return device


def gather(outputs):
    """Returns the outputs of all processes, joined along the batch: a tensor, or lists and dicts of
    tensors.

    Each process then computes the loss of the whole batch, but only its own part of the outputs
    carries gradients. The sum of the processes' gradients is that of a single process with the
    whole batch.
    """
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
    """Raised when a signal has asked a run to stop; its argument is the number of the signal."""


_stop_signal = 0  # the signal that has asked this process to stop
_is_writing = False  # whether a second Ctrl-C is ignored, see `without_interrupts`


def record_signals():
    """Makes this process record a signal to stop, which `stop_signal` then returns, instead of
    ending at once. A second Ctrl-C still ends it at once, except within `without_interrupts` and
    where there are several processes."""
    def record(number, _):
        global _stop_signal
        is_second_ctrl_c = number == signal.SIGINT and _stop_signal == signal.SIGINT
        if is_second_ctrl_c and not _is_writing and world_size() == 1:  # torchrun may send it twice
            raise KeyboardInterrupt
        if not _stop_signal:
            _stop_signal = number

    numbers = [signal.SIGINT, signal.SIGTERM]
    # SIGHUP is sent when the terminal closes. It does not exist on Windows, and under nohup it
    # stays ignored.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, record)


@contextlib.contextmanager
def without_interrupts():
    """A context in which a second Ctrl-C does not end the program, so that a file is written
    completely."""
    global _is_writing
    _is_writing = True
    try:
        yield
    finally:
        _is_writing = False


def ignore_terminal_signals(_):
    """worker_init_fn of a DataLoader: moves the worker into a process group of its own. A terminal
    sends Ctrl-C to the whole group of a run, but its workers must live on until the end of the
    step."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def stop_signal():
    """Returns the signal that has asked any of the processes to stop, or 0. All processes must call
    it together."""
    if world_size() == 1:
        return _stop_signal
    number = torch.tensor(_stop_signal, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def raise_if_stopped():
    """Raises `Stop` when a signal has asked any of the processes to stop. All processes must call
    it together."""
    number = stop_signal()
    if number:
        raise Stop(number)


def tell_torchrun(line):
    """Writes the line of an error into the file that torchrun names. torchrun prints some fifty
    lines when a process has failed, and quotes the file of the first such process at their end."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": line, "timestamp": int(time.time())}
        error = {"message": {"message": line, "extraInfo": extra}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(error))


def command_line(main):
    """Runs main() of a script. An error that a user can cause ends the program with one line and an
    exit code, in the place of a traceback."""
    if os.environ.get("RANK", "0") != "0":  # only the first process prints
        sys.stdout = open(os.devnull, "w")
    # file names may contain bytes that cannot be encoded
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except (Exception, KeyboardInterrupt) as error:
        code_and_message = exit_code_and_message(error)
        if code_and_message is None:
            raise
        code, message = code_and_message
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    rank = process_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))
    if code == 2 and os.environ.get("LOCAL_RANK", "0") != "0":
        # All processes refuse a wrong setting, and the first process of a machine is to say so. The
        # others wait here until torchrun ends them. If one of them ended by itself, torchrun might
        # end the first process before its line is printed.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    program = Path(sys.argv[0]).name
    if rank:
        program += f": process {rank}"
    line = printable(f"{program}: {message}")
    print(line, file=sys.stderr, flush=True)
    tell_torchrun(line)
    sys.stdout.flush()
    if dist.is_initialized():
        os._exit(code)  # a normal exit can wait for processes that are gone
    sys.exit(code)


def exit_code_and_message(error):
    """Returns the exit code and the message of an exception that ends a script, or None for one
    that is a mistake in the program.

    The exit codes are 2 if the user has to change a setting or a file, also when memory runs out;
    1 if a loader process or the connection to another process has failed; 128 + n after signal n,
    where Ctrl-C is signal 2 and a closed output pipe counts as signal 13.
    """
    resume = "the same command with --resume continues"
    if isinstance(error, UserError):
        if any(word.startswith(("--local-rank", "--local_rank")) for word in sys.argv[1:]):
            return 2, ("python -m torch.distributed.launch adds --local-rank, which this script "
                       "does not take: use torchrun with the same flags instead")
        return 2, str(error)
    if isinstance(error, Stop):
        number = error.args[0]
        return 128 + number, f"stopped by {signal.Signals(number).name}; {resume}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, BrokenPipeError):
        return 141, "stopped, because its output pipe was closed"
    if not isinstance(error, (RuntimeError, MemoryError)):
        return None
    resume += " from the last checkpoint"
    # if a loader process was killed, the reason is in error.__cause__
    text = f"{error} {error.__cause__}".lower()
    if isinstance(error, MemoryError) or "out of memory" in text or "cpuallocator" in text:
        return 2, "out of memory: reduce --ids, --clips, --height or --width, or use --amp"
    if "open files" in text or "ancdata" in text:
        return 1, ("the loader processes need more open files than are allowed: reduce --workers, "
                   f"or raise the limit (ulimit -n 4096); {resume}")
    if re.search("bus error|shared memory|file </torch_", text):
        return 1, ("a loader process found no room in the shared memory, which batches pass "
                   "through: reduce --workers, or enlarge it (docker run --shm-size 8g); "
                   f"{resume}")
    if re.search(r"dataloader worker \(pid.*(killed by signal|exited unexpectedly)", text):
        if _stop_signal:  # the signal was sent to all processes, those of the loader included
            name = signal.Signals(_stop_signal).name
            return 128 + _stop_signal, f"stopped by {name} during a step; {resume}"
        return 1, ("a loader process was killed, perhaps because memory ran out: reduce --workers; "
                   f"{resume}")
    if dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in text):
        return 1, f"the connection to another process was lost ({first_line(error)})"
    return None


# --------------------------------------------------------------------------------------- complexity

def complexity(model, clip_length, height, width, without=()):
    """Returns the number of learnable parameters of a network, and the multiply-adds of the
    convolutions and matrix products for one clip in eval mode. Nothing is computed: torch counts
    the multiply-adds on the meta device.

    Args:
        model: the network, which is not changed.
        clip_length: number of frames in a clip.
        height, width: size of the frames.
        without: prefix of the names of parameters that are not counted, or a tuple of prefixes.
    """
    on_meta = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        on_meta(torch.empty(1, clip_length, 3, height, width, device="meta"))
    counted = [p for name, p in model.named_parameters() if not name.startswith(without)]
    return sum(p.numel() for p in counted), counter.get_total_flops() // 2


def costs_in_words(model, args):
    """Returns the parameters and the multiply-adds of a network with these settings, in words."""
    parameters, macs = complexity(model, args.frames, args.height, args.width)
    return (f"{parameters:,} parameters, {macs / 1e9:.3f} GFLOPs (multiply-adds) for a clip of "
            f"{args.frames} frames of {args.height}x{args.width}")


def print_complexity_table(rows, recipe, build):
    """--complexity: prints the parameters and GFLOPs of every variant next to what the paper
    reports, as a table in Markdown. rows, recipe, build: those of the script."""
    print("The parameters are those without neck, classifier and projection. The GFLOPs are\n"
          "multiply-adds of convolutions and matrix products.\n")
    table = [["variant", "clip", "parameters", "GFLOPs per clip", "per frame", "in the paper"]]
    for name in rows:
        args = settings(recipe, rows, name, weights="none")
        with torch.device("meta"):
            model = build(args, num_classes=1)
        parameters, macs = complexity(model, args.frames, args.height, args.width,
                                      without=("neck", "classifier", "projection"))
        reported = [f"{value} {COSTS[cost]}" for cost, value in row_of(rows, name).costs.items()]
        table.append([name, f"{args.frames}x{args.height}x{args.width}", f"{parameters:,}",
                      f"{macs / 1e9:.3f}", f"{macs / 1e9 / args.frames:.3f}", ", ".join(reported)])
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["".ljust(width, "-") for width in widths])
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        print("| " + " | ".join(cells) + " |")


# ----------------------------------------------------------------------------------------- pictures
# A sheet is one picture file: a title and a list of SheetRow. `picture` of a script returns a title
# and {label: PictureRow}, and `rows_with_common_ranges` turns the pictures of one or more networks
# into rows of a sheet.

class Panel(NamedTuple):
    """A part of a row of a sheet."""
    draw: Callable          # function of a matplotlib Axes
    aspect: float           # width over height of what it draws


class SheetRow(NamedTuple):
    """A row of a sheet: a label and what is drawn beside it."""
    label: str
    panels: list            # of Panel; [] if the label is a note and nothing is drawn


class PictureRow(NamedTuple):
    """A row of a script's picture."""
    values: list            # of tensors: the numbers that are drawn
    limits: tuple           # values that the range always includes, such as 0
    panels: Callable        # function (lowest, highest value of the range) -> list of Panel


class Picture(NamedTuple):
    """What a script's `picture` draws of a network."""
    name: str               # of the network
    title: str
    rows: dict              # {label: PictureRow}


def watch(model, clips, *modules):
    """Runs a network on clips, in eval mode. Returns for each module the list of its calls, pairs
    (inputs, output)."""
    calls = {module: [] for module in modules}

    def hook(module, inputs, output):
        calls[module].append((inputs, output))

    was_training = model.training
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for module in calls:
            hooks.enter_context(module.register_forward_hook(hook))
        model.eval()(clips)
    model.train(was_training)
    return [*calls.values()]


def energy(x):
    """Returns the root mean square over the channels of feature maps (T, C, H, W), divided by its
    mean over the positions of each map: (T, H, W). This makes frames and networks comparable."""
    x = x.float().square().mean(1).sqrt()
    return x / x.mean((1, 2), keepdim=True).clamp(min=1e-12)


def photo(image, caption="", **frame):
    """Returns a Panel with an image.

    Args:
        image: uint8 tensor (3, H, W).
        caption: text above it.
        frame: look of the rectangle around it, arguments of a matplotlib Patch.
    """
    def draw(ax):
        ax.imshow(image.permute(1, 2, 0).cpu().numpy())
        ax.axvspan(*ax.get_xlim(), fill=False, clip_on=False, **frame)
        ax.set_title(caption, size=9, pad=3)
        ax.set_axis_off()

    return Panel(draw, image.shape[2] / image.shape[1])


def overlays(frames, maps, captions=None, limits=()):
    """Returns a PictureRow: grey frames under maps in colours from blue to red, and the scale.

    Cell (i, j) of a map (h, w) is centred on pixel (i H / h, j W / w), the centre of its receptive
    field in a ResNet, so the first row and column show only half of each cell. A cell that is NaN
    has no colour: it is mixed with black, so that the grey frame is darker there. A frame without
    a map is drawn as it is and hatched.

    Args:
        frames: uint8 tensor (T, 3, H, W).
        maps: for each frame a tensor (h, w) of any size, or None.
        captions: texts above the frames, or None.
        limits: values that the range of the colours always includes, such as 0.
    """
    captions = captions or [""] * len(maps)

    def panels(low, high):
        from matplotlib import cm, colors
        colours = cm.ScalarMappable(colors.Normalize(low, high), "jet")
        drawn = []
        for frame, values, caption in zip(frames.cpu(), maps, captions):
            if values is None:
                drawn.append(photo(frame, caption, color="white", hatch="//"))
                continue
            rgb = torch.from_numpy(colours.to_rgba(values.float().cpu().numpy())[..., :3])
            rows = nearest_cells(values.shape[0], frame.shape[1])
            columns = nearest_cells(values.shape[1], frame.shape[2])
            rgb = rgb.permute(2, 0, 1)[:, rows[:, None], columns]
            grey = frame.float().mean(0)
            drawn.append(photo((127 * rgb + 0.5 * grey).byte(), caption, color="white"))

        def scale(ax):
            ax.set_box_aspect(12)
            ax.figure.colorbar(colours, ax, format="%.3g")

        return [*drawn, Panel(scale, 1 / 2)]  # the aspect includes the tick labels

    return PictureRow([values for values in maps if values is not None], limits, panels)


def nearest_cells(num_cells, num_pixels):
    """Returns the cell that is drawn at each pixel of a side of a frame: cell i lies around the
    pixel i * num_pixels / num_cells."""
    cells = (torch.arange(num_pixels) * num_cells / num_pixels).round().long()
    return cells.clamp(max=num_cells - 1)


def bars(charts, captions):
    """Returns a PictureRow: bar charts that share the range of their y axes. Bars are numbered from
    1.

    charts: list of tensors of one dimension; captions: texts above them.
    """
    def panels(low, high):
        def chart(k):
            def draw(ax):
                ax.bar(range(1, len(charts[k]) + 1), charts[k].tolist())
                if len(charts[k]) <= 8:
                    ax.set_xticks(range(1, len(charts[k]) + 1))
                else:
                    ax.locator_params("x", integer=True, nbins=4)
                ax.set(box_aspect=1.2, ylim=(min(low, 0), 1.05 * max(high, 0)))
                ax.set_title(captions[k], size=9, pad=3)
                ax.yaxis.tick_right()
                ax.tick_params(labelright=k == len(charts) - 1)
            return Panel(draw, 1 / 1.2)

        return [chart(k) for k in range(len(charts))]

    return PictureRow(charts, (), panels)


def curves(lines, x_max, x_label, *, y_range=None):
    """Returns a Panel with a curve for each of `lines`, {name: {x: y}}. The x axis has whole
    numbers, from 1 (from 0 if a curve begins there) to x_max. y_range: (lowest, highest) y that is
    shown; None fits the axis to the curves."""
    def draw(ax):
        for name, points in lines.items():
            ax.plot(points.keys(), points.values(), "o-", ms=4, label=name)
        ax.locator_params("x", integer=True)
        ax.yaxis.tick_right()
        x_min = min(x for points in lines.values() for x in points)
        ax.set(box_aspect=0.5, xlabel=x_label, ylim=y_range,
               xlim=(min(x_min, 1) - 0.5, x_max + 0.5))
        ax.legend()

    return Panel(draw, 2)


def rows_with_common_ranges(pictures):
    """Returns the rows of a sheet that shows a list of `Picture`, one for each network.

    Rows of the same label come one after another and share one range, so that they can be compared.
    It spans at least 5 % of the mean absolute value, so that noise is not magnified. A row whose
    own values span at most 1 % of their mean absolute value is replaced by a note.
    """
    labels = {}  # in the order of the last picture
    for picture in reversed(pictures):
        labels.update(dict.fromkeys(picture.rows))
    drawn = []
    for label in labels:
        shown = [picture for picture in pictures if label in picture.rows]
        values = []
        for picture in shown:
            x = torch.cat([v.float().cpu().flatten() for v in picture.rows[label].values])
            values.append(x[x.isfinite()])
        limits = torch.tensor(shown[0].rows[label].limits, dtype=torch.float32)
        every = torch.cat([*values, limits])
        low, high = every.aminmax()
        missing = 0.05 * every.abs().mean() - (high - low)  # to the minimum of 5 %
        margin = max(missing, 0) / 2
        for picture, x in zip(shown, values):
            text = f"{picture.name}: {label}" if len(pictures) > 1 else label
            if x.max() - x.min() > 0.01 * x.abs().mean():
                panels = picture.rows[label].panels(float(low - margin), float(high + margin))
                drawn.append(SheetRow(text, panels))
            else:
                drawn.append(SheetRow(f"{text}: not drawn, because all values are about "
                                      f"{x.mean():.3g}", []))
    return drawn


def save_sheet(title, rows, path, height=1.3):
    """Draws a sheet and saves it to a file, in the format of the file's ending.

    Args:
        title: text at the top.
        rows: list of SheetRow.
        path: the file, a Path.
        height: of a panel, in inches.
    """
    from matplotlib.figure import Figure
    label_width = 1.7  # inches
    gap = 0.1
    labels = [textwrap.fill(row.label, 21 if row.panels else 70) for row in rows]
    panel_widths = []  # a list for each row
    for row in rows:
        panel_widths.append([height * panel.aspect for panel in row.panels])
    heights = []
    for label, row in zip(labels, rows):
        lines = 0.17 * (label.count("\n") + 1) + 0.1
        heights.append(max(lines, height + 0.35) if row.panels else lines)
    total_width = 5.0
    for widths in panel_widths:
        total_width = max(total_width, label_width + sum(widths) + gap * (len(widths) + 2))
    figure = Figure((total_width, sum(heights) + 0.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=gap / 2)
    figure.suptitle(textwrap.fill(title, 56, break_on_hyphens=False), x=0.01, ha="left")
    parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, label, row, widths in zip(parts, labels, rows, panel_widths):
        # an empty last column takes what is left, so that the panels are not stretched
        rest = total_width - label_width - sum(widths) - gap * (len(widths) + 1)
        columns = part.subplots(1, len(widths) + 2, squeeze=False,
                                width_ratios=[label_width, *widths, rest])
        first, *axes, last = columns[0]
        text = first.text(0, 1, label, va="top", transform=first.transAxes)
        text.set_in_layout(False)  # the columns begin at the same place in all rows
        first.set_axis_off()
        last.set_axis_off()
        for ax, panel in zip(axes, row.panels):
            ax.set_anchor("NW")
            panel.draw(ax)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:])
    print(f"wrote {path}", flush=True)


def figures(run, model, dataset, *, split, metric, picture, load):
    """--figure: for a few queries, draws the script's `picture` and the ranked list; for the whole
    run, draws the training curves, the CMC curve and a PCA of the test features.

    Args:
        run: a `Run`, prepared.
        model: its network.
        dataset: a `Dataset` with query and gallery.
        split: function (n, T) that cuts a tracklet into clips, SPLIT of the script.
        metric: "cosine" or "euclidean", METRIC of the script.
        picture: function (network, clips, frames) that returns a title and {label: PictureRow}.
        load: function (path) that returns the network in a file.

    Raises UserError when no query has a match, and when the network of --beside takes other clips,
    see `load_beside`.
    """
    args = run.args
    q_pids, q_cams, g_pids, g_cams = dataset.ids()
    matched = []
    for i, (pid, cam) in enumerate(zip(q_pids, q_cams)):
        if (ranked_entries(pid, cam, g_pids, g_cams) & (g_pids == pid)).any():
            matched.append(i)
    if not matched:
        raise UserError(f"{args.data} in {args.root}: there is no ranking to draw, {NO_MATCH}")
    step = max(1, len(matched) // args.figure_tracklets)
    queries = {}  # {index: beginning of the file names}
    for i in matched[::step][:args.figure_tracklets]:
        queries[i] = f"query-{i + 1}-person-{q_pids[i]}-camera-{q_cams[i]}"

    def save(title, rows, name, height=1.3):
        save_sheet(title, rows, Path(args.figure, f"{name}.{args.figure_format}"), height)

    networks = [(args.variant, model, run.origin)]
    if args.beside:
        other = load_beside(args.beside, args, load).to(run.device)
        networks.insert(0, (other.args.variant, other, other.origin))
    if process_rank() == 0:
        for i, name in queries.items():
            title, rows = sheet_of_networks(networks, dataset.query[i], split_clips=split, run=run,
                                            picture=picture)
            save(title, rows, name)
        if len(run.history) > 1:
            rows = rows_of_training(run.history, run.before_training)
            save(f"Training of {args.variant} on {args.data}", rows, "training", 1.9)

    query_features, gallery_features = tracklet_features(
        model, dataset, split_clips=split, clip_length=args.frames, size=run.size,
        **run.extract_options)
    if process_rank() > 0:
        return
    if args.rerank:
        distances = rerank(query_features, gallery_features, metric)
    else:
        blocks = distance_blocks(query_features, gallery_features, metric)
        distances = torch.cat([block for _, block in blocks]).numpy(force=True)
    run_label = f"{args.variant} on {args.data}, {run.origin}"
    if args.rerank:
        run_label += ", re-ranked"
    for i, name in queries.items():
        rows = rows_of_ranking(dataset, i, distances[i], run.size)
        save(f"Ranked list; {run_label}", rows, f"{name}-ranked", 1)
    cmc, mean_ap, _ = cmc_and_map(distances, *dataset.ids())
    text = f"rank-1 {100 * cmc[0]:.1f}, mAP {100 * mean_ap:.1f}"
    curve = curves({text: dict(enumerate(100 * cmc, 1))}, len(cmc), "rank")
    save(f"CMC; {run_label}", [SheetRow("% of queries matched up to a rank", [curve])], "cmc", 1.9)
    people = [*np.unique(q_pids)[:10]]
    panel = pca(dataset, people, query_features=query_features,
                gallery_features=gallery_features, metric=metric)
    save(f"PCA; {run_label}", [SheetRow("test tracklets of up to ten people", [panel])], "pca", 2.9)


def load_beside(path, args, load):
    """Returns the network of --beside. Raises UserError if its frames have another size than those
    of `args`, or its clips another length (except for single frames).

    load: function (path) that returns the network in a file.
    """
    other = load(path)
    own = other.args
    same_size = (own.height, own.width) == (args.height, args.width)
    if not same_size or own.frames not in (1, args.frames):
        raise UserError(f"--beside {path}: is for {own.frames} frames of {own.height}x{own.width}, "
                        f"not for {args.frames} of {args.height}x{args.width}")
    return other


def sheet_of_networks(networks, query, *, split_clips, run, picture):
    """Returns the title and the rows of a sheet that shows what networks do with a query's first
    clip.

    Args:
        networks: [(name, network, phrase that says how it was trained)].
        query: a `Tracklet`.
        split_clips: function (n, T) that cuts a tracklet into clips.
        run: the `Run`; its clip length, frame size and device are used.
        picture: function (network, clips, frames) that returns a title and {label: PictureRow}.
    """
    clip = split_clips(len(query.frames), run.args.frames)[0]
    frames = read_clip([query.frames[k] for k in clip], run.size)
    clips = normalize(frames[None].to(run.device))
    pictures = []
    names = []
    for name, network, origin in networks:
        title, rows = picture(network, clips, frames)
        pictures.append(Picture(name, title, rows))
        names.append(f"{name}, {origin}")
    photos = [photo(frame, f"frame {n}") for n, frame in enumerate(frames, 1)]
    rows = [SheetRow(f"person {query.pid}, camera {query.cam}", photos)]
    rows += rows_with_common_ranges(pictures)
    return f"{title}; {' and '.join(names)}, on {run.args.data}", rows


def rows_of_training(history, before_training):
    """Returns the rows of a sheet with the losses and the test results of a training.

    Args:
        history: the rows of log.csv.
        before_training: the result before the training, which is drawn at epoch 0, or {}.
    """
    losses = {}
    results = {}
    for key in history[0]:
        if key in ("epoch", "lr"):
            continue
        points = {row["epoch"]: row[key] for row in history if row[key] != ""}
        if key in ("mAP", "rank-1"):
            if key in before_training:
                points = {0: before_training[key], **points}
            results[key] = points
        else:
            losses[key] = points
    rows = [SheetRow("total loss and its weighted parts",
                     [curves(losses, len(history), "epoch")])]
    if any(results.values()):
        label = "mAP and rank-1 in %, where measured"
        if before_training:
            label += "; at epoch 0 before the training"
        panel = curves(results, len(history), "epoch", y_range=(0, 100))
        rows.append(SheetRow(label, [panel]))
    return rows


def rows_of_ranking(dataset, i, distances, size):
    """Returns the rows of a sheet with query i, its first eight gallery tracklets, and its first
    match if this is a later one.

    Args:
        dataset: a `Dataset`.
        i: index of the query, which has a match.
        distances: (G,), from the query to the gallery tracklets.
        size: (height, width) of the frames.
    """
    q_pids, q_cams, g_pids, g_cams = dataset.ids()

    def row(text, tracklet, colour):
        indices = np.linspace(0, len(tracklet.frames) - 1, 6).astype(int)
        frames = read_clip([tracklet.frames[k] for k in indices], size)
        panel = photo(torch.cat([*frames], 2), color=colour, linewidth=6)
        person = "distractor" if tracklet.pid == 0 else f"person {tracklet.pid}"
        return SheetRow(f"{text}: {person}, camera {tracklet.cam}", [panel])

    ranked = np.flatnonzero(ranked_entries(q_pids[i], q_cams[i], g_pids, g_cams))
    ranking = ranked[distances[ranked].argsort(kind="stable")]  # the order of `match_ranks`
    is_match = g_pids[ranking] == q_pids[i]
    first_match = int(is_match.argmax())
    shown = [*range(min(8, len(ranking)))]
    if first_match not in shown:
        shown.append(first_match)
    rows = [row("query", dataset.query[i], "black")]
    for k in shown:
        verdict, colour = "wrong", "red"
        if is_match[k]:
            verdict, colour = "right", "green"
        if k >= 8:
            verdict += ", the first match"
        text = f"{k + 1}. {verdict}, distance {distances[ranking[k]]:.3f}"
        rows.append(row(text, dataset.gallery[ranking[k]], colour))
    return rows


def pca(dataset, people, *, query_features, gallery_features, metric):
    """Returns a Panel with the test tracklets of some people, plotted on the first two principal
    components of their features. Colours are people, markers are cameras, and queries have a black
    edge.

    Args:
        dataset: a `Dataset`.
        people: list of identities, at most ten.
        query_features: tensor (Q, D).
        gallery_features: tensor (G, D).
        metric: with "cosine" the features are normalised first.
    """
    shown = {}  # keyed by the first frame, so that a query also in the gallery is drawn once
    for part, features, edge in ((dataset.gallery, gallery_features, "none"),
                                 (dataset.query, query_features, "black")):
        for tracklet, feature in zip(part, features.float().cpu()):
            if tracklet.pid in people:
                shown[tracklet.frames[0]] = (tracklet, feature, edge)
    x = torch.stack([feature for _, feature, _ in shown.values()])
    if metric == "cosine":
        x = F.normalize(x)
    components = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:2]
    positions = x @ components.T
    markers = "os^Dv<>PXphd*H8"

    def draw(ax):
        for (tracklet, _, edge), place in zip(shown.values(), positions.tolist()):
            ax.plot(*place, markers[tracklet.cam % 15], color=f"C{people.index(tracklet.pid)}",
                    markeredgecolor=edge, ms=9)
        for k, pid in enumerate(people):
            ax.plot([], [], "s", color=f"C{k}", label=f"person {pid}")
        for cam in sorted({tracklet.cam for tracklet, _, _ in shown.values()}):
            ax.plot([], [], markers[cam % 15], color="white", markeredgecolor="grey",
                    label=f"camera {cam}")
        ax.plot([], [], "_", color="black", label="black edge: a query")
        ax.set(box_aspect=1, xticks=[], yticks=[])
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    return Panel(draw, 1.6)  # the aspect includes the legend
