"""Compares the variants of the papers on synthetic people, with several seeds each.

    python tests/study.py                  # all variants, some hours on two cores; resumes
    python tests/study.py --table          # prints the tables of tests/study.csv
    python tests/study.py --trunk          # prints how much of the trunk's maps lies on people

This is run by hand; it is not a test. A ResNet-50, the trunk, is first trained on other people.
All variants start from its weights, as the papers start from ImageNet's, and those of M3D from the
2D network that was trained from it. ImageNet's weights respond to people; so that the trunk does,
too, its loss includes the share of the last map that lies outside the person's mask.

In the set `hard` all training people wear one shirt and sash, and all test people, except for six
distractors, another; a post passes in front of each, and the frames of 36x18 pixels are enlarged to
128x64. The set was chosen so that SINet's variant `base` has between 50 and 80 mAP after eight
epochs, before any other variant was run. There M3D trains for five epochs; after two, its 2D
network had 23 and 45 mAP (seeds 0 and 1). In the set `gait`, the training people look alike except
for their walk, and so do the test people. Results on synthetic people say nothing about MARS.

Results are written to results.csv in the folder of --output. Those of tests/study.csv have six
seeds in the set `hard` and three in `gait` (--seeds 0 1 2 --only gait).
"""

import argparse
import collections
import concurrent.futures
import csv
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy.stats import t as student_t
from torchvision.models import resnet50

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests/study.csv"
sys.path.insert(0, str(ROOT))

from common import command_line, energy, watch  # noqa: E402
from data import load_dataset, normalize, progress, read_clip, replacing  # noqa: E402

