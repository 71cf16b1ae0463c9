"""SINet: Salient-to-Broad Transition for Video Person Re-identification.

Bai, Ma, Chang, Huang, Chen. CVPR 2022.
The authors' release: https://github.com/baist/SINet

The frames of a clip tend to attend to the same salient region. SBM lets the first s frames find it
and damps it in the later ones, which then attend to broader regions; what is lost is passed to the
other frames. IDM makes every frame richer before: learnt low-rank matrices mix the whole clip.

    python sinet.py                           # a small run on synthetic data, on any machine
    python sinet.py --data mars --gpu 0       # the paper's recipe
    python sinet.py --data mars --plan        # what that would train and test, without doing it
    python sinet.py --data mars --evaluate --resume sinet.pth.tar   # the authors' trained network
    python sinet.py --data mars --gpu 0 --variant base+sbm --k 5    # a row of its tables, changed

Sec. 3.1, Eq. 1-2          ChannelAttentionLayer (CAL)
Sec. 3.1                   KernelGenerationModule (KGM)
Sec. 3.1, Eq. 3-4          SuppressOperation (SO)
Sec. 3.1, Eq. 5-6          CrossPropagationModule (CPM)
Sec. 3.1, Fig. 2           SalientToBroadModule (SBM)
Sec. 3.2, Eq. 7, Fig. 3    IntegrationDistributionModule (IDM)
Sec. 4.5, Table 3          NonLocalBlock, GlobalContextBlock
Sec. 3.3, Fig. 4           SINet
Sec. 3.3, Eq. 8            losses, mutual_information_loss
Sec. 4.2                   RECIPE, then SAMPLER, SAMPLE, SPLIT, METRIC; Tables 1 to 3, Fig. 5: ROWS
A class is copied alone, or with what its docstring names under "copied with".

Deviations from the paper (its sentence, what we do, the flag for the paper's form):
  Eq. 3         "softmax(Q * K)": the response is divided by k^2, a mean over the window, as in the
                authors' release, from which the paper's results come. On the plain sum the softmax
                is one-hot: S damps one cell, and hardly any gradient reaches KGM. --scale none. The
                small run divides by sqrt(c), too, because it starts from random weights.

Unspecified in the paper; our choice (the authors' release is named where the choice follows it):
  KGM           1x1 convolution to k^2 maps, BatchNorm, ReLU; the L1 norms have an eps, so that an
                all-zero map gives S = 1
  Eq. 1         w_ctr for each clip, without gradient
  SE            one vector for each clip, without biases; --se-reduction 4 as the release (the
                cited block has 16; the paper's 0.014 GFLOPs of SBM fit 16, or no SE)
  convolution   replicate padding
  IDM           no bias and no BatchNorm, as Eq. 7; G^D starts at zero; one IDM: after block 4 of
                layer2, three: after blocks 2, 3, 4
  "evenly"      SBM after blocks 2, 4, 6 of layer3; "Same Pos.": all three after block 6
  pooling       the maximum over the last map of a frame, then the mean over frames (release)
  L_mi          is in a supplement: see mutual_information_loss; it takes the frame vectors after
                the neck (release) through a linear layer (an addition); rows without SBM, for whose
                differences between frames it is made, go without it (release): --lambda2
  triplet       on the embedding after the BN neck, cosine distance, margin 0.3
  backbone      the last stride of ResNet-50 is removed
  an epoch      shows all tracklets, in groups of K of one identity (release): 235 steps on MARS;
                --epoch identities: every identity once, 79 steps
  resizing      bicubic (release)
  test clips    one frame of each of T equal parts, in order, as in training; every frame is used,
                some twice where T does not divide the length (10 frames: 3 clips of 4)
  pieces        LS-VID's training tracklets are cut into pieces of 48 frames (release): --chunk 0
  Table 3       at both IDM places Non-local with half the channels, GC block with reduction 16;
                Non-local (1): the mean over all positions; (inverse): softmax of -affinity
  GFLOPs        no count of matrix products gives the 1.081 that Sec. 4.5 prints for two IDMs (ours:
                1.074), and no place and width that we tried the 2.216 for two Non-local blocks
  Fig. 5        gives only the peaks, k = 3 and reduction 4; the other values, and the network
                without the other module, are our guess

The authors' release departs from the paper's equations. --release follows it in these points, which
its trained networks need, and sets --reduction 16 --lambda2 0.001 --scale window --pool max:
  IDM           BN(G^I F), BN(L^I y), a ReLU at the end, biases; reduction 16 (Fig. 5b: 4 is best)
  CPM           means, those of the later frames weighted by 1 - S, where Eq. 5-6 have sums
  SE            has biases, and so has the classifier
  the stem      pools without padding: 63x31 maps of 256x128 frames, not 64x32
  L_mi          0.001 times its sum over the identities of a batch, not 0.01 times its mean
It also departs here, which --release does not follow:
  batches       of 8 groups, of which about 7 % hold one identity twice; BatchNorm's statistics are
                those of half a batch, on each of two GPUs
  random parts  training clips: T parts of floor(n / T) frames, the last one with the remainder
  test clips    a tracklet is filled up to a multiple of T with copies of its last frames
  erasing       another box in each frame, with 1 - p as the probability
  results       of the best epoch on the test set; here of the last epoch
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from common import (Release, Row, Run, at_least_float32, batch_hard_triplet, command_line, energy,
                    figures, gather, load_network, overlays, plan, run_script, watch)
from data import PKSampler, load_dataset, normalize, sample_segments, split_segments


# ---------------------------------------------------------------- Sec. 3.1: salient-to-broad module

class ChannelAttentionLayer(nn.Module):
    """CAL, Eq. 1-2: keeps the channels that look at the centre, weighed by squeeze-and-excitation.

    X (B, T, C, H, W), H, W >= 3 -> w_ctr w_se (B, 1, C, 1, 1). Raises ValueError for smaller maps
    and for an impossible reduction.

    Args:
        channels: C.
        reduction: C is divided by it inside the squeeze-and-excitation, 1 to C.
        release: True gives its two layers biases, as the authors' release has them.
    """

    def __init__(self, channels, *, reduction=4, release=False):
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"CAL takes a reduction of 1 to {channels}, not {reduction}")
        self.squeeze = nn.Linear(channels, channels // reduction, bias=release)
        self.excite = nn.Linear(channels // reduction, channels, bias=release)

    def forward(self, x):
        _, T, _, H, W = x.shape
        if min(H, W) < 3:
            raise ValueError(f"CAL needs maps of at least 3x3, not {H}x{W}")
        dtype = torch.promote_types(x.dtype, torch.float32)
        x_sum = sum(frame.to(dtype) for frame in x.detach().unbind(1))
        from_first = x_sum - x_sum[..., :1, :1]            # all equal: 0 < 0, without rounding
        w_ctr = from_first.mean((2, 3)) < from_first[..., 1:-1, 1:-1].mean((2, 3))  # Eq. 1
        # the gradient of a sum is cheaper than a mean's; float16 could not hold the sum
        mean = (x.sum((1, 3, 4), dtype=dtype) / (T * H * W)).to(x.dtype)
        w_se = self.excite(self.squeeze(mean).relu()).sigmoid()
        return (w_ctr * w_se)[:, None, :, None, None]


class KernelGenerationModule(nn.Module):
    """KGM: gathers the salient features of the former frames into a k x k kernel, K = P A_p^T.

    P (B, s, C, H, W) -> K (B, k*k, C), the taps in row-major order. kernel_size: k, odd and at
    least 1 (ValueError).
    """

    def __init__(self, channels, kernel_size=3):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"KGM takes an odd kernel size of at least 1, not {kernel_size}")
        taps = kernel_size ** 2
        self.attention = nn.Sequential(
            nn.Conv2d(channels, taps, 1, bias=False), nn.BatchNorm2d(taps), nn.ReLU())

    def forward(self, p):
        a = self.attention(p.flatten(0, 1)).unflatten(0, p.shape[:2])     # (B, s, k*k, H, W)
        a = a.to(torch.promote_types(a.dtype, torch.float32))             # eps is 0 in float16
        a = F.normalize(a, p=1, dim=2)                                    # over the k*k maps,
        a = F.normalize(a.transpose(1, 2).flatten(2), p=1, dim=2)         # then over s*H*W
        return a.to(p.dtype) @ p.movedim(2, 4).flatten(1, 3)              # K = P A_p^T


def conv_by_matmul(q, kernel):
    """Q * K: the frames (B, L, C, H, W) convolved with their clip's kernel (B, k*k, C), replicate
    padding -> (B*L, H, W), at least float32.

    The response of every pixel to every tap is one matrix product; the shifted taps are added.
    """
    (B, L, C, H, W), k = q.shape, math.isqrt(kernel.shape[1])
    taps = q.movedim(2, 4).reshape(B, L * H * W, C) @ kernel.transpose(1, 2)
    taps = taps.to(torch.promote_types(taps.dtype, torch.float32)).view(B * L, H, W, k * k)
    for dim, size in ((1, H), (2, W)):         # torch.compile cannot take F.pad's (2.15)
        places = torch.arange(-(k // 2), size + k // 2, device=taps.device).clamp(0, size - 1)
        taps = taps.index_select(dim, places)
    return sum(taps[:, i // k:i // k + H, i % k:i % k + W, i] for i in range(k * k))


class SuppressOperation(nn.Module):
    """SO, Eq. 3-4: damps the later frames where they respond to the kernel of the former ones.

    Q (B, L, C, H, W), K (B, k*k, C) -> S (B, L, 1, H, W) in (0, 1].
    Copied with conv_by_matmul. Raises ValueError for another beta or scale.

    Args:
        beta: strength of the suppression, above 0.
        scale: how the response of Eq. 3 is scaled before the softmax. "none": not at all, as the
            paper prints it. "window": divided by k^2, so that it is a mean over the window, as in
            the authors' release. "window+channels": divided by sqrt(C), too, which a network needs
            that starts from random weights.
    """

    def __init__(self, *, beta=5.0, scale="window"):
        super().__init__()
        if not 0 < beta < math.inf:
            raise ValueError(f"SO takes a beta above 0, not {beta}")
        if scale not in ("none", "window", "window+channels"):
            raise ValueError(f"SO takes a scale of none, window or window+channels, not {scale}")
        self.beta = beta
        self.scale = scale

    def forward(self, q, kernel):
        B, L, C, H, W = q.shape
        taps = kernel.shape[1]
        # the kernel is divided before the product, whose sums float16 could not hold otherwise
        response = conv_by_matmul(q, kernel / (taps * math.sqrt(C)))              # Q * K
        if self.scale == "window":
            response = response * math.sqrt(C)
        elif self.scale == "none":
            response = response * taps * math.sqrt(C)
        # R = softmax(Q * K)                                                      # Eq. 3
        # S = exp(beta * min(1 / (H W R) - 1, 0))                                 # Eq. 4
        # from log R, so that a vanishing R gives no 0 * inf
        log_r = response.flatten(1).log_softmax(1)
        s = torch.exp(self.beta * torch.expm1((-log_r - math.log(H * W)).clamp(max=0)))
        return s.view(B, L, 1, H, W).to(q.dtype)


class CrossPropagationModule(nn.Module):
    """CPM, Eq. 5-6: former frames get what suppression took from the later ones, and the later ones
    get what the former frames show.

    Former X (B, s, C, H, W), later X (B, L, C, H, W), their suppression S (B, L, 1, H, W)
    -> Z (B, s + L, C, H, W).

    Args:
        alpha: degree of the propagation, 0 for none.
        release: False takes the sums of Eq. 5-6. True takes means, as the authors' release does:
            over the former frames, and over the later positions weighted by 1 - S.
    """

    def __init__(self, *, alpha=0.1, release=False):
        super().__init__()
        self.alpha = alpha
        self.release = release

    def forward(self, former, later, s):
        def gap(x):                                     # summed over the frames
            dtype = torch.promote_types(x.dtype, torch.float32)   # float16 cannot hold the sum
            return x.sum((1, 3, 4), True, dtype=dtype) / (x.shape[3] * x.shape[4])
        y = s * later
        lost, seen = gap(later) - gap(y), gap(former)                             # Eq. 5, 6
        if self.release:
            lost = lost / gap(1 - s).clamp(min=1e-6)
            seen = seen / former.shape[1]
        lost = lost.expand(-1, former.shape[1], -1, -1, -1)
        seen = seen.expand(-1, later.shape[1], -1, -1, -1)
        z = torch.cat([former.movedim(2, 4), y.movedim(2, 4)], 1)         # stays channels_last
        z.add_(self.alpha * torch.cat([lost, seen], 1).movedim(2, 4))             # Eq. 5-6
        return z.movedim(4, 2)


class SalientToBroadModule(nn.Module):
    """SBM, Fig. 2: the frames after the first s attend to broader regions than the first s do.

    X (B, T, C, H, W) -> Z (B, T, C, H, W), T > split, H and W at least 3 (any size without CAL).
    Copied with the four classes above and conv_by_matmul. Raises ValueError for an impossible
    split, kernel_size, beta or reduction.

    Args:
        channels: C.
        split: s, the number of former frames.
        kernel_size: k, odd.
        beta: strength of the suppression, above 0.
        alpha: degree of the propagation.
        reduction: of CAL's squeeze-and-excitation, 1 to C.
        cal: False leaves CAL out.
        cpm: False leaves CPM out.
        scale: of the response in Eq. 3, see SuppressOperation.
        release: True takes CAL and CPM as the authors' release has them.
    """

    def __init__(self, channels, split, *, kernel_size=3, beta=5.0, alpha=0.1, reduction=4,
                 cal=True, cpm=True, scale="window", release=False):
        super().__init__()
        if split < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"SBM needs split >= 1 and an odd k, not {split} and {kernel_size}")
        self.channels = channels
        self.split = split
        self.cal = None
        if cal:
            self.cal = ChannelAttentionLayer(channels, reduction=reduction, release=release)
        self.kgm = KernelGenerationModule(channels, kernel_size)
        self.so = SuppressOperation(beta=beta, scale=scale)
        self.cpm = CrossPropagationModule(alpha=alpha if cpm else 0.0, release=release)

    def forward(self, x):
        s = self.split
        if x.shape[1] <= s:
            raise ValueError(f"SBM with split {s} needs more than {s} frames, not {x.shape[1]}")
        if x.shape[2] != self.channels:
            raise ValueError(f"SBM was built for {self.channels} channels, not {x.shape[2]}")
        parts = x.movedim(2, 4).split((s, x.shape[1] - s), 1)             # stays channels_last
        former, later = (part.movedim(4, 2) for part in parts)
        w = self.cal(x) if self.cal else x.new_ones(1, 1, x.shape[2], 1, 1)
        kernel = self.kgm(w * former)                                     # P = w X, Eq. 2
        damped = self.so(later, w[..., 0, 0] * kernel)                    # (w X) * K = X * (w K)
        return self.cpm(former, later, damped)


# ---------------------------------------------------- Sec. 3.2: integration and distribution module

class IntegrationDistributionModule(nn.Module):
    """IDM, Eq. 7: F' = G^D G^I F (L^I L^D + I), plus F; mixes channels (G) and all positions (L).

    X (B, T, C, H, W) -> (B, T, C, H, W), only of the m = T*H*W it was built for (ValueError).
    Starts as identity; with release as ReLU, which leaves a stage's maps as they are.

    Args:
        channels: C.
        frames, height, width: T, H, W.
        reduction: c / c' and m / m', 1 to the smaller one of C and m = T*H*W (ValueError).
        release: True takes the form of the authors' release, y = BN(G^I F),
            F' = ReLU(G^D (L^D BN(L^I y) + y) + F), with biases where no BatchNorm follows.
    """

    def __init__(self, channels, frames, height, width, *, reduction=4, release=False):
        super().__init__()
        m = frames * height * width
        if not 1 <= reduction <= min(channels, m):
            raise ValueError(f"IDM takes a reduction of 1 to {min(channels, m)}, for {channels} "
                             f"channels and {m} positions, not {reduction}")
        inner, inner_m = channels // reduction, m // reduction
        self.g_i = nn.Conv2d(channels, inner, 1, bias=False)
        self.l_i = nn.Linear(m, inner_m, bias=False)
        self.l_d = nn.Linear(inner_m, m, bias=release)
        self.g_d = nn.Conv2d(inner, channels, 1, bias=release)
        # Eq. 7 is linear: it has neither BatchNorm nor ReLU
        self.bn_g = nn.BatchNorm2d(inner) if release else nn.Identity()
        self.bn_l = nn.BatchNorm1d(inner_m) if release else nn.Identity()
        self.relu = nn.ReLU() if release else nn.Identity()
        nn.init.zeros_(self.g_d.weight)
        if release:
            nn.init.zeros_(self.g_d.bias)

    def forward(self, x):
        B, T, C, H, W = x.shape
        if T * H * W != self.l_i.in_features:
            raise ValueError(f"IDM was built for {self.l_i.in_features} positions, not {T}x{H}x{W}")
        if C != self.g_i.in_channels:
            raise ValueError(f"IDM was built for {self.g_i.in_channels} channels, not {C}")
        f = self.bn_g(self.g_i(x.flatten(0, 1)))                                  # G^I F
        f = f.view(B, T, -1, H, W).transpose(1, 2).flatten(2)             # (B, c', m)
        mixed = self.bn_l(self.l_i(f).transpose(1, 2)).transpose(1, 2)            # L^I
        f = self.l_d(mixed) + f                                                   # (L^I L^D + I)
        f = f.view(B, -1, T, H, W).transpose(1, 2).flatten(0, 1)
        return self.relu(self.g_d(f).view(B, T, C, H, W) + x)                     # G^D, Eq. 7


# ----------------------------------------------- Sec. 4.5, Table 3: what stands at the IDMs' places

class NonLocalBlock(nn.Module):
    """Non-local block (Wang et al., CVPR 2018) over all positions of a clip.

    X (B, T, C, H, W) -> (B, T, C, H, W). affinity: "softmax" (embedded Gaussian), "ones" (mean over
    all positions) or "inverse" (softmax of the negated affinity). Starts as identity.
    """

    def __init__(self, channels, affinity="softmax"):
        super().__init__()
        self.affinity = affinity
        if affinity != "ones":
            self.theta = nn.Conv2d(channels, channels // 2, 1)
            self.phi = nn.Conv2d(channels, channels // 2, 1)
        self.g = nn.Conv2d(channels, channels // 2, 1)
        self.out = nn.Sequential(nn.Conv2d(channels // 2, channels, 1), nn.BatchNorm2d(channels))
        nn.init.zeros_(self.out[1].weight)

    def forward(self, x):
        B, T, C, H, W = x.shape

        def positions(layer):                                             # (B, 1, m, C/2)
            y = layer(x.flatten(0, 1)).view(B, T, -1, H, W)
            return y.movedim(2, 4).reshape(B, 1, T * H * W, -1)
        g = positions(self.g)
        if self.affinity == "ones":
            y = g.mean(2, keepdim=True).expand_as(g)
        else:
            theta = -positions(self.theta) if self.affinity == "inverse" else positions(self.theta)
            y = F.scaled_dot_product_attention(theta, positions(self.phi), g, scale=1.0)
        y = y.reshape(B * T, H, W, -1).movedim(3, 1)
        return self.out(y).view(B, T, C, H, W) + x


class GlobalContextBlock(nn.Module):
    """GC block (Cao et al., ICCVW 2019) over all positions of a clip.

    X (B, T, C, H, W) -> (B, T, C, H, W). Starts as identity. reduction: 1 to C (ValueError).
    """

    def __init__(self, channels, reduction=16):
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"a GC block takes a reduction of 1 to {channels}, not {reduction}")
        inner = channels // reduction
        self.mask = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(nn.Linear(channels, inner), nn.LayerNorm(inner), nn.ReLU(),
                                       nn.Linear(inner, channels))
        nn.init.zeros_(self.transform[3].weight)
        nn.init.zeros_(self.transform[3].bias)

    def forward(self, x):
        B, T, C, H, W = x.shape
        dtype = torch.promote_types(x.dtype, torch.float32)
        a = self.mask(x.flatten(0, 1)).view(B, -1).softmax(1, dtype)              # (B, m)
        context = torch.einsum("btchw,bthw->bc", x, a.to(x.dtype).view(B, T, H, W))
        return x + self.transform(context)[:, None, :, None, None]


# ---------------------------------------------------------------------------- Sec. 3.3: the network

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


class SINet(nn.Module):
    """SINet, Fig. 4: ResNet-50, IDMs after blocks 2 and 4 of layer2, SBMs after blocks 2, 4 and 6
    of layer3, pooled over space and time, and a BN neck. Copied with classes and functions above.

    Clips (B, T, 3, H, W), normalised -> in eval mode embeddings (B, 2048); in train mode also the
    logits (B, num_classes) and the projected frame embeddings (B, T, 2048) for L_mi. Raises
    ValueError for sizes and settings that do not go together.

    Args:
        num_classes: number of training identities.
        frames, height, width: T, H, W; an IDM fixes all three.
        sbm: False leaves the SBMs out.
        idms: number of IDMs, 0 to 3.
        positions: blocks of layer3, 1 to 6, each with an SBM after it.
        splits: s of each SBM.
        cal, cpm: False leaves this component out of the SBMs.
        kernel_size, beta, alpha, scale: of the SBMs, see SalientToBroadModule.
        se_reduction: of the SBMs' squeeze-and-excitation.
        block: what stands at the IDMs' places: "idm", "softmax", "ones" or "inverse" (Non-local
            with this affinity), "gc" (GC block).
        reduction: of the IDMs.
        project: False leaves out the projection for L_mi.
        pool: "max" or "avg", over the positions of a frame's last map.
        weights: of the backbone, see resnet50.
        release: True takes the form of the authors' release, which their trained weights need: IDM,
            CAL and CPM as there, the stem's pooling without padding, a classifier with a bias.
    """

    def __init__(self, num_classes, frames=4, height=256, width=128, *, sbm=True, idms=2,
                 positions=(2, 4, 6), splits=(1, 2, 3), cal=True, cpm=True, kernel_size=3, beta=5.0,
                 alpha=0.1, scale="window", se_reduction=4, block="idm", reduction=4, project=True,
                 pool="max", weights="none", release=False):
        super().__init__()
        if sbm and (len(positions) != len(splits) or not set(positions) <= {1, 2, 3, 4, 5, 6}):
            raise ValueError(f"SINet takes a position of 1 to 6 for each split, not {positions} "
                             f"for {splits}")
        if sbm and frames <= max(splits, default=0):
            raise ValueError(f"SBMs with s = {splits} need at least {max(splits) + 1} frames, not "
                             f"{frames}")
        if sbm and cal and min(height, width) < 33:
            raise ValueError(f"CAL needs frames of at least 33x33 pixels, not {height}x{width}")
        if idms not in range(4):
            raise ValueError(f"SINet takes 0 to 3 IDMs, not {idms}")
        net = resnet50(weights)
        if release:
            net.maxpool.padding = 0
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4

        def layer2_size(pixels):                        # of its maps, for so many pixels
            after_conv1 = -(-pixels // 2)
            after_pool = (after_conv1 - 3) // 2 + 1 if release else -(-after_conv1 // 2)
            return -(-after_pool // 2)

        after = {}                                      # "layer2_4": the modules after that block
        for i in ((), (4,), (2, 4), (2, 3, 4))[idms]:
            if block == "idm":
                module = IntegrationDistributionModule(
                    512, frames, layer2_size(height), layer2_size(width), reduction=reduction,
                    release=release)
            elif block == "gc":
                module = GlobalContextBlock(512)
            else:
                module = NonLocalBlock(512, block)
            after[f"layer2_{i}"] = nn.Sequential(module)
        if sbm:
            for i, s in zip(positions, splits):
                modules = after.setdefault(f"layer3_{i}", nn.Sequential())
                modules.append(SalientToBroadModule(
                    1024, s, kernel_size=kernel_size, beta=beta, alpha=alpha, cal=cal, cpm=cpm,
                    reduction=se_reduction, scale=scale, release=release))
        self.after = nn.ModuleDict(after)
        self.pool = pool
        self.neck = nn.BatchNorm1d(2048)
        self.classifier = nn.Linear(2048, num_classes, bias=release)
        nn.init.normal_(self.classifier.weight, std=0.001)
        self.projection = nn.Linear(2048, 2048) if project else None
        if release:
            nn.init.zeros_(self.classifier.bias)
        if release and project:
            nn.init.kaiming_normal_(self.projection.weight, mode="fan_out")
            nn.init.zeros_(self.projection.bias)

    def forward(self, clips):
        B, T = clips.shape[:2]
        x = clips.flatten(0, 1).to(self.neck.weight.dtype)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            for i, block in enumerate(getattr(self, name), 1):
                x = block(x)
                if f"{name}_{i}" in self.after:
                    x = self.after[f"{name}_{i}"](x.unflatten(0, (B, T))).flatten(0, 1)
        x = x.amax((2, 3)) if self.pool == "max" else x.mean((2, 3))
        frames = x.to(self.neck.weight.dtype).view(B, T, -1)
        embedding = self.neck(frames.mean(1))           # TAP
        if not self.training:
            return embedding
        outputs = [embedding, self.classifier(embedding)]
        if self.projection:                             # the frames go through the neck, too
            outputs.append(self.projection(self.neck(frames.transpose(1, 2)).transpose(1, 2)))
        return outputs


# ---------------------------------------------------------------------- Sec. 3.3, Eq. 8: the losses

def mutual_information_loss(frames, pids, temperature=0.07):
    """L_mi of Eq. 8: frames of a clip should tell different things, which the same frames of other
    clips tell, too.

    Our reading: for frame i of a clip, positives are the frames i of its identity's other clips,
    negatives the frames of another index in all its identity's clips; mean over the positive pairs,
    0 without any, of -log(e^{s+/t} / (e^{s+/t} + sum over negatives of e^{s-/t})), s the cosine.

    frames: projected frame embeddings (B, T, D); pids: (B,); temperature: t.
    """
    B, T = frames.shape[:2]
    frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
    z = F.normalize(frames.flatten(0, 1), dim=1)
    s = z @ z.T / temperature
    clip = torch.arange(B, device=s.device).repeat_interleave(T)
    index = torch.arange(T, device=s.device).repeat(B)
    same = pids[clip][:, None] == pids[clip]
    positive = same & (index[:, None] == index) & (clip[:, None] != clip)
    negative = same & (index[:, None] != index)
    # -log(e^a / (e^a + sum e^b)) = log(1 + e^(log sum e^b - a))
    loss = F.softplus(s.masked_fill(~negative, -math.inf).logsumexp(1, keepdim=True) - s)
    return loss.masked_fill(~positive, 0).sum() / positive.sum().clamp(min=1)


def loss_weights(args):
    """The weights in Eq. 8, {name: weight}: L_cent + lambda1 L_tri + lambda2 L_mi."""
    return {"xent": 1.0, "triplet": args.lambda1, "mi": args.lambda2}


def losses(outputs, pids, args):
    """The weighted losses of Eq. 8, {name: scalar}; their sum is minimised.

    With --release L_mi is summed over the identities of the batch, as in the authors' release.
    """
    embedding, logits, *frames = outputs
    parts = {"xent": F.cross_entropy(at_least_float32(logits), pids),
             "triplet": batch_hard_triplet(embedding, pids, args.margin)}
    if frames:
        parts["mi"] = mutual_information_loss(*frames, pids, args.temperature)
        if args.release:
            parts["mi"] = len(pids.unique()) * parts["mi"]
    weights = loss_weights(args)
    return {name: weights[name] * loss for name, loss in parts.items()}


# ---------------------------------------------------------------------------- Sec. 4.2: the recipe

RECIPE = {  # flag: (the paper's value, the small run's, meaning and source[, choices])
    "frames": (4, 4, "T, frames a clip (Sec. 4.2)"),
    "height": (256, 128, "of the resized frames (Sec. 4.2)"),
    "width": (128, 64, "of the resized frames (Sec. 4.2)"),
    "ids": (8, 4, "P, identities a batch (Sec. 4.2)"),
    "clips": (4, 2, "K, clips of each of them (Sec. 4.2)"),
    "epoch": ("tracklets", "identities", "shows all of these (open; the authors' release)",
              ("tracklets", "identities")),
    "erase": (0.5, 0.0, "probability of random erasing (Sec. 4.2)"),
    "epochs": (160, 8, "(Sec. 4.2)"),
    "lr": (3e-4, 5e-4, "learning rate of Adam (Sec. 4.2)"),
    "lr_step": (40, 7, "lr is divided by 10 every so many epochs (Sec. 4.2)"),
    "weight_decay": (5e-4, 5e-4, "of Adam (Sec. 4.2)"),
    "weights": ("imagenet", "none", "backbone: imagenet, none or a file (Sec. 3.3)"),
    "pool": ("max", "max", "over the final map (open; the authors' release)", ("max", "avg")),
    "sbm": (True, True, "with SBMs (Table 2)"),
    "positions": ((2, 4, 6), (2, 4, 6), "blocks of layer3 with an SBM behind (Sec. 3.3, Table 3)"),
    "splits": ((1, 2, 3), (1, 2, 3), "s of each SBM (Sec. 3.3)"),
    "k": (3, 3, "kernel size of SBM, odd (Sec. 4.2, Fig. 5a)"),
    "beta": (5.0, 5.0, "strength of the suppression (Eq. 4, Sec. 4.2)"),
    "scale": ("window", "window+channels", "divide the response of Eq. 3 by k^2 (the authors' "
              "release), by k^2 sqrt(c), or not (printed)", ("none", "window", "window+channels")),
    "alpha": (0.1, 0.1, "degree of CPM's propagation (Eq. 5-6, Sec. 3.1)"),
    "cal": (True, True, "with CAL (Table 3)"),
    "cpm": (True, True, "with CPM (Table 3)"),
    "se_reduction": (4, 4, "of CAL's squeeze-and-excitation (our choice)"),
    "idms": (2, 2, "number of IDMs, 0 to 3 (Sec. 3.3, Table 3)", range(4)),
    "reduction": (4, 4, "c/c' and m/m' of IDM (Fig. 5b)"),
    "block": ("idm", "idm", "in IDM's place (Table 3)",
              ("idm", "softmax", "ones", "inverse", "gc")),
    "lambda1": (1.0, 1.0, "weight of the triplet loss (Eq. 8, Sec. 4.2)"),
    "release": (False, False, "modules as in the authors' release, for its weights (changed)"),
    "lambda2": (0.01, 0.01, "weight of L_mi (Eq. 8, Sec. 4.2); 0: without its projection"),
    "temperature": (0.07, 0.07, "t of L_mi (our choice)"),
    "margin": (0.3, 0.3, "of the triplet loss, cosine distance (our choice)"),
}
SAMPLER = PKSampler            # a batch: K clips of each of P identities
SAMPLE = sample_segments       # a training clip: one random frame of each of T equal parts
SPLIT = split_segments         # the test: all frames, in clips of one frame of each of T parts
METRIC = "cosine"              # distance of the test, between means of the clips' embeddings

ROWS = {  # place in the paper; settings of the recipe that a row names; (mAP, rank-1) as printed
    "sinet": Row("Tables 1-3: SINet, base. + SBM + IDM", sbm=True, idms=2, mars=(86.2, 91.0),
                 lsvid=(79.6, 87.4), ilids=(None, 92.5), prid=(None, 96.5)),
    "base": Row("Tables 2, 3: base.", sbm=False, idms=0, lambda2=0.0, mars=(83.2, 88.6),
                lsvid=(73.3, 82.8)),
    "base+sbm": Row("Tables 2, 3: base. + SBM", sbm=True, idms=0, mars=(85.7, 90.2),
                    lsvid=(77.1, 85.1), more_gflops=0.014),
    # Table 3 prints 85.8 mAP for it, "+ 2 IDM"
    "base+idm": Row("Table 2: base. + IDM", sbm=False, idms=2, lambda2=0.0, mars=(85.9, 90.5),
                    lsvid=(78.0, 86.2), more_gflops=1.081),
    "base+nonlocal": Row("Table 3: base. + Non-local", sbm=False, idms=2, lambda2=0.0,
                         block="softmax", mars=(85.1, 89.7), more_gflops=2.216),
    "base+nonlocal-ones": Row("Table 3: base. + Non-local (1)", sbm=False, idms=2, lambda2=0.0,
                              block="ones", mars=(85.1, 90.0)),
    "base+nonlocal-inverse": Row("Table 3: base. + Non-local (inverse)", sbm=False, idms=2,
                                 lambda2=0.0, block="inverse", mars=(85.0, 89.7)),
    "base+gc": Row("Table 3: base. + GC block", sbm=False, idms=2, lambda2=0.0, block="gc",
                   mars=(85.0, 89.8)),
    "base+sbm-cal": Row("Table 3: base. + SBM w/o CAL", sbm=True, idms=0, cal=False,
                        mars=(85.1, 89.9)),
    "base+sbm-cpm": Row("Table 3: base. + SBM w/o CPM", sbm=True, idms=0, cpm=False,
                        mars=(85.4, 90.0)),
    "base+sbm-samepos": Row("Table 3: base. + SBM (Same Pos.)", sbm=True, idms=0,
                            positions=(6, 6, 6), mars=(85.3, 89.5)),
    "base+1idm": Row("Table 3: base. + 1 IDM", sbm=False, idms=1, lambda2=0.0, mars=(85.7, 89.8)),
    "base+2idm": Row("Table 3: base. + 2 IDM (Default)", sbm=False, idms=2, lambda2=0.0,
                     mars=(85.8, 90.5)),
    "base+3idm": Row("Table 3: base. + 3 IDM", sbm=False, idms=3, lambda2=0.0, mars=(85.8, 90.5)),
    "base+sbm-k1": Row("Fig. 5a: kernel size of SBM, k = 1", sbm=True, idms=0, k=1),
    "base+sbm-k3": Row("Fig. 5a: kernel size of SBM, k = 3", "base+sbm"),
    "base+sbm-k5": Row("Fig. 5a: kernel size of SBM, k = 5", sbm=True, idms=0, k=5),
    "base+sbm-k7": Row("Fig. 5a: kernel size of SBM, k = 7", sbm=True, idms=0, k=7),
    "base+idm-r2": Row("Fig. 5b: reduction in IDM, 2", sbm=False, idms=2, lambda2=0.0, reduction=2),
    "base+idm-r4": Row("Fig. 5b: reduction in IDM, 4", "base+2idm"),
    "base+idm-r8": Row("Fig. 5b: reduction in IDM, 8", sbm=False, idms=2, lambda2=0.0, reduction=8),
    "base+idm-r16": Row("Fig. 5b: reduction in IDM, 16", sbm=False, idms=2, lambda2=0.0,
                        reduction=16),
}


# ----------------------------------------------------- the trained networks of the authors' release

RELEASED_LAYERS = {  # name of a layer in the authors' networks: its name here
    "conv1": "stem.0",
    "bn1": "stem.1",
    "bn": "neck",
}
RELEASED_PARTS = {  # the same for the parts of an inserted module: IDM
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


def read_release(state):
    """Converts a network that the authors' release has trained.

    Args:
        state: the state_dict of a file.

    Returns (name of the row in ROWS, {setting: value} as the shapes tell them, state_dict with our
    names), or None if the state_dict is not one of the authors' release.
    """
    if not {"conv1.bias", "bn.weight", "classifier.weight"} <= state.keys():
        return None
    names = released_names(state)
    model = renamed_weights(state, names)
    fold_biases(state, names, model)
    row, settings = released_settings(state, names)
    return row, settings, model


def released_names(state):
    """{name of a layer in the authors' network: its name here}. In their names, an inserted module
    counts as a block of its stage: layer2.2 is the IDM after our layer2.1."""
    layers = {key.rpartition(".")[0] for key in state}
    inserted = set()                                    # "layer2.2", ...
    for layer in layers:
        if layer.startswith("layer"):
            stage, number, part = layer.split(".", 2)
            if part.startswith(("thw_", "kernel")):
                inserted.add(f"{stage}.{number}")
    names = {}
    for layer in layers:
        if not layer.startswith("layer"):
            names[layer] = RELEASED_LAYERS.get(layer, layer)
            continue
        stage, number, part = layer.split(".", 2)
        earlier = {f"{stage}.{i}" for i in range(int(number))}
        blocks_before = len(earlier - inserted)
        if f"{stage}.{number}" in inserted:
            part = RELEASED_PARTS.get(part, part)
            names[layer] = f"after.{stage}_{blocks_before}.0.{part}"
        else:
            names[layer] = f"{stage}.{blocks_before}.{part}"
    return names


def renamed_weights(state, names):
    """The state_dict with our names. The authors' convolutions are 3-D with one frame in time, and
    some of our linear layers are convolutions there."""
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


def fold_biases(state, names, model):
    """Takes the biases out of `model` that our convolutions do not have. The BatchNorm after such a
    convolution has it subtracted from its running mean, which gives the same results."""
    for layer in names:
        if layer.endswith(".0"):
            norm = layer[:-1] + "1"                     # downsample.0: downsample.1
        else:
            norm = layer.replace("conv", "bn")          # conv2: bn2
        if norm != layer and f"{layer}.bias" in state and f"{norm}.running_mean" in state:
            mean = f"{names[norm]}.running_mean"
            model[mean] = model[mean] - model.pop(f"{names[layer]}.bias")


def released_settings(state, names):
    """(name of the row in ROWS, {setting: value}) of the authors' network."""
    places = {name.split(".")[1] for name in names.values() if name.startswith("after.")}
    idms = sum(place.startswith("layer2") for place in places)
    sbm = len(places) > idms
    settings = {"sbm": sbm, "idms": idms}
    for key, value in state.items():
        if key.endswith("chl_reduction.0.weight"):
            settings["reduction"] = value.shape[1] // value.shape[0]
        if key.endswith("se.1.weight"):
            settings["se_reduction"] = value.shape[1] // value.shape[0]
    if "projection.weight" not in state:
        settings["lambda2"] = 0.0
    rows = {  # (with SBMs, number of IDMs): row
        (True, 2): "sinet",
        (True, 0): "base+sbm",
        (False, 2): "base+idm",
        (False, 0): "base",
    }
    return rows.get((sbm, idms), "sinet"), settings


RELEASE = Release(read_release, chunk={"lsvid": 48}, reduction=16, lambda2=0.001, scale="window",
                  pool="max")


def build(args, num_classes):
    """The network of a row; a checkpoint brings its own weights."""
    return SINet(
        num_classes, args.frames, args.height, args.width,
        sbm=args.sbm,
        idms=args.idms,
        positions=args.positions,
        splits=args.splits,
        cal=args.cal,
        cpm=args.cpm,
        kernel_size=args.k,
        beta=args.beta,
        alpha=args.alpha,
        scale=args.scale,
        se_reduction=args.se_reduction,
        block=args.block,
        reduction=args.reduction,
        project=args.lambda2 > 0,
        pool=args.pool,
        weights="none" if args.resume else args.weights,
        release=args.release,
    )


def make_optimizer(model, args):
    return torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)


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


