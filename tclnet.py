"""TCLNet: Temporal Complementary Learning for Video Person Re-identification.

Hou, Chang, Ma, Shan, Chen. ECCV 2020. https://arxiv.org/abs/2007.09357
The authors' release: https://github.com/blue-blue272/VideoReID-TCLNet

The frames of a clip are much alike, and a network sees the same salient part in each. TSE erases
from a frame what the learners of the frames before have seen, so that its own learner finds another
part. TSB first gives every frame what the others show of its salient part, to make up for what
erasing removes.

    python tclnet.py                          # a small run on synthetic data, on any machine
    python tclnet.py --data mars --gpu 0      # the paper's recipe
    python tclnet.py --data mars --plan       # what that would train and test, without doing it
    python tclnet.py --data mars --gpu 0 --variant base+tse --h-e 6     # a row, changed

Sec. 3.1, Eq. 3            CorrelationLayer
Sec. 3.1, Fig. 2 (b)       BlockBinarization
Sec. 3.1, Eq. 4-5          SaliencyErasingOperation (SEO)
Sec. 3.1, Eq. 1-2, Fig. 2  TemporalSaliencyErasing (TSE)
Sec. 3.2, Eq. 6, Fig. 3    probability_map, TemporalSaliencyBoosting (TSB)
Sec. 4.4, Table 4          NonLocalBlock, TemporalConv
Sec. 3.3, Eq. 7, Fig. 4    TCLNet; losses
Sec. 4.1                   RECIPE, then SAMPLER, SAMPLE, SPLIT, METRIC; Tables 1 to 4: ROWS
Sec. 4.3                   --variant base+tse --frames 1: one image for all learners (Market-1501,
                           printed: 85.3 mAP, base 80.3; there is no loader for it)
A class is copied alone, or with what its docstring names under "copied with".

Deviations from the paper (its sentence, what we do, the flag for the paper's form):
  Eq. 3         "F^T (w^T f)": divided by sqrt(D) (release), because on the plain products the
                softmax of Eq. 5 saturates. --no-scaled
  f_k           gets no gradient from Eq. 3 (release). --no-stop-gradient
  E = BN(o) + Q o is duplicated along the positions after the BN, not "before entering" it: the
                same but for the running variance's factor n / (n - 1). No flag.
  test          "an input of entire video": in clips of T frames, so that TSB's memory is that of a
                clip, as in training; --frames T makes it longer.
  "four frames" cannot be cut into segments of 3: row base+tse-n3 takes 3 (the paper's cost is
                theirs times 4/3). --frames 6: two segments.

Unspecified in the paper; our choice (the authors' release is named where the choice follows it):
  erased map    F * B, plus at all positions BN(sum of G * F), which starts at zero: lets gradients
                reach w, and needs only the BN's 2,048 parameters more
  first frame   B = 1, and G = softmax(1): uniform, the product of no correlation maps being 1
  SEO           one BN for all frames of a segment, also the first; it and the shared blocks take
                frame n of all segments at a time (release); f_k is an average with --pool max, too
  block         the first of equal maxima; h_e and w_e scale with the map from 16x8, strides do not
  TSB           tau = 5, BN starting at zero
  backbone      the last stride of ResNet-50 is removed, which the paper's GFLOPs confirm
  neck          a BatchNorm on each v_i; classifier, triplet loss and test take its output
  losses        summed over the learners; triplet with cosine distance, margin 0.4
  batch of 32   8 identities x 4 clips; weight decay 5e-4
  an epoch      shows all tracklets, in groups of K of one identity (release): 235 steps on MARS;
                --epoch identities: every identity once, 79 steps
  frames        8 apart in training; a tracklet of fewer than 32 frames gives 4 different ones at
                random, in order, one of fewer than 4 some of them twice or more (release);
                adjacent in test, the last clip filled by cycling the tracklet (10: 3 clips of 4)
  resizing      bicubic (release)
  pieces        training tracklets of Duke and LS-VID are cut (release); --chunk 0: not at all
  parameters    the paper has 29.9 million for N = 2 with SEO and without Non-local; the modules
                have 30.07, which the rows with N = 3 and 4 confirm
  Table 4       Non-local after stage 3, half the channels, biases as in SINet (parameters fit with
                and without, GFLOPs four times its cost); RE with p = 0.5; DropBlock after stages 3
                and 4, p = 0.1, 7x7 or the largest odd block that fits; 3D: first convolutions of
                all blocks 3x1x1 (as the paper's GFLOPs; 32.2 million parameters, not 33.7)

The authors' release departs from the paper's equations here; we follow the equations:
  TSB           keys are means of 2x2 positions before they are compared, and a 1x1 convolution with
                a bias stands before its BatchNorm; Eq. 6 has neither
  SEO           a 1x1 convolution with a bias stands before its BatchNorm; the softmax is over the
                kept positions alone, where Eq. 5 has softmax times B
  block         rows are means over the width, and the block of three rows is searched with its
                middle on every row, so that at the border only two are erased
  pooling       the maximum over the last map for the vectors, the average for f_k; the paper: GAP.
                --pool max
  batches       of 8 groups, of which about 7 % hold one identity twice
"""
import copy
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from common import (Row, Run, at_least_float32, batch_hard_triplet, command_line, energy, figures,
                    gather, load_network, overlays, plan, run_script, watch)
