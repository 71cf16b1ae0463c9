"""M3D: Multi-scale 3D Convolution Network for Video Based Person Re-Identification.

Li, Zhang, Huang. AAAI 2019. https://arxiv.org/abs/1811.07468

M3D replaces four 3x3 convolutions of a ResNet-50 by M3D layers. These add parallel temporal
convolutions with increasing dilations, need few extra parameters, and compute at the start the same
as the 2D convolutions. Residual attention layers (RAL) re-weight the feature maps with a spatial, a
channel and a temporal mask. A second stream, a plain 2D ResNet-50 on single frames, adds appearance
features.

    python m3d.py                             # quick run on synthetic data, also without a GPU
    python m3d.py --data mars --gpu 0         # the paper's recipe: trains the 2D stream, then the
                                              # M3D stream, then tests both as one network
    python m3d.py --data mars --plan          # only print what the command above trains and tests
    python m3d.py --data mars --gpu 0 --variant m3d --per-tap     # a variant of the paper, with one
                                                                  # setting changed
    python m3d.py --data prid --gpu 0 --split all                 # ten splits and their mean
    python m3d.py --help                                          # all settings and variants

Where the parts of the paper are:
  Eq. 1, Fig. 3              TwoStreamM3D: f_st = [f_s, f_t]
  Eq. 2, 3                   Stream: f_s of the 2D stream, f_t of the M3D stream (the temporal one)
  Eq. 4-6, Fig. 4            M3DLayer, in the first block of each stage of ResNet-50
  Eq. 7-12, Fig. 5           ResidualAttentionLayer (RAL), after stages 1, 2 and 3; Eq. 7 and 8 are
                             in apply_masks, Eq. 9 is mean_over_frames
  Fig. 2                     InflatedConv (I3D), P3DConv (P3D-A, P3D-B and P3D-C)
  Comparison with Recent Work
    "softmax loss"           losses
    "Euclidean distance"     METRIC
  Implementation Details     RECIPE (3D networks), ROWS["2d"] (2D network), SAMPLER, SAMPLE
    "SGD"                    make_optimizer; StepLR in train lowers the learning rate
    the order of training    train_in_stages
    features in the test     TwoStreamM3D.test_parts, SPLIT; evaluate in common.py averages them and
                             ranks the gallery
  Tables 1 to 4              ROWS; T = 16 of Table 1: the variants that end in -t16
A class can be copied into another project, with what its docstring names after "Copy along".

Training: the 2D stream learns from single frames, by the recipe of --variant 2d. The M3D stream
then starts from the 2D stream's weights and learns from clips of T frames. Test: the 2D stream sees
every frame of a tracklet, the M3D stream floor(L / T) clips of T frames from a tracklet of L
frames. f_s and f_t are the means of each stream's outputs over its frames or clips.

These flags take a checkpoint (last.pt): --resume resumes or evaluates the run that wrote it; --init
starts a new training, with the checkpoint's weights wherever they fit; --init-2d starts the M3D
stream from a run of --variant 2d; --join evaluates a 2D stream and an M3D stream that were trained
separately, as one network; --beside, with --figure, draws a second network, too.

Deviations from the paper (what it says, what we do, the flag for the paper's form if there is one):
  streams       M3D is "initialized with well-trained 2D CNN layers", and the 2D network has a
                recipe of its own. The full recipe therefore trains in stages. The quick run trains
                both streams at once, on the same clips and by the 3D recipe, unless --in-stages
                is given.
  input         "The mean value is subtracted from each (B, G, and R) channel". We normalise RGB
                by torchvision's mean and standard deviation, with which its weights were trained.
  n = 1         For n = 1 "the M3D layer equals to P3D-C". Eq. 5 contradicts this: its three taps
                share one C x C matrix, whereas P3D-C has one for each. We follow Eq. 5, because it
                fits the 4.2 MB that M3D adds in the paper. --per-tap uses one matrix for each tap,
                as P3D-C does; M3D then adds 12.5 MB.
  RAL's start   "initializing all convolution layers as zero". If all three masks are zero, the
                gradient of their product is zero and RAL never learns. We therefore set the last
                convolution's weight to zero in every branch, and its bias to zero in the first
                branch and to one in the others. M is 1/2 at the start, as in the paper.
  Fig. 5        "ReLU and Batch Normalisation (BN) layer are applied after each convolution layer".
                We apply them only after the first one of a branch, where Eq. 10 and 12 have ReLU.
  I3D's stem    "inflated cubically". We inflate the stem to 3x7x7 instead of 7x7x7, because that
                fits the 90.6 MB that I3D adds in the paper. P3D's stem stays 2D.
  megabytes     ROWS gives the size of each network in Table 1 minus that of the 2D network. We
                compare these differences, at 4 bytes per parameter, because the paper's 95.7 MB for
                the 2D network match no count of its parameters. P3D then adds 15.1 MB, and 15.2 MB
                in the paper.
  T = 16        Table 1 gives the same size for T = 8 and T = 16. By Eq. 6 a layer has seven
                temporal kernels for T = 16 and three for T = 8, so that M3D adds 9.75 MB instead of
                4.2 MB.
  Table 3       The authors' own LSTM (61.58 mAP, 76.11 rank-1) and A&O (63.39, 77.11) baselines are
                other methods, which we did not implement.

Unspecified in the paper; our choice (no release is known):
  time          Temporal convolutions pad a clip with zeros. There is no BatchNorm or ReLU between
                the spatial and the temporal convolution in M3D layers, P3D-B and P3D-C.
  where         "We totally replace 4 residual blocks at the beginning of each stage": we replace
                the 3x3 convolution of the first block of each stage. The docstring of Stream shows
                where M3D layers and RALs are. The paper also replaces "all the 2D convolution
                layers" by M3D layers: we take these to be the sixteen 3x3 convolutions, not the 1x1
                ones (--all-blocks). I3D and P3D replace the same sixteen, and I3D also the stem.
  backbone      Stage 4 of ResNet-50 keeps its stride of 2.
  start         The 2D network starts from --weights, by default ImageNet's. The M3D stream starts
                from a 2D network: from the run that --init-2d names, else from --weights. Variants
                with the M3D stream alone therefore start from ImageNet's weights by default.
                Temporal kernels start at zero, except in P3D-A (identity) and I3D (the 2D kernel is
                the middle tap, the others are zero).
  average       The M3D stream, too, averages over frames. The paper says so for f_s alone (Eq. 2).
  fusion        f_s and f_t are concatenated as they are, without a normalisation.
  P3D-A         The paper says that its "serial connection ... increases the nonlinearity". We take
                this to mean that the 2D network's BatchNorm and ReLU come between the spatial and
                the temporal convolution. A new BatchNorm, which starts as the identity, follows the
                temporal one. With --p3d-a-linear there is nothing between the two, and no new
                BatchNorm.
  RAL           The first spatial convolution is 3x3. The temporal branch has T -> max(T // 2, 1)
                -> T channels.
  pooling       The last map is averaged over its positions.
  "softmax"     Cross entropy. Each stream has a BN neck, whose output is f_s or f_t, and a
                classifier, which starts with normal weights (standard deviation 0.001).
  SGD           Momentum 0.9, weight decay 5e-4; "reduced ten times" means divided by 10.
  augmentation  Each clip is flipped left to right with a probability of 0.5.
  epoch         An epoch shows every tracklet at least once. When the streams are trained in stages,
                an epoch of the 2D stream shows every frame. --variant 2d by itself shows one random
                frame of each tracklet; with --chunk 1 it shows every frame.
  resizing      Frames are resized by bicubic interpolation.
  --chunk       Training tracklets are cut into chunks of 32 frames on Duke and of 64 on LS-VID.
                --chunk 0 leaves them whole.
  test clips    The M3D stream takes floor(L / T) clips from the start of the tracklet: with T = 8,
                frames 1-8 of 10. A tracklet shorter than T is repeated, in training as well. The 2D
                stream takes "each still frame", including the last frames that fill no clip.
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

def frames_to_clips(x, T: int):
    """Reshapes frames (B*T, C, H, W) to clips (B, C, T, H, W), the layout of nn.Conv3d.

    Nothing is copied: frames in channels_last are clips in channels_last_3d.
    """
    return x.unflatten(0, (-1, T)).transpose(1, 2)


def clips_to_frames(x):
    """Reshapes clips (B, C, T, H, W), the layout of nn.Conv3d, to frames (B*T, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def shift_frames(clips, offset: int):
    """Shifts clips (B, C, T, H, W) in time: frame t of the result is frame t + offset of `clips`,
    or zeros if there is no such frame.

    F.pad with a negative number at one end keeps maps and gradients in channels_last_3d. With
    slices the gradients would have another layout and would have to be copied.
    """
    # F.pad starts with the last dimension: W, H, T. A negative number removes frames.
    return F.pad(clips, (0, 0, 0, 0, -offset, offset))


class M3DLayer(nn.Module):
    """M3D layer, Eq. 4-6, Fig. 4: a spatial convolution S, followed by n parallel temporal
    convolutions T^(i) of its output with dilations i = 1 to n; returns the sum of all n + 1
    outputs.

    Takes frames (B*T, C, H, W) and returns frames (B*T, C', H', W'), because it replaces a
    convolution of a 2D network. At initialisation it computes S(x).

    Args:
        conv: the 2D convolution that it replaces, which becomes S.
        frames: number of frames in a clip, T, at least 1; by Eq. 6 there are n = (T - 1) // 2
            temporal kernels.
        per_tap: True gives each of the three taps of a temporal kernel its own C' x C' matrix.
            By default they share one, W^(i), as in Eq. 5.

    Raises ValueError if the input's channels do not fit conv, or its number of frames is not a
    multiple of `frames`.

    Copy along: frames_to_clips, clips_to_frames, shift_frames.
    """

    def __init__(self, conv: nn.Conv2d, frames: int, *, per_tap: bool = False):
        super().__init__()
        self.spatial = conv
        self.frames = frames
        self.per_tap = per_tap
        self.temporal = nn.ModuleList()
        C = conv.out_channels
        conv_options = {"bias": False, "device": conv.weight.device, "dtype": conv.weight.dtype}
        n = (frames - 1) // 2                                                     # Eq. 6
        for i in range(1, n + 1):
            if per_tap:
                temporal_conv = nn.Conv3d(C, C, (3, 1, 1), padding=(i, 0, 0), dilation=(i, 1, 1),
                                          **conv_options)
            else:
                # A 1x1 convolution multiplies all positions of all frames by the matrix W^(i).
                temporal_conv = nn.Conv2d(C, C, 1, **conv_options)
            nn.init.zeros_(temporal_conv.weight)
            self.temporal.append(temporal_conv)

    def convolve_in_time(self, s, i: int):
        """Returns T^(i)(s), Eq. 5, for frames s (B*T, C', H', W') and the dilation i."""
        temporal_conv = self.temporal[i - 1]
        clips = frames_to_clips(s, self.frames)
        if self.per_tap:
            return clips_to_frames(temporal_conv(clips))
        # Eq. 5: y_t = sum over a = -1, 0, 1 of s_{t + a i} W^(i). The taps share W^(i), so the
        # three shifted clips are added first and multiplied by W^(i) once.
        sum_of_taps = shift_frames(clips, -i) + clips + shift_frames(clips, i)
        return temporal_conv(clips_to_frames(sum_of_taps))

    def forward(self, x):
        if x.shape[1] != self.spatial.in_channels or x.shape[0] % self.frames != 0:
            raise ValueError(f"an M3D layer takes {self.spatial.in_channels} channels and a "
                             f"multiple of {self.frames} frames, not {x.shape[1]} channels and "
                             f"{x.shape[0]} frames")
        s = self.spatial(x)
        y = s
        for i in range(1, len(self.temporal) + 1):
            y = y + self.convolve_in_time(s, i)         # y = S(x) + sum of T^(i)(S(x)),  Eq. 4
        return y


# -------------------------------------------------------------- Eq. 7-12: residual attention layer

def mean_over_frames(x):
    """Computes Eq. 9: x_s = sum over t of x_t / T, for x (B, T, C, H, W); returns (B, C, H, W).

    x is channels_last in memory, so we sum a view with the channels last. x.mean(1) would return
    another layout and is much slower, and so is its gradient.
    """
    T = x.shape[1]
    channels_at_the_end = x.movedim(2, 4)                       # (B, T, H, W, C)
    total = channels_at_the_end.sum(1)                          # (B, H, W, C)
    return total.movedim(3, 1) / T


def apply_masks(x, s_m, c_m, t_m):
    """Computes Eq. 7 and 8: y = x / 2 + M x, where M = sigmoid(S_m C_m T_m), for x (B, T, C, H, W).

    S_m T_m has one value for each position of each frame, C_m one for each channel. We write
    S_m T_m as a column and C_m as a row, so that S_m C_m T_m is one matrix product. Its gradients
    are matrix products as well. This reads and writes fewer tensors of the size of x than
    multiplying the masks element by element.

    Args:
        x: (B, T, C, H, W), best with the channels last in memory.
        s_m, c_m, t_m: the masks, (B, 1, H, W, 1), (B, 1, 1, 1, C) and (B, T, 1, 1, 1); a scalar
            1 in the place of a mask leaves it out.
    """
    B, T, C, H, W = x.shape
    column = (s_m * t_m).expand(B, T, H, W, 1).reshape(B, T * H * W, 1)
    row = c_m.expand(B, 1, 1, 1, C).reshape(B, 1, C)
    product = column @ row                                      # S_m C_m T_m: (B, T*H*W, C)
    m = product.sigmoid_().to(x.dtype)                          # M = sigmoid(S_m C_m T_m),  Eq. 8
    m = m.view(B, T, H, W, C).movedim(4, 2)                     # (B, T, C, H, W)
    return x * (m + 0.5)                                        # y = x / 2 + M x,  Eq. 7


class ResidualAttentionLayer(nn.Module):
    """Residual attention layer (RAL), Eq. 7-12, Fig. 5: re-weights a feature map with the product
    of a spatial, a channel and a temporal mask.

    Takes and returns (B, T, C, H, W). At initialisation it is the identity.

    Args:
        channels: C.
        frames: number of frames in a clip, T.
        reduction: r of Eq. 12, from 1 to C; the channel branch has C // r channels inside.
        branches: the masks to use, one or more of "s" (spatial), "c" (channel) and "t" (temporal),
            as a string or a tuple; each mask that is left out counts as 1.

    Raises ValueError on invalid branches or an invalid reduction, and on an input whose T is not
    `frames` or whose C is not `channels`.

    Copy along: mean_over_frames, apply_masks.
    """

    def __init__(self, channels: int, frames: int, *, reduction: int = 16,
                 branches: str | tuple[str, ...] = "sct"):
        super().__init__()
        unknown_branches = set(branches) - {"s", "c", "t"}
        if not branches or unknown_branches:
            raise ValueError(f"RAL takes at least one of the branches s, c and t, not {branches}")
        if not 1 <= reduction <= channels:
            raise ValueError(f"RAL takes a reduction of 1 to {channels}, not {reduction}")
        self.frames_and_channels = (frames, channels)
        self.branches = nn.ModuleDict()
        if "s" in branches:
            self.branches["s"] = nn.Sequential(
                nn.Conv2d(channels, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1), nn.ReLU(),
                nn.Conv2d(1, 1, 1))
        # on pooled vectors, the 1x1 convolutions of the other two branches are linear layers
        if "c" in branches:
            hidden_channels = channels // reduction
            self.branches["c"] = nn.Sequential(
                nn.Linear(channels, hidden_channels, bias=False), nn.BatchNorm1d(hidden_channels),
                nn.ReLU(), nn.Linear(hidden_channels, channels))
        if "t" in branches:
            hidden_frames = max(frames // 2, 1)
            self.branches["t"] = nn.Sequential(
                nn.Linear(frames, hidden_frames, bias=False), nn.BatchNorm1d(hidden_frames),
                nn.ReLU(), nn.Linear(hidden_frames, frames))
        # The first mask starts at 0 and the others at 1: their product is 0, hence M = 1/2, and
        # gradients reach the first branch, which they would not if all masks were 0.
        for i, branch in enumerate(self.branches.values()):
            last_layer = branch[-1]
            nn.init.zeros_(last_layer.weight)
            if i == 0:
                nn.init.zeros_(last_layer.bias)
            else:
                nn.init.ones_(last_layer.bias)

    def forward(self, x):
        B, T, C, H, W = x.shape
        if (T, C) != self.frames_and_channels:
            raise ValueError(f"RAL was built for (T, C) = {self.frames_and_channels}, not "
                             f"({T}, {C})")
        one = x.new_ones(())                        # the value of a mask that is left out
        s_m = one
        c_m = one
        t_m = one
        x_s = mean_over_frames(x)                                                 # Eq. 9
        if "s" in self.branches:
            s_m = self.branches["s"](x_s).view(B, 1, H, W, 1)                     # Eq. 10
        if "c" in self.branches:
            x_c = x_s.mean((2, 3))                                                # Eq. 11
            c_m = self.branches["c"](x_c).view(B, 1, 1, 1, C)                     # Eq. 12
        if "t" in self.branches:
            # The temporal branch "has the same architecture as the channel attention branch": a
            # mean, here over channels and positions, followed by two layers.
            # The sum is taken in float32 or more, because it can overflow float16.
            dtype = torch.promote_types(x.dtype, torch.float32)
            total = x.sum((2, 3, 4), dtype=dtype)                                 # (B, T)
            x_t = (total / (C * H * W)).to(x.dtype)
            t_m = self.branches["t"](x_t).view(B, T, 1, 1, 1)
        return apply_masks(x, s_m, c_m, t_m)                                      # Eq. 7, 8


# ----------------------------------- Fig. 2: the 3D convolutions that the paper compares M3D with

class InflatedConv(nn.Module):
    """I3D, Fig. 2b (Carreira and Zisserman, CVPR 2017): a convolution inflated to three frames.

    Takes frames (B*T, C, H, W) and returns frames (B*T, C', H', W'), because it replaces a
    convolution of a 2D network. At initialisation it computes the same as that convolution.

    Args:
        conv: the 2D convolution that it replaces. It must have no bias, groups=1, dilation 1 and a
            zero padding whose size is given as numbers (not as a string).
        frames: number of frames in a clip, T.

    Raises ValueError on any other conv.

    Copy along: frames_to_clips, clips_to_frames.
    """

    def __init__(self, conv: nn.Conv2d, frames: int):
        super().__init__()
        plain = conv.bias is None and conv.groups == 1 and conv.dilation == (1, 1)
        zero_padded = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        if not plain or not zero_padded:
            raise ValueError("I3D inflates only convolutions with dilation 1, zero padding whose "
                             f"size is a number, one group and no bias, not {conv}")
        self.frames = frames
        self.conv = nn.Conv3d(conv.in_channels, conv.out_channels,
                              kernel_size=(3, *conv.kernel_size), stride=(1, *conv.stride),
                              padding=(1, *conv.padding), bias=False,
                              device=conv.weight.device, dtype=conv.weight.dtype)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[:, :, 1] = conv.weight

    def forward(self, x):
        return clips_to_frames(self.conv(frames_to_clips(x, self.frames)))


def keeps_map_size(conv: nn.Conv2d):
    """Returns whether a convolution would keep height and width if its stride were 1."""
    if isinstance(conv.padding, str):
        return conv.padding == "same"
    for padding, dilation, kernel_size in zip(conv.padding, conv.dilation, conv.kernel_size):
        if 2 * padding != dilation * (kernel_size - 1):
            return False
    return True


class P3DConv(nn.Module):
    """P3D, Fig. 2c-e (Qiu et al., ICCV 2017): a spatial convolution S and a temporal 3x1x1
    convolution T, one after the other or side by side.

    Takes frames (B*T, C, H, W) and returns frames (B*T, C', H', W'), because it replaces a
    convolution of a 2D network. At initialisation it computes S(x), or relu(bn(S(x))) if bn is
    given.

    Args:
        conv: the 2D convolution that it replaces, which becomes S. Kind "b" adds S(x) and T(x), so
            conv must then be padded such that only its stride changes the size of maps.
        frames: number of frames in a clip, T.
        kind: "a" for T(S(x)), "b" for S(x) + T(x), "c" for S(x) + T(S(x)).
        bn: for kind "a", a BatchNorm2d to apply, followed by a ReLU, between S and T. By default
            there is nothing between them.

    Raises ValueError on another kind, and for kind "b" on a conv that is padded differently.

    Copy along: frames_to_clips, clips_to_frames, keeps_map_size.
    """

    def __init__(self, conv: nn.Conv2d, frames: int, kind: str, *,
                 bn: nn.BatchNorm2d | None = None):
        super().__init__()
        if kind not in ("a", "b", "c"):
            raise ValueError(f"P3D is of kind a, b or c, not {kind}")
        if kind == "b" and not keeps_map_size(conv):
            raise ValueError("P3D-B adds S(x) and T(x), so S must be padded such that only its "
                             f"stride changes the size of maps, not as in {conv}")
        self.spatial = conv
        self.frames = frames
        self.kind = kind
        if bn is None:
            self.between = nn.Identity()
        else:
            self.between = nn.Sequential(bn, nn.ReLU())
        if kind == "b":
            in_channels = conv.in_channels
            stride = (1, *conv.stride)
        else:
            in_channels = conv.out_channels
            stride = (1, 1, 1)
        self.temporal = nn.Conv3d(in_channels, conv.out_channels, kernel_size=(3, 1, 1),
                                  stride=stride, padding=(1, 0, 0), bias=False,
                                  device=conv.weight.device, dtype=conv.weight.dtype)
        nn.init.zeros_(self.temporal.weight)
        if kind == "a":
            # The centre tap is the identity: zeros would remove the output of S.
            nn.init.eye_(self.temporal.weight.data[:, :, 1, 0, 0])

    def convolve_in_time(self, x):
        return clips_to_frames(self.temporal(frames_to_clips(x, self.frames)))

    def forward(self, x):
        s = self.between(self.spatial(x))
        if self.kind == "a":
            return self.convolve_in_time(s)                     # P3D-A: T(S(x))
        if self.kind == "b":
            return s + self.convolve_in_time(x)                 # P3D-B: S(x) + T(x)
        return s + self.convolve_in_time(s)                     # P3D-C: S(x) + T(S(x))


@torch.no_grad()
def identity_batchnorm_after_relu(bn: nn.BatchNorm2d):
    """Returns a new BatchNorm2d that leaves relu(bn(x)) as it is. (Our choice for P3D-A.)

    Its running statistics are those of relu(z), where z is normally distributed with bn's bias as
    mean and bn's weight as standard deviation; its own weight and bias undo the normalisation by
    these statistics. In eval mode relu(bn(x)) therefore passes it unchanged. In train mode, which
    normalises by the batch's statistics, this is true only as far as bn(x) is distributed like z.
    """
    mu, sigma = bn.bias, bn.weight.abs().clamp(min=1e-6)                  # of bn(x)
    density_at_zero = torch.exp(-(mu / sigma) ** 2 / 2) / (2 * torch.pi) ** 0.5
    share_above_zero = torch.special.ndtr(mu / sigma)
    mean = mu * share_above_zero + sigma * density_at_zero
    mean_of_squares = (mu ** 2 + sigma ** 2) * share_above_zero + mu * sigma * density_at_zero
    var = (mean_of_squares - mean ** 2).clamp(min=0)
    new_bn = copy.deepcopy(bn)
    new_bn.running_mean.copy_(mean)
    new_bn.running_var.copy_(var)
    new_bn.weight.copy_((var + bn.eps).sqrt())
    new_bn.bias.copy_(mean)
    return new_bn


# ------------------------------------------------------------- Eq. 1-3, Fig. 3: two-stream network

def resnet50(weights="none", last_stride=1):  # same in every script
    """torchvision's ResNet-50 without its classifier.

    Args:
        weights: where its weights come from: "imagenet" (torchvision's V1 weights, which are
            downloaded once), "none" (random weights), a state_dict of torchvision's resnet50, or
            the path of a file with one.
        last_stride: stride of stage 4. With 1 its maps are as large as those of stage 3, as is
            usual in re-identification; torchvision's own is 2.

    Raises OSError when the weights cannot be read or downloaded, and RuntimeError when they are not
    those of a ResNet-50.
    """
    v1 = "IMAGENET1K_V1" if weights == "imagenet" else None
    # From random weights a network whose residual branches start at zero learns much sooner.
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
    """One stream of Fig. 3: a ResNet-50 whose features are averaged over the frames. The 2D stream
    is the plain network, F_2d of Eq. 2. The M3D stream, F_M3D of Eq. 3, has 3D convolutions and
    RALs.

    Takes normalised clips (B, T, 3, H, W) and returns features (B, 2048). Shapes in the M3D stream
    for frames of 256 x 128 pixels:

        stem      (B*T,   64, 64, 32)   7x7 convolution and max pooling
        stage 1   (B*T,  256, 64, 32)   3 blocks, M3D layer in the first one; then a RAL
        stage 2   (B*T,  512, 32, 16)   4 blocks, M3D layer in the first one; then a RAL
        stage 3   (B*T, 1024, 16,  8)   6 blocks, M3D layer in the first one; then a RAL
        stage 4   (B*T, 2048,  8,  4)   3 blocks, M3D layer in the first one
        features  (B, 2048)             pooled over positions, then averaged over frames

    Args:
        frames: number of frames in a clip, T. A stream with layer="2d" and no RALs takes clips of
            any length.
        layer: the convolutions: "2d" (a plain ResNet-50), "m3d", "i3d", "p3d-a", "p3d-b" or
            "p3d-c".
        ral: the branches of the RALs, some of "s", "c" and "t"; empty for no RALs.
        per_tap: if True, M3D layers have one matrix for each of the three taps of a temporal
            kernel, instead of one that the taps share.
        pool: "avg" or "max", how the last map is pooled over its positions.
        weights: initial weights of the ResNet-50: "none", "imagenet", or the path of a state_dict
            of torchvision's resnet50.
        init_2d: state_dict of the `net` of a trained 2D stream; the network starts from these
            weights instead of `weights`. None by default.
        all_blocks: if True, there is an M3D layer in every block instead of in the first one of
            each stage.
        reduction: r of the RALs, from 1 to 256.
        p3d_a_linear: if True, P3D-A has no BatchNorm and ReLU between S and T.

    Raises ValueError on invalid arguments.

    Copy along: resnet50, identity_batchnorm_after_relu, and M3DLayer, ResidualAttentionLayer,
    InflatedConv and P3DConv with what they need.
    """

    def __init__(self, frames: int, *, layer: str = "2d", ral: str | tuple[str, ...] = "",
                 per_tap: bool = False, pool: str = "avg", weights: str = "none",
                 init_2d: dict | None = None, all_blocks: bool = False, reduction: int = 16,
                 p3d_a_linear: bool = False):
        super().__init__()
        if layer not in ("2d", "m3d", "i3d", "p3d-a", "p3d-b", "p3d-c"):
            raise ValueError(f"the layers are 2d, m3d, i3d, p3d-a, p3d-b and p3d-c, not {layer}")
        if pool not in ("max", "avg"):
            raise ValueError(f"the pooling of the last maps must be max or avg, not {pool}")
        net = resnet50(weights if init_2d is None else "none", last_stride=2)
        if init_2d is not None:
            try:
                net.load_state_dict(init_2d)
            except RuntimeError as error:
                reason = " ".join(str(error).split())   # in one line
                reason = reason[:160]                   # the whole message names every layer
                raise ValueError(f"init_2d does not fit the 2D stream ({reason} ...)") from None
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            for index, block in enumerate(stage):
                if layer == "m3d":
                    if all_blocks or index == 0:
                        block.conv2 = M3DLayer(block.conv2, frames, per_tap=per_tap)
                elif layer == "i3d":
                    block.conv2 = InflatedConv(block.conv2, frames)
                elif layer == "p3d-a" and p3d_a_linear:
                    block.conv2 = P3DConv(block.conv2, frames, kind="a")
                elif layer == "p3d-a":
                    block.conv2 = P3DConv(block.conv2, frames, kind="a", bn=block.bn2)
                    block.bn2 = identity_batchnorm_after_relu(block.bn2)
                elif layer == "p3d-b":
                    block.conv2 = P3DConv(block.conv2, frames, kind="b")
                elif layer == "p3d-c":
                    block.conv2 = P3DConv(block.conv2, frames, kind="c")
        if layer == "i3d":
            net.conv1 = InflatedConv(net.conv1, frames)
        self.net = net
        self.ral = nn.ModuleDict()
        if ral:
            for name, channels in (("layer1", 256), ("layer2", 512), ("layer3", 1024)):
                self.ral[name] = ResidualAttentionLayer(channels, frames, reduction=reduction,
                                                        branches=ral)
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
        x = x.to(net.bn1.weight.dtype)                  # from autocast's bfloat16 to float32
        if self.pool == "avg":
            x = x.mean((2, 3))
        else:
            x = x.amax((2, 3))
        return x.view(B, T, -1).mean(1)                                           # Eq. 2, 3


class TwoStreamM3D(nn.Module):
    """Two-stream M3D, Eq. 1, Fig. 3: a 2D stream ("spatial") and an M3D stream ("temporal"), which
    share no parameters, each with a BN neck and a classifier of its own.

    Takes normalised clips (B, T, 3, H, W). In eval mode it returns embeddings: [f_s, f_t],
    (B, 4096), or (B, 2048) with a single stream. Such a call feeds both streams the same frames. A
    test feeds them different frames, so it does not call the network, but the networks that
    `test_parts` returns. In train mode it returns the logits of each stream,
    {"spatial": (B, num_classes), "temporal": (B, num_classes)}.

    Args:
        num_classes: number of identities in the training set.
        frames: number of frames in a clip, T; clips of another length are refused.
        stream: "two", or "spatial" or "temporal" for one stream alone.
        layer: the convolutions of the temporal stream: "2d", "m3d", "i3d", "p3d-a", "p3d-b" or
            "p3d-c".
        ral: the branches of the temporal stream's RALs, some of "s", "c" and "t"; empty for no
            RALs.
        per_tap: if True, M3D layers have one matrix for each of the three taps of a temporal
            kernel, instead of one that the taps share.
        pool: "avg" or "max", how both streams pool their last map over its positions.
        weights: initial weights of each ResNet-50: "none", "imagenet", or the path of a state_dict
            of torchvision's resnet50.
        init_2d: state_dict of the `net` of a trained 2D stream; the temporal stream starts from
            these weights instead of `weights`. None by default; it must be None if stream is
            "spatial".
        all_blocks: if True, there is an M3D layer in every block instead of in the first one of
            each stage.
        reduction: r of the RALs, from 1 to 256.
        p3d_a_linear: if True, P3D-A has no BatchNorm and ReLU between S and T.

    Raises ValueError on invalid arguments, and on clips of another length.

    Copy along: Stream with what it needs.
    """

    def __init__(self, num_classes: int, frames: int = 8, *, stream: str = "two",
                 layer: str = "m3d", ral: str | tuple[str, ...] = "sct", per_tap: bool = False,
                 pool: str = "avg", weights: str = "none", init_2d: dict | None = None,
                 all_blocks: bool = False, reduction: int = 16, p3d_a_linear: bool = False):
        super().__init__()
        if stream not in ("two", "spatial", "temporal"):
            raise ValueError(f"the streams are spatial, temporal or two, not {stream}")
        if stream == "spatial" and init_2d is not None:
            raise ValueError("init_2d is for the temporal stream, but stream is spatial")
        self.frames = frames
        self.streams = nn.ModuleDict()
        if stream != "temporal":
            self.streams["spatial"] = Stream(frames, pool=pool, weights=weights)
        if stream != "spatial":
            self.streams["temporal"] = Stream(
                frames,
                layer=layer,
                ral=ral,
                per_tap=per_tap,
                pool=pool,
                weights=weights,
                init_2d=init_2d,
                all_blocks=all_blocks,
                reduction=reduction,
                p3d_a_linear=p3d_a_linear,
            )
        self.neck = nn.ModuleDict()
        for name in self.streams:
            self.neck[name] = nn.BatchNorm1d(2048)
        self.classifier = nn.ModuleDict()
        for name in self.streams:
            self.classifier[name] = nn.Linear(2048, num_classes, bias=False)
        for classifier in self.classifier.values():
            nn.init.normal_(classifier.weight, std=0.001)

    def test_parts(self):
        """Returns the networks that a test runs, a list of (network, number of frames in its
        clips). The test averages each network's outputs over all its clips of a tracklet and
        concatenates the averages (Eq. 1). The 2D stream gets every frame as a clip of its own, the
        M3D stream clips of T frames."""
        parts = []
        for name, stream in self.streams.items():
            network = nn.Sequential(stream, self.neck[name])
            network.train(self.training)
            if name == "spatial":
                parts.append((network, 1))
            else:
                parts.append((network, self.frames))
        return parts

    def forward(self, clips):
        if clips.shape[1] != self.frames:
            raise ValueError(f"the network was built for clips of {self.frames} frames, not "
                             f"{clips.shape[1]}")
        embeddings = {}                                                 # f_s and f_t
        for name, neck in self.neck.items():
            embeddings[name] = neck(self.streams[name](clips).to(neck.weight.dtype))
        if not self.training:
            return torch.cat([*embeddings.values()], 1)                 # f_st = [f_s, f_t],  Eq. 1
        return {name: self.classifier[name](f) for name, f in embeddings.items()}


# -------------------------------------------------------------------------------------- the losses

def loss_weights(args):
    """Returns the weight of each stream's loss, {name: weight}. All are 1: as the streams share no
    parameters, there is nothing to balance."""
    if args.stream == "two":
        return {"xent-spatial": 1.0, "xent-temporal": 1.0}
    return {f"xent-{args.stream}": 1.0}


def losses(outputs, pids, args):
    """Returns the cross entropy of each stream (in the paper: "softmax loss"), {name: scalar}.
    Training minimises their sum.

    Args:
        outputs: the logits of each stream, {"spatial" or "temporal": (B, num_classes)}.
        pids: the identities as class numbers, (B,).
        args: the settings.
    """
    weights = loss_weights(args)
    terms = {f"xent-{name}": F.cross_entropy(at_least_float32(logits), pids)
             for name, logits in outputs.items()}
    return {name: weights[name] * term for name, term in terms.items()}


# -------------------------------------------------------------- Implementation Details: the recipe

# This is the recipe of the 3D networks; that of the 2D network is in ROWS["2d"].
# flag: (the paper's value or our choice, the quick run's value, meaning and source[, choices])
RECIPE = {
    "frames": (8, 3, "number of adjacent frames in a clip, T (Implementation Details, Table 1)"),
    "height": (256, 128, "height of the resized frames (Implementation Details)"),
    "width": (128, 64, "width of the resized frames (Implementation Details)"),
    "ids": (24, 8,
            "a batch has ids x clips tracklets (the paper: 24 for T = 8, 12 for T = 16; "
            "Implementation Details)"),
    "clips": (1, 1, "factor of the batch size: a batch has ids x clips tracklets (our choice)"),
    "erase": (0.0, 0.0, "probability of random erasing (our choice)"),
    "epochs": (400, 3, "number of epochs (Implementation Details)"),
    "lr": (0.01, 0.0015, "initial learning rate of SGD (Implementation Details)"),
    "lr_step": (300, 2,
                "divide the learning rate by 10 after every N epochs (Implementation Details)"),
    "momentum": (0.9, 0.9, "momentum of SGD (our choice)"),
    "weight_decay": (5e-4, 5e-4, "weight decay of SGD (our choice)"),
    "weights": ("imagenet", "none",
                "initial weights of each ResNet-50: imagenet, none or a file (our choice)"),
    "pool": ("avg", "max", "pooling over the positions of the last map (our choice)",
             ("avg", "max")),
    "stream": ("two", "two", "which streams: spatial (2D), temporal (M3D) or two (Fig. 3, Table 2)",
               ("two", "spatial", "temporal")),
    "layer": ("m3d", "m3d", "convolutions of the temporal stream (Fig. 2, Table 1)",
              ("2d", "m3d", "i3d", "p3d-a", "p3d-b", "p3d-c")),
    "all_blocks": (False, False,
                   "M3D layers in every block of ResNet-50 instead of in the first one of each "
                   "stage (text about Table 1)"),
    "per_tap": (False, False,
                "in M3D layers, a matrix for each of the three taps of a temporal kernel instead "
                "of one matrix for all three (Eq. 5)"),
    "p3d_a_linear": (False, False,
                     "with --layer p3d-a: no BatchNorm and ReLU between the spatial and the "
                     "temporal convolution (our choice)"),
    "ral": (("s", "c", "t"), ("s", "c", "t"),
            "masks of the residual attention layers: spatial, channel, temporal; --ral without a "
            "value leaves these layers out (Table 2)",
            ("s", "c", "t")),
    "reduction": (16, 16,
                  "r: the channel branch of a residual attention layer reduces C channels to C/r "
                  "(Eq. 12)"),
    "init_2d": (None, None,
                "last.pt of a run of --variant 2d, from which the temporal stream starts (below "
                "Eq. 6)"),
    "in_stages": (True, False,
                  "with --stream two: first train the 2D stream, by the recipe of --variant 2d, "
                  "then the M3D stream, starting from it; ignored if --init or --init-2d is given "
                  "(below Eq. 6)"),
    "join": ((), (),
             "with --evaluate or --figure: last.pt of a 2D stream and last.pt of a temporal "
             "stream, which become one network (Eq. 1)"),
}
# a batch: ids x clips different tracklets, drawn without regard to their identities
SAMPLER = TrackletSampler
SAMPLE = sample_adjacent       # a training clip: T adjacent frames from a random start
SPLIT = split_whole            # the test: the first floor(L / T) clips; with T = 1 every frame
METRIC = "euclidean"           # distance of the test

ROWS = {
    # The Row of a variant has its place in the paper, the settings that define it (even where
    # RECIPE has the same values), the paper's (mAP, rank-1), and how many megabytes the network has
    # in Table 1 beyond those of the 2D network. All other settings are as in RECIPE.

    # Tables 1 to 4: the whole network and its two streams. Tables 3 and 4 also give rank-5 of the
    # two-stream network: MARS 93.84, PRID-2011 100.00, iLIDS-VID 94.33; and rank-20: MARS 97.74.
    "two-stream": Row(
        "Tables 2-4: Two-stream M3D",
        stream="two", layer="m3d", ral=("s", "c", "t"),
        mars=(74.06, 84.39), prid=(None, 94.40), ilids=(None, 74.00),
    ),
    "2d": Row(
        "Tables 1, 2: 2D CNN, on images",
        stream="spatial", layer="2d", ral=(), frames=1, ids=128, lr=0.001, lr_step=10, epochs=20,
        mars=(62.54, 76.43), prid=(None, 82.02), ilids=(None, 49.33),
    ),
    "m3d": Row(
        "Tables 1, 2: M3D, 8 frames",
        stream="temporal", layer="m3d", ral=(),
        mars=(69.90, 81.01), prid=(None, 87.64), ilids=(None, 70.00), more_megabytes=4.2,
    ),

    # Table 2: M3D with residual attention layers
    "m3d+ral-s": Row(
        "Table 2: M3D+RAL(s)",
        stream="temporal", layer="m3d", ral=("s",),
        mars=(71.04, 82.19), prid=(None, 89.89), ilids=(None, 71.33),
    ),
    "m3d+ral-t": Row(
        "Table 2: M3D+RAL(t)",
        stream="temporal", layer="m3d", ral=("t",),
        mars=(70.66, 81.81), prid=(None, 88.76), ilids=(None, 71.33),
    ),
    "m3d+ral-c": Row(
        "Table 2: M3D+RAL(c)",
        stream="temporal", layer="m3d", ral=("c",),
        mars=(71.30, 82.13), prid=(None, 89.89), ilids=(None, 72.00),
    ),
    "m3d+ral": Row(
        "Table 2: M3D+RAL",
        stream="temporal", layer="m3d", ral=("s", "c", "t"),
        mars=(71.76, 82.79), prid=(None, 91.03), ilids=(None, 72.67),
    ),

    # Table 1: 3D convolutions, without attention. It also gives clips/s of a GTX TITAN X: M3D 98.3
    # for 8 and 49.1 for 16 frames, I3D 81.0 and 38.7, P3D-A 90.1 and 46.9, P3D-B 93.9 and 48.7,
    # P3D-C 87.6 and 45.4; the 2D network has 796 frames/s.
    "m3d-t16": Row(
        "Table 1: M3D, 16 frames",
        stream="temporal", layer="m3d", ral=(), frames=16, ids=12,
        mars=(66.23, 80.13), more_megabytes=4.2,
    ),
    "i3d": Row(
        "Table 1: I3D, 8 frames",
        stream="temporal", layer="i3d", ral=(),
        mars=(62.84, 76.62), more_megabytes=90.6,
    ),
    "i3d-t16": Row(
        "Table 1: I3D, 16 frames",
        stream="temporal", layer="i3d", ral=(), frames=16, ids=12,
        mars=(61.58, 75.11), more_megabytes=90.6,
    ),
    "p3d-a": Row(
        "Table 1: P3D-A, 8 frames",
        stream="temporal", layer="p3d-a", ral=(),
        mars=(60.69, 75.08), more_megabytes=15.2,
    ),
    "p3d-a-t16": Row(
        "Table 1: P3D-A, 16 frames",
        stream="temporal", layer="p3d-a", ral=(), frames=16, ids=12,
        mars=(60.52, 75.69), more_megabytes=15.2,
    ),
    "p3d-b": Row(
        "Table 1: P3D-B, 8 frames",
        stream="temporal", layer="p3d-b", ral=(),
        mars=(67.03, 79.06), more_megabytes=15.2,
    ),
    "p3d-b-t16": Row(
        "Table 1: P3D-B, 16 frames",
        stream="temporal", layer="p3d-b", ral=(), frames=16, ids=12,
        mars=(65.07, 77.63), more_megabytes=15.2,
    ),
    "p3d-c": Row(
        "Table 1: P3D-C, 8 frames",
        stream="temporal", layer="p3d-c", ral=(),
        mars=(67.06, 79.08), more_megabytes=15.2,
    ),
    "p3d-c-t16": Row(
        "Table 1: P3D-C, 16 frames",
        stream="temporal", layer="p3d-c", ral=(), frames=16, ids=12,
        mars=(65.17, 79.44), more_megabytes=15.2,
    ),
    "m3d-all-blocks": Row(
        'Text about Table 1: M3D for "all the 2D convolution layers"',
        stream="temporal", layer="m3d", ral=(), all_blocks=True,
    ),
}
RELEASE = None                 # the authors offer no trained weights


def build(args, num_classes):
    """Builds the network that the settings `args` describe. With --resume or --join the network
    gets no initial weights, because all its weights come from the checkpoints."""
    weights = args.weights
    join = args.join
    init_2d = None
    if args.resume:
        weights = "none"
        join = ()
    elif join:
        # --figure sets args.evaluate, too
        can_join = len(join) == 2 and args.stream == "two" and args.evaluate
        if not can_join:
            raise ValueError("--join takes two checkpoints, and needs --stream two and one of "
                             "--evaluate and --figure")
        weights = "none"
    elif args.init_2d:
        init_2d = load_part(args.init_2d, "streams.spatial.net.")
    model = TwoStreamM3D(
        num_classes,
        frames=args.frames,
        stream=args.stream,
        layer=args.layer,
        ral=args.ral,
        per_tap=args.per_tap,
        pool=args.pool,
        weights=weights,
        init_2d=init_2d,
        all_blocks=args.all_blocks,
        reduction=args.reduction,
        p3d_a_linear=args.p3d_a_linear,
    )
    # `origin` is printed with the result: where the weights come from
    if join:
        for path, stream in zip(join, ("spatial", "temporal")):
            load_part(path, f"streams.{stream}.", model.streams[stream])
            load_part(path, f"neck.{stream}.", model.neck[stream])
        model.origin = f"joined from {join[0]} and {join[1]}"
    elif init_2d is not None:
        model.origin = f"untrained except for the 2D stream of {args.init_2d}"
    return model


def make_optimizer(model, args):
    """SGD, as in Implementation Details."""
    return torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum,
                           weight_decay=args.weight_decay, fused=True)


# ---------------------------------------------------------------------------------------- training

def train(args):  # same in every script
    """Trains the network, tests it (--evaluate) or draws it (--figure); returns the last result."""
    if args.plan:
        return plan(args, recipe=RECIPE, sampler=SAMPLER, split=SPLIT, metric=METRIC, build=build,
                    loss_weights=loss_weights)
    run = Run(args)                                     # device, processes, folder, checkpoint
    with run.setting_up():                              # one process creates or downloads first
        dataset = load_dataset(args.data, args.root, split=int(args.split), chunk=args.chunk,
                               training=not args.evaluate)
        print(dataset.summary())
        model = build(args, run.num_classes(dataset))
    model = run.prepare(model)                          # to the device, with the saved weights
    if args.figure:
        return figures(run, model, dataset, split=SPLIT, metric=METRIC, picture=picture, load=load)
    if args.evaluate:
        return run.test(model, dataset, SPLIT, METRIC)
    optimizer = make_optimizer(model, args)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_step, gamma=0.1)
    loader = run.loader(dataset.train, SAMPLER, SAMPLE)
    # After --resume this restores all three; under torchrun `network` is wrapped for several GPUs.
    network = run.start(model=model, optimizer=optimizer, scheduler=scheduler)
    if run.evaluates_first:
        run.test(model, dataset, SPLIT, METRIC)         # of the untrained network
    for epoch in run.epochs():
        model.train()
        for clips, pids in run.batches(loader, epoch):  # a signal saves a checkpoint and exits
            with torch.autocast(run.device.type, torch.bfloat16, enabled=args.amp):
                outputs = network(normalize(clips))
            parts = losses(gather(outputs), gather(pids), args)  # clips of all processes
            optimizer.zero_grad()
            run.backward(sum(parts.values()))
            optimizer.step()
            run.log(parts)
        if run.test_is_due(epoch):
            run.test(model, dataset, SPLIT, METRIC)
        scheduler.step()
    return run.finish()


