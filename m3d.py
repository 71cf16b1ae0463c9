"""M3D: Multi-scale 3D Convolution Network for Video Based Person Re-Identification.

Li, Zhang, Huang. AAAI 2019. https://arxiv.org/abs/1811.07468

Four 3x3 convolutions of a ResNet-50 become M3D layers, which add parallel dilated temporal
convolutions of short and long range for few parameters and start as the 2D network. Residual
attention layers (RAL) weigh what they found by a spatial, a temporal and a channel mask. A second,
plain 2D network adds the appearance of the single frames.

    python m3d.py                             # a small run on synthetic data, on any machine
    python m3d.py --data mars --gpu 0         # the paper's recipe: 2D stream, M3D stream, both
    python m3d.py --data mars --plan          # what that would train and test, without doing it
    python m3d.py --data mars --gpu 0 --variant m3d --per-tap       # a row of its tables, changed

Eq. 4-6, Fig. 4            M3DLayer (as_clips, as_frames, shift_frames): a stage's first 3x3
Eq. 7-12, Fig. 5           ResidualAttentionLayer, RAL (mean_over_frames, attend): after stages 1-3
Fig. 2                     InflatedConv (I3D), P3DConv (P3D-A, -B, -C) (both: as_clips, as_frames)
Eq. 1-3, Fig. 3            Stream, TwoStreamM3D; losses
Implementation Details     RECIPE, then SAMPLER, SAMPLE, SPLIT, METRIC; train_in_stages
Tables 1 to 4              ROWS
A class is copied with the functions in brackets; Stream with resnet50, identity_behind_relu, layers

Deviations from the paper (its sentence, what we do, the flag for the paper's form if there is one):
  streams       "initialized with well-trained 2D CNN layers", and the 2D network has its own
                recipe: so in train_in_stages (default; small run: --in-stages). --no-in-stages,
                default of the small run: both streams at once, on the same clips, by the 3D recipe
  input         "The mean value is subtracted from each (B, G, and R) channel": torchvision's mean
                and standard deviation of RGB, as its weights were trained
  n = 1         "equals to P3D-C": not with Eq. 5's one C x C matrix for the sum of 3 taps, which
                fits +4.2 MB. --per-tap: dilated 3x1x1 convolutions (+12.5 MB)
  RAL's start   "initializing all convolution layers as zero": a product of three zero masks has no
                gradient. The last convolution of one branch is zero, those of the others have zero
                weight and bias one: M = 1/2 as printed, and it learns
  Fig. 5        "ReLU and Batch Normalisation (BN) layer are applied after each convolution layer":
                only after the first of a branch, as Eq. 10 and 12 have the ReLU
  stems         I3D's becomes 3x7x7, not 7x7x7, as the printed +90.6 MB says; P3D's stays 2D
  megabytes     ROWS has what Table 1 prints over the 95.7 MB of its 2D network, with 4 bytes a
                parameter; the 95.7 MB themselves fit no count
  T = 16        Table 1 prints one size for both lengths; Eq. 6 gives seven kernels and +9.75 MB
  Table 3       LSTM (61.58 mAP, 76.11 rank-1) and A&O (63.39, 77.11): other methods, not built

Unspecified in the paper; our choice (no release is known):
  time          zeros beyond the ends of a clip; nothing between S and T of M3D, P3D-B and -C
  where         as above; "all the 2D convolution layers", I3D and P3D: all sixteen 3x3, and I3D's
                stem
  backbone      the last stride of ResNet-50 stays
  start         as the 2D network of --weights, or of --init-2d (single rows: ImageNet's): temporal
                kernels zero, P3D-A's identity, I3D's centre tap 2D
  average       over the frames of the temporal stream's last map: printed for f_s alone (Eq. 2)
  P3D-A         "serial connection ... increases the nonlinearity": BatchNorm and ReLU between S and
                T, those of the 2D network; the BatchNorm behind T is new and starts as the
                identity, see identity_behind_relu. --p3d-a-linear: nothing between
  RAL           first spatial convolution: 3x3; temporal branch: T -> max(T // 2, 1) -> T
  "softmax"     cross entropy; each stream has a BN neck, behind which f_s or f_t is, and classifier
  SGD           momentum 0.9, weight decay 5e-4; "reduced ten times": divided by 10; random flips
  epoch         every tracklet once; of the first stage every frame once (--variant 2d alone: a
                random frame of each tracklet; with --chunk 1 every frame)
  resizing      bicubic, as in the other four scripts
  --chunk       training tracklets of Duke and LS-VID are cut in pieces (0: not)
  test clips    of the temporal stream: the first floor(L / T) (of 10 frames: 1 to 8); a tracklet
                shorter than T is repeated, in training, too; the 2D stream takes "each still frame"
"""
import copy
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from common import (Row, Run, at_least_float32, bars, command_line, energy, figures, gather,
                    load_network, load_part, overlays, part_of, plan, run_script, watch)
