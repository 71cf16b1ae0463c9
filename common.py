"""What the five papers share beside the data: distances, the triplet loss, CMC and mAP, re-ranking, all-frames feature
extraction, the count of parameters and multiply-adds, several processes, what a long run needs to survive, and pictures.

Ranking runs in numpy on the CPU, block by block over the queries: a full distance matrix is never needed.
"""
import argparse
import contextlib
import copy
import csv
import datetime
import io
import math
import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.distributed.nn.functional import all_reduce
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import DATA_SETS, AllClips, UserError, load_dataset, normalize, read_clip


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
        if _asked:
            raise Stop(_asked)
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

    Clips are packed into full batches across tracklets, so that memory does not grow with the length of a tracklet. Several
    processes take the batches in turn and add up all of them in the same order: each gets the features of a single process.

    model: maps (B, T, 3, H, W) to (B, D) in eval mode; split: (n, T) -> frame indices (clips, T); size: (height, width);
    batch: clips a forward pass; amp: bfloat16 autocast. Raises Stop when a signal asks for it.
    """
    device, training = next(model.parameters()).device, model.training
    clips = AllClips(tracklets, split, T, size)
    batches = [range(i, min(i + batch, len(clips))) for i in range(0, len(clips), batch)]
    rounds = -(-len(batches) // world())                          # in the last one some processes repeat a batch
    loader = torch.utils.data.DataLoader(clips, batch_sampler=[batches[i % len(batches)] for i in range(rank(), rounds * world(), world())],
                                         num_workers=workers, worker_init_fn=own_group, pin_memory=device.type == "cuda", generator=torch.Generator())
    total, count = None, torch.zeros(len(tracklets), 1, device=device)
    for buffer in model.buffers() if world() > 1 else ():         # BatchNorm's statistics may differ between processes
        dist.broadcast(buffer, 0)
    model.eval()
    with tqdm(total=len(clips), desc="features", unit=" clips", leave=False, disable=quiet()) as bar:
        for step, (frames, _) in enumerate(loader):
            if asked := stop_asked():
                raise Stop(asked)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                x = model(normalize(frames.to(device, non_blocking=True))).float()
            if total is None:
                total = torch.zeros(len(tracklets), x.shape[1], device=device)
            if world() > 1:
                x = gather(F.pad(x, (0, 0, 0, batch - len(x))))
            for part, members in zip(x.split(batch), batches[step * world():(step + 1) * world()]):
                owner = torch.tensor([clips.clips[i][0] for i in members], device=device)
                total.index_add_(0, owner, part[:len(owner)])
                count.index_add_(0, owner, torch.ones(len(owner), 1, device=device))
                bar.update(len(owner))
    model.train(training)
    return total / count


def test_features(model, dataset, split, T, size, **extraction):
    """Features of the query and the gallery tracklets, (Q, D) and (G, D), each tracklet seen once; see `extract`."""
    tracklets = list({t.frames[0]: t for t in dataset.query + dataset.gallery}.values())
    place = {t.frames[0]: i for i, t in enumerate(tracklets)}
    x = extract(model, tracklets, split, T, size, **extraction)
    if not x.isfinite().all():
        raise UserError("the network's features are not finite: the weights are damaged or the training diverged")
    return [x[[place[t.frames[0]] for t in part]] for part in (dataset.query, dataset.gallery)]


def _ranked(q, g, metric, use_rerank):
    """Distances as `cmc_map` takes them."""
    return rerank(q, g, metric) if use_rerank else ((rows, d.cpu().numpy()) for rows, d in distance_blocks(q, g, metric))


def test_ids(dataset):
    """(query pids, query cameras, gallery pids, gallery cameras), as `cmc_map` takes them."""
    return [np.array([getattr(t, key) for t in part]) for part in (dataset.query, dataset.gallery) for key in ("pid", "cam")]


def evaluate(model, dataset, split, T, size, metric="cosine", use_rerank=False, label="test", **extraction):
    """All-frames retrieval on the test part of `dataset`; prints mAP and CMC-1/5/10/20 in percent and returns them as
    {"mAP", "rank-1", "rank-5", "rank-10", "rank-20"} in [0, 100].

    label: what stands before the result; the other arguments are those of `extract` and `distances`.
    """
    start = time.time()
    q, g = test_features(model, dataset, split, T, size, **extraction)
    ranked = [None]
    if rank() == 0:                                               # the others wait for it
        ranked = [cmc_map(_ranked(q, g, metric, use_rerank), *test_ids(dataset))]
    if world() > 1:
        dist.broadcast_object_list(ranked)
    cmc, mean_ap, matched = ranked[0]
    result = {"mAP": 100 * mean_ap, **{f"rank-{k}": 100 * float(cmc[k - 1]) for k in (1, 5, 10, 20)}}
    skipped = f", {len(q) - matched:,} more have no match and are left out" if matched < len(q) else ""
    whole = all(split(len(t.frames), T).size >= len(t.frames) for t in dataset.query + dataset.gallery)
    frames = "all frames" if whole else f"whole clips of {T} frames"
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


def complexity_table(variants, make, printed, heads, markdown=False):
    """Prints parameters and multiply-adds of every variant beside the paper's figures.

    variants: {name: (_, figures printed in the paper or None)}; make(name) -> (network, frames, height, width); printed: what the figures
    from the third on are, of "GFLOPs of 4 frames", "GFLOPs a frame", "million parameters", "MB of parameters"; heads: first names of the parts
    that the paper does not count.
    """
    rows = []
    for name, (_, figures) in variants.items():
        with torch.device("meta"):
            model, T, height, width = make(name)
        _, macs = complexity(model, T, height, width)
        count = sum(p.numel() for key, p in model.named_parameters() if not key.startswith(heads))
        ours = {"million parameters": count / 1e6, "MB of parameters": 4 * count / 1e6, "GFLOPs of 4 frames": 4 * macs / 1e9 / T, "GFLOPs a frame": macs / 1e9 / T}
        theirs, notes = dict(zip(printed, (figures or ())[2:])), []
        for key, figure in theirs.items():
            off = ours[key] / figure - 1
            notes.append("yes" if abs(ours[key] - figure) <= 0.5 * 10.0 ** -len(str(figure).partition(".")[2]) + 1e-9 else f"{100 * off:+.1f} %")
        rows.append([name, f"{T}x{height}x{width}", f"{count:,}", f"{macs / 1e9:.3f}", f"{ours['GFLOPs a frame']:.3f}",
                     ", ".join(f"{figure} {key}" for key, figure in theirs.items()) or "-", ", ".join(notes) or "-"])
    head = ["variant", "clip", "parameters", "GFLOPs a clip", "a frame", "printed in the paper", "equal as rounded"]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    if markdown:
        print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows if markdown else [head, *rows]:
        print("| " + " | ".join(row) + " |" if markdown else "  ".join(cell.ljust(w) if i in (0, 5) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))


# -------------------------------------------------------------------------------------------------- several processes
# torchrun starts them and sets RANK, LOCAL_RANK and WORLD_SIZE. Without it there is one, of rank 0.

def world():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def quiet():
    """tqdm's `disable`: bars are for the first process, on a terminal."""
    return True if rank() else None


