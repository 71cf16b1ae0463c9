"""M3D: Multi-scale 3D Convolution Network for Video Based Person Re-Identification.

Li, Zhang, Huang. AAAI 2019. https://arxiv.org/abs/1811.07468

Four 3x3 convolutions of a ResNet-50 become M3D layers, which add parallel dilated temporal convolutions of short and long range
for few parameters and start as the 2D network. Residual attention layers (RAL) weigh what they found by a spatial, a temporal and
a channel mask. A second, plain 2D network adds the appearance of the single frames.

    python m3d.py                                  # a small run on synthetic data, on any machine
    python m3d.py --data mars --gpu 0              # the paper's recipe, both streams
    python m3d.py --data mars --variant m3d        # a row of its tables (see VARIANTS)
    python m3d.py --data mars --variant 2d --output runs/2d             # the 2D stream alone, with its own recipe ...
    python m3d.py --data mars --variant m3d --init-2d runs/2d/last.pt --output runs/m3d   # ... starts the temporal one

Where to find what:
    Eq. 4-6, Fig. 4           M3DLayer                       Fig. 2      InflatedConv (I3D), P3DConv (P3D-A, -B, -C)
    Eq. 7-12, Fig. 5          ResidualAttentionLayer (RAL)   Eq. 1-3, Fig. 3  Stream, TwoStreamM3D; objective

What the paper leaves open, and the reading taken:
    W^(i) of Eq. 5    one C x C matrix for each dilation, applied to the sum of its three taps, as printed: exactly the printed
                      +4.2 MB at T = 8 (per_tap=True: the ordinary dilated 3x1x1 convolution, +12.5 MB, P3D-C for n = 1)
    temporal padding  zeros, the length stays; between S and T nothing, the block's BatchNorm and ReLU follow the sum
    where             M3D at the 3x3 convolution of the first block of each stage; RAL after stages 1, 2, 3
    RAL               one ReLU between the two convolutions, BN after the first (Eq. 10-12, not "after each"); the first one of the
                      spatial branch is 3x3; temporal branch T -> max(T // 2, 1) -> T
    RAL's start       the paper wants M = 1/2 from zeros, but a product of three zero masks has no gradient: the last convolution
                      of one branch is zero, those of the others have zero weight and bias one; M = 1/2, and it learns
    backbone          the last stride stays (the paper does not say otherwise); torchvision's mean and std
    I3D, P3D          all sixteen 3x3 convolutions, I3D's stem too; nothing between S and T of P3D, no BatchNorm after the temporal ones
                      (the printed +15.2 MB fits one); all start as the 2D network (P3D-A: centre tap identity; I3D: centre tap the
                      2D weights; others zero)
    T = 16            Eq. 6 gives 7 kernels and +9.75 MB, where the paper prints +4.2 MB again
    streams           trained on the same clips with the 3D recipe, each with its own BN neck, classifier and cross entropy; nothing
                      is shared; in test both see whole clips of T frames
    batches           P x K tracklets, whatever their identities; an epoch shows every tracklet once, as printed (some of the last
                      batch twice); SGD with momentum 0.9 and weight decay 5e-4, flip
    2D stream alone   images: one frame of each tracklet an epoch
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

from common import (RandomStates, Stop, all_splits, bars, catch_signals, command_line, compiled, complexity, complexity_table, energy, evaluate, figures,
                    first_process_first, gather, load_checkpoint, load_file, number, overlays, own_group, parallel, pick_device, quiet, rank, replacing,
                    restore, same_flags, save_file, save_rows, stop_asked, watch, world)
from data import CHUNK, DATA_SETS, SPLIT_SETS, TrackletSampler, TrainClips, UserError, load_dataset, normalize, sample_adjacent, split_whole


# Frames are the batch of the 2D network, (B*T, C, H, W) in channels_last: as (B, C, T, H, W) the same memory is channels_last_3d, so
# that a temporal convolution reads and writes it where it is.

def as_clips(x, T):
    """(B*T, C, H, W) -> (B, C, T, H, W), a view."""
    return x.unflatten(0, (-1, T)).transpose(1, 2)


def as_frames(x):
    """(B, C, T, H, W) -> (B*T, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def sum_taps(x, i):
    """(B, T, ...) -> x_{t-i} + x_t + x_{t+i}, zeros beyond the ends; 0 < i < T."""
    y = x.clone()
    y[:, i:] += x[:, :-i]
    y[:, :-i] += x[:, i:]
    return y


# ------------------------------------------------------------------------------------------------ M3D convolution layer

class M3DLayer(nn.Module):
    """M3D layer, Eq. 4-6: y = S(x) + sum over i of T^(i)(S(x)), T^(i) a temporal convolution with dilation i, i = 1 ... n.

    Frames as batch, (B*T, C, H, W) -> (B*T, C', H', W'), so that it replaces any 2D convolution. Starts as that convolution.
    conv: S; frames: T, which gives n = floor((T - 1) / 2) (Eq. 6); per_tap: own weights for the three taps of a dilation (False: one
    matrix W^(i) for all three, as printed).
    """

    def __init__(self, conv, frames, per_tap=False):
        super().__init__()
        C, n, at = conv.out_channels, (frames - 1) // 2, dict(device=conv.weight.device, dtype=conv.weight.dtype)   # n: Eq. 6
        self.spatial, self.frames, self.per_tap = conv, frames, per_tap
        self.temporal = nn.ModuleList(
            nn.Conv3d(C, C, (3, 1, 1), padding=(i, 0, 0), dilation=(i, 1, 1), bias=False, **at) if per_tap else nn.Conv2d(C, C, 1, bias=False, **at)
            for i in range(1, n + 1))
        for w in self.temporal:
            nn.init.zeros_(w.weight)

    def forward(self, x):
        y = s = self.spatial(x)
        for i, w in enumerate(self.temporal, 1):                                # Eq. 5
            t = as_frames(w(as_clips(s, self.frames))) if self.per_tap else w(sum_taps(s.unflatten(0, (-1, self.frames)), i).flatten(0, 1))
            y = y + t                                                           # Eq. 4
        return y


class ResidualAttentionLayer(nn.Module):
    """RAL, Fig. 5, Eq. 7-12: y = x / 2 + M x with M = sigmoid(S_m C_m T_m), masks over positions, channels and frames.

    (B, T, C, H, W) -> the same shape. Starts as identity.
    frames: T; reduction: r of the channel branch; branches: which of "s", "c" and "t" there are (a missing mask is 1). Raises ValueError
    for other branches or none.
    """

    def __init__(self, channels, frames, reduction=16, branches="sct"):
        super().__init__()
        if not branches or set(branches) - set("sct"):
            raise ValueError(f"RAL has the branches s, c and t, at least one of them, not {branches!r}")
        self.branches = nn.ModuleDict()
        if "s" in branches:
            self.branches["s"] = nn.Sequential(nn.Conv2d(channels, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 1, 1))
        for name, size, inner in (("c", channels, channels // reduction), ("t", frames, max(frames // 2, 1))):
            if name in branches:                                                # a 1x1 convolution of a pooled vector is linear
                self.branches[name] = nn.Sequential(nn.Linear(size, inner, bias=False), nn.BatchNorm1d(inner), nn.ReLU(), nn.Linear(inner, size))
        for first, branch in zip([True, False, False], self.branches.values()):
            nn.init.zeros_(branch[3].weight)
            nn.init.constant_(branch[3].bias, 0.0 if first else 1.0)

    def forward(self, x):
        B, T, C, H, W = x.shape
        x_s, m = x.movedim(2, 4).mean(1).movedim(3, 1), 0.5                     # Eq. 9, in the order of the memory: much faster than x.mean(1)
        if "t" in self.branches:
            m = m * self.branches["t"](x.mean((2, 3, 4))).view(B, T, 1, 1, 1)   # T_m
        if "s" in self.branches:
            m = m * self.branches["s"](x_s).view(B, 1, H, W, 1)                 # S_m, Eq. 10
        if "c" in self.branches:
            m = m * self.branches["c"](x_s.mean((2, 3))).view(B, 1, 1, 1, C)    # C_m, Eq. 11-12
        m = m.to(torch.promote_types(m.dtype, torch.float32))
        # Eq. 7-8 with m half of S C T: x / 2 + sigmoid(2 m) x = x + tanh(m) x / 2, fewer passes over the map; channels last, as x is
        return torch.addcmul(x, m.tanh().to(x.dtype).movedim(4, 2), x, value=0.5)


# ------------------------------------------------------------------------- Fig. 2: the 3D layers that it is compared with

class InflatedConv(nn.Module):
    """I3D (Carreira and Zisserman, CVPR 2017): `conv` inflated to three frames. (B*T, C, H, W) -> (B*T, C', H', W'); starts as `conv`,
    which has no bias, groups or dilation."""

    def __init__(self, conv, frames):
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv3d(conv.in_channels, conv.out_channels, (3, *conv.kernel_size), (1, *conv.stride), (1, *conv.padding), bias=False,
                              device=conv.weight.device, dtype=conv.weight.dtype)
        with torch.no_grad():
            self.conv.weight.zero_()[:, :, 1].copy_(conv.weight)

    def forward(self, x):
        return as_frames(self.conv(as_clips(x, self.frames)))


class P3DConv(nn.Module):
    """P3D (Qiu et al., ICCV 2017): a temporal 3x1x1 convolution T with the spatial S: T(S(x)) ("a"), S(x) + T(x) ("b") or
    S(x) + T(S(x)) ("c"). (B*T, C, H, W) -> (B*T, C', H', W'); starts as S. conv: S; frames: T."""

    def __init__(self, conv, frames, kind):
        super().__init__()
        self.spatial, self.frames, self.kind = conv, frames, kind
        inputs, stride = (conv.in_channels, (1, *conv.stride)) if kind == "b" else (conv.out_channels, 1)
        self.temporal = nn.Conv3d(inputs, conv.out_channels, (3, 1, 1), stride, (1, 0, 0), bias=False, device=conv.weight.device, dtype=conv.weight.dtype)
        nn.init.zeros_(self.temporal.weight)
        if kind == "a":
            nn.init.eye_(self.temporal.weight.data[:, :, 1, 0, 0])

    def forward(self, x):
        s = self.spatial(x)
        t = as_frames(self.temporal(as_clips(x if self.kind == "b" else s, self.frames)))
        return t if self.kind == "a" else s + t


# --------------------------------------------------------------------------------- Eq. 1-3, Fig. 3: two-stream network

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


class Stream(nn.Module):
    """One stream of Fig. 3, Eq. 2 or 3: clips (B, T, 3, H, W), normalised -> features (B, 2048), averaged over the frames.

    frames: T; layer: "2d", "m3d", "i3d", "p3d-a", "p3d-b" or "p3d-c"; ral: branches of the RALs after stages 1 to 3, "" for none;
    per_tap: see M3DLayer; pool: "avg" or "max"; weights: see resnet50; init_2d: a state_dict of the 2D network to start from.
    """

    def __init__(self, frames, layer="2d", ral="", per_tap=False, pool="avg", weights="none", init_2d=None):
        super().__init__()
        if layer not in ("2d", "m3d", "i3d", "p3d-a", "p3d-b", "p3d-c"):
            raise ValueError(f"the layers are 2d, m3d, i3d, p3d-a, p3d-b and p3d-c, not {layer}")
        self.net = net = resnet50(weights, last_stride=2)
        net.fc = nn.Identity()
        if init_2d:
            net.load_state_dict(init_2d)
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            for i, block in enumerate(stage):
                if layer == "m3d" and i == 0:
                    block.conv2 = M3DLayer(block.conv2, frames, per_tap)
                elif layer == "i3d":
                    block.conv2 = InflatedConv(block.conv2, frames)
                elif layer.startswith("p3d"):
                    block.conv2 = P3DConv(block.conv2, frames, layer[-1])
        if layer == "i3d":
            net.conv1 = InflatedConv(net.conv1, frames)
        self.ral = nn.ModuleDict({f"layer{i}": ResidualAttentionLayer(128 * 2 ** i, frames, branches=ral) for i in (1, 2, 3) if ral})
        self.pool = pool

    def forward(self, clips):
        net, (B, T) = self.net, clips.shape[:2]
        x = net.maxpool(net.relu(net.bn1(net.conv1(clips.flatten(0, 1).contiguous(memory_format=torch.channels_last)))))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = getattr(net, name)(x)
            if name in self.ral:
                x = self.ral[name](x.unflatten(0, (B, T))).flatten(0, 1)
        x = x.to(net.bn1.weight.dtype)
        return (x.mean((2, 3)) if self.pool == "avg" else x.amax((2, 3))).view(B, T, -1).mean(1)


class TwoStreamM3D(nn.Module):
    """Two-stream M3D, Fig. 3, Eq. 1: a 2D and an M3D stream without common parameters, each with a BN neck and a classifier.

    Clips (B, T, 3, H, W), normalised -> in eval mode embeddings [f_s, f_t] (B, 4096), or (B, 2048) of a single stream; in train mode
    the logits of each stream, {name: (B, num_classes)}.

    frames: T, fixed; any height and width. stream: "two", "spatial" or "temporal"; layer, ral, per_tap, pool, weights: see Stream, of the
    temporal stream the first three; init_2d: for the temporal stream.
    """

    def __init__(self, num_classes, frames=8, stream="two", layer="m3d", ral="sct", per_tap=False, pool="avg", weights="none", init_2d=None):
        super().__init__()
        if stream not in ("two", "spatial", "temporal"):
            raise ValueError(f"the streams are spatial, temporal or two, not {stream}")
        self.frames = frames
        self.streams = nn.ModuleDict()
        if stream != "temporal":
            self.streams["spatial"] = Stream(frames, pool=pool, weights=weights)
        if stream != "spatial":
            self.streams["temporal"] = Stream(frames, layer, ral, per_tap, pool, weights, init_2d)
        self.neck = nn.ModuleDict({name: nn.BatchNorm1d(2048) for name in self.streams})
        self.classifier = nn.ModuleDict({name: nn.Linear(2048, num_classes, bias=False) for name in self.streams})
        for layer in self.classifier.values():
            nn.init.normal_(layer.weight, std=0.001)

    def forward(self, clips):
        if clips.shape[1] != self.frames:
            raise ValueError(f"the network was built for clips of {self.frames} frames, not {clips.shape[1]}")
        embeddings = {name: neck(self.streams[name](clips).to(neck.weight.dtype)) for name, neck in self.neck.items()}
        if not self.training:
            return torch.cat([*embeddings.values()], 1)                         # Eq. 1
        return {name: self.classifier[name](embedding) for name, embedding in embeddings.items()}


# ------------------------------------------------------------------------------------------------------------- variants

# Rows of Tables 1 and 2: constructor arguments, and the figures as printed in the paper.
VARIANTS = {
    "two-stream": (dict(), (74.06, 84.39)),
    "2d": (dict(layer="2d", ral=""), (62.54, 76.43, 95.7)),
    "m3d": (dict(ral=""), (69.90, 81.01, 99.9)),
    "m3d+ral-s": (dict(ral="s"), (71.04, 82.19)),
    "m3d+ral-t": (dict(ral="t"), (70.66, 81.81)),
    "m3d+ral-c": (dict(ral="c"), (71.30, 82.13)),
    "m3d+ral": (dict(), (71.76, 82.79)),
    "m3d-t16": (dict(ral=""), (66.23, 80.13, 99.9)),
    "i3d": (dict(layer="i3d", ral=""), (62.84, 76.62, 186.3)),
    "i3d-t16": (dict(layer="i3d", ral=""), (61.58, 75.11, 186.3)),
    "p3d-a": (dict(layer="p3d-a", ral=""), (60.69, 75.08, 110.9)),
    "p3d-a-t16": (dict(layer="p3d-a", ral=""), (60.52, 75.69, 110.9)),
    "p3d-b": (dict(layer="p3d-b", ral=""), (67.03, 79.06, 110.9)),
    "p3d-b-t16": (dict(layer="p3d-b", ral=""), (65.07, 77.63, 110.9)),
    "p3d-c": (dict(layer="p3d-c", ral=""), (67.06, 79.08, 110.9)),
    "p3d-c-t16": (dict(layer="p3d-c", ral=""), (65.17, 79.44, 110.9)),
}
COLUMNS = "mAP and rank-1 on MARS, megabytes of parameters"
PRINTED, HEADS = ("MB of parameters",), ("neck", "classifier")                  # what the figures after rank-1 are; parts that the paper does not count
ROW_RECIPE = {row: dict(stream="temporal", **(dict(frames=16, ids=12) if row.endswith("t16") else {})) for row in list(VARIANTS)[1:]}  # row -> what it changes in the recipe
ROW_RECIPE["2d"] = dict(stream="spatial", frames=1, ids=128, lr=0.001, lr_step=10, epochs=20)


# ------------------------------------------------------------------------------------------------------------ objective

def objective(outputs, pids, args):
    """Cross entropy of each stream, summed; and the parts, {name: scalar}."""
    parts = {f"xent-{name}": F.cross_entropy(logits.float(), pids) for name, logits in outputs.items()}
    return sum(parts.values()), parts


def picture(model, clips, frames):
    """For --figure: the masks of the RALs before their product and sigmoid (Eq. 8), and the energy of each temporal kernel."""
    stream = model.streams["temporal" if "temporal" in model.streams else "spatial"]
    branches = [(kind, branch) for ral in stream.ral.values() for kind, branch in ral.branches.items()]
    layers = [m for m in stream.net.modules() if isinstance(m, M3DLayer)]
    (last,), *calls = watch(model, clips, stream.net.layer4, *(b for _, b in branches), *(w for m in layers for w in (m.spatial, *m.temporal)))
    rows, masks = [("last map: root mean square of the channels", overlays(frames, energy(last[1])))], {"s": [], "t": [], "c": []}
    for (kind, _), ((_, m),) in zip(branches, calls):
        m = m[0].float().cpu()
        masks[kind] += (overlays(frames[:1], m) if kind == "s" else [bars(m, range(1, len(m) + 1))] if kind == "t" else
                        [bars(m.sort().values[torch.linspace(0, len(m) - 1, 40).long()])])
    for kind, label in (("s", "S of the RALs behind stages 1, 2, 3, on the first frame"), ("t", "T: one number a frame"), ("c", "C: 40 of the channels, sorted")):
        rows += [(label, masks[kind])] if masks[kind] else []
    rms, charts = [seen[0][1].float().square().mean().sqrt() for seen in calls[len(branches):]], []
    for m in layers:
        (s, *t), rms = rms[:1 + len(m.temporal)], rms[1 + len(m.temporal):]
        charts += [bars([v / s for v in t], [f"i = {i}" for i in range(1, len(t) + 1)])] if t else []
    rows += [("energy of the temporal kernels of the M3D layers of stages 1 to 4, over that of S", charts)] if charts else []
    return "M3D: where the stream looks, what its attention weighs and how far in time it sees", rows


# ------------------------------------------------------------------------------------------------------------ training

RECIPE = dict(epochs=400, ids=24, clips=1, frames=8, height=256, width=128, lr=0.01, lr_step=300, erase=0.0, pool="avg", weights="imagenet",
              stream="two", init_2d=None)                                       # Implementation Details
SMALL = dict(epochs=3, ids=8, frames=3, height=128, width=64, lr=0.0015, lr_step=2, pool="max", weights="none")  # --data synthetic
SAMPLER, SAMPLE, SPLIT, METRIC = TrackletSampler, sample_adjacent, split_whole, "euclidean"  # batches and clips in training, clips in test; distance


def add_paper_arguments(group):
    group.add_argument("--stream", choices=("two", "spatial", "temporal"), help=f"of Fig. 3 (default {RECIPE['stream']}, and see the variants)")
    group.add_argument("--init-2d", metavar="FILE", help="the last.pt of a run with --variant 2d, whose 2D stream starts the temporal one")


def build(args, num_classes, weights):
    options, _ = VARIANTS[args.variant]
    init_2d = None
    if args.init_2d and args.stream == "spatial":
        raise UserError("--init-2d: is for the temporal stream, which --stream spatial leaves out")
    if args.init_2d and not args.resume:
        prefix = "streams.spatial.net."
        saved = load_file(args.init_2d).get("model")
        init_2d = {k.removeprefix(prefix): v for k, v in saved.items() if str(k).startswith(prefix)} if isinstance(saved, dict) else {}
        if not init_2d:
            raise UserError(f"--init-2d {args.init_2d}: holds no 2D stream; train one with --variant 2d")
    try:
        return TwoStreamM3D(num_classes, args.frames, args.stream, pool=args.pool, weights=weights, init_2d=init_2d, **options)
    except RuntimeError as error:
        if not init_2d:
            raise
        raise UserError(f"--init-2d {args.init_2d}: its 2D stream does not fit ({' '.join(str(error).split())[:160]} ...)") from None


def make_optimizer(model, args):
    return torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)


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