from data import TrackletSampler, load_dataset, normalize, sample_adjacent, split_whole


# ------------------------------------------------------------- Eq. 4-6: multi-scale 3D convolution

def as_clips(x, T):
    """Frames (B*T, C, H, W) -> (B, C, T, H, W), which nn.Conv3d takes; a view: channels_last frames
    are channels_last_3d clips, and a temporal convolution reads them where they are."""
    return x.unflatten(0, (-1, T)).transpose(1, 2)


def as_frames(x):
    """What nn.Conv3d gives, (B, C, T, H, W) -> frames (B*T, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def shift_frames(clips, offset: int):
    """Clips (B, C, T, H, W) whose frame t is frame t + offset of `clips`, or zero beyond its ends.

    F.pad with a negative number at one end leaves maps and gradients in channels_last_3d, whereas
    slices leave gradients in another layout, which later layers would have to copy.
    """
    return F.pad(clips, (0, 0, 0, 0, -offset, offset))


class M3DLayer(nn.Module):
    """M3D layer, Eq. 4-6: a spatial convolution S, and over it n parallel temporal convolutions
    T^(i) with dilations i = 1 to n.

    X (B*T, C, H, W) -> (B*T, C', H', W'): frames as batch, in the place of a 2D network's
    convolution S. Starts as S.
    conv: S; frames: T, which gives n; per_tap: own weights for the three taps of a dilation (False:
    one matrix W^(i) for all three, as printed).
    """

    def __init__(self, conv, frames, per_tap=False):
        super().__init__()
        self.spatial = conv
        self.frames = frames
        self.per_tap = per_tap
        self.temporal = nn.ModuleList()
        C = conv.out_channels
        like = dict(bias=False, device=conv.weight.device, dtype=conv.weight.dtype)
        n = (frames - 1) // 2                                                     # Eq. 6
        for i in range(1, n + 1):
            if per_tap:
                w = nn.Conv3d(C, C, (3, 1, 1), padding=(i, 0, 0), dilation=(i, 1, 1), **like)
            else:
                w = nn.Conv2d(C, C, 1, **like)
            nn.init.zeros_(w.weight)
            self.temporal.append(w)

    def convolve_in_time(self, s, i):
        """T^(i)(s), Eq. 5: y_t = sum over a = -1, 0, 1 of x_{t + a i} W^(i)."""
        w = self.temporal[i - 1]
        if self.per_tap:
            return as_frames(w(as_clips(s, self.frames)))
        clips = as_clips(s, self.frames)
        return w(as_frames(shift_frames(clips, -i) + clips + shift_frames(clips, i)))

    def forward(self, x):
        if x.shape[1] != self.spatial.in_channels or x.shape[0] % self.frames:
            raise ValueError(f"M3D layer takes {self.spatial.in_channels} channels and a multiple "
                             f"of {self.frames} frames, not {x.shape[1]} and {x.shape[0]}")
        s = self.spatial(x)
        n = len(self.temporal)
        # y = S(x) + sum over i of T^(i)(S(x))                                    # Eq. 4
        return sum((self.convolve_in_time(s, i) for i in range(1, n + 1)), start=s)


# -------------------------------------------------------------- Eq. 7-12: residual attention layer

def mean_over_frames(x):
    """(B, T, C, H, W) -> (B, C, H, W), added up in the order of the memory, channels last: much
    faster than x.mean(1), as the gradient of a sum is than that of a mean."""
    return x.movedim(2, 4).sum(1).movedim(3, 1) / x.shape[1]


def attend(x, s_m, c_m, t_m):
    """y = x / 2 + M x, M = sigmoid(S_m C_m T_m), with fewer passes over the map.

    x (B, T, C, H, W); S_m (B, 1, H, W, 1), C_m (B, 1, 1, 1, C), T_m (B, T, 1, 1, 1): as x lies in
    memory, channels last; each may be 1.
    """
    # M = sigmoid(S_m * C_m * T_m)                                                # Eq. 8
    # y = x / 2 + M * x                                                           # Eq. 7
    # S_m T_m, a column, times C_m, a row: also their gradients are matrix products
    B, T, C, H, W = x.shape
    column = (s_m * t_m).expand(B, T, H, W, 1).reshape(B, T * H * W, 1)
    m = (column @ c_m.expand(B, 1, 1, 1, C).reshape(B, 1, C)).sigmoid_().to(x.dtype)
    return x * (m.view(B, T, H, W, C).movedim(4, 2) + 0.5)


class ResidualAttentionLayer(nn.Module):
    """RAL, Fig. 5, Eq. 7-12: weighs positions, channels and frames by the product of three masks.

    X (B, T, C, H, W) -> (B, T, C, H, W). Starts as identity.
    frames: T; reduction: r of the channel branch, 1 to C; branches: which of "s", "c" and "t" there
    are, at least one (a missing mask is 1). Raises ValueError for others.
    """

    def __init__(self, channels, frames, reduction=16, branches="sct"):
        super().__init__()
        if not branches or set(branches) - set("sct"):
            raise ValueError(f"RAL takes at least one of the branches s, c and t, not {branches}")
        if not 1 <= reduction <= channels:
            raise ValueError(f"RAL takes a reduction of 1 to {channels}, not {reduction}")
        self.size = frames, channels
        self.branches = nn.ModuleDict()
        if "s" in branches:
            self.branches["s"] = nn.Sequential(
                nn.Conv2d(channels, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1), nn.ReLU(),
                nn.Conv2d(1, 1, 1))
        sizes = {"c": (channels, channels // reduction), "t": (frames, max(frames // 2, 1))}
        for kind, (size, inner) in sizes.items():
            if kind in branches:                # a 1x1 convolution of a pooled vector is linear
                self.branches[kind] = nn.Sequential(
                    nn.Linear(size, inner, bias=False), nn.BatchNorm1d(inner), nn.ReLU(),
                    nn.Linear(inner, size))
        for i, branch in enumerate(self.branches.values()):
            nn.init.zeros_(branch[3].weight)
            nn.init.constant_(branch[3].bias, 0.0 if i == 0 else 1.0)

    def forward(self, x):
        B, T, C, H, W = x.shape
        if (T, C) != self.size:
            raise ValueError(f"RAL was built for (T, C) = {self.size}, not ({T}, {C})")
        s_m = c_m = t_m = x.new_ones(())
        x_s = mean_over_frames(x)                                                 # Eq. 9
        if "t" in self.branches:
            dtype = torch.promote_types(x.dtype, torch.float32)   # float16 cannot hold the sum
            x_t = (x.sum((2, 3, 4), dtype=dtype) / (C * H * W)).to(x.dtype)
            t_m = self.branches["t"](x_t).view(B, T, 1, 1, 1)
        if "s" in self.branches:
            s_m = self.branches["s"](x_s).view(B, 1, H, W, 1)                     # Eq. 10
        if "c" in self.branches:
            x_c = x_s.mean((2, 3))                                                # Eq. 11
            c_m = self.branches["c"](x_c).view(B, 1, 1, 1, C)                     # Eq. 12
        return attend(x, s_m, c_m, t_m)                                           # Eq. 7-8


# -------------------------------------------- Fig. 2: the 3D convolutions that it is compared with

class InflatedConv(nn.Module):
    """I3D (Carreira and Zisserman, CVPR 2017): a convolution inflated to three frames.

    X (B*T, C, H, W) -> (B*T, C', H', W'): frames as batch, in the place of `conv`. Starts as it.
    conv: without bias, groups and dilation, padded by a number of zeros (ValueError); frames: T.
    """

    def __init__(self, conv, frames):
        super().__init__()
        if (conv.bias is not None or conv.groups != 1 or conv.dilation != (1, 1)
                or conv.padding_mode != "zeros" or isinstance(conv.padding, str)):
            raise ValueError("I3D inflates convolutions without bias, groups and dilation, padded "
                             f"by a number of zeros, not {conv}")
        self.frames = frames
        like = dict(bias=False, device=conv.weight.device, dtype=conv.weight.dtype)
        self.conv = nn.Conv3d(conv.in_channels, conv.out_channels, (3, *conv.kernel_size),
                              (1, *conv.stride), (1, *conv.padding), **like)
        with torch.no_grad():
            self.conv.weight.zero_()[:, :, 1].copy_(conv.weight)

    def forward(self, x):
        return as_frames(self.conv(as_clips(x, self.frames)))


class P3DConv(nn.Module):
    """P3D (Qiu et al., ICCV 2017): a spatial convolution S with a temporal 3x1x1 convolution T.

    X (B*T, C, H, W) -> (B*T, C', H', W'): frames as batch, in the place of S. Starts as S, or with
    bn as relu(bn(S)).
    conv: S; frames: T; kind: "a", "b" or "c" (ValueError; "b" takes only an S that keeps the size
    of maps but for its stride); bn: for "a", with ReLU between S and T.
    """

    def __init__(self, conv, frames, kind, bn=None):
        super().__init__()
        if kind not in ("a", "b", "c"):
            raise ValueError(f"P3D is of kind a, b or c, not {kind}")
        keeps_size = conv.padding == "same" or all(
            2 * p == d * (k - 1)
            for p, d, k in zip(conv.padding, conv.dilation, conv.kernel_size))
        if kind == "b" and not keeps_size:
            raise ValueError("P3D-B adds S(x) to T(x), and takes an S that keeps the size of maps "
                             f"but for its stride, not {conv}")
        self.spatial = conv
        self.frames = frames
        self.kind = kind
        self.between = nn.Identity() if bn is None else nn.Sequential(bn, nn.ReLU())
        C = conv.out_channels
        inputs, stride = (conv.in_channels, (1, *conv.stride)) if kind == "b" else (C, 1)
        like = dict(bias=False, device=conv.weight.device, dtype=conv.weight.dtype)
        self.temporal = nn.Conv3d(inputs, C, (3, 1, 1), stride, (1, 0, 0), **like)
        nn.init.zeros_(self.temporal.weight)
        if kind == "a":
            nn.init.eye_(self.temporal.weight.data[:, :, 1, 0, 0])

    def forward(self, x):
        s = self.between(self.spatial(x))
        t = as_frames(self.temporal(as_clips(x if self.kind == "b" else s, self.frames)))
        return t if self.kind == "a" else s + t         # T(S(x)); S(x) + T(x) and S(x) + T(S(x))


def identity_behind_relu(bn):
    """A BatchNorm that passes on relu(bn(x)): in eval mode exactly, in training as nearly as x is
    normally distributed, because it has the mean and variance of a rectified normal variable."""
    b, g = bn.bias, bn.weight.abs().clamp(min=1e-6)                       # bn(x) ~ N(b, g^2)
    density = torch.exp(-(b / g) ** 2 / 2) / (2 * torch.pi) ** 0.5
    positive = torch.special.ndtr(b / g)                                  # P(bn(x) > 0)
    mean = b * positive + g * density
    var = ((b ** 2 + g ** 2) * positive + b * g * density - mean ** 2).clamp(min=0)
    identity = copy.deepcopy(bn)
    state = dict(running_mean=mean, running_var=var, weight=(var + bn.eps).sqrt(), bias=mean)
    identity.load_state_dict(state, strict=False)
    return identity


# ------------------------------------------------------------- Eq. 1-3, Fig. 3: two-stream network

def resnet50(weights="none", last_stride=1):  # same in every script
    """torchvision's ResNet-50 without its classifier, by default with the last stride removed.

    weights: "imagenet" (torchvision's V1 weights), "none", a state_dict of torchvision's resnet50,
    or a file with one. Raises OSError when they cannot be had, RuntimeError when others are there.
    """
    v1 = "IMAGENET1K_V1" if weights == "imagenet" else None
    # zero_init_residual: from random weights a deep network starts to learn much sooner
    net = torchvision.models.resnet50(weights=v1, zero_init_residual=True)
    net.fc = nn.Identity()
    if weights not in ("imagenet", "none"):
        state = weights
        if not isinstance(weights, dict):
            state = torch.load(weights, map_location="cpu", weights_only=True)
        net.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    for layer in (net.layer4[0].conv2, net.layer4[0].downsample[0]):
        layer.stride = (last_stride, last_stride)
    return net


class Stream(nn.Module):
    """One stream of Fig. 3, Eq. 2 or 3: a ResNet-50 with 3D layers and RALs, averaged over frames.

    Clips (B, T, 3, H, W), normalised -> features (B, 2048). frames: T; layer: "2d", "m3d",
    "i3d", "p3d-a", "p3d-b" or "p3d-c"; ral: branches of the RALs after stages 1 to 3, empty for no
    RAL; per_tap: see M3DLayer; pool: "avg" or "max" over the final map; weights: see resnet50;
    init_2d: the state_dict of a 2D stream's `net` to start from; all_blocks: M3D layers in every
    block, not each stage's first alone; reduction: r of the RALs; p3d_a_linear: no BatchNorm and
    ReLU between S and T of P3D-A. Raises ValueError for what it cannot take.
    """

    def __init__(self, frames, layer="2d", ral="", per_tap=False, pool="avg", weights="none",
                 init_2d=None, all_blocks=False, reduction=16, p3d_a_linear=False):
        super().__init__()
        if layer not in ("2d", "m3d", "i3d", "p3d-a", "p3d-b", "p3d-c"):
            raise ValueError(f"the layers are 2d, m3d, i3d, p3d-a, p3d-b and p3d-c, not {layer}")
        self.net = net = resnet50(weights, last_stride=2)
        if init_2d is not None:
            try:
                net.load_state_dict(init_2d)
            except RuntimeError as error:
                says = " ".join(str(error).split())[:160]
                raise ValueError(f"init_2d does not fit the 2D stream ({says} ...)") from None
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            for i, block in enumerate(stage):
                if layer == "m3d" and (all_blocks or i == 0):
                    block.conv2 = M3DLayer(block.conv2, frames, per_tap)
                elif layer == "i3d":
                    block.conv2 = InflatedConv(block.conv2, frames)
                elif layer == "p3d-a" and not p3d_a_linear:
                    block.conv2 = P3DConv(block.conv2, frames, "a", block.bn2)
                    block.bn2 = identity_behind_relu(block.bn2)
                elif layer.startswith("p3d"):
                    block.conv2 = P3DConv(block.conv2, frames, layer[-1])
        if layer == "i3d":
            net.conv1 = InflatedConv(net.conv1, frames)
        self.ral = nn.ModuleDict()
        for name, channels in (("layer1", 256), ("layer2", 512), ("layer3", 1024)) if ral else ():
            self.ral[name] = ResidualAttentionLayer(channels, frames, reduction, ral)
        self.pool = pool

    def forward(self, clips):
        net = self.net
        B, T = clips.shape[:2]
        x = clips.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = getattr(net, name)(x)
            if name in self.ral:
                x = self.ral[name](x.unflatten(0, (B, T))).flatten(0, 1)
        x = x.to(net.bn1.weight.dtype)
        x = x.mean((2, 3)) if self.pool == "avg" else x.amax((2, 3))
        return x.view(B, T, -1).mean(1)                                           # Eq. 2, 3


class TwoStreamM3D(nn.Module):
    """Two-stream M3D, Fig. 3, Eq. 1: a 2D and an M3D stream without common parameters, each with a
    BN neck and a classifier.

    Clips (B, T, 3, H, W), normalised -> in eval mode embeddings [f_s, f_t] (B, 4096), or (B, 2048)
    of a single stream; in train mode the logits of each stream, {name: (B, num_classes)}.

    frames: T, fixed; stream: "two", "spatial" or "temporal"; pool, weights: of both streams, see
    Stream; all others: of the temporal stream. Raises ValueError for what it cannot take.
    """

    def __init__(self, num_classes, frames=8, stream="two", layer="m3d", ral="sct", per_tap=False,
                 pool="avg", weights="none", init_2d=None, all_blocks=False, reduction=16,
                 p3d_a_linear=False):
        super().__init__()
        if stream not in ("two", "spatial", "temporal"):
            raise ValueError(f"the streams are spatial, temporal or two, not {stream}")
        if stream == "spatial" and init_2d is not None:
            raise ValueError("init_2d is for the temporal stream, which stream spatial leaves out")
        self.frames = frames
        self.streams = nn.ModuleDict()
        if stream != "temporal":
            self.streams["spatial"] = Stream(frames, pool=pool, weights=weights)
        if stream != "spatial":
            self.streams["temporal"] = Stream(frames, layer, ral, per_tap, pool, weights, init_2d,
                                              all_blocks, reduction, p3d_a_linear)
        self.neck = nn.ModuleDict({name: nn.BatchNorm1d(2048) for name in self.streams})
        self.classifier = nn.ModuleDict({name: nn.Linear(2048, num_classes, bias=False)
                                         for name in self.streams})
        for classifier in self.classifier.values():
            nn.init.normal_(classifier.weight, std=0.001)

    def test_parts(self):
        """[(network, frames a clip)] whose embeddings a test joins: the 2D stream takes still
        frames, all of a tracklet, the temporal stream clips of T."""
        return [(nn.Sequential(self.streams[name], neck).train(self.training),
                 1 if name == "spatial" else self.frames) for name, neck in self.neck.items()]

    def forward(self, clips):
        if clips.shape[1] != self.frames:
            raise ValueError(f"the network was built for clips of {self.frames} frames, not "
                             f"{clips.shape[1]}")
        embeddings = {}
        for name, neck in self.neck.items():
            embeddings[name] = neck(self.streams[name](clips).to(neck.weight.dtype))
        if not self.training:
            return torch.cat([*embeddings.values()], 1)                           # Eq. 1
        return {name: self.classifier[name](f) for name, f in embeddings.items()}


# -------------------------------------------------------------------------------------- the losses

def loss_weights(args):
    """The weights of the streams' losses, {name: weight}: the streams share nothing."""
    streams = ("spatial", "temporal") if args.stream == "two" else (args.stream,)
    return {f"xent-{name}": 1.0 for name in streams}


def losses(outputs, pids, args):
    """The cross entropy of each stream, as {name: scalar}; their sum is minimised."""
    return {f"xent-{name}": F.cross_entropy(at_least_float32(x), pids)
            for name, x in outputs.items()}


# -------------------------------------------------------------- Implementation Details: the recipe

RECIPE = {  # 3D networks (2D: row "2d"); flag: (paper's value, small run's, meaning and source)
    "frames": (8, 3, "T, adjacent frames a clip (Implementation Details, Table 1)"),
    "height": (256, 128, "of the resized frames (Implementation Details)"),
    "width": (128, 64, "of the resized frames (Implementation Details)"),
    "ids": (24, 8, "tracklets a batch, times --clips; 12 for T = 16 (Implementation Details)"),
    "clips": (1, 1, "factor of --ids (our choice)"),
    "erase": (0.0, 0.0, "probability of random erasing (our choice)"),
    "epochs": (400, 3, "(Implementation Details)"),
    "lr": (0.01, 0.0015, "learning rate of SGD (Implementation Details)"),
    "lr_step": (300, 2, "lr is divided by 10 every so many epochs (Implementation Details)"),
    "momentum": (0.9, 0.9, "of SGD (our choice)"),
    "weight_decay": (5e-4, 5e-4, "of SGD (our choice)"),
    "weights": ("imagenet", "none", "backbone: imagenet, none or a file (below Eq. 6)"),
    "pool": ("avg", "max", "over the final map (our choice)", ("avg", "max")),
    "stream": ("two", "two", "of Fig. 3 (Table 2)", ("two", "spatial", "temporal")),
    "layer": ("m3d", "m3d", "3D layer (Table 1)", ("2d", "m3d", "i3d", "p3d-a", "p3d-b", "p3d-c")),
    "all_blocks": (False, False, "M3D layers in every block, not each stage's first alone (text)"),
    "per_tap": (False, False, "own weights for the three taps of a dilation (Eq. 5: one matrix)"),
    "p3d_a_linear": (False, False, "P3D-A without BatchNorm and ReLU after S (our choice)"),
    "ral": (("s", "c", "t"), ("s", "c", "t"), "RAL's branches or none (Table 2)", ("s", "c", "t")),
    "reduction": (16, 16, "r of RAL's channel branch (Eq. 12)"),
    "init_2d": (None, None, "last.pt of --variant 2d to start the temporal stream (below Eq. 6)"),
    "in_stages": (True, False, "two streams: 2D first, by its row's recipe, then M3D; not with "
                               "--init (below Eq. 6)"),
    "join": ((), (), "evaluate as one: last.pt of a 2D and of a temporal stream (Eq. 1)"),
}
SAMPLER = TrackletSampler      # a batch: --ids x --clips different tracklets, of any identities
SAMPLE = sample_adjacent       # a training clip: T adjacent frames from a random one on
SPLIT = split_whole            # the test: the first floor(L / T) clips, averaged; 2D: every frame
METRIC = "euclidean"           # distance of the test

NO_RAL = dict(stream="temporal", ral=())
T16 = dict(frames=16, ids=12)
ROWS = {  # place in the paper; settings of the recipe that a row names; (mAP, rank-1) as printed
    # rank-5: MARS 93.84, PRID 100.00, iLIDS-VID 94.33; rank-20: MARS 97.74
    "two-stream": Row("Tables 2-4: Two-stream M3D", stream="two", layer="m3d", ral=("s", "c", "t"),
                      mars=(74.06, 84.39), prid=(None, 94.40), ilids=(None, 74.00)),
    "2d": Row("Tables 1, 2: 2D CNN, on images", stream="spatial", layer="2d", ral=(), frames=1,
              ids=128, lr=0.001, lr_step=10, epochs=20, mars=(62.54, 76.43), prid=(None, 82.02),
              ilids=(None, 49.33)),
    "m3d": Row("Tables 1, 2: M3D, 8 frames", stream="temporal", layer="m3d", ral=(),
               mars=(69.90, 81.01), prid=(None, 87.64), ilids=(None, 70.00), more_megabytes=4.2),
    "m3d+ral-s": Row("Table 2: M3D+RAL(s)", stream="temporal", layer="m3d", ral=("s",),
                     mars=(71.04, 82.19), prid=(None, 89.89), ilids=(None, 71.33)),
    "m3d+ral-t": Row("Table 2: M3D+RAL(t)", stream="temporal", layer="m3d", ral=("t",),
                     mars=(70.66, 81.81), prid=(None, 88.76), ilids=(None, 71.33)),
    "m3d+ral-c": Row("Table 2: M3D+RAL(c)", stream="temporal", layer="m3d", ral=("c",),
                     mars=(71.30, 82.13), prid=(None, 89.89), ilids=(None, 72.00)),
    "m3d+ral": Row("Table 2: M3D+RAL", stream="temporal", layer="m3d", ral=("s", "c", "t"),
                   mars=(71.76, 82.79), prid=(None, 91.03), ilids=(None, 72.67)),
    # Table 1 prints clips/s of a GTX TITAN X: M3D 98.3 for 8 and 49.1 for 16 frames, I3D 81.0 and
    # 38.7, P3D-A 90.1 and 46.9, P3D-B 93.9 and 48.7, P3D-C 87.6 and 45.4; 2D 796 frames/s
    "m3d-t16": Row("Table 1: M3D, 16 frames", **NO_RAL, layer="m3d", **T16, mars=(66.23, 80.13),
                   more_megabytes=4.2),
    "i3d": Row("Table 1: I3D, 8 frames", **NO_RAL, layer="i3d", mars=(62.84, 76.62),
               more_megabytes=90.6),
    "i3d-t16": Row("Table 1: I3D, 16 frames", **NO_RAL, layer="i3d", **T16, mars=(61.58, 75.11),
                   more_megabytes=90.6),
    "p3d-a": Row("Table 1: P3D-A, 8 frames", **NO_RAL, layer="p3d-a", mars=(60.69, 75.08),
                 more_megabytes=15.2),
    "p3d-a-t16": Row("Table 1: P3D-A, 16 frames", **NO_RAL, layer="p3d-a", **T16,
                     mars=(60.52, 75.69), more_megabytes=15.2),
    "p3d-b": Row("Table 1: P3D-B, 8 frames", **NO_RAL, layer="p3d-b", mars=(67.03, 79.06),
                 more_megabytes=15.2),
    "p3d-b-t16": Row("Table 1: P3D-B, 16 frames", **NO_RAL, layer="p3d-b", **T16,
                     mars=(65.07, 77.63), more_megabytes=15.2),
    "p3d-c": Row("Table 1: P3D-C, 8 frames", **NO_RAL, layer="p3d-c", mars=(67.06, 79.08),
                 more_megabytes=15.2),
    "p3d-c-t16": Row("Table 1: P3D-C, 16 frames", **NO_RAL, layer="p3d-c", **T16,
                     mars=(65.17, 79.44), more_megabytes=15.2),
    "m3d-all-blocks": Row('text to Table 1: M3D for "all the 2D convolution layers"', **NO_RAL,
                          layer="m3d", all_blocks=True),
}
RELEASE = None                 # the authors offer no trained weights


def build(args, num_classes):
    """The network of a row; a checkpoint brings its own weights."""
    join = () if args.resume else args.join
    if join and not (args.evaluate and len(join) == 2 and args.stream == "two"):
        raise ValueError("--join takes two checkpoints, with --evaluate or --figure, --stream two")
    new = not (args.resume or join)
    init_2d = load_part(args.init_2d, "streams.spatial.net.") if args.init_2d and new else None
    model = TwoStreamM3D(num_classes, args.frames, args.stream, args.layer, args.ral, args.per_tap,
                         args.pool, args.weights if new else "none", init_2d, args.all_blocks,
                         args.reduction, args.p3d_a_linear)
    for path, stream in zip(join, ("spatial", "temporal")):
        load_part(path, f"streams.{stream}.", model.streams[stream])
        load_part(path, f"neck.{stream}.", model.neck[stream])
    if join:
        model.origin = f"joined from {join[0]} and {join[1]}"
    elif args.init_2d and new:
        model.origin = f"untrained but for the 2D stream of {args.init_2d}"
    return model


def make_optimizer(model, args):
    return torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum,
                           weight_decay=args.weight_decay, fused=True)


# ---------------------------------------------------------------------------------------- training

def train(args):  # same in every script
    """Trains a network, or with --evaluate or --figure shows one; returns the last result."""
    if args.plan:
        return plan(args, recipe=RECIPE, sampler=SAMPLER, split=SPLIT, metric=METRIC, build=build,
                    loss_weights=loss_weights)
    run = Run(args)                                     # processes, device, folder, checkpoint
    with run.setting_up():                              # what is missing is drawn or downloaded
        dataset = load_dataset(args.data, args.root, int(args.split), args.chunk,
                               training=not args.evaluate)
        print(dataset.summary())
        model = build(args, run.num_classes(dataset))
    model = run.prepare(model)                          # device, channels_last, weights of --resume
    if args.figure:
        return figures(run, model, dataset, SPLIT, METRIC, picture, load)
    if args.evaluate:
        return run.test(model, dataset, SPLIT, METRIC)
    optimizer = make_optimizer(model, args)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_step, gamma=0.1)
    loader = run.loader(dataset.train, SAMPLER, SAMPLE)
    network = run.start(model=model, optimizer=optimizer, scheduler=scheduler)  # or goes on
    if run.evaluates_first:
        run.test(model, dataset, SPLIT, METRIC)         # untrained
    for epoch in run.epochs():
        model.train()
        for clips, pids in run.batches(loader, epoch):  # a signal ends it, with a checkpoint
            with torch.autocast(run.device.type, torch.bfloat16, enabled=args.amp):
                outputs = network(normalize(clips))
            parts = losses(gather(outputs), gather(pids), args)  # of all processes' clips
            optimizer.zero_grad()
            run.backward(sum(parts.values()))
            optimizer.step()
            run.log(parts)
        if run.test_is_due(epoch):
            run.test(model, dataset, SPLIT, METRIC)
        scheduler.step()
    return run.finish()


def train_in_stages(args):
    """The printed order: the 2D stream by row 2d, with every frame once an epoch; the temporal one,
    which starts from it; both in one test. A schedule given by flags holds for the first two, which
    have folders of their own in --output and go on where they were stopped. With --init: no stages.
    """
    files = [f"{args.output}/{stage}/last.pt" for stage in ("2d", "temporal")]
    shown = args.evaluate and args.stream == "two" and not (args.resume or args.init or args.join)
    if shown and all(map(os.path.exists, files)):
        print(f"--join {' '.join(files)} shows the two trained stages as one network")
    if args.stream != "two" or args.evaluate or args.init or args.init_2d or not args.in_stages:
        return train(args)
    train(part_of(args, ROWS, "2d", variant="2d", chunk=1))
    train(part_of(args, ROWS, "temporal", variant="m3d+ral", layer=args.layer, ral=args.ral,
                  init_2d=files[0]))
    return train(part_of(args, ROWS, "both", evaluate=True, join=files))


def load(file, **settings):  # same in every script
    """The network of a run's last.pt, in eval mode on the CPU; `.args` has its settings. settings:
    those of the recipe that a file of an earlier version lacks."""
    return load_network(file, build, settings, recipe=RECIPE, rows=ROWS, release=RELEASE,
                        script=__file__)


def main():  # same in every script
    run_script(train_in_stages, build, recipe=RECIPE, rows=ROWS, release=RELEASE, text=__doc__,
               script=__file__)


# ------------------------------------------------------------------------------------- the picture

def picture(model, clips, frames):
    """For --figure, after Fig. 4 and 5: the last map, what the temporal kernels add, and S and T of
    the RALs."""
    stream = model.streams["temporal" if "temporal" in model.streams else "spatial"]
    net, rals = stream.net, [*stream.ral.values()]
    firsts = [stage[0].conv2 for stage in (net.layer1, net.layer2, net.layer3, net.layer4)]
    m3ds = [layer for layer in firsts if isinstance(layer, M3DLayer) and len(layer.temporal)]
    watched = [net.layer4, *(branch for ral in rals for branch in ral.branches.values()),
               *(conv for layer in m3ds for conv in (layer.spatial, *layer.temporal))]
    seen = {module: call[0][1] for module, call in zip(watched, watch(stream, clips, *watched))}
    masks = {kind: [seen[ral.branches[kind]][0].float() for ral in rals if kind in ral.branches]
             for kind in "st"}
    stages = [f"stage {n}" for n in range(1, 5)]
    rows = {"last map, over its mean": overlays(frames, energy(seen[net.layer4]))}
    if m3ds:
        rows["what the temporal kernels of stage 1 add, over its mean"] = overlays(
            frames, energy(sum(seen[conv] for conv in m3ds[0].temporal)))
        rows["temporal kernels, by dilation: norm over that of S"] = bars(
            [torch.stack([seen[conv].float().norm() for conv in layer.temporal])
             / seen[layer.spatial].float().norm() for layer in m3ds], stages)
    if masks["s"]:
        rows["S of the RALs, on the first frame"] = overlays(
            frames[:1].expand(3, -1, -1, -1), [s[0] for s in masks["s"]], stages)
    if masks["t"]:
        rows["T of the RALs, by frame"] = bars(masks["t"], stages)
    return "M3D: where the stream looks", rows


if __name__ == "__main__":  # same in every script
    command_line(main)