def pick_device(gpu=None):
    """The device of this process, from --gpu ("0", "1" ..., "cpu" or None: the first GPU, else the CPU); says which it is.

    Under torchrun every process takes a GPU of its own, or with "cpu" or without GPUs the CPU, and joins the process group
    (NCCL or gloo). Raises UserError for a GPU that is not there.
    """
    count, processes, local = torch.cuda.device_count(), int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("LOCAL_RANK", "0")
    if processes > 1 and gpu not in (None, "cpu"):
        raise UserError(f"--gpu {gpu}: torchrun gives every process its own GPU; leave --gpu out, or use CUDA_VISIBLE_DEVICES")
    if gpu is None:
        gpu = local if count else "cpu"
        if gpu != "cpu" and (here := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > count:
            raise UserError(f"{here} processes, but {count} GPUs: use --nproc_per_node {count}, or --gpu cpu")
    if gpu != "cpu" and not (gpu.isascii() and gpu.isdecimal() and int(gpu) < count):
        raise UserError(f"--gpu {gpu}: " + (f"there are GPUs 0 to {count - 1}" if count else "no GPU is there that torch can use; leave --gpu out"))
    device = torch.device("cpu" if gpu == "cpu" else f"cuda:{int(gpu)}")
    if processes > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # the others wait while the first one ranks or re-ranks; torchrun ends them when one dies
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))
    print(f"device: {device}" + (f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "" if count else " (no GPU found)")
          + (f", {processes} processes" if processes > 1 else ""))
    return device


