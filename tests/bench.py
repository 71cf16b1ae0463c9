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
import sinet
import tclnet

# name: (the model, what it is compared with, frames a clip)
PAIRS = {
    "bicnet_tks.py / its base-b": (lambda **o: bicnet_tks.BiCnet(625, **o), lambda **o: bicnet_tks.BiCnet(625, **bicnet_tks.VARIANTS["base-b"][0], **o), 8),
    "sinet.py / its base": (lambda **o: sinet.SINet(625, **o), lambda **o: sinet.SINet(625, **sinet.VARIANTS["base"][0], **o), 4),
    "tclnet.py / its base": (lambda **o: tclnet.TCLNet(625, **o), lambda **o: tclnet.TCLNet(625, **tclnet.VARIANTS["base"][0], **o), 4),
}


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
    print(f"  {'model / baseline':32} {'ms a clip':>10} {'ms a clip':>10} {'ratio':>7}   (min - max of {args.repeats})")
    for name, (full, base, frames) in PAIRS.items():
        models = [make(frames=frames, height=args.height, width=args.width).eval().to(device, memory_format=torch.channels_last) for make in (full, base)]
        clips = torch.randn(args.clips, frames, 3, args.height, args.width, device=device)

        def run(model):
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                model(clips)
        a, b, ratio, low, high = paired(lambda: run(models[0]), lambda: run(models[1]), device, args.repeats)
        print(f"  {name:32} {1e3 * a / args.clips:10.1f} {1e3 * b / args.clips:10.1f} {ratio:7.2f}   ({low:.2f} - {high:.2f})", flush=True)


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
