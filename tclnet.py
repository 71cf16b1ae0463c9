"""TCLNet: Temporal Complementary Learning for Video Person Re-identification.

Hou, Chang, Ma, Shan, Chen. ECCV 2020. https://arxiv.org/abs/2007.09357

The frames of a clip are much alike, and a network sees the same salient part in each. TSE erases from a frame what the
learners of the frames before have seen, so that its own learner has to find another part. TSB spreads the salient part of
every frame to the others first, so that little is lost by the erasing.

    python tclnet.py                                  # a small run on synthetic data, on any machine
    python tclnet.py --data mars --gpu 0              # the paper's recipe
    python tclnet.py --data mars --variant base+tse   # a row of its tables (see VARIANTS)

Where to find what:
    Sec. 3.1, Eq. 3    CorrelationLayer                        Sec. 3.2, Eq. 6, Fig. 3  TemporalSaliencyBoosting (TSB)
    Sec. 3.1, Fig. 2b  BlockBinarization                       Sec. 3.3, Fig. 4         TCLNet; objective
    Sec. 3.1, Eq. 4-5  SaliencyErasingOperation (SEO)          Sec. 4.4, Table 4        NonLocalBlock, TemporalConv
    Sec. 3.1, Eq. 1-2  TemporalSaliencyErasing (TSE)

What the paper leaves open, and the reading taken:
    erased map        F * B + BN(sum over positions of G * F), the sum for all positions, BN starting at zero: the only use of
                      G read here that neither shrinks with the map nor adds to the printed parameters (but for BN's 2,048); it lets
                      gradients reach w
    first frame       B = 1 and, the product of no correlation maps being 1, G = softmax(1): uniform
    Eq. 3             divided by sqrt(D), because the softmax saturates on plain products (scaled=False: the printed form);
                      one w for all pairs of frames; f_k is the average-pooled vector, without gradient
    block search      the block lies inside the map (N_pos of the paper); the first of equal maxima wins
    erased size       h_e and w_e are given for the 16 x 8 map of 256x128 frames and scale with the map
    TSB               the memory holds the other T - 1 frames, no projections, tau = 5, BN starting at zero
    BatchNorm         the two shared blocks and SEO's BN see one frame of every segment at a time, in training too
    test              BN, then L2 of each learner's vector, concatenated, clip by clip; the clips are averaged after that
    training clips    frames 8 apart, in test consecutive ones; N = 3 takes clips of 6 frames
    batch of 32       8 identities x 4 clips, losses summed over the learners, cosine triplet with margin 0.4 on the BN neck's output,
                      weight decay 5e-4; an epoch shows every identity once (some of the last batch twice)
    parameters        all rows with N = 2 are printed as 29.9 million; the modules have 30.07, which N = 3 and 4 confirm
    Table 4           non-local block after stage 3 (c' = 512, no biases; its cost is printed four times too high); DropBlock after stages 3
                      and 4, p = 0.1, 7x7 or the largest odd block that fits; RE with p = 0.5; 3D: the first convolution of all
                      sixteen blocks becomes 3x1x1 (has the printed GFLOPs, 32.2M parameters for 33.7M)

Single images (Sec. 4.3): TSE takes clips of one frame, too, and repeats it over the learners, so that they find different parts
of one image: build TCLNet with frames=1, tsb=(), or call TSE on maps (B, 1, D, H, W).
"""
import argparse
import contextlib
import copy
import functools
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

from common import (RandomStates, Stop, all_splits, batch_hard_triplet, catch_signals, command_line, compiled, complexity, complexity_table, energy, evaluate,
                    figures, first_process_first, gather, load_checkpoint, load_file, number, overlays, own_group, parallel, pick_device, quiet, rank,
                    replacing, restore, same_flags, save_file, save_rows, stop_asked, watch, world)
from data import CHUNK, DATA_SETS, SPLIT_SETS, PKSampler, TrainClips, UserError, load_dataset, normalize, sample_strided, split_consecutive


# ---------------------------------------------------------------------------------- Sec. 3.1: temporal saliency erasing

class CorrelationLayer(nn.Module):
    """Eq. 3: how much every position of a frame has to do with what the learners of former frames have seen.

    F_n (B, D, H, W), f (B, K, D1), the vectors of K former frames -> R (B, K, H, W).
    channels: D; features: D1; scaled: divide by sqrt(D) (False: as printed).
    """

    def __init__(self, channels, features, scaled=True):
        super().__init__()
        self.w = nn.Linear(features, channels, bias=False)                      # f -> w^T f
        self.scale = channels ** -0.5 if scaled else 1.0

    def forward(self, x, f):
        r = self.w(f.detach()) @ x.flatten(2) * self.scale                      # Eq. 3
        return r.unflatten(2, x.shape[2:])


