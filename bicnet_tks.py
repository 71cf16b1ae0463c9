"""BiCnet-TKS: Learning Efficient Spatial-Temporal Representation for Video Person Re-Identification

Hou, Chang, Ma, Huang, Shan. CVPR 2021. https://arxiv.org/abs/2104.14783
The authors' release: https://github.com/blue-blue272/BiCnet-TKS

A few frames of a clip are seen at full size, for details, the others at half of it, for context and
at a quarter of the cost; one network does both. CSP tells the small frames what the big ones
showed, DAO makes every frame attend to another region, and TKS mixes the frames over time by
kernels of several lengths, selected for every clip and channel.

    python bicnet_tks.py                            # a small run on synthetic data, on any machine
    python bicnet_tks.py --data mars --gpu 0        # the paper's recipe
    python bicnet_tks.py --data mars --plan         # what that would train and test
    python bicnet_tks.py --data mars --gpu 0 --variant tb+csp --shares 1 1  # a row, changed

Sec. 3.1, Eq. 2, Fig. 3    CrossScalePath (CSP), behind stages 1 to 3
Sec. 3.1, Eq. 3, Fig. 3    DiverseAttentionsOperation (DAO), behind stage 3
Sec. 3.1, Eq. 4-5          divergence_loss
Sec. 3.2, Eq. 6-8, Fig. 4  TemporalKernelSelection (TKS), behind stage 2
Sec. 3.1, Eq. 1, Sec. 3.3  BiCnet
Sec. 4.3.1                 losses
Sec. 4.1                   RECIPE; Tables 1 to 6: ROWS
To copy                    each class alone, BiCnet with resnet50 and the other classes

Deviations from the paper (its sentence, what we do, the flag for the paper's form):
  CSP           "after each stage": after stages 1 to 3, as the paper's 27.6 million parameters
                exclude stage 4 (+12.6 million). --csp-stages 1 2 3 4
  Eq. 7         "W_i" is C x C: ours is C -> C/16, shared, BatchNorm, ReLU, then C/16 -> C, as the
                paper's parameters exclude C x C (61.2 million with TKS after stage 4, the paper has
                53.5). --no-bottleneck
  excite        "E_t = U(Z_t) + F_t": Z goes through a BatchNorm before, which starts at zero, so
                that training starts from the backbone. --no-excite-bn

Unspecified in the paper; our choice (the authors' release is named where the choice follows it):
  small frames  frames are resized, as the text says, bilinear with antialiasing (the paper's
                GFLOPs of two branches fit frames resized behind the first convolution)
  CSP           big frame m feeds the small frames alpha m ... alpha m + alpha - 1; no bias; before
                TKS and DAO of the same stage
  DAO           k > 1: 1x1 convolution C -> 1, then H W -> H W, no bias; own modules of each branch
  its residual  D_k + BN(sum over positions of A_k * D_k), BN starting at zero (release), as
                D_k + A_k * D_k would change D_k by 1 / (H W) only
  Eq. 5         mean of the two branches, 0 for a branch of one frame, weight 0.01; its gradient
                goes on into the backbone, and for A_1, which has no parameters, only there
  TKS           over all N frames in their order, big ones first; zeros before and after them
  its grid      4 x 2 regions of a frame, as the text says, for frames of either size; the paper's
                GFLOPs fit regions of 4 x 2 pixels (with TKS after stage 2: --grid 8 8)
  one kernel    Eq. 7 gives g = 1, so that W_i is left out
  shared        BatchNorm's weights, and the running averages, into which both branches' batches go
                one by one. --own-statistics: a pair of averages
  Tables 3, 4   clips of 9 for alpha = 2 and for three branches, 10 for alpha = 4 (8 do not divide)
  pooling       the maximum over the last map of a frame, then the mean over frames (release)
  triplet       on the embedding after a BN neck, cosine distance, margin 0.5
  short         a tracklet of fewer than 32 frames gives 8 different ones at random, in order; one
                of fewer than 8 some of them twice or more (release)
  augmentation  a flip and one box to erase, each with probability 0.5, for all frames of a clip
  resizing      bicubic (release)
  pieces        training tracklets are cut into pieces of 32 frames on Duke, 64 on LS-VID (release):
                --chunk 0
  test clips    the last is filled by cycling the tracklet: of 10 frames 1-8, and 9, 10, 1-6
  an epoch      shows all tracklets, in groups of K of one identity (release): 117 steps on MARS;
                --epoch identities: every identity once, 40 steps

The authors' release departs from the paper's text here; we follow the text:
  big frames    are frames 1 and 5 of eight, each leading its four; the text: the first N/(1+alpha)
  small frames  are halved by maximum pooling after the stem; the text: resized before the network
  DAO           works on 8 stripes, means over the width: A_1 the softmax of the channels' mean, the
                others a 1x1 convolution to one map, an 8x8 matrix with a bias, BatchNorm, softmax
  Eq. 4-5       |P P^T - I| / 4 with square roots of P for each pair of the four small frames' maps,
                of the small branch alone, A_1 without gradient
  LS-VID        a contrastive loss in the triplet loss' place, with s the cosine: the mean over the
                positives of -log(e^16s+ / (e^16s+ + sum over other identities of e^16s-)); so the
                paper's 75.1 / 84.6 come from another loss than the one the paper names
  batches       of 16 groups, of which about 7 % hold one identity twice
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
    """CSP, Eq. 2: adds what the big frames show to the small ones.

    F_D (B, M, C, H, W), H and W even, and F_C (B, alpha * M, C, H / 2, W / 2) -> as F_C.
    alpha: small frames for each big one, an integer >= 1. Raises ValueError for other sizes.
    """

    def __init__(self, channels, alpha):
        super().__init__()
        self.conv = nn.Conv2d(channels, alpha * channels, 1, bias=False)          # W_c

    def forward(self, big, small):
        M, C, H, W = big.shape[1:]
        out, inputs = self.conv.weight.shape[:2]
        fits = M * out // inputs, inputs, H // 2, W // 2
        if C != inputs or H % 2 or W % 2 or small.shape[1:] != fits:
            raise ValueError(f"CSP with alpha = {out // inputs} takes {inputs} channels, even H "
                             f"and W and small frames of {fits} to big ones of {(M, C, H, W)}, not "
                             f"{tuple(small.shape[1:])}")
        # F_D' = R(W_c * P(F_D)), where R keeps the channels last, as in memory    # Eq. 2
        x = self.conv(F.max_pool2d(big.flatten(0, 1), 2)).movedim(1, 3)   # (B M, H/2, W/2, alpha C)
        x = x.unflatten(3, (-1, small.shape[2])).movedim(3, 1)           # (B M, alpha, H/2, W/2, C)
        return small + x.reshape(small.movedim(2, 4).shape).movedim(4, 2)  # F_C + F_D'


class DiverseAttentionsOperation(nn.Module):
    """DAO, Fig. 3 (b), Eq. 3: an attention module for each frame of a branch, which divergence_loss
    drives apart.

    D (B, M, C, H, W) -> the same shape, and the attention maps A (B, M, H, W), each with sum 1.
    frames, height, width: M, H, W, no others (ValueError). Starts as identity.
    """

    def __init__(self, channels, frames, height, width):
        super().__init__()
        self.size = frames, channels, height, width
        positions = height * width
        self.attention = nn.ModuleList(                                   # of the frames k > 1
            nn.Sequential(nn.Conv2d(channels, 1, 1, bias=False), nn.Flatten(),
                          nn.Linear(positions, positions, bias=False))
            for _ in range(frames - 1))
        self.bn = nn.BatchNorm1d(channels)
        nn.init.zeros_(self.bn.weight)

    def forward(self, d):
        if d.shape[1:] != self.size:
            raise ValueError(f"DAO was built for (M, C, H, W) = {self.size}, not "
                             f"{tuple(d.shape[1:])}")
        scores = [d[:, 0].mean(1).flatten(1)]                             # (1 / C) sum_c (D_1)_c
        for k, module in enumerate(self.attention, 1):
            scores.append(module(d[:, k]))
        a = torch.stack(scores, 1)
        a = a.softmax(2, torch.promote_types(a.dtype, torch.float32))             # Eq. 3
        attended = (d.flatten(3) @ a.to(d.dtype)[..., None])[..., 0]      # sum of A_k * D_k
        attended = self.bn(attended.flatten(0, 1)).to(d.dtype)
        return d + attended.view(*d.shape[:3], 1, 1), a.unflatten(2, d.shape[3:])


def divergence_loss(a):
    """L of Eq. 4-5 for the attention maps (B, M, H, W) of a branch, mean over the batch: -1 for
    disjoint maps, higher for similar ones; similarity is the dot product. 0 for M = 1."""
    a = a.flatten(2)
    l_div = 1 - a @ a.transpose(1, 2)                                             # Eq. 4
    # L = -1 / (M - 1) sum_{k >= 2} (1 / (k - 1) sum_{l < k} L_div(A_k | A_l))    # Eq. 5
    means = [l_div[:, k, :k].mean(1) for k in range(1, a.shape[1])]
    return -torch.stack(means).mean() if means else a.new_zeros(())


# -------------------------------------------------------------- Sec. 3.2: temporal kernel selection

class TemporalKernelSelection(nn.Module):
    """TKS, Fig. 4, Eq. 6-8: temporal convolutions of several lengths, mixed by weights made for
    every clip and channel.

    Maps F (B, T_i, C, H_i, W_i) of one or more branches, consecutive in time -> a list of maps E of
    the same shapes; h, w divide all H_i, W_i (ValueError).
    kernels: lengths in frames, odd, >= 3, of 3 taps, dilated; grid: h, w; select: False mixes by
    the mean ("TK" of Table 2); bottleneck: W_i through C / reduction channels, reduction of 1 to C
    (False: C x C, as printed); excite_bn: BatchNorm before the residual, with which TKS starts as
    identity (False: none, as printed). Raises ValueError for what it cannot take.
    """

    def __init__(self, channels, kernels=(3, 5), grid=(4, 2), reduction=16, select=True,
                 bottleneck=True, excite_bn=True):
        super().__init__()
        if not kernels or any(k < 3 or k % 2 == 0 for k in kernels):
            raise ValueError(f"TKS takes odd kernels of at least 3 frames, not {tuple(kernels)}")
        if len(grid) != 2 or min(grid) < 1 or not 1 <= reduction <= channels:
            raise ValueError("TKS takes a grid of h and w >= 1 and a reduction of 1 to "
                             f"{channels}, not {tuple(grid)} and {reduction}")
        self.grid = tuple(grid)
        self.paths = nn.ModuleList(
            nn.Conv1d(channels, channels, 3, dilation=k // 2, padding=k // 2, bias=False)
            for k in kernels)
        self.squeeze, self.w = nn.Identity(), None
        if select and len(kernels) > 1:
            inner = channels // reduction if bottleneck else channels
            if bottleneck:
                self.squeeze = nn.Sequential(
                    nn.Linear(channels, inner, bias=False), nn.BatchNorm1d(inner), nn.ReLU())
            self.w = nn.Linear(inner, len(kernels) * channels, bias=False)        # W_1 ... W_K
        self.bn = nn.BatchNorm1d(channels) if excite_bn else nn.Identity()
        if excite_bn:
            nn.init.zeros_(self.bn.weight)

    def partition(self, f):
        """F (B, T, C, H, W) -> X (B, T, C, h, w), the mean of each region."""
        h, w = self.grid
        if f.shape[3] % h or f.shape[4] % w:
            raise ValueError(f"TKS divides maps into {h}x{w} equal regions, which "
                             f"{f.shape[3]}x{f.shape[4]} does not allow")
        region = f.shape[3] // h, f.shape[4] // w
        return F.avg_pool2d(f.flatten(0, 1), region).unflatten(0, f.shape[:2])

    def selection_weights(self, y):
        """Paths Y (B, K, C, P), P = h w T -> g (B, K, C), with sum 1 over the K paths."""
        if self.w is None:
            return y.new_full(y.shape[:3], 1 / y.shape[1])
        u = y.sum(1).mean(2)                                                      # Eq. 6
        # g_i = exp(W_i u) / sum_j exp(W_j u)                                     # Eq. 7
        w_u = self.w(self.squeeze(u)).unflatten(1, y.shape[1:3])
        return w_u.softmax(1, torch.promote_types(w_u.dtype, torch.float32)).to(y.dtype)

    def forward(self, *maps):
        h, w = self.grid
        channels = self.paths[0].in_channels
        if any(f.shape[2] != channels for f in maps):
            raise ValueError(f"TKS was built for {channels} channels, not "
                             f"{[f.shape[2] for f in maps]}")
        x = torch.cat([self.partition(f) for f in maps], 1)               # (B, T, C, h, w)
        B, T, C = x.shape[:3]
        x = x.permute(0, 3, 4, 2, 1).reshape(B * h * w, C, T)             # a sequence a region
        y = [path(x).view(B, h * w, C, T).transpose(1, 2).flatten(2) for path in self.paths]
        y = torch.stack(y, 1)                                             # (B, K, C, h w T)
        # Z = sum_i R(g_i) * Y_i                                                  # Eq. 8
        z = torch.einsum("bkc,bkcp->bcp", self.selection_weights(y), y)
        z = self.bn(z).to(x.dtype).view(B, C, h, w, T).permute(0, 4, 1, 2, 3)
        out = []
        for f, z_i in zip(maps, z.split([f.shape[1] for f in maps], 1)):
            z_i = z_i.repeat_interleave(f.shape[3] // h, 3)               # U: nearest neighbour
            z_i = z_i.repeat_interleave(f.shape[4] // w, 4)
            out.append(f + z_i)                                           # E = U(Z) + F
        return out


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


class BranchBatchNorm(nn.Module):
    """BatchNorm2d with weights that all branches share and running averages for each of them.

    (B * M, C, H, W) -> the same shape, with frames as batch: it replaces a BatchNorm2d of the
    backbone. bn: that one; branches: their number. `branch`: whose frames come next, from 0.
    """

    def __init__(self, bn, branches):
        super().__init__()
        self.of = nn.ModuleList(copy.deepcopy(bn) for _ in range(branches))
        for own in self.of:
            own.weight, own.bias = bn.weight, bn.bias
        self.branch = 0

    def forward(self, x):
        return self.of[self.branch](x)


class BiCnet(nn.Module):
    """BiCnet-TKS, Fig. 3 (a): one ResNet-50 for the big and the small frames of a clip, with CSP,
    TKS and DAO between its stages, and a BN neck.

    Clips (B, N, 3, H, W), normalised -> in eval mode embeddings (B, 2048); in train mode also the
    logits (B, num_classes) and the attention maps A (B, M, h, w) of each branch.

    frames, height, width: N, H, W. shares: how the frames divide over branches of 1, 1/2, 1/4 ...
    of the size, (1, alpha) in the paper; csp, dao: False leaves them out; csp_stages, tks: stages,
    1 to 4, with a CSP or a TKS behind; kernels, select, grid, reduction, bottleneck, excite_bn: see
    TKS; pool: "max" or "avg" over the final map; weights: see resnet50; own_statistics: BatchNorm's
    running averages for each branch alone. Raises ValueError for what it cannot take.
    """

    def __init__(self, num_classes, frames=8, height=256, width=128, shares=(1, 3),
                 csp=True, dao=True, tks=(2,), kernels=(3, 5), select=True, grid=(4, 2),
                 pool="max", weights="none", csp_stages=(1, 2, 3), reduction=16, bottleneck=True,
                 excite_bn=True, own_statistics=False):
        super().__init__()
        ratio, total = ":".join(map(str, shares)), sum(shares)
        csp_stages = csp_stages if csp else ()
        for name, stages in (("TKS", tks), ("CSP", csp_stages)):
            if len(set(stages)) < len(stages) or not set(stages) <= {1, 2, 3, 4}:
                raise ValueError(f"{name} stands behind different stages of 1 to 4, not {stages}")
        if total < 1:
            raise ValueError(f"shares of {shares} leave no frames to any branch")
        if csp_stages and (len(shares) != 2 or min(shares) < 1 or shares[1] % shares[0]):
            raise ValueError("CSP joins two branches with a whole number of small frames for each "
                             f"big one, not {ratio}")
        if frames % total:
            raise ValueError(f"frames shared out as {ratio}: a clip needs {total}, {2 * total}, "
                             f"{3 * total} ... frames, not {frames}")
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"a grid is h and w, regions of a frame, at least 1, not {grid}")
        stride = {1: 4, 2: 8, 3: 16, 4: 16}             # of the maps behind each stage
        smallest = 2 ** (len(shares) - 1)               # the smallest frames are 1 / smallest
        halves = [2 * stride[stage] for stage in csp_stages]
        parts = [smallest * stride[stage] for stage in tks]
        fits = [math.lcm(smallest, *halves, *(n * regions for n in parts)) for regions in grid]
        if height % fits[0] or width % fits[1]:
            heights, widths = (f"{n}, {2 * n}, {3 * n} ..." for n in fits)
            raise ValueError(f"the branches take heights of {heights} and widths of {widths} "
                             f"pixels, not {height}x{width}")
        self.counts = [frames * share // total for share in shares]       # frames of each branch
        net = resnet50(weights)
        self.norms = []                                 # in the place of every BatchNorm2d
        for module in list(net.modules()) if own_statistics else ():
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    self.norms.append(BranchBatchNorm(child, sum(n > 0 for n in self.counts)))
                    setattr(module, name, self.norms[-1])
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4
        channels = {1: 256, 2: 512, 3: 1024, 4: 2048}
        self.csp = nn.ModuleDict({
            f"layer{stage}": CrossScalePath(channels[stage], shares[1] // shares[0])
            for stage in csp_stages})
        self.tks = nn.ModuleDict({
            f"layer{stage}": TemporalKernelSelection(channels[stage], kernels, grid, reduction,
                                                     select, bottleneck, excite_bn)
            for stage in tks})
        self.dao = nn.ModuleList()
        for i, count in enumerate(self.counts):
            if dao and count:
                size = -(-height // 2 ** (i + 4)), -(-width // 2 ** (i + 4))
                self.dao.append(DiverseAttentionsOperation(1024, count, *size))
        self.pool = pool
        self.neck = nn.BatchNorm1d(2048)
        self.classifier = nn.Linear(2048, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def each(self, stage, branches):
        """The frames or maps (B * M, C, H, W) of each branch, one by one, through a stage."""
        for i, x in enumerate(branches):
            for bn in self.norms:
                bn.branch = i
            yield stage(x)

    def forward(self, clips):
        B, _, _, H, W = clips.shape
        branches, attention = [], []
        for i, segment in enumerate(clips.split(self.counts, 1)):
            if segment.shape[1]:
                x = segment.flatten(0, 1)
                if i:
                    dtype = torch.promote_types(x.dtype, torch.float32)   # CPUs take no float16
                    x = F.interpolate(x.to(dtype), (H >> i, W >> i), mode="bilinear",
                                      antialias=True).to(x.dtype)
                branches.append(x.contiguous(memory_format=torch.channels_last))
        branches = [*self.each(self.stem, branches)]
        for name in ("layer1", "layer2", "layer3", "layer4"):
            maps = [x.unflatten(0, (B, -1)) for x in self.each(getattr(self, name), branches)]
            if name in self.csp:
                maps[1] = self.csp[name](*maps)
            if name in self.tks:
                maps = self.tks[name](*maps)
            if name == "layer3" and self.dao:
                maps, attention = zip(*[dao(d) for dao, d in zip(self.dao, maps)])
            branches = [x.flatten(0, 1) for x in maps]
        features = []
        for x in branches:
            x = x.mean((2, 3)) if self.pool == "avg" else x.amax((2, 3))
            # f_d = (1 + alpha) / N sum_k CNN_D(I_k), N / (1 + alpha) big frames  # Eq. 1
            # f_c = (1 + alpha) / (alpha N) sum_k CNN_C(I_k), all others
            features.append(x.to(self.neck.weight.dtype).view(B, -1, 2048).mean(1))
        embedding = self.neck(sum(features) / len(features))              # of (f_d + f_c) / 2
        if not self.training:
            return embedding
        return embedding, self.classifier(embedding), attention


# --------------------------------------------------------------- Sec. 3.1 and 4.3.1: the losses

def loss_weights(args):
    """The weights of the losses, {name: weight}: L_xent + L_triplet + args.divergence * L."""
    return {"xent": 1.0, "triplet": 1.0, "div": args.divergence if args.dao else 0.0}


def losses(outputs, pids, args):
    """The weighted losses, {name: scalar}, with L of Eq. 5 as "div"; their sum is minimised."""
    embedding, logits, attention = outputs
    parts = {"xent": F.cross_entropy(at_least_float32(logits), pids),
             "triplet": batch_hard_triplet(embedding, pids, args.margin)}
    if attention and args.divergence:
        of_branches = [divergence_loss(at_least_float32(a)) for a in attention]   # Eq. 5
        parts["div"] = sum(of_branches) / len(of_branches)
    weights = loss_weights(args)
    return {name: weights[name] * loss for name, loss in parts.items()}


# ---------------------------------------------------------------------------- Sec. 4.1: the recipe

RECIPE = {  # flag: (the paper's value, the small run's, meaning and source[, choices])
    "frames": (8, 8, "N, frames a clip (Sec. 4.1)"),
    "height": (256, 128, "of the resized big frames (Sec. 4.1)"),
    "width": (128, 64, "of the resized big frames (Sec. 4.1)"),
    "ids": (16, 4, "P, identities a batch (Sec. 4.1)"),
    "clips": (4, 2, "K, clips of each of them (Sec. 4.1)"),
    "epoch": ("tracklets", "identities", "shows all of these (open; the authors' release)",
              ("tracklets", "identities")),
    "erase": (0.5, 0.0, "probability of random erasing (our choice)"),
    "epochs": (150, 8, "(Sec. 4.1)"),
    "lr": (3.5e-4, 5e-4, "learning rate of Adam (Sec. 4.1)"),
    "lr_step": (40, 7, "lr is divided by 10 every so many epochs (Sec. 4.1)"),
    "weight_decay": (5e-4, 5e-4, "of Adam (Sec. 4.1)"),
    "weights": ("imagenet", "none", "backbone: imagenet, none or a file (Sec. 3.3)"),
    "pool": ("max", "max", "over the final map (open; the authors' release)", ("max", "avg")),
    "shares": ((1, 3), (1, 3), "frames of full, 1/2, 1/4 ... size: 1 and alpha (Tables 3, 4)"),
    "own_statistics": (False, False, "BatchNorm's running averages for each branch (our choice)"),
    "csp": (True, True, "with CSPs, for two branches (Table 2)"),
    "csp_stages": ((1, 2, 3), (1, 2, 3), "with a CSP behind (changed; 1 2 3 4: printed)"),
    "dao": (True, True, "with DAO (Table 2)"),
    "tks": ((2,), (2,), "stages with a TKS behind, 1 to 4, or none (Table 6)"),
    "kernels": ((3, 5), (3, 5), "lengths of TKS' kernels in frames, odd (Table 5)"),
    "grid": ((4, 2), (4, 2), "h and w, regions of a frame in TKS (Sec. 4.1)"),
    "select": (True, True, "TKS selects kernels; no: takes their mean (Table 2)"),
    "bottleneck": (True, True, "W_i of Eq. 7 with fewer channels (changed; no: printed)"),
    "reduction": (16, 16, "of these channels (our choice)"),
    "excite_bn": (True, True, "BatchNorm before TKS' residual (changed; no: printed)"),
    "divergence": (0.01, 0.01, "weight of the divergence loss (our choice); 0: AO (Table 2)"),
    "margin": (0.5, 0.5, "of the triplet loss, cosine distance (our choice)"),
}
SAMPLER = PKSampler            # a batch: K clips of each of P identities
SAMPLE = sample_strided        # a training clip: N frames, at most 4 apart, from a random start
SPLIT = split_consecutive      # the test: all frames, in clips of N consecutive ones, averaged
METRIC = "cosine"              # distance of the test

PLAIN = dict(csp=False, dao=False, tks=(), million_parameters=23.5)  # the branches alone
ROWS = {  # place in the paper; settings of the recipe that a row names; (mAP, rank-1) as printed
    "bicnet-tks": Row("Tables 1, 2, 5, 6: BiCnet-TKS", shares=(1, 3), csp=True, dao=True,
                      divergence=0.01, tks=(2,), select=True, mars=(86.0, 90.2), duke=(96.1, 96.3),
                      lsvid=(75.1, 84.6), gflops_a_frame=1.99, million_parameters=29.2),
    "base-s": Row("Table 2: Base-S", shares=(0, 1), **PLAIN, mars=(80.7, 87.4),
                  gflops_a_frame=1.02),
    "base-b": Row("Table 2: Base-B", shares=(1,), **PLAIN, mars=(85.2, 89.1), gflops_a_frame=4.08),
    "tb": Row("Table 2: TB", shares=(1, 3), **PLAIN, mars=(84.3, 89.6), gflops_a_frame=1.81),
    "tb+csp": Row("Table 2: TB+CSP", shares=(1, 3), csp=True, dao=False, tks=(), mars=(85.0, 89.6),
                  gflops_a_frame=1.89, million_parameters=27.6),
    "tb+csp+ao": Row("Table 2: TB+CSP+AO", shares=(1, 3), csp=True, dao=True, divergence=0.0,
                     tks=(), mars=(85.2, 89.3), gflops_a_frame=1.89, million_parameters=27.6),
    "tb+csp+dao": Row("Table 2: BiCnet", shares=(1, 3), csp=True, dao=True, divergence=0.01, tks=(),
                      mars=(85.6, 89.8), gflops_a_frame=1.89, million_parameters=27.6),
    "bicnet-tk": Row("Table 2: BiCnet-TK (fix-fusion)", shares=(1, 3), csp=True, dao=True,
                     divergence=0.01, tks=(2,), select=False, mars=(85.5, 89.6),
                     gflops_a_frame=1.91, million_parameters=29.1),
    "height-256": Row("Table 3: height 256", "base-b"),
    "height-128": Row("Table 3: height 128", "base-s"),
    "height-64": Row("Table 3: height 64", shares=(0, 0, 1), **PLAIN, mars=(64.1, 77.4),
                     gflops_a_frame=0.25),
    "height-256+128": Row("Table 3: heights 256, 128", shares=(1, 1), frames=8, **PLAIN,
                          mars=(84.8, 89.4), gflops_a_frame=2.55),
    "height-256+128+64": Row("Table 3: heights 256, 128, 64", shares=(1, 1, 1), frames=9, **PLAIN,
                             mars=(79.1, 86.1), gflops_a_frame=1.76),
    "tb-alpha0": Row("Table 4: alpha = 0 (Base-B)", "base-b"),
    "tb-alpha1": Row("Table 4: alpha = 1", shares=(1, 1), frames=8, **PLAIN, mars=(84.8, 89.4),
                     gflops_a_frame=2.57),
    "tb-alpha2": Row("Table 4: alpha = 2", shares=(1, 2), frames=9, **PLAIN, mars=(84.4, 89.7),
                     gflops_a_frame=2.07),
    "tb-alpha3": Row("Table 4: alpha = 3", "tb"),
    "tb-alpha4": Row("Table 4: alpha = 4", shares=(1, 4), frames=10, **PLAIN, mars=(83.8, 89.5),
                     gflops_a_frame=1.67),
    "tb-alpha-inf": Row("Table 4: alpha = infinity (Base-S)", "base-s"),
    "tks-k3": Row("Table 5: K3", kernels=(3,), mars=(85.1, 89.9), gflops_a_frame=1.94,
                  million_parameters=28.3),
    "tks-k5": Row("Table 5: K5", kernels=(5,), mars=(85.3, 90.1), gflops_a_frame=1.94,
                  million_parameters=28.3),
    "tks-k7": Row("Table 5: K7", kernels=(7,), mars=(85.5, 89.8), gflops_a_frame=1.94,
                  million_parameters=28.3),
    "tks-k35": Row("Table 5: K3, K5", "bicnet-tks"),
    "tks-k37": Row("Table 5: K3, K7", kernels=(3, 7), mars=(85.7, 90.0), gflops_a_frame=1.99,
                   million_parameters=29.2),
    "tks-k57": Row("Table 5: K5, K7", kernels=(5, 7), mars=(85.6, 90.1), gflops_a_frame=1.99,
                   million_parameters=29.2),
    "tks-k357": Row("Table 5: K3, K5, K7", kernels=(3, 5, 7), mars=(85.8, 90.2),
                    gflops_a_frame=2.04, million_parameters=30.0),
    "tks-stage1": Row("Table 6: TKS in stage 1", tks=(1,), mars=(85.3, 90.1), gflops_a_frame=1.99,
                      million_parameters=28.0),
    "tks-stage2": Row("Table 6: TKS in stage 2", "bicnet-tks"),
    "tks-stage3": Row("Table 6: TKS in stage 3", tks=(3,), mars=(85.7, 90.4), gflops_a_frame=1.99,
                      million_parameters=34.1),
    "tks-stage4": Row("Table 6: TKS in stage 4", tks=(4,), mars=(85.4, 90.0), gflops_a_frame=2.29,
                      million_parameters=53.5),
    "tks-stage23": Row("Table 6: TKS in stages 2, 3", tks=(2, 3), mars=(85.8, 90.3),
                       gflops_a_frame=2.09, million_parameters=35.7),
}
RELEASE = None                 # the authors offer no trained weights


def build(args, num_classes):
    """The network of a row; a checkpoint brings its own weights."""
    return BiCnet(num_classes, args.frames, args.height, args.width, args.shares,
                  args.csp, args.dao, args.tks, args.kernels, args.select, args.grid, args.pool,
                  "none" if args.resume else args.weights, args.csp_stages, args.reduction,
                  args.bottleneck, args.excite_bn, args.own_statistics)


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
    """For --figure, after Figures 1, 3 and 4: A_k and the last map on the frames, big and small,
    and the weights of TKS' kernels."""
    selecting = {name: tks for name, tks in model.tks.items() if tks.w is not None}
    last, *calls = watch(model, clips, model.layer4, *model.dao,
                         *(tks.w for tks in selecting.values()))
    names = ["big", *(f"1/{2 ** i} size" for i in range(1, len(model.counts)))]
    heads = [name for name, count in zip(names, model.counts) for _ in range(count)]
    rows = {}
    if model.dao:
        maps = [m * m.numel() for ((_, (_, a)),) in calls[:len(model.dao)] for m in a[0]]
        rows["attention A_k, over its mean"] = overlays(frames, maps, heads)
    maps = [m for _, x in last for m in energy(x)]
    rows["last map, over its mean"] = overlays(frames, maps, heads)
    for (name, tks), ((_, w_u),) in zip(selecting.items(), calls[len(model.dao):]):
        g = w_u.float().unflatten(1, (len(tks.paths), -1)).softmax(1)[0].mean(1)
        lengths = ", ".join(str(2 * path.dilation[0] + 1) for path in tks.paths)
        rows[f"TKS behind {name}: weights of its kernels"] = bars([g], [f"{lengths} frames"])
    return "BiCnet-TKS: where the frames look", rows


if __name__ == "__main__":  # same in every script
    command_line(main)
