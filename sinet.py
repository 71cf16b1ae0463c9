"""SINet: Salient-to-Broad Transition for Video Person Re-identification.

Bai, Ma, Chang, Huang, Chen. CVPR 2022.
The authors' release: https://github.com/baist/SINet

A plain ResNet attends to the same salient region in all frames of a clip. The Salient-to-Broad
Module (SBM) finds that region in the former frames and suppresses it in the later ones, so that the
network attends to broader regions there. Earlier in the network, the Integration-and-Distribution
Module (IDM) enriches every frame: learnt low-rank matrices mix all positions of the clip.

    python sinet.py                           # a small run on synthetic data, on any machine
    python sinet.py --data mars --gpu 0       # the paper's recipe
    python sinet.py --data mars --plan        # prints what that would train and test, and exits
    python sinet.py --data mars --evaluate --resume sinet.pth.tar   # tests the authors' network
    python sinet.py --data mars --gpu 0 --variant base+sbm --beta 3 # a variant, one setting changed
    python sinet.py --help                    # all variants, settings and other flags

Where each part of the paper is:
  Sec. 3.1, Eq. 1-2          ChannelAttentionLayer (CAL)
  Sec. 3.1                   KernelGenerationModule (KGM)
  Sec. 3.1, Eq. 3-4          SuppressOperation (SO)
  Sec. 3.1, Eq. 5-6          CrossPropagationModule (CPM)
  Sec. 3.1, Fig. 2           SalientToBroadModule (SBM), which joins these four
  Sec. 3.2, Eq. 7, Fig. 3    IntegrationDistributionModule (IDM)
  Sec. 4.5, Table 3          NonLocalBlock, GlobalContextBlock
  Sec. 3.3, Fig. 4           SINet
  Sec. 3.3, Eq. 8            losses, mutual_information_loss
  Sec. 4.2                   RECIPE, SAMPLER, SAMPLE, SPLIT, METRIC (flips and erasing: TrainClips
                             in data.py; means of clips and ranking: evaluate in common.py)
  Sec. 4.2, Adam             make_optimizer; StepLR in train lowers the learning rate
  Tables 1-3, Fig. 5         ROWS
  Fig. 1, Fig. 6             picture
Every class can be copied into another project. Its docstring names what else has to be copied with
it, if anything.

Deviations from the paper (what the paper says; what we do and why; the flag for the paper's form):
  Eq. 3         The paper has softmax(Q * K). We divide the response by k^2, which makes it a mean
                over the window, as in the authors' release, from which the paper's results come.
                --scale none restores the plain sum. In our study on synthetic people the softmax
                is almost one-hot with either of the two, so that S suppresses a single position
                and hardly any gradient reaches KGM; on MARS, from ImageNet's weights, this was not
                measured. The small run, which starts from random weights, divides by sqrt(c), too.
  Fig. 1, 6     The paper shows class activation maps. --figure shows the root mean square of the
                last feature maps over their channels, which needs no class; there is no flag.

Unspecified in the paper; our choice, which follows the authors' release where (release) is added:
  KGM           The attention is a 1x1 convolution to k^2 maps, BatchNorm and ReLU (release). The
                L1 norms are clamped to a small eps. If the attention is zero everywhere, the kernel
                is therefore zero and nothing is suppressed (S = 1).
  Eq. 1         w_ctr is computed for each clip, and no gradient flows through it (release).
  SE            w_se is computed for each clip, by two linear layers without biases. Its reduction
                is 4 (release). The SE paper uses 16; --se-reduction 16 selects it. The 0.014 GFLOPs
                that Sec. 4.5 gives for SBM fit 16 (0.0145) or no SE block at all (0.0142) better
                than 4 (0.0157), if the product K = P A_p^T is not counted.
  Eq. 3         The convolution has replicate padding (release).
  IDM           It has neither biases nor BatchNorm, as in Eq. 7, and G^D starts at zero. One IDM
                follows block 4 of layer2; three IDMs follow blocks 2, 3 and 4.
  SBM           We take "plugged evenly into the third layer" to mean after blocks 2, 4 and 6
                (release). In "Same Pos." of Table 3 all three SBMs follow block 6.
  pooling       The last feature map of each frame is pooled by its maximum, and the resulting
                vectors of the frames are averaged (release).
  classifier    Its weights start from a normal distribution with a standard deviation of 0.001
                (release). It has no bias.
  L_mi          The paper defines it in a supplement that we do not have; mutual_information_loss is
                our reading, with a temperature of 0.07 (release). Before the loss, the frames'
                vectors go through the BN neck and a linear layer (release); the paper mentions no
                such layer. Variants without SBM are trained without this loss (release,
                --lambda2 0), because its purpose is to maintain the differences between frames that
                SBM creates.
  triplet       The loss takes the embedding after the BN neck, the cosine distance and a margin
                of 0.3.
  backbone      The stride of ResNet-50's layer4 is 1 (release).
  epoch         One epoch goes through the training tracklets in groups of K tracklets of one
                identity (release); on MARS this takes 235 steps. Tracklets that fill no group, and
                groups that fill no batch, are left out. --epoch identities visits every identity
                once, in 79 steps.
  erasing       All frames of a clip share one box, which gets the mean colour of ImageNet.
  resizing      Frames are resized by bicubic interpolation (release).
  test clips    A tracklet is cut into T equal parts, as in training. Clip i consists of the i-th
                frame of every part. All frames are used, and some twice where T does not divide the
                length: 10 frames give 3 clips of 4.
  pieces        LS-VID's training tracklets are cut into pieces of 48 frames (release). This holds
                with and without --release; --chunk 0 keeps them whole.
  Table 3       Non-local blocks whose inner width is half the channels, or GC blocks with a
                reduction of 16, replace both IDMs. "Non-local (1)" is the mean over all positions,
                and "Non-local (inverse)" the softmax of the negated affinity.
  GFLOPs        We count 1.074 for two IDMs. We could reproduce neither the 1.081 that Sec. 4.5
                gives for them, nor its 2.216 for Non-local blocks, with any position and width that
                we tried.
  Fig. 5        The text gives only the best values, k = 3 and reduction 4. We guess the other
                values, and that the network of Fig. 5a has no IDMs and that of Fig. 5b no SBMs.

The authors' release departs from the paper's equations in the points below, and their trained
networks need this form. Loading one of them with --resume or --init sets --release by itself. To
train such a network, give --release, which also sets the flags --reduction 16 --lambda2 0.001
--scale window --pool max. The points are:
  IDM           It has BatchNorms after G^I and L^I, a ReLU at the end, and biases. Its reduction is
                16, although Fig. 5b finds 4 best.
  CPM           It takes means where Eq. 5-6 take sums. The mean over the later frames is weighted
                by 1 - S.
  SE            Its linear layers have biases, and so has the classifier.
  stem          The max pooling has no padding: frames of 256x128 give maps of 63x31, not of 64x32.
  L_mi          It is summed over the identities of a batch and weighted by 0.001, in place of a
                mean that is weighted by 0.01. Its linear layer starts with Kaiming's normal weights
                and zero biases.
The authors' release also departs in these points, which --release does not follow:
  batches       A batch has 8 groups of K clips, and some batches hold one identity twice. The
                authors train on two GPUs, and BatchNorm computes its statistics on each GPU's half
                of the batch.
  train clips   Each of the T parts has floor(n / T) frames; the last one has the remainder, too.
  test clips    A tracklet is filled up to a multiple of T with copies of its last frames.
  erasing       Every frame has its own box. A setting of p erases with probability 1 - p.
  results       They are those of the best epoch on the test set; ours are those of the last epoch.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from common import (Release, Row, Run, at_least_float32, batch_hard_triplet, command_line, energy,
                    figures, gather, load_network, overlays, plan, run_script, watch)
from data import PKSampler, load_dataset, normalize, sample_segments, split_segments


# ---------------------------------------------------------------- Sec. 3.1: Salient-to-Broad Module

def gap(x, dims: tuple[int, ...]):
    """Global average pooling, GAP in Eq. 1, 5 and 6: the mean over `dims`, which keep size 1.

    The result is at least float32, because float16 cannot hold the sums of large maps.
    """
    return x.mean(dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))


class ChannelAttentionLayer(nn.Module):
    """CAL, Eq. 1-2: keeps the channels whose mean over the interior of the maps exceeds their mean
    over the whole maps, and weights them by squeeze-and-excitation.

    Input: X (B, T, C, H, W), H and W at least 3. Output: w_ctr w_se X (B, T, C, H, W), whose first
    s frames are P and whose others are Q in Eq. 2. Copy with: gap.

    Args:
        channels: C.
        reduction: ratio by which the squeeze-and-excitation reduces the channels, 1 to C.
        release: True gives the two layers of the squeeze-and-excitation biases, as in the authors'
            release.

    Raises ValueError for a reduction out of range, and for maps that are smaller than 3x3.
    """

    def __init__(self, channels: int, *, reduction: int = 4, release: bool = False):
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"CAL takes a reduction of 1 to {channels}, not {reduction}")
        self.squeeze = nn.Linear(channels, channels // reduction, bias=release)
        self.excite = nn.Linear(channels // reduction, channels, bias=release)

    def forward(self, x):
        H, W = x.shape[3:]
        if min(H, W) < 3:
            raise ValueError(f"CAL needs maps of at least 3x3, not {H}x{W}")
        all_but_channels = (1, 3, 4)
        # The value in the corner is subtracted, so that a map that is constant is exactly 0.
        # Otherwise, the rounding of its two means could make the inequality of Eq. 1 hold by
        # accident.
        maps = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        maps = maps - maps[..., :1, :1]
        no_pad = maps[..., 1:-1, 1:-1]
        w_ctr = gap(maps, all_but_channels) < gap(no_pad, all_but_channels)       # Eq. 1
        squeezed = gap(x, all_but_channels).to(x.dtype).flatten(1)
        w_se = self.excite(self.squeeze(squeezed).relu()).sigmoid()
        return w_ctr * w_se[:, None, :, None, None] * x                           # Eq. 2


class KernelGenerationModule(nn.Module):
    """KGM, K = P A_p^T: gathers the salient features of the former frames in a k x k kernel.

    Input: P (B, s, C, H, W). Output: K (B, k*k, C), where the k*k positions of the window are
    listed row by row.

    Args:
        channels: C.
        kernel_size: k, odd and at least 1.

    Raises ValueError for another kernel_size.
    """

    def __init__(self, channels: int, *, kernel_size: int = 3):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"KGM takes an odd kernel size of at least 1, not {kernel_size}")
        num_maps = kernel_size ** 2
        self.attention = nn.Sequential(
            nn.Conv2d(channels, num_maps, 1, bias=False), nn.BatchNorm2d(num_maps), nn.ReLU())

    def forward(self, p):
        B, s = p.shape[:2]
        maps = self.attention(p.flatten(0, 1)).unflatten(0, (B, s))       # (B, s, k*k, H, W)
        # F.normalize divides by at least 1e-12, which is 0 in float16
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        maps = F.normalize(maps, p=1, dim=2)                              # over the k*k maps,
        by_map = maps.transpose(1, 2).flatten(2)                          # (B, k*k, s*H*W)
        a_p = F.normalize(by_map, p=1, dim=2)                             # then over s*H*W
        features = p.movedim(2, 4).flatten(1, 3)                          # (B, s*H*W, C)
        return a_p.to(p.dtype) @ features                                 # K = P A_p^T


def conv_by_matmul(q, kernel):
    """Q * K of Eq. 3: convolves the frames of each clip with the clip's own kernel.

    One matrix product gives the response of every pixel to every position of the window, which is
    much faster than a convolution with a kernel for each clip. The k*k maps of responses are then
    shifted and added. The padding is replicate padding.

    Input: Q (B, L, C, H, W), K (B, k*k, C). Output: (B*L, H, W), at least float32.
    """
    B, L, C, H, W = q.shape
    k = math.isqrt(kernel.shape[1])
    responses = q.movedim(2, 4).reshape(B, L * H * W, C) @ kernel.transpose(1, 2)
    responses = responses.to(torch.promote_types(responses.dtype, torch.float32))
    responses = responses.view(B * L, H, W, k * k)
    # torch.compile fails on F.pad(mode="replicate") in torch 2.15, so we pad by indexing
    rows = torch.arange(-(k // 2), H + k // 2, device=q.device).clamp(0, H - 1)
    columns = torch.arange(-(k // 2), W + k // 2, device=q.device).clamp(0, W - 1)
    responses = responses.index_select(1, rows).index_select(2, columns)
    response = 0
    for i in range(k):
        for j in range(k):
            response = response + responses[:, i:i + H, j:j + W, i * k + j]
    return response


class SuppressOperation(nn.Module):
    """SO, Eq. 3-4: finds where the later frames respond to the kernel of the former ones, and gives
    the factor S that suppresses them there.

    Input: Q (B, L, C, H, W) of the L = T - s later frames, K (B, k*k, C). Output: S (B, L, 1, H, W)
    in (0, 1]. R of Eq. 3 has one value for each position of each later frame, H x W per frame, and
    a mean of 1 / (H W) in each frame. S is 1 where R is at most this mean, and falls to e^-beta
    where R is far above it. The product Y = S X is taken in CrossPropagationModule, which needs X
    and Y. Copy with: conv_by_matmul.

    Args:
        beta: strength of the suppression, above 0.
        scale: what the response Q * K is divided by before the softmax. "none": by nothing, as in
            the paper. "window": by k^2, which makes it a mean over the window, as in the authors'
            release. "window+channels": by k^2 sqrt(C), which is needed when training starts from
            random weights.

    Raises ValueError for another beta or scale.
    """

    def __init__(self, *, beta: float = 5.0, scale: str = "window"):
        super().__init__()
        if not 0 < beta < math.inf:
            raise ValueError(f"SO takes a beta above 0, not {beta}")
        if scale not in ("none", "window", "window+channels"):
            raise ValueError(f"SO takes a scale of none, window or window+channels, not {scale}")
        self.beta = beta
        self.scale = scale

    def forward(self, q, kernel):
        B, L, C, H, W = q.shape
        window = kernel.shape[1]                                          # k^2
        # The kernel is divided by k^2 sqrt(C) first, so that the sums of the product fit into
        # float16. If `scale` asks for less than this division, the float32 response is multiplied
        # again by sqrt(C), or by both k^2 and sqrt(C).
        response = conv_by_matmul(q, kernel / (window * math.sqrt(C)))            # Q * K
        if self.scale == "window":
            response = response * math.sqrt(C)
        elif self.scale == "none":
            response = response * window * math.sqrt(C)
        # Eq. 3: R = softmax(Q * K)
        # Eq. 4: S = exp(beta * min(1 / (H W R) - 1, 0))
        # Both are computed from log R, because an R that vanishes would give 0 * inf in the
        # gradient. 1 / (H W R) - 1 is expm1(log_ratio), and it is negative where log_ratio is.
        log_r = response.flatten(1).log_softmax(1)                                # Eq. 3
        log_ratio = -log_r - math.log(H * W)                              # log(1 / (H W R))
        suppression = torch.exp(self.beta * torch.expm1(log_ratio.clamp(max=0)))  # Eq. 4
        return suppression.view(B, L, 1, H, W).to(q.dtype)


class CrossPropagationModule(nn.Module):
    """CPM, Eq. 5-6: adds to the former frames the pooled features that were suppressed in the later
    frames, and to the later frames the pooled features of the former frames.

    Input: the former X (B, s, C, H, W), the later X (B, L, C, H, W) and their suppression S
    (B, L, 1, H, W). Output: Z (B, s + L, C, H, W). Copy with: gap.

    Args:
        alpha: degree of the propagation; 0 for none.
        release: False takes the sums over the frames of Eq. 5-6. True replaces both by means, as in
            the authors' release: Eq. 5 then has the mean of the later X over all frames and
            positions, weighted by 1 - S, and Eq. 6 has the mean of the former X.
    """

    def __init__(self, *, alpha: float = 0.1, release: bool = False):
        super().__init__()
        self.alpha = alpha
        self.release = release

    def forward(self, former, later, suppression):
        pixels = (3, 4)
        y = suppression * later                                                   # Y = S X
        removed = gap(later - y, pixels).sum(1, keepdim=True)             # sum of GAP(X_j - Y_j)
        salient = gap(former, pixels).sum(1, keepdim=True)                # sum of GAP(X_j)
        if self.release:
            weights = gap(1 - suppression, pixels).sum(1, keepdim=True)
            removed = removed / weights.clamp(min=1e-6)
            salient = salient / former.shape[1]
        z_former = former + (self.alpha * removed).to(former.dtype)               # Eq. 5
        z_later = y + (self.alpha * salient).to(y.dtype)                          # Eq. 6
        return torch.cat([z_former, z_later], 1)


def as_channels_last_frames(x):
    """Returns maps (B, T, C, H, W) with the same values, but stored so that the frames
    (B*T, C, H, W) are in torch.channels_last memory format. The gradient gets this format, too.

    Without it, slices and torch.cat leave a format that the ResNet blocks would have to convert.
    Flattening to one dimension in the order (B, T, H, W, C) forces the format in the forward and in
    the backward pass.
    """
    _, T, C, H, W = x.shape
    by_position = x.movedim(2, 4)                                         # (B, T, H, W, C)
    values = by_position.flatten()
    return values.view(-1, T, H, W, C).movedim(4, 2)                      # (B, T, C, H, W)


class SalientToBroadModule(nn.Module):
    """SBM, Fig. 2: suppresses in the later frames the salient region of the first s frames.

    Input: X (B, T, C, H, W), T above s; with CAL, H and W at least 3. Output: Z, of the same shape.
    Copy with: gap, ChannelAttentionLayer, KernelGenerationModule, conv_by_matmul,
    SuppressOperation, CrossPropagationModule and as_channels_last_frames.

    Args:
        channels: C.
        split: s, the number of former frames, at least 1.
        kernel_size: k of the kernel that KGM generates, odd and at least 1.
        beta: strength of the suppression in SO, above 0.
        alpha: degree of the propagation in CPM.
        se_reduction: ratio by which the squeeze-and-excitation in CAL reduces the channels, 1 to C.
        cal: False leaves CAL out, so that P and Q are X.
        cpm: False leaves the propagation out, so that Z has the former X and the later Y.
        scale: what SO divides the response by: "none", "window" (k^2) or "window+channels"
            (k^2 sqrt(C)).
        release: True builds CAL and CPM as in the authors' release.

    Raises ValueError for a split, kernel_size, beta, se_reduction or scale out of range, and for
    maps with too few frames, with another number of channels, or too small for CAL.
    """

    def __init__(self, channels: int, split: int, *, kernel_size: int = 3, beta: float = 5.0,
                 alpha: float = 0.1, se_reduction: int = 4, cal: bool = True, cpm: bool = True,
                 scale: str = "window", release: bool = False):
        super().__init__()
        if split < 1:
            raise ValueError(f"SBM takes a split of at least 1, not {split}")
        self.channels = channels
        self.split = split
        self.cal = None
        if cal:
            self.cal = ChannelAttentionLayer(channels, reduction=se_reduction, release=release)
        self.kgm = KernelGenerationModule(channels, kernel_size=kernel_size)
        self.so = SuppressOperation(beta=beta, scale=scale)
        if not cpm:
            alpha = 0.0
        self.cpm = CrossPropagationModule(alpha=alpha, release=release)

    def forward(self, x):
        s = self.split
        if x.shape[1] <= s:
            raise ValueError(f"SBM with split {s} needs more than {s} frames, not {x.shape[1]}")
        if x.shape[2] != self.channels:
            raise ValueError(f"SBM was built for {self.channels} channels, not {x.shape[2]}")
        x = as_channels_last_frames(x)  # for the gradients, which lose the format in the slices
        attended = x
        if self.cal is not None:
            attended = self.cal(x)                                                # Eq. 1-2
        p = attended[:, :s]
        q = attended[:, s:]
        kernel = self.kgm(p)
        suppression = self.so(q, kernel)                                          # Eq. 3-4
        z = self.cpm(x[:, :s], x[:, s:], suppression)                             # Eq. 5-6
        return as_channels_last_frames(z)  # for the maps, which lose it in the torch.cat of CPM


# ---------------------------------------------------- Sec. 3.2: Integration-and-Distribution Module

class IntegrationDistributionModule(nn.Module):
    """IDM, Eq. 7: adds F' = G^D G^I F (L^I L^D + I) to F. G mixes the channels, and L mixes all
    m = T*H*W positions of a clip.

    Input: X (B, T, C, H, W) with the T, H and W given below. Output: of the same shape. The module
    starts as the identity. With release it starts as a ReLU, which changes nothing, as the maps of
    a ResNet stage are not negative anyway.

    Args:
        channels: C.
        frames, height, width: T, H and W of the maps.
        reduction: c / c' and m / m', 1 to the smaller one of C and m.
        release: True takes the form of the authors' release, y = BN(G^I F),
            F_output = ReLU(G^D (BN(y L^I) L^D + y) + F), with biases where no BatchNorm follows.

    Raises ValueError for a reduction out of range, and for maps of another shape.
    """

    def __init__(self, channels: int, frames: int, height: int, width: int, *, reduction: int = 4,
                 release: bool = False):
        super().__init__()
        m = frames * height * width
        if not 1 <= reduction <= min(channels, m):
            raise ValueError(f"IDM takes a reduction of 1 to {min(channels, m)}, for {channels} "
                             f"channels and {m} positions, not {reduction}")
        self.expected_shape = (frames, channels, height, width)
        reduced_channels = channels // reduction                          # c'
        reduced_m = m // reduction                                        # m'
        self.g_i = nn.Conv2d(channels, reduced_channels, 1, bias=False)
        self.l_i = nn.Linear(m, reduced_m, bias=False)
        self.l_d = nn.Linear(reduced_m, m, bias=release)
        self.g_d = nn.Conv2d(reduced_channels, channels, 1, bias=release)
        # Eq. 7 is linear. Only the authors' release has BatchNorm and ReLU.
        self.bn_g = nn.BatchNorm2d(reduced_channels) if release else nn.Identity()
        self.bn_l = nn.BatchNorm1d(reduced_m) if release else nn.Identity()
        self.relu = nn.ReLU() if release else nn.Identity()
        nn.init.zeros_(self.g_d.weight)
        if release:
            nn.init.zeros_(self.g_d.bias)

    def forward(self, x):
        if x.shape[1:] != self.expected_shape:
            raise ValueError(f"IDM was built for (T, C, H, W) = {self.expected_shape}, not "
                             f"{tuple(x.shape[1:])}")
        B, T, C, H, W = x.shape
        # F' = G^D G^I F (L^I L^D + I)                                              Eq. 7
        f = self.bn_g(self.g_i(x.flatten(0, 1)))                          # G^I F: (B*T, c', H, W)
        f = f.view(B, T, -1, H, W).transpose(1, 2).flatten(2)             # (B, c', m)
        integrated = self.l_i(f)                                          # L^I: (B, c', m')
        integrated = self.bn_l(integrated.transpose(1, 2)).transpose(1, 2)
        f = self.l_d(integrated) + f                                      # L^D and I: (B, c', m)
        f = f.view(B, -1, T, H, W).transpose(1, 2).flatten(0, 1)          # (B*T, c', H, W)
        f = self.g_d(f).view(B, T, C, H, W)                               # G^D
        return self.relu(f + x)                                           # F_output = F' + F


# ------------------------------------- Sec. 4.5, Table 3: the blocks with which IDM is compared

class NonLocalBlock(nn.Module):
    """Non-local block (Wang et al., CVPR 2018) over all positions of a clip.

    Input: X (B, T, C, H, W). Output: of the same shape. The block starts as the identity.

    Args:
        channels: C.
        affinity: "softmax" (embedded Gaussian, "Non-local" in Table 3), "ones" (the mean over all
            positions, "Non-local (1)") or "inverse" (softmax of the negated affinity, "Non-local
            (inverse)").

    Raises ValueError for another affinity.
    """

    def __init__(self, channels: int, *, affinity: str = "softmax"):
        super().__init__()
        if affinity not in ("softmax", "ones", "inverse"):
            raise ValueError(f"the affinity must be softmax, ones or inverse, not {affinity}")
        self.affinity = affinity
        if affinity != "ones":
            self.theta = nn.Conv2d(channels, channels // 2, 1)
            self.phi = nn.Conv2d(channels, channels // 2, 1)
        self.g = nn.Conv2d(channels, channels // 2, 1)
        self.out = nn.Sequential(nn.Conv2d(channels // 2, channels, 1), nn.BatchNorm2d(channels))
        nn.init.zeros_(self.out[1].weight)

    def forward(self, x):
        B, T, C, H, W = x.shape

        def project_positions(layer):
            """The layer's result for all positions of a clip, (B, 1, m, C/2)."""
            y = layer(x.flatten(0, 1)).view(B, T, -1, H, W)
            return y.movedim(2, 4).reshape(B, 1, T * H * W, -1)

        g = project_positions(self.g)
        if self.affinity == "ones":
            y = g.mean(2, keepdim=True).expand_as(g)
        else:
            theta = project_positions(self.theta)
            phi = project_positions(self.phi)
            if self.affinity == "inverse":
                theta = -theta
            y = F.scaled_dot_product_attention(theta, phi, g, scale=1.0)  # softmax(theta phi^T) g
        y = y.reshape(B * T, H, W, -1).movedim(3, 1)
        return self.out(y).view(B, T, C, H, W) + x


class GlobalContextBlock(nn.Module):
    """GC block (Cao et al., ICCVW 2019) over all positions of a clip.

    Input: X (B, T, C, H, W). Output: of the same shape. The block starts as the identity.

    Args:
        channels: C.
        reduction: C divided by the number of channels between the two layers, 1 to C.

    Raises ValueError for another reduction.
    """

    def __init__(self, channels: int, *, reduction: int = 16):
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"a GC block takes a reduction of 1 to {channels}, not {reduction}")
        reduced = channels // reduction
        self.mask = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Linear(channels, reduced), nn.LayerNorm(reduced), nn.ReLU(),
            nn.Linear(reduced, channels))
        nn.init.zeros_(self.transform[3].weight)
        nn.init.zeros_(self.transform[3].bias)

    def forward(self, x):
        B, T, C, H, W = x.shape
        at_least_32_bits = torch.promote_types(x.dtype, torch.float32)
        attention = self.mask(x.flatten(0, 1)).view(B, -1).softmax(1, at_least_32_bits)   # (B, m)
        attention = attention.to(x.dtype).view(B, T, H, W)
        context = torch.einsum("btchw,bthw->bc", x, attention)
        return x + self.transform(context)[:, None, :, None, None]


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