SETS = {  # flags of data.py. No person is in two of the sets.
    # square frames, from which the training of the trunk takes random crops
    "trunk": "--identities 600 --test-identities 1 --cameras 9 --frames 2 2 --height 128 "
             "--width 128 --masks --seed 1",
    "unseen": "--identities 1 --test-identities 60 --cameras 4 --frames 2 2 --masks --seed 4",
    "hard": "--identities 48 --test-identities 100 --cameras 3 --frames 8 8 --height 36 --width 18 "
            "--group 4999 --occlusion 100 --masks --seed 2",
    "gait": "--identities 32 --test-identities 60 --cameras 4 --frames 32 32 --gait --group 4999 "
            "--occlusion 0 --height 64 --width 32 --masks --seed 3",
}
SAME = "--amp --height 128 --width 64 --pool max --erase 0 --checkpoint-every 1000 --no-eval-first"
ADAM = "--ids 4 --clips 2 --epochs 8 --lr 3e-4 --lr-step 6"
SGD = "--ids 8 --clips 1 --lr 0.0025"
# bfloat16 is off here: with maps as small as these, convolutions of torch 2.15 gave NaN on the CPU.
GAIT = "--frames 8 --height 64 --width 32 --chunk 8 --no-amp"
LONGER = "--epochs 30 --lr-step 25"  # in gait an epoch has only 8 steps
FLAGS = {  # flags of all variants of a script
    ("hard", "sinet"): f"{ADAM} --frames 4",
    ("hard", "tclnet"): f"{ADAM} --frames 4",
    ("hard", "bicnet_tks"): f"{ADAM} --frames 4",
    ("hard", "strf"): f"{ADAM} --frames 4",
    ("hard", "m3d"): f"{SGD} --frames 4 --epochs 5 --lr-step 3",
    ("gait", "sinet"): f"{ADAM} {GAIT} {LONGER}",
    ("gait", "strf"): f"{ADAM} {GAIT} {LONGER}",
    ("gait", "m3d"): f"{SGD} {GAIT} --epochs 2 --lr-step 1",
}
# M3D's 2D network takes as many frames in a batch and in an epoch as M3D's other rows. They start
# from it, as in the paper. So does `2d-again`, which trains the 2D network once more, as a control
# of the length of the training. The learning rate is in proportion to the number of images or clips
# in a batch.
IMAGES = {
    "hard": "--frames 1 --ids 32 --chunk 2 --lr 0.01",
    "gait": "--frames 1 --ids 64 --chunk 1 --lr 0.02",
}
M3D = ("2d", "2d-again", "p3d-c", "m3d", "m3d+ral")
ROWS = {
    ("hard", "sinet"): ("base", "base+sbm", "base+sbm-window", "base+sbm-none", "base+idm", "sinet",
                        "sinet-release"),
    ("hard", "tclnet"): ("base", "base+tse-wo-seo", "base+tse", "base+tsb", "tclnet-xent"),
    ("hard", "strf"): ("p3dc", "p3dc+dynamic+static", "p3dc+fine+coarse", "strf-p3dc"),
    ("hard", "bicnet_tks"): ("base-s", "base-b", "tb", "tb+csp", "tb+csp+ao", "tb+csp+dao",
                             "bicnet-tks"),
    ("hard", "m3d"): M3D,
    ("gait", "sinet"): ("base",),
    ("gait", "strf"): ("p3dc", "strf-p3dc"),
    ("gait", "m3d"): M3D,
}
# The papers' claims: (script, quantity, row, other row). By the paper, the row beats the other: its
# mAP is higher, or its maps, learners or attention maps A are less alike. Of SINet's rows,
# `base+sbm-window` and `base+sbm-none` stand for the same row of the paper as `base+sbm`. M3D's are
# compared with `2d`, as in the paper, although `2d-again` was trained as long as they.
CLAIMS = (
    ("sinet", "mAP", "base+sbm", "base"),
    ("sinet", "mAP", "base+sbm-window", "base"),
    ("sinet", "mAP", "base+sbm-none", "base"),
    ("sinet", "mAP", "base+idm", "base"),
    ("sinet", "mAP", "sinet", "base"),
    ("sinet", "mAP", "sinet-release", "base"),
    ("sinet", "maps alike", "base+sbm", "base"),
    ("sinet", "maps alike", "sinet", "base"),
    ("tclnet", "mAP", "base+tse-wo-seo", "base"),
    ("tclnet", "mAP", "base+tse", "base+tse-wo-seo"),
    ("tclnet", "mAP", "base+tse", "base"),
    ("tclnet", "mAP", "base+tsb", "base"),
    ("tclnet", "mAP", "tclnet-xent", "base"),
    ("tclnet", "learners alike", "base+tse", "base+tse-wo-seo"),
    ("strf", "mAP", "p3dc+dynamic+static", "p3dc"),
    ("strf", "mAP", "p3dc+fine+coarse", "p3dc"),
    ("strf", "mAP", "strf-p3dc", "p3dc"),
    ("bicnet_tks", "mAP", "tb", "base-s"),
    ("bicnet_tks", "mAP", "tb+csp", "tb"),
    ("bicnet_tks", "mAP", "tb+csp+dao", "tb+csp"),
    ("bicnet_tks", "mAP", "tb+csp+dao", "tb+csp+ao"),
    ("bicnet_tks", "mAP", "bicnet-tks", "tb+csp+dao"),
    ("bicnet_tks", "mAP", "bicnet-tks", "base-b"),
    ("bicnet_tks", "A alike", "tb+csp+dao", "tb+csp+ao"),
    ("m3d", "mAP", "p3d-c", "2d"),
    ("m3d", "mAP", "m3d", "2d"),
    ("m3d", "mAP", "m3d", "p3d-c"),
    ("m3d", "mAP", "m3d+ral", "m3d"),
)
VARIANTS = {  # rows that are a variant of the script with another flag
    "base+sbm-window": "--variant base+sbm --scale window",
    "base+sbm-none": "--variant base+sbm --scale none",
    "sinet-release": "--variant sinet --release",
    "2d-again": "--variant 2d",
}
QUANTITIES = {
    "mAP": "percent",
    "rank-1": "percent",
    "on person": "share of the last maps' energy, of which each map's minimum is subtracted, in "
                 "the cells at least half of which shows the person",
    "at border": "correlation of the last maps' energy with the border of the map",
    "maps alike": "mean correlation of the last maps' energy over pairs of frames of a clip",
    "top cells shared": "share of a frame's top quarter of cells that is also another frame's",
    "R positions": "SINet: positions that the softmax R of Eq. 3 covers (its perplexity), as a "
                   "share of all; mean over the SBMs",
    "masks fixed": "SINet: share of the clips in which a relative change of SBM's kernel changes "
                   "what SBM suppresses by less than a tenth of it, so that the kernel gets hardly "
                   "any gradient; mean over the SBMs",
    "suppressed on person": "SINet: share of 1 - S on the person, which covers `person` of the "
                            "cells; mean over the SBMs",
    "person": "SINet: share of the cells of the SBMs' maps at least half of which shows the person",
    "learners alike": "TCLNet: cosine of two learners' vectors on a clip, each minus its mean over "
                      "the clips",
    "inside block": "TCLNet: mean energy of the second learner's map in the erased block, divided "
                    "by that of the whole map",
    "block on person": "TCLNet: share of the erased block on the person",
    "A alike": "BiCnet-TKS: mean correlation of the attention maps A_k over pairs of frames",
    "A top shared": "BiCnet-TKS: share of a frame's top quarter of cells that is also another's, "
                    "for A_k",
    "mask positions": "STRF: positions that a column of a mask covers (its perplexity), as a share "
                      "of all; mean over the masks",
    "temporal norm": "M3D: norm of what the temporal kernels add, over that of the spatial "
                     "convolution; mean over the layers",
    "RAL spread": "M3D: standard deviation of a spatial mask over its positions; mean over the "
                  "layers",
    "shuffled": "how far the embedding moves when a clip's frames are shuffled, over how far it "
                "moves between two clips of a tracklet (cosine distances)",
    "told apart": "set gait: how often, among the tracklets of a person and of three others under "
                  "another camera, the person's own is the nearest; by chance 0.25",
}
KEYS = ("set", "script", "row", "seed", *QUANTITIES)
LR = 1e-3  # of the trunk; rises and falls in one cycle
OUTSIDE = 0.7  # weight of the share of the energy outside the person in the trunk's loss