from data import PKSampler, load_dataset, normalize, sample_strided, split_consecutive


# -------------------------------------------------------------- Sec. 3.1: temporal saliency erasing

class CorrelationLayer(nn.Module):
    """Eq. 3: how much each position of a frame resembles what former learners have seen.

    F_n (B, D, H, W), f (B, K, D1), the vectors of K former frames -> R (B, K, H, W), at least
    float32.
    channels: D; features: D1; scaled: by 1 / sqrt(D), stop_gradient: at f (False: as printed).
    """

    def __init__(self, channels, features, scaled=True, stop_gradient=True):
        super().__init__()
        self.w = nn.Linear(features, channels, bias=False)                # f -> w^T f
        self.scaled, self.stop_gradient = scaled, stop_gradient

    def forward(self, x, f):
        if self.stop_gradient:
            f = f.detach()
        if (f.shape[2], x.shape[1]) != (self.w.in_features, self.w.out_features):
            raise ValueError(f"SEO was built for maps of {self.w.out_features} channels and "
                             f"vectors of {self.w.in_features}, not {x.shape[1]} and {f.shape[2]}")
        scale = math.sqrt(x.shape[1])
        r = (self.w(f) / scale) @ x.flatten(2)          # F^T (w^T f), in sums that float16 can hold
        r = r.to(torch.promote_types(r.dtype, torch.float32))
        if not self.scaled:
            r = r * scale                                                 # Eq. 3
        return r.unflatten(2, x.shape[2:])


class BlockBinarization(nn.Module):
    """Block binarization layer: 0 in the block of the highest correlation, 1 elsewhere.

    R (..., H, W) -> B (..., H, W), always with exactly h_e w_e zeros; no gradient.
    block: (h_e, w_e), at most (H, W); stride: (s_h, s_w); all at least 1 (ValueError).
    """

    def __init__(self, block, stride=(1, 1)):
        super().__init__()
        if min(*block, *stride) < 1:
            raise ValueError(f"SEO takes blocks and strides of at least 1x1, not {block[0]}x"
                             f"{block[1]} and {stride[0]}x{stride[1]}")
        self.block, self.stride = tuple(block), tuple(stride)

    @torch.no_grad()
    def forward(self, r):
        H, W = r.shape[-2:]
        h_e, w_e = self.block
        s_h, s_w = self.stride
        if h_e > H or w_e > W:
            raise ValueError(f"a block of {h_e}x{w_e} does not fit into maps of {H}x{W}")
        # the block with the highest sum has the highest mean: one of N_pos, rows x columns
        means = F.avg_pool2d(r.reshape(-1, 1, H, W), self.block, self.stride)
        best = means.flatten(1).argmax(1)[:, None, None]
        columns = means.shape[-1]
        top, left = best // columns * s_h, best % columns * s_w
        y = torch.arange(H, device=r.device)[:, None]
        x = torch.arange(W, device=r.device)
        inside = (y >= top) & (y < top + h_e) & (x >= left) & (x < left + w_e)
        return (~inside).to(r.dtype).view_as(r)


