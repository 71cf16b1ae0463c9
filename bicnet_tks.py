"""BiCnet-TKS: Learning Efficient Spatial-Temporal Representation for Video Person Re-Identification.

Hou, Chang, Ma, Huang, Shan. CVPR 2021. https://arxiv.org/abs/2104.14783

A few frames of a clip are seen at full size, for details, the others at half of it, for context and at a quarter of the cost;
one network does both. CSP tells the small frames what the big ones showed, DAO makes every frame attend to another region, and
TKS mixes the frames over time by kernels of several lengths, selected for every clip and channel.

    python bicnet_tks.py                                 # a small run on synthetic data, on any machine
    python bicnet_tks.py --data mars --gpu 0             # the paper's recipe
    python bicnet_tks.py --data mars --variant tb+csp    # a row of its tables (see VARIANTS)

Where to find what:
    Sec. 3.1, Eq. 2    CrossScalePath (CSP)                        Sec. 3.2, Fig. 4, Eq. 6-8  TemporalKernelSelection (TKS)
    Sec. 3.1, Eq. 3    DiverseAttentionsOperation (DAO)            Sec. 3.1, Eq. 1, Sec. 3.3  BiCnet
    Sec. 3.1, Eq. 4-5  divergence_loss                             Sec. 3.1, 4.3.1            objective

What the paper leaves open, and the reading taken:
    big frames        the first N / (1 + alpha) of a clip, as printed; the video feature is (f_d + f_c) / 2
    small frames      resized at the input, bilinear with antialiasing (most printed GFLOPs, 1.89 and 1.99 too, fit a resize after the stem)
    shared weights    BatchNorm too: in training each branch normalises by its own batch, the running averages take both in
    CSP               after stages 1 to 3; no bias; big frame m feeds the small frames alpha m ... alpha m + alpha - 1
    order             CSP, then TKS, then DAO (at stage 3)
    DAO's attention   k > 1: 1x1 convolution C -> 1, then H W -> H W, without biases; own modules for each branch
    DAO's residual    D_k + BN(sum over positions of A_k * D_k) for all positions, BN starting at zero (A * D would change D by
                      1 / (H W) only)
    Eq. 5             mean of the two branches, weight 0.01; 0 for a branch of one frame; added to cross entropy and triplet loss
    TKS               over all N frames in their order: both branches are pooled to the same grid of 4 x 2 regions (the printed
                      GFLOPs fit regions of 4 x 2 pixels); W_i: a shared C -> C/16, BN, ReLU, then C/16 -> C for each path (the
                      printed parameters exclude C x C); nothing to select with one kernel; BN before the residual, starting at zero
    Table 4           alpha 2 and 4 with clips of 9 and 10 frames, Table 3's three branches with 9, a third each
    cross entropy     on a BN neck, as the triplet loss (cosine distance, margin 0.5)
    sizes             exact halves and equal regions are asked for: multiples of 64 x 32 pixels for TKS at stage 2
    test              clips of 8 consecutive frames; an epoch shows every identity once (some of the last batch twice)
"""
import argparse
import contextlib
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

from common import (RandomStates, Stop, all_splits, bars, batch_hard_triplet, catch_signals, command_line, compiled, complexity, complexity_table, energy,
                    evaluate, figures, first_process_first, gather, load_checkpoint, load_file, number, overlays, own_group, parallel, pick_device, quiet,
                    rank, replacing, restore, same_flags, save_file, save_rows, stop_asked, watch, world)
from data import CHUNK, DATA_SETS, SPLIT_SETS, PKSampler, TrainClips, UserError, load_dataset, normalize, sample_strided, split_consecutive


# --------------------------------------------------------------------------- Sec. 3.1: bilateral complementary network

class CrossScalePath(nn.Module):
    """CSP, Eq. 2: adds what the big frames show to the small ones.

    F_D (B, M, C, H, W), F_C (B, alpha * M, C, H / 2, W / 2) -> (B, alpha * M, C, H / 2, W / 2), H and W even.
    alpha: small frames for each big one, an integer >= 1.
    """

    def __init__(self, channels, alpha):
        super().__init__()
        self.conv = nn.Conv2d(channels, alpha * channels, 1, bias=False)

    def forward(self, big, small):
        x = self.conv(F.max_pool2d(big.flatten(0, 1), 2))                       # (B M, alpha C, H/2, W/2)
        return small + x.reshape(small.shape)                                   # Eq. 2


