"""STRF: Spatio-Temporal Representation Factorization for Video-based Person Re-Identification.

Aich, Zheng, Karanam, Chen, Roy-Chowdhury, Wu. ICCV 2021. https://arxiv.org/abs/2107.11878

A unit of four attention masks in front of a temporal convolution: what changes over time and what does not, what is fine in space and
what is coarse. Each mask compares the positions of a clip by features that were pooled over time or space, little or much, and
every position becomes an average of those like it. The unit needs four 1x1 convolutions and no more.

    python strf.py                                  # a small run on synthetic data, on any machine
    python strf.py --data mars --gpu 0              # the paper's recipe
    python strf.py --data mars --variant p3dc       # a row of its tables (see VARIANTS)

Where to find what:
    Sec. 3.2, Eq. 2-4, 6  FactorizedAttentionMask (FAM)           Sec. 3.2, Fig. 3  InflatedConv (I3D), P3DConv (P3D-A, -B, -C)
    Sec. 3.1, Eq. 1, 5, 7  FeatureFactorizationModule (FFM)       Sec. 3.2, 4.1     STRFNet
    Sec. 3.2, Eq. 8       STRF                                    Sec. 3.2, Eq. 9   objective

What the paper leaves open, and the reading taken:
    Eq. 3             the columns of T are L2-normalised over channels and frames first: kappa = 4 comes from works that apply it to
                      cosine similarity (normalize=False: as printed)
    softmax axis      over rows: every position of the output is a weighted average (the columns of M sum to one)
    H_dk              a 1x1x1 convolution c -> c/16 without bias for each of the four factors of a unit (the printed +0.05M)
    pooling           max, stride 1, same padding, (r_tau, r_sigma) = (1, 3); averages leave the padding out
    order             temporal, then spatial (Sec. 4.2; the caption of Fig. 4 says the opposite)
    residual, scale   none: Eq. 5, 7, 8 as printed; a dimension without factors is left out
    where             on the input of the temporal convolution (P3D) or of the 3x3x3 one (I3D); blocks 0 and 2 of stage 2, 0, 2 and 4 of
                      stage 3 (stages 1 and 4: 0 and 2); nothing between the convolutions of a P3D block, no temporal BatchNorm
    Table 5           stages 2 and 3 stay 3D; STRF stands in the named stages, whose blocks become 3D where they were not
    3D blocks         start as the 2D network (P3D-A: centre tap identity; I3D: centre tap the 2D weights; others zero); with STRF in
                      front, which is never the identity, P3D-B and P3D-C only
    recipe            its supplement is not at hand: T = 8, 224x112, stride 4, Adam 3e-4, 240 epochs, /10 every 60, 8 x 4 clips, flip only,
                      weight decay 5e-4, margin 0.3, a BN neck; in test clips of consecutive frames; an epoch shows every identity
                      once (some of the last batch twice)
    parameters        the paper counts the 625-way classifier of MARS, with bias, and no neck
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

from common import (RandomStates, Stop, all_splits, batch_hard_triplet, catch_signals, command_line, compiled, complexity, complexity_table, energy, evaluate,
                    figures, first_process_first, gather, load_checkpoint, load_file, number, overlays, own_group, parallel, pick_device, quiet, rank,
                    replacing, restore, same_flags, save_file, save_rows, stop_asked, watch, world)
from data import CHUNK, DATA_SETS, SPLIT_SETS, PKSampler, TrainClips, UserError, load_dataset, normalize, sample_strided, split_consecutive


# Frames are the batch of the 2D network, (B*T, C, H, W) in channels_last: as (B, C, T, H, W) the same memory is channels_last_3d, so
# that a temporal convolution reads and writes it where it is.

def as_clips(x, T):
    """(B*T, C, H, W) -> (B, C, T, H, W), a view."""
    return x.unflatten(0, (-1, T)).transpose(1, 2)


def as_frames(x):
    """(B, C, T, H, W) -> (B*T, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


# ------------------------------------------------------------------------- Sec. 3: spatio-temporal factorization (STRF)

class FactorizedAttentionMask(nn.Module):
    """FAM, Eq. 2-3: which positions of a clip are alike, judged by features pooled over time or space.

    f (B, T, C, H, W) -> M (B, H*W, H*W), columns with sum 1.
    dimension: "t" or "s", over which G pools (Eq. 4, 6); resolution: r, odd, the window of G in frames or positions; pool: "max" or
    "avg"; reduction: n; kappa: temperature; normalize: cosine similarity (False: as printed).
    """

    def __init__(self, channels, dimension, resolution, pool="max", reduction=16, kappa=4.0, normalize=True):
        super().__init__()
        if dimension not in ("t", "s") or pool not in ("max", "avg") or resolution % 2 == 0 or channels < reduction:
            raise ValueError(f"FAM takes dimension t or s, pool max or avg, an odd resolution and at least {reduction} channels, "
                             f"not {dimension}, {pool}, {resolution} and {channels}")
        self.h = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.window = (resolution, 1, 1) if dimension == "t" else (1, resolution, resolution)
        self.pool, self.kappa, self.normalize = pool, kappa, normalize

    def forward(self, f):
        x = as_clips(self.h(f.flatten(0, 1)), f.shape[1])                       # H_dk: (B, C/n, T, H, W)
        padding = [r // 2 for r in self.window]
        if max(self.window) == 1:                                               # G_dk: identity,
            pass
        elif self.pool == "max":                                                # maximum,
            x = F.max_pool3d(x, self.window, 1, padding)
        else:                                                                   # or mean; maps may be smaller than the window
            edge = [p for p in reversed(padding) for _ in (0, 1)]
            x, inside = (F.avg_pool3d(F.pad(v, edge), self.window, 1) for v in (x, torch.ones_like(x[:1, :1])))
            x = x / inside
        x = x.flatten(1, 2).flatten(2)                                          # T_dk, Eq. 2: (B, C/n T, H W)
        if self.normalize:
            x = F.normalize(x, dim=1, eps=1e-6)
        return (self.kappa * x.transpose(1, 2) @ x).softmax(1)                  # Eq. 3


class FeatureFactorizationModule(nn.Module):
    """FFM, Eq. 1 with 5 or 7: the sum of what the masks of one dimension, "t" or "s", make of the features.

    f (B, T, C, H, W) -> the same shape. masks: FactorizedAttentionMask modules.
    """

    def __init__(self, masks):
        super().__init__()
        self.masks = nn.ModuleList(masks)

    def forward(self, f):
        B, T, C, H, W = f.shape
        m = sum(mask(f) for mask in self.masks).to(f.dtype)                     # f M_1 + f M_2 = f (M_1 + M_2)
        x = f.movedim(2, 4).reshape(B, T, H * W, C).transpose(1, 2).reshape(B, H * W, T * C)
        x = (m.transpose(1, 2) @ x).view(B, H * W, T, C)                        # Eq. 1, transposed
        return x.transpose(1, 2).contiguous().view(B, T, H, W, C).movedim(4, 2)  # channels last again


class STRF(nn.Module):
    """STRF, Fig. 2, Eq. 8: temporal and spatial factorization one after the other or in parallel.

    f (B, T, C, H, W) -> the same shape. factors: of "t-dynamic" (t, tau), "t-static" (t, sigma), "s-fine" (s, tau), "s-coarse" (s, sigma);
    resolutions: r_tau, r_sigma; pools: "max" or "avg" for t and for s; order: "ts", "st" or "parallel"; reduction, kappa, normalize: see
    FactorizedAttentionMask.
    """

    def __init__(self, channels, factors=("t-dynamic", "t-static", "s-fine", "s-coarse"), resolutions=(1, 3), pools=("max", "max"), order="ts",
                 **options):
        super().__init__()
        if not factors or set(factors) - {"t-dynamic", "t-static", "s-fine", "s-coarse"} or order not in ("ts", "st", "parallel"):
            raise ValueError(f"STRF takes one or more of t-dynamic, t-static, s-fine and s-coarse, and order ts, st or parallel, not {factors} and {order}")
        fine, coarse = resolutions
        resolution = {"t-dynamic": fine, "t-static": coarse, "s-fine": fine, "s-coarse": coarse}
        self.ffm = nn.ModuleDict()
        for d, pool in zip("ts", pools):
            masks = [FactorizedAttentionMask(channels, d, resolution[name], pool, **options) for name in factors if name[0] == d]
            if masks:
                self.ffm[d] = FeatureFactorizationModule(masks)
        self.order = order

    def forward(self, f):
        if self.order == "parallel":
            return sum(ffm(f) for ffm in self.ffm.values())
        for d in self.order:                                                    # Eq. 8
            f = self.ffm[d](f) if d in self.ffm else f
        return f


# ----------------------------------------------------------------------------- Sec. 3.2, Fig. 3: the 3D layers it is put into

class InflatedConv(nn.Module):
    """I3D (Carreira and Zisserman, CVPR 2017): `conv` inflated to three frames. (B*T, C, H, W) -> (B*T, C', H', W'); starts as `conv`,
    which has no bias, groups or dilation."""

    def __init__(self, conv, frames, strf=None):
        super().__init__()
        self.frames, self.strf = frames, strf
        self.conv = nn.Conv3d(conv.in_channels, conv.out_channels, (3, *conv.kernel_size), (1, *conv.stride), (1, *conv.padding), bias=False,
                              device=conv.weight.device, dtype=conv.weight.dtype)
        with torch.no_grad():
            self.conv.weight.zero_()[:, :, 1].copy_(conv.weight)

    def forward(self, x):
        if self.strf:
            x = self.strf(x.unflatten(0, (-1, self.frames))).flatten(0, 1)
        return as_frames(self.conv(as_clips(x, self.frames)))


class P3DConv(nn.Module):
    """P3D (Qiu et al., ICCV 2017): a temporal 3x1x1 convolution T with the spatial S: T(S(x)) ("a"), S(x) + T(x) ("b") or
    S(x) + T(S(x)) ("c"). (B*T, C, H, W) -> (B*T, C', H', W'); starts as S. conv: S; frames: T; strf: stands in front of T."""

    def __init__(self, conv, frames, kind, strf=None):
        super().__init__()
        self.spatial, self.frames, self.kind, self.strf = conv, frames, kind, strf
        inputs, stride = (conv.in_channels, (1, *conv.stride)) if kind == "b" else (conv.out_channels, 1)
        self.temporal = nn.Conv3d(inputs, conv.out_channels, (3, 1, 1), stride, (1, 0, 0), bias=False, device=conv.weight.device, dtype=conv.weight.dtype)
        nn.init.zeros_(self.temporal.weight)
        if kind == "a":
            nn.init.eye_(self.temporal.weight.data[:, :, 1, 0, 0])

    def forward(self, x):
        s = self.spatial(x)
        t = x if self.kind == "b" else s
        if self.strf:
            t = self.strf(t.unflatten(0, (-1, self.frames))).flatten(0, 1)
        t = as_frames(self.temporal(as_clips(t, self.frames)))
        return t if self.kind == "a" else s + t


# ------------------------------------------------------------------------------------------------------------- network

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


class STRFNet(nn.Module):
    """ResNet-50 with 3D blocks in stages 2 and 3 and STRF in them, pooled over space and time, and a BN neck.

    Clips (B, T, 3, H, W), normalised -> in eval mode embeddings (B, 2048); in train mode also the logits (B, num_classes).

    frames: T, fixed; any height and width. layer: "i3d", "p3d-a", "p3d-b" or "p3d-c"; stages: those with STRF, of 1 to 4, () for the
    baseline; factors, resolutions, pools, order, kappa, normalize: see STRF; pool: "avg" or "max" over the final map; weights: see resnet50.
    """

    def __init__(self, num_classes, frames=8, layer="p3d-c", stages=(2, 3), pool="avg", weights="none", **strf):
        super().__init__()
        if layer not in ("i3d", "p3d-a", "p3d-b", "p3d-c") or set(stages) - {1, 2, 3, 4}:
            raise ValueError(f"the 3D layers are i3d, p3d-a, p3d-b and p3d-c, the stages 1 to 4, not {layer} and {stages}")
        self.frames, self.pool = frames, pool
        net = resnet50(weights)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        for stage in {2, 3, *stages}:
            for i in (0, 2, 4) if stage == 3 else (0, 2):
                block = getattr(self, f"layer{stage}")[i]
                unit = STRF(block.conv2.in_channels, **strf) if stage in stages else None
                block.conv2 = InflatedConv(block.conv2, frames, unit) if layer == "i3d" else P3DConv(block.conv2, frames, layer[-1], unit)
        self.neck = nn.BatchNorm1d(2048)
        self.classifier = nn.Linear(2048, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, clips):
        B, T = clips.shape[:2]
        if T != self.frames:
            raise ValueError(f"the network was built for clips of {self.frames} frames, not {T}")
        x = self.stem(clips.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = x.to(self.neck.weight.dtype)
        x = (x.mean((2, 3)) if self.pool == "avg" else x.amax((2, 3))).view(B, T, -1).mean(1)
        embedding = self.neck(x)
        return (embedding, self.classifier(embedding)) if self.training else embedding


# ------------------------------------------------------------------------------------------------------------- variants

# Rows of Tables 2, 4 and 5 and of Figure 4: constructor arguments, and the figures as printed in the paper. Figure 4 prints no numbers.
FINE, COARSE, DYNAMIC, STATIC = "s-fine", "s-coarse", "t-dynamic", "t-static"
VARIANTS = {
    "strf-p3dc": (dict(), (86.10, 90.30, 25.53)),
    "strf-i3d": (dict(layer="i3d"), (83.10, 88.70, 28.97)),
    "strf-p3da": (dict(layer="p3d-a"), (85.40, 89.80, 25.53)),
    "strf-p3db": (dict(layer="p3d-b"), (85.60, 90.30, 25.53)),
    "i3d": (dict(layer="i3d", stages=()), (82.70, 88.50, 28.92)),
    "p3da": (dict(layer="p3d-a", stages=()), (83.20, 88.90, 25.48)),
    "p3db": (dict(layer="p3d-b", stages=()), (83.00, 88.80, 25.48)),
    "p3dc": (dict(stages=()), (83.10, 88.50, 25.48)),
    "p3dc+fine": (dict(factors=(FINE,)), (85.20, 89.70)),
    "p3dc+coarse": (dict(factors=(COARSE,)), (85.10, 89.90)),
    "p3dc+dynamic": (dict(factors=(DYNAMIC,)), (85.20, 89.90)),
    "p3dc+static": (dict(factors=(STATIC,)), (85.10, 90.00)),
    "p3dc+fine+coarse": (dict(factors=(FINE, COARSE)), (85.50, 90.10)),
    "p3dc+dynamic+static": (dict(factors=(DYNAMIC, STATIC)), (85.30, 89.70)),
    "p3dc+fine+dynamic": (dict(factors=(FINE, DYNAMIC)), (85.40, 90.00)),
    "p3dc+coarse+static": (dict(factors=(COARSE, STATIC)), (85.70, 90.10)),
    "stage1": (dict(stages=(1,)), (83.40, 88.80)),
    "stage12": (dict(stages=(1, 2)), (83.60, 89.00)),
    "stage23": (dict(stages=(2, 3)), (86.10, 90.30)),
    "stage123": (dict(stages=(1, 2, 3)), (84.70, 89.30)),
    "stage234": (dict(stages=(2, 3, 4)), (85.50, 90.00)),
    "stage1234": (dict(stages=(1, 2, 3, 4)), (83.70, 88.70)),
    "resolutions-11": (dict(resolutions=(1, 1)), None),
    "resolutions-13": (dict(resolutions=(1, 3)), (86.10, 90.30)),
    "resolutions-15": (dict(resolutions=(1, 5)), None),
    "resolutions-35": (dict(resolutions=(3, 5)), None),
    "pool-t-max-s-max": (dict(pools=("max", "max")), (86.10, 90.30)),
    "pool-t-max-s-avg": (dict(pools=("max", "avg")), None),
    "pool-t-avg-s-max": (dict(pools=("avg", "max")), None),
    "pool-t-avg-s-avg": (dict(pools=("avg", "avg")), None),
    "order-ts": (dict(order="ts"), (86.10, 90.30)),
    "order-st": (dict(order="st"), None),
    "order-parallel": (dict(order="parallel"), None),
}
COLUMNS = "mAP and rank-1 on MARS, millions of parameters"
PRINTED, HEADS = ("million parameters",), ("neck",)                             # what the figures after rank-1 are; parts that the paper does not count
ROW_RECIPE = {}                                                                 # row -> what it changes in the recipe


# ----------------------------------------------------------------------------------------------- Sec. 3.2: objective

def objective(outputs, pids, args):
    """Eq. 9: the total loss and its parts, {name: scalar}."""
    embedding, logits = outputs
    parts = {"xent": F.cross_entropy(logits.float(), pids), "triplet": batch_hard_triplet(embedding, pids, args.margin)}
    return parts["xent"] + parts["triplet"], parts


def picture(model, clips, frames):
    """For --figure, after Figure 5: the maps before and after each unit, and of each factor the mask for the middle position."""
    units = [(name, m) for name, m in model.named_modules() if isinstance(m, STRF)]
    factors = [[(d, mask) for d, ffm in unit.ffm.items() for mask in ffm.masks] for _, unit in units]
    (last,), *calls = watch(model, clips, model.layer4, *(unit for _, unit in units), *(mask for masks in factors for _, mask in masks))
    rows, seen = [("last map: root mean square of the channels", overlays(frames, energy(last[1])))], iter(calls[len(units):])
    for (name, _), masks, ((((x,), y),)) in zip(units, factors, calls):
        h, w = x.shape[3:]
        place = ".".join(name.split(".")[:2])
        rows.append((f"{place}: before the unit, behind it", overlays(frames, energy(x[0])) + overlays(frames, energy(y[0]))))
        columns = [next(seen)[0][1][0, :, h // 2 * w + w // 2].view(1, h, w) for _ in masks]
        rows.append((f"{place}: weights for the middle position, factors " + ", ".join(f"{d} r={max(mask.window)}" for d, mask in masks),
                     [im for column in columns for im in overlays(frames[:1], column)]))
    return "STRF: maps before and behind each unit, and the masks of its factors", rows


# ------------------------------------------------------------------------------------------------------------ training

RECIPE = dict(epochs=240, ids=8, clips=4, frames=8, height=224, width=112, lr=3e-4, lr_step=60, erase=0.0, pool="avg", weights="imagenet",
              kappa=4.0, margin=0.3)
SMALL = dict(epochs=8, ids=4, clips=2, frames=4, height=128, width=64, lr=5e-4, lr_step=7, pool="max", weights="none")  # --data synthetic
SAMPLER, SAMPLE, SPLIT, METRIC = PKSampler, sample_strided, split_consecutive, "cosine"  # batches and clips in training, clips in test; distance


def add_paper_arguments(group):
    for name, text in (("kappa", "temperature of the masks, Eq. 3"), ("margin", "of the triplet loss, cosine distance")):
        group.add_argument(f"--{name}", type=number(float, 0), metavar="X", help=f"{text} (default {RECIPE[name]})")


def build(args, num_classes, weights):
    options, _ = VARIANTS[args.variant]
    return STRFNet(num_classes, args.frames, pool=args.pool, weights=weights, kappa=args.kappa, **options)


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