@contextlib.contextmanager
def first_process_first():
    """The block runs in the first process alone, then in the others: for what it draws, downloads or writes."""
    if rank():
        dist.barrier()
    yield
    if world() > 1 and not rank():
        dist.barrier()


def gather(outputs):
    """The outputs of all processes, joined along the batch in the order of the processes: every process sees the whole batch.

    Gradients flow into the part of this process only. When every process takes the whole loss, the gradients of all of them
    add up to that of a single process. outputs: a tensor (b, ...), or tuples, lists and dicts of them.
    """
    if world() == 1:
        return outputs
    if isinstance(outputs, dict):
        return {name: gather(part) for name, part in outputs.items()}
    if isinstance(outputs, (tuple, list)):
        return [gather(part) for part in outputs]
    parts = [torch.empty_like(outputs, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, outputs.detach().contiguous())
    parts[rank()] = outputs
    return torch.cat(parts)


def batch_variance(x, norm):
    """The variance (D,) by which the BatchNorm `norm` divides x (B, D): of the batch, of all processes' batches where `norm`
    is a SyncBatchNorm, or the running one in eval mode."""
    if not norm.training:
        return norm.running_var
    if world() == 1 or not isinstance(norm, torch.nn.SyncBatchNorm):
        return x.var(0, correction=0)
    mean = all_reduce(x.mean(0)) / world()
    return all_reduce((x - mean).square().mean(0)) / world()


def parallel(model, device):
    """`model` for training on this process' part of the batch: DistributedDataParallel, or `model` itself in a single process."""
    if world() == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def compiled(model, device):
    """Compiles `model` in place, when a small function shows that a compiler is there; else says so in one line."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
        model.compile()
    except Exception as error:  # of many kinds
        print(f"--compile: goes on without ({' '.join(str(error).split())[:160]})", flush=True)


# ---------------------------------------------------------------------------------------------------------- long runs

class Stop(Exception):
    """SIGINT or SIGTERM asked for the end of a run; the argument is the signal's number."""


_asked, _hint = 0, ""


def _note(number, _):
    global _asked
    _asked = _asked or number


def catch_signals(hint):
    """From here on SIGINT and SIGTERM are only noted: `stop_asked` tells. hint: how to go on, for the message at the end."""
    global _asked, _hint
    _hint = hint
    if signal.getsignal(signal.SIGTERM) is not _note:             # else, one may have come since the split before
        _asked = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _note)


def own_group(_):
    """worker_init_fn of the loaders: a signal to the group of a run's processes is for the main one, which ends the workers itself."""
    os.setpgrp()