def load(file, **settings):  # same in every script
    """The network of a run's last.pt, in eval mode on the CPU; `.args` has its settings. settings:
    those of the recipe that a file of an earlier version lacks."""
    return load_network(file, build, settings, recipe=RECIPE, rows=ROWS, release=RELEASE,
                        script=__file__)


def main():  # same in every script
    run_script(train, build, recipe=RECIPE, rows=ROWS, release=RELEASE, text=__doc__,
               script=__file__)


# ------------------------------------------------------------------------------------- the picture

def picture(model, clips, frames):
    """For --figure, after Figures 1 and 6: the last map, and what S of each SBM takes away, nothing
    in the former frames."""
    sbms = [m for m in model.modules() if isinstance(m, SalientToBroadModule)]
    (last,), *calls = watch(model, clips, model.layer4[-1], *(sbm.so for sbm in sbms))
    rows = {"last map, over its mean": overlays(frames, energy(last[1]))}
    for n, (sbm, ((_, s),)) in enumerate(zip(sbms, calls), 1):
        maps = [None] * sbm.split + [*1 - s[0, :, 0]]
        rows[f"damped by SBM {n}, s = {sbm.split}: 1 - S"] = overlays(frames, maps, limits=(0, 1))
    return "SINet: where the frames look", rows


if __name__ == "__main__":  # same in every script
    command_line(main)
