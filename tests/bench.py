"""Speed as ratios, measured in one run on one machine; run by hand, never a timed test.

    python tests/bench.py                        # all parts, CPU or the first GPU
    python tests/bench.py inference --clips 4    # a part, with 4 clips a batch
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bicnet_tks
import m3d
import sinet
import strf
import tclnet


def make(row, script, frames, size, **options):
    """The network of a row of VARIANTS."""
    network = {bicnet_tks: bicnet_tks.BiCnet, sinet: sinet.SINet, tclnet: tclnet.TCLNet, m3d: m3d.TwoStreamM3D, strf: strf.STRFNet}[script]
    sizes = {} if script in (m3d, strf) else dict(height=size[0], width=size[1])
    return network(625, frames, **sizes, **{**script.VARIANTS[row][0], **options})


# (script, row, its 2D baseline, frames a clip); tclnet's base is the plain network that STRF starts from, too
PAIRS = [(bicnet_tks, "bicnet-tks", (bicnet_tks, "base-b"), 8), (sinet, "sinet", (sinet, "base"), 4), (tclnet, "tclnet", (tclnet, "base"), 4),
         (m3d, "m3d", (m3d, "2d"), 8), (m3d, "m3d+ral", (m3d, "2d"), 8), (strf, "p3dc", (tclnet, "base"), 8), (strf, "strf-p3dc", (tclnet, "base"), 8)]


def seconds(work, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired(a, b, device, repeats):
    """Alternating runs of a and b: (median seconds of a, of b, median, minimum and maximum of the ratios)."""
    a(), b()
    times = [(seconds(a, device), seconds(b, device)) for _ in range(repeats)]
    ratios = [x / y for x, y in times]
    return *(statistics.median(t) for t in zip(*times)), statistics.median(ratios), min(ratios), max(ratios)


def inference(args, device):
    """Milliseconds a clip of a full model and of its paper's 2D baseline on the same frames, eval mode."""
    print(f"inference, {args.clips} clips of {args.height}x{args.width} a batch, {'bfloat16' if args.amp else 'float32'}, {device}")
    print(f"  {'model / baseline':36} {'ms a clip':>10} {'ms a clip':>10} {'ratio':>7}   (min - max of {args.repeats})")
    for script, row, (other, base), frames in PAIRS:
        models = []
        for owner, name in ((script, row), (other, base)):
            stream = dict(stream=m3d.ROW_RECIPE[name]["stream"]) if owner is m3d else {}
            model = make(name, owner, frames, (args.height, args.width), **stream).eval().to(device)
            for layer in model.modules():
                if isinstance(layer, torch.nn.Conv2d):
                    layer.to(memory_format=torch.channels_last)
            models.append(model)
        name = f"{script.__name__}.py {row} / {'2D' if other is not script else base}"
        clips = torch.randn(args.clips, frames, 3, args.height, args.width, device=device)

        def run(model):
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                model(clips)
        a, b, ratio, low, high = paired(lambda: run(models[0]), lambda: run(models[1]), device, args.repeats)
        print(f"  {name:36} {1e3 * a / args.clips:10.1f} {1e3 * b / args.clips:10.1f} {ratio:7.2f}   ({low:.2f} - {high:.2f})", flush=True)


PARTS = {"inference": inference}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=f"of {', '.join(PARTS)} (default all)")
    parser.add_argument("--clips", type=int, default=2, help="a batch (default 2)")
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9, help="paired runs (default 9)")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--gpu", default="0" if torch.cuda.is_available() else "cpu", help="GPU, or cpu")
    args = parser.parse_args()
    device = torch.device("cpu" if args.gpu == "cpu" else f"cuda:{args.gpu}")
    for part in args.parts or PARTS:
        PARTS[part](args, device)
