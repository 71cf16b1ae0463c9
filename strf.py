"""STRF: Spatio-Temporal Representation Factorization for Video-based Person Re-Identification.

Aich, Zheng, Karanam, Chen, Roy-Chowdhury, Wu. ICCV 2021. https://arxiv.org/abs/2107.11878

STRF is a unit in front of a temporal convolution. It computes four masks. A mask has a weight for
each pair of positions of a feature map, which says how similar the two are. Two masks compare
features pooled over time (one for dynamic, one for static content), two compare features pooled
over space (one for fine, one for coarse content). Multiplying the map by a mask replaces each
position by an average of all positions, in which those that are like it have the largest weights.
The only learnable parameters of a unit are four 1x1 convolutions.

    python strf.py                            # quick run on synthetic data, also without a GPU
    python strf.py --data mars --gpu 0        # the paper's recipe
    python strf.py --data mars --plan         # only print what the line above trains and tests
    python strf.py --data mars --gpu 0 --variant strf-i3d --order st    # a variant with one change
    python strf.py --help                     # all settings and variants

Where the parts of the paper are:
  Sec. 3.1, Eq. 1; Eq. 5, 7   FeatureFactorizationModule (FFM)
  Sec. 3.2, Eq. 2-4, 6        FactorizedAttentionMask (FAM)
  Sec. 3.2, Eq. 8, Fig. 2     STRF
  Sec. 3.2, Fig. 3 (B)        InflatedConv (I3D), P3DConv (P3D-A, P3D-B, P3D-C)
  Sec. 3.2, Eq. 9             losses
  Sec. 3.3                    NonLocalBlock, with which the paper compares STRF
  Sec. 4                      RECIPE; the paper prints only a part of it
  Sec. 4, evaluation          SPLIT, METRIC; CMC and mAP are computed by evaluate in common.py
  (our choice: Adam)          make_optimizer; StepLR in train lowers the learning rate
  Sec. 4.1, Fig. 3 (A)        STRFNet, with its shapes and a sketch of where a unit is
  Sec. 4.2, Fig. 6 (a)        SelfProductMask, which replaces FAM in this ablation
  Tables 2-5, Fig. 4, 6 (a)   ROWS
  Fig. 5                      picture
A class can be copied into another project, with what its docstring names after "Copy along".

Notation:
  paper                   here              meaning
  t, h, w, c              T, H, W, C        frames, height, width and channels of a map
  T_d^k, Eq. 2            features          the pooled features, a matrix of c/n * t rows and h * w
                                            columns (in the code, T alone is the number of frames)
  C_dk, Eq. 3             scores            similarities of the positions, (h w) x (h w)
  M_dk, Eq. 1             mask, M           weights of the positions, (h w) x (h w)
  d = t or s              dimension         G pools over time (t) or over space (s)
  k = tau or varsigma     resolutions       tau: G has a small window; varsigma: G has a large one.
                                            The code writes sigma for varsigma; in the paper, sigma
                                            is the softmax.
  (t, tau), (t, varsigma)  "t-dynamic", "t-static"
  (s, tau), (s, varsigma)  "s-fine", "s-coarse"
  H_dk, n                 h, reduction      1x1 convolution from c to c/n channels
  G_dk, r_dk              window            pooling in a window r x 1 x 1 (t) or 1 x r x r (s)
  kappa                   kappa             factor of the scores in front of the softmax
  FFM(t, tau, varsigma)   ffm["t"]          the sum of FFM(t, tau) and FFM(t, varsigma), Eq. 5
  stage 1 to 4            layer1 to layer4  stages of torchvision's ResNet-50, without the stem

What follows from the equations:
  dynamic, fine  With (r_tau, r_sigma) = (1, 3) the dynamic and the fine masks pool over one
                 position: there "the factorizing functions behave as identity mapping" (Sec. 3.2).
                 So the networks with FFM(t, tau) alone and with FFM(s, tau) alone are one
                 architecture. Table 4 gives both an mAP of 85.20, but rank-1 accuracies of 89.90
                 and 89.70.
  factor 4       The columns of a mask sum to one, and Eq. 5 and 7 add two products each. So a unit
                 returns four times its input if the input is constant over the positions of each
                 frame, both in cascade (2 x 2) and in parallel (2 + 2). In I3D and P3D-A, the next
                 convolution sees only the output of STRF and has no bias, so the factor reaches the
                 BatchNorm after it. In training, BatchNorm divides by the batch's statistics, which
                 removes the factor. Its running statistics, however, start as ImageNet's, which
                 were computed without the factor. In P3D-B and P3D-C, only the input of the
                 temporal convolution has the factor. Its kernel is zero at the start, so at first
                 the factor scales the kernel's gradient, not the output.

Deviations from the paper. Each entry quotes the paper, says what we do and names the flag for the
paper's form:
  Eq. 3         "the unnormalized sample covariance matrix": we first L2-normalise the columns of
                T_d^k (`features`); a column is the vector of one position over all channels and
                frames. We do this because the works from which the paper takes kappa = 4, its
                references [14, 19], apply it to cosine similarities. --no-normalize is the paper's
                form.
  Sec. 4.1      "We then replace stage 2 and stage 3": we replace only every second block, two of
                the four in stage 2 and three of the six in stage 3, because only these numbers
                match the parameter counts of Table 2. --blocks 1 2 3 4 5 6 replaces all blocks.

Unspecified in the paper; our choice. We know of no code by the authors. The paper's four baselines
are those of AP3D's code (Gu et al., ECCV 2020), so the choices marked (AP3D) follow that code:
  softmax axis  The softmax is taken of each column, so that the columns of M sum to one and each
                position becomes a weighted average.
  H_dk, G_dk    H has no bias and starts with PyTorch's own random weights. G has stride 1. Padded
                positions count neither in the maximum nor in the average.
  order         Time comes before space, as in Sec. 4.2; the caption of Fig. 4 says the opposite.
  Eq. 5, 7, 8   These equations have no residual connection and no scale, so we use none. If
                --factors names no mask of a dimension, the FFM of that dimension is left out.
  place         STRF works on the input of the 3x1x1 (P3D) or 3x3x3 (I3D) convolution. In the first
                block of stages 2 and 3 of I3D and P3D-B, this input comes before the stride. There
                a unit works on four times as many positions as in P3D-A and P3D-C: on 1,568 instead
                of 392 in stage 2, and on 392 instead of 98 in stage 3.
  3D blocks     Without STRF, the 3D blocks start as the 2D network: the temporal kernels of P3D are
                zero (P3D-A: identity), I3D has the 2D weights as the centre tap and zeros beside
                it. With STRF, only those of P3D-B and P3D-C do. There is no BatchNorm or ReLU
                between P3D's two convolutions.
  Table 5       Stages 2 and 3 are 3D in every variant; stages 1 and 4 become 3D if they get STRF.
  Fig. 6 (a)    Without FAM there is a "non-weighted multiplication" of f with itself: we take
                M = f^T f / (h w), one mask for each dimension, and L2-normalise the columns of f
                first, as for Eq. 3. The network is P3D-C.
  classifier    Its weights start normal with a standard deviation of 0.001, its biases at zero.
  parameters    The five STRF units add 57,344 parameters. This fits Table 2, whose rounded values
                differ by 0.05M, but not the text, which has "~0.5 million", "~0.15 million" for one
                unit and "~1.73%" of I3D. Table 2 also counts the classifier for MARS (1.28M), which
                --complexity leaves out.
  non-local     The non-local blocks replace the five STRF units and compute attention with half the
                channels. They add 0.46M parameters; the paper says "~5 million".
  iLIDS         We take the iLIDS-VID result of Table 3 to be P3D-C's: "For all subsequent
                experiments, we report results with STRF-P3DC" (Sec. 4.1). The table's Duke result,
                however, is P3D-B's (Table 2).
  recipe        The paper leaves its recipe to a supplement that we do not have. RECIPE says which
                values the paper itself gives. We train for 240 epochs and divide the learning
                rate by 10 after every 60 (AP3D). Random flips are the only augmentation. The
                frames of a training clip are 4 apart.
  pooling       We take the maximum over the last map of each frame, then the mean over the frames
                (AP3D).
  short         From a training tracklet of fewer than 32 frames, we draw 8 different frames at
                random and keep their order. If it has fewer than 8, some are repeated (AP3D).
  resizing      Frames are resized by bicubic interpolation (AP3D).
  neck          The embedding goes through a BatchNorm (BN neck), whose output the classifier, the
                triplet loss and the test take. The margin of the triplet loss is 0.3.
  frame size    The paper gives neither the size of the frames nor the last stride of ResNet-50,
                only the size of the last map, 14 x 7 (Sec. 4.2). We remove the last stride. The
                network then divides height and width by 16, so that 14 x 7 needs frames of
                224 x 112.
  test clips    The last clip is filled with frames from the tracklet's start: 10 frames give the
                clips 1-8 and 9, 10, 1-6. The embeddings of the clips are averaged without being
                normalised. (AP3D leaves the last clip shorter, and averages over frames instead of
                clips.)
  --chunk       Training tracklets are cut into chunks of 32 frames on Duke and of 64 on LS-VID.
  --epoch       An epoch goes through the tracklets, in groups of K tracklets of one identity
                (AP3D). On MARS this takes 235 steps. With --epoch identities an epoch shows
                every identity once, in 79 steps.
"""
import inspect

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from common import (Row, Run, at_least_float32, batch_hard_triplet, command_line, energy, figures,
                    gather, load_network, overlays, plan, run_script, watch)