def stop_asked():
    """The number of the signal that asked any of the processes to stop, or 0. All of them must call it together."""
    if world() == 1:
        return _asked
    asked = torch.tensor(_asked, device=f"cuda:{torch.cuda.current_device()}" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return int(asked)


def command_line(main):
    """Runs a script's main(); what a user can cause ends in one line on stderr and an exit code: 2 for errors, 128 + the signal's number."""
    name = Path(sys.argv[0]).name
    if os.environ.get("RANK", "0") != "0":                        # only the first process prints
        sys.stdout = open(os.devnull, "w")

    def leave(code, message):
        # before they have found each other, all processes of a machine have the same to say
        if dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{name}: " + f"process {rank()}: " * bool(rank()) + message, file=sys.stderr, flush=True)
        # not by way of the interpreter's end, which can wait for processes that are gone
        sys.stdout.flush(), os._exit(code) if dist.is_initialized() else sys.exit(code)
    try:
        main()
    except UserError as error:
        leave(2, str(error))
    except torch.OutOfMemoryError:
        leave(2, "out of GPU memory: use fewer --ids or --clips, a smaller --height and --width, or --amp")
    except Stop as stop:
        leave(128 + stop.args[0], f"stopped by {signal.Signals(stop.args[0]).name}; {_hint}")
    except KeyboardInterrupt:
        leave(130, "interrupted")
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            leave(2, "out of memory: use fewer --ids, --clips or --frames, or a smaller --height and --width")
        if _asked and "DataLoader worker" in str(error):          # who sent the signal sent it to every process
            leave(128 + _asked, f"stopped by {signal.Signals(_asked).name} in a step; {_hint}, from the last checkpoint")
        gone = isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("connection", "gloo", "nccl", "broken pipe", "timed out"))
        if not dist.is_initialized() or not gone:
            raise
        leave(1, f"another process is gone ({str(error).strip().splitlines()[0][:160]})")
    if dist.is_initialized():
        dist.destroy_process_group()


def number(kind, least, most=2 ** 31):
    """An argparse type: int or float from `least` to `most`."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} of {least} to {most}"
    return parse


def same_flags(checkpoint, flags, path, recipe, but=("weights", "amp", "rerank")):
    """Raises UserError when one of `flags` would make another network or training than that of the checkpoint at `path`.

    recipe: names of a script's own flags, which are compared too; but: flags that may differ; () for a mean over runs.
    """
    saved, keys = checkpoint["args"], {"variant", "data", "split", "chunk", "seed", "amp", "rerank", *recipe} - {"epochs", *but}
    if flags.get("evaluate") or flags.get("figure"):
        keys -= {"data", "split", "chunk", "seed", "ids", "clips", "lr", "lr_step", "erase"}
    if not but and len(checkpoint["history"]) > flags["epochs"]:
        raise UserError(f"{path}: was trained for {len(checkpoint['history'])} epochs, more than --epochs {flags['epochs']}")
    for key in sorted(keys & flags.keys()):
        if flags[key] != saved.get(key):
            raise UserError(f"{path}: was trained with --{key.replace('_', '-')} {saved.get(key)}, not {flags[key]}")


def all_splits(args, run, script, variants, recipe):
    """--split all: run(arguments, checkpoint or None, hint) of the ten splits one after another, with the mean; of these the finished
    ones are left out and an unfinished one goes on."""
    with contextlib.redirect_stdout(io.StringIO()):               # what is wrong with a split shows before the first run
        for split in range(10):
            load_dataset(args.data, args.root, split, args.chunk)
    results = []
    for split in map(str, range(10)):
        one = argparse.Namespace(**{**vars(args), "split": split, "output": f"{args.output}/split-{split}"})
        last, checkpoint = f"{one.output}/last.pt", None
        if os.path.exists(last):
            one.resume, checkpoint = last, load_checkpoint(last, script, variants)
            same_flags(checkpoint, vars(one), last, recipe, but=())
        history = checkpoint["history"] if checkpoint else []
        done = len(history) == args.epochs and history[-1]["mAP"] != ""
        results.append(history[-1] if done else run(one, checkpoint, "the same command goes on"))
        print(f"split {split}: mAP {results[-1]['mAP']:.1f}   CMC-1 {results[-1]['rank-1']:.1f}" + " (finished before)" * done, flush=True)
    mean = {key: (statistics.mean(values), statistics.stdev(values)) for key in ("mAP", "rank-1") for values in [[r[key] for r in results]]}
    print("10 splits: " + "   ".join(f"{key} {m:.1f} +- {s:.1f}" for key, (m, s) in mean.items()))


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


def load_checkpoint(path, script, variants, training=True):
    """A checkpoint of `script` ("sinet.py"), as a run writes it; variants: those that it has; training: it must hold what going on
    takes, not only the network."""
    checkpoint = load_file(path)
    wanted = {"args": dict, "num_classes": int, "history": list, "model": dict}
    if checkpoint.get("script") != script or not all(isinstance(checkpoint.get(key), kind) for key, kind in wanted.items()) \
            or not {"data", "variant"} <= checkpoint["args"].keys():
        raise UserError(f"{path}: not a checkpoint of {script}")
    for key, names in ("data", DATA_SETS), ("variant", variants):
        if str(checkpoint["args"][key]) not in names:
            raise UserError(f"{path}: was trained with --{key} {checkpoint['args'][key]}, which {script} does not have")
    if training and not {"optimizer", "scheduler", "progress", "random"} <= checkpoint.keys():
        raise UserError(f"{path}: holds the network only: it can be evaluated, but not trained further")
    return checkpoint


def restore(path, checkpoint, **objects):
    """load_state_dict of each object with the checkpoint's state of the same name; UserError when one does not fit."""
    for name, target in objects.items():
        try:
            target.load_state_dict(checkpoint[name])
        except Exception as error:  # a state of another network raises many kinds
            raise UserError(f"{path}: its {name} does not fit ({' '.join(str(error).split())[:160]} ...)") from None