# number of IDMs: the blocks of layer2 that they follow
IDM_BLOCKS = {0: (), 1: (4,), 2: (2, 4), 3: (2, 3, 4)}


class SINet(nn.Module):
    """SINet, Fig. 4: ResNet-50 with IDMs after blocks 2 and 4 of layer2 and SBMs after blocks 2, 4
    and 6 of layer3, max pooling of each frame, the mean over the frames (TAP), and a BN neck.

    Input: normalised clips (B, T, 3, height, width). Output in eval mode: the embeddings (B, 2048).
    Output in train mode: a list of the embeddings, the logits (B, num_classes) and the projected
    frame embeddings (B, T, 2048) for L_mi. Copy with: all classes and functions above, and
    IDM_BLOCKS.

    The maps of a clip of 4 frames of 256x128, C x H x W for each frame:

        stem       64 x 64 x 32
        layer1    256 x 64 x 32
        layer2    512 x 32 x 16    IDM: m = 4*32*16 = 2048, m' = 512, c' = 128
        layer3   1024 x 16 x 8     SBM: K is 9 x 1024 for each clip, R and S are 16 x 8 for each
                                   later frame, of which there are 3, 2 and 1
        layer4   2048 x 16 x 8     (a stride of 1)
        pooling  2048

    Args:
        num_classes: number of training identities.
        frames: T, the number of frames in a clip.
        height, width: size of the frames in pixels. A network with IDMs takes only clips of
            this length and size, because the shapes of L^I and L^D depend on m.
        sbm: False leaves the SBMs out.
        idms: number of IDMs, 0 to 3.
        sbm_blocks: the blocks of layer3, 1 to 6, that an SBM follows; a block may be repeated.
        sbm_splits: s of each SBM, the number of its former frames, 1 to T - 1.
        cal: False leaves CAL out of the SBMs.
        cpm: False leaves CPM out of the SBMs.
        kernel_size: k of the SBMs, odd and at least 1.
        beta: strength of the suppression in the SBMs, above 0.
        alpha: degree of the propagation in the SBMs.
        scale: what the SBMs divide the response of Eq. 3 by: "none", "window" (k^2) or
            "window+channels" (k^2 sqrt(C)).
        se_reduction: ratio by which the squeeze-and-excitation in CAL reduces the channels, 1 to
            1024.
        mixer: the module at each place of an IDM: "idm" (IDM), "gc" (GC block), or "softmax",
            "ones" or "inverse" (Non-local block with this affinity).
        reduction: c / c' and m / m' of the IDMs, 1 to the smaller one of 512 and m.
        projection: False leaves out the linear layer for L_mi, and its output.
        pool: "max" or "avg", the pooling over the positions of each frame's last map.
        weights: initial weights of the backbone: "imagenet" (torchvision's), "none" (random), a
            state_dict of torchvision's resnet50, or a file with one.
        release: True takes the form of the authors' release, which their trained networks need:
            its IDM, CAL and CPM, max pooling without padding in the stem, and a classifier with
            biases.

    Raises ValueError for idms, sbm_blocks, sbm_splits, kernel_size, beta, scale, se_reduction,
    mixer, reduction or pool out of range, if there is not one split for each of the blocks, and if
    the clips are too short or too small for the SBMs.
    """

    def __init__(self, num_classes: int, frames: int = 4, height: int = 256, width: int = 128, *,
                 sbm: bool = True, idms: int = 2, sbm_blocks: tuple[int, ...] = (2, 4, 6),
                 sbm_splits: tuple[int, ...] = (1, 2, 3), cal: bool = True, cpm: bool = True,
                 kernel_size: int = 3, beta: float = 5.0, alpha: float = 0.1,
                 scale: str = "window", se_reduction: int = 4, mixer: str = "idm",
                 reduction: int = 4, projection: bool = True, pool: str = "max", weights="none",
                 release: bool = False):
        super().__init__()
        if idms not in IDM_BLOCKS:
            raise ValueError(f"SINet takes 0 to 3 IDMs, not {idms}")
        if mixer not in ("idm", "gc", "softmax", "ones", "inverse"):
            raise ValueError("SINet takes a mixer of idm, gc, softmax, ones or inverse, not "
                             f"{mixer}")
        if pool not in ("max", "avg"):
            raise ValueError(f"the pooling of the last maps must be max or avg, not {pool}")
        if sbm:
            if len(sbm_blocks) != len(sbm_splits):
                raise ValueError(f"SINet takes a split for each block with an SBM, not "
                                 f"{len(sbm_splits)} splits for {len(sbm_blocks)} blocks")
            if not set(sbm_blocks) <= {1, 2, 3, 4, 5, 6}:
                raise ValueError(f"SBMs follow blocks 1 to 6 of layer3, not {sbm_blocks}")
            if frames <= max(sbm_splits, default=0):
                raise ValueError(f"SBMs with s = {sbm_splits} need at least {max(sbm_splits) + 1} "
                                 f"frames, not {frames}")
            # CAL needs maps of at least 3x3 positions. Those of layer3, whose stride is 16, would
            # have fewer for smaller frames.
            smallest = 37 if release else 33
            if cal and min(height, width) < smallest:
                raise ValueError(f"CAL needs frames of at least {smallest}x{smallest} pixels, not "
                                 f"{height}x{width}")
        net = resnet50(weights)
        if release:
            net.maxpool.padding = 0
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1 = net.layer1
        self.layer2 = net.layer2
        self.layer3 = net.layer3
        self.layer4 = net.layer4

        def layer2_size(pixels):
            """Height or width of layer2's maps, for frames of this height or width."""
            after_conv1 = math.ceil(pixels / 2)
            if release:
                after_pool = (after_conv1 - 3) // 2 + 1
            else:
                after_pool = math.ceil(after_conv1 / 2)
            return math.ceil(after_pool / 2)

        modules_after = {}                              # {"layer2_4": the modules after that block}
        for block_number in IDM_BLOCKS[idms]:
            if mixer == "idm":
                module = IntegrationDistributionModule(
                    512, frames, layer2_size(height), layer2_size(width), reduction=reduction,
                    release=release)
            elif mixer == "gc":
                module = GlobalContextBlock(512)
            else:
                module = NonLocalBlock(512, affinity=mixer)
            modules_after[f"layer2_{block_number}"] = nn.Sequential(module)
        if sbm:
            for block_number, split in zip(sbm_blocks, sbm_splits):
                module = SalientToBroadModule(
                    1024,
                    split=split,
                    kernel_size=kernel_size,
                    beta=beta,
                    alpha=alpha,
                    se_reduction=se_reduction,
                    cal=cal,
                    cpm=cpm,
                    scale=scale,
                    release=release,
                )
                name = f"layer3_{block_number}"
                if name not in modules_after:
                    modules_after[name] = nn.Sequential()
                modules_after[name].append(module)
        self.after = nn.ModuleDict(modules_after)
        self.pool = pool
        self.neck = nn.BatchNorm1d(2048)
        self.classifier = nn.Linear(2048, num_classes, bias=release)
        nn.init.normal_(self.classifier.weight, std=0.001)
        self.projection = nn.Linear(2048, 2048) if projection else None
        if release:
            nn.init.zeros_(self.classifier.bias)
        if release and projection:
            nn.init.kaiming_normal_(self.projection.weight, mode="fan_out")
            nn.init.zeros_(self.projection.bias)

    def forward(self, clips):
        B, T = clips.shape[:2]
        x = clips.flatten(0, 1).to(self.neck.weight.dtype)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            for block_number, block in enumerate(getattr(self, stage), 1):
                x = block(x)
                name = f"{stage}_{block_number}"
                if name in self.after:
                    maps = x.unflatten(0, (B, T))
                    x = self.after[name](maps).flatten(0, 1)
        if self.pool == "max":
            x = x.amax((2, 3))
        else:
            x = x.mean((2, 3))
        vectors = x.to(self.neck.weight.dtype).view(B, T, -1)   # one for each frame
        embedding = self.neck(vectors.mean(1))                  # TAP
        if not self.training:
            return embedding
        outputs = [embedding, self.classifier(embedding)]
        if self.projection is not None:
            # As in the release, the neck is applied to the frames' vectors, too, which updates its
            # running statistics a second time.
            normed = self.neck(vectors.transpose(1, 2)).transpose(1, 2)
            outputs.append(self.projection(normed))
        return outputs