from data import PKSampler, load_dataset, normalize, sample_strided, split_consecutive


# ------------------------------------------------- Sec. 3.1, Eq. 5, 7: feature factorization (FFM)

def as_matrix(f):
    """Reshapes maps f (B, T, C, H, W) to the matrix (B, C*T, H*W) of Sec. 3.1, which has one column
    for each position."""
    B, T, C, H, W = f.shape
    return f.transpose(1, 2).reshape(B, C * T, H * W)


def as_maps(matrix, shape):
    """Reshapes a matrix (B, C*T, H*W) back to maps of the given shape, (B, T, C, H, W); the inverse
    of as_matrix.

    The maps are returned in channels_last layout, like all maps of the network; otherwise later
    layers would copy them.
    """
    B, T, C, H, W = shape
    maps = matrix.reshape(B, C, T, H, W)
    channels_at_the_end = maps.permute(0, 2, 3, 4, 1).contiguous()        # (B, T, H, W, C)
    return channels_at_the_end.movedim(4, 2)


class FeatureFactorizationModule(nn.Module):
    """FFM(d, tau, sigma) of one dimension d, Eq. 5 or 7: multiplies a map by each mask, Eq. 1, and
    adds the products.

    Takes maps f (B, T, C, H, W) and returns maps of the same shape.

    Args:
        masks: modules that compute a mask (B, H*W, H*W) from f. With one mask this is FFM(d, k).

    Copy along: as_matrix, as_maps.
    """

    def __init__(self, masks):
        super().__init__()
        self.masks = nn.ModuleList(masks)

    def forward(self, f):
        # Eq. 5, 7: f M_tau + f M_sigma is computed as f (M_tau + M_sigma), with one matrix product
        # instead of two
        M = sum(mask(f) for mask in self.masks)
        return as_maps(as_matrix(f) @ M.to(f.dtype), f.shape)             # f M, Eq. 1


# --------------------------------------------------- Sec. 3.2: factorized attention masks and STRF