@contextlib.contextmanager
def replacing(path):
    """A file to write, beside `path`, that takes its place when it is whole and on disk; raises UserError when that fails."""
    aside = Path(f"{path}.tmp")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({str(error).strip().splitlines()[0]})"
                        + ("; the previous one is still whole" if os.path.exists(path) else "")) from None


def save_file(state, path):
    """torch.save that leaves the previous file in place until the new one is whole."""
    with replacing(path) as file:
        torch.save(state, file)


def save_rows(rows, path):
    """Dicts as a CSV file, with the keys of the first as its head; no rows, no file."""
    if not rows:
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


class RandomStates:
    """The states of torch's, numpy's and Python's global random generators; those of GPUs that are not there are left out."""

    @staticmethod
    def state_dict():
        kind, keys, *rest = np.random.get_state()
        return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all(), "numpy": (kind, keys.tolist(), *rest), "python": random.getstate()}

    @staticmethod
    def load_state_dict(states):
        torch.set_rng_state(states["torch"])
        for i, state in enumerate(states["cuda"][:torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, i)
        np.random.set_state(states["numpy"])
        random.setstate(states["python"])


# ----------------------------------------------------------------------------------------------------------- pictures
# Drawn with Pillow alone. A sheet is rows of (label, images).

_INK, _PALE = (25, 25, 25), (225, 225, 225)
_LINES = [(31, 90, 180), (220, 90, 20), (30, 140, 60), (190, 40, 50), (120, 80, 180), (120, 80, 60), (200, 90, 170), (90, 90, 90)]
_HEAT = np.array([(20, 20, 90), (30, 90, 200), (40, 190, 200), (150, 220, 90), (250, 220, 50), (245, 120, 30), (180, 10, 20)], np.float32)   # low to high


def watch(model, clips, *modules):
    """Runs the network on clips and returns what each of the modules saw and put out: for each a list of its calls, (inputs, output)."""
    calls = [[] for _ in modules]
    hooks = [m.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append((inputs, output))) for m, seen in zip(modules, calls)]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(clips)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return calls


def energy(x):
    """Maps (..., C, H, W) -> their root mean square over the channels, (..., H, W)."""
    return x.float().square().mean(-3).sqrt()


def _tile(frame, height):
    """A frame (3, H, W), uint8, as an image of this height."""
    image = Image.fromarray(frame.permute(1, 2, 0).cpu().numpy())
    return image.resize((round(height * image.width / image.height), height), Image.BICUBIC)


