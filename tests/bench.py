"""Speed as ratios, measured in one run on one machine; run by hand, never a timed test.

    python tests/bench.py                        # all parts, CPU or the first GPU
    python tests/bench.py inference --clips 4    # a part, with 4 clips a batch
"""
import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torchvision
from PIL import Image
from scipy.io import loadmat

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bicnet_tks
import common
import data
import m3d
import sinet
import strf
import tclnet

MARS = Path(__file__).parent / "mars_info"
NETWORKS = {bicnet_tks: bicnet_tks.BiCnet, sinet: sinet.SINet, tclnet: tclnet.TCLNet, m3d: m3d.TwoStreamM3D, strf: strf.STRFNet}

# (script, row, frames a clip, its baseline: None for the plain ResNet-50, and at most how many times its time is wanted)
ROWS = [(bicnet_tks, "bicnet-tks", 8, "base-b", 0.60), (sinet, "sinet", 4, None, 1.20), (tclnet, "tclnet", 4, None, 1.20), (m3d, "m3d", 8, None, 1.20),
        (m3d, "m3d+ral", 8, None, 1.20), (strf, "strf-p3dc", 8, None, 1.35), (strf, "strf-i3d", 8, None, None), (strf, "p3dc", 8, None, None)]


class Plain(nn.Module):
    """torchvision's ResNet-50 on the frames, averaged over the clip, with a BN neck and a classifier."""

    def __init__(self, last_stride):
        super().__init__()
        self.net, self.neck, self.classifier = sinet.resnet50("none", last_stride), nn.BatchNorm1d(2048), nn.Linear(2048, 625)
        self.net.fc = nn.Identity()

    def forward(self, clips):
        net, (B, T) = self.net, clips.shape[:2]
        x = clips.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = net.layer4(net.layer3(net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x))))))))
        x = self.neck(x.mean((2, 3)).view(B, T, -1).mean(1))
        return (x, self.classifier(x)) if self.training else x


def make(script, row, frames, size, device, other=None):
    """The network of a row of VARIANTS as its script makes it, or for no script the plain one beside that of `other`, on the device."""
    if script is None:
        model = Plain(2 if other is m3d else 1)
    else:
        sizes = {} if script in (m3d, strf) else dict(height=size[0], width=size[1])
        stream = dict(stream=m3d.ROW_RECIPE[row]["stream"]) if script is m3d else {}
        model = NETWORKS[script](625, frames, **sizes, **stream, **script.VARIANTS[row][0])
    for layer in model.to(device).modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)
    return model


def seconds(work, device=torch.device("cpu")):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired(a, b, repeats, device=torch.device("cpu")):
    """Alternating runs of a and b: (median seconds of a, of b, median, minimum and maximum of the ratios)."""
    a(), b()
    times = [(seconds(a, device), seconds(b, device)) for _ in range(repeats)]
    ratios = [x / y for x, y in times]
    return *(statistics.median(t) for t in zip(*times)), statistics.median(ratios), min(ratios), max(ratios)


def rows_table(args, title, work):
    """The table of ROWS, where work(script or None, row, model, clips, pids) gives a function to time."""
    print(f"{title}, {args.clips} clips of {args.height}x{args.width} a batch, {'bfloat16' if args.amp else 'float32'}, {args.device}")
    print(f"  {'model / baseline':36} {'ms a clip':>10} {'ms a clip':>10} {'ratio':>7} {'wanted':>7}   (min - max of {args.repeats})")
    for script, row, frames, base, wanted in ROWS:
        if args.only and args.only not in f"{script.__name__} {row}":
            continue
        size, works = (args.height, args.width), []
        clips, pids = torch.randn(args.clips, frames, 3, *size, device=args.device), torch.arange(args.clips, device=args.device) // 2
        for owner, name in ((script, row), (script if base else None, base)):
            works.append(work(owner, name, make(owner, name, frames, size, args.device, script), clips, pids, script))
        a, b, ratio, low, high = paired(*works, args.repeats, args.device)
        name = f"{script.__name__}.py {row} / {base or 'plain'}"
        print(f"  {name:36} {1e3 * a / args.clips:10.1f} {1e3 * b / args.clips:10.1f} {ratio:7.2f} {wanted or '':>7}   ({low:.2f} - {high:.2f})", flush=True)