def pool_keeping_size(x, window, pool):
    """Pools with stride 1, and pads so that the result has the shape of x.

    Args:
        x: maps (B, T, C, H, W); they may be smaller than the window.
        window: (t, h, w), the size of the window in frames and positions, all odd.
        pool: "max" or "avg". Both ignore the padding around a clip.
    """
    if max(window) == 1:  # a window of a single position changes nothing
        return x
    x = x.transpose(1, 2)                                                 # (B, C, T, H, W)
    half_t, half_h, half_w = (size // 2 for size in window)
    if pool == "max":
        padding = (half_t, half_h, half_w)
        return F.max_pool3d(x, window, stride=1, padding=padding).transpose(1, 2)
    # avg_pool3d raises an error if the window is larger than the unpadded map, so we pad with zeros
    # ourselves, and divide by the fraction of each window that is not padding.
    padding = (half_w, half_w, half_h, half_h, half_t, half_t)            # F.pad's order: W, H, T
    ones = torch.ones_like(x[:1, :1])
    average = F.avg_pool3d(F.pad(x, padding), window, stride=1)
    fraction_inside = F.avg_pool3d(F.pad(ones, padding), window, stride=1)
    return (average / fraction_inside).transpose(1, 2)


class FactorizedAttentionMask(nn.Module):
    """FAM, Eq. 2-3 with Eq. 4 or 6: a mask of how similar the positions of a map are to each other
    over all frames of a clip, computed from features that are pooled over time or over space.

    Takes maps f (B, T, C, H, W) and returns a mask M (B, H*W, H*W). Column q sums to one; it holds
    the weights of all positions in the weighted average that becomes position q.

    Args:
        channels: C.
        dimension: d in the paper, "t" or "s": G pools over time or over space.
        resolution: r in the paper, the size of G's window, an odd number; 1 is no pooling.
        pool: pooling of G, "max" or "avg".
        reduction: n in the paper, 1 to C: H reduces C channels to C/n.
        kappa: factor of the similarities in front of the softmax.
        normalize: whether the similarities are cosine similarities; False is the paper's Eq. 3.

    Raises ValueError on invalid arguments and on maps with another number of channels.

    Copy along: as_matrix, pool_keeping_size.
    """

    def __init__(self, channels: int, *, dimension: str, resolution: int, pool: str = "max",
                 reduction: int = 16, kappa: float = 4.0, normalize: bool = True):
        super().__init__()
        if dimension not in ("t", "s"):
            raise ValueError(f"the dimension must be t or s, not {dimension}")
        if pool not in ("max", "avg"):
            raise ValueError(f"the pooling of a mask must be max or avg, not {pool}")
        if resolution < 1 or resolution % 2 == 0:
            raise ValueError(f"a resolution must be an odd number, at least 1, not {resolution}")
        if not 1 <= reduction <= channels:
            raise ValueError(f"the reduction of {channels} channels must be from 1 to {channels}, "
                             f"not {reduction}")
        self.h = nn.Conv2d(channels, channels // reduction, 1, bias=False)    # H, on each frame
        if dimension == "t":
            self.window = (resolution, 1, 1)                                  # G, Eq. 4
        else:
            self.window = (1, resolution, resolution)                         # G, Eq. 6
        self.pool = pool
        self.kappa = kappa
        self.normalize = normalize

    def forward(self, f):
        if f.shape[2] != self.h.in_channels:
            raise ValueError("FactorizedAttentionMask was built for maps with "
                             f"{self.h.in_channels} channels, not {f.shape[2]}")
        reduced_frames = self.h(f.flatten(0, 1))                          # (B*T, C/n, H, W)
        reduced = reduced_frames.unflatten(0, f.shape[:2])                # (B, T, C/n, H, W)
        # Eq. 2: T_d^k = G_dk(H_dk(f))
        pooled = pool_keeping_size(reduced, self.window, self.pool)       # (B, T, C/n, H, W)
        features = as_matrix(pooled)                                      # (B, C/n * T, H*W)
        # at least float32, because eps=1e-12 below is zero in float16
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        if self.normalize:
            features = F.normalize(features, dim=1, eps=1e-12)
        # Eq. 3: C_dk = kappa (T_d^k)^T T_d^k
        scores = (self.kappa * features.transpose(1, 2)) @ features       # (B, H*W, H*W)
        return scores.softmax(1)                                          # M_dk = softmax(C_dk)


class SelfProductMask(nn.Module):
    """The mask that replaces FAM in the ablation of Fig. 6 (a): the product of the map with itself,
    M = f^T f / (H W), without learned weights, pooling or softmax.

    Takes maps f (B, T, C, H, W) and returns a mask M (B, H*W, H*W).

    Args:
        normalize: whether the columns of f are L2-normalised first, as FAM does with its features.

    Copy along: as_matrix.
    """

    def __init__(self, *, normalize: bool = True):
        super().__init__()
        self.normalize = normalize

    def forward(self, f):
        columns = as_matrix(f)                                            # (B, C * T, H*W)
        # at least float32, because eps=1e-12 below is zero in float16
        columns = columns.to(torch.promote_types(columns.dtype, torch.float32))
        if self.normalize:
            columns = F.normalize(columns, dim=1, eps=1e-12)
        positions = columns.shape[2]                                      # H*W
        # M = f^T f / (H W). Dividing both factors before the product keeps its sums small.
        columns = columns / positions ** 0.5
        return columns.transpose(1, 2) @ columns


class STRF(nn.Module):
    """STRF, Fig. 2, Eq. 8: the feature factorization modules of time and of space, one after the
    other or in parallel.

    Takes maps f (B, T, C, H, W) and returns maps of the same shape. With all four factors, a map
    that has the same value at all positions of a frame comes out multiplied by four (see "factor 4"
    at the top of this file).

    Args:
        channels: C.
        factors: names of the masks to use, at least one: "t-dynamic" is (t, tau) in the paper,
            "t-static" (t, sigma), "s-fine" (s, tau) and "s-coarse" (s, sigma).
        resolutions: (r_tau, r_sigma), both odd, with r_tau <= r_sigma: r_tau is the window size of
            the dynamic and the fine mask, r_sigma that of the static and the coarse mask.
        pools: pooling of the temporal and of the spatial masks, each "max" or "avg".
        order: "ts" is time, then space; "st" is space, then time; "parallel" adds both.
        reduction: n in the paper, 1 to C: the masks are computed from C/n channels.
        kappa: factor of the similarities in front of the softmax.
        normalize: whether the similarities are cosine similarities; False is the paper's Eq. 3.
        fam: False replaces the FAMs of each dimension by one SelfProductMask. Then resolutions,
            pools, reduction and kappa have no effect, and factors only selects the dimensions.

    Raises ValueError on invalid arguments and on maps with another number of channels.

    Copy along: all that is above this class.
    """

    def __init__(self, channels: int, *,
                 factors: tuple[str, ...] = ("t-dynamic", "t-static", "s-fine", "s-coarse"),
                 resolutions: tuple[int, int] = (1, 3), pools: tuple[str, str] = ("max", "max"),
                 order: str = "ts", reduction: int = 16, kappa: float = 4.0,
                 normalize: bool = True, fam: bool = True):
        super().__init__()
        if len(resolutions) != 2 or resolutions[0] > resolutions[1]:
            raise ValueError("the resolutions must be two numbers r_tau <= r_sigma, not "
                             f"{resolutions}")
        if len(pools) != 2:
            raise ValueError("the pools must be two, one for time and one for space, not "
                             f"{pools}")
        r_tau, r_sigma = resolutions
        resolution_of = {"t-dynamic": r_tau, "t-static": r_sigma,
                         "s-fine": r_tau, "s-coarse": r_sigma}
        unknown = set(factors) - set(resolution_of)
        repeated = len(set(factors)) < len(factors)
        if not factors or unknown or repeated:
            raise ValueError(f"the factors must be one or more of {', '.join(resolution_of)}, each "
                             f"once, not {factors}")
        if order not in ("ts", "st", "parallel"):
            raise ValueError(f"the order must be ts, st or parallel, not {order}")
        self.order = order
        self.ffm = nn.ModuleDict()
        self.names_of_masks = {}  # {dimension: names of its masks}, which the picture shows
        for dimension, pool in (("t", pools[0]), ("s", pools[1])):
            mask_names = [name for name in factors if name.startswith(f"{dimension}-")]
            if not mask_names:
                continue
            if fam:
                masks = [
                    FactorizedAttentionMask(
                        channels,
                        dimension=dimension,
                        resolution=resolution_of[name],
                        pool=pool,
                        reduction=reduction,
                        kappa=kappa,
                        normalize=normalize,
                    )
                    for name in mask_names
                ]
                self.names_of_masks[dimension] = mask_names
            else:
                masks = [SelfProductMask(normalize=normalize)]
                self.names_of_masks[dimension] = [f"{dimension}-product"]
            self.ffm[dimension] = FeatureFactorizationModule(masks)

    def forward(self, f):
        if self.order == "parallel":
            return sum(ffm(f) for ffm in self.ffm.values())   # Eq. 8, parallel (||)
        for dimension in self.order:                          # Eq. 8, cascade (->)
            if dimension in self.ffm:
                f = self.ffm[dimension](f)
        return f


# ------------------------------------------------ Sec. 3.2, Fig. 3 (B): the 3D layers with STRF

def strf_then_conv3d(x, frames, strf, conv):
    """Applies STRF, if there is one, and then a 3D convolution.

    Takes and returns frames (B*T, C, H, W). If these are channels_last, then the same memory seen
    as (B, C, T, H, W) is channels_last_3d, so that nothing is copied in between.

    Args:
        x: frames (B*T, C, H, W).
        frames: T, the number of frames in a clip.
        strf: a module on maps (B, T, C, H, W), or None.
        conv: a Conv3d that keeps the number of frames.
    """
    if strf is not None:
        x = strf(x.unflatten(0, (-1, frames))).flatten(0, 1)
    clips = x.unflatten(0, (-1, frames)).transpose(1, 2)                  # (B, C, T, H, W)
    return conv(clips).transpose(1, 2).flatten(0, 1)


class InflatedConv(nn.Module):
    """I3D (Carreira and Zisserman, CVPR 2017): a 2D convolution inflated to three frames.

    Takes frames (B*T, C, H, W) and returns frames (B*T, C', H', W'), like the 2D convolution that
    it replaces in torchvision's Bottleneck.

    Args:
        conv: the Conv2d that is inflated. Its weights become the centre tap of the kernel; the two
            other taps start as zero.
        frames: T, the number of frames in a clip.
        strf: a module on maps (B, T, C, H, W) in front of the convolution, or None.

    Raises ValueError unless conv has no bias, groups=1, dilation 1 and a zero padding whose size is
    given as numbers (not as a string).

    Copy along: strf_then_conv3d.
    """

    def __init__(self, conv: nn.Conv2d, frames: int, *, strf: nn.Module | None = None):
        super().__init__()
        plain = conv.bias is None and conv.groups == 1 and conv.dilation == (1, 1)
        zero_padded = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        if not plain or not zero_padded:
            raise ValueError("I3D inflates only convolutions with dilation 1, zero padding whose "
                             f"size is a number, one group and no bias, not {conv}")
        self.frames = frames
        self.strf = strf
        self.conv = nn.Conv3d(
            conv.in_channels,
            conv.out_channels,
            kernel_size=(3, *conv.kernel_size),
            stride=(1, *conv.stride),
            padding=(1, *conv.padding),
            bias=False,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[:, :, 1] = conv.weight

    def forward(self, x):
        return strf_then_conv3d(x, self.frames, self.strf, self.conv)


def keeps_map_size(conv):
    """Returns whether a Conv2d would keep height and width if its stride were 1."""
    if isinstance(conv.padding, str):
        return conv.padding == "same"
    for padding, dilation, kernel_size in zip(conv.padding, conv.dilation, conv.kernel_size):
        if 2 * padding != dilation * (kernel_size - 1):
            return False
    return True


class P3DConv(nn.Module):
    """P3D (Qiu et al., ICCV 2017): a spatial 2D convolution and a temporal 3x1x1 convolution, in
    series (P3D-A), in parallel (P3D-B) or in series with a shortcut (P3D-C).

    Takes frames (B*T, C, H, W) and returns frames (B*T, C', H', W'), like the 2D convolution that
    it replaces in torchvision's Bottleneck. At the start, and without STRF, it computes the same as
    this 2D convolution.

    Args:
        conv: the Conv2d that is the spatial convolution. Kind "b" adds the outputs of both
            convolutions, so conv must then be padded such that only its stride changes the size of
            maps.
        frames: T, the number of frames in a clip.
        kind: "a", "b" or "c".
        strf: a module on maps (B, T, C, H, W) in front of the temporal convolution, or None.

    Raises ValueError on another kind, and for kind "b" on a conv that is padded differently.

    Copy along: strf_then_conv3d, keeps_map_size.
    """

    def __init__(self, conv: nn.Conv2d, frames: int, kind: str, *, strf: nn.Module | None = None):
        super().__init__()
        if kind not in ("a", "b", "c"):
            raise ValueError(f"P3D is of kind a, b or c, not {kind}")
        if kind == "b" and not keeps_map_size(conv):
            raise ValueError("P3D-B adds the outputs of both convolutions, so the spatial one must "
                             "be padded such that only its stride changes the size of maps, not "
                             f"as in {conv}")
        if kind == "b":
            in_channels = conv.in_channels
            stride = (1, *conv.stride)
        else:
            in_channels = conv.out_channels
            stride = 1
        self.spatial = conv
        self.frames = frames
        self.kind = kind
        self.strf = strf
        self.temporal = nn.Conv3d(
            in_channels,
            conv.out_channels,
            kernel_size=(3, 1, 1),
            stride=stride,
            padding=(1, 0, 0),
            bias=False,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        nn.init.zeros_(self.temporal.weight)
        if kind == "a":
            # The centre tap is the identity: zeros would remove the spatial convolution's output.
            nn.init.eye_(self.temporal.weight.data[:, :, 1, 0, 0])

    def forward(self, x):
        spatial_output = self.spatial(x)
        if self.kind == "a":
            return self.strf_then_temporal(spatial_output)
        if self.kind == "b":
            return spatial_output + self.strf_then_temporal(x)
        return spatial_output + self.strf_then_temporal(spatial_output)

    def strf_then_temporal(self, x):
        return strf_then_conv3d(x, self.frames, self.strf, self.temporal)


# ------------------------------------------- Sec. 3.3: the block with which the paper compares STRF

class NonLocalBlock(nn.Module):
    """Non-local block (Wang et al., CVPR 2018), embedded Gaussian, over all positions of a clip.

    Takes maps f (B, T, C, H, W) and returns maps of the same shape. At the start, the block returns
    its input, because the weight of its BatchNorm is 0.

    Args:
        channels: C; the attention is computed with C/2 channels.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.theta = nn.Conv2d(channels, channels // 2, 1)
        self.phi = nn.Conv2d(channels, channels // 2, 1)
        self.g = nn.Conv2d(channels, channels // 2, 1)
        self.out = nn.Sequential(nn.Conv2d(channels // 2, channels, 1), nn.BatchNorm2d(channels))
        nn.init.zeros_(self.out[1].weight)

    def forward(self, f):
        B, T, C, H, W = f.shape

        def project_positions(convolution):
            maps = convolution(f.flatten(0, 1)).movedim(1, 3)             # (B*T, H, W, C/2)
            return maps.reshape(B, 1, T * H * W, -1)                      # (B, heads, T*H*W, C/2)

        theta = project_positions(self.theta)
        phi = project_positions(self.phi)
        g = project_positions(self.g)
        y = F.scaled_dot_product_attention(theta, phi, g, scale=1.0)      # softmax(theta phi^T) g
        y = y.reshape(B * T, H, W, -1).movedim(3, 1)
        return self.out(y).view(B, T, C, H, W) + f


# ---------------------------------------------------------------------------- Sec. 4.1: the network

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


class STRFNet(nn.Module):
    """ResNet-50 whose stages 2 and 3 have 3D convolutions with STRF (Sec. 4.1, Fig. 3), followed by
    pooling, a BN neck and a classifier.

    Takes clips (B, T, 3, H, W) of any height and width, normalised as for ImageNet. Returns
    (embeddings, logits), (B, 2048) and (B, num_classes), in train mode, and the embeddings alone in
    eval mode.

    All layers except the 3D convolutions and the units in front of them work on single frames, like
    the paper's convolutions with "temporal kernel size set to 1". Frames are therefore part of the
    batch dimension, as (B*T, C, H, W). A frame of 224 x 112 goes through these shapes:

        stem       64 x 56 x 28
        stage 1   256 x 56 x 28     3 blocks
        stage 2   512 x 28 x 14     4 blocks; blocks 1 and 3 are 3D, with maps of 128 x 28 x 14 in
                                    their STRF
        stage 3  1024 x 14 x 7      6 blocks; blocks 1, 3 and 5 are 3D, with maps of 256 x 14 x 7 in
                                    their STRF
        stage 4  2048 x 14 x 7      3 blocks, without a stride
        pooling  2048               pooled over positions, then averaged over frames; the BN neck
                                    then gives the embedding

    (In I3D and P3D-B, the STRF in block 1 of stages 2 and 3 comes before the stride, and its shapes
    are 128 x 56 x 28 and 256 x 28 x 14.) A 3D block changes the middle one of three convolutions:

        x -> 1x1 -> BN, ReLU -> middle -> BN, ReLU -> 1x1 -> BN -> + x -> ReLU

        middle of a 2D block    spatial(x)                      spatial: 1 x 3 x 3
        middle of I3D           inflated(STRF(x))               inflated: 3 x 3 x 3
        middle of P3D-A         temporal(STRF(spatial(x)))      temporal: 3 x 1 x 1
        middle of P3D-B         spatial(x) + temporal(STRF(x))
        middle of P3D-C         spatial(x) + temporal(STRF(spatial(x)))

    Args:
        num_classes: number of training identities.
        frames: T, the number of frames in a clip.
        layer: the 3D convolutions, "i3d", "p3d-a", "p3d-b" or "p3d-c".
        stages: numbers, from 1 to 4, of the stages with STRF; () is the baseline without STRF.
            Stages 2 and 3 are 3D even if they are not listed.
        blocks: numbers, from 1, of the blocks of a 3D stage that become 3D. Numbers beyond a
            stage's last block are ignored, but each stage with STRF must have at least one of the
            blocks.
        attention: the module in front of the temporal convolutions of `stages`: "strf", or
            "nonlocal" for a NonLocalBlock.
        pool: pooling over the positions of the last map, "max" or "avg".
        weights: initial weights of the ResNet-50: "imagenet" (torchvision's V1 weights), "none", or
            a file with a state_dict of torchvision's resnet50.
        strf_options: keyword arguments of STRF other than its channels: factors, resolutions,
            pools, order, reduction, kappa, normalize, fam. With attention="nonlocal" they have no
            effect, and fam=False is refused.

    Raises ValueError on invalid arguments and on clips of another number of frames, TypeError for
    other strf_options, OSError and RuntimeError if the weights cannot be loaded.

    Copy along: all that is above this class.
    """

    def __init__(self, num_classes: int, frames: int = 8, *, layer: str = "p3d-c",
                 stages: tuple[int, ...] = (2, 3), blocks: tuple[int, ...] = (1, 3, 5),
                 attention: str = "strf", pool: str = "max", weights: str = "none",
                 **strf_options):
        super().__init__()
        if layer not in ("i3d", "p3d-a", "p3d-b", "p3d-c"):
            raise ValueError(f"the layer must be i3d, p3d-a, p3d-b or p3d-c, not {layer}")
        if not set(stages) <= {1, 2, 3, 4}:
            raise ValueError(f"the stages must be numbers from 1 to 4, not {stages}")
        if attention not in ("strf", "nonlocal"):
            raise ValueError(f"the attention must be strf or nonlocal, not {attention}")
        known = inspect.signature(STRF).parameters.keys() - {"channels"}
        for name in strf_options.keys() - known:  # also where no unit is built that would refuse it
            raise TypeError(f"STRFNet takes no argument {name}")
        if attention == "nonlocal" and not strf_options.get("fam", True):
            raise ValueError("fam=False needs the attention strf, because a non-local block has "
                             "no FAM to leave out")
        if pool not in ("max", "avg"):
            raise ValueError(f"the pooling of the last maps must be max or avg, not {pool}")
        self.frames = frames
        self.pool = pool
        net = resnet50(weights)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1 = net.layer1
        self.layer2 = net.layer2
        self.layer3 = net.layer3
        self.layer4 = net.layer4
        for stage in sorted({2, 3, *stages}):  # stages 2 and 3 are 3D in every variant
            stage_blocks = getattr(self, f"layer{stage}")
            blocks_3d = []
            for block_number, block in enumerate(stage_blocks, start=1):
                if block_number in blocks:
                    blocks_3d.append(block)
            if stage in stages and not blocks_3d:
                raise ValueError(f"stage {stage} has blocks 1 to {len(stage_blocks)}, and none of "
                                 f"{blocks} is among them")
            for block in blocks_3d:
                conv = block.conv2
                if stage not in stages:
                    unit = None
                elif attention == "strf":
                    unit = STRF(conv.in_channels, **strf_options)
                else:
                    unit = NonLocalBlock(conv.in_channels)
                if layer == "i3d":
                    block.conv2 = InflatedConv(conv, frames, strf=unit)
                else:
                    block.conv2 = P3DConv(conv, frames, kind=layer.removeprefix("p3d-"),
                                          strf=unit)
        self.neck = nn.BatchNorm1d(2048)
        self.classifier = nn.Linear(2048, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, clips):
        B, T = clips.shape[:2]
        if T != self.frames:
            raise ValueError(f"STRFNet was built for clips of {self.frames} frames, not {T}")
        x = self.stem(clips.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = x.to(self.neck.weight.dtype)                # from autocast's bfloat16 to float32
        if self.pool == "avg":
            x = x.mean((2, 3))
        else:
            x = x.amax((2, 3))
        embedding = self.neck(x.view(B, T, -1).mean(1))
        if self.training:
            return embedding, self.classifier(embedding)
        return embedding


# ---------------------------------------------------------------------- Sec. 3.2, Eq. 9: the losses

def loss_weights(args):
    """Returns the weights of the two losses in Eq. 9, {name: weight}. Both are 1."""
    return {"xent": 1.0, "triplet": 1.0}


def losses(outputs, pids, args):
    """Returns the losses of Eq. 9 times their weights, {name: scalar}. Training minimises the sum.

    Args:
        outputs: (embeddings, logits) of an STRFNet in train mode.
        pids: the identities of the clips, (B,).
        args: the settings, of which the losses use `margin`, that of the triplet loss.
    """
    embedding, logits = outputs
    weights = loss_weights(args)
    cross_entropy = F.cross_entropy(at_least_float32(logits), pids)
    triplet = batch_hard_triplet(embedding, pids, args.margin)  # with the cosine distance
    return {"xent": weights["xent"] * cross_entropy, "triplet": weights["triplet"] * triplet}


# ------------------------------------------------------------------------------ Sec. 4: the recipe

FACTORS = ("t-dynamic", "t-static", "s-fine", "s-coarse")
# flag: (the paper's value or our choice, the quick run's value, help text[, choices])
RECIPE = {
    "frames": (8, 4, "number of frames in a clip, T (Sec. 4.2: the last map has 8 frames)"),
    "height": (224, 128,
               "height of the frames (our choice: 16 x 14, where 14 is the height of the last map "
               "in Sec. 4.2)"),
    "width": (112, 64,
              "width of the frames (our choice: 16 x 7, where 7 is the width of the last map in "
              "Sec. 4.2)"),
    "ids": (8, 4, "number of identities in a batch, P (our choice)"),
    "clips": (4, 2, "number of clips of each identity in a batch, K (our choice)"),
    "epoch": ("tracklets", "identities",
              "whether an epoch goes through the tracklets or shows every identity once (not in "
              "the paper; as in AP3D's code)",
              ("tracklets", "identities")),
    "erase": (0.0, 0.0, "probability of random erasing (our choice)"),
    "epochs": (240, 8, "number of training epochs (not in the paper; as in AP3D's code)"),
    "lr": (3e-4, 5e-4, "learning rate of Adam (our choice)"),
    "lr_step": (60, 7,
                "divide the learning rate by 10 after every N epochs (not in the paper; as in "
                "AP3D's code)"),
    "weight_decay": (5e-4, 5e-4, "weight decay of Adam (our choice)"),
    "weights": ("imagenet", "none",
                "initial weights of the ResNet-50: imagenet, none or a file (our choice)"),
    "pool": ("max", "max",
             "pooling over the positions of the last map (not in the paper; as in AP3D's code)",
             ("max", "avg")),
    "layer": ("p3d-c", "p3d-c", "3D convolutions of the network (Sec. 4.1, Table 2)",
              ("i3d", "p3d-a", "p3d-b", "p3d-c")),
    "stages": ((2, 3), (2, 3),
               "stages with STRF; give no number for the baseline (Sec. 4.2, Table 5)",
               range(1, 5)),
    "blocks": ((1, 3, 5), (1, 3, 5),
               "which blocks of a 3D stage are 3D (deviates from the paper, where all are: "
               "Sec. 4.1)",
               range(1, 7)),
    "attention": ("strf", "strf", "module in front of the temporal convolutions (Sec. 3.3)",
                  ("strf", "nonlocal")),
    "fam": (True, True,
            "use FAM in STRF, instead of the product of a map with itself (Sec. 4.2, Fig. 6 a)"),
    "factors": (FACTORS, FACTORS, "masks of STRF (Sec. 3.1, Table 4)", FACTORS),
    "resolutions": ((1, 3), (1, 3),
                    "window sizes r_tau and r_sigma of the masks, two odd numbers (Eq. 4, 6, "
                    "Fig. 4 a)"),
    "pools": (("max", "max"), ("max", "max"),
              "pooling of the temporal and of the spatial masks (Eq. 4, 6, Fig. 4 b)",
              ("max", "avg")),
    "order": ("ts", "ts",
              "order of the temporal and the spatial FFM: ts (time first), st (space first) or "
              "parallel (Eq. 8, Fig. 4 c)",
              ("ts", "st", "parallel")),
    "reduction": (16, 16, "n: the 1x1 convolutions H reduce C channels to C/n (Sec. 3.2)"),
    "kappa": (4.0, 4.0, "kappa, factor of the similarities in front of the softmax (Eq. 3)"),
    "normalize": (True, True,
                  "use cosine similarities in the masks, by L2-normalising the pooled features "
                  "(the paper's Eq. 3: --no-normalize)"),
    "margin": (0.3, 0.3, "margin of the triplet loss with the cosine distance (our choice; Eq. 9)"),
}
SAMPLER = PKSampler            # a batch: K clips of each of P identities
SAMPLE = sample_strided        # a training clip: T frames, 4 apart, from a random start
SPLIT = split_consecutive      # the test: all frames of a tracklet, in clips of T consecutive ones
METRIC = "cosine"              # the test's distance between the mean embeddings of tracklets

ROWS = {
    # The Row of a variant has its place in the paper, the settings that define it, and the paper's
    # (mAP, rank-1) and parameters. same="NAME" says that the variant is the same as the variant
    # NAME. All other settings are as in RECIPE.

    # Tables 2 and 3: four 3D networks with and without STRF. On Duke, Table 3 reports the values of
    # strf-p3db for STRF.
    "strf-p3dc": Row(
        "Tables 2-5: P3DC + STRF, the best on MARS",
        layer="p3d-c", stages=(2, 3),
        mars=(86.10, 90.30), duke=(96.20, 97.20), ilids=(None, 89.30), million_parameters=25.53,
    ),
    "strf-i3d": Row(
        "Table 2: I3D + STRF",
        layer="i3d", stages=(2, 3),
        mars=(83.10, 88.70), duke=(95.20, 95.90), million_parameters=28.97,
    ),
    "strf-p3da": Row(
        "Table 2: P3DA + STRF",
        layer="p3d-a", stages=(2, 3),
        mars=(85.40, 89.80), duke=(95.60, 96.00), million_parameters=25.53,
    ),
    "strf-p3db": Row(
        "Table 2: P3DB + STRF",
        layer="p3d-b", stages=(2, 3),
        mars=(85.60, 90.30), duke=(96.40, 97.40), million_parameters=25.53,
    ),
    "i3d": Row(
        "Table 2: I3D",
        layer="i3d", stages=(),
        mars=(82.70, 88.50), duke=(95.20, 95.40), million_parameters=28.92,
    ),
    "p3da": Row(
        "Table 2: P3DA",
        layer="p3d-a", stages=(),
        mars=(83.20, 88.90), duke=(95.00, 95.00), million_parameters=25.48,
    ),
    "p3db": Row(
        "Table 2: P3DB",
        layer="p3d-b", stages=(),
        mars=(83.00, 88.80), duke=(95.40, 95.30), million_parameters=25.48,
    ),
    "p3dc": Row(
        "Tables 2, 4, 5: P3DC, the baseline",
        layer="p3d-c", stages=(),
        mars=(83.10, 88.50), duke=(95.30, 95.30), million_parameters=25.48,
    ),

    # Sec. 3.3: a Non-local block in the place of each STRF
    "p3dc+nonlocal": Row("Sec. 3.3: P3DC + Non-local", attention="nonlocal", mars=(84.80, 89.90)),

    # Table 4: some of the four masks. With the resolutions (1, 3), p3dc+fine and p3dc+dynamic are
    # one architecture.
    "p3dc+fine": Row("Table 4: (s, tau)", factors=("s-fine",), mars=(85.20, 89.70)),
    "p3dc+coarse": Row("Table 4: (s, sigma)", factors=("s-coarse",), mars=(85.10, 89.90)),
    "p3dc+dynamic": Row("Table 4: (t, tau)", factors=("t-dynamic",), mars=(85.20, 89.90)),
    "p3dc+static": Row("Table 4: (t, sigma)", factors=("t-static",), mars=(85.10, 90.00)),
    "p3dc+fine+coarse": Row(
        "Table 4: (s, tau), (s, sigma)",
        factors=("s-fine", "s-coarse"),
        mars=(85.50, 90.10),
    ),
    "p3dc+dynamic+static": Row(
        "Table 4: (t, tau), (t, sigma)",
        factors=("t-dynamic", "t-static"),
        mars=(85.30, 89.70),
    ),
    "p3dc+fine+dynamic": Row(
        "Table 4: (s, tau), (t, tau)",
        factors=("s-fine", "t-dynamic"),
        mars=(85.40, 90.00),
    ),
    "p3dc+coarse+static": Row(
        "Table 4: (s, sigma), (t, sigma)",
        factors=("s-coarse", "t-static"),
        mars=(85.70, 90.10),
    ),

    # Table 5: the stages with STRF. In every variant, stages 2 and 3 are 3D.
    "stage1": Row("Table 5: STRF in stage 1", stages=(1,), mars=(83.40, 88.80)),
    "stage12": Row("Table 5: STRF in stages 1, 2", stages=(1, 2), mars=(83.60, 89.00)),
    "stage23": Row("Table 5: STRF in stages 2, 3", same="strf-p3dc"),
    "stage123": Row("Table 5: STRF in stages 1, 2, 3", stages=(1, 2, 3), mars=(84.70, 89.30)),
    "stage234": Row("Table 5: STRF in stages 2, 3, 4", stages=(2, 3, 4), mars=(85.50, 90.00)),
    "stage1234": Row(
        "Table 5: STRF in stages 1, 2, 3, 4",
        stages=(1, 2, 3, 4),
        mars=(83.70, 88.70),
    ),

    # Fig. 4 and 6 (a): window sizes, pooling and order of the masks, and STRF without FAM
    "resolutions-11": Row("Fig. 4a: r_tau, r_sigma = 1, 1", resolutions=(1, 1)),
    "resolutions-13": Row("Fig. 4a: r_tau, r_sigma = 1, 3", same="strf-p3dc"),
    "resolutions-15": Row(
        "Fig. 4a: r_tau, r_sigma = 1, 5; 0.2 mAP below resolutions-13",
        resolutions=(1, 5),
    ),
    "resolutions-35": Row(
        "Fig. 4a: r_tau, r_sigma = 3, 5; 0.4 mAP below resolutions-13",
        resolutions=(3, 5),
    ),
    "pool-t-max-s-max": Row("Fig. 4b: max pooling for t, max for s", same="strf-p3dc"),
    "pool-t-max-s-avg": Row("Fig. 4b: max pooling for t, average for s", pools=("max", "avg")),
    "pool-t-avg-s-max": Row("Fig. 4b: average pooling for t, max for s", pools=("avg", "max")),
    "pool-t-avg-s-avg": Row("Fig. 4b: average pooling for t, average for s", pools=("avg", "avg")),
    "order-ts": Row("Fig. 4c: time, then space", same="strf-p3dc"),
    "order-st": Row("Fig. 4c: space, then time", order="st"),
    "order-parallel": Row("Fig. 4c: in parallel; about 0.4 mAP below the best", order="parallel"),
    "strf-nofam": Row("Fig. 6a: without FAM", fam=False),
}
RELEASE = None                 # We know of no trained weights by the authors.


def build(args, num_classes):
    """Builds the network that the settings `args` describe, with a classifier for num_classes
    identities."""
    weights = args.weights
    if args.resume:  # the checkpoint has all weights
        weights = "none"
    return STRFNet(
        num_classes,
        args.frames,
        layer=args.layer,
        stages=args.stages,
        blocks=args.blocks,
        attention=args.attention,
        pool=args.pool,
        weights=weights,
        factors=args.factors,
        resolutions=args.resolutions,
        pools=args.pools,
        order=args.order,
        reduction=args.reduction,
        kappa=args.kappa,
        normalize=args.normalize,
        fam=args.fam,
    )


def make_optimizer(model, args):
    """Adam, our choice; the paper names no optimizer."""
    return torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)


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


def load(file, **settings):  # same in every script
    """Loads the network of a checkpoint, a run's last.pt, in eval mode on the CPU.

    Its attribute `args` has its settings. A checkpoint of an earlier version may lack settings of
    the recipe, which are then given here: load(file, pool="avg").
    """
    return load_network(file, build, settings, recipe=RECIPE, rows=ROWS, release=RELEASE,
                        script=__file__)


def main():  # same in every script
    """Does what the command line asks for."""
    run_script(train, build, recipe=RECIPE, rows=ROWS, release=RELEASE, text=__doc__,
               script=__file__)


# ------------------------------------------------------------------------------------- the picture

def picture(model, clips, images):
    """Prepares what --figure draws: the last map, as in Fig. 5, and for the first STRF of each
    stage the centre column of its masks: how much each position contributes to the output at the
    centre.

    Args:
        model: an STRFNet.
        clips: a normalised clip, (1, T, 3, H, W).
        images: the frames of this clip, (T, 3, H, W), uint8.

    Returns a title and the rows of the picture, {label: row}.
    """
    calls_of_stage_4 = watch(model, clips, model.layer4)[0]
    _, last_map = calls_of_stage_4[0]                   # (inputs, output) of the only call
    rows = {"last map of each frame, divided by its mean": overlays(images, energy(last_map))}
    stages = (model.layer1, model.layer2, model.layer3, model.layer4)
    for stage_number, stage in enumerate(stages, start=1):
        units = [module for module in stage.modules() if isinstance(module, STRF)]
        if not units:
            continue
        mask_modules = []
        captions = []
        for dimension, ffm in units[0].ffm.items():
            mask_modules.extend(ffm.masks)
            captions.extend(units[0].names_of_masks[dimension])
        centre_columns = []
        for calls in watch(model, clips, *mask_modules):
            inputs, mask = calls[0]
            H, W = inputs[0].shape[3:]
            centre = (H // 2) * W + W // 2
            column = mask[0, :, centre].view(H, W).clone()
            column[H // 2, W // 2] = torch.nan          # drawn in black
            centre_columns.append(column)
        first_image = images[:1].expand(len(mask_modules), -1, -1, -1)
        label = (f"stage {stage_number}: how much each position counts in the output at the black "
                 "one, by mask")
        rows[label] = overlays(first_image, centre_columns, captions)
    return "STRF: last maps, and the weights of the attention masks", rows


if __name__ == "__main__":  # same in every script
    command_line(main)