class BlockBinarization(nn.Module):
    """Block binarization layer: 0 in the block of the highest correlation, 1 elsewhere.

    R (..., H, W) -> B (..., H, W), always with exactly h_e * w_e zeros; no gradient.
    block: (h_e, w_e), height and width of the block, H >= h_e, W >= w_e; stride: (s_h, s_w), its vertical and horizontal steps.
    """

    def __init__(self, block, stride=(1, 1)):
        super().__init__()
        self.block, self.stride = tuple(block), tuple(stride)

    @torch.no_grad()
    def forward(self, r):
        (H, W), (h, w), (s_h, s_w) = r.shape[-2:], self.block, self.stride
        if h > H or w > W:
            raise ValueError(f"a block of {h}x{w} does not fit into maps of {H}x{W}")
        sums = F.avg_pool2d(r.reshape(-1, 1, H, W), self.block, self.stride)    # (..., 1, N_pos rows, N_pos columns)
        best, columns = sums.flatten(1).argmax(1), sums.shape[-1]
        top, left = (best // columns * s_h)[:, None, None], (best % columns * s_w)[:, None, None]
        y, x = torch.arange(H, device=r.device)[:, None], torch.arange(W, device=r.device)
        inside = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)
        return (~inside).to(r.dtype).view_as(r)


class SaliencyErasingOperation(nn.Module):
    """SEO, Fig. 2 (b): erases from a frame what the learners of the former frames have seen.

    F_n (B, D, H, W), f (B, n - 1, D1), the vectors of the former frames (n = 1: none) -> erased F_n (B, D, H, W).
    channels: D; features: D1; block, stride: see BlockBinarization; scaled: see CorrelationLayer.
    """

    def __init__(self, channels, features, block, stride=(1, 1), scaled=True):
        super().__init__()
        self.correlation = CorrelationLayer(channels, features, scaled)
        self.binarization = BlockBinarization(block, stride)
        self.bn = nn.BatchNorm1d(channels)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x, f):
        r = self.correlation(x, f)
        r = r.to(torch.promote_types(r.dtype, torch.float32))
        mask = self.binarization(r).prod(1)                                     # B_n, Eq. 4
        gate = r.prod(1).flatten(1).softmax(1) * mask.flatten(1)                # G_n, Eq. 5
        attended = self.bn((x.flatten(2) @ gate.to(x.dtype)[:, :, None])[:, :, 0])
        return x * mask[:, None].to(x.dtype) + attended[:, :, None, None].to(x.dtype)