class DiverseAttentionsOperation(nn.Module):
    """DAO, Fig. 3 (b), Eq. 3: an attention module for each frame of a branch; divergence_loss drives them apart.

    D (B, M, C, H, W) -> the same shape, and the attention maps A (B, M, H, W), each with sum 1.
    frames, height, width: M, H, W. Starts as identity.
    """

    def __init__(self, channels, frames, height, width):
        super().__init__()
        self.size = frames, channels, height, width
        self.attention = nn.ModuleList(                                         # of the frames k > 1
            nn.Sequential(nn.Conv2d(channels, 1, 1, bias=False), nn.Flatten(), nn.Linear(height * width, height * width, bias=False))
            for _ in range(frames - 1))
        self.bn = nn.BatchNorm1d(channels)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x):
        if x.shape[1:] != self.size:
            raise ValueError(f"DAO was built for (M, C, H, W) = {self.size}, not {tuple(x.shape[1:])}")
        scores = [x[:, 0].mean(1).flatten(1), *(module(x[:, k]) for k, module in enumerate(self.attention, 1))]
        a = torch.stack(scores, 1).softmax(2)                                   # Eq. 3: (B, M, H W)
        attended = (x.flatten(3) @ a.to(x.dtype)[..., None])[..., 0]            # (B, M, C)
        attended = self.bn(attended.flatten(0, 1)).to(x.dtype).view(*x.shape[:3], 1, 1)
        return x + attended, a.unflatten(2, x.shape[3:])


def divergence_loss(a):
    """Eq. 4-5 for the attention maps (B, M, H, W) of a branch, mean over the batch: -1 for disjoint maps, higher for similar ones.
    Similarity is the dot product; 0 for M = 1."""
    a, M = a.flatten(2), a.shape[1]
    divergence = 1 - a @ a.transpose(1, 2)                                      # Eq. 4
    means = [divergence[:, k, :k].mean(1) for k in range(1, M)]                 # over l < k
    return -torch.stack(means).mean() if means else a.new_zeros(())             # Eq. 5


# ------------------------------------------------------------------------------ Sec. 3.2: temporal kernel selection

