"""BiCnet-TKS: Learning Efficient Spatial-Temporal Representation for Video Person Re-Identification

Hou, Chang, Ma, Huang, Shan. CVPR 2021. https://arxiv.org/abs/2104.14783
The authors' release: https://github.com/blue-blue272/BiCnet-TKS

The first frames of a clip, the big frames, are processed at full resolution, which keeps details.
The others, the small frames, are processed at half the resolution, which gives more context at a
quarter of the cost. The two branches share one network. Cross-scale paths (CSP) add features of the
big frames to those of the small ones. The diverse attentions operation (DAO) makes the frames of a
branch attend to different regions. Temporal kernel selection (TKS) applies temporal convolutions of
several lengths, and weights their outputs for each clip and channel.

    python bicnet_tks.py                        # a small run on synthetic data, on any machine
    python bicnet_tks.py --data mars --gpu 0    # the paper's recipe on MARS
    python bicnet_tks.py --data mars --plan     # print what that recipe would train and test
    python bicnet_tks.py --complexity           # parameters and GFLOPs, ours and the paper's
    python bicnet_tks.py --data mars --gpu 0 --variant tb+csp --shares 1 1    # alpha = 1 in TB+CSP

Where the parts of the paper are:
  Sec. 3.1, Eq. 1             BiCnet: split_frames makes I_B and I_S, forward makes f_d and f_c
  Sec. 3.1, Eq. 2, Fig. 3a    CrossScalePath (CSP), after stages 1 to 3
  Sec. 3.1, Eq. 3, Fig. 3b    DiverseAttentionsOperation (DAO), after stage 3
  Sec. 3.1, Eq. 4-5           divergence_loss
  Sec. 3.2, Eq. 6-8, Fig. 4   TemporalKernelSelection (TKS), after stage 2
  Sec. 3.3, Fig. 3a           BiCnet
  Sec. 4.3.1                  losses
  Sec. 4.1                    RECIPE: all settings; SAMPLER, SAMPLE: batches and training clips;
                              SPLIT, METRIC: clips and distance of the test; evaluate in common.py
                              averages the features of the clips and ranks the gallery
  Sec. 4.1, Adam              make_optimizer; StepLR in train lowers the learning rate
  Tables 1 to 6               ROWS: the variants, table by table
  Fig. 1, 3b, 4               --figure FOLDER draws the last maps, the attention maps A_k and the
                              weights g of the kernels of TKS (function picture)
To reuse a class elsewhere, read the end of its docstring: it says what else of this file it needs.

Shapes of the maps for a clip of 8 frames of 256 x 128 pixels and alpha = 3, as frames x channels x
height x width. Frames 1 and 2 are the big ones (Detail Branch), frames 3 to 8 the small ones
(Context Branch). The paper's stage_1 to stage_4 are layer1 to layer4 of torchvision's ResNet-50.
CSP comes before TKS and DAO of the same stage.
                      big frames            small frames
  input               2 x    3 x 256 x 128  6 x    3 x 128 x 64
  stem                2 x   64 x  64 x  32  6 x   64 x  32 x 16
  stage 1, CSP        2 x  256 x  64 x  32  6 x  256 x  32 x 16
  stage 2, CSP, TKS   2 x  512 x  32 x  16  6 x  512 x  16 x  8   TKS: 8 frames of 4 x 2 regions
  stage 3, CSP, DAO   2 x 1024 x  16 x   8  6 x 1024 x   8 x  4   DAO: a map A_k for each frame
  stage 4             2 x 2048 x  16 x   8  6 x 2048 x   8 x  4   the last stride is removed
  spatial pooling     2 x 2048              6 x 2048
  mean over frames    f_d: 2048             f_c: 2048             then (f_d + f_c) / 2 and a BN neck

Deviations from the paper. Each entry quotes the paper and says what we do instead, why, and which
flag restores the paper's form; all three flags together give the network of the paper's text:
  CSP stages      "after each stage". We add CSPs after stages 1 to 3, because a CSP after stage 4
                  would add 12.6 million parameters, and the paper's 27.6 million for TB+CSP leave
                  no room for them. --csp-stages 1 2 3 4
  W_i of Eq. 7    "W_i" is C x C. Ours has a bottleneck: all kernels share a linear layer from C to
                  C/16 channels, a BatchNorm and a ReLU. Each kernel then has its own linear layer
                  from C/16 to C channels. C x C matrices would give 61.2 million parameters with
                  TKS after stage 4, where the paper has 53.5 million. --no-bottleneck
  Excite          "E_t = U(Z_t) + F_t". We apply a BatchNorm to Z before it is added to F. The
                  weight of this BatchNorm starts at zero, so that TKS is the identity at the start
                  of training. --no-excite-bn

Two of these choices rest on the parameter counts in the paper's tables. The first is to add CSPs
after stages 1 to 3, which gives the 27.6 million of TB+CSP (Table 2). The second is the reduction
of 16 in the bottleneck of W_i: with TKS after stage 4 ours then has 53.59 million, or 53.63 million
with DAO and the BatchNorms of TKS, and the paper has 53.5 million (Table 6). As the paper truncates
its values, the former agrees. With a single kernel (28.3 million in Table 5) and without the
selection (BiCnet-TK, 29.1 million in Table 2), ours has 0.1 million more. The counts are too coarse
to show whether CSP has a bias (5,376 parameters) or how DAO is built (27,648 weights).

Unspecified in the paper; our choice. "(release)" marks what we took from the authors' code:
  small frames    They are resized at the input, as the text says, by bilinear interpolation with
                  antialiasing. (The GFLOPs of Table 4 suggest that the maps were resized after the
                  first convolution instead.)
  CSP             The features of the first big frame are added to the first alpha small frames,
                  those of the second to the next alpha, and so on. The convolution has no bias.
  order           In a stage, CSP comes before TKS, and TKS before DAO.
  DAO, k > 1      The attention module is a 1x1 convolution from C channels to one, then a linear
                  layer over the H * W positions, both without bias. Each branch has modules of its
                  own.
  DAO, residual   The new map is D_k + BN(sum over positions of A_k * D_k), where the second term is
                  added at every position, and the weight of BN starts at zero (release). The plain
                  D_k + A_k * D_k would change D_k only by a factor of about 1 + 1 / (H * W),
                  because A_k sums to 1.
  Eq. 5           The loss is the mean over both branches, 0 for a branch of one frame, and has a
                  weight of 0.01. Its gradient reaches the attention modules and the backbone.
                  Through A_1, which has no module, it reaches only the backbone.
  TKS, time       TKS convolves all N frames of a clip together, in temporal order, which puts the
                  big frames first, with zero padding at both ends.
  TKS, grid       Each map, big or small, is divided into 4 x 2 regions, as the text says. The
                  paper's GFLOPs suggest regions of 4 x 2 positions in the maps of the big frames.
                  For TKS after stage 2, --grid 8 8 gives these.
  single kernel   With one kernel Eq. 7 always gives g = 1; TKS then has no W_i.
  BatchNorm       The branches share its weights and its running statistics. In training the batch
                  of the big frames updates the running statistics first, then that of the small
                  ones. With --own-statistics each branch has running statistics of its own.
  Tables 3, 4     Clips have 9 frames for alpha = 2 and for three branches, and 10 for alpha = 4,
                  because 8 frames cannot be split in these ratios.
  pooling         We take the maximum over the last map of each frame, then the mean over the frames
                  of a branch (release).
  losses          Cross entropy and the batch-hard triplet loss have the weight 1. The embedding
                  goes through a BatchNorm (BN neck), whose output both losses and the test take.
                  The triplet loss has the cosine distance and a margin of 0.5.
  short tracklets A tracklet of 8 to 31 frames gives 8 different frames, which are drawn at random
                  and kept in temporal order. A tracklet of fewer than 8 frames gives some of its
                  frames more than once. Both are as in the release.
  augmentation    Flip and random erasing are applied with a probability of 0.5 each; all frames of
                  a clip share the flip and the erased box.
  resizing        The frames are resized to 256 x 128 by bicubic interpolation (release).
  long tracklets  Training tracklets are cut into pieces of 32 frames on Duke and of 64 on LS-VID
                  (release). --chunk 0 keeps them whole.
  test clips      The last clip of a tracklet is filled by starting the tracklet again: 10 frames
                  give a clip of frames 1 to 8 and one of frames 9, 10 and 1 to 6.
  epoch           An epoch goes through the tracklets, in groups of K tracklets of the same identity
                  (release): 117 steps on MARS. An identity with fewer tracklets has one group, in
                  which they repeat. Tracklets that fill no group, or whose group fits in no batch,
                  are left out; the next epoch forms other groups. With --epoch identities it goes
                  through the identities, each with K clips: 40 steps.
  initial values  The classifier starts with normal weights (standard deviation 0.001). The
                  BatchNorms before the residual sums of DAO and TKS start with a weight of zero.
                  All other new layers have torch's default initialisation.

Where the authors' release differs from the paper's text, we follow the text:
  big frames      The release takes frames 1 and 5 of eight, each of which leads a group of four.
                  The text takes the first N / (1 + alpha).
  small frames    The release halves their maps after the stem by max pooling. The text resizes the
                  input frames.
  DAO             The release averages the maps over their width, which leaves 8 horizontal stripes.
                  A_1 is the softmax of the channels' mean. The attention maps A_k, k > 1, come from
                  a 1x1 convolution to one channel, a linear layer with a bias over the 8 stripes,
                  BatchNorm and softmax.
  Eq. 4-5         In the release, the three small frames of a group form three pairs. The loss of a
                  pair is |P P^T - I| / 4, where the two rows of P are the square roots of the
                  attention maps of its frames. The big frames have no such loss, and A_1 gets no
                  gradient.
  LS-VID          The release replaces the triplet loss by a contrastive loss. For each clip it is
                  the mean over its positives, which are clips of the same identity, of
                      -log(exp(16 s+) / (exp(16 s+) + sum of exp(16 s-)))
                  where s+ is the cosine to the positive, and s- that to a clip of another identity.
                  The sum is over all clips of other identities. The paper's 75.1 / 84.6 thus come
                  from another loss than the triplet loss that Sec. 4.3.1 names.
  batches         A batch of the release has clips from 16 groups of K tracklets (see "epoch"). In
                  some of its batches two groups have the same identity; in ours this never happens.
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from common import (Row, Run, at_least_float32, bars, batch_hard_triplet, command_line, energy,
                    figures, gather, load_network, overlays, plan, run_script, watch)
from data import PKSampler, load_dataset, normalize, sample_strided, split_consecutive


# ------------------------------------------------- Sec. 3.1: the bilateral complementary network

class CrossScalePath(nn.Module):
    """CSP, Eq. 2: adds features of the big frames to those of the small ones.

    Input: F_D (B, M, C, H, W) of the big frames, with even H and W, and F_C (B, alpha * M, C,
    H / 2, W / 2) of the small ones. Output: the new F_C, of the same shape.

    Args:
        channels: number of channels C of the maps.
        alpha: number of small frames for each big one, at least 1.

    Raises ValueError on maps of other shapes. Uses nothing else from this file.
    """

    def __init__(self, channels: int, *, alpha: int):
        super().__init__()
        self.channels = channels
        self.alpha = alpha
        self.conv = nn.Conv2d(channels, alpha * channels, 1, bias=False)  # W_c

    def forward(self, big, small):
        B, M, C, H, W = big.shape
        expected_shape = (M * self.alpha, self.channels, H // 2, W // 2)
        halves_evenly = H % 2 == 0 and W % 2 == 0
        if C != self.channels or not halves_evenly or small.shape[1:] != expected_shape:
            raise ValueError(f"CSP with alpha = {self.alpha} takes maps of {self.channels} "
                             f"channels and even height and width. Big frames of {(M, C, H, W)} "
                             f"need small frames of {expected_shape}, not "
                             f"{tuple(small.shape[1:])}")
        # F_D' = R(W_c * P(F_D)), then F_C + F_D'                                 # Eq. 2
        x = self.conv(F.max_pool2d(big.flatten(0, 1), 2))            # (B M, alpha C, H / 2, W / 2)
        # R splits the alpha * C channels into alpha maps of C channels, one for each small frame.
        # We add in the shape (B, M, alpha, C, H / 2, W / 2): merging M and alpha in x would force
        # a copy, because x is in channels_last.
        x = x.view(B, M, self.alpha, C, H // 2, W // 2)
        return (small.unflatten(1, (M, self.alpha)) + x).flatten(1, 2)


class DiverseAttentionsOperation(nn.Module):
    """DAO, Fig. 3b, Eq. 3: gives each frame of a branch an attention map. The mean of the frame's
    features over the positions, weighted by this map, goes through a BatchNorm and is added to the
    features at every position.

    The first frame's attention map comes from its features alone, that of each other frame from a
    module of its own. `divergence_loss` makes the attention maps attend to different regions. At
    initialisation the operation is the identity, because the weight of its BatchNorm is zero.

    Input: maps D (B, M, C, H, W) of a branch. Output: the new maps, of the same shape, and the
    attention maps A (B, M, H, W), each of which sums to 1.

    Args:
        channels: number of channels C of the maps.
        frames: number of frames M of the branch.
        height: height H of the maps.
        width: width W of the maps.

    Raises ValueError on maps of other shapes. Uses nothing else from this file.
    """

    def __init__(self, channels: int, frames: int, height: int, width: int):
        super().__init__()
        self.expected_shape = (frames, channels, height, width)
        positions = height * width
        self.attention = nn.ModuleList()  # the modules of the frames k > 1
        for _ in range(1, frames):
            self.attention.append(nn.Sequential(
                nn.Conv2d(channels, 1, 1, bias=False),
                nn.Flatten(),
                nn.Linear(positions, positions, bias=False),
            ))
        self.bn = nn.BatchNorm1d(channels)
        nn.init.zeros_(self.bn.weight)

    def forward(self, maps):
        if maps.shape[1:] != self.expected_shape:
            raise ValueError(f"DAO was built for (M, C, H, W) = {self.expected_shape}, not "
                             f"{tuple(maps.shape[1:])}")
        B, M, C, H, W = maps.shape
        scores = [maps[:, 0].mean(1).flatten(1)]                     # 1 / C sum_c (D_1)_c
        for k, attention_module in enumerate(self.attention, start=1):
            scores.append(attention_module(maps[:, k]))
        scores = torch.stack(scores, 1)                              # (B, M, H W)
        float_type = torch.promote_types(scores.dtype, torch.float32)  # at least float32
        attention = scores.softmax(2, dtype=float_type)                           # Eq. 3
        # The residual operation: D_k + BN(sum over positions of A_k * D_k). Without the sum, A_k
        # would hardly change D_k, because A_k itself sums to 1.
        attended = torch.einsum("bmcp,bmp->bmc", maps.flatten(3), attention.to(maps.dtype))
        attended = self.bn(attended.flatten(0, 1)).to(maps.dtype)    # (B M, C)
        return maps + attended.view(B, M, C, 1, 1), attention.view(B, M, H, W)


def divergence_loss(attention):
    """L of Eq. 4-5 for the attention maps (B, M, H, W) of a branch, averaged over the batch.

    The similarity is the dot product. L is -1 for maps that do not overlap, higher for similar
    maps, and 0 for a branch of one frame, which has no pairs.
    """
    M = attention.shape[1]
    if M == 1:
        return attention.new_zeros(())
    attention = attention.flatten(2)
    l_div = 1 - attention @ attention.transpose(1, 2)                             # Eq. 4
    # L = -1 / (M - 1) sum_{k >= 2} (1 / (k - 1) sum_{l < k} L_div(A_k | A_l))    # Eq. 5
    mean_divergences = []
    for k in range(1, M):  # from 0 here, from 1 in the paper: the divisor k - 1 of Eq. 5 is k here
        mean_divergences.append(l_div[:, k, :k].mean(1))
    return -torch.stack(mean_divergences).mean()


# -------------------------------------------------------------- Sec. 3.2: temporal kernel selection

class TemporalKernelSelection(nn.Module):
    """TKS, Fig. 4, Eq. 6-8: applies temporal convolutions of several lengths to the regions of the
    maps, weights their outputs for each clip and channel, and adds the weighted sum to the maps.

    Input: maps F (B, T_i, C, H_i, W_i) of one or more branches i, one argument for each branch.
    Their frames are concatenated into one sequence, in the order of the arguments. Output: a list
    of the maps E, of the same shapes.

    Args:
        channels: number of channels C of the maps.
        kernels: lengths of the temporal convolutions (the paper's paths) in frames, odd and at
            least 3. Each convolution has three taps; those longer than 3 are dilated.
        grid: number of rows h and columns w of regions into which a map is divided, at least 1.
            They must divide every H_i and W_i.
        select: whether the outputs of the paths are weighted by Eq. 7. If False, their mean is
            taken ("TK" in Table 2). A single path has a weight of 1 in either case.
        bottleneck: whether W_i has a bottleneck of C / reduction channels. If False, it is a C x C
            matrix as in the paper.
        reduction: reduction factor of the bottleneck, which has C / reduction channels; 1 to C.
        excite_bn: whether Z passes through a BatchNorm whose weight starts at zero, so that TKS
            starts as the identity. If False, there is none, as in the paper.

    Raises ValueError on invalid arguments, and on maps that have another number of channels or that
    the grid does not divide. Uses nothing else from this file.
    """

    def __init__(self, channels: int, *, kernels: tuple[int, ...] = (3, 5),
                 grid: tuple[int, int] = (4, 2), select: bool = True, bottleneck: bool = True,
                 reduction: int = 16, excite_bn: bool = True):
        super().__init__()
        if len(kernels) == 0 or any(k < 3 or k % 2 == 0 for k in kernels):
            raise ValueError("TKS needs one or more kernels, which are odd and at least 3, not "
                             f"{tuple(kernels)}")
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"grid must be h and w, both at least 1, not {tuple(grid)}")
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must be from 1 to {channels}, not {reduction}")
        self.channels = channels
        self.kernels = tuple(kernels)
        self.grid = tuple(grid)
        self.paths = nn.ModuleList()
        for k in kernels:
            i = k // 2  # a path of the length k = 2 i + 1 has three taps, i frames apart
            self.paths.append(
                nn.Conv1d(channels, channels, 3, dilation=i, padding=i, bias=False))
        self.squeeze = nn.Identity()
        self.w = None  # W_1 ... W_K in one layer; if None, the mean of the paths is used
        if select and len(kernels) > 1:
            inner_channels = channels
            if bottleneck:
                inner_channels = channels // reduction
                self.squeeze = nn.Sequential(
                    nn.Linear(channels, inner_channels, bias=False),
                    nn.BatchNorm1d(inner_channels),
                    nn.ReLU(),
                )
            self.w = nn.Linear(inner_channels, len(kernels) * channels, bias=False)
        self.bn = nn.Identity()
        if excite_bn:
            self.bn = nn.BatchNorm1d(channels)
            nn.init.zeros_(self.bn.weight)

    def partition(self, maps):
        """Partition: the means X (B, T, C, h, w) of the regions of the maps F (B, T, C, H, W)."""
        B, T, C, H, W = maps.shape
        h, w = self.grid
        if C != self.channels:
            raise ValueError(f"TKS was built for maps of {self.channels} channels, not {C}")
        if H % h or W % w:
            raise ValueError(f"TKS cannot divide a map of {H}x{W} into {h}x{w} equal regions")
        return F.avg_pool2d(maps.flatten(0, 1), (H // h, W // w)).unflatten(0, (B, T))

    def softmax_over_paths(self, logits):
        """Eq. 7: takes the logits W_i u of all paths, (B, K * C). Returns the weights g,
        (B, K, C), which sum to 1 over the paths."""
        logits = logits.unflatten(1, (len(self.kernels), self.channels))
        float_type = torch.promote_types(logits.dtype, torch.float32)  # at least float32
        # g_i = exp(W_i u) / sum_j exp(W_j u)                                     # Eq. 7
        return logits.softmax(1, dtype=float_type)

    def selection_weights(self, y):
        """Select: the weights g (B, K, C) of the paths' outputs Y (B, K, C, h * w * T)."""
        if self.w is None:
            return y.new_full(y.shape[:3], 1 / len(self.kernels))
        u = y.sum(1).mean(2)                                                      # Eq. 6
        return self.softmax_over_paths(self.w(self.squeeze(u))).to(y.dtype)

    def forward(self, *branch_maps):
        h, w = self.grid
        x = torch.cat([self.partition(maps) for maps in branch_maps], 1)  # (B, T, C, h, w)
        B, T, C = x.shape[:3]
        x = x.permute(0, 3, 4, 2, 1).reshape(B * h * w, C, T)        # one sequence for each region
        y = []
        for path in self.paths:
            y_i = path(x).view(B, h * w, C, T)
            y.append(y_i.transpose(1, 2).flatten(2))                 # (B, C, h w T)
        y = torch.stack(y, 1)                                        # (B, K, C, h w T)
        # Z = sum_i R(g_i) * Y_i                                                  # Eq. 8
        z = torch.einsum("bkc,bkcp->bcp", self.selection_weights(y), y)
        z = self.bn(z).to(x.dtype)                                   # (B, C, h w T)
        z = z.view(B, C, h, w, T).permute(0, 4, 1, 2, 3)             # (B, T, C, h, w)
        # Excite: E = U(Z) + F, where U repeats a region's value (nearest neighbour)
        outputs = []
        frames_per_branch = [maps.shape[1] for maps in branch_maps]
        for maps, branch_z in zip(branch_maps, z.split(frames_per_branch, 1)):
            H, W = maps.shape[3:]
            branch_z = branch_z.repeat_interleave(H // h, dim=3)
            branch_z = branch_z.repeat_interleave(W // w, dim=4)
            outputs.append(maps + branch_z)
        return outputs


# ---------------------------------------------------------------------------- Sec. 3.3: the network

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


class BranchBatchNorm(nn.Module):
    """BatchNorm2d whose weight and bias are shared by all branches, while each branch has running
    statistics of its own.

    Input and output: maps (B * M, C, H, W) of one branch. Its number, counted from 0, is in the
    attribute `active_branch`, which BiCnet sets before each stage.

    Args:
        bn: the BatchNorm2d that this layer replaces; weight, bias and statistics are taken from it.
        num_branches: number of branches, at least 1.

    Uses nothing else from this file.
    """

    def __init__(self, bn: nn.BatchNorm2d, num_branches: int):
        super().__init__()
        self.per_branch = nn.ModuleList(copy.deepcopy(bn) for _ in range(num_branches))
        for branch_bn in self.per_branch:
            branch_bn.weight = bn.weight
            branch_bn.bias = bn.bias
        self.active_branch = 0

    def forward(self, x):
        return self.per_branch[self.active_branch](x)


def separate_statistics(net, num_branches):
    """Replaces every BatchNorm2d in a network by a BranchBatchNorm, and returns a list of these."""
    norms = []
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                norm = BranchBatchNorm(child, num_branches)
                setattr(module, name, norm)
                norms.append(norm)
    return norms


def check_arguments(frames, height, width, *, shares, csp_stages, tks, grid):
    """Raises ValueError if these arguments of BiCnet are invalid or do not fit together."""
    for flag, stages in (("tks", tks), ("csp_stages", csp_stages)):
        has_duplicates = len(set(stages)) < len(stages)
        has_unknown = not set(stages) <= {1, 2, 3, 4}
        if has_duplicates or has_unknown:
            raise ValueError(f"{flag} must be different stages from 1 to 4, not {stages}")
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid must be h and w, both at least 1, not {grid}")
    total = sum(shares)
    ratio = ":".join(str(share) for share in shares)
    if total < 1:
        raise ValueError(f"shares must give frames to at least one branch, not {shares}")
    two_branches = len(shares) == 2 and min(shares) >= 1
    if csp_stages and not (two_branches and shares[1] % shares[0] == 0):
        raise ValueError("CSP needs shares of two branches with a whole number of small frames for "
                         f"each big one, not {ratio}")
    if frames % total != 0:
        raise ValueError(f"frames must be a multiple of {total}, so that they can be divided in "
                         f"the ratio {ratio}, not {frames}")

    output_stride = {1: 4, 2: 8, 3: 16, 4: 16}  # of each stage, relative to the frames
    max_downscale = 2 ** (len(shares) - 1)      # of the branch with the smallest frames

    def required_multiple(num_regions):
        """Returns the number by which the height must be divisible if the grid of TKS has
        `num_regions` rows. The same holds for the width and the columns of the grid."""
        factors = [max_downscale]
        for stage in csp_stages:  # the maps of the big frames are halved
            factors.append(2 * output_stride[stage])
        for stage in tks:         # the smallest maps are divided into regions
            factors.append(max_downscale * output_stride[stage] * num_regions)
        return math.lcm(*factors)

    height_multiple = required_multiple(grid[0])
    width_multiple = required_multiple(grid[1])
    if height % height_multiple != 0 or width % width_multiple != 0:
        raise ValueError(f"height must be a multiple of {height_multiple} and width a multiple of "
                         f"{width_multiple} for these branches, CSPs and TKSs, not "
                         f"{height}x{width}")


class BiCnet(nn.Module):
    """BiCnet-TKS, Fig. 3a: one ResNet-50 for the big and the small frames of a clip, with CSP, TKS
    and DAO between its stages, and a BN neck.

    Input: normalised clips (B, N, 3, H, W). Output in eval mode: embeddings (B, 2048). Output in
    train mode: embeddings, logits (B, num_classes), and a list of the attention maps A (B, M, h, w)
    of each branch, which is empty without DAO.

    Args:
        num_classes: number of identities in the training set.
        frames: number of frames N of a clip, a multiple of the sum of `shares`.
        height: height H of the big frames in pixels. It must be a multiple of a number that depends
            on the branches, CSPs and TKSs; a ValueError states that number.
        width: width W of the big frames in pixels, with the same restrictions.
        shares: ratio in which the frames are divided among branches of full, half, quarter ...
            resolution; (1, alpha) in the paper. A branch may have a share of 0.
        csp: whether there are CSPs. They need two branches and a whole number alpha.
        csp_stages: stages, from 1 to 4, after which a CSP comes.
        dao: whether there is a DAO in each branch after stage 3.
        tks: stages, from 1 to 4, after which a TKS comes; may be empty.
        kernels: lengths of the kernels of TKS in frames, odd and at least 3.
        grid: number of rows h and columns w of regions into which TKS divides a map.
        select: whether TKS weights its kernels by Eq. 7. If False, it takes their mean.
        bottleneck: whether W_i of Eq. 7 has a bottleneck. If False, it is C x C as in the paper.
        reduction: reduction factor of this bottleneck, which has C / reduction channels; from 1 to
            the number C of channels of the maps that TKS takes.
        excite_bn: whether TKS has a BatchNorm before its residual sum (the paper has none).
        pool: "max" or "avg", the pooling over the last map of each frame.
        weights: initial weights, as for `resnet50`: "imagenet", "none" or the path of a file.
        own_statistics: whether each branch has its own running statistics of BatchNorm.

    Raises ValueError on arguments that do not fit together. This class needs everything above it in
    this file except divergence_loss.
    """

    def __init__(self, num_classes: int, frames: int = 8, height: int = 256, width: int = 128, *,
                 shares: tuple[int, ...] = (1, 3), csp: bool = True,
                 csp_stages: tuple[int, ...] = (1, 2, 3), dao: bool = True,
                 tks: tuple[int, ...] = (2,), kernels: tuple[int, ...] = (3, 5),
                 grid: tuple[int, int] = (4, 2), select: bool = True, bottleneck: bool = True,
                 reduction: int = 16, excite_bn: bool = True, pool: str = "max",
                 weights: str = "none", own_statistics: bool = False):
        super().__init__()
        if not csp:
            csp_stages = ()
        check_arguments(frames, height, width, shares=shares, csp_stages=csp_stages, tks=tks,
                        grid=grid)
        if pool not in ("max", "avg"):
            raise ValueError(f"the pooling of the last maps must be max or avg, not {pool}")
        self.frames_per_branch = [frames * share // sum(shares) for share in shares]
        net = resnet50(weights)
        self.branch_norms = []  # the BranchBatchNorms, if branches have their own statistics
        if own_statistics:
            num_used_branches = sum(number > 0 for number in self.frames_per_branch)
            self.branch_norms = separate_statistics(net, num_used_branches)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1 = net.layer1
        self.layer2 = net.layer2
        self.layer3 = net.layer3
        self.layer4 = net.layer4
        channels = {1: 256, 2: 512, 3: 1024, 4: 2048}
        self.csp = nn.ModuleDict()
        for stage in csp_stages:
            self.csp[f"layer{stage}"] = CrossScalePath(
                channels[stage], alpha=shares[1] // shares[0])
        self.tks = nn.ModuleDict()
        for stage in tks:
            self.tks[f"layer{stage}"] = TemporalKernelSelection(
                channels[stage], kernels=kernels, grid=grid, select=select, bottleneck=bottleneck,
                reduction=reduction, excite_bn=excite_bn)
        self.dao = nn.ModuleList()  # one for each branch that has frames
        if dao:
            for i, branch_frames in enumerate(self.frames_per_branch):
                if branch_frames == 0:
                    continue
                scale = 16 * 2 ** i  # stage 3 has a stride of 16, and branch i halves i times
                map_height = math.ceil(height / scale)
                map_width = math.ceil(width / scale)
                self.dao.append(DiverseAttentionsOperation(
                    channels[3], branch_frames, map_height, map_width))
        self.pool = pool
        self.neck = nn.BatchNorm1d(2048)
        self.classifier = nn.Linear(2048, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def split_frames(self, clips):
        """Splits clips into I_B and I_S of Eq. 1.

        Returns a list with the frames (B * M, 3, h, w) of each branch, resized to its resolution.
        Branch i has 1 / 2^i of the height and width. A branch without frames is not in the list.
        """
        H, W = clips.shape[3:]
        branches = []
        for i, segment in enumerate(clips.split(self.frames_per_branch, 1)):
            if segment.shape[1] == 0:
                continue
            x = segment.flatten(0, 1)
            if i > 0:
                # F.interpolate has no float16 kernel for CPUs
                float_type = torch.promote_types(x.dtype, torch.float32)
                resized = F.interpolate(x.to(float_type), (H // 2 ** i, W // 2 ** i),
                                        mode="bilinear", antialias=True)
                x = resized.to(x.dtype)
            branches.append(x.contiguous(memory_format=torch.channels_last))
        return branches

    def run_stage(self, stage, branches):
        """Applies a stage to each branch in turn. Takes and returns a list with the frames or maps
        (B * M, C, H, W) of each branch."""
        outputs = []
        for i, x in enumerate(branches):
            for norm in self.branch_norms:
                norm.active_branch = i
            outputs.append(stage(x))
        return outputs

    def forward(self, clips):
        B = clips.shape[0]
        branches = self.run_stage(self.stem, self.split_frames(clips))
        attention = []
        for name in ("layer1", "layer2", "layer3", "layer4"):
            branches = self.run_stage(getattr(self, name), branches)
            maps = [x.unflatten(0, (B, -1)) for x in branches]       # (B, M, C, H, W) of each
            if name in self.csp:
                maps[1] = self.csp[name](maps[0], maps[1])
            if name in self.tks:
                maps = self.tks[name](*maps)
            if name == "layer3":
                for i, dao in enumerate(self.dao):
                    maps[i], branch_attention = dao(maps[i])
                    attention.append(branch_attention)
            branches = [x.flatten(0, 1) for x in maps]
        # Eq. 1: means over the N / (1 + alpha) big frames and over the others,
        # f_d = (1 + alpha) / N sum_k CNN_D(I_k)
        # f_c = (1 + alpha) / (alpha N) sum_k CNN_C(I_k)
        features = []
        for x in branches:
            if self.pool == "avg":
                x = x.mean((2, 3))
            else:
                x = x.amax((2, 3))
            x = x.to(self.neck.weight.dtype).unflatten(0, (B, -1))   # (B, M, 2048)
            features.append(x.mean(1))
        video_feature = sum(features) / len(features)                # (f_d + f_c) / 2
        embedding = self.neck(video_feature)
        if not self.training:
            return embedding
        return embedding, self.classifier(embedding), attention


# --------------------------------------------------------------- Sec. 3.1 and 4.3.1: the losses

def loss_weights(args):
    """Returns {name of a loss: weight}. The objective is
    L_xent + L_triplet + args.divergence * L, where L is that of Eq. 5."""
    divergence_weight = 0.0
    if args.dao:
        divergence_weight = args.divergence
    return {"xent": 1.0, "triplet": 1.0, "div": divergence_weight}


def losses(outputs, pids, args):
    """Returns {name: weighted loss}; the sum is minimised. "div" is L of Eq. 5.

    Args:
        outputs: what BiCnet returns in train mode.
        pids: identities of the clips (B,).
        args: the settings of the run, of which dao, divergence and margin are used.
    """
    embedding, logits, attention = outputs
    weights = loss_weights(args)
    loss_terms = {
        "xent": F.cross_entropy(at_least_float32(logits), pids),
        "triplet": batch_hard_triplet(embedding, pids, args.margin),
    }
    if weights["div"] > 0:  # it is 0 without DAO, and for TB+CSP+AO of Table 2
        branch_losses = [divergence_loss(at_least_float32(maps)) for maps in attention]   # Eq. 5
        loss_terms["div"] = sum(branch_losses) / len(branch_losses)
    return {name: weights[name] * loss for name, loss in loss_terms.items()}


# ---------------------------------------------------------------------------- Sec. 4.1: the recipe

RECIPE = {  # flag: (the full recipe's value, the small run's, meaning and source[, choices])
    "frames": (8, 8, "number of frames in a clip, N (Sec. 4.1)"),
    "height": (256, 128, "height to which the big frames are resized (Sec. 4.1)"),
    "width": (128, 64, "width to which the big frames are resized (Sec. 4.1)"),
    "ids": (16, 4, "number of identities in a batch, P (Sec. 4.1)"),
    "clips": (4, 2, "number of clips of each identity in a batch, K (Sec. 4.1)"),
    "epoch": ("tracklets", "identities",
              "what an epoch goes through: the tracklets (as in the authors' release) or the "
              "identities",
              ("tracklets", "identities")),
    "erase": (0.5, 0.0, "probability of random erasing (Sec. 4.1 has it; the value is our choice)"),
    "epochs": (150, 8, "number of training epochs (Sec. 4.1)"),
    "lr": (3.5e-4, 5e-4, "learning rate of Adam (Sec. 4.1)"),
    "lr_step": (40, 7, "number of epochs after which lr is divided by 10 (Sec. 4.1)"),
    "weight_decay": (5e-4, 5e-4, "weight decay of Adam (Sec. 4.1)"),
    "weights": ("imagenet", "none", "initial weights of the backbone: imagenet, none (random) or a "
                "file (Sec. 3.3)"),
    "pool": ("max", "max", "pooling over the last map of each frame (authors' release)",
             ("max", "avg")),
    "shares": ((1, 3), (1, 3),
               "ratio of the numbers of frames that are processed at full, 1/2, 1/4 ... "
               "resolution; 1 : alpha in the paper (Sec. 4.1, Tables 3, 4)"),
    "own_statistics": (False, False,
                       "keep separate running statistics of BatchNorm for each branch (the paper "
                       "does not say; that the branches share them is our choice)"),
    "csp": (True, True, "use cross-scale paths (CSP), which need two branches (Table 2)"),
    "csp_stages": ((1, 2, 3), (1, 2, 3),
                   "stages followed by a CSP (a deviation; 1 2 3 4 is the paper's form)"),
    "dao": (True, True, "use the diverse attentions operation (DAO) after stage 3 (Table 2)"),
    "tks": ((2,), (2,), "stages, from 1 to 4, followed by a TKS; may be empty (Table 6)"),
    "kernels": ((3, 5), (3, 5), "lengths of the kernels of TKS in frames, odd (Table 5)"),
    "grid": ((4, 2), (4, 2), "rows and columns of regions into which TKS divides a map (Sec. 4.1)"),
    "select": (True, True,
               "weight the kernels of TKS by Eq. 7; --no-select takes their mean (Table 2)"),
    "bottleneck": (True, True,
                   "compute W_i of Eq. 7 through a bottleneck (a deviation; --no-bottleneck has "
                   "the C x C matrix of the paper)"),
    "reduction": (16, 16,
                  "reduction factor of the bottleneck of W_i, which has C / reduction channels "
                  "(fits Table 6)"),
    "excite_bn": (True, True,
                  "apply BatchNorm to Z before the residual sum of TKS (a deviation; "
                  "--no-excite-bn is the paper's form)"),
    "divergence": (0.01, 0.01,
                   "weight of the divergence loss (our choice); with 0 the attention modules are "
                   "trained without it, as in TB+CSP+AO of Table 2"),
    "margin": (0.5, 0.5,
               "margin of the triplet loss, which takes the cosine distance (our choice)"),
}
# A batch has K clips of each of P identities (Sec. 4.1).
SAMPLER = PKSampler
# A training clip has every fourth frame from a random start (Sec. 4.1), or random frames of a short
# tracklet. The loader flips it with a probability of 0.5.
SAMPLE = sample_strided
# In the test, a tracklet is split into clips of N consecutive frames. Its feature is the mean of
# the clips' embeddings (Sec. 4.1).
SPLIT = split_consecutive
# The distance between query and gallery features (Sec. 4.1)
METRIC = "cosine"

# The settings of variants without CSP, DAO and TKS
PLAIN_BRANCHES = dict(csp=False, dao=False, tks=())
ROWS = {
    # The Row of a variant has its table and name in the paper, the settings that define it (even
    # where RECIPE has the same values), and the paper's (mAP, rank-1) and costs. same="NAME" says
    # that the variant is the same as the variant NAME. All other settings are as in RECIPE.

    # Tables 1 and 2: the whole network and its components, alpha = 3
    "bicnet-tks": Row(
        "Tables 1, 2, 5, 6: BiCnet-TKS",
        shares=(1, 3), csp=True, dao=True, divergence=0.01, tks=(2,), select=True,
        mars=(86.0, 90.2), duke=(96.1, 96.3), lsvid=(75.1, 84.6),
        gflops_a_frame=1.99, million_parameters=29.2,
    ),
    "base-s": Row(
        "Table 2: Base-S",
        shares=(0, 1), **PLAIN_BRANCHES,
        mars=(80.7, 87.4), gflops_a_frame=1.02, million_parameters=23.5,
    ),
    "base-b": Row(
        "Table 2: Base-B",
        shares=(1,), **PLAIN_BRANCHES,
        mars=(85.2, 89.1), gflops_a_frame=4.08, million_parameters=23.5,
    ),
    "tb": Row(
        "Table 2: TB",
        shares=(1, 3), **PLAIN_BRANCHES,
        mars=(84.3, 89.6), gflops_a_frame=1.81, million_parameters=23.5,
    ),
    "tb+csp": Row(
        "Table 2: TB+CSP",
        shares=(1, 3), csp=True, dao=False, tks=(),
        mars=(85.0, 89.6), gflops_a_frame=1.89, million_parameters=27.6,
    ),
    "tb+csp+ao": Row(
        "Table 2: TB+CSP+AO",
        shares=(1, 3), csp=True, dao=True, divergence=0.0, tks=(),
        mars=(85.2, 89.3), gflops_a_frame=1.89, million_parameters=27.6,
    ),
    "tb+csp+dao": Row(
        "Table 2: BiCnet",
        shares=(1, 3), csp=True, dao=True, divergence=0.01, tks=(),
        mars=(85.6, 89.8), gflops_a_frame=1.89, million_parameters=27.6,
    ),
    "bicnet-tk": Row(
        "Table 2: BiCnet-TK (fix-fusion)",
        shares=(1, 3), csp=True, dao=True, divergence=0.01, tks=(2,), select=False,
        mars=(85.5, 89.6), gflops_a_frame=1.91, million_parameters=29.1,
    ),

    # Table 3: the heights of the frames in each branch. For the single height 128 all frames go to
    # the half-size branch, for 64 to the quarter-size branch. The loader still resizes them to
    # --height x --width first.
    "height-256": Row("Table 3: height 256", same="base-b"),
    "height-128": Row("Table 3: height 128", same="base-s"),
    "height-64": Row(
        "Table 3: height 64",
        shares=(0, 0, 1), **PLAIN_BRANCHES,
        mars=(64.1, 77.4), gflops_a_frame=0.25, million_parameters=23.5,
    ),
    "height-256+128": Row(
        "Table 3: heights 256, 128",
        shares=(1, 1), frames=8, **PLAIN_BRANCHES,
        mars=(84.8, 89.4), gflops_a_frame=2.55, million_parameters=23.5,
    ),
    "height-256+128+64": Row(
        "Table 3: heights 256, 128, 64",
        shares=(1, 1, 1), frames=9, **PLAIN_BRANCHES,
        mars=(79.1, 86.1), gflops_a_frame=1.76, million_parameters=23.5,
    ),

    # Table 4: alpha. The paper gives 2.55 GFLOPs in Table 3 and 2.57 here for the same network.
    "tb-alpha0": Row("Table 4: alpha = 0 (Base-B)", same="base-b"),
    "tb-alpha1": Row(
        "Table 4: alpha = 1",
        shares=(1, 1), frames=8, **PLAIN_BRANCHES,
        mars=(84.8, 89.4), gflops_a_frame=2.57, million_parameters=23.5,
    ),
    "tb-alpha2": Row(
        "Table 4: alpha = 2",
        shares=(1, 2), frames=9, **PLAIN_BRANCHES,
        mars=(84.4, 89.7), gflops_a_frame=2.07, million_parameters=23.5,
    ),
    "tb-alpha3": Row("Table 4: alpha = 3", same="tb"),
    "tb-alpha4": Row(
        "Table 4: alpha = 4",
        shares=(1, 4), frames=10, **PLAIN_BRANCHES,
        mars=(83.8, 89.5), gflops_a_frame=1.67, million_parameters=23.5,
    ),
    "tb-alpha-inf": Row("Table 4: alpha = infinity (Base-S)", same="base-s"),

    # Table 5: the kernels of TKS
    "tks-k3": Row(
        "Table 5: K3",
        kernels=(3,),
        mars=(85.1, 89.9), gflops_a_frame=1.94, million_parameters=28.3,
    ),
    "tks-k5": Row(
        "Table 5: K5",
        kernels=(5,),
        mars=(85.3, 90.1), gflops_a_frame=1.94, million_parameters=28.3,
    ),
    "tks-k7": Row(
        "Table 5: K7",
        kernels=(7,),
        mars=(85.5, 89.8), gflops_a_frame=1.94, million_parameters=28.3,
    ),
    "tks-k35": Row("Table 5: K3, K5", same="bicnet-tks"),
    "tks-k37": Row(
        "Table 5: K3, K7",
        kernels=(3, 7),
        mars=(85.7, 90.0), gflops_a_frame=1.99, million_parameters=29.2,
    ),
    "tks-k57": Row(
        "Table 5: K5, K7",
        kernels=(5, 7),
        mars=(85.6, 90.1), gflops_a_frame=1.99, million_parameters=29.2,
    ),
    "tks-k357": Row(
        "Table 5: K3, K5, K7",
        kernels=(3, 5, 7),
        mars=(85.8, 90.2), gflops_a_frame=2.04, million_parameters=30.0,
    ),

    # Table 6: the stages followed by a TKS
    "tks-stage1": Row(
        "Table 6: TKS in stage 1",
        tks=(1,),
        mars=(85.3, 90.1), gflops_a_frame=1.99, million_parameters=28.0,
    ),
    "tks-stage2": Row("Table 6: TKS in stage 2", same="bicnet-tks"),
    "tks-stage3": Row(
        "Table 6: TKS in stage 3",
        tks=(3,),
        mars=(85.7, 90.4), gflops_a_frame=1.99, million_parameters=34.1,
    ),
    "tks-stage4": Row(
        "Table 6: TKS in stage 4",
        tks=(4,),
        mars=(85.4, 90.0), gflops_a_frame=2.29, million_parameters=53.5,
    ),
    "tks-stage23": Row(
        "Table 6: TKS in stages 2, 3",
        tks=(2, 3),
        mars=(85.8, 90.3), gflops_a_frame=2.09, million_parameters=35.7,
    ),
}
RELEASE = None  # the authors offer no trained weights


def build(args, num_classes):
    """Builds the network for the settings `args`.

    With --resume the weights come from the checkpoint, so that none are loaded here.
    """
    weights = args.weights
    if args.resume:
        weights = "none"
    return BiCnet(
        num_classes,
        frames=args.frames,
        height=args.height,
        width=args.width,
        shares=args.shares,
        csp=args.csp,
        csp_stages=args.csp_stages,
        dao=args.dao,
        tks=args.tks,
        kernels=args.kernels,
        grid=args.grid,
        select=args.select,
        bottleneck=args.bottleneck,
        reduction=args.reduction,
        excite_bn=args.excite_bn,
        pool=args.pool,
        weights=weights,
        own_statistics=args.own_statistics,
    )


def make_optimizer(model, args):
    """Adam, as in Sec. 4.1."""
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
    """Prepares what --figure draws: the attention maps A_k (see Fig. 3b) and the last maps (compare
    Fig. 1), drawn over the frames, and the weights of the kernels of TKS (g in Fig. 4).

    Args:
        model: a BiCnet.
        clips: a normalised clip, (1, N, 3, H, W).
        images: its frames, (N, 3, H, W), uint8, on which the maps are drawn.

    Returns a title and {label: row}, as `figures` draws them.
    """
    tks_with_selection = {}
    for name, tks_module in model.tks.items():
        if tks_module.w is not None:
            tks_with_selection[name] = tks_module
    selection_layers = [tks_module.w for tks_module in tks_with_selection.values()]
    # For each module a list of its calls, which are pairs (inputs, outputs)
    calls = watch(model, clips, model.layer4, *model.dao, *selection_layers)
    layer4_calls = calls[0]
    dao_calls = calls[1:1 + len(model.dao)]
    selection_calls = calls[1 + len(model.dao):]

    captions = []
    for i, num_frames in enumerate(model.frames_per_branch):
        caption = "full size"
        if i > 0:
            caption = f"1/{2 ** i} size"
        captions += [caption] * num_frames
    rows = {}
    if len(model.dao) > 0:
        attention_maps = []
        for calls_of_dao in dao_calls:
            _, (_, attention) = calls_of_dao[0]  # the only call; its outputs: maps, attention
            for frame_attention in attention[0]:
                # A_k sums to 1, so that its mean is 1 / numel.
                attention_maps.append(frame_attention * frame_attention.numel())
        label = "attention map of each frame, divided by its mean"
        rows[label] = overlays(images, attention_maps, captions)
    last_maps = []
    for _, x in layer4_calls:  # one call for each branch
        last_maps += energy(x)
    rows["last map of each frame, divided by its mean"] = overlays(images, last_maps, captions)
    for name, calls_of_layer in zip(tks_with_selection, selection_calls):
        tks_module = tks_with_selection[name]
        _, logits = calls_of_layer[0]
        g = tks_module.softmax_over_paths(logits.float())[0].mean(1)  # mean over the channels
        lengths = ", ".join(str(k) for k in tks_module.kernels)
        rows[f"TKS after {name}: weights of its kernels"] = bars([g], [f"{lengths} frames"])
    return "BiCnet-TKS: attention and features of each frame", rows


if __name__ == "__main__":  # same in every script
    command_line(main)