# ---------------------------------------------------------------------- Sec. 3.3, Eq. 8: the losses

def mutual_information_loss(frame_embeddings, pids, *, temperature: float = 0.07):
    """L_mi of Eq. 8: within the clips of one identity, it pulls together frames with the same index
    and pushes apart frames with different indices, so that the frames of a clip differ.

    This is our reading. For frame i of a clip, the positives are the frames i of its identity's
    other clips, and the negatives are the frames of other indices in all clips of its identity.
    The loss is the mean of -log(e^{s+/t} / (e^{s+/t} + sum of e^{s-/t})) over all pairs of a frame
    and a positive. s+ is the cosine similarity of the pair, s- is that of the frame and one of its
    negatives, and the sum goes over all its negatives. Without any such pair the loss is 0.

    Args:
        frame_embeddings: projected embeddings of the frames (B, T, D).
        pids: identities of the clips (B,).
        temperature: t, above 0.
    """
    B, T = frame_embeddings.shape[:2]
    at_least_32_bits = torch.promote_types(frame_embeddings.dtype, torch.float32)
    z = frame_embeddings.to(at_least_32_bits).flatten(0, 1)
    z = F.normalize(z, dim=1)
    similarity = z @ z.T / temperature                                            # s / t
    # for each frame of the batch: its clip, its index in the clip, its identity
    clip_of = torch.arange(B, device=z.device).repeat_interleave(T)
    index_of = torch.arange(T, device=z.device).repeat(B)
    pid_of = pids[clip_of]
    same_pid = pid_of[:, None] == pid_of
    same_index = index_of[:, None] == index_of
    same_clip = clip_of[:, None] == clip_of
    positive = same_pid & same_index & ~same_clip
    negative = same_pid & ~same_index
    # -log(e^a / (e^a + sum e^b)) = log(1 + e^(log sum e^b - a)) = softplus(log sum e^b - a)
    log_negatives = similarity.masked_fill(~negative, -math.inf).logsumexp(1, keepdim=True)
    loss = F.softplus(log_negatives - similarity)
    return loss.masked_fill(~positive, 0).sum() / positive.sum().clamp(min=1)