def overlays(frames, maps, low=None, high=None, height=120):
    """Maps (n, h, w) in colour over grey frames (n, 3, H, W), uint8: n images and a scale, blue `low` to red `high` (default: the maps'
    smallest and largest value). A map of NaN leaves its frame as it is; one of zeros and ones keeps its edges."""
    def coloured(m):
        m = m * (len(_HEAT) - 1)
        part = np.minimum(m.astype(int), len(_HEAT) - 2)
        return _HEAT[part] + (m - part)[..., None] * (_HEAT[part + 1] - _HEAT[part])
    known, images = maps[maps.isfinite()].float(), []
    low, high = (float(known.min()) if low is None else low), (float(known.max()) if high is None else high)
    for frame, m in zip(frames, maps.float().cpu()):
        image = _tile(frame, height)
        if m.isfinite().all():
            m = ((m - low) / max(high - low, 1e-12)).clamp(0, 1).numpy()
            m = np.asarray(Image.fromarray(m).resize(image.size, Image.NEAREST if ((m == 0) | (m == 1)).all() else Image.BILINEAR))
            image = Image.fromarray((0.55 * coloured(m) + 0.45 * np.asarray(image.convert("L"), np.float32)[..., None]).astype(np.uint8))
        images.append(image)
    scale = Image.new("RGB", (64, height), "white")
    scale.paste(Image.fromarray(np.repeat(coloured(np.linspace(1, 0, height - 12, dtype=np.float32))[:, None], 10, 1).astype(np.uint8)), (2, 6))
    for y, value, anchor in ((6, high, "lt"), (height - 6, low, "lb")):
        ImageDraw.Draw(scale).text((16, y), f"{value:.2g}", _INK, ImageFont.load_default(11), anchor)
    return [*images, scale]