class SaliencyErasingOperation(nn.Module):
    """SEO, Fig. 2 (b): erases from a frame what the learners of the former frames have seen.

    F_n (B, D, H, W), f (B, n - 1, D1), the vectors of the former frames -> (B, D, H, W).
    Arguments: see CorrelationLayer and BlockBinarization; copied with both.
    """

    def __init__(self, channels, features, block, stride=(1, 1), scaled=True, stop_gradient=True):
        super().__init__()
        self.correlation = CorrelationLayer(channels, features, scaled, stop_gradient)
        self.binarization = BlockBinarization(block, stride)
        self.bn = nn.BatchNorm1d(channels)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x, f):
        # products over the former frames k; of none of them they are 1: without empty maps, with
        # which ONNX cannot go on
        r = b = x.new_ones(x[:, 0].shape, dtype=torch.promote_types(x.dtype, torch.float32))
        if f.shape[1]:
            r_k = self.correlation(x, f)
            r, b = r_k.prod(1), self.binarization(r_k).prod(1)            # B_n, Eq. 4
        g = r.flatten(1).softmax(1) * b.flatten(1)                        # G_n, Eq. 5
        gated = x.flatten(2) @ g.to(x.dtype)[:, :, None]                  # sum of G_n * F_n
        gated = self.bn(gated[:, :, 0]).to(x.dtype)
        return x * b[:, None].to(x.dtype) + gated[:, :, None, None]