def loss_weights(args):
    """The weights of L_cent + lambda1 L_tri + lambda2 L_mi, Eq. 8: {name: weight}."""
    return {"xent": 1.0, "triplet": args.lambda1, "mi": args.lambda2}


def losses(outputs, pids, args):
    """The weighted terms of Eq. 8, {name: scalar}. Their sum is minimised.

    With --release, L_mi is multiplied by the number of identities in the batch. As all of them have
    equally many clips, this is the sum over the identities that the authors' release takes.

    Args:
        outputs: what the network returns in train mode.
        pids: identities of the clips (B,).
        args: the settings of the run, of which margin, temperature, release, lambda1 and lambda2
            are used.
    """
    embedding, logits = outputs[:2]
    terms = {
        "xent": F.cross_entropy(at_least_float32(logits), pids),                  # L_cent
        "triplet": batch_hard_triplet(embedding, pids, args.margin),              # L_tri
    }
    if len(outputs) > 2:
        terms["mi"] = mutual_information_loss(outputs[2], pids, temperature=args.temperature)
        if args.release:
            # Each identity is counted where it occurs first. len(pids.unique()) would give the same
            # number, but the CPU would have to wait for the GPU.
            is_repeated = (pids[:, None] == pids).tril(-1).any(1)
            terms["mi"] = (~is_repeated).sum() * terms["mi"]
    weights = loss_weights(args)
    return {name: weights[name] * term for name, term in terms.items()}           # Eq. 8