class TemporalSaliencyErasing(nn.Module):
    """TSE, Fig. 2 (a), Eq. 1-2, 7: N ordered learners for N consecutive frames, each for the parts that those before missed.

    Maps (B, T, D, H, W) -> frame vectors c (B, T/N, N, D1), by segments of N frames. T divisible by N; T = 1 is repeated for
    all learners (single images, Sec. 4.3).
    shared: the layers that all learners share; learners: N modules, L_n without the shared ones;
    channels: D; features: D1; block, stride, scaled: see SaliencyErasingOperation; erase: False leaves it out; pool: "avg" or "max" of
    the vectors returned (SEO takes the averages).
    """

    def __init__(self, shared, learners, channels, features, block, stride=(1, 1), scaled=True, erase=True, pool="avg"):
        super().__init__()
        self.shared, self.learners, self.pool = shared, nn.ModuleList(learners), pool
        self.seo = SaliencyErasingOperation(channels, features, block, stride, scaled) if erase and len(learners) > 1 else None

    def forward(self, x):
        B, T = x.shape[:2]
        N = len(self.learners)
        if T == 1:
            x, T = x.expand(-1, N, -1, -1, -1), N
        if T % N:
            raise ValueError(f"TSE with {N} learners needs clips of a multiple of {N} frames, not {T}")
        x = x.reshape(B * T // N, N, *x.shape[2:])                              # all segments C_k at once
        seen, features = [], []
        for n, learner in enumerate(self.learners):
            frame = x[:, n].contiguous(memory_format=torch.channels_last)
            if self.seo:
                frame = self.seo(frame, torch.stack(seen, 1) if n else frame.new_empty(len(x), 0, self.seo.correlation.w.in_features))
            y = learner(self.shared(frame))
            seen.append(y.mean((2, 3)))                                         # f_n, Eq. 1-2
            features.append(seen[-1] if self.pool == "avg" else y.amax((2, 3)))
        return torch.stack(features, 1).view(B, T // N, N, -1)                  # Eq. 7


# -------------------------------------------------------------------------------- Sec. 3.2: temporal saliency boosting

class TemporalSaliencyBoosting(nn.Module):
    """TSB, Fig. 3, Eq. 6: every frame gets what the other frames show of its own salient part.

    (B, T, D, H, W) -> (B, T, D, H, W), T >= 2. tau: temperature of the softmax over the cosine similarities. Starts as identity.
    """

    def __init__(self, channels, tau=5.0):
        super().__init__()
        self.tau = tau
        self.bn = nn.BatchNorm1d(channels)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x):
        B, T, D, H, W = x.shape
        if T < 2:
            raise ValueError("TSB needs clips of at least 2 frames: the memory of a frame are the others")
        q = F.normalize(x.mean((3, 4)), dim=2)                                  # (B, T, D)
        memory = x.movedim(2, 4).reshape(B, T * H * W, D)
        norm = torch.linalg.vector_norm(memory, dim=2, dtype=torch.promote_types(x.dtype, torch.float32)).clamp(min=1e-12)
        a = self.tau * (q @ memory.transpose(1, 2)) / norm[:, None]             # (B, T, T*H*W)
        own = torch.eye(T, dtype=torch.bool, device=x.device).repeat_interleave(H * W, 1)
        a = a.masked_fill(own, -math.inf).softmax(2)                            # Eq. 6; a frame is not in its own memory
        o = (a.to(x.dtype) @ memory).flatten(0, 1)
        return self.bn(o).to(x.dtype).view(B, T, D, 1, 1) + x


# --------------------------------------------------------------------- Sec. 4.4: what Table 4 compares the modules with

class NonLocalBlock(nn.Module):
    """Non-local block (Wang et al., CVPR 2018), embedded Gaussian, over all positions of a clip. (B, T, C, H, W), same shape out."""

    def __init__(self, channels):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(channels, channels // 2, 1, bias=False) for _ in range(3))
        self.out = nn.Sequential(nn.Conv2d(channels // 2, channels, 1, bias=False), nn.BatchNorm2d(channels))
        nn.init.zeros_(self.out[1].weight)

    def forward(self, x):
        B, T, C, H, W = x.shape
        frames = x.flatten(0, 1)
        theta, phi, g = (layer(frames).view(B, T, -1, H, W).transpose(1, 2).flatten(2).transpose(1, 2)
                         for layer in (self.theta, self.phi, self.g))           # (B, m, C/2)
        y = F.scaled_dot_product_attention(theta[:, None], phi[:, None], g[:, None], scale=1.0)[:, 0]
        y = y.transpose(1, 2).view(B, -1, T, H, W).transpose(1, 2).flatten(0, 1)
        return self.out(y).view(B, T, C, H, W) + x


class TemporalConv(nn.Module):
    """A 3x1x1 convolution in place of the 1x1 `conv`, equal to it at the start. (B*T, C, H, W) -> (B*T, C', H, W); frames: T."""

    def __init__(self, conv, frames):
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv3d(conv.in_channels, conv.out_channels, (3, 1, 1), padding=(1, 0, 0), bias=False)
        with torch.no_grad():
            self.conv.weight.zero_()[:, :, 1].copy_(conv.weight)

    def forward(self, x):
        return self.conv(x.unflatten(0, (-1, self.frames)).transpose(1, 2)).transpose(1, 2).flatten(0, 1)


# ------------------------------------------------------------------------------------------------- Sec. 3.3: network

def resnet50(weights, last_stride=1):  # same in every script
    """torchvision's ResNet-50, by default with the last stride removed. weights: "imagenet", "none" or a file with its state_dict."""
    try:
        with contextlib.redirect_stderr(sys.stdout):                            # torch.hub reports the download there
            # zero_init_residual: without pretrained weights a deep network starts to learn much sooner; weights overwrite it
            net = torchvision.models.resnet50(weights="IMAGENET1K_V1" if weights == "imagenet" else None, zero_init_residual=True)
    except Exception as error:  # a damaged file raises many kinds
        raise UserError(f"--weights imagenet: torchvision cannot get its ResNet-50 ({error}); put resnet50-0676ba61.pth into "
                        f"{torch.hub.get_dir()}/checkpoints, name a file, or use --weights none") from None
    if weights not in ("imagenet", "none"):
        state = {str(k): v for k, v in load_file(weights).items() if not str(k).startswith("fc.")}
        try:
            net.load_state_dict({**state, "fc.weight": net.fc.weight, "fc.bias": net.fc.bias})
        except RuntimeError as error:
            raise UserError(f"{weights}: not the weights of torchvision's ResNet-50 ({' '.join(str(error).split())[:160]} ...); "
                            "the checkpoint of a run goes to --resume") from None
    net.layer4[0].conv2.stride = net.layer4[0].downsample[0].stride = (last_stride, last_stride)
    return net


class TCLNet(nn.Module):
    """TCLNet, Fig. 4: ResNet-50 whose stage 4 makes the learners of TSE, with TSBs between the stages; a BN neck a learner.

    Clips (B, T, 3, H, W), normalised -> in eval mode embeddings (B, N * 2048), the learners' L2-normalised vectors; in train
    mode embeddings (B, N, 2048) and logits (B, N, num_classes).

    frames, height, width: T, H, W; T a multiple of N (or 1), the map H/16 x W/16 larger than what N - 1 blocks erase.
    learners: N >= 1 (1: no erasing); erase: False is "TSE-wo-SEO"; block: (h_e, w_e) at a 16x8 map; tsb: stages with a TSB behind
    them, of 1, 2, 3; tau: see TSB; scaled: see CorrelationLayer; extra: None or what Table 4 compares with, "dropblock", "3d" or
    "nl"; pool: "avg" or "max" over the final map; weights: see resnet50. Raises ValueError for a size that it cannot take.
    """

    def __init__(self, num_classes, frames=4, height=256, width=128, learners=2, erase=True, block=(3, 8), tsb=(2,), tau=5.0,
                 scaled=True, extra=None, pool="avg", weights="none"):
        super().__init__()
        if frames % learners and frames > 1:
            raise ValueError(f"{learners} learners take clips of {learners}, {2 * learners}, {3 * learners} ... frames, not {frames}")
        if tsb and frames < 2:
            raise ValueError(f"TSB takes the other frames of a clip for its memory: it needs at least 2 frames, not {frames}")
        rows, columns = -(-height // 16), -(-width // 16)
        block = max(1, int(block[0] * rows / 16 + 0.5)), max(1, min(columns, int(block[1] * columns / 8 + 0.5)))
        if erase and learners > 1 and block[1] == columns and (learners - 1) * block[0] >= rows:
            raise ValueError(f"{learners - 1} erased block(s) of {block[0]}x{block[1]} can cover the whole {rows}x{columns} map of {height}x{width} frames: "
                             "use a larger height")
        if extra == "3d" and learners > 1 or extra == "nl" and 3 in tsb:
            raise ValueError('"3d" goes with one learner, "nl" stands where the TSB of stage 3 would')
        net = resnet50(weights)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2, self.layer3 = net.layer1, net.layer2, net.layer3
        self.after = nn.ModuleDict({f"layer{stage}": TemporalSaliencyBoosting((256, 512, 1024)[stage - 1], tau) for stage in tsb})
        *shared, last = net.layer4
        if extra == "nl":
            self.after["layer3"] = NonLocalBlock(1024)
        if extra == "dropblock":
            drop = torchvision.ops.DropBlock2d(0.1, min(7, rows - 1 + rows % 2, columns - 1 + columns % 2))   # odd, and inside the map
            shared, last = [drop, *shared], nn.Sequential(last, drop)
        if extra == "3d":
            for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
                for bottleneck in stage:
                    bottleneck.conv1 = TemporalConv(bottleneck.conv1, frames)
        self.tse = TemporalSaliencyErasing(nn.Sequential(*shared), [copy.deepcopy(last) for _ in range(learners)], 1024, 2048, block,
                                           scaled=scaled, erase=erase, pool=pool)
        self.neck = nn.ModuleList(nn.BatchNorm1d(2048) for _ in range(learners))
        self.classifier = nn.ModuleList(nn.Linear(2048, num_classes, bias=False) for _ in range(learners))
        for layer in self.classifier:
            nn.init.normal_(layer.weight, std=0.001)

    def forward(self, clips):
        B, T = clips.shape[:2]
        x = self.stem(clips.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        for name in ("layer1", "layer2", "layer3"):
            x = getattr(self, name)(x)
            if name in self.after:
                x = self.after[name](x.unflatten(0, (B, T))).flatten(0, 1)
        v = self.tse(x.unflatten(0, (B, T))).mean(1).to(self.neck[0].weight.dtype)   # Eq. 7, TAP over the segments: (B, N, 2048)
        embeddings = [neck(v[:, n]) for n, neck in enumerate(self.neck)]
        if not self.training:
            return torch.cat([F.normalize(e, dim=1) for e in embeddings], 1)
        logits = [layer(e) for layer, e in zip(self.classifier, embeddings)]
        return torch.stack(embeddings, 1), torch.stack(logits, 1)


# ------------------------------------------------------------------------------------------------------------- variants

# Rows of Tables 1 to 4: constructor arguments, and the figures as printed in the paper. The first row is "TCLNet-tri" of Table 1;
# Tables 2 to 4 are printed for the cross entropy alone (tclnet-xent is TCLNet there, base+tse-n1 is base).
BASE = dict(learners=1, tsb=())
VARIANTS = {
    "tclnet": (dict(), (85.1, 89.8, 16.259, 29.9)),
    "tclnet-xent": (dict(), (83.0, 88.8, 16.259, 29.9)),
    "base": (BASE, (79.6, 86.8, 16.246, 23.5)),
    "base+tse-wo-seo": (dict(tsb=(), erase=False), (80.9, 87.2, 16.246, 27.9)),
    "base+tse": (dict(tsb=()), (82.5, 88.2, 16.251, 29.9)),
    "base+tsb": (dict(learners=1), (82.3, 87.6, 16.254, 23.5)),
    "tclnet-tsb1": (dict(tsb=(1,)), (82.2, 87.4, 16.267, 29.9)),
    "tclnet-tsb2": (dict(tsb=(2,)), (83.0, 88.8, 16.259, 29.9)),
    "tclnet-tsb3": (dict(tsb=(3,)), (82.6, 88.2, 16.255, 29.9)),
    "tclnet-tsb23": (dict(tsb=(2, 3)), (82.7, 88.2, 16.263, 29.9)),
    "base+tse-n1": (BASE, (79.6, 86.8, 16.246, 23.5)),
    "base+tse-n2": (dict(tsb=()), (82.5, 88.2, 16.251, 29.9)),
    "base+tse-n3": (dict(learners=3, tsb=()), (82.4, 88.4, 16.252, 34.5)),
    "base+tse-n4": (dict(learners=4, tsb=()), (81.0, 87.0, 16.253, 38.9)),
    "base+tse-he2": (dict(block=(2, 8), tsb=()), (81.8, 87.2)),
    "base+tse-he3": (dict(block=(3, 8), tsb=()), (82.5, 88.2)),
    "base+tse-he4": (dict(block=(4, 8), tsb=()), (82.0, 87.4)),
    "base+tse-he5": (dict(block=(5, 8), tsb=()), (81.7, 87.2)),
    "base+dropblock": (dict(extra="dropblock", **BASE), (79.8, 86.9)),
    "base+re": (BASE, (81.5, 86.6)),
    "base+tse+re": (dict(tsb=()), (82.9, 88.1)),
    "base+3d": (dict(extra="3d", **BASE), (80.0, 86.1, 22.756, 33.7)),
    "base+nl": (dict(extra="nl", **BASE), (82.4, 87.6, 21.615, 25.6)),
    "base+tse+nl": (dict(extra="nl", tsb=()), (82.6, 87.6, 21.619, 32.1)),
}
COLUMNS = "mAP and rank-1 on MARS, GFLOPs of 4 frames and millions of parameters"
PRINTED, HEADS = ("GFLOPs of 4 frames", "million parameters"), ("neck", "classifier")  # what the figures after rank-1 are; parts that the paper does not count
ROW_RECIPE = {row: dict(loss="xent") for row in list(VARIANTS)[1:]}              # row -> what it changes in the recipe
ROW_RECIPE["base+re"]["erase"] = ROW_RECIPE["base+tse+re"]["erase"] = 0.5
ROW_RECIPE["base+tse-n3"]["frames"] = 6                                         # a multiple of N


# ------------------------------------------------------------------------------------------------- Sec. 3.3: objective

def objective(outputs, pids, args):
    """Sec. 3.3: cross entropy, and with --loss xent+tri the triplet loss, of every learner, summed; and the parts, {name: scalar}."""
    embeddings, logits = (x.float().unbind(1) for x in outputs)
    parts = {"xent": sum(F.cross_entropy(x, pids) for x in logits)}
    if args.loss == "xent+tri":
        parts["triplet"] = sum(batch_hard_triplet(x, pids, args.margin) for x in embeddings)
    return sum(parts.values()), parts


def picture(model, clips, frames):
    """For --figure, after Figures 2 and 5: of each frame R, the erased block and what its learner sees; the first learner has no R."""
    tse = model.tse
    calls = watch(model, clips, *tse.learners, *([tse.seo.correlation, tse.seo.binarization] if tse.seo else []))

    def by_frame(maps):                                                         # those of N learners, (segments, h, w) each
        return torch.stack(maps, 1).flatten(0, 1)
    rows = []
    if tse.seo:
        r, b = ([y for _, y in seen] for seen in calls[-2:])                    # the mean over no former learner is NaN: no map
        rows = [("R: correlation with what the former learners saw", overlays(frames, by_frame([y.mean(1) for y in r]))),
                ("erased: the block that B sets to 0", overlays(frames, by_frame([1 - y.prod(1) + 0 * y.mean(1) for y in b]), 0, 1))]
    rows.append(("what the learners see: root mean square of the channels", overlays(frames, by_frame([energy(seen[0][1]) for seen in calls[:len(tse.learners)]]))))
    return f"TCLNet: {len(tse.learners)} learners take turns on the frames", rows


# ------------------------------------------------------------------------------------------------------------ training

RECIPE = dict(epochs=150, ids=8, clips=4, frames=4, height=256, width=128, lr=3e-4, lr_step=40, erase=0.0, pool="avg", weights="imagenet",
              tau=5.0, loss="xent+tri", margin=0.4)                             # Sec. 4.1
SMALL = dict(epochs=8, ids=4, clips=2, height=128, width=64, lr=5e-4, lr_step=7, pool="max", weights="none")  # --data synthetic
SAMPLER, SAMPLE, SPLIT, METRIC = (PKSampler, functools.partial(sample_strided, stride=8), split_consecutive,
                                  "cosine")                                     # batches and clips in training, clips in test; distance


def add_paper_arguments(group):
    group.add_argument("--loss", choices=("xent", "xent+tri"), help=f"of every learner: cross entropy, with or without triplet (default {RECIPE['loss']})")
    for name, text in (("tau", "temperature of TSB, Eq. 6"), ("margin", "of the triplet loss, cosine distance")):
        group.add_argument(f"--{name}", type=number(float, 0), metavar="X", help=f"{text} (default {RECIPE[name]})")


def build(args, num_classes, weights):
    options, _ = VARIANTS[args.variant]
    return TCLNet(num_classes, args.frames, args.height, args.width, tau=args.tau, pool=args.pool, weights=weights, **options)


def make_optimizer(model, args):
    return torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=5e-4)


def parse_args():  # same in every script
    """Command line -> (arguments, the checkpoint of --resume or None). What the user leaves out comes from the checkpoint,
    then from the recipe of the data set."""
    def default(key):
        return f"default {RECIPE[key]}" + (f", synthetic {SMALL[key]}" if key in SMALL else "")

    title, *_ = __doc__.split("\n")
    rows = "\n".join(f"  {name:22} {'  '.join(map(str, printed or '-')):28}{' '.join(f'--{k} {v}' for k, v in ROW_RECIPE.get(name, {}).items())}".rstrip()
                     for name, (_, printed) in VARIANTS.items())
    parser = argparse.ArgumentParser(description=title, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                     epilog=f"variants, with {COLUMNS} as printed in the paper, and the flags they change:\n{rows}")
    parser.error = lambda message: (_ for _ in ()).throw(UserError(f"{message} (--help lists the flags)"))
    group = parser.add_argument_group("data")
    group.add_argument("--data", choices=DATA_SETS, help="data set (default synthetic, with a small recipe)")
    group.add_argument("--root", metavar="DIR", help="folder that holds the data sets, DIR/mars, DIR/duke ..., or the set itself (default datasets)")
    group.add_argument("--split", choices=(*map(str, range(10)), "all"), help="of ilids and prid; all: one after another, with the mean (default 0)")
    group.add_argument("--chunk", type=number(int, 0), metavar="FRAMES", help="cut training tracklets into pieces of so many frames, 0: do not "
                       f"(default {', '.join(f'{name} {frames}' for name, frames in CHUNK.items())}, others 0)")
    group.add_argument("--frames", type=number(int, 1), metavar="T", help=f"frames a clip ({default('frames')})")
    group.add_argument("--height", type=number(int, 1), metavar="PIXELS", help=f"of the resized frames ({default('height')})")
    group.add_argument("--width", type=number(int, 1), metavar="PIXELS", help=f"of the resized frames ({default('width')})")
    group.add_argument("--workers", type=number(int, 0), metavar="N", help="loader processes (default: up to 8 with a GPU, else 0)")
    group = parser.add_argument_group("model")
    group.add_argument("--variant", choices=VARIANTS, metavar="NAME", help=f"row of the paper's tables, see below (default {next(iter(VARIANTS))})")
    group.add_argument("--weights", metavar="{imagenet,none,FILE}", help="backbone: torchvision's ImageNet weights, none, or a state_dict of "
                       f"torchvision's resnet50 ({default('weights')})")
    group.add_argument("--pool", choices=("avg", "max"), help=f"spatial pooling of the final map ({default('pool')})")
    add_paper_arguments(parser.add_argument_group("of this paper"))
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=number(int, 1), metavar="N", help=default("epochs"))
    group.add_argument("--ids", type=number(int, 2), metavar="P", help=f"P of the P x K clips in a batch ({default('ids')})")
    group.add_argument("--clips", type=number(int, 1), metavar="K", help=f"K of them ({default('clips')})")
    group.add_argument("--lr", type=number(float, 0), help=f"learning rate ({default('lr')})")
    group.add_argument("--lr-step", type=number(int, 1), metavar="N", help=f"epochs after which it is divided by 10 ({default('lr_step')})")
    group.add_argument("--erase", type=number(float, 0, 1), metavar="P", help=f"probability of random erasing ({default('erase')})")
    group.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast")
    group.add_argument("--compile", action="store_true", default=None, help="torch.compile, where a compiler is there")
    group.add_argument("--seed", type=number(int, 0), metavar="N", help="of weights, batches and augmentation (default 0)")
    group = parser.add_argument_group("run")
    group.add_argument("--gpu", metavar="N", help="GPU, or cpu (default: the first GPU, else the CPU)")
    group.add_argument("--output", metavar="DIR", help=f"for log.csv, args.json and last.pt (default runs/{Path(__file__).stem}-DATA[-VARIANT][/split-N])")
    group.add_argument("--resume", nargs="?", const="auto", metavar="FILE", help="go on with the run of this last.pt; auto, or no FILE: with that of "
                       "--output, when there is one")
    group.add_argument("--checkpoint-every", type=number(int, 1), metavar="N", help="write last.pt and log.csv after every N epochs (default 1)")
    group.add_argument("--evaluate", action="store_true", help="only evaluate, with --resume FILE or as initialised")
    group.add_argument("--figure", metavar="DIR", help="only draw what the network does, with --resume FILE or as initialised, into DIR")
    group.add_argument("--figure-tracklets", type=number(int, 1), default=3, metavar="N", help="query tracklets to draw (default 3)")
    group.add_argument("--complexity", nargs="?", const="text", choices=("text", "md"), help="only print parameters and FLOPs of all variants, beside the paper's")
    group.add_argument("--eval-every", type=number(int, 0), metavar="N", help="also evaluate after every N epochs (default 0: at the end only)")
    group.add_argument("--rerank", action=argparse.BooleanOptionalAction, help="k-reciprocal re-ranking in the evaluation")
    args = parser.parse_args()
    args.evaluate |= args.figure is not None
    chosen = {key: value for key, value in vars(args).items() if value is not None}
    data, variant = chosen.get("data", "synthetic"), chosen.get("variant", next(iter(VARIANTS)))

    def folder():
        return f"runs/{Path(__file__).stem}-{data}" + f"-{variant}" * (variant != next(iter(VARIANTS))) + f"/split-{args.split or 0}" * (
            data in SPLIT_SETS and args.split != "all")
    if args.resume == "auto":
        last = f"{args.output or folder()}/last.pt"
        chosen["resume"] = args.resume = last if args.evaluate or os.path.exists(last) else None
    checkpoint, saved = None, {}
    if args.resume:
        checkpoint = load_checkpoint(args.resume, Path(__file__).name, VARIANTS, training=not args.evaluate)
        saved = {key: value for key, value in checkpoint["args"].items() if key not in ("gpu", "workers", "evaluate", "resume", "compile", "figure", "figure_tracklets")}
        same_flags(checkpoint, chosen, args.resume, RECIPE)
        saved["output"] = str(Path(args.resume).parent)
        data, variant = chosen.get("data", saved["data"]), chosen.get("variant", saved["variant"])
    if args.split and data not in SPLIT_SETS:
        raise UserError(f"--split: {data} has no splits, {' and '.join(SPLIT_SETS)} have")
    if args.split == "all" and (args.resume or args.evaluate):
        raise UserError("--split all: goes on by itself; --resume and --evaluate take one split")
    recipe = dict(data=data, root="datasets", variant=variant, split="0", chunk=CHUNK.get(data, 0), amp=False, compile=False, seed=0, eval_every=0, rerank=False,
                  checkpoint_every=1, output=folder())
    row, small = ROW_RECIPE.get(variant, {}), SMALL if data == "synthetic" else {}
    recipe |= RECIPE | small | {key: value for key, value in row.items() if key == "frames" or key not in small}
    return argparse.Namespace(**{**vars(args), **recipe, **saved, **chosen}), checkpoint


def train_epoch(model, loader, optimizer, device, args, epoch, steps, totals):  # same in every script
    """An epoch from its step `steps` on, before which the losses added up to `totals`; returns (steps, totals) where it
    ended, which is early when a signal asks for it."""
    model.train()
    last = Path(args.output) / "last.pt"
    with tqdm(total=len(loader) * args.ids * args.clips, desc=f"epoch {epoch}/{args.epochs}", unit=" clips", leave=False, disable=quiet()) as bar:
        for clips, pids in loader:
            clips, pids = normalize(clips.to(device, non_blocking=True)), pids.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                outputs = model(clips)
            outputs, pids = gather(outputs), gather(pids)                       # the batch of all processes
            loss, parts = objective(outputs, pids, args)
            optimizer.zero_grad(set_to_none=True)
            (loss * world()).backward()                                         # DistributedDataParallel takes the mean, the sum is wanted
            optimizer.step()
            steps += 1
            values = {name: part.item() for name, part in {"loss": loss.detach(), **parts}.items()}
            if not math.isfinite(values["loss"]):
                raise UserError(f"epoch {epoch}, step {steps}: the loss is not finite ({', '.join(f'{k} {v:.4g}' for k, v in values.items())}); "
                                f"{f'the last good checkpoint is {last}' if last.exists() else 'there is no checkpoint yet'}; try a smaller --lr")
            totals = {name: totals.get(name, 0.0) + value for name, value in values.items()}
            bar.set_postfix({name: f"{total / steps:.3f}" for name, total in totals.items()}, refresh=False)
            bar.update(len(pids))
            if stop_asked():
                break
    return steps, totals


def main():  # same in every script
    args, checkpoint = parse_args()
    if args.complexity:
        def make(name):
            one = argparse.Namespace(**{**RECIPE, **ROW_RECIPE.get(name, {}), "variant": name})
            return build(one, 625, "none"), one.frames, one.height, one.width
        complexity_table(VARIANTS, make, PRINTED, HEADS, args.complexity == "md")
    elif args.split == "all":
        all_splits(args, run, Path(__file__).name, VARIANTS, RECIPE)
    else:
        run(args, checkpoint)


def run(args, checkpoint, hint="the same command with --resume goes on"):  # same in every script
    device = pick_device(args.gpu)
    if args.workers is None:
        args.workers = min(8, (os.cpu_count() or 1) // world()) if device.type == "cuda" else 0
    torch.manual_seed(args.seed)
    with first_process_first():                                                 # it draws and downloads what is missing
        dataset = load_dataset(args.data, args.root, int(args.split), args.chunk)
        print(dataset.summary())
        if checkpoint and not args.evaluate and checkpoint["num_classes"] != dataset.num_identities:
            raise UserError(f"{args.resume}: was trained on {checkpoint['num_classes']} identities, {args.data} has {dataset.num_identities}")
        sampler = SAMPLER([t.pid for t in dataset.train], args.ids, args.clips, args.seed, rank(), world())
        try:
            model = build(args, checkpoint["num_classes"], "none") if checkpoint else build(args, dataset.num_identities, args.weights)
        except ValueError as error:
            raise UserError(f"{error}; see --frames, --height, --width") from None
    parameters, macs = complexity(model, args.frames, args.height, args.width)
    print(f"{args.variant}: {parameters:,} parameters, {macs / 1e9:.3f} GFLOPs (multiply-adds) a clip of {args.frames} frames of {args.height}x{args.width}")
    if world() > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for layer in model.to(device).modules():
        if isinstance(layer, nn.Conv2d):                                        # 5-dimensional weights cannot be channels_last
            layer.to(memory_format=torch.channels_last)
    size, history, steps, totals = (args.height, args.width), [], 0, {}
    optimizer = make_optimizer(model, args)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_step, 0.1)
    if checkpoint:
        history = checkpoint["history"]
        restore(args.resume, checkpoint, model=model)
    if args.compile and not args.figure:
        compiled(model, device)

    extraction = dict(batch=args.ids * args.clips, workers=args.workers, amp=args.amp)

    def test(label):
        return evaluate(model, dataset, SPLIT, args.frames, size, METRIC, label=label, use_rerank=args.rerank, **extraction)

    if args.figure:
        return figures(model, dataset, picture, args, SPLIT, size, METRIC, history, **extraction)
    if args.evaluate:
        return test(f"after epoch {len(history)}" if checkpoint else "untrained")
    output = Path(args.output)
    last, log = output / "last.pt", output / "log.csv"
    if not (checkpoint and os.path.realpath(args.resume) == os.path.realpath(last)) and (os.path.exists(last) or os.path.exists(log)):
        raise UserError(f"{output} holds a run already: go on with --resume {last}, or name another --output")
    if checkpoint:
        restore(args.resume, checkpoint, optimizer=optimizer, scheduler=scheduler, random=RandomStates)
        steps, totals = checkpoint["progress"]
        print(f"going on after epoch {len(history)}" + f", step {steps} of the next," * bool(steps) + f" of {args.resume}")

    def save():
        if not all(p.isfinite().all() for p in model.parameters()):
            raise UserError(f"epoch {len(history)}: the weights are not finite; {last} is as it was; try a smaller --lr")
        if rank() == 0:
            save_file({"script": Path(__file__).name, "args": vars(args), "num_classes": dataset.num_identities, "history": history, "progress": (steps, totals),
                       "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "random": RandomStates.state_dict()}, last)
            save_rows(history, log)

    catch_signals(hint)
    if rank() == 0:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None
        with replacing(output / "args.json") as file:
            file.write(json.dumps(vars(args), indent=2).encode() + b"\n")
        save_rows(history, log) if checkpoint else None                         # a kill may have come between last.pt and log.csv
    if not checkpoint:
        test("untrained")
    loader = torch.utils.data.DataLoader(TrainClips(dataset.train, SAMPLE, args.frames, size, erase=args.erase), batch_sampler=sampler, num_workers=args.workers,
                                         worker_init_fn=own_group, pin_memory=device.type == "cuda", persistent_workers=args.workers > 0, generator=torch.Generator())
    network, result = parallel(model, device), None
    for epoch in range(max(len(history), 1), args.epochs + 1):
        if fresh := epoch > len(history):
            start, first = time.time(), steps
            sampler.set_epoch(epoch, steps)
            steps, totals = train_epoch(network, loader, optimizer, device, args, epoch, steps, totals)
            sampler.set_epoch(epoch)
            if steps < len(sampler):                                            # a signal
                save()
                raise Stop(stop_asked())
            row = {"epoch": epoch, "lr": scheduler.get_last_lr()[0], **{name: total / steps for name, total in totals.items()}}
            scheduler.step()
            seconds = time.time() - start
            print(f"epoch {epoch}/{args.epochs}: " + "  ".join(f"{k} {v:.3g}" for k, v in row.items() if k != "epoch")
                  + f"  ({seconds:.0f} s, {(steps - first) * args.ids * args.clips / seconds:.3g} clips/s)", flush=True)
            history.append({**row, "mAP": "", "rank-1": ""})
            steps, totals = 0, {}
            if asked := stop_asked():                                           # one that came in the last step
                save()
                raise Stop(asked)
        if history[-1]["mAP"] == "" and (epoch == args.epochs or args.eval_every and epoch % args.eval_every == 0):
            save()
            result = test(f"after epoch {epoch}")
            history[-1].update({key: result[key] for key in ("mAP", "rank-1")})
            save()
        elif fresh and epoch % args.checkpoint_every == 0:
            save()
    return result or test(f"after epoch {len(history)}")


if __name__ == "__main__":  # same in every script
    command_line(main)