def inference(args):
    """Milliseconds a clip, eval mode: the full model over its baseline on the same frames."""
    def work(owner, row, model, clips, pids, script):
        model.eval()

        def run():
            with torch.inference_mode(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
                model(clips)
        return run
    rows_table(args, "inference", work)


def training(args):
    """Milliseconds a clip of a training step (forward, losses, backward, Adam): the full model over its baseline."""
    def work(owner, row, model, clips, pids, script):
        model.train()
        options = argparse.Namespace(**{**script.RECIPE, **script.ROW_RECIPE.get(row, {}), "variant": row})
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

        def run():
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
                outputs = model(clips)
            if owner:
                loss, _ = owner.objective(outputs, pids, options)
            else:                                                 # cross entropy and the triplet loss, as in every script
                loss = nn.functional.cross_entropy(outputs[1].float(), pids) + common.batch_hard_triplet(outputs[0], pids, 0.3)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return run
    rows_table(args, "training step", work)


def mars_ids():
    """(query pids, query cameras, gallery pids, gallery cameras) of MARS' real index."""
    rows = loadmat(MARS / "tracks_test_info.mat")["track_test_info"].astype(int)
    query = rows[loadmat(MARS / "query_IDX.mat")["query_IDX"].ravel().astype(int) - 1]
    gallery = rows[rows[:, 2] >= 0]
    return query[:, 2], query[:, 3], gallery[:, 2], gallery[:, 3]


def running_list(d, q_pids, q_cams, g_pids, g_cams):
    """CMC and mAP as most toolboxes compute them: for each query a Python loop over the ranked gallery that keeps lists."""
    cmc, aps = np.zeros(len(g_pids)), []
    for q in range(len(d)):
        order, found, seen, precisions = np.argsort(d[q]), 0, 0, []
        for g in order:
            if g_pids[g] == q_pids[q] and g_cams[g] == q_cams[q]:
                continue
            seen += 1
            if g_pids[g] == q_pids[q]:
                found += 1
                precisions.append(found / seen)
                if found == 1:
                    cmc[seen - 1:] += 1
        if precisions:
            aps.append(sum(precisions) / len(precisions))
    return cmc / len(aps), sum(aps) / len(aps)


def features(n, g):
    return torch.nn.functional.normalize(torch.randn(n, 2048, generator=g), dim=1)


def retrieval(args):
    """CMC/mAP and re-ranking at MARS' size with the real identities and cameras, and how ranking grows with the gallery."""
    ids, g = mars_ids(), torch.Generator().manual_seed(0)
    d = common.distances(features(len(ids[0]), g), features(len(ids[2]), g)).numpy()
    print(f"CMC/mAP, {d.shape[0]:,} x {d.shape[1]:,}, float32, one thread")
    ours, sort, ratio, low, high = paired(lambda: common.cmc_map(d, *ids), lambda: np.argsort(d), args.repeats)
    print(f"  cmc_map {ours:.2f} s, numpy.argsort alone {sort:.2f} s: ratio {ratio:.2f}, wanted 2.0   ({low:.2f} - {high:.2f})")
    few = 60
    loop = seconds(lambda: running_list(d[:few], *(v[:few] for v in ids[:2]), *ids[2:])) * len(d) / few
    a, b = common.cmc_map(d[:few], *(v[:few] for v in ids[:2]), *ids[2:])[1], running_list(d[:few], *(v[:few] for v in ids[:2]), *ids[2:])[1]
    assert abs(a - b) < 1e-9
    print(f"  the loop with a running list {loop:.1f} s (from {few} queries): {loop / ours:.0f} times slower, wanted 20")
    print("growth with the gallery, 500 queries")
    rng = np.random.default_rng(0)
    for n in (5_000, 10_000, 20_000, 40_000):
        wide = rng.random((500, n), dtype=np.float32)
        random_ids = [rng.integers(1, 1000, 500), rng.integers(1, 7, 500), rng.integers(0, 1000, n), rng.integers(1, 7, n)]
        t = min(seconds(lambda: common.cmc_map(wide, *random_ids)) for _ in range(3))
        print(f"  {n:7,} gallery tracklets {t:7.2f} s   {1e9 * t / (500 * n * np.log2(n)):.2f} ns for each query n log2 n")
    code = ("import sys, resource, time, numpy as np, torch\nsys.path.insert(0, %r)\nfrom common import cmc_map, distance_blocks, rerank\n" % str(ROOT)
            + "g = torch.Generator().manual_seed(0); rng = np.random.default_rng(0)\n")
    large = (code + "q, x = torch.randn(10_000, 128, generator=g), torch.randn(100_000, 128, generator=g)\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
             "ids = rng.integers(1, 3000, 10_000), rng.integers(1, 7, 10_000), rng.integers(1, 3000, 100_000), rng.integers(1, 7, 100_000)\n"
             "t = time.perf_counter(); cmc_map(((rows, d.numpy()) for rows, d in distance_blocks(q, x)), *ids)\n"
             "print(f'{time.perf_counter() - t:.0f} s, {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 20:.2f} GB beyond the features')")
    print("  10,000 x 100,000:", subprocess.run([sys.executable, "-c", large], capture_output=True, text=True, check=True).stdout.strip(), "(wanted below 4 GB)")
    again = (code + "q, x = torch.randn(1980, 2048, generator=g), torch.randn(11_310, 2048, generator=g)\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
             "t = time.perf_counter(); rerank(q, x)\n"
             "print(f'{time.perf_counter() - t:.0f} s, {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 20:.2f} GB beyond the features')")
    print("  re-ranking, 1,980 x 11,310:", subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, check=True).stdout.strip())