def train_in_stages(args):
    """Trains as the paper does: first the 2D stream, by the recipe of --variant 2d and with every
    frame once in an epoch, then the M3D stream, which starts from it. Then tests both as one
    network, and returns the result.

    Each of the two trainings has its own folder in --output. If it was stopped, running the command
    again resumes it. Flags that the user gives for the schedule and the batch (--epochs, --lr,
    --lr-step, --ids, --clips) apply to both trainings.

    With a single stream, --no-in-stages, --evaluate, --init or --init-2d it only calls `train`.
    With --evaluate, two streams and no checkpoint, it first prints how to join the two trained
    streams, if there are any.
    """
    file_2d = f"{args.output}/2d/last.pt"
    file_temporal = f"{args.output}/temporal/last.pt"
    two_streams = args.stream == "two"
    has_checkpoint = args.resume or args.init or args.join
    if two_streams and args.evaluate and not has_checkpoint:
        if os.path.exists(file_2d) and os.path.exists(file_temporal):
            print("to evaluate the two trained streams as one network, add "
                  f"--join {file_2d} {file_temporal}")
    has_initial_checkpoint = args.init or args.init_2d
    trains_all = not args.evaluate and not has_initial_checkpoint
    trains_in_stages = two_streams and args.in_stages and trains_all
    if not trains_in_stages:
        return train(args)
    train(part_of(args, ROWS, "2d", variant="2d", chunk=1))
    train(part_of(args, ROWS, "temporal", variant="m3d+ral", layer=args.layer, ral=args.ral,
                  init_2d=file_2d))
    return train(part_of(args, ROWS, "both", evaluate=True, join=[file_2d, file_temporal]))