# ------------------------------------------------------------------------------------- the trunk

class Trunk(nn.Module):
    """torchvision's ResNet-50 with stride 1 in its last stage, as the scripts have it, maximum
    pooling, BatchNorm and a classifier. Takes images (N, 3, H, W); returns logits and the last maps
    (N, 2048, h, w)."""

    def __init__(self, identities):
        super().__init__()
        # These are torchvision's own random weights. With those of the scripts the residual
        # branches start at zero, and a short training leaves them close to it, so that what a
        # paper puts into a branch has hardly any effect.
        self.net = resnet50()
        for layer in (self.net.layer4[0].conv2, self.net.layer4[0].downsample[0]):
            layer.stride = (1, 1)
        self.neck = nn.BatchNorm1d(2048)
        self.classifier = nn.Linear(2048, identities)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, x):
        net = self.net
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        maps = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        return self.classifier(self.neck(maps.amax((2, 3)).float())), maps


def read_mask(frame, root):
    """The mask (H, W) of the person in a frame of a synthetic set in the folder `root`, from 0 to
    1."""
    path = (root / "masks" / Path(frame).relative_to(root)).with_suffix(".png")
    return torch.from_numpy(np.array(Image.open(path))).float() / 255


def frame_and_mask(frame, root):
    """A frame of a synthetic set (3, H, W), uint8, and its mask, see `read_mask`."""
    image = torch.from_numpy(np.array(Image.open(frame))).permute(2, 0, 1)
    return image, read_mask(frame, root)


def random_crop(image, mask, rng, size=(128, 64)):
    """Crops an image and its mask at the same random place, which may cut off a part of the person,
    mirrors half of the crops, and resizes the crop to `size`. The crop has 0.75 to 1 of the image's
    height and is half as wide as it is high."""
    H, W = image.shape[1:]
    height = int(H * rng.uniform(0.75, 1))
    width = height // 2
    top = rng.integers(0, H - height + 1)
    left = int(np.clip(W / 2 + rng.uniform(-0.16, 0.16) * W - width / 2, 0, W - width))
    both = torch.cat([image.float(), mask[None]])[:, top:top + height, left:left + width]
    if rng.random() < 0.5:
        both = both.flip(2)
    both = F.interpolate(both[None], size, mode="bilinear", antialias=True)[0]
    return both[:3].round().to(torch.uint8), both[3]


def share_outside(maps, masks):
    """Share of maps (N, C, h, w), in root mean squares over the channels, that lies outside the
    masks (N, H, W), as a mean over the images."""
    strength = (maps.float().square().mean(1) + 1e-12).sqrt()
    outside = 1 - F.adaptive_avg_pool2d(masks[:, None], strength.shape[1:])[:, 0]
    return ((strength * outside).sum((1, 2)) / strength.sum((1, 2))).mean()