def write_jpegs(folder, count, size=(256, 128)):
    """Frames with a texture like a photo's: smooth, with some noise."""
    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (size[0] // 16, size[1] // 16, 3), dtype=np.uint8)).resize(size[::-1], Image.BICUBIC)
        frame = np.asarray(small, np.float32) + rng.normal(0, 8, (*size, 3))
        paths.append(f"{folder}/{i:05}.jpg")
        Image.fromarray(frame.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


class UsualClips(torch.utils.data.Dataset):
    """The usual path: Pillow -> ToTensor -> Normalize for each frame, float32, default collate."""

    def __init__(self, clips, size):
        self.clips, self.size = clips, size
        self.transform = torchvision.transforms.Compose([torchvision.transforms.Resize(size), torchvision.transforms.ToTensor(),
                                                         torchvision.transforms.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)])

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        return torch.stack([self.transform(Image.open(path).convert("RGB")) for path in self.clips[i]]), 0


class OurClips(UsualClips):
    def __getitem__(self, i):
        return data.read_clip(self.clips[i], self.size), 0


def loader(args):
    """Frames a second from JPEG files to batches of clips: uint8 against the usual float path, and decoding alone."""
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(folder, 512)
        clips = [paths[i:i + 8] for i in range(0, len(paths), 8)]

        def deliver(kind, workers, decode=None):
            batches = torch.utils.data.DataLoader(kind(clips, (args.height, args.width)), 8, num_workers=workers)
            for _ in batches:
                pass
        print(f"loader, JPEG frames of 256x128 as clips of 8 frames of {args.height}x{args.width}, batches of 8 clips")
        for workers in (0, 2):
            usual, ours, ratio, low, high = paired(lambda: deliver(UsualClips, workers), lambda: deliver(OurClips, workers), args.repeats)
            print(f"  {workers} workers: {512 / ours:,.0f} frames/s, usual path {512 / usual:,.0f}: ratio {ratio:.2f}, wanted 2.0   ({low:.2f} - {high:.2f})", flush=True)

        def pillow():
            for path in paths:
                Image.open(path).convert("RGB").load()

        def tv():
            for path in paths:
                torchvision.io.decode_jpeg(torchvision.io.read_file(path))
        try:
            tv()
            a, b, ratio, low, high = paired(pillow, tv, args.repeats)
            print(f"  decoding alone: Pillow {512 / a:,.0f} frames/s, torchvision {512 / b:,.0f}   ({low:.2f} - {high:.2f})")
        except (RuntimeError, AttributeError) as error:
            print(f"  decoding alone: Pillow {512 / seconds(pillow):,.0f} frames/s, torchvision has no decoder ({error})")


def extraction(args):
    """All-frames features of tracklets as long as MARS' (2 to 920 frames): frames/s over the bare forward at the same batch size."""
    rows = loadmat(MARS / "tracks_test_info.mat")["track_test_info"].astype(int)
    lengths = (rows[:, 1] - rows[:, 0] + 1)[rows[:, 2] >= 0]
    lengths = np.sort(lengths)[np.linspace(0, len(lengths) - 1, args.tracklets).astype(int)]
    size, T, batch = (args.height, args.width), 4, 8
    model = make(sinet, "sinet", T, size, args.device).eval()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(folder, 64, size)
        tracklets = [data.Tracklet(tuple(paths[i % 64] for i in range(n)), 1, 1) for n in lengths.tolist()]
        clips = torch.randn(batch, T, 3, *size, device=args.device)

        def bare():
            with torch.inference_mode():
                for _ in range(count):
                    model(clips)
        frames, count = int(lengths.sum()), -(-sum(-(-n // T) for n in lengths.tolist()) // batch)
        print(f"extraction, {len(lengths)} tracklets of {lengths.min()} to {lengths.max()} frames, mean {lengths.mean():.0f}, {size[0]}x{size[1]}, {batch} clips of {T} a batch")
        a, b, ratio, low, high = paired(bare, lambda: common.extract(model, tracklets, sinet.SPLIT, T, size, batch, args.workers), min(args.repeats, 3), args.device)
        print(f"  {frames / b:.1f} frames/s, bare forward {frames / a:.1f}: ratio {ratio:.2f}, wanted 0.92   ({low:.2f} - {high:.2f})")
        if args.device.type == "cpu":
            for longest in (64, 1024):
                code = (f"import sys, resource\nsys.path[:0] = [{str(ROOT)!r}]\nimport common, data, sinet\nmodel = sinet.SINet(2, 4, 64, 64)\n"
                        f"t = [data.Tracklet({tuple(paths[:1])!r} * {longest}, 1, 1)]\ncommon.extract(model, t, sinet.SPLIT, 4, (64, 64), 8)\n"
                        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)")
                done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
                print(f"  peak memory with a tracklet of {longest} frames: {done.stdout.strip()} MB")


def growth(args):
    """How a clip's inference grows with its frames, and a batch's with its clips."""
    print(f"growth, inference at {args.height}x{args.width}, ms a frame (a module that grows faster than its frames shows here)")
    for script, row, counts in ((sinet, "sinet", (4, 8, 16)), (tclnet, "tclnet", (4, 8, 16)), (bicnet_tks, "bicnet-tks", (8, 16)), (m3d, "m3d+ral", (4, 8, 16)),
                                (strf, "strf-p3dc", (4, 8, 16))):
        shown = []
        for clips, frames in [(1, T) for T in counts] + [(4, counts[0])]:
            model, x = make(script, row, frames, (args.height, args.width), args.device).eval(), torch.randn(clips, frames, 3, args.height, args.width, device=args.device)
            with torch.inference_mode():
                model(x)
                t = statistics.median(seconds(lambda: model(x), args.device) for _ in range(min(args.repeats, 5)))
            shown.append(f"{clips} x {frames}: {1e3 * t / clips / frames:.1f}")
        print(f"  {script.__name__}.py {row:12}" + "   ".join(shown), flush=True)


def precision(args):
    """What channels_last and bfloat16 autocast give in a training step of SINet."""
    size, T = (args.height, args.width), 4
    clips, pids = torch.randn(args.clips, T, 3, *size, device=args.device), torch.arange(args.clips, device=args.device) // 2

    def step(model, amp):
        def run():
            with torch.autocast(args.device.type, torch.bfloat16, enabled=amp):
                outputs = model(clips)
            sinet.objective(outputs, pids, argparse.Namespace(**sinet.RECIPE))[0].backward()
        return run
    ours = make(sinet, "sinet", T, size, args.device).train()
    other = sinet.SINet(625, T, *size).to(args.device).train()                 # its forward asks for channels_last maps: the weights are converted each time
    for name, a, b in (("contiguous weights / channels_last", step(other, False), step(ours, False)), ("float32 / bfloat16 autocast", step(ours, False), step(ours, True))):
        _, _, ratio, low, high = paired(a, b, args.repeats, args.device)
        print(f"  training step of sinet.py, {name}: {ratio:.2f}   ({low:.2f} - {high:.2f})", flush=True)


def startup(args):
    """`sinet.py --help` over the import of torch and torchvision, and MARS' index."""
    def start(*command):
        return lambda: subprocess.run([sys.executable, *command], check=True, capture_output=True)
    a, b, _, _, _ = paired(start(ROOT / "sinet.py", "--help"), start("-c", "import torch, torchvision"), min(args.repeats, 5))
    print(f"start-up: sinet.py --help {a:.2f} s, import torch, torchvision {b:.2f} s: {a - b:+.2f} s, wanted below +0.50")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for part in ("bbox_train", "bbox_test", "info"):
            (folder / part).mkdir()
        for part in ("train", "test"):
            rows = loadmat(MARS / f"tracks_{part}_info.mat")[f"track_{part}_info"].astype(int)
            names = [f"{pid:0>4}C{cam}T0001F{f:03}.jpg" for first, last, pid, cam in rows.tolist() for f in range(1, last - first + 2)]
            (folder / f"info/{part}_name.txt").write_text("\n".join(names))
            (folder / f"info/tracks_{part}_info.mat").write_bytes((MARS / f"tracks_{part}_info.mat").read_bytes())
        (folder / "info/query_IDX.mat").write_bytes((MARS / "query_IDX.mat").read_bytes())
        t = statistics.median(seconds(lambda: data.load_mars(folder)) for _ in range(3))
        print(f"MARS' index: {t:.2f} s, wanted 3")


PARTS = {f.__name__: f for f in (inference, training, retrieval, loader, extraction, growth, precision, startup)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="\n".join(f"{name:12}{f.__doc__.splitlines()[0]}" for name, f in PARTS.items()),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default all)")
    parser.add_argument("--clips", type=int, default=2, help="a batch of inference and training (default 2)")
    parser.add_argument("--height", type=int, default=256, help="of a frame (default 256)")
    parser.add_argument("--width", type=int, default=128, help="of a frame (default 128)")
    parser.add_argument("--repeats", type=int, default=9, help="paired runs (default 9)")
    parser.add_argument("--tracklets", type=int, default=8, help="of the extraction (default 8)")
    parser.add_argument("--workers", type=int, default=0, help="of the extraction (default 0)")
    parser.add_argument("--only", metavar="TEXT", help="rows of inference and training with this text")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--gpu", default="0" if torch.cuda.is_available() else "cpu", help="GPU, or cpu")
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(unknown)}")
    args.device = torch.device("cpu" if args.gpu == "cpu" else f"cuda:{args.gpu}")
    for part in args.parts or PARTS:
        PARTS[part](args)