def load(file, **settings):  # same in every script
    """Loads the network of a checkpoint, a run's last.pt, in eval mode on the CPU.

    Its attribute `args` has its settings. A checkpoint of an earlier version may lack settings of
    the recipe, which are then given here: load(file, pool="avg").
    """
    return load_network(file, build, settings, recipe=RECIPE, rows=ROWS, release=RELEASE,
                        script=__file__)


def main():  # same in every script
    """Does what the command line asks for."""
    run_script(train_in_stages, build, recipe=RECIPE, rows=ROWS, release=RELEASE, text=__doc__,
               script=__file__)


# ------------------------------------------------------------------------------------- the picture

def picture(model, clips, images):
    """Prepares what --figure draws: the last map, the sum of the temporal kernels' outputs (see
    Fig. 4) and their norms, and the spatial and temporal masks of the RALs (see Fig. 5).

    Args:
        model: a TwoStreamM3D; the picture shows its temporal stream, or the spatial one if it has
            no other.
        clips: a normalised clip, (1, T, 3, H, W).
        images: its frames, (T, 3, H, W), uint8, on which maps are drawn.

    Returns a title and {label: row}, as `figures` draws them.
    """
    if "temporal" in model.streams:
        stream = model.streams["temporal"]
    else:
        stream = model.streams["spatial"]
    net = stream.net
    rals = [*stream.ral.values()]
    # the M3D layer in the first block of each stage, if it has temporal kernels
    drawn_m3d_layers = []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        conv = stage[0].conv2
        if isinstance(conv, M3DLayer) and len(conv.temporal) > 0:
            drawn_m3d_layers.append(conv)
    modules = [net.layer4]
    for ral in rals:
        modules.extend(ral.branches.values())
    for layer in drawn_m3d_layers:
        modules.extend([layer.spatial, *layer.temporal])
    output_of = {}                  # {module: its output}
    for module, calls in zip(modules, watch(stream, clips, *modules)):
        _, output = calls[0]        # (inputs, output) of the only call
        output_of[module] = output
    spatial_masks = []
    temporal_masks = []
    for ral in rals:
        if "s" in ral.branches:
            spatial_masks.append(output_of[ral.branches["s"]][0, 0].float())
        if "t" in ral.branches:
            temporal_masks.append(output_of[ral.branches["t"]][0].float())

    stages = ["stage 1", "stage 2", "stage 3", "stage 4"]
    last_map = energy(output_of[net.layer4])
    rows = {"last map of each frame, divided by its mean": overlays(images, last_map)}
    if drawn_m3d_layers:
        first_layer = drawn_m3d_layers[0]
        added = sum(output_of[kernel] for kernel in first_layer.temporal)
        if first_layer.per_tap:
            added = clips_to_frames(added)
        label = "stage 1: what the temporal kernels add, divided by its mean"
        rows[label] = overlays(images, energy(added))
        relative_norms = []
        for layer in drawn_m3d_layers:
            kernel_norms = [output_of[kernel].float().norm() for kernel in layer.temporal]
            spatial_norm = output_of[layer.spatial].float().norm()
            relative_norms.append(torch.stack(kernel_norms) / spatial_norm)
        what = "what the temporal kernels add, relative to the spatial convolution"
        if len(relative_norms[0]) > 1:
            rows[f"{what}, by dilation"] = bars(relative_norms, stages)
        else:
            rows[what] = bars([torch.cat(relative_norms)], [f"stages 1 to {len(relative_norms)}"])
    if spatial_masks:
        first_image = images[:1].expand(len(spatial_masks), -1, -1, -1)
        rows["spatial masks of the attention layers before the sigmoid, on frame 1"] = overlays(
            first_image, spatial_masks, stages)
    if temporal_masks:
        rows["temporal masks of the attention layers, by frame"] = bars(temporal_masks, stages)
    return "M3D: last maps, temporal kernels and attention masks", rows


if __name__ == "__main__":  # same in every script
    command_line(main)