# ---------------------------------------------------------------------------- Sec. 4.2: the recipe

RECIPE = {  # flag: (the paper's value, or ours; the small run's; meaning and source[, choices])
    "frames": (4, 4, "number of frames in a clip, T (Sec. 4.2)"),
    "height": (256, 128, "height of the resized frames (Sec. 4.2)"),
    "width": (128, 64, "width of the resized frames (Sec. 4.2)"),
    "ids": (8, 4, "number of identities in a batch, P (Sec. 4.2)"),
    "clips": (4, 2, "number of clips of each identity in a batch, K (Sec. 4.2)"),
    "epoch": ("tracklets", "identities",
              "what an epoch goes through: the tracklets (as in the authors' release) or the "
              "identities",
              ("tracklets", "identities")),
    "erase": (0.5, 0.0, "probability of random erasing (Sec. 4.2)"),
    "epochs": (160, 8, "number of epochs (Sec. 4.2)"),
    "lr": (3e-4, 5e-4, "learning rate of Adam (Sec. 4.2)"),
    "lr_step": (40, 7, "divide the learning rate by 10 every so many epochs (Sec. 4.2)"),
    "weight_decay": (5e-4, 5e-4, "weight decay of Adam (Sec. 4.2)"),
    "weights": ("imagenet", "none",
                "initial weights of the backbone: imagenet, none (random) or a file (Sec. 3.3)"),
    "pool": ("max", "max",
             "pooling of each frame's last feature map (not in the paper; as in the authors' "
             "release)",
             ("max", "avg")),
    "sbm": (True, True, "use SBMs (Table 2)"),
    "sbm_blocks": ((2, 4, 6), (2, 4, 6),
                   "blocks of layer3 that an SBM follows, 1 to 6 (Sec. 3.3, Table 3)"),
    "sbm_splits": ((1, 2, 3), (1, 2, 3), "number of former frames of each SBM, s (Sec. 3.3)"),
    "k": (3, 3, "kernel size of SBM, odd (Sec. 4.2, Fig. 5a)"),
    "beta": (5.0, 5.0, "strength of the suppression (Eq. 4, Sec. 4.2)"),
    "scale": ("window", "window+channels",
              "divisor of the response of Eq. 3: 1 for none (the paper's form), k^2 for window (as "
              "in the authors' release), k^2 sqrt(c) for window+channels",
              ("none", "window", "window+channels")),
    "alpha": (0.1, 0.1, "degree of CPM's propagation (Eq. 5-6, Sec. 3.1)"),
    "cal": (True, True, "use CAL in the SBMs (Table 3)"),
    "cpm": (True, True, "use CPM in the SBMs (Table 3)"),
    "se_reduction": (4, 4,
                     "reduction of CAL's squeeze-and-excitation (not in the paper; as in the "
                     "authors' release)"),
    "idms": (2, 2, "number of IDMs, 0 to 3 (Sec. 3.3, Table 3)", range(4)),
    "reduction": (4, 4, "reduction of the IDMs, c/c' and m/m' (Fig. 5b)"),
    "mixer": ("idm", "idm",
              "what mixes all positions in layer2: idm (IDM), gc (GC block), or softmax, ones or "
              "inverse (Non-local block with this affinity) (Table 3)",
              ("idm", "softmax", "ones", "inverse", "gc")),
    "lambda1": (1.0, 1.0, "weight of the triplet loss (Eq. 8, Sec. 4.2)"),
    "release": (False, False,
                "build the network as the authors' release does, for its trained weights (differs "
                "from the paper)"),
    "lambda2": (0.01, 0.01,
                "weight of L_mi (Eq. 8, Sec. 4.2); 0 leaves out the loss and its projection"),
    "temperature": (0.07, 0.07,
                    "temperature of L_mi, t (not in the paper; as in the authors' release)"),
    "margin": (0.3, 0.3, "margin of the triplet loss, in cosine distance (our choice)"),
}
SAMPLER = PKSampler            # a batch: K clips of each of P identities
SAMPLE = sample_segments       # a training clip: one random frame of each of T equal parts
# test clips: a tracklet is cut into T equal parts, and each clip has one frame from each; together
# the clips use all frames
SPLIT = split_segments
# how tracklets are compared in the test; a tracklet's vector is the mean of its clips' embeddings
METRIC = "cosine"

