"""SINet: Salient-to-Broad Transition for Video Person Re-identification.

Bai, Ma, Chang, Huang, Chen. CVPR 2022.
https://openaccess.thecvf.com/content/CVPR2022/html/Bai_Salient-to-Broad_Transition_for_Video_Person_Re-Identification_CVPR_2022_paper.html

The frames of a clip tend to attend to the same salient region. SBM lets the first s frames find it and damps it in the
later ones, which then attend to broader regions; what is lost is passed to the other frames. IDM mixes all channels and
positions of a clip through learnt low-rank matrices, so that every frame is richer before.

    python sinet.py                                  # a small run on synthetic data, on any machine
    python sinet.py --data mars --gpu 0              # the paper's recipe
    python sinet.py --data mars --variant base+sbm   # a row of its tables (see VARIANTS)

Where to find what:
    Sec. 3.1, Eq. 1-2  ChannelAttentionLayer (CAL)      Sec. 3.1, Fig. 2     SalientToBroadModule (SBM)
    Sec. 3.1           KernelGenerationModule (KGM)     Sec. 3.2, Eq. 7      IntegrationDistributionModule (IDM)
    Sec. 3.1, Eq. 3-4  SuppressOperation (SO)           Sec. 4.5, Table 3    NonLocalBlock, GlobalContextBlock
    Sec. 3.1, Eq. 5-6  CrossPropagationModule (CPM)     Sec. 3.3, Fig. 4     SINet; Eq. 8: objective

What the paper leaves open, and the reading taken:
    KGM's attention   1x1 convolution to k^2 maps, BatchNorm, ReLU; the L1 norms have an eps (a zero map gives S = 1)
    Eq. 3             replicate padding; the response is averaged over the k x k window, because the softmax over h w
                      positions saturates on the plain sum (mean_response=False: the printed form)
    w_ctr             per clip, without gradient; SE: one vector per clip, reduction 4, no bias
    Eq. 4             S multiplies X, not Q, as printed
    IDM               no bias and no BatchNorm, as printed; G^D starts at zero, so that training starts from the backbone
    positions         SBM after blocks 2, 4, 6 of layer3, IDM after blocks 2 and 4 of layer2; "Same Pos.": all three SBMs
                      after block 6; one IDM: after block 4, three: after blocks 2, 3, 4
    s = 1, 2, 3       for every clip length, hence at least 4 frames
    L_mi              its supplement is not at hand: see mutual_information_loss
    Table 3           at both IDM places, Non-local with half the channels, GC block with reduction 16; Non-local (1): the mean over
                      all positions; (inverse): softmax of -affinity. The printed +2.216 GFLOPs of Non-local fit nothing tried
    epoch             every identity at least once, K clips of it
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

from common import (RandomStates, Stop, all_splits, batch_hard_triplet, batch_variance, catch_signals, command_line, compiled, complexity, complexity_table,
                    energy, evaluate, figures, first_process_first, gather, load_checkpoint, load_file, number, overlays, own_group, parallel, pick_device,
                    quiet, rank, replacing, restore, same_flags, save_file, save_rows, stop_asked, watch, world)
from data import CHUNK, DATA_SETS, SPLIT_SETS, PKSampler, TrainClips, UserError, load_dataset, normalize, sample_segments, split_segments


# ----------------------------------------------------------------------------------- Sec. 3.1: salient-to-broad module

class ChannelAttentionLayer(nn.Module):
    """CAL, Eq. 1-2: weighs channels by squeeze-and-excitation and keeps those that look at the centre of the frame.

    (B, T, C, H, W) -> (B, T, C, H, W), H and W at least 3. reduction: of the squeeze-and-excitation block.
    """

    def __init__(self, channels, reduction=4):
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction, bias=False)
        self.excite = nn.Linear(channels // reduction, channels, bias=False)

    def forward(self, x):
        if min(x.shape[-2:]) < 3:
            raise ValueError(f"CAL needs maps of at least 3x3, not {x.shape[-2]}x{x.shape[-1]}")
        gap = x.mean((1, 3, 4))
        w_ctr = gap < x[..., 1:-1, 1:-1].mean((1, 3, 4))                        # Eq. 1
        w_se = self.excite(self.squeeze(gap).relu()).sigmoid()
        return (w_ctr * w_se)[:, None, :, None, None] * x                       # Eq. 2


class KernelGenerationModule(nn.Module):
    """KGM: gathers the salient features of the former frames into a k x k kernel, K = P A_p^T.

    P (B, s, C, H, W) -> K (B, k*k, C), the taps in row-major order. kernel_size: k, odd.
    """

    def __init__(self, channels, kernel_size=3, eps=1e-12):
        super().__init__()
        self.attention = nn.Sequential(nn.Conv2d(channels, kernel_size ** 2, 1, bias=False), nn.BatchNorm2d(kernel_size ** 2), nn.ReLU())
        self.eps = eps

    def forward(self, p):
        a = self.attention(p.flatten(0, 1)).unflatten(0, p.shape[:2])           # (B, s, k*k, H, W)
        a = F.normalize(a, p=1, dim=2, eps=self.eps)                            # over the k*k maps,
        a = F.normalize(a.transpose(1, 2).flatten(2), p=1, dim=2, eps=self.eps)  # then over the s*H*W positions
        return a @ p.movedim(2, 4).flatten(1, 3)


class SuppressOperation(nn.Module):
    """SO, Eq. 3-4: where the later frames respond to the kernel of the former ones, they are damped.

    Q (B, L, C, H, W), K (B, k*k, C) -> S (B, L, 1, H, W) in (0, 1].
    beta: strength, > 0; mean_response: the response of Eq. 3 is averaged over the k x k window (False: summed, as printed).
    """

    def __init__(self, beta=5.0, mean_response=True):
        super().__init__()
        self.beta, self.mean_response = beta, mean_response

    def forward(self, q, kernel):
        (B, L, C, H, W), k = q.shape, math.isqrt(kernel.shape[1])
        # the response of every pixel to every tap is one matrix product; the convolution then adds shifted taps
        taps = q.movedim(2, 4).reshape(B, L * H * W, C) @ kernel.transpose(1, 2)
        taps = taps.to(torch.promote_types(taps.dtype, torch.float32)).view(B * L, H, W, k * k)
        for dim, n in ((1, H), (2, W)):                                         # replicate padding; torch.compile cannot take F.pad's (torch 2.15)
            taps = taps.index_select(dim, torch.arange(-(k // 2), n + k // 2, device=taps.device).clamp(0, n - 1))
        response = sum(taps[:, i // k:i // k + H, i % k:i % k + W, i] for i in range(k * k))
        log_r = (response / k ** 2 if self.mean_response else response).flatten(1).log_softmax(1)  # Eq. 3
        # Eq. 4, S = exp(beta * min(1 / (hw R) - 1, 0)), from log R, so that a vanishing R gives no 0 * inf
        s = torch.exp(self.beta * torch.expm1((-log_r - math.log(H * W)).clamp(max=0)))
        return s.view(B, L, 1, H, W).to(q.dtype)


class CrossPropagationModule(nn.Module):
    """CPM, Eq. 5-6: former frames get what the later ones lost, and later frames get the former ones' mean features.

    X (B, T, C, H, W), Y (B, T - s, C, H, W), the suppressed X of the later frames -> Z (B, T, C, H, W). alpha: degree.
    """

    def __init__(self, alpha=0.1):
        super().__init__()
        self.alpha = alpha

    def forward(self, x, y):
        former, later = x[:, :-y.shape[1]], x[:, -y.shape[1]:]
        lost = (later - y).mean((3, 4), keepdim=True).sum(1, keepdim=True)
        seen = former.mean((3, 4), keepdim=True).sum(1, keepdim=True)
        return torch.cat([former + self.alpha * lost, y + self.alpha * seen], 1)  # Eq. 5, Eq. 6


class SalientToBroadModule(nn.Module):
    """SBM, Fig. 2: the frames after the first s attend to broader regions than the first s frames do.

    (B, T, C, H, W) -> (B, T, C, H, W), T > split, H and W at least 3 (any size without CAL).
    split: s, the number of former frames; kernel_size: k, odd; beta: strength of the suppression; alpha: degree of the
    propagation; reduction: of CAL's squeeze-and-excitation; cal, cpm: leave a component out; mean_response: see
    SuppressOperation. Raises ValueError when split or kernel_size is impossible.
    """

    def __init__(self, channels, split, kernel_size=3, beta=5.0, alpha=0.1, reduction=4, cal=True, cpm=True, mean_response=True):
        super().__init__()
        if split < 1 or kernel_size % 2 == 0:
            raise ValueError(f"SBM needs split >= 1 and an odd kernel_size, not {split} and {kernel_size}")
        self.split = split
        self.cal = ChannelAttentionLayer(channels, reduction) if cal else nn.Identity()
        self.kgm = KernelGenerationModule(channels, kernel_size)
        self.so = SuppressOperation(beta, mean_response)
        self.cpm = CrossPropagationModule(alpha if cpm else 0.0)

    def forward(self, x):
        if x.shape[1] <= self.split:
            raise ValueError(f"SBM with split {self.split} needs clips of more than {self.split} frames, not {x.shape[1]}")
        weighted = self.cal(x)
        p, q = weighted[:, :self.split], weighted[:, self.split:]
        y = self.so(q, self.kgm(p)) * x[:, self.split:]
        return self.cpm(x, y)


# ------------------------------------------------------------------------ Sec. 3.2: integration and distribution module

class IntegrationDistributionModule(nn.Module):
    """IDM, Eq. 7: F' = G^D G^I F (L^I L^D + I), plus F; the matrices mix channels (G) and all positions of a clip (L).

    (B, T, C, H, W) -> (B, T, C, H, W), for the one clip size m = T*H*W of its construction.
    frames, height, width: T, H, W of the maps; reduction: c/c' and m/m'. Computed in the order of Fig. 3. Starts as identity.
    """

    def __init__(self, channels, frames, height, width, reduction=4):
        super().__init__()
        m = frames * height * width
        self.g_i = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.l_i = nn.Linear(m, m // reduction, bias=False)
        self.l_d = nn.Linear(m // reduction, m, bias=False)
        self.g_d = nn.Conv2d(channels // reduction, channels, 1, bias=False)
        nn.init.zeros_(self.g_d.weight)

    def forward(self, x):
        B, T, C, H, W = x.shape
        if T * H * W != self.l_i.in_features:
            raise ValueError(f"IDM was built for clips of {self.l_i.in_features} positions, not {T}x{H}x{W}")
        f = self.g_i(x.flatten(0, 1))
        f = f.view(B, T, -1, H, W).transpose(1, 2).flatten(2)                   # (B, c', m)
        f = self.l_d(self.l_i(f)) + f                                           # G^I F (L^I L^D + I)
        f = f.view(B, -1, T, H, W).transpose(1, 2).flatten(0, 1)
        return self.g_d(f).view(B, T, C, H, W) + x


class NonLocalBlock(nn.Module):
    """Non-local block (Wang et al., CVPR 2018) over all positions of a clip, for Table 3. (B, T, C, H, W), same shape out.

    affinity: "softmax" (embedded Gaussian), "ones" (mean over all positions) or "inverse" (softmax of the negated affinity).
    """

    def __init__(self, channels, affinity="softmax"):
        super().__init__()
        self.affinity = affinity
        if affinity != "ones":
            self.theta, self.phi = nn.Conv2d(channels, channels // 2, 1), nn.Conv2d(channels, channels // 2, 1)
        self.g = nn.Conv2d(channels, channels // 2, 1)
        self.out = nn.Sequential(nn.Conv2d(channels // 2, channels, 1), nn.BatchNorm2d(channels))
        nn.init.zeros_(self.out[1].weight)

    def forward(self, x):
        B, T, C, H, W = x.shape
        frames = x.flatten(0, 1)
        theta, phi, g = (layer(frames).view(B, T, -1, H, W).transpose(1, 2).flatten(2).transpose(1, 2) if layer else None
                         for layer in (getattr(self, "theta", None), getattr(self, "phi", None), self.g))  # (B, m, C/2)
        if self.affinity == "ones":
            y = g.mean(1, keepdim=True).expand_as(g)
        else:
            theta = -theta if self.affinity == "inverse" else theta
            y = F.scaled_dot_product_attention(theta[:, None], phi[:, None], g[:, None], scale=1.0)[:, 0]
        y = y.transpose(1, 2).view(B, -1, T, H, W).transpose(1, 2).flatten(0, 1)
        return self.out(y).view(B, T, C, H, W) + x


class GlobalContextBlock(nn.Module):
    """GC block (Cao et al., ICCVW 2019) over all positions of a clip, for Table 3. (B, T, C, H, W), same shape out."""

    def __init__(self, channels, reduction=16):
        super().__init__()
        self.mask = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(nn.Linear(channels, channels // reduction), nn.LayerNorm(channels // reduction), nn.ReLU(),
                                       nn.Linear(channels // reduction, channels))
        nn.init.zeros_(self.transform[3].weight)
        nn.init.zeros_(self.transform[3].bias)

    def forward(self, x):
        B, T, C, H, W = x.shape
        a = self.mask(x.flatten(0, 1)).view(B, -1).softmax(1)                   # (B, m)
        context = torch.einsum("btchw,bthw->bc", x, a.view(B, T, H, W))
        return x + self.transform(context)[:, None, :, None, None]


# ------------------------------------------------------------------------------------------------- Sec. 3.3: network

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


class SINet(nn.Module):
    """SINet, Fig. 4: ResNet-50 with IDMs in layer2 and SBMs in layer3, pooled over space and time, and a BN neck.

    Clips (B, T, 3, H, W), normalised -> in eval mode embeddings (B, 2048); in train mode also the logits (B, num_classes)
    and the projected frame embeddings (B, T, 2048) for mutual_information_loss.

    frames, height, width: T, H, W; with SBMs T >= 4 and H, W >= 33; IDMs fix all three.
    sbm, idms: with SBMs or not, number of IDMs, 0 to 3; same_position, cal, cpm, kernel_size, beta, alpha: see SBM;
    block: what stands at the IDMs' places, "idm", "softmax", "ones", "inverse" (Non-local) or "gc"; reduction: of the IDMs;
    pool: "avg" or "max" over the final map; weights: see resnet50. Raises ValueError for a size that it cannot take.
    """

    def __init__(self, num_classes, frames=4, height=256, width=128, sbm=True, idms=2, same_position=False, cal=True, cpm=True,
                 kernel_size=3, beta=5.0, alpha=0.1, block="idm", reduction=4, pool="avg", weights="none"):
        super().__init__()
        if sbm and frames < 4:
            raise ValueError(f"SINet's SBMs split a clip after 1, 2 and 3 frames: it needs at least 4 frames, not {frames}")
        if sbm and min(height, width) < 33:
            raise ValueError(f"SINet's SBMs need maps of 3x3 at 1/16 of the frame: at least 33x33 pixels, not {height}x{width}")
        if idms not in range(4):
            raise ValueError(f"SINet takes 0 to 3 IDMs, not {idms}")
        net = resnet50(weights)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        after = {}                                                              # layer_block: the modules behind it
        for i in {0: (), 1: (3,), 2: (1, 3), 3: (1, 2, 3)}[idms]:
            after[f"layer2_{i}"] = [
                IntegrationDistributionModule(512, frames, -(-height // 8), -(-width // 8), reduction) if block == "idm" else
                GlobalContextBlock(512) if block == "gc" else NonLocalBlock(512, block)]
        for s in (1, 2, 3) if sbm else ():
            after.setdefault("layer3_5" if same_position else f"layer3_{2 * s - 1}", []).append(
                SalientToBroadModule(1024, s, kernel_size, beta, alpha, cal=cal, cpm=cpm))
        self.after = nn.ModuleDict({place: nn.Sequential(*modules) for place, modules in after.items()})
        self.pool = pool
        self.neck = nn.BatchNorm1d(2048)
        self.classifier = nn.Linear(2048, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)
        self.projection = nn.Linear(2048, 2048)

    def forward(self, clips):
        B, T = clips.shape[:2]
        x = self.stem(clips.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            for i, block in enumerate(getattr(self, name)):
                x = block(x)
                if f"{name}_{i}" in self.after:
                    x = self.after[f"{name}_{i}"](x.unflatten(0, (B, T))).flatten(0, 1)
        frames = (x.mean((2, 3)) if self.pool == "avg" else x.amax((2, 3))).to(self.neck.weight.dtype).view(B, T, -1)
        pooled = frames.mean(1)                                                 # TAP
        embedding = self.neck(pooled)
        if not self.training:
            return embedding
        # the neck is affine: the same map takes the frames to post-BN embeddings whose mean over time is the clip's
        scale = self.neck.weight / (batch_variance(pooled, self.neck) + self.neck.eps).sqrt()
        frames = embedding[:, None] + (frames - pooled[:, None]) * scale
        return embedding, self.classifier(embedding), self.projection(frames)


# ------------------------------------------------------------------------------------------------------------- variants

# Rows of Tables 2 and 3 and of Figure 5: constructor arguments, and (mAP, rank-1) on MARS as printed in the paper. Figure 5
# prints no numbers. "+idm" is printed as 85.9 mAP in Table 2 and as 85.8 in Table 3; the row is the same.
VARIANTS = {
    "sinet": (dict(), (86.2, 91.0)),
    "base": (dict(sbm=False, idms=0), (83.2, 88.6)),
    "base+sbm": (dict(idms=0), (85.7, 90.2)),
    "base+idm": (dict(sbm=False), (85.8, 90.5)),
    "base+1idm": (dict(sbm=False, idms=1), (85.7, 89.8)),
    "base+3idm": (dict(sbm=False, idms=3), (85.8, 90.5)),
    "base+sbm-cal": (dict(idms=0, cal=False), (85.1, 89.9)),
    "base+sbm-cpm": (dict(idms=0, cpm=False), (85.4, 90.0)),
    "base+sbm-samepos": (dict(idms=0, same_position=True), (85.3, 89.5)),
    "base+sbm-k1": (dict(idms=0, kernel_size=1), None),
    "base+sbm-k3": (dict(idms=0, kernel_size=3), (85.7, 90.2)),
    "base+sbm-k5": (dict(idms=0, kernel_size=5), None),
    "base+sbm-k7": (dict(idms=0, kernel_size=7), None),
    "base+idm-r2": (dict(sbm=False, reduction=2), None),
    "base+idm-r4": (dict(sbm=False, reduction=4), (85.8, 90.5)),
    "base+idm-r8": (dict(sbm=False, reduction=8), None),
    "base+idm-r16": (dict(sbm=False, reduction=16), None),
    "base+nonlocal": (dict(sbm=False, block="softmax"), (85.1, 89.7)),
    "base+nonlocal-ones": (dict(sbm=False, block="ones"), (85.1, 90.0)),
    "base+nonlocal-inverse": (dict(sbm=False, block="inverse"), (85.0, 89.7)),
    "base+gc": (dict(sbm=False, block="gc"), (85.0, 89.8)),
}
COLUMNS = "mAP and rank-1 on MARS"
PRINTED, HEADS = (), ("neck", "classifier", "projection")                       # what the figures after rank-1 are; parts that the paper does not count
ROW_RECIPE = {}                                                                 # row -> what it changes in the recipe


# ------------------------------------------------------------------------------------------------- Sec. 3.3: objective

def mutual_information_loss(frames, pids, temperature=0.07):
    """L_mi of Eq. 8: frames of a clip should tell different things, which the same frames of other clips tell, too.

    The paper defines it in a supplement; the reading here: for frame i of a clip, positives are the frames i of the other
    clips of its identity, negatives all frames with another index in all its clips; the loss is the mean over positive
    pairs of -log(e^{s+/t} / (e^{s+/t} + sum over negatives of e^{s-/t})), s the cosine of projected embeddings.

    frames: projected frame embeddings (B, T, D); pids: (B,); temperature: t. Clips alone of their identity count nothing.
    """
    B, T = frames.shape[:2]
    z = F.normalize(frames.float().flatten(0, 1), dim=1)
    s = z @ z.T / temperature
    clip, index = (v.to(s.device).flatten() for v in torch.meshgrid(torch.arange(B), torch.arange(T), indexing="ij"))
    same = pids[clip][:, None] == pids[clip]
    positive = same & (index[:, None] == index) & (clip[:, None] != clip)
    negative = same & (index[:, None] != index)
    loss = torch.log1p((s.exp() * negative).sum(1, keepdim=True) * (-s).exp())  # |s| <= 1/t: no overflow
    return loss[positive].sum() / positive.sum().clamp(min=1)


def objective(outputs, pids, args):
    """Eq. 8: the total loss and its parts, {name: scalar}."""
    embedding, logits, frames = outputs
    parts = {"xent": F.cross_entropy(logits.float(), pids),
             "triplet": batch_hard_triplet(embedding, pids, args.margin),
             "mi": mutual_information_loss(frames, pids)}
    return parts["xent"] + args.lambda1 * parts["triplet"] + args.lambda2 * parts["mi"], parts


def picture(model, clips, frames):
    """For --figure, after Figures 1 and 6: the last map, and of each SBM the suppression maps S; the former frames have none."""
    sbms = [m for after in model.after.values() for m in after if isinstance(m, SalientToBroadModule)]
    (last,), *calls = watch(model, clips, model.layer4[-1], *(sbm.so for sbm in sbms))
    rows = [("last map: root mean square of the channels", overlays(frames, energy(last[1])))]
    for sbm, ((_, s),) in zip(sbms, calls):
        s = F.pad(s[0, :, 0].float(), (0, 0, 0, 0, sbm.split, 0), value=math.nan)
        rows.append((f"S of the SBM with s = {sbm.split}: blue is damped, red (1) is kept", overlays(frames, s, 0, 1)))
    return "SINet: where the frames look, and what the SBMs damp in the later ones", rows


# ------------------------------------------------------------------------------------------------------------ training

RECIPE = dict(epochs=160, ids=8, clips=4, frames=4, height=256, width=128, lr=3e-4, lr_step=40, erase=0.5, pool="avg", weights="imagenet",
              beta=5.0, alpha=0.1, lambda1=1.0, lambda2=0.01, margin=0.3)       # Sec. 3.1, 4.2
SMALL = dict(epochs=8, ids=4, clips=2, height=128, width=64, lr=5e-4, lr_step=7, erase=0.0, pool="max", weights="none")  # --data synthetic
SAMPLER, SAMPLE, SPLIT, METRIC = PKSampler, sample_segments, split_segments, "cosine"  # batches and clips in training, clips in test; distance


def add_paper_arguments(group):
    for name, text in (("beta", "strength of the suppression, Eq. 4"), ("alpha", "degree of the propagation, Eq. 5-6"),
                       ("lambda1", "weight of the triplet loss, Eq. 8"), ("lambda2", "weight of the mutual-information loss, Eq. 8"),
                       ("margin", "of the triplet loss, cosine distance")):
        group.add_argument(f"--{name}", type=number(float, 0), metavar="X", help=f"{text} (default {RECIPE[name]})")


def build(args, num_classes, weights):
    options, _ = VARIANTS[args.variant]
    return SINet(num_classes, args.frames, args.height, args.width, beta=args.beta, alpha=args.alpha, pool=args.pool,
                 weights=weights, **options)


def make_optimizer(model, args):
    return torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=5e-4)


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