class TemporalKernelSelection(nn.Module):
    """TKS, Fig. 4, Eq. 6-8: temporal convolutions of several lengths, mixed by weights made for every clip and channel.

    Maps (B, T_i, C, H_i, W_i) of one or more branches, consecutive in time -> a list of maps of the same shapes.
    kernels: lengths in frames, odd, >= 3 (3 taps, dilated); grid: h, w, the regions of a frame, dividing all H_i, W_i;
    reduction: of W_i in Eq. 7; select: False mixes by the mean ("TK" of Table 2). Starts as identity.
    """

    def __init__(self, channels, kernels=(3, 5), grid=(4, 2), reduction=16, select=True):
        super().__init__()
        if any(k < 3 or k % 2 == 0 for k in kernels):
            raise ValueError(f"TKS takes odd kernels of at least 3 frames, not {kernels}")
        self.grid, K = tuple(grid), len(kernels)
        self.paths = nn.ModuleList(nn.Conv1d(channels, channels, 3, dilation=k // 2, padding=k // 2, bias=False) for k in kernels)
        self.squeeze = self.weights = None
        if select and K > 1:
            self.squeeze = nn.Sequential(nn.Linear(channels, channels // reduction, bias=False), nn.BatchNorm1d(channels // reduction), nn.ReLU())
            self.weights = nn.Linear(channels // reduction, K * channels, bias=False)
        self.bn = nn.BatchNorm1d(channels)
        nn.init.zeros_(self.bn.weight)

    def select(self, y):
        """Paths Y (B, K, C, P) -> weights g (B, K, C), with sum 1 over the K paths."""
        if not self.weights:
            return y.new_full(y.shape[:3], 1 / y.shape[1])
        u = y.sum(1).mean(2)                                                    # Eq. 6
        return self.weights(self.squeeze(u)).unflatten(1, y.shape[1:3]).softmax(1).to(y.dtype)   # Eq. 7

    def forward(self, *maps):
        h, w = self.grid
        for f in maps:
            if f.shape[3] % h or f.shape[4] % w:
                raise ValueError(f"TKS divides maps into {h}x{w} equal regions, which {f.shape[3]}x{f.shape[4]} does not allow")
        # partition: (B, T, C, h, w), then every region a sequence (B h w, C, T)
        x = torch.cat([F.avg_pool2d(f.flatten(0, 1), (f.shape[3] // h, f.shape[4] // w)).unflatten(0, f.shape[:2]) for f in maps], 1)
        B, T, C = x.shape[:3]
        x = x.permute(0, 3, 4, 2, 1).reshape(B * h * w, C, T)
        y = torch.stack([path(x).view(B, h * w, C, T).transpose(1, 2).flatten(2) for path in self.paths], 1)   # (B, K, C, h w T)
        z = torch.einsum("bkc,bkcp->bcp", self.select(y), y)                    # Eq. 8
        z = self.bn(z).to(x.dtype).view(B, C, h, w, T).permute(0, 4, 1, 2, 3)
        # excite: nearest neighbour upsampling to the size of each branch
        return [f + z_i.repeat_interleave(f.shape[3] // h, 3).repeat_interleave(f.shape[4] // w, 4)
                for f, z_i in zip(maps, z.split([f.shape[1] for f in maps], 1))]


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


class BiCnet(nn.Module):
    """BiCnet-TKS, Fig. 3 (a): one ResNet-50 for the big and the small frames of a clip, with CSP, TKS and DAO between its stages.

    Clips (B, N, 3, H, W), normalised -> in eval mode embeddings (B, 2048); in train mode also the logits (B, num_classes) and the
    attention maps of each branch, a list of (B, M, h, w), for divergence_loss.

    frames, height, width: N, H, W; N a multiple of the sum of shares; H, W as ValueError tells when they do not fit.
    shares: how the frames divide over branches of 1, 1/2, 1/4 ... of the size, (1, alpha) in the paper; csp, dao: with them or not (csp: for
    two branches); divergence: False is "AO", the attention maps are not returned; tks: stages with a TKS behind them, of 1, 2, 3, 4;
    kernels, select, grid: see TKS; pool: "avg" or "max" over the final map; weights: see resnet50.
    """

    def __init__(self, num_classes, frames=8, height=256, width=128, shares=(1, 3), csp=True, dao=True, divergence=True, tks=(2,),
                 kernels=(3, 5), select=True, grid=(4, 2), pool="avg", weights="none"):
        super().__init__()
        if csp and not (len(shares) == 2 and shares[0] and shares[1] % shares[0] == 0):
            raise ValueError(f"CSP joins two branches with a whole number of small frames for each big one, not {':'.join(map(str, shares))}")
        if frames % sum(shares):
            raise ValueError(f"frames shared out as {':'.join(map(str, shares))}: a clip needs {sum(shares)}, {2 * sum(shares)}, {3 * sum(shares)} ... "
                             f"frames, not {frames}")
        smallest = 2 ** (len(shares) - 1)                                       # of the scales; sizes that all maps below divide
        rows, columns = (math.lcm(32 if csp else smallest, *(smallest * (4, 8, 16, 16)[stage - 1] * regions for stage in tks)) for regions in grid)
        if height % rows or width % columns:
            raise ValueError(f"the branches take heights of {rows}, {2 * rows}, {3 * rows} ... and widths of {columns}, {2 * columns}, {3 * columns} ... "
                             f"pixels, not {height}x{width}")
        self.split = [frames * share // sum(shares) for share in shares]        # frames of each branch
        net = resnet50(weights)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        width_of = dict(layer1=256, layer2=512, layer3=1024, layer4=2048)
        self.csp = nn.ModuleDict({name: CrossScalePath(width_of[name], shares[1] // shares[0]) for name in ("layer1", "layer2", "layer3") if csp})
        self.tks = nn.ModuleDict({name: TemporalKernelSelection(width_of[name], kernels, grid, select=select) for name in (f"layer{i}" for i in tks)})
        self.dao = nn.ModuleList(DiverseAttentionsOperation(1024, M, -(-height // 2 ** (i + 4)), -(-width // 2 ** (i + 4)))
                                 for i, M in enumerate(self.split) if dao and M)
        self.divergence, self.pool = divergence, pool
        self.neck = nn.BatchNorm1d(2048)
        self.classifier = nn.Linear(2048, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, clips):
        B, _, _, H, W = clips.shape
        branches, attention = [], []
        for i, frames in enumerate(clips.split(self.split, 1)):
            if frames.shape[1]:
                x = frames.flatten(0, 1)
                if i:
                    x = F.interpolate(x, (H >> i, W >> i), mode="bilinear", antialias=True)
                branches.append(self.stem(x.contiguous(memory_format=torch.channels_last)))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            branches = [getattr(self, name)(x).unflatten(0, (B, -1)) for x in branches]
            if name in self.csp:
                branches[1] = self.csp[name](*branches)
            if name in self.tks:
                branches = self.tks[name](*branches)
            if name == "layer3" and self.dao:
                branches, attention = zip(*(dao(x) for dao, x in zip(self.dao, branches)))
            branches = [x.flatten(0, 1) for x in branches]
        features = [(x.mean((2, 3)) if self.pool == "avg" else x.amax((2, 3))).to(self.neck.weight.dtype).view(B, -1, 2048).mean(1)
                    for x in branches]                                          # Eq. 1: f_d, f_c
        embedding = self.neck(sum(features) / len(features))
        return (embedding, self.classifier(embedding), list(attention) if self.divergence else []) if self.training else embedding


# ------------------------------------------------------------------------------------------------------------- variants

# Rows of Tables 2 to 6: constructor arguments, and the figures as printed in the paper.
BASE = dict(csp=False, dao=False, tks=())
VARIANTS = {
    "bicnet-tks": (dict(), (86.0, 90.2, 1.99, 29.2)),
    "base-s": (dict(shares=(0, 1), **BASE), (80.7, 87.4, 1.02, 23.5)),
    "base-b": (dict(shares=(1,), **BASE), (85.2, 89.1, 4.08, 23.5)),
    "tb": (BASE, (84.3, 89.6, 1.81, 23.5)),
    "tb+csp": (dict(dao=False, tks=()), (85.0, 89.6, 1.89, 27.6)),
    "tb+csp+ao": (dict(divergence=False, tks=()), (85.2, 89.3, 1.89, 27.6)),
    "tb+csp+dao": (dict(tks=()), (85.6, 89.8, 1.89, 27.6)),
    "bicnet-tk": (dict(select=False), (85.5, 89.6, 1.91, 29.1)),
    "height-256": (dict(shares=(1,), **BASE), (85.2, 89.1, 4.08, 23.5)),
    "height-128": (dict(shares=(0, 1), **BASE), (80.7, 87.4, 1.02, 23.5)),
    "height-64": (dict(shares=(0, 0, 1), **BASE), (64.1, 77.4, 0.25, 23.5)),
    "height-256+128": (dict(shares=(1, 1), **BASE), (84.8, 89.4, 2.55, 23.5)),
    "height-256+128+64": (dict(shares=(1, 1, 1), **BASE), (79.1, 86.1, 1.76, 23.5)),
    "tb-alpha0": (dict(shares=(1,), **BASE), (85.2, 89.1, 4.08, 23.5)),
    "tb-alpha1": (dict(shares=(1, 1), **BASE), (84.8, 89.4, 2.57, 23.5)),
    "tb-alpha2": (dict(shares=(1, 2), **BASE), (84.4, 89.7, 2.07, 23.5)),
    "tb-alpha3": (BASE, (84.3, 89.6, 1.81, 23.5)),
    "tb-alpha4": (dict(shares=(1, 4), **BASE), (83.8, 89.5, 1.67, 23.5)),
    "tb-alpha-inf": (dict(shares=(0, 1), **BASE), (80.7, 87.4, 1.02, 23.5)),
    "tks-k3": (dict(kernels=(3,)), (85.1, 89.9, 1.94, 28.3)),
    "tks-k5": (dict(kernels=(5,)), (85.3, 90.1, 1.94, 28.3)),
    "tks-k7": (dict(kernels=(7,)), (85.5, 89.8, 1.94, 28.3)),
    "tks-k35": (dict(kernels=(3, 5)), (86.0, 90.2, 1.99, 29.2)),
    "tks-k37": (dict(kernels=(3, 7)), (85.7, 90.0, 1.99, 29.2)),
    "tks-k57": (dict(kernels=(5, 7)), (85.6, 90.1, 1.99, 29.2)),
    "tks-k357": (dict(kernels=(3, 5, 7)), (85.8, 90.2, 2.04, 30.0)),
    "tks-stage1": (dict(tks=(1,)), (85.3, 90.1, 1.99, 28.0)),
    "tks-stage2": (dict(tks=(2,)), (86.0, 90.2, 1.99, 29.2)),
    "tks-stage3": (dict(tks=(3,)), (85.7, 90.4, 1.99, 34.1)),
    "tks-stage4": (dict(tks=(4,)), (85.4, 90.0, 2.29, 53.5)),
    "tks-stage23": (dict(tks=(2, 3)), (85.8, 90.3, 2.09, 35.7)),
}
COLUMNS = "mAP and rank-1 on MARS, GFLOPs a frame and millions of parameters"
PRINTED, HEADS = ("GFLOPs a frame", "million parameters"), ("neck", "classifier")  # what the figures after rank-1 are; parts that the paper does not count
ROW_RECIPE = {"height-256+128+64": dict(frames=9), "tb-alpha2": dict(frames=9), "tb-alpha4": dict(frames=10)}  # row -> what it changes in the recipe


# ------------------------------------------------------------------------------------------ Sec. 3.1, 4.3.1: objective

def objective(outputs, pids, args):
    """Cross entropy, triplet and divergence loss (Eq. 5, mean of the branches): the total and its parts, {name: scalar}."""
    embedding, logits, attention = outputs
    parts = {"xent": F.cross_entropy(logits.float(), pids),
             "triplet": batch_hard_triplet(embedding, pids, args.margin)}
    if attention:
        parts["div"] = sum(divergence_loss(a.float()) for a in attention) / len(attention)
    return parts["xent"] + parts["triplet"] + args.divergence * parts.get("div", 0), parts


def picture(model, clips, frames):
    """For --figure, after Figures 1, 3 and 4: last map and A_k on the frames of each branch, and the weights of TKS' kernels."""
    selecting = [(name, tks) for name, tks in model.tks.items() if tks.weights]
    last, *calls = watch(model, clips, model.layer4, *model.dao, *(tks.weights for _, tks in selecting))
    rows, ends = [], [sum(model.split[:i]) for i in range(len(model.split) + 1)]
    for n, i in enumerate(i for i, count in enumerate(model.split) if count):
        def among_all(maps):                                                    # the frames of the other branches have none
            return F.pad(maps.float(), (0, 0, 0, 0, ends[i], len(frames) - ends[i + 1]), value=math.nan)
        size = "full" if not i else f"1/{2 ** i}"
        rows.append((f"frames of {size} size: last map, root mean square of the channels", overlays(frames, among_all(energy(last[n][1])))))
        if model.dao:
            rows.append((f"frames of {size} size: attention A_k of DAO", overlays(frames, among_all(calls[n][0][1][1][0]))))
    for (name, tks), ((_, g),) in zip(selecting, calls[len(model.dao):]):
        g = g.float().unflatten(1, (len(tks.paths), -1)).softmax(1)[0].mean(1)
        rows.append((f"TKS behind {name}: weight of each temporal kernel, mean over the channels", [bars(g, [f"{2 * p.dilation[0] + 1} frames" for p in tks.paths])]))
    return "BiCnet-TKS: where the frames of each size look", rows


# ------------------------------------------------------------------------------------------------------------ training

RECIPE = dict(epochs=150, ids=16, clips=4, frames=8, height=256, width=128, lr=3.5e-4, lr_step=40, erase=0.5, pool="avg", weights="imagenet",
              margin=0.5, divergence=0.01)                                      # Sec. 4.1
SMALL = dict(epochs=8, ids=4, clips=2, height=128, width=64, lr=5e-4, lr_step=7, erase=0.0, pool="max", weights="none")  # --data synthetic
SAMPLER, SAMPLE, SPLIT, METRIC = PKSampler, sample_strided, split_consecutive, "cosine"  # batches and clips in training, clips in test; distance


def add_paper_arguments(group):
    for name, text in (("divergence", "weight of the divergence loss, Eq. 5"), ("margin", "of the triplet loss, cosine distance")):
        group.add_argument(f"--{name}", type=number(float, 0), metavar="X", help=f"{text} (default {RECIPE[name]})")


def build(args, num_classes, weights):
    options, _ = VARIANTS[args.variant]
    return BiCnet(num_classes, args.frames, args.height, args.width, pool=args.pool, weights=weights, **options)


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
