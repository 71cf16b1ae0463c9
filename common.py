"""What the five papers share beside the data: distances, the triplet loss, CMC and mAP, re-ranking, all-frames feature
extraction, the count of parameters and multiply-adds, and checkpoint files.

Ranking runs in numpy on the CPU, block by block over the queries: a full distance matrix is never needed.
"""
import copy
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import AllClips, UserError, normalize


# ---------------------------------------------------------------------------------------------------------- distances

def distance_blocks(a, b, metric="cosine", rows=512):
    """Yields (slice of a, distances of these rows to all of b), at most `rows` rows at a time; see `distances`."""
    if metric == "cosine":
        a, b = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)
    elif metric == "euclidean":
        a, b = a.float(), b.float()
        square = b.square().sum(1)
    else:
        raise ValueError(f"metric must be 'cosine' or 'euclidean', not {metric!r}")
    for start in range(0, len(a), rows):
        part = a[start:start + rows]
        if metric == "cosine":
            d = 1 - part @ b.T
        else:
            d = torch.addmm(square, part, b.T, alpha=-2).add_(part.square().sum(1, keepdim=True)).clamp_(min=0).sqrt_()
        yield slice(start, start + len(part)), d


def distances(a, b, metric="cosine"):
    """Distances between the rows of a (M, D) and b (N, D): (M, N), float32.

    metric: "cosine", 1 - cos in [0, 2], or "euclidean". A zero vector has cosine distance 1 to everything.
    """
    out = torch.empty(len(a), len(b), device=a.device)
    for rows, d in distance_blocks(a, b, metric):
        out[rows] = d
    return out


# --------------------------------------------------------------------------------------------------------------- loss

def batch_hard_triplet(x, pids, margin, metric="cosine"):
    """Batch-hard triplet loss (Hermans et al., 2017): the mean over anchors of [margin + d(hardest positive) -
    d(hardest negative)]+. An anchor without a positive or without a negative in the batch contributes nothing.

    x: embeddings (N, D); pids: (N,); margin: in units of the metric, "cosine" (1 - cos) or "euclidean".
    """
    x = x.float()
    if metric == "cosine":
        x = F.normalize(x, dim=1)
        d = 1 - x @ x.T
    else:
        square = x.square().sum(1)
        d = (square[:, None] + square - 2 * x @ x.T).clamp(min=1e-12).sqrt()
    same = pids[:, None] == pids
    positive = same & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    # without a positive the first term is -inf, without a negative the second is inf: the hinge is 0 then
    hinge = (margin + d.masked_fill(~positive, -math.inf).amax(1) - d.masked_fill(same, math.inf).amin(1)).relu()
    return hinge.sum() / (positive.any(1) & ~same.all(1)).sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------------------- retrieval

def match_ranks(d, q_pids, q_cams, g_pids, g_cams):
    """Ranks (0 is the first) of the true matches of each query, as a list of ascending int arrays.

    MARS' protocol: gallery entries of the query's own identity and camera, and junk (pid -1), are taken out of its
    ranking; equal distances rank in gallery order. A query without a match gets an empty array.

    d: distances (Q, G); the others: identities and cameras, (Q,) and (G,).
    """
    found = []
    for row, pid, cam in zip(d, q_pids, q_cams):
        same = g_pids == pid
        junk = same & (g_cams == cam) | (g_pids == -1)
        matches = np.flatnonzero(same & ~junk)
        kept = row[~junk]
        values = row[matches]
        order = np.argsort(values, kind="stable")
        matches, values, kept_sorted = matches[order], values[order], np.sort(kept)
        # a match ranks behind all smaller distances, and behind equal ones that stand before it in the gallery
        ranks = np.searchsorted(kept_sorted, values, "left")
        for i in np.flatnonzero(np.searchsorted(kept_sorted, values, "right") - ranks > 1):
            ranks[i] += np.count_nonzero((row[:matches[i]] == values[i]) & ~junk[:matches[i]])
        found.append(ranks)
    return found