def bars(values, names=None, height=120):
    """A bar chart of numbers, with their names below."""
    values = [float(v) for v in values]
    step = 58 if names else 4
    image = Image.new("RGB", (60 + step * len(values), height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    low, high = min(0.0, *values), max(0.0, *values) or 1e-12
    top, bottom = 18, height - (20 if names else 8)

    def y(v):
        return bottom - (bottom - top) * (v - low) / max(high - low, 1e-12)
    for i, v in enumerate(values):
        x = 46 + step * i
        draw.rectangle([x, min(y(v), y(0)), x + 0.7 * step, max(y(v), y(0))], _LINES[0])
        if names:
            draw.text((x + 0.35 * step, min(y(v), y(0)) - 1), f"{v:.3g}", _INK, font, "mb")
            draw.text((x + 0.35 * step, bottom + 4), str(names[i]), _INK, font, "mt")
    draw.line([44, y(0), image.width, y(0)], _INK)
    if not names:
        for v in {low, high}:
            draw.text((42, y(v)), f"{v:.3g}", _INK, font, "rm")
    return image


def _wrap(text, font, width):
    lines = [""]
    for word in text.split():
        if font.getlength(f"{lines[-1]} {word}") > width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def sheet(title, rows, path, label_width=200):
    """Draws rows of (label, images) below a title and writes the PNG file."""
    font, bold, gap = ImageFont.load_default(13), ImageFont.load_default(16), 6
    labels = [_wrap(label, font, label_width - 12) for label, _ in rows]
    heights = [max([im.height for im in images] + [17 * (label.count("\n") + 1)]) for label, (_, images) in zip(labels, rows)]
    width = label_width + max(sum(im.width + gap for im in images) for _, images in rows) + gap
    title = _wrap(title, bold, width - 16)
    top = 14 + 20 * (title.count("\n") + 1)
    image = Image.new("RGB", (width, top + sum(heights) + gap * len(rows) + gap), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 8), title, _INK, bold)
    for label, (_, images), height in zip(labels, rows, heights):
        draw.text((8, top), label, _INK, font)
        x = label_width
        for im in images:
            image.paste(im, (x, top))
            x += im.width + gap
        top += height + gap
    _write(image, path)


def _write(image, path):
    with replacing(path) as file:
        image.quantize(255, kmeans=1, dither=Image.Dither.FLOYDSTEINBERG).save(file, "PNG", optimize=True)
    print(f"wrote {path}", flush=True)


def _ticks(low, high):
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-12)))
    step = next(step * f for f in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (step * f) <= 7)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def plot(lines, title, xlabel, ylabel, path, size=(640, 400), limits=None, points=False, labels=(), rising=False):
    """Curves {name: (xs, ys)}, with axes and a legend, as a PNG file; points: dots and no legend; labels: (x, y, text) to write;
    limits: of y; rising: the legend stands at the bottom."""
    image = Image.new("RGB", (2 * size[0], 2 * size[1]), "white")                # drawn twice as large, for smooth lines
    draw, small, bold = ImageDraw.Draw(image), ImageFont.load_default(24), ImageFont.load_default(30)
    xs, ys = (np.concatenate([np.asarray(line[i], float) for line in lines.values()]) for i in (0, 1))
    x0, x1, (y0, y1) = xs.min(), xs.max(), limits or (ys.min(), ys.max())
    x0, x1, y0, y1 = x0 - 0.02 * (x1 - x0 or 1), x1 + 0.02 * (x1 - x0 or 1), y0 - 0.03 * (y1 - y0 or 1), y1 + 0.03 * (y1 - y0 or 1)
    left, right, top, bottom = 110, image.width - 30, 110, image.height - 90

    def at(x, y):
        return left + (right - left) * (x - x0) / (x1 - x0), bottom - (bottom - top) * (y - y0) / (y1 - y0)
    for v in _ticks(x0, x1):
        draw.line([at(v, y0), at(v, y1)], _PALE, 2)
        draw.text((at(v, 0)[0], bottom + 10), f"{v:g}", _INK, small, "mt")
    for v in _ticks(y0, y1):
        draw.line([at(x0, v), at(x1, v)], _PALE, 2)
        draw.text((left - 10, at(0, v)[1]), f"{v:.4g}", _INK, small, "rm")
    draw.rectangle([left, top, right, bottom], outline=_INK, width=2)
    draw.text((20, 16), title, _INK, bold)
    draw.text(((left + right) / 2, image.height - 14), xlabel, _INK, small, "mb")
    draw.text((20, top - 14), ylabel, _INK, small, "lb")
    for i, (name, (x, y)) in enumerate(lines.items()):
        colour, dots = _LINES[i % len(_LINES)], [at(*p) for p in zip(x, y)]
        if not points:
            draw.line(dots, colour, 5, "curve")
            row = (bottom - 32 * len(lines) if rising else top + 30) + 32 * i
            draw.line([right - 330, row, right - 290, row], colour, 5)
            draw.text((right - 280, row), name, _INK, small, "lm")
        for a, b in dots:
            draw.ellipse([a - 7, b - 7, a + 7, b + 7], colour)
    for x, y, text in labels:
        draw.text(at(x, y), text, _INK, small, "mm", stroke_width=4, stroke_fill="white")
    _write(image.reduce(2), path)