ROWS = {
    # The Row of a variant has its table and name in the paper, the settings that define it (even
    # where RECIPE has the same values), the paper's (mAP, rank-1), and how many GFLOPs more than
    # base it needs in the paper. same="NAME" says that the variant is the same as the variant NAME.
    # All other settings are as in RECIPE. Variants without SBM are trained without L_mi
    # (lambda2=0.0).

    # Tables 1 and 2: the whole network, and its two modules alone. Table 3 lists base+idm, too, as
    # base+2idm, with an mAP of 85.8 instead of 85.9.
    "sinet": Row(
        "Tables 1-3: SINet, base. + SBM + IDM",
        sbm=True, idms=2,
        mars=(86.2, 91.0), lsvid=(79.6, 87.4), ilids=(None, 92.5), prid=(None, 96.5),
    ),
    "base": Row(
        "Tables 2, 3: base.",
        sbm=False, idms=0, lambda2=0.0,
        mars=(83.2, 88.6), lsvid=(73.3, 82.8),
    ),
    "base+sbm": Row(
        "Tables 2, 3: base. + SBM",
        sbm=True, idms=0,
        mars=(85.7, 90.2), lsvid=(77.1, 85.1), more_gflops=0.014,
    ),
    "base+idm": Row(
        "Table 2: base. + IDM",
        sbm=False, idms=2, lambda2=0.0,
        mars=(85.9, 90.5), lsvid=(78.0, 86.2), more_gflops=1.081,
    ),

    # Table 3: other blocks in the places of the IDMs
    "base+nonlocal": Row(
        "Table 3: base. + Non-local",
        sbm=False, idms=2, lambda2=0.0, mixer="softmax",
        mars=(85.1, 89.7), more_gflops=2.216,
    ),
    "base+nonlocal-ones": Row(
        "Table 3: base. + Non-local (1)",
        sbm=False, idms=2, lambda2=0.0, mixer="ones",
        mars=(85.1, 90.0),
    ),
    "base+nonlocal-inverse": Row(
        "Table 3: base. + Non-local (inverse)",
        sbm=False, idms=2, lambda2=0.0, mixer="inverse",
        mars=(85.0, 89.7),
    ),
    "base+gc": Row(
        "Table 3: base. + GC block",
        sbm=False, idms=2, lambda2=0.0, mixer="gc",
        mars=(85.0, 89.8),
    ),

    # Table 3: SBMs without CAL or without CPM, and all three SBMs in the same position
    "base+sbm-cal": Row(
        "Table 3: base. + SBM w/o CAL",
        sbm=True, idms=0, cal=False,
        mars=(85.1, 89.9),
    ),
    "base+sbm-cpm": Row(
        "Table 3: base. + SBM w/o CPM",
        sbm=True, idms=0, cpm=False,
        mars=(85.4, 90.0),
    ),
    "base+sbm-samepos": Row(
        "Table 3: base. + SBM (Same Pos.)",
        sbm=True, idms=0, sbm_blocks=(6, 6, 6),
        mars=(85.3, 89.5),
    ),

    # Table 3: number of IDMs
    "base+1idm": Row(
        "Table 3: base. + 1 IDM",
        sbm=False, idms=1, lambda2=0.0,
        mars=(85.7, 89.8),
    ),
    "base+2idm": Row(
        "Table 3: base. + 2 IDM (Default)",
        sbm=False, idms=2, lambda2=0.0,
        mars=(85.8, 90.5),
    ),
    "base+3idm": Row(
        "Table 3: base. + 3 IDM",
        sbm=False, idms=3, lambda2=0.0,
        mars=(85.8, 90.5),
    ),

    # Fig. 5a: kernel size of SBM. The paper's text names the best, 3. The others are our guess.
    "base+sbm-k1": Row("Fig. 5a: kernel size of SBM, k = 1", sbm=True, idms=0, k=1),
    "base+sbm-k3": Row("Fig. 5a: kernel size of SBM, k = 3", same="base+sbm"),
    "base+sbm-k5": Row("Fig. 5a: kernel size of SBM, k = 5", sbm=True, idms=0, k=5),
    "base+sbm-k7": Row("Fig. 5a: kernel size of SBM, k = 7", sbm=True, idms=0, k=7),

    # Fig. 5b: reduction of IDM. The paper's text names the best, 4. The others are our guess.
    "base+idm-r2": Row("Fig. 5b: reduction in IDM, 2", sbm=False, idms=2, lambda2=0.0, reduction=2),
    "base+idm-r4": Row("Fig. 5b: reduction in IDM, 4", same="base+2idm"),
    "base+idm-r8": Row("Fig. 5b: reduction in IDM, 8", sbm=False, idms=2, lambda2=0.0, reduction=8),
    "base+idm-r16": Row(
        "Fig. 5b: reduction in IDM, 16",
        sbm=False, idms=2, lambda2=0.0, reduction=16,
    ),
}