def cmc_map(d, q_pids, q_cams, g_pids, g_cams, top=20):
    """CMC (top,) and mAP, in [0, 1], and the number of queries with a match, over which both are averaged.

    CMC[k - 1] is the share of queries with a match among the first k; the average precision of a query is the mean, over
    its matches, of the precision at the match (not interpolated). The protocol is the one of `match_ranks`.

    d: distances (Q, G), or an iterable of (slice of queries, distances of these to the gallery).
    Raises UserError when no query has a match.
    """
    first, precision = [], []
    for rows, block in [(slice(None), d)] if hasattr(d, "shape") else d:
        for ranks in match_ranks(np.asarray(block), q_pids[rows], q_cams[rows], g_pids, g_cams):
            if len(ranks):
                first.append(ranks[0])
                precision.append(np.mean(np.arange(1, len(ranks) + 1) / (ranks + 1)))
    if not first:
        raise UserError("no query has a match in the gallery: another camera must have seen the same identity")
    return (np.array(first)[:, None] < np.arange(1, top + 1)).mean(0), float(np.mean(precision)), len(first)


def rerank(q, g, metric="cosine", k1=20, k2=6, weight=0.3):
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017): new distances (Q, G), weight * d + (1 - weight) * d_Jaccard.

    d is the cosine or the squared Euclidean distance, divided by each sample's largest, so that both terms lie in [0, 1].
    Neighbours are counted without the sample itself, which stands first in its own list. Sets are sparse: memory grows
    with (Q + G) * k1 beside the result.

    q, g: features (Q, D), (G, D); k1: neighbours of the reciprocal sets; k2: of the query expansion; weight: in [0, 1].
    """
    from scipy.sparse import csr_array, vstack
    x = torch.cat([q, g]).float()
    if metric == "cosine":
        x = F.normalize(x, dim=1)
    n, power = len(x), 1 if metric == "cosine" else 2
    k1, k2 = min(k1, n - 1), min(k2, n)
    near, farthest = torch.empty(n, k1 + 1, dtype=torch.long), torch.empty(n)
    for rows, d in distance_blocks(x, x, metric):
        d[torch.arange(len(d)), torch.arange(rows.start, rows.stop)] = -1   # itself first, before its duplicates
        near[rows], farthest[rows] = d.topk(k1 + 1, largest=False).indices.cpu(), d.amax(1).cpu() ** power
    near, farthest = near.numpy(), farthest.clamp(min=1e-12).numpy()

    def reciprocal(k):                                            # R(p, k): the neighbours that have p as neighbour, too
        lists = near[:, :k + 1]
        mutual = (lists[lists] == np.arange(n)[:, None, None]).any(2)
        return [row[keep] for row, keep in zip(lists, mutual)]

    full, half = reciprocal(k1), reciprocal(round(k1 / 2))
    V = []
    for p in tqdm(range(n), desc="re-ranking", leave=False, disable=None):
        wanted, base = [full[p]], set(full[p].tolist())           # R*(p, k1): add the half sets that mostly agree
        for candidate in full[p]:
            extra = half[candidate]
            if len(base.intersection(extra.tolist())) >= 2 / 3 * len(extra):
                wanted.append(extra)
        members = np.unique(np.concatenate(wanted))
        d = next(distance_blocks(x[p:p + 1], x[members], metric))[1][0].cpu().numpy() ** power / farthest[p]
        V.append(csr_array((np.exp(-d), members, [0, len(members)]), shape=(1, n)))
    V = vstack(V).tocsr()
    if k2 > 1:                                                    # local query expansion
        V = csr_array((np.full(n * k2, 1 / k2, V.dtype), near[:, :k2].ravel(), np.arange(0, n * k2 + 1, k2)), shape=(n, n)) @ V
    columns, total = V[len(q):].tocsc(), V.sum(1)
    out = np.empty((len(q), len(g)), np.float32)
    for rows, d in distance_blocks(x[:len(q)], x[len(q):], metric):
        for p, row in zip(range(rows.start, rows.stop), d.cpu().numpy() ** power):
            both = np.zeros(len(g), V.dtype)                      # sum of the element-wise minima
            for column, value in zip(V.indices[V.indptr[p]:V.indptr[p + 1]], V.data[V.indptr[p]:V.indptr[p + 1]]):
                span = slice(columns.indptr[column], columns.indptr[column + 1])
                both[columns.indices[span]] += np.minimum(value, columns.data[span])
            out[p] = weight * row / farthest[p] + (1 - weight) * (1 - both / (total[p] + total[len(q):] - both))
    return out


@torch.inference_mode()
def extract(model, tracklets, split, T, size, batch=32, workers=0, amp=False):
    """Features of whole tracklets, (N, D), float32: the mean of their clips' embeddings over all frames.

    Clips are packed into full batches across tracklets, so that memory does not grow with the length of a tracklet.

    model: maps (B, T, 3, H, W) to (B, D) in eval mode; split: (n, T) -> frame indices (clips, T); size: (height, width);
    batch: clips a forward pass; amp: bfloat16 autocast.
    """
    device, training = next(model.parameters()).device, model.training
    clips = AllClips(tracklets, split, T, size)
    loader = torch.utils.data.DataLoader(clips, batch, num_workers=workers, pin_memory=device.type == "cuda")
    total, count = None, torch.zeros(len(tracklets), 1, device=device)
    model.eval()
    with tqdm(total=len(clips), desc="features", unit=" clips", leave=False, disable=None) as bar:
        for frames, owner in loader:
            owner = owner.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                x = model(normalize(frames.to(device, non_blocking=True))).float()
            if total is None:
                total = torch.zeros(len(tracklets), x.shape[1], device=device)
            total.index_add_(0, owner, x)
            count.index_add_(0, owner, torch.ones_like(owner, dtype=torch.float)[:, None])
            bar.update(len(owner))
    model.train(training)
    return total / count


def evaluate(model, dataset, split, T, size, metric="cosine", use_rerank=False, label="test", **extraction):
    """All-frames retrieval on the test part of `dataset`; prints mAP and CMC-1/5/10/20 in percent and returns them as
    {"mAP", "rank-1", "rank-5", "rank-10", "rank-20"} in [0, 100].

    label: what stands before the result; the other arguments are those of `extract` and `distances`.
    """
    start = time.time()
    tracklets = list({t.frames[0]: t for t in dataset.query + dataset.gallery}.values())   # each tracklet once
    place = {t.frames[0]: i for i, t in enumerate(tracklets)}
    x = extract(model, tracklets, split, T, size, **extraction)
    if not x.isfinite().all():
        raise UserError("the network's features are not finite: the weights are damaged or the training diverged")
    q, g = (x[[place[t.frames[0]] for t in part]] for part in (dataset.query, dataset.gallery))
    q_pids, q_cams, g_pids, g_cams = (np.array([getattr(t, key) for t in part])
                                      for part in (dataset.query, dataset.gallery) for key in ("pid", "cam"))
    d = rerank(q, g, metric) if use_rerank else ((rows, d.cpu().numpy()) for rows, d in distance_blocks(q, g, metric))
    cmc, mean_ap, matched = cmc_map(d, q_pids, q_cams, g_pids, g_cams)
    result = {"mAP": 100 * mean_ap, **{f"rank-{k}": 100 * float(cmc[k - 1]) for k in (1, 5, 10, 20)}}
    skipped = f", {len(q) - matched:,} more have no match and are left out" if matched < len(q) else ""
    frames = "all frames" if all(split(len(t.frames), T).size >= len(t.frames) for t in tracklets) else f"whole clips of {T} frames"
    print(f"{label}, {frames}{', re-ranked' * use_rerank}:  mAP {result['mAP']:.1f}   CMC-1 {result['rank-1']:.1f}  CMC-5 {result['rank-5']:.1f}"
          f"  CMC-10 {result['rank-10']:.1f}  CMC-20 {result['rank-20']:.1f}   ({matched:,} queries{skipped}, {len(g):,} gallery"
          f" tracklets, {time.time() - start:.0f} s)", flush=True)
    return result


# --------------------------------------------------------------------------------------------------------- complexity

def complexity(model, T, height, width):
    """(parameters, multiply-adds of one clip's inference): (int, int), counted without computing, on the meta device.

    Multiply-adds are those of convolutions and matrix products, what the papers call FLOPs. Parameters are all learnable
    ones, those of training heads included.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.empty(1, T, 3, height, width, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


# -------------------------------------------------------------------------------------------------------------- files

def load_file(path):
    """A dict that torch.save wrote, on the CPU; raises UserError for anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # a damaged file raises many kinds
        raise UserError(f"{path}: not a readable checkpoint ({str(error).strip().splitlines()[0][:160] if str(error) else type(error).__name__})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    return state


def save_file(state, path):
    """torch.save to a temporary name, then renamed: the previous file stays until the new one is whole."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        raise UserError(f"{path}: cannot be written ({str(error).strip().splitlines()[0]}); a previous one is still whole") from None