def figures(model, dataset, picture, args, split, size, metric, history, **extraction):
    """--figure: writes what a network does into the folder args.figure: for args.figure_tracklets queries the paper's own picture and the
    ranked list, then the CMC curve, the training curves of `history` (rows of log.csv) and the embedding.

    picture: (model, clips (1, T, 3, H, W), normalised, frames (T, 3, H, W), uint8) -> (title, rows of `sheet`); the others: see `evaluate`.
    """
    folder, T, device = Path(args.figure), args.frames, next(model.parameters()).device
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--figure {folder}: cannot be written ({error.strerror})") from None
    q, g = test_features(model, dataset, split, T, size, **extraction)
    if rank():
        return
    ids, state = test_ids(dataset), (f"after epoch {len(history)}" if history else "untrained") + ", re-ranked" * args.rerank
    d = _ranked(q, g, metric, args.rerank)
    cmc, mean_ap, _ = cmc_map(d, *ids)
    q_pids, q_cams, g_pids, g_cams = ids
    matched = [i for i in range(len(q)) if ((g_pids == q_pids[i]) & (g_cams != q_cams[i])).any()]
    chosen = [matched[j] for j in np.linspace(0, len(matched) - 1, min(args.figure_tracklets, len(matched))).round().astype(int)]
    for i, d in zip(chosen, d[chosen] if args.rerank else distances(q[chosen], g, metric).cpu().numpy()):
        t, name = dataset.query[i], f"query-{i + 1}-person-{q_pids[i]}-camera-{q_cams[i]}"
        frames = read_clip([t.frames[k] for k in split(len(t.frames), T)[0]], size)
        title, rows = picture(model, normalize(frames[None].to(device)), frames)
        sheet(f"{title}; {args.variant}, {state}; person {q_pids[i]}, camera {q_cams[i]}",
              [(f"{T} frames of the clip", [_tile(f, 120) for f in frames]), *rows], folder / f"{name}.png")
        # the metric's ranking: without the query's own identity under its own camera
        order = [j for j in np.argsort(d, kind="stable") if not (g_pids[j] == q_pids[i] and g_cams[j] == q_cams[i])][:8]

        def strip(t, colour):
            shown = [_tile(f, 110) for f in read_clip([t.frames[k] for k in np.linspace(0, len(t.frames) - 1, 6).astype(int)], size)]
            image = Image.new("RGB", (sum(im.width for im in shown) + 12, 122), colour)
            for k, im in enumerate(shown):
                image.paste(im, (6 + k * im.width, 6))
            return image
        rows = [(f"query: person {q_pids[i]}, camera {q_cams[i]}", [strip(t, (60, 60, 60))])]
        for place, j in enumerate(order, 1):
            right = g_pids[j] == q_pids[i]
            who = f"person {g_pids[j]}" if g_pids[j] else "distractor"
            rows.append((f"{place}. {'right' if right else 'wrong'}: {who}, camera {g_cams[j]}, distance {d[j]:.3f}",
                         [strip(dataset.gallery[j], (30, 160, 60) if right else (210, 40, 40))]))
        sheet(f"Ranked list; {args.variant}, {state}", rows, folder / f"{name}-ranked.png")
    places = np.arange(1, len(cmc) + 1)
    plot({f"rank-1 {100 * cmc[0]:.1f}, mAP {100 * mean_ap:.1f}": (places, 100 * cmc)}, f"CMC on {args.data}; {args.variant}, {state}", "rank",
         "queries with a match so far, %", folder / "cmc.png", limits=(0, 100), rising=True)
    if len(history) > 1:
        losses = [key for key in history[0] if key not in ("epoch", "lr", "mAP", "rank-1")]
        plot({key: ([row["epoch"] for row in history], [row[key] for row in history]) for key in losses}, f"Training on {args.data}; {args.variant}", "epoch",
             "loss and its parts, means of the epoch", folder / "training.png")
    x = torch.cat([q, g]).float().cpu()
    x = torch.nn.functional.normalize(x, dim=1) if metric == "cosine" else x
    x, pids = x - x.mean(0), np.concatenate([q_pids, g_pids])
    ways = {"pca": ("PCA", (x @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T).numpy())}
    try:
        from sklearn.manifold import TSNE
        ways["t-sne"] = ("t-SNE", TSNE(perplexity=min(30, len(x) / 4), random_state=0).fit_transform(x.numpy()))
    except ImportError:
        print("t-SNE is left out: scikit-learn is not installed (pip install scikit-learn)")
    people = [p for p in sorted(set(pids)) if p > 0][:24]
    for name, (way, xy) in ways.items():
        plot({p: xy[pids == p].T for p in people}, f"{way} of the test tracklets' features; {args.variant}, {state}", "number: identity, at the mean of its tracklets", "",
             folder / f"{name}.png", (640, 480), points=True, labels=[(*xy[pids == p].mean(0), str(p)) for p in people])