# ----------------------------------------------------- the trained networks of the authors' release

RELEASED_LAYERS = {  # name of a layer in the authors' networks: its name here
    "conv1": "stem.0",
    "bn1": "stem.1",
    "bn": "neck",
}
RELEASED_MODULE_LAYERS = {  # the same for the layers of an inserted module
    # IDM
    "chl_reduction.0": "g_i",
    "chl_reduction.1": "bn_g",
    "thw_reduction.0": "l_i",
    "thw_reduction.1": "bn_l",
    "thw_expansion.0": "l_d",
    "chl_expansion.0": "g_d",
    # SBM
    "kernel.0": "kgm.attention.0",
    "kernel.1": "kgm.attention.1",
    "se.1": "cal.squeeze",
    "se.3": "cal.excite",
}


def convert_release(state):
    """Converts a network that the authors' release has trained.

    Args:
        state: the state_dict of a file.

    Returns (name of the variant in ROWS, {setting: value} inferred from the names and shapes of the
    weights, state_dict with our names), or None if the state_dict is not one of the authors'
    release.
    """
    if not {"conv1.bias", "bn.weight", "classifier.weight"} <= state.keys():
        return None
    names = released_names(state)
    model = convert_weights(state, names)
    fold_biases(state, names, model)
    variant, settings = released_settings(state, names)
    return variant, settings, model


