"""STRF: Spatio-Temporal Representation Factorization for Video-based Person Re-Identification.

Aich, Zheng, Karanam, Chen, Roy-Chowdhury, Wu. ICCV 2021. https://arxiv.org/abs/2107.11878

A unit in front of a temporal convolution mixes the positions of a map by four attention masks: for
what changes over time and what does not, for what is fine in space and what is coarse. A mask
compares the positions by features that were pooled over time or over space, little or much, and
makes every position an average of those like it. The unit learns four 1x1 convolutions, no more.

    python strf.py                            # a small run on synthetic data, on any machine
    python strf.py --data mars --gpu 0        # the paper's recipe
    python strf.py --data mars --plan         # what that would train and test, without doing it
    python strf.py --data mars --gpu 0 --variant strf-i3d --order st    # a row, changed

Sec. 3.1, Eq. 1            times_mask
Sec. 3.2, Eq. 5, 7         FeatureFactorizationModule (FFM)
Sec. 3.2, Eq. 2-4, 6       FactorizedAttentionMask (FAM); SelfProduct: Sec. 4.2, Fig. 6 (a)
Sec. 3.2, Eq. 8, Fig. 2    STRF
Sec. 3.2, Fig. 3           InflatedConv (I3D), P3DConv (P3D-A, -B, -C)
Sec. 3.3                   NonLocalBlock
Sec. 4.1, Fig. 3           STRFNet, with STRF in blocks 1, 3 of stage 2 and 1, 3, 5 of stage 3
Sec. 3.2, Eq. 9            losses
Sec. 4                     RECIPE, as far as it is printed; Tables 2-5, Fig. 4, 6: ROWS
To copy                    a class with what it names above it: STRF all, 3D layers strf_conv3d

Deviations from the paper (its sentence, what we do, the flag for the paper's form):
  Eq. 3         "the unnormalized sample covariance matrix": the columns of T are L2-normalised
                first, over channels and frames, because kappa = 4 is taken from works [14, 19] that
                apply it to cosine similarity. --no-normalize
  Sec. 4.1      "We then replace stage 2 and stage 3": only two and three blocks of them fit Table
                2's parameters, every second is taken. --blocks 1 2 3 4 5 6

Unspecified in the paper; our choice. No release is known; the paper's four baselines are those of
AP3D's code (ECCV 2020), so that the choices marked AP3D follow that code:
  softmax axis  over rows: the columns of M sum to one, each position is a weighted average
  H_dk, G_dk    no bias; stride 1, and what lies outside of the clip does not count
  order         temporal, then spatial, as Sec. 4.2 says; the caption of Fig. 4 says the opposite
  Eq. 5, 7, 8   print no residual and no scale: none. A dimension without factors is left out
  place         on the input of the 3x1x1 (P3D) or 3x3x3 convolution (I3D), in P3D-B and I3D thus
                before the stride: on 1,568 positions, not 392, in stage 2 and 392, not 98, in 3
  3D blocks     start as the 2D network (P3D-A: identity, I3D: 2D weights as the centre tap, else
                zero), with STRF in front only P3D-B and P3D-C; nothing between P3D's convolutions
  Table 5       stages 2 and 3 stay 3D; STRF's stages become 3D where they were not
  Fig. 6 (a)    without FAM "non-weighted multiplication of f with itself": M = f^T f, one for each
                dimension, divided by h w, its f normalised as T in Eq. 3; P3D-C
  parameters    STRF's are Table 2's, +0.05M, not "~0.5 million", "~0.15" a unit, "~1.73%" of I3D;
                Table 2 counts the classifier of MARS (1.28M), too, which --complexity leaves out
  non-local     takes STRF's five places, with half the channels: +0.46M, printed "~5 million"
  iLIDS         Table 3's figure is taken for P3D-C's, as its MARS one is; its Duke one is P3D-B's
  recipe        is in a supplement, all but what RECIPE cites; flip only, training frames 4 apart
  pooling       the maximum over the last map of a frame, then the mean over frames (AP3D)
  short         a tracklet of fewer than 32 frames gives 8 different ones at random, in order; one
                of fewer than 8 some of them twice or more (AP3D)
  resizing      bicubic (AP3D)
  triplet       on the embedding after the BN neck, margin 0.3
  backbone      without the last stride of ResNet-50: the printed map is 1/16 of 224x112
  test clips    the last is filled by cycling the tracklet: of 10 frames 1-8, and 9, 10, 1-6
                (AP3D's last clip is shorter, and its test averages frames, not clips)
  pieces        on Duke and LS-VID training tracklets are cut into 32 and 64 frames: --chunk
  an epoch      shows all tracklets, in groups of K of one identity (AP3D): 235 steps on MARS;
                --epoch identities: every identity once, 79 steps
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from common import (Row, Run, at_least_float32, batch_hard_triplet, command_line, energy, figures,
                    gather, load_network, overlays, plan, run_script, watch)
from data import PKSampler, load_dataset, normalize, sample_strided, split_consecutive


# ------------------------------------------------------------ Sec. 3.1: feature factorization (FFM)

def times_mask(f, mask):
    """f M of Eq. 1: each position becomes a sum of the positions of its frame, weighted by M.

    f (B, T, C, H, W), M (B, H*W, H*W) -> as f. Computed as M^T f^T, because channels_last maps are
    f^T already, and what comes out is channels_last again.
    """
    B, T, C, H, W = f.shape
    # f = f.transpose(1, 2).reshape(B, C * T, H * W)                              # c t x h w
    # f M                                                                         # Eq. 1
    f = f.movedim(2, 4).reshape(B, T, H * W, C).transpose(1, 2).reshape(B, H * W, T * C)
    f = (mask.transpose(1, 2) @ f).view(B, H * W, T, C)
    return f.transpose(1, 2).contiguous().view(B, T, H, W, C).movedim(4, 2)


class FeatureFactorizationModule(nn.Module):
    """FFM, Eq. 1 with 5 or 7: the sum of what the masks of one dimension make of the features.

    f (B, T, C, H, W) -> as f. masks: modules f -> M (B, H*W, H*W).
    """

    def __init__(self, masks):
        super().__init__()
        self.masks = nn.ModuleList(masks)

    def forward(self, f):
        # f M_tau + f M_sigma = f (M_tau + M_sigma)                               # Eq. 5, 7
        return times_mask(f, sum(mask(f) for mask in self.masks).to(f.dtype))


# --------------------------------------------------- Sec. 3.2: factorized attention masks and STRF

def pool_same(x, window, kind):
    """"max" or "avg" pooling of x (B, T, C, H, W) in an odd window (t, h, w), stride 1: as x. Only
    positions inside the clip count. Maps may be smaller than the window."""
    if max(window) == 1:                                                  # the identity
        return x
    x = x.transpose(1, 2)
    t, h, w = (r // 2 for r in window)
    if kind == "max":
        return F.max_pool3d(x, window, 1, (t, h, w)).transpose(1, 2)

    def total(x):                                                         # but for a factor
        return F.avg_pool3d(F.pad(x, (w, w, h, h, t, t)), window, 1)
    return (total(x) / total(torch.ones_like(x[:1, :1]))).transpose(1, 2)


class FactorizedAttentionMask(nn.Module):
    """FAM, Eq. 2-3 with 4 or 6: which positions of a map are alike over all frames of the clip,
    judged by features that were pooled over time or space.

    f (B, T, C, H, W) -> M (B, H*W, H*W), whose columns sum to one.
    dimension: "t" or "s", d, over which G pools; resolution: r, odd, the window of G in frames or
    positions; pool: "max" or "avg"; reduction: n; kappa: temperature; normalize: cosine similarity
    (False: as printed). Raises ValueError for what it cannot take.
    """

    def __init__(self, channels, dimension, resolution, pool="max", reduction=16, kappa=4.0,
                 normalize=True):
        super().__init__()
        if (dimension not in ("t", "s") or pool not in ("max", "avg")
                or resolution < 1 or resolution % 2 == 0 or not 1 <= reduction <= channels):
            raise ValueError("FAM takes dimension t or s, pool max or avg, an odd resolution and a "
                             f"reduction of 1 to {channels}, not {dimension}, {pool}, {resolution} "
                             f"and {reduction}")
        self.h = nn.Conv2d(channels, channels // reduction, 1, bias=False)  # 1x1x1, on frames
        # pool(r, 1, 1) or pool(1, r, r)                                          # Eq. 4, 6
        self.window = (resolution, 1, 1) if dimension == "t" else (1, resolution, resolution)
        self.pool, self.kappa, self.normalize = pool, kappa, normalize

    def forward(self, f):
        if f.shape[2] != self.h.in_channels:
            raise ValueError(f"FAM was built for {self.h.in_channels} channels, not {f.shape[2]}")
        h = self.h(f.flatten(0, 1)).unflatten(0, f.shape[:2])             # (B, T, C/n, H, W)
        t = pool_same(h, self.window, self.pool)                          # T = G(H(f)), Eq. 2
        t = t.transpose(1, 2).flatten(1, 2).flatten(2)                    # (B, C/n * T, H*W)
        t = t.to(torch.promote_types(t.dtype, torch.float32))             # eps is 0 in float16
        if self.normalize:
            t = F.normalize(t, dim=1, eps=1e-12)
        c = self.kappa * t.transpose(1, 2) @ t                            # kappa T^T T, Eq. 3
        return c.softmax(1)                                               # M = softmax(C)


class SelfProduct(nn.Module):
    """What stands in FAM's place in Fig. 6 (a): f M is then the product of f with itself.

    f (B, T, C, H, W) -> M = f^T f / (H W), (B, H*W, H*W). normalize: cosine similarity.
    """

    def __init__(self, normalize=True):
        super().__init__()
        self.normalize = normalize

    def forward(self, f):
        f = f.transpose(1, 2).flatten(1, 2).flatten(2)                    # (B, C * T, H*W)
        f = f.to(torch.promote_types(f.dtype, torch.float32))             # eps is 0 in float16
        if self.normalize:
            f = F.normalize(f, dim=1, eps=1e-12)
        f = f / f.shape[2] ** 0.5                       # before the product: sums are smaller
        return f.transpose(1, 2) @ f


class STRF(nn.Module):
    """STRF, Fig. 2, Eq. 8: temporal and spatial factorization one after the other or in parallel.

    f (B, T, C, H, W) -> as f.
    factors: one or more of "t-dynamic" (t, tau), "t-static" (t, sigma), "s-fine" (s, tau) and
    "s-coarse" (s, sigma); resolutions: r_tau <= r_sigma, odd; pools: "max" or "avg", for t and for
    s; order: "ts", "st" or "parallel"; reduction, kappa, normalize: see FactorizedAttentionMask;
    fam: False for SelfProduct in its place, on which only order, normalize and the dimensions of
    the factors act. Raises ValueError for what it cannot take.
    """

    def __init__(self, channels, factors=("t-dynamic", "t-static", "s-fine", "s-coarse"),
                 resolutions=(1, 3), pools=("max", "max"), order="ts", reduction=16, kappa=4.0,
                 normalize=True, fam=True):
        super().__init__()
        if len(resolutions) != 2 or resolutions[0] > resolutions[1] or len(pools) != 2:
            raise ValueError("STRF takes resolutions r_tau <= r_sigma and a pool for t and one for "
                             f"s, not {resolutions} and {pools}")
        tau, sigma = resolutions
        resolution = {"t-dynamic": tau, "t-static": sigma, "s-fine": tau, "s-coarse": sigma}
        wrong = set(factors) - set(resolution) or len(set(factors)) < len(factors)
        if wrong or not factors or order not in ("ts", "st", "parallel"):
            raise ValueError(f"STRF takes one or more of {', '.join(resolution)}, each once, and "
                             f"order ts, st or parallel, not {factors} and {order}")
        self.ffm = nn.ModuleDict()
        for d, pool in zip("ts", pools):
            chosen = [resolution[name] for name in factors if name[0] == d]
            masks = [FactorizedAttentionMask(channels, d, r, pool, reduction, kappa, normalize)
                     for r in chosen if fam]
            if chosen:
                self.ffm[d] = FeatureFactorizationModule(masks or [SelfProduct(normalize)])
        self.order = order

    def forward(self, f):
        if self.order == "parallel":
            return sum(ffm(f) for ffm in self.ffm.values())               # ||, Eq. 8
        for d in self.order:
            if d in self.ffm:
                f = self.ffm[d](f)                                        # ->, Eq. 8
        return f


# --------------------------------------------------- Sec. 3.2, Fig. 3: the 3D layers it is put into

def strf_conv3d(strf, conv, x, frames):
    """STRF, or None, and a 3D convolution on frames (B*T, C, H, W), frames: T. What is
    channels_last there is channels_last_3d as (B, C, T, H, W): nothing is copied."""
    if strf:
        x = strf(x.unflatten(0, (-1, frames))).flatten(0, 1)
    return conv(x.unflatten(0, (-1, frames)).transpose(1, 2)).transpose(1, 2).flatten(0, 1)


class InflatedConv(nn.Module):
    """I3D (Carreira and Zisserman, CVPR 2017): a 2D convolution inflated to three frames.

    (B*T, C, H, W) -> (B*T, C', H', W'), because it takes a Conv2d's place in torchvision's block.
    conv: what it starts as, without bias, groups and dilation, padded by a number of zeros
    (ValueError); frames: T; strf: a module on (B, T, C, H, W) in front of it.
    """

    def __init__(self, conv, frames, strf=None):
        super().__init__()
        if (conv.bias is not None or conv.groups != 1 or conv.dilation != (1, 1)
                or conv.padding_mode != "zeros" or isinstance(conv.padding, str)):
            raise ValueError("I3D inflates convolutions without bias, groups and dilation, padded "
                             f"by a number of zeros, not {conv}")
        self.frames, self.strf = frames, strf
        self.conv = nn.Conv3d(conv.in_channels, conv.out_channels, (3, *conv.kernel_size),
                              (1, *conv.stride), (1, *conv.padding), bias=False,
                              device=conv.weight.device, dtype=conv.weight.dtype)
        with torch.no_grad():
            self.conv.weight.zero_()[:, :, 1].copy_(conv.weight)

    def forward(self, x):
        return strf_conv3d(self.strf, self.conv, x, self.frames)


class P3DConv(nn.Module):
    """P3D (Qiu et al., ICCV 2017): a temporal 3x1x1 convolution beside a spatial one.

    (B*T, C, H, W) -> (B*T, C', H', W'), because it takes a Conv2d's place in torchvision's block.
    conv: the spatial one, which the whole starts as; frames: T; kind: "a", "b" or "c", see below
    (ValueError; "b" takes only a conv that keeps the size of maps but for its stride); strf: a
    module on (B, T, C, H, W) in front of the temporal one.
    """

    def __init__(self, conv, frames, kind, strf=None):
        super().__init__()
        if kind not in ("a", "b", "c"):
            raise ValueError(f"P3D is of kind a, b or c, not {kind}")
        keeps_size = conv.padding == "same" or all(
            2 * p == d * (k - 1)
            for p, d, k in zip(conv.padding, conv.dilation, conv.kernel_size))
        if kind == "b" and not keeps_size:
            raise ValueError("P3D-B adds S(x) to T(x), and takes an S that keeps the size of maps "
                             f"but for its stride, not {conv}")
        self.spatial, self.frames, self.kind, self.strf = conv, frames, kind, strf
        inputs = conv.in_channels if kind == "b" else conv.out_channels
        stride = (1, *conv.stride) if kind == "b" else 1
        self.temporal = nn.Conv3d(inputs, conv.out_channels, (3, 1, 1), stride, (1, 0, 0),
                                  bias=False, device=conv.weight.device, dtype=conv.weight.dtype)
        nn.init.zeros_(self.temporal.weight)
        if kind == "a":
            nn.init.eye_(self.temporal.weight.data[:, :, 1, 0, 0])

    def forward(self, x):
        # a: temporal(spatial(x)), b: spatial(x) + temporal(x), c: spatial(x) + temporal(spatial(x))
        s = self.spatial(x)
        t = strf_conv3d(self.strf, self.temporal, x if self.kind == "b" else s, self.frames)
        return t if self.kind == "a" else s + t


# ------------------------------------------------------ Sec. 3.3: what STRF is compared with there

class NonLocalBlock(nn.Module):
    """Non-local block (Wang et al., CVPR 2018), embedded Gaussian, over all positions of a clip.

    f (B, T, C, H, W) -> as f. Starts as identity.
    """

    def __init__(self, channels):
        super().__init__()
        self.theta = nn.Conv2d(channels, channels // 2, 1)
        self.phi = nn.Conv2d(channels, channels // 2, 1)
        self.g = nn.Conv2d(channels, channels // 2, 1)
        self.out = nn.Sequential(nn.Conv2d(channels // 2, channels, 1), nn.BatchNorm2d(channels))
        nn.init.zeros_(self.out[1].weight)

    def forward(self, f):
        B, T, C, H, W = f.shape
        maps = [layer(f.flatten(0, 1)).movedim(1, 3) for layer in (self.theta, self.phi, self.g)]
        theta, phi, g = (x.reshape(B, 1, T * H * W, -1) for x in maps)    # (B, 1, T*H*W, C/2)
        # y = softmax(theta phi^T) g
        y = F.scaled_dot_product_attention(theta, phi, g, scale=1.0)
        y = y.reshape(B * T, H, W, -1).movedim(3, 1)
        return self.out(y).view(B, T, C, H, W) + f


# ---------------------------------------------------------------------------- Sec. 4.1: the network

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


class STRFNet(nn.Module):
    """ResNet-50 with 3D blocks and STRF in stages 2 and 3, Fig. 3, pooled, and a BN neck.

    Clips (B, T, 3, H, W), normalised -> in eval mode embeddings (B, 2048); in train mode also the
    logits (B, num_classes).

    frames: T, fixed; any height and width. layer: "i3d", "p3d-a", "p3d-b" or "p3d-c"; stages: those
    with STRF, of 1 to 4, () for the baseline; pool: "max" or "avg" over the final map; weights: see
    resnet50; unit: "strf", or "nonlocal" for NonLocalBlocks in STRF's places; blocks: of each of
    the stages, from 1, those that become 3D; a stage leaves out what it has not; strf: further
    arguments of STRF. Raises ValueError for what it cannot take.
    """

    def __init__(self, num_classes, frames=8, layer="p3d-c", stages=(2, 3), pool="max",
                 weights="none", unit="strf", blocks=(1, 3, 5), **strf):
        super().__init__()
        if layer not in ("i3d", "p3d-a", "p3d-b", "p3d-c") or not set(stages) <= {1, 2, 3, 4}:
            raise ValueError("STRFNet takes layer i3d, p3d-a, p3d-b or p3d-c and stages of 1 to 4, "
                             f"not {layer} and {stages}")
        if unit not in ("strf", "nonlocal") or unit == "nonlocal" and not strf.get("fam", True):
            raise ValueError("STRFNet takes unit strf or nonlocal, which has no FAM to leave out, "
                             f"not {unit} with fam={strf.get('fam', True)}")
        self.frames, self.pool = frames, pool
        net = resnet50(weights)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2 = net.layer1, net.layer2
        self.layer3, self.layer4 = net.layer3, net.layer4
        for stage in sorted({2, 3, *stages}):
            layers = getattr(self, f"layer{stage}")
            chosen = [block for i, block in enumerate(layers, 1) if i in blocks]
            if stage in stages and not chosen:
                raise ValueError(f"stage {stage} has blocks 1 to {len(layers)}, none of {blocks}")
            for block in chosen:
                conv = block.conv2
                module = None
                if stage in stages:
                    C = conv.in_channels
                    module = STRF(C, **strf) if unit == "strf" else NonLocalBlock(C)
                block.conv2 = (InflatedConv(conv, frames, module) if layer == "i3d" else
                               P3DConv(conv, frames, layer[-1], module))
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
        x = x.to(self.neck.weight.dtype)
        x = x.mean((2, 3)) if self.pool == "avg" else x.amax((2, 3))
        embedding = self.neck(x.view(B, T, -1).mean(1))
        return (embedding, self.classifier(embedding)) if self.training else embedding


# ---------------------------------------------------------------------- Sec. 3.2, Eq. 9: the losses

def loss_weights(args):
    """The weights in Eq. 9, {name: weight}: L_ce + L_triplet."""
    return {"xent": 1.0, "triplet": 1.0}


def losses(outputs, pids, args):
    """The weighted losses of Eq. 9, {name: scalar}; their sum is minimised."""
    embedding, logits = outputs
    parts = {"xent": F.cross_entropy(at_least_float32(logits), pids),
             "triplet": batch_hard_triplet(embedding, pids, args.margin)}
    weights = loss_weights(args)
    return {name: weights[name] * loss for name, loss in parts.items()}


# ------------------------------------------------------------------------------ Sec. 4: the recipe

FACTORS = ("t-dynamic", "t-static", "s-fine", "s-coarse")
RECIPE = {  # flag: (the paper's value, the small run's, meaning and source[, choices])
    "frames": (8, 4, "T, frames a clip (the printed map 8 x 14 x 7, Sec. 4.2)"),
    "height": (224, 128, "of the resized frames (the same map)"),
    "width": (112, 64, "of the resized frames (the same map)"),
    "ids": (8, 4, "P, identities a batch (our choice)"),
    "clips": (4, 2, "K, clips of each of them (our choice)"),
    "epoch": ("tracklets", "identities", "shows all of these (open; as AP3D's code)",
              ("tracklets", "identities")),
    "erase": (0.0, 0.0, "probability of random erasing (our choice)"),
    "epochs": (240, 8, "(our choice)"),
    "lr": (3e-4, 5e-4, "learning rate of Adam (our choice)"),
    "lr_step": (60, 7, "lr is divided by 10 every so many epochs (our choice)"),
    "weight_decay": (5e-4, 5e-4, "of Adam (our choice)"),
    "weights": ("imagenet", "none", "backbone: imagenet, none or a file (our choice)"),
    "pool": ("max", "max", "over the final map (open; as AP3D's code)", ("max", "avg")),
    "layer": ("p3d-c", "p3d-c", "the 3D blocks (Sec. 4.1, Table 2)",
              ("i3d", "p3d-a", "p3d-b", "p3d-c")),
    "stages": ((2, 3), (2, 3), "those with STRF; no value: none (Sec. 4.2, Table 5)", range(1, 5)),
    "blocks": ((1, 3, 5), (1, 3, 5), "the 3D ones of a stage (changed)", range(1, 7)),
    "unit": ("strf", "strf", "what stands in STRF's places (Sec. 3.3)", ("strf", "nonlocal")),
    "fam": (True, True, "with FAM (Sec. 4.2, Fig. 6 a)"),
    "factors": (FACTORS, FACTORS, "the masks (Sec. 3.1, Table 4)", FACTORS),
    "resolutions": ((1, 3), (1, 3), "r_tau and r_sigma, odd (Eq. 4, 6, Sec. 4.2, Fig. 4 a)"),
    "pools": (("max", "max"), ("max", "max"), "of G, for t and s (Fig. 4 b)", ("max", "avg")),
    "order": ("ts", "ts", "of time and space (Eq. 8, Fig. 4 c)", ("ts", "st", "parallel")),
    "reduction": (16, 16, "n, of the channels in H (Sec. 3.2)"),
    "kappa": (4.0, 4.0, "temperature of the masks (Eq. 3, Sec. 3.2)"),
    "normalize": (True, True, "the columns of T in Eq. 3 (changed; no: printed)"),
    "margin": (0.3, 0.3, "of the triplet loss (our choice), in cosine distance (Eq. 9)"),
}
SAMPLER = PKSampler            # a batch: K clips of each of P identities
SAMPLE = sample_strided        # a training clip: T frames, at most 4 apart, from a random start
SPLIT = split_consecutive      # the test: all frames, in clips of T consecutive ones, averaged
METRIC = "cosine"              # distance of the test

ROWS = {  # place in the paper; settings of the recipe that a row names; (mAP, rank-1) as printed
    # Table 3 prints the Duke figures of strf-p3db for STRF
    "strf-p3dc": Row("Tables 2-5: P3DC + STRF, the best", layer="p3d-c", stages=(2, 3),
                     mars=(86.10, 90.30), duke=(96.20, 97.20), ilids=(None, 89.30),
                     million_parameters=25.53),
    "strf-i3d": Row("Table 2: I3D + STRF", layer="i3d", stages=(2, 3), mars=(83.10, 88.70),
                    duke=(95.20, 95.90), million_parameters=28.97),
    "strf-p3da": Row("Table 2: P3DA + STRF", layer="p3d-a", stages=(2, 3), mars=(85.40, 89.80),
                     duke=(95.60, 96.00), million_parameters=25.53),
    "strf-p3db": Row("Table 2: P3DB + STRF", layer="p3d-b", stages=(2, 3), mars=(85.60, 90.30),
                     duke=(96.40, 97.40), million_parameters=25.53),
    "i3d": Row("Table 2: I3D", layer="i3d", stages=(), mars=(82.70, 88.50), duke=(95.20, 95.40),
               million_parameters=28.92),
    "p3da": Row("Table 2: P3DA", layer="p3d-a", stages=(), mars=(83.20, 88.90), duke=(95.00, 95.00),
                million_parameters=25.48),
    "p3db": Row("Table 2: P3DB", layer="p3d-b", stages=(), mars=(83.00, 88.80), duke=(95.40, 95.30),
                million_parameters=25.48),
    "p3dc": Row("Tables 2, 4, 5: P3DC, the baseline", layer="p3d-c", stages=(), mars=(83.10, 88.50),
                duke=(95.30, 95.30), million_parameters=25.48),
    "p3dc+nonlocal": Row("Sec. 3.3: P3DC + Non-local", unit="nonlocal", mars=(84.80, 89.90)),
    "p3dc+fine": Row("Table 4: (s, tau)", factors=("s-fine",), mars=(85.20, 89.70)),
    "p3dc+coarse": Row("Table 4: (s, sigma)", factors=("s-coarse",), mars=(85.10, 89.90)),
    "p3dc+dynamic": Row("Table 4: (t, tau)", factors=("t-dynamic",), mars=(85.20, 89.90)),
    "p3dc+static": Row("Table 4: (t, sigma)", factors=("t-static",), mars=(85.10, 90.00)),
    "p3dc+fine+coarse": Row("Table 4: (s, tau), (s, sigma)", factors=("s-fine", "s-coarse"),
                            mars=(85.50, 90.10)),
    "p3dc+dynamic+static": Row("Table 4: (t, tau), (t, sigma)", factors=("t-dynamic", "t-static"),
                               mars=(85.30, 89.70)),
    "p3dc+fine+dynamic": Row("Table 4: (s, tau), (t, tau)", factors=("s-fine", "t-dynamic"),
                             mars=(85.40, 90.00)),
    "p3dc+coarse+static": Row("Table 4: (s, sigma), (t, sigma)", factors=("s-coarse", "t-static"),
                              mars=(85.70, 90.10)),
    # Table 5: stages 2 and 3 are 3D in all
    "stage1": Row("Table 5: STRF in stage 1", stages=(1,), mars=(83.40, 88.80)),
    "stage12": Row("Table 5: STRF in stages 1, 2", stages=(1, 2), mars=(83.60, 89.00)),
    "stage23": Row("Table 5: STRF in stages 2, 3", "strf-p3dc"),
    "stage123": Row("Table 5: STRF in stages 1, 2, 3", stages=(1, 2, 3), mars=(84.70, 89.30)),
    "stage234": Row("Table 5: STRF in stages 2, 3, 4", stages=(2, 3, 4), mars=(85.50, 90.00)),
    "stage1234": Row("Table 5: STRF in stages 1, 2, 3, 4", stages=(1, 2, 3, 4),
                     mars=(83.70, 88.70)),
    "resolutions-11": Row("Fig. 4a: r_tau, r_sigma = 1, 1", resolutions=(1, 1)),
    "resolutions-13": Row("Fig. 4a: r_tau, r_sigma = 1, 3", "strf-p3dc"),
    "resolutions-15": Row("Fig. 4a: r_tau, r_sigma = 1, 5; 0.2 mAP below 1, 3", resolutions=(1, 5)),
    "resolutions-35": Row("Fig. 4a: r_tau, r_sigma = 3, 5; 0.4 mAP below 1, 3", resolutions=(3, 5)),
    "pool-t-max-s-max": Row("Fig. 4b: max pooling for t, max for s", "strf-p3dc"),
    "pool-t-max-s-avg": Row("Fig. 4b: max pooling for t, average for s", pools=("max", "avg")),
    "pool-t-avg-s-max": Row("Fig. 4b: average pooling for t, max for s", pools=("avg", "max")),
    "pool-t-avg-s-avg": Row("Fig. 4b: average pooling for t, average for s", pools=("avg", "avg")),
    "order-ts": Row("Fig. 4c: time, then space", "strf-p3dc"),
    "order-st": Row("Fig. 4c: space, then time", order="st"),
    "order-parallel": Row("Fig. 4c: both added; about 0.4 mAP below the best", order="parallel"),
    "strf-nofam": Row("Fig. 6a: without FAM", fam=False),
}
RELEASE = None                 # the authors offer no trained weights


def build(args, num_classes):
    """The network of a row; a checkpoint brings its own weights."""
    return STRFNet(num_classes, args.frames, args.layer, args.stages, args.pool,
                   "none" if args.resume else args.weights, args.unit, args.blocks,
                   factors=args.factors, resolutions=args.resolutions, pools=args.pools,
                   order=args.order, reduction=args.reduction, kappa=args.kappa,
                   normalize=args.normalize, fam=args.fam)


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
    """For --figure, after Figure 5: the last map, and of the first unit of each stage the weights
    of each of its masks for the middle position."""
    (last,), = watch(model, clips, model.layer4)
    rows = {"last map, over its mean": overlays(frames, energy(last[1]))}
    for n, stage in enumerate((model.layer1, model.layer2, model.layer3, model.layer4), 1):
        unit = next((m for m in stage.modules() if isinstance(m, STRF)), None)
        masks = [(d, m) for d, ffm in unit.ffm.items() for m in ffm.masks] if unit else []
        weights = []
        for ((x,), m), in watch(model, clips, *(mask for _, mask in masks)):
            H, W = x.shape[3:]
            weights.append(m[0, :, H // 2 * W + W // 2].clone().view(H, W))
            weights[-1][H // 2, W // 2] = torch.nan     # black
        if masks:
            heads = [f"{d} r={max(getattr(mask, 'window', (1,)))}" for d, mask in masks]
            rows[f"stage {n}: weights of the positions like the middle one, black"] = overlays(
                frames[:1].expand(len(masks), -1, -1, -1), weights, heads)
    return "STRF: where the frames look, and which positions the units mix", rows


if __name__ == "__main__":  # same in every script
    command_line(main)