def train_trunk(folder, epochs=3, batch=48):
    """Trains the trunk on the set `trunk` and writes folder/trunk.pth, with torchvision's names."""
    tracklets = load_dataset("synthetic", folder / "trunk").train
    pids = sorted({tracklet.pid for tracklet in tracklets})
    frames, labels = [], []
    for tracklet in tracklets:
        frames += [frame_and_mask(frame, folder / "trunk") for frame in tracklet.frames]
        labels += [pids.index(tracklet.pid)] * len(tracklet.frames)
    labels = torch.tensor(labels)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = Trunk(len(pids)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, weight_decay=5e-4)
    steps = epochs * (len(frames) // batch)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    for step in progress(range(steps), "trunk", unit=" steps"):
        if step % (len(frames) // batch) == 0:
            order = rng.permutation(len(frames))
        chosen = order[step % (len(frames) // batch) * batch:][:batch]
        crops = [random_crop(*frames[i], rng) for i in chosen]
        images, masks = map(torch.stack, zip(*crops))
        with torch.autocast("cpu", torch.bfloat16):
            logits, maps = model(normalize(images).contiguous(memory_format=torch.channels_last))
        identity = F.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
        outside = share_outside(maps, masks)
        optimizer.zero_grad()
        (identity + OUTSIDE * outside).backward()
        optimizer.step()
        scheduler.step()
        if step % 50 == 0 or step == steps - 1:
            accuracy = (logits.argmax(1) == labels[chosen]).float().mean()
            print(f"step {step} of {steps}: cross entropy {identity:.3f}, accuracy {accuracy:.2f}, "
                  f"outside the person {outside:.3f}", flush=True)
    with replacing(folder / "trunk.pth") as file:
        torch.save(model.net.state_dict(), file)


# --------------------------------------------------------------------------------- the quantities

def cells_of_person(masks, size):
    """Masks (..., H, W) -> (..., *size), 1 in the cells at least half of which shows the person."""
    return (F.adaptive_avg_pool2d(masks, size) >= 0.5).float()


def where_maps_lie(maps, masks):
    """Energy (N, h, w) and the masks (N, H, W) of the images -> (share of the energy over each
    map's minimum on the person, correlation with the border), as means over the images. The second
    is NaN if a map is all border."""
    over = maps - maps.amin((1, 2), keepdim=True)
    person = cells_of_person(masks, maps.shape[1:])
    share = (over * person).sum((1, 2)) / over.sum((1, 2)).clamp(min=1e-12)
    border = torch.ones(maps.shape[1:])
    border[1:-1, 1:-1] = 0
    if border.all():
        return share.mean().item(), math.nan
    correlations = [np.corrcoef(m.flatten(), border.flatten())[0, 1] for m in maps]
    return share.mean().item(), float(np.mean(correlations))


def alike(maps):
    """Maps (B, F, h, w) -> (mean correlation, mean share of the top quarter of cells in common)
    over all pairs of a clip's frames."""
    x = maps.flatten(2)
    z = F.normalize(x - x.mean(2, keepdim=True), dim=2)
    quarter = x.shape[2] // 4
    top = F.one_hot(x.topk(quarter, 2).indices, x.shape[2]).sum(2) / quarter ** 0.5
    pairs = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    return [(y @ y.transpose(1, 2))[:, pairs].mean().item() for y in (z, top)]


def of_frames(maps, clips, size):
    """A list of maps (B*M, h, w) or (B, M, h, w), of M frames each -> (B, F, *size), all frames."""
    maps = [m.float().reshape(clips, -1, *m.shape[-2:]) for m in maps]
    return torch.cat([F.adaptive_avg_pool2d(m, size) for m in maps], 1)


def perplexity(p):
    """How many of its N entries a distribution covers, as a share of N: 1 / N if it is one-hot, 1
    if it is flat. Takes distributions over the second axis, (B, N, ...); returns their mean."""
    entropy = -(p * p.clamp(min=1e-30).log()).sum(1)
    return (entropy.exp() / p.shape[1]).mean().item()


def told_apart(embed, queries, size, T):
    """How often, within fixed groups of four people, the nearest tracklet under another camera is
    the person's own. There is one query for each person and camera."""
    of_camera = {}
    for query in sorted(queries, key=lambda query: query.pid):
        frames = query.frames[:len(query.frames) // T * T]
        clips = normalize(read_clip(frames, size).unflatten(0, (-1, T)))
        of_camera.setdefault(query.cam, []).append(F.normalize(embed(clips).mean(0), dim=0))
    fours = [torch.stack(x[:len(x) // 4 * 4]).unflatten(0, (-1, 4)) for x in of_camera.values()]
    pairs = itertools.permutations(fours, 2)
    nearest = torch.stack([(a @ b.transpose(1, 2)).argmax(2) for a, b in pairs])
    return (nearest == torch.arange(4)).float().mean().item()


def slope_of_suppression(so, q, kernel):
    """How much what SBM suppresses in a clip, the sum of 1 - S, changes relatively when its kernel
    does: norm of the gradient with respect to the kernel, times norm of the kernel, over the sum.
    Returns a value for each of B clips, (B,)."""
    with torch.enable_grad():
        kernel = kernel.detach().requires_grad_()
        suppressed = (1 - so(q, kernel)).flatten(1).sum(1)
        gradient, = torch.autograd.grad(suppressed.sum(), kernel)
    norms = gradient.flatten(1).norm(dim=1) * kernel.detach().flatten(1).norm(dim=1)
    return norms / suppressed.detach()


def measure_sbm(script, model, clips, masks):
    """How wide the softmax of Eq. 3 is, whether gradients pass through it, and where the SBMs
    suppress."""
    sbms = [m for m in model.modules() if isinstance(m, script.SalientToBroadModule)]
    if not sbms:
        return {}
    widths, fixed, shares, persons = [], [], [], []
    for sbm, calls in zip(sbms, watch(model, clips, *[sbm.so for sbm in sbms])):
        (q, kernel), suppression = calls[0]
        divisor = {"none": 1, "window": kernel.shape[1],
                   "window+channels": kernel.shape[1] * kernel.shape[2] ** 0.5}[sbm.so.scale]
        response = script.conv_by_matmul(q, kernel / divisor).flatten(1)
        widths.append(perplexity(response.softmax(1)))                            # R of Eq. 3
        slopes = slope_of_suppression(sbm.so, q, kernel)
        fixed.append((slopes < 0.1).float().mean().item())
        person = cells_of_person(masks[:, sbm.split:], suppression.shape[-2:])
        suppressed = 1 - suppression[:, :, 0]
        shares.append(((suppressed * person).sum() / suppressed.sum().clamp(min=1e-12)).item())
        persons.append(person.mean().item())
    return {"R positions": np.mean(widths), "masks fixed": np.mean(fixed),
            "suppressed on person": np.mean(shares), "person": np.mean(persons)}


def measure_tse(model, clips, masks):
    """How alike TCLNet's learners are, and where the erased block is. Returns the quantities and
    the energy of the frames' maps (B, T, h, w)."""
    found = {}
    B = len(clips)
    learners = model.tse.learners
    modules = [model.tse, *learners]
    if model.tse.seo:
        modules.append(model.tse.seo.binarization)
    ((_, c),), *seen = watch(model, clips, *modules)
    maps = [energy(y) for ((_, y),) in seen[:len(learners)]]  # of each learner: (B * T / N, h, w)
    if len(learners) > 1:
        vectors = c.flatten(0, 1) - c.flatten(0, 1).mean(0)
        found["learners alike"] = F.cosine_similarity(vectors[:, 0], vectors[:, 1]).mean().item()
    if model.tse.seo:
        ((_, b),) = seen[-1]  # called for the second learner only
        erased = 1 - b[:, 0]
        inside = (maps[1] * erased).sum((1, 2)) / erased.sum((1, 2))
        found["inside block"] = (inside / maps[1].mean((1, 2))).mean().item()
        frames_of_learner = masks.flatten(0, 1)[1::len(learners)]
        person = cells_of_person(frames_of_learner, erased.shape[1:])
        found["block on person"] = ((erased * person).sum() / erased.sum()).item()
    return found, torch.stack(maps, 1).view(B, -1, *maps[0].shape[1:])


def measure_m3d(script, net, ral, clips):
    """What the temporal kernels of M3D add, and how far its spatial masks are from constants."""
    found = {}
    layers = [m for m in net.modules() if isinstance(m, script.M3DLayer) and len(m.temporal)]
    if layers:
        shares = []
        for layer in layers:
            spatial, *temporal = watch(net, clips, layer.spatial, *layer.temporal)
            added = sum(y for ((_, y),) in temporal)
            shares.append((added.norm() / spatial[0][1].norm()).item())
        found["temporal norm"] = np.mean(shares)
    branches = [layer.branches["s"] for layer in ral if "s" in layer.branches]
    if branches:
        spreads = [calls[0][1].flatten(1).std(1).mean().item()
                   for calls in watch(net, clips, *branches)]
        found["RAL spread"] = np.mean(spreads)
    return found


@torch.no_grad()
def measure(file, root, tracklets=32, gait=False):
    """The quantities of a trained network, except for mAP and rank-1, on clips of some queries."""
    name = Path(torch.load(file, map_location="cpu", weights_only=True)["script"]).stem
    script = importlib.import_module(name)
    model = script.load(file)
    dataset, size = load_dataset("synthetic", root), (model.args.height, model.args.width)
    T = max(4, model.args.frames)
    clips = []  # (queries, one or two clips, T, 3, H, W)
    masks = []  # of the first clip: (queries, T, H, W)
    for query in dataset.query[::max(1, len(dataset.query) // tracklets)][:tracklets]:
        two = np.arange(len(query.frames) // T * T).reshape(-1, T)[:2]
        clips.append(torch.stack([read_clip([query.frames[i] for i in clip], size)
                                  for clip in two]))
        masks.append(torch.stack([read_mask(frame, root) for frame in query.frames[:T]]))
    clips, masks = normalize(torch.stack(clips)), F.adaptive_avg_pool2d(torch.stack(masks), size)
    B, first = len(clips), clips[:, 0]

    def as_taken(x):  # the 2D network of M3D takes images
        return x.flatten(0, 1)[:, None] if model.args.frames == 1 else x

    def embed(x):
        x = model(as_taken(x)).view(len(x), -1, width).mean(1)
        return model.finish(x) if hasattr(model, "finish") else x

    def distance(a, b):
        return (1 - F.cosine_similarity(a, b)).mean().item()

    width = model(as_taken(first[:1])).shape[1]
    found = {}
    if clips.shape[1] == 2:
        embedding = embed(first)
        rng = np.random.default_rng(0)
        orders = [rng.permutation(T) for _ in range(3)]
        moved = [distance(embedding, embed(first[:, order])) for order in orders]
        found["shuffled"] = np.mean(moved) / distance(embedding, embed(clips[:, 1]))
    if gait:
        found["told apart"] = told_apart(embed, dataset.query, size, T)

    if name == "tclnet":
        of_learners, frames = measure_tse(model, first, masks)
        found |= of_learners
    else:
        net = model
        if name == "m3d":
            stream = next(iter(model.streams.values()))
            net = stream.net
            found |= measure_m3d(script, stream, stream.ral.values(), as_taken(first))
        maps = [energy(y) for _, y in watch(model, as_taken(first), net.layer4[-1])[0]]
        smallest = (4, 2) if name == "bicnet_tks" else maps[0].shape[-2:]
        frames = of_frames(maps, B, smallest)
    found["on person"], found["at border"] = where_maps_lie(frames.flatten(0, 1),
                                                            masks.flatten(0, 1))
    found["maps alike"], shared = alike(frames)
    if frames[0, 0].numel() >= 4:  # else there is no quarter
        found["top cells shared"] = shared
    if name == "sinet":
        found |= measure_sbm(script, model, first, masks)
    if name == "bicnet_tks" and len(model.dao) > 0:
        maps = [y[1] for ((_, y),) in watch(model, first, *model.dao)]
        found["A alike"], found["A top shared"] = alike(of_frames(maps, B, (4, 2)))
    if name == "strf":
        fams = [m for m in model.modules() if isinstance(m, script.FactorizedAttentionMask)]
        widths = [perplexity(mask) for ((_, mask),) in watch(model, first, *fams)]
        if fams:
            found["mask positions"] = np.mean(widths)
    return {key: value for key, value in found.items() if np.isfinite(value)}


@torch.no_grad()
def measure_trunk(file, root):
    """(share on the person, correlation with the border, share of the cells that show the person)
    of a trunk's last maps, on all frames of the queries of a set."""
    model = Trunk(1).eval()
    model.net.load_state_dict(torch.load(file, weights_only=True))
    maps, masks = [], []
    for query in load_dataset("synthetic", root).query:
        images, persons = map(torch.stack, zip(*[frame_and_mask(f, root) for f in query.frames]))
        maps.append(energy(model(normalize(images))[1]))
        masks.append(persons)
    maps, masks = torch.cat(maps), torch.cat(masks)
    return *where_maps_lie(maps, masks), cells_of_person(masks, maps.shape[1:]).mean().item()


# ------------------------------------------------------------------------------------- the runs

def command(*words, log, threads):
    """Runs python with these words in the repository's folder; its output goes to a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(log, "ab") as file:
        code = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, stdout=file,
                              stderr=file, env=environment).returncode
    if code:
        raise SystemExit(f"{' '.join(map(str, words))} ended with {code}: see {log}")


def prepare(folder):
    """Makes the sets, and trains the trunk: folder/trunk.pth, with torchvision's names."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    log = folder / "prepare.log"
    for name, flags in SETS.items():
        if not (folder / name).exists():
            command("data.py", "--synthetic", folder / name, *flags.split(), log=log, threads=1)
    if not (folder / "trunk.pth").exists():
        train_trunk(folder)


def flags_of(which, script, row, seed):
    """The flags of a row's run, without paths."""
    flags = VARIANTS.get(row, f"--variant {row}").split()
    flags += f"--seed {seed} {SAME} {FLAGS[which, script]}".split()
    if row.startswith("2d"):
        flags += IMAGES[which].split()
    return flags


def study(folder, which, script, row, seed, threads):
    """Trains and measures a row with a seed; returns its results."""
    output = folder / f"runs/{which}/{script}/{row}-{seed}"
    log = output.with_suffix(".log")
    output.parent.mkdir(parents=True, exist_ok=True)
    flags = flags_of(which, script, row, seed)
    if script == "m3d" and row != "2d":
        flag = "--init" if row == "2d-again" else "--init-2d"
        flags += [flag, output.with_name(f"2d-{seed}") / "last.pt"]
    command(f"{script}.py", "--root", folder / which, "--weights", folder / "trunk.pth", *flags,
            "--resume", "--output", output, log=log, threads=threads)
    command("tests/study.py", "--output", folder, "--measure", output, which, log=log,
            threads=threads)
    with open(output / "log.csv") as file:
        *_, last = csv.DictReader(file)
    found = json.loads((output / "measured.json").read_text())
    found |= {key: float(last[key]) for key in ("mAP", "rank-1")}
    return {"set": which, "script": script, "row": row, "seed": seed, **found}


def drop_states(folder, row):
    """Keeps the network of a row whose results are written if its seed is 0 (for pictures) or if
    other rows start from it (2d). Otherwise deletes it."""
    last = folder / f"runs/{row['set']}/{row['script']}/{row['row']}-{row['seed']}/last.pt"
    if row["seed"] and row["row"] != "2d":
        last.unlink()
        return
    checkpoint = torch.load(last, map_location="cpu", weights_only=True)
    for key in ("optimizer", "scheduler", "random"):  # pictures do not need them
        checkpoint.pop(key, None)
    with replacing(last) as file:
        torch.save(checkpoint, file)


def results(file):
    """The rows of a file of results, without empty cells; none if there is no file."""
    if not file.exists():
        return []
    with open(file, newline="") as lines:
        return [{key: value for key, value in row.items() if value != ""}
                for row in csv.DictReader(lines)]


def differences(rows, script, quantity, *, of, minus):
    """The quantity of the row `of` minus that of the row `minus` with the same seed, for each seed
    that both have."""
    ours, theirs = ({row["seed"]: float(row[quantity]) for row in rows
                     if (row["script"], row["row"]) == (script, name) and quantity in row}
                    for name in (of, minus))
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs)]


def interval(values):
    """Half the width of the 95 % confidence interval of the values' mean (Student's t)."""
    quantile = student_t.ppf(0.975, len(values) - 1)
    return quantile * np.std(values, ddof=1) / len(values) ** 0.5


def claims(rows):
    """Prints, in Markdown, what the set `hard` says about the papers' claims."""
    rows = [row for row in rows if row["set"] == "hard"]
    by_row = collections.defaultdict(list)
    for row in rows:
        by_row[row["script"], row["row"]].append(float(row["mAP"]))
    deviations = [np.std(values, ddof=1) for values in by_row.values() if len(values) > 1]
    if not deviations:  # every row has a single seed
        return
    print("\n**claims of the papers, in the set hard**\n")
    print("| script | quantity | row | minus | paper, MARS | study | claim |")
    print("|" + "---|" * 7)
    for script, quantity, name, other in CLAIMS:
        found = differences(rows, script, quantity, of=name, minus=other)
        if len(found) < 2:
            continue
        mean, half = np.mean(found), interval(found)
        outcome = "open"
        if abs(mean) > half:
            outcome = "agrees" if (mean > 0) == (quantity == "mAP") else "contradicts"
        if quantity == "mAP":
            variants = importlib.import_module(script).ROWS
            flags = [VARIANTS.get(row, f"--variant {row}").split() for row in (name, other)]
            ours, theirs = (variants[words[1]].results["mars"][0] for words in flags)
            cells = f"{ours - theirs:+.1f} | {mean:+.1f} ± {half:.1f}"
        else:
            cells = f"lower | {mean:+.2f} ± {half:.2f}"
        print(f"| {script} | {quantity} | {name} | {other} | {cells} | {outcome} |")
    print("\n- study: mean difference between the runs with the same seed; after ±, half the width "
          "of its 95 % confidence interval (Student's t)")
    print("- claim: the study agrees with it or contradicts it if the interval does not contain 0; "
          "else it is open, which does not mean that there is no effect. If no module had an "
          f"effect, about {0.05 * len(CLAIMS):.0f} of the {len(CLAIMS)} claims would not be open.")
    print(f"- median of the rows' standard deviations over the seeds: {np.median(deviations):.0f} "
          "points of mAP")


def table(rows):
    """Prints, in Markdown, mean and standard deviation over the seeds, a table for each set, and
    the outcome of the papers' claims."""
    for which in SETS:
        mine = [row for row in rows if row["set"] == which]
        keys = [key for key in QUANTITIES if any(key in row for row in mine)]
        if not mine:
            continue
        columns = ["script", "row", "seeds", *keys]
        print(f"\n**{which}**\n\n| {' | '.join(columns)} |")
        print("|" + "---|" * len(columns))
        order = [(script, name) for (a, script), names in ROWS.items() if a == which
                 for name in names]
        for script, name in order:
            seeds = [row for row in mine if (row["script"], row["row"]) == (script, name)]
            if not seeds:
                continue
            cells = []
            for key in keys:
                values = [round(float(row[key]), 6) + 0.0 for row in seeds if key in row]
                spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
                cells.append(f"{np.mean(values):.3g}{spread}" if values else "")
            print(f"| {script} | {name} | {len(seeds)} | {' | '.join(cells)} |")
    print("\n- after ±: the standard deviation over the seeds")
    print("\n".join(f"- {key}: {meaning}" for key, meaning in QUANTITIES.items()))
    claims(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "study", help="folder (study)")
    parser.add_argument("--seeds", type=int, nargs="*", default=range(6), help="(0 1 2 3 4 5)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--only", nargs="*",
                        help="only these sets, scripts or rows, also as hard/m3d/2d")
    parser.add_argument("--table", nargs="?", type=Path, const=RESULTS, metavar="FILE",
                        help="only print the table of a file of results (tests/study.csv)")
    parser.add_argument("--trunk", action="store_true",
                        help="only print where the last maps of the trunk in --output lie; it "
                             "is trained first if it is not there")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.output.resolve()
    if args.measure:
        output, which = Path(args.measure[0]), args.measure[1]
        found = measure(output / "last.pt", folder / which, gait=which == "gait")
        (output / "measured.json").write_text(json.dumps(found))
        return
    if args.table:
        table(results(args.table))
        return
    todo = [(which, script, row, seed)
            for seed in args.seeds for (which, script), names in ROWS.items() for row in names
            if not args.only or {*args.only} & {which, script, row, f"{which}/{script}",
                                                f"{which}/{script}/{row}"}]
    if not todo and not args.trunk:
        raise SystemExit(f"--only {' '.join(args.only or ())} and --seeds name no row")
    prepare(folder)
    if args.trunk:
        share, border, person = measure_trunk(folder / "trunk.pth", folder / "unseen")
        print(f"the trunk's last maps: {share:.2f} of their energy on the person, who covers "
              f"{person:.2f} of the cells; correlation with the border {border:.2f}")
        return
    file = folder / "results.csv"
    done = {tuple(row[key] for key in KEYS[:4]) for row in results(file)}
    todo = [run for run in todo if tuple(map(str, run)) not in done]
    threads = max(1, os.cpu_count() // args.jobs)
    start, count, failed = time.time(), 0, 0
    for first in (True, False):  # the rows 2d, and those that may start from them
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            runs = [pool.submit(study, folder, *run, threads) for run in todo
                    if (run[2] == "2d") == first]
            for future in concurrent.futures.as_completed(runs):
                if future.exception():  # the other rows go on
                    print(future.exception(), flush=True)
                    failed += 1
                    continue
                row, new = future.result(), not file.exists()
                with open(file, "a", newline="") as lines:
                    writer = csv.DictWriter(lines, KEYS)
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
                drop_states(folder, row)
                count += 1
                print(f"[{count}/{len(todo)}] {row['set']} {row['script']} {row['row']} seed "
                      f"{row['seed']}: mAP {row['mAP']:.1f}, rank-1 {row['rank-1']:.1f}  "
                      f"({time.time() - start:.0f} s)", flush=True)
    table(results(file))
    if failed:
        raise SystemExit(f"{failed} of {len(todo)} runs failed, see above")


if __name__ == "__main__":
    command_line(main)