def released_names(state):
    """Returns {name of a layer in the authors' network: its name here}.

    In the authors' names, an inserted module counts as a block of its stage: their layer2.2 is the
    first IDM, and their layer2.3 is our layer2.2.
    """
    layers = {key.rpartition(".")[0] for key in state}
    inserted = set()                                    # {"layer2.2", ...}, the inserted modules
    for layer in layers:
        if layer.startswith("layer"):
            stage, number, part = layer.split(".", 2)
            if part.startswith(("thw_", "kernel")):     # the layers that only IDM and SBM have
                inserted.add(f"{stage}.{number}")
    names = {}
    for layer in layers:
        if not layer.startswith("layer"):
            names[layer] = RELEASED_LAYERS.get(layer, layer)
            continue
        stage, number, part = layer.split(".", 2)
        blocks_before = 0
        for earlier_number in range(int(number)):
            if f"{stage}.{earlier_number}" not in inserted:
                blocks_before += 1
        if f"{stage}.{number}" in inserted:
            part = RELEASED_MODULE_LAYERS.get(part, part)
            names[layer] = f"after.{stage}_{blocks_before}.0.{part}"
        else:
            names[layer] = f"{stage}.{blocks_before}.{part}"
    return names


def convert_weights(state, names):
    """Returns the state_dict with our names and shapes. The authors' convolutions are 3-D, with
    kernels of one frame, and some layers that are convolutions there are linear layers here."""
    linear = ("l_i", "l_d", "squeeze", "excite", "projection")
    model = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        name = names[layer]
        if kind == "weight" and value.dim() > 2:
            if name.endswith(linear):
                value = value.flatten(1)
            else:
                value = value.squeeze(2)
        model[f"{name}.{kind}"] = value
    return model


def batchnorm_after(layer):
    """Returns the name that a BatchNorm after this layer has in the authors' network, or None if
    no BatchNorm can follow."""
    if layer.endswith(".0"):
        return layer.removesuffix("0") + "1"            # downsample.0: downsample.1
    if "conv" in layer:
        return layer.replace("conv", "bn")              # conv2: bn2
    return None


def fold_biases(state, names, model):
    """Removes from `model`, in place, the biases of layers that have none here. A BatchNorm follows
    each of these layers, so that subtracting the bias from its running mean gives the same
    results."""
    for layer in names:
        bn_layer = batchnorm_after(layer)
        if bn_layer is None:
            continue
        if f"{layer}.bias" in state and f"{bn_layer}.running_mean" in state:
            mean = f"{names[bn_layer]}.running_mean"
            model[mean] = model[mean] - model.pop(f"{names[layer]}.bias")


def released_settings(state, names):
    """Returns (name of the variant in ROWS, {setting: value}) of the authors' network, inferred
    from its names and shapes. A network that is no variant is "sinet" with other settings."""
    # {"layer2_2", ...}: the blocks that an inserted module follows
    places = {name.split(".")[1] for name in names.values() if name.startswith("after.")}
    idms = sum(place.startswith("layer2") for place in places)
    sbm = any(place.startswith("layer3") for place in places)
    settings = {"sbm": sbm, "idms": idms}
    for key, value in state.items():
        if key.endswith("chl_reduction.0.weight"):
            settings["reduction"] = value.shape[1] // value.shape[0]
        if key.endswith("se.1.weight"):
            settings["se_reduction"] = value.shape[1] // value.shape[0]
    if "projection.weight" not in state:
        settings["lambda2"] = 0.0
    variants = {  # (with SBMs, number of IDMs): name
        (True, 2): "sinet",
        (True, 0): "base+sbm",
        (False, 2): "base+idm",
        (False, 0): "base",
    }
    return variants.get((sbm, idms), "sinet"), settings


# What common.py has to know of the authors' release
RELEASE = Release(
    convert_release,
    # With and without --release: the default of --chunk, in place of the 64 of CHUNK in data.py.
    chunk={"lsvid": 48},
    # With --release only: the settings of the recipe that it changes.
    reduction=16,
    lambda2=0.001,
    scale="window",
    pool="max",
)


def build(args, num_classes: int):
    """Builds the network with the settings of a run. With --resume its backbone starts from random
    weights, because the checkpoint holds the weights of the whole network."""
    return SINet(
        num_classes,
        frames=args.frames,
        height=args.height,
        width=args.width,
        sbm=args.sbm,
        idms=args.idms,
        sbm_blocks=args.sbm_blocks,
        sbm_splits=args.sbm_splits,
        cal=args.cal,
        cpm=args.cpm,
        kernel_size=args.k,
        beta=args.beta,
        alpha=args.alpha,
        scale=args.scale,
        se_reduction=args.se_reduction,
        mixer=args.mixer,
        reduction=args.reduction,
        projection=args.lambda2 > 0,
        pool=args.pool,
        weights="none" if args.resume else args.weights,
        release=args.release,
    )


def make_optimizer(model, args):
    """Adam, as in Sec. 4.2."""
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
    """The drawing of --figure, in the manner of Figures 1 and 6: the root mean square of the last
    feature maps over their channels and, for the later frames of each SBM, the suppression 1 - S.

    Args:
        model: the network.
        clips: one normalised clip (1, T, 3, H, W).
        images: its frames as they are shown (T, 3, H, W), uint8.

    Returns (title, {label: row of the drawing}).
    """
    sbms = [module for module in model.modules() if isinstance(module, SalientToBroadModule)]
    layers = [model.layer4[-1]] + [sbm.so for sbm in sbms]
    last_calls, *so_calls = watch(model, clips, *layers)    # pairs (inputs, output) of each layer
    _, last_maps = last_calls[0]
    rows = {"last map of each frame, divided by its mean": overlays(images, energy(last_maps))}
    for number, (sbm, calls) in enumerate(zip(sbms, so_calls), 1):
        _, suppression = calls[0]
        of_later_frames = 1 - suppression[0, :, 0]
        maps = [None] * sbm.split + list(of_later_frames)   # no map for the former frames
        former = "frame 1" if sbm.split == 1 else f"frames 1 to {sbm.split}"
        label = f"suppressed by SBM {number} as salient in {former}"
        rows[label] = overlays(images, maps, limits=(0, 1))
    return "SINet: where the network attends in each frame", rows


if __name__ == "__main__":  # same in every script
    command_line(main)