class TemporalSaliencyErasing(nn.Module):
    """TSE, Fig. 2 (a): N ordered learners for N frames, each for what those before it missed.

    Eq. 1-2, 7: F (B, T, D, H, W) -> c (B, T/N, N, D1), the vectors of the frames by segments. T
    divisible by N (ValueError), or 1: then the frame is repeated for all learners.
    shared: the layers that all learners share; learners: N modules, L_n without the shared ones;
    seo: False leaves SEO out; pool: "avg" or "max" of the vectors returned (SEO takes averages);
    the other arguments are those of SEO. Copied with the three classes above.
    """

    def __init__(self, shared, learners, channels, features, block, stride=(1, 1), scaled=True,
                 seo=True, pool="avg", stop_gradient=True):
        super().__init__()
        self.shared, self.learners = shared, nn.ModuleList(learners)
        self.channels, self.features, self.pool = channels, features, pool
        self.seo = None
        if seo and len(learners) > 1:
            self.seo = SaliencyErasingOperation(channels, features, block, stride, scaled,
                                                stop_gradient)

    def forward(self, x):
        B, T, *size = x.shape
        N = len(self.learners)
        if size[0] != self.channels:
            raise ValueError(f"TSE was built for {self.channels} channels, not {size[0]}")
        if T == 1:
            x, T = x.expand(-1, N, -1, -1, -1), N
        if T % N:
            raise ValueError(f"TSE with {N} learners needs a multiple of {N} frames, not {T}")
        x = x.reshape(B * T // N, N, *size)                               # all segments C_k at once
        f, c = x.new_empty(x.shape[0], 0, self.features), []                  # f_1 ... f_(n-1)
        for learner, frame in zip(self.learners, x.movedim(2, 4).unbind(1)):
            frame = frame.movedim(3, 1).contiguous(memory_format=torch.channels_last)
            if self.seo:
                frame = self.seo(frame, f)                                # SEO(F_n; f_1 ...), Eq. 2
            y = learner(self.shared(frame))
            if y.shape[1] != self.features:
                raise ValueError(f"TSE was built for learners that give {self.features} channels, "
                                 f"not {y.shape[1]}")
            f_n = y.mean((2, 3))                                          # GAP(L_n(F_n)), Eq. 1-2
            f = torch.cat([f, f_n[:, None]], 1)
            c.append(f_n if self.pool == "avg" else y.amax((2, 3)))
        return torch.stack(c, 1).view(B, T // N, N, -1)                   # Eq. 7


# ------------------------------------------------------------- Sec. 3.2: temporal saliency boosting

def probability_map(q, m, tau=5.0):
    """A of Eq. 6: how well the positions of the other frames, its memory, match a query frame.

    q (B, T, D), GAP of every frame, M (B, T*H*W, D), the local descriptors of all frames -> A
    (B, T, T*H*W), for each query: sums up to 1 over the memory, and is 0 in the query itself.
    """
    T = q.shape[1]
    dtype = torch.promote_types(m.dtype, torch.float32)
    q = F.normalize(q.to(dtype), dim=2).to(m.dtype)
    length = torch.linalg.vector_norm(m, dim=2, dtype=dtype).clamp(min=torch.finfo(dtype).tiny)
    # A_i = exp(tau q^T m_i / |m_i|) / sum_j exp(tau q^T m_j / |m_j|)            # Eq. 6
    # for all queries at once, from all frames without the query's own
    a = tau * (m @ q.transpose(1, 2) / length[:, :, None]).transpose(1, 2)
    own = torch.eye(T, dtype=torch.bool, device=m.device).repeat_interleave(m.shape[1] // T, 1)
    return a.masked_fill(own, -math.inf).softmax(2)


class TemporalSaliencyBoosting(nn.Module):
    """TSB, Fig. 3: every frame gets what the other frames show of its own salient part.

    Q (B, T, D, H, W) -> E (B, T, D, H, W), T >= 2 (ValueError). Starts as identity. tau: of Eq. 6.
    Copied with probability_map.
    """

    def __init__(self, channels, tau=5.0):
        super().__init__()
        self.tau = tau
        self.bn = nn.BatchNorm1d(channels)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x):
        B, T, D, H, W = x.shape
        if T < 2:
            raise ValueError(f"TSB needs a frame and its memory: at least 2 frames, not {T}")
        if D != self.bn.num_features:
            raise ValueError(f"TSB was built for {self.bn.num_features} channels, not {D}")
        m = x.movedim(2, 4).flatten(1, 3)                                 # (B, T*H*W, D)
        dtype = torch.promote_types(m.dtype, torch.float32)       # float16 cannot hold the sum
        q = m.unflatten(1, (T, -1)).sum(2, dtype=dtype) / (H * W)         # GAP
        o = probability_map(q, m, self.tau).to(x.dtype) @ m               # o = M^T A
        return self.bn(o.flatten(0, 1)).to(x.dtype).view(B, T, D, 1, 1) + x  # E = BN(o) + Q


# ---------------------------------------------- Sec. 4.4, Table 4: what the modules are compared to

class NonLocalBlock(nn.Module):
    """Non-local block (Wang et al., CVPR 2018), embedded Gaussian, over all positions of a clip.

    X (B, T, C, H, W) -> (B, T, C, H, W). Starts as identity.
    """

    def __init__(self, channels):
        super().__init__()
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
        y = F.scaled_dot_product_attention(positions(self.theta), positions(self.phi),
                                           positions(self.g), scale=1.0)
        y = y.reshape(B * T, H, W, -1).movedim(3, 1)
        return self.out(y).view(B, T, C, H, W) + x


class TemporalConv(nn.Module):
    """A 3x1x1 convolution, equal to the 1x1 convolution `conv` at the start.

    (B*T, C, H, W) -> (B*T, C', H, W), because it replaces `conv` in a bottleneck. conv: without
    bias, groups, stride and padding (ValueError); frames: T.
    """

    def __init__(self, conv, frames):
        super().__init__()
        plain = conv.bias is None and conv.groups == 1 and conv.padding in ((0, 0), "valid", "same")
        if not plain or conv.kernel_size != (1, 1) or conv.stride != (1, 1):
            raise ValueError("TemporalConv takes 1x1 convolutions without bias, groups, stride and "
                             f"padding, not {conv}")
        self.frames = frames
        self.conv = nn.Conv3d(conv.in_channels, conv.out_channels, (3, 1, 1), padding=(1, 0, 0),
                              bias=False, device=conv.weight.device, dtype=conv.weight.dtype)
        with torch.no_grad():
            self.conv.weight.zero_()[:, :, 1].copy_(conv.weight)

    def forward(self, x):
        clips = x.unflatten(0, (-1, self.frames)).transpose(1, 2)         # (B, C, T, H, W)
        return self.conv(clips).transpose(1, 2).flatten(0, 1)


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


class TCLNet(nn.Module):
    """TCLNet, Fig. 4: ResNet-50 with a TSB behind stage 2 and TSE made of stage 4, whose last block
    each learner has for itself; a BN neck for each. Copied with all classes and functions above.

    Clips (B, T, 3, H, W), normalised -> in train mode embeddings (B, N, 2048) and logits
    (B, N, num_classes); in eval mode (B, N * 2048), whose average over clips goes to `finish`.

    frames, height, width: T, H, W; T a multiple of N, or 1; learners: N; seo: False is
    "TSE-wo-SEO"; block: (h_e, w_e) of a 16x8 map, scaled to that of H x W, which N - 1 blocks must
    not cover; stride: (s_h, s_w); tsb: stages with a TSB behind, of 1, 2, 3; tau: see TSB; scaled,
    stop_gradient: see CorrelationLayer; extra: "none" or what Table 4 compares with, "nl",
    "dropblock" or "3d"; pool: "avg" or "max" over the final map; weights: see resnet50. Raises
    ValueError for what it cannot take.
    """

    def __init__(self, num_classes, frames=4, height=256, width=128, learners=2, seo=True,
                 block=(3, 8), tsb=(2,), tau=5.0, scaled=True, extra="none", pool="avg",
                 weights="none", stride=(1, 1), stop_gradient=True):
        super().__init__()
        if learners < 1 or not set(tsb) <= {1, 2, 3}:
            raise ValueError("TCLNet takes 1 learner or more and TSBs behind stages 1, 2, 3, not "
                             f"{learners} and {tsb}")
        if frames % learners and frames > 1:
            raise ValueError(f"{learners} learners take clips of {learners}, {2 * learners}, "
                             f"{3 * learners} ... frames, not {frames}")
        if tsb and frames < 2:
            raise ValueError(f"TSB needs a frame and its memory: at least 2 frames, not {frames}")
        if extra == "3d" and learners > 1 or extra == "nl" and 3 in tsb:
            raise ValueError('"3d" goes with one learner, "nl" stands where stage 3\'s TSB would')
        if not (1 <= block[0] <= 16 and 1 <= block[1] <= 8):
            raise ValueError(f"a block of {block[0]}x{block[1]} does not lie in a map of 16x8")
        rows, columns = -(-height // 16), -(-width // 16)
        h_e = max(1, int(block[0] * rows / 16 + 0.5))
        w_e = max(1, int(block[1] * columns / 8 + 0.5))
        if seo and math.ceil(rows / h_e) * math.ceil(columns / w_e) < learners:
            raise ValueError(f"{learners - 1} erased block(s) of {h_e}x{w_e} can cover the whole "
                             f"{rows}x{columns} map of {height}x{width} frames")
        net = resnet50(weights)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2, self.layer3 = net.layer1, net.layer2, net.layer3
        self.after = nn.ModuleDict()                    # stage: the module behind it
        for stage in tsb:
            self.after[f"layer{stage}"] = TemporalSaliencyBoosting(128 * 2 ** stage, tau)
        *shared, last = net.layer4                      # the first two blocks are shared
        if extra == "nl":
            self.after["layer3"] = NonLocalBlock(1024)
        if extra == "dropblock":
            side = min(7, rows - 1 + rows % 2, columns - 1 + columns % 2)  # odd, inside the map
            drop = torchvision.ops.DropBlock2d(0.1, side)
            shared, last = [drop, *shared], nn.Sequential(last, drop)
        if extra == "3d":
            for bottleneck in (*net.layer1, *net.layer2, *net.layer3, *net.layer4):
                bottleneck.conv1 = TemporalConv(bottleneck.conv1, frames)
        self.tse = TemporalSaliencyErasing(
            nn.Sequential(*shared), [copy.deepcopy(last) for _ in range(learners)], 1024, 2048,
            (h_e, w_e), stride, scaled, seo, pool, stop_gradient)
        self.neck = nn.ModuleList(nn.BatchNorm1d(2048) for _ in range(learners))
        self.classifier = nn.ModuleList(nn.Linear(2048, num_classes, bias=False)
                                        for _ in range(learners))
        for layer in self.classifier:
            nn.init.normal_(layer.weight, std=0.001)

    def forward(self, clips):
        B, T = clips.shape[:2]
        x = self.stem(clips.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        for name in ("layer1", "layer2", "layer3"):
            x = getattr(self, name)(x)
            if name in self.after:
                x = self.after[name](x.unflatten(0, (B, T))).flatten(0, 1)
        c = self.tse(x.unflatten(0, (B, T)))                              # Eq. 7: (B, L, N, 2048)
        v = c.mean(1).to(self.neck[0].weight.dtype)                       # TAP: v_1 ... v_N
        embeddings = [neck(v[:, n]) for n, neck in enumerate(self.neck)]
        if not self.training:                           # BN, affine here, commutes with averages
            return torch.cat(embeddings, 1)
        logits = [layer(e) for layer, e in zip(self.classifier, embeddings)]
        return torch.stack(embeddings, 1), torch.stack(logits, 1)

    def finish(self, features):
        """Sec. 3.3: v = [v_1 / |v_1|, ..., v_N / |v_N|], (B, N * 2048), from the means of clips'
        outputs in eval mode, of the same shape."""
        v = features.unflatten(1, (len(self.neck), -1))
        return F.normalize(v.to(torch.promote_types(v.dtype, torch.float32)), dim=2).flatten(1)


# ----------------------------------------------------------------------------- Sec. 3.3: the losses

def loss_weights(args):
    """The weights of the losses of a learner, {name: weight}: L_xent, with xent+tri + L_triplet."""
    return {"xent": 1.0, "triplet": 1.0 if args.loss == "xent+tri" else 0.0}


def losses(outputs, pids, args):
    """Sec. 3.3: cross entropy, and with --loss xent+tri the batch triplet loss, of the video vector
    of every learner, summed over the learners, as {name: scalar}; their sum is minimised."""
    embeddings, logits = outputs
    parts = {"xent": sum(F.cross_entropy(x, pids) for x in at_least_float32(logits).unbind(1))}
    if args.loss == "xent+tri":
        parts["triplet"] = sum(batch_hard_triplet(x, pids, args.margin)
                               for x in embeddings.unbind(1))
    weights = loss_weights(args)
    return {name: weights[name] * loss for name, loss in parts.items()}


# ----------------------------------------------------------------------------- Sec. 4.1: the recipe

RECIPE = {  # flag: (the paper's value, the small run's, meaning and source[, choices])
    "frames": (4, 4, "T, frames a clip, a multiple of N (Sec. 4.1)"),
    "height": (256, 128, "of the resized frames (Sec. 4.1)"),
    "width": (128, 64, "of the resized frames (Sec. 4.1)"),
    "ids": (8, 4, "P, identities a batch (32 clips: Sec. 4.1)"),
    "clips": (4, 2, "K, clips of each of them (32 clips: Sec. 4.1)"),
    "epoch": ("tracklets", "identities", "shows all of these (open; the authors' release)",
              ("tracklets", "identities")),
    "erase": (0.0, 0.0, "probability of random erasing (Sec. 4.1, Table 4a)"),
    "epochs": (150, 8, "(Sec. 4.1)"),
    "lr": (3e-4, 5e-4, "learning rate of Adam (Sec. 4.1)"),
    "lr_step": (40, 7, "lr is divided by 10 every so many epochs (Sec. 4.1)"),
    "weight_decay": (5e-4, 5e-4, "of Adam (our choice)"),
    "weights": ("imagenet", "none", "backbone: imagenet, none or a file (Sec. 3.3)"),
    "pool": ("avg", "max", "over the final map (GAP: Eq. 1-2)", ("avg", "max")),
    "learners": (2, 2, "N, learners of TSE, 1: no erasing (Sec. 4.1, Table 3a)"),
    "seo": (True, True, "with SEO in TSE (Table 2)"),
    "h_e": (3, 3, "height of the erased block, of 16 rows (Sec. 4.1, Table 3b)"),
    "w_e": (8, 8, "its width, of 8 columns (Sec. 4.1)"),
    "s_h": (1, 1, "vertical stride of the sliding block (Sec. 4.1)"),
    "s_w": (1, 1, "horizontal stride of the sliding block (Sec. 4.1)"),
    "scaled": (True, True, "divide the products of Eq. 3 by sqrt(D) (changed; no: printed)"),
    "stop_gradient": (True, True, "none into f_k in Eq. 3 (changed; no: printed)"),
    "tsb": ((2,), (2,), "stages with a TSB behind, of 1, 2, 3 (Sec. 4.1, Table 2)"),
    "tau": (5.0, 5.0, "temperature of TSB (Eq. 6; our choice)"),
    "extra": ("none", "none", "Table 4: nl, dropblock, 3d", ("none", "nl", "dropblock", "3d")),
    "loss": ("xent+tri", "xent+tri", "xent or xent+tri (Sec. 3.3)", ("xent", "xent+tri")),
    "margin": (0.4, 0.4, "of the triplet loss, cosine distance (our choice)"),
}
SAMPLER = PKSampler            # a batch: K clips of each of P identities
SAMPLE = functools.partial(sample_strided, stride=8)  # a training clip: T frames, 8 apart
SPLIT = split_consecutive      # the test: all frames, in clips of T consecutive ones
METRIC = "cosine"              # distance of the test, of TCLNet.finish(mean of the clips' outputs)

ROWS = {  # place in the paper; settings of the recipe that a row names; (mAP, rank-1) as printed
    "tclnet": Row("Table 1: TCLNet-tri, with triplet loss", learners=2, seo=True, tsb=(2,),
                  loss="xent+tri", mars=(85.1, 89.8), duke=(96.2, 96.9), ilids=(None, 86.6),
                  gflops_of_4_frames=16.259, million_parameters=29.9),
    # From here on the cross entropy alone (Sec. 4.3)
    "tclnet-xent": Row("Tables 1, 2, 4b: TCLNet (TSE+TSB)", learners=2, seo=True, tsb=(2,),
                       loss="xent", mars=(83.0, 88.8), duke=(95.2, 96.3), ilids=(None, 84.3),
                       gflops_of_4_frames=16.259, million_parameters=29.9),
    "base": Row("Tables 2-4: base.", learners=1, tsb=(), loss="xent", mars=(79.6, 86.8),
                gflops_of_4_frames=16.246, million_parameters=23.5),
    "base+tse-wo-seo": Row("Table 2: base.+TSE-wo-SEO", learners=2, seo=False, tsb=(), loss="xent",
                           mars=(80.9, 87.2), gflops_of_4_frames=16.246, million_parameters=27.9),
    "base+tse": Row("Tables 2-4: base.+TSE", learners=2, seo=True, tsb=(), loss="xent",
                    mars=(82.5, 88.2), gflops_of_4_frames=16.251, million_parameters=29.9),
    "base+tsb": Row("Tables 2, 4b: base.+TSB", learners=1, tsb=(2,), loss="xent", mars=(82.3, 87.6),
                    gflops_of_4_frames=16.254, million_parameters=23.5),
    "tclnet-tsb1": Row("Table 2: TCLNet (TSE+TSB-stage1)", learners=2, seo=True, tsb=(1,),
                       loss="xent", mars=(82.2, 87.4), gflops_of_4_frames=16.267,
                       million_parameters=29.9),
    "tclnet-tsb2": Row("Table 2: TCLNet (TSE+TSB-stage2)", "tclnet-xent"),
    "tclnet-tsb3": Row("Table 2: TCLNet (TSE+TSB-stage3)", learners=2, seo=True, tsb=(3,),
                       loss="xent", mars=(82.6, 88.2), gflops_of_4_frames=16.255,
                       million_parameters=29.9),
    "tclnet-tsb23": Row("Table 2: TCLNet (TSE+TSB-stage23)", learners=2, seo=True, tsb=(2, 3),
                        loss="xent", mars=(82.7, 88.2), gflops_of_4_frames=16.263,
                        million_parameters=29.9),
    "base+tse-n1": Row("Table 3a: 1 learner (base.)", "base"),
    "base+tse-n2": Row("Table 3a: N = 2 learners", "base+tse"),
    "base+tse-n3": Row("Table 3a: N = 3 learners", learners=3, frames=3, tsb=(), loss="xent",
                       mars=(82.4, 88.4), gflops_of_4_frames=16.252, million_parameters=34.5),
    "base+tse-n4": Row("Table 3a: N = 4 learners", learners=4, frames=4, tsb=(), loss="xent",
                       mars=(81.0, 87.0), gflops_of_4_frames=16.253, million_parameters=38.9),
    "base+tse-he2": Row("Table 3b: erased height h_e = 2", learners=2, seo=True, h_e=2, tsb=(),
                        loss="xent", mars=(81.8, 87.2)),
    "base+tse-he3": Row("Table 3b: erased height h_e = 3", "base+tse"),
    "base+tse-he4": Row("Table 3b: erased height h_e = 4", learners=2, seo=True, h_e=4, tsb=(),
                        loss="xent", mars=(82.0, 87.4)),
    "base+tse-he5": Row("Table 3b: erased height h_e = 5", learners=2, seo=True, h_e=5, tsb=(),
                        loss="xent", mars=(81.7, 87.2)),
    "base+dropblock": Row("Table 4a: base.+DropBlock", learners=1, tsb=(), extra="dropblock",
                          loss="xent", mars=(79.8, 86.9)),
    "base+re": Row("Table 4a: base.+RE, random erasing", learners=1, tsb=(), erase=0.5, loss="xent",
                   mars=(81.5, 86.6)),
    "base+tse+re": Row("Table 4a: base.+TSE+RE", learners=2, seo=True, tsb=(), erase=0.5,
                       loss="xent", mars=(82.9, 88.1)),
    "base+3d": Row("Table 4b: base.+3D", learners=1, tsb=(), extra="3d", loss="xent",
                   mars=(80.0, 86.1), gflops_of_4_frames=22.756, million_parameters=33.7),
    "base+nl": Row("Table 4b: base.+NL, Non-local", learners=1, tsb=(), extra="nl", loss="xent",
                   mars=(82.4, 87.6), gflops_of_4_frames=21.615, million_parameters=25.6),
    "base+tse+nl": Row("Table 4b: base.+TSE+NL", learners=2, seo=True, tsb=(), extra="nl",
                       loss="xent", mars=(82.6, 87.6), gflops_of_4_frames=21.619,
                       million_parameters=32.1),
}
RELEASE = None                 # the authors offer no trained weights


def build(args, num_classes):
    """The network of a row; a checkpoint brings its own weights."""
    return TCLNet(num_classes, args.frames, args.height, args.width, args.learners, args.seo,
                  (args.h_e, args.w_e), args.tsb, args.tau, args.scaled, args.extra, args.pool,
                  "none" if args.resume else args.weights, (args.s_h, args.s_w),
                  args.stop_gradient)


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
    """For --figure, after Figures 5, 2 and 3 (b): of each frame its learner's map, R and the erased
    block, which the first learner has none of, and A of each TSB for the first frame."""
    tse, N = model.tse, len(model.tse.learners)

    def by_frame(maps):                                 # of the learners, (segments, h, w) each
        return [m for segment in zip(*maps) for m in segment]
    seen = by_frame([maps for (_, maps), in watch(model, clips, *tse.learners)])
    frames = frames.expand(len(seen), -1, -1, -1)       # of a single frame, one for each learner
    heads = [f"learner {n % N + 1}" for n in range(len(seen))]
    rows = {"map of its learner, over the mean": overlays(frames, energy(torch.stack(seen)), heads)}
    if tse.seo:
        correlations, masks = watch(model, clips, tse.seo.correlation, tse.seo.binarization)
        none = [None] * (len(seen) // N)
        rows["R: like what the former learners saw"] = overlays(
            frames, by_frame([none, *(r.mean(1) for _, r in correlations)]))
        rows["erased, as B is 0"] = overlays(
            frames, by_frame([none, *(1 - b.prod(1) for _, b in masks)]))
    for stage, tsb in model.after.items():
        if isinstance(tsb, TemporalSaliencyBoosting):
            (((x,), _),), = watch(model, clips, tsb)
            a = probability_map(x.mean((3, 4)), x.movedim(2, 4).flatten(1, 3), tsb.tau)
            a = a[0, 0].view(x.shape[1], *x.shape[3:])
            rows[f"A of the TSB behind {stage}: like the first frame, the query"] = overlays(
                frames, [None, *a[1:]])                 # the query is not in its own memory
    return "TCLNet: what the learners see", rows


if __name__ == "__main__":  # same in every script
    command_line(main)
