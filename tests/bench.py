"""Speed as ratios, measured in one run on one machine; run by hand, never a timed test.

python tests/bench.py                        # all parts, CPU or the first GPU
python tests/bench.py inference --clips 4    # a part, with 4 clips a batch
python tests/bench.py --gpu 0                # on this GPU, the most important first; eight minutes
python tests/bench.py --gpu 0 training --kinds compile --minutes 60

It ends with tables in Markdown, which can go into the README as they are, and says below them what
--minutes left no time for.
"""

import argparse
import contextlib
import gc
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from pathlib import Path

STARTED = time.monotonic()  # before torch is imported, which takes some of the minutes, too

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torchvision  # noqa: E402
from PIL import Image  # noqa: E402
from scipy.io import loadmat  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bicnet_tks  # noqa: E402
import common  # noqa: E402
import data  # noqa: E402
import m3d  # noqa: E402
import sinet  # noqa: E402
import strf  # noqa: E402
import tclnet  # noqa: E402

MARS = Path(__file__).parent / "mars_info"
CPU = torch.device("cpu")

# (script, row, frames a clip, its baseline: None for the plain ResNet-50, and at most how many
# times its time is wanted)
COMPARED = [
    (bicnet_tks, "bicnet-tks", 8, "base-b", 0.60),
    (sinet, "sinet", 4, None, 1.15),
    (tclnet, "tclnet", 4, None, 1.10),
    (m3d, "m3d", 8, None, 1.15),
    (m3d, "m3d+ral", 8, None, 1.20),
    (strf, "strf-p3dc", 8, None, 1.15),
    (strf, "strf-i3d", 8, None, None),
    (strf, "p3dc", 8, None, None),
]

# kinds of arithmetic: float32 throughout, TF32 in convolutions and matrix products, bfloat16
# autocast, and torch.compile with it
KINDS = ("float32", "tf32", "bfloat16", "compile")

# On a GPU the parts and kinds in the order of their importance, as the time may not be enough for
# all, each with a guess of its seconds (for inference and training: of one row's). The guess counts
# only until the first of its kind was measured. None is the first of --kinds.
ON_A_GPU = {
    ("training", "float32"): 30,
    ("training", "bfloat16"): 20,
    ("precision", None): 30,
    ("inference", "float32"): 15,
    ("inference", "bfloat16"): 10,
    ("waiting", "bfloat16"): 30,
    ("extraction", "bfloat16"): 30,
    ("training", "tf32"): 20,
    ("inference", "tf32"): 10,
    ("growth", None): 30,
    ("training", "compile"): 120,
    ("inference", "compile"): 60,
    ("waiting", "float32"): 30,
    ("extraction", "float32"): 30,
    ("waiting", "tf32"): 30,
    ("extraction", "tf32"): 30,
    ("loader", None): 30,
    ("startup", None): 30,
    ("retrieval", None): 90,
}


# ---------------------------------------------------------------------- the time and the tables


class Budget:
    """Runs what is likely to be done in time, and remembers what was not run and what failed.

    Args:
        end: the time on the clock at which all should be done.
        clock: function that returns the time in seconds.
    """

    def __init__(self, end, clock=time.monotonic):
        self.end = end
        self.clock = clock
        self.longest = {}  # {group: seconds}
        self.skipped = {}  # {group: names}
        self.failed = []

    def run(self, group, name, guess, work):
        """Calls work() unless it is likely to end too late. It is expected to take as long as the
        longest of its group so far, at first `guess` seconds, and may take half as long again."""
        start = self.clock()
        if start + 1.5 * self.longest.get(group, guess) > self.end:
            self.skipped.setdefault(group, []).append(name)
            return
        try:
            with ended_after(self.end - start):
                work()
        except Exception as error:  # such as a GPU's memory that is too small: the rest is measured
            traceback.print_exc()
            self.failed.append(f"{group}: {name} ({data.first_line(error)})")
        passed = self.clock() - start
        self.longest[group] = max(passed, self.longest.get(group, 0))

    def lines(self):
        """Sentences that say what is missing."""
        if self.skipped:
            groups = []
            for group, names in self.skipped.items():
                groups.append(group if names == [group] else f"{group} ({', '.join(names)})")
            yield f"Not measured, because the time was over: {'; '.join(groups)}."
        for failure in self.failed:
            yield f"Failed: {failure}."


@contextlib.contextmanager
def ended_after(seconds):
    """Raises a TimeoutError in a block that takes longer. What was guessed wrongly ends so, too."""

    def end(*_):
        raise TimeoutError("the time was over")

    if seconds == float("inf"):
        yield
        return
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Results:
    """What was measured.

    networks: {(network and baseline, kind): {column: text}}, of inference and training.
    others: list of (what, value).
    """

    COLUMNS = (
        "training, clips/s",
        "training, time / baseline's",
        "training, peak memory",
        "baseline's peak memory",
        "inference, clips/s",
        "inference, time / baseline's",
    )

    def __init__(self):
        self.networks = {}
        self.others = []

    def add(self, what, value):
        """Prints a value and keeps it."""
        print(f"  {what}: {value}", flush=True)
        self.others.append((what, value))

    def lines(self):
        """Tables in Markdown."""
        columns = [
            name for name in self.COLUMNS if any(name in row for row in self.networks.values())
        ]
        if columns:
            yield "| network / baseline | arithmetic | " + " | ".join(columns) + " |"
            yield "|---" * (2 + len(columns)) + "|"
        for (network, kind), row in self.networks.items():
            texts = [row.get(name, "-") for name in columns]
            yield f"| {network} | {kind} | " + " | ".join(texts) + " |"
        if columns and self.others:
            yield ""
        if self.others:
            yield "| what | value |"
            yield "|---|---|"
        for what, value in self.others:
            yield f"| {what} | {value} |"


# ------------------------------------------------------------------------- what the parts share


class Plain(nn.Module):
    """torchvision's ResNet-50 on the frames, averaged over the clip, with a BN neck and a
    classifier."""

    def __init__(self, last_stride):
        super().__init__()
        self.net = sinet.resnet50("none", last_stride)
        self.neck = nn.BatchNorm1d(2048)
        self.classifier = nn.Linear(2048, 625)

    def forward(self, clips):
        B, T = clips.shape[:2]
        net = self.net
        x = clips.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        x = self.neck(x.mean((2, 3)).view(B, T, -1).mean(1))
        return (x, self.classifier(x)) if self.training else x


def row_settings(script, row, frames, size):
    """The settings of a row of a script's ROWS, as its build and losses take them."""
    height, width = size
    return common.settings(
        script.RECIPE, script.ROWS, row, weights="none", frames=frames, height=height, width=width
    )


def ready(model, device):
    """The network on the device, in channels_last, as common.Run prepares it."""
    for layer in model.to(device).modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)
    return model


def make(script, row, frames, size, device):
    """The network of a row as its script makes it, on the device."""
    return ready(script.build(row_settings(script, row, frames, size), 625), device)


def set_kind(args, kind):
    args.kind, args.amp = kind, kind in ("bfloat16", "compile")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"


def autocast(device, enabled):
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def seconds(work, device=CPU):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired(a, b, repeats, device=CPU):
    """Alternating runs of a and b: (median seconds of a, of b, median, minimum and maximum of the
    ratios)."""
    a()
    b()
    times = [(seconds(a, device), seconds(b, device)) for _ in range(repeats)]
    of_a, of_b = map(statistics.median, zip(*times))
    ratios = [x / y for x, y in times]
    return of_a, of_b, statistics.median(ratios), min(ratios), max(ratios)


# resource's ru_maxrss is no measure: it begins with the peak of the process that started this one
PRELUDE = """
import sys
import time

import numpy as np
import torch

import common
import data
import sinet


def peak():
    with open("/proc/self/status") as status:  # Linux
        return int(status.read().split("VmHWM:")[1].split()[0])  # kB
"""


def alone(program, *arguments):
    """What a program prints that runs behind PRELUDE in a process of its own."""
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(program), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


# ------------------------------------------------------------------------ inference and training


def compare_rows(args, title, work):
    """The rows of COMPARED, where work(script, settings, model, clips, pids) gives a function to
    time; of the plain ResNet-50 script and settings are None."""
    print(
        f"{title}, {args.clips} clips of {args.height}x{args.width} a batch, {args.kind},"
        f" {args.device}"
    )
    print(
        f"  {'model / baseline':36} {'ms a clip':>10} {'ms a clip':>10} {'ratio':>7} {'wanted':>7}"
        f"   (min - max of {args.repeats})"
    )
    guess = ON_A_GPU[title, args.kind]
    for script, row, frames, base, wanted in COMPARED:
        if args.only and args.only not in f"{script.__name__} {row}":
            continue
        name = f"{script.__name__}.py {row} / {base or 'plain'}"
        args.budget.run(
            f"{title} in {args.kind}",
            f"{script.__name__} {row}",
            guess,
            lambda: compare_row(args, title, work, name, script, row, frames, base, wanted),
        )


def compare_row(args, title, work, name, script, row, frames, base, wanted):
    """One row of `compare_rows`, whose networks are gone afterwards."""
    size = (args.height, args.width)
    clear_memory(args)
    clips = torch.randn(args.clips, frames, 3, *size, device=args.device)
    pids = torch.arange(args.clips, device=args.device) // 2

    def work_of(name):
        if name is None:
            model = ready(Plain(2 if script is m3d else 1), args.device)
            of = None, None
        else:
            model = make(script, name, frames, size, args.device)
            of = script, row_settings(script, name, frames, size)
        if args.kind == "compile":
            model.compile()
        return work(*of, model, clips, pids)

    ours, memory = with_peak(lambda: work_of(row), args.device)
    theirs, their_memory = with_peak(lambda: work_of(base), args.device)
    a, b, ratio, low, high = paired(ours, theirs, args.repeats, args.device)
    print(
        f"  {name:36} {1e3 * a / args.clips:10.1f} {1e3 * b / args.clips:10.1f} {ratio:7.2f}"
        f" {wanted or '':>7}   ({low:.2f} - {high:.2f})  {args.clips / a:.3g} clips/s",
        flush=True,
    )
    cells = args.results.networks.setdefault((name, args.kind), {})
    cells[f"{title}, clips/s"] = f"{args.clips / a:.3g}"
    cells[f"{title}, time / baseline's"] = f"{ratio:.2f}"
    if memory and title == "training":
        cells["training, peak memory"] = f"{memory / 2**30:.1f} GiB"
        cells["baseline's peak memory"] = f"{their_memory / 2**30:.1f} GiB"


def clear_memory(args):
    """Frees what earlier networks took, and forgets what was compiled for them: torch.compile
    compiles one function for a few networks only, and then leaves it as it is."""
    gc.collect()
    if args.kind == "compile":
        torch.compiler.reset()
    if args.device.type == "cuda":
        torch.cuda.empty_cache()


def with_peak(make_work, device):
    """(the function that make_work() gives, how many bytes of a GPU its second call needs with all
    that it keeps: weights, the optimiser's state and, at the peak, maps and gradients; else 0).
    The first call also tries cuDNN's algorithms, or compiles."""
    if device.type != "cuda":
        return make_work(), 0
    before = torch.cuda.memory_allocated()
    run = make_work()
    run()
    torch.cuda.reset_peak_memory_stats()
    run()
    return run, torch.cuda.max_memory_allocated() - before


def inference(args):
    """Milliseconds a clip, eval mode: the full model over its baseline on the same frames."""

    def work(script, settings, model, clips, pids):
        model.eval()

        def run():
            with torch.inference_mode(), autocast(args.device, args.amp):
                model(clips)

        return run

    compare_rows(args, "inference", work)


def training(args):
    """Milliseconds a clip of a training step (forward, losses, backward, Adam): the full model over
    its baseline."""

    def plain_losses(outputs, pids):
        """Cross entropy and the triplet loss, as in most scripts."""
        embedding, logits = outputs
        xent = nn.functional.cross_entropy(logits.float(), pids)
        return {"xent": xent, "triplet": common.batch_hard_triplet(embedding, pids, 0.3)}

    def work(script, settings, model, clips, pids):
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

        def run():
            with autocast(args.device, args.amp):
                outputs = model(clips)
            if script:
                parts = script.losses(outputs, pids, settings)
            else:
                parts = plain_losses(outputs, pids)
            optimizer.zero_grad(set_to_none=True)
            sum(parts.values()).backward()
            optimizer.step()

        return run

    compare_rows(args, "training", work)


# ------------------------------------------------------------------------------------- retrieval


def mars_ids():
    """(query pids, query cameras, gallery pids, gallery cameras) of MARS' real index."""
    rows = loadmat(MARS / "tracks_test_info.mat")["track_test_info"].astype(int)
    query = rows[loadmat(MARS / "query_IDX.mat")["query_IDX"].ravel().astype(int) - 1]
    gallery = rows[rows[:, 2] >= 0]
    return query[:, 2], query[:, 3], gallery[:, 2], gallery[:, 3]


def running_list(d, q_pids, q_cams, g_pids, g_cams):
    """CMC and mAP as most toolboxes compute them: for each query a Python loop over the ranked
    gallery that keeps lists."""
    cmc = np.zeros(len(g_pids))
    aps = []
    for q in range(len(d)):
        found = 0
        seen = 0
        precisions = []
        for g in np.argsort(d[q]):
            if g_pids[g] == q_pids[q] and g_cams[g] == q_cams[q]:
                continue
            seen += 1
            if g_pids[g] == q_pids[q]:
                found += 1
                precisions.append(found / seen)
                if found == 1:
                    cmc[seen - 1 :] += 1
        if precisions:
            aps.append(sum(precisions) / len(precisions))
    return cmc / len(aps), sum(aps) / len(aps)


def features(n, g):
    return nn.functional.normalize(torch.randn(n, 2048, generator=g), dim=1)


def by_trapezoids(ranks):
    """The average precision of MARS' evaluation code (Zheng et al., ECCV 2016): the area below the
    precision over the recall, by the mean of the precisions at a match and just before it."""
    before = np.arange(len(ranks))  # matches that are found before each of them
    precision = (before + 1) / (ranks + 1)
    old = np.where(ranks == 0, 1, before / np.maximum(ranks, 1))
    return np.mean((precision + old) / 2)


def trapezoids():
    """What MARS' own rule takes off mAP, for made features of its real identities and cameras."""
    q_pids, q_cams, g_pids, g_cams = ids = mars_ids()
    pids = np.concatenate([q_pids, g_pids])
    cams = np.concatenate([q_cams, g_cams])
    rng = np.random.default_rng(0)
    people = rng.normal(size=(pids.max() + 1, 32))
    views = rng.normal(size=(cams.max() + 1, 32))
    print("mAP of made features, with AP as here and by the trapezoids of MARS' evaluation code")
    for noise in (0.6, 0.7, 0.8, 0.9, 1.0, 1.2):
        x = people[pids] + 0.3 * views[cams] + noise * rng.normal(size=(len(pids), 32))
        strangers = rng.normal(size=x.shape) * np.sqrt(1 + noise**2)
        x = torch.tensor(np.where((pids == 0)[:, None], strangers, x))
        blocks = common.distance_blocks(x[: len(q_pids)], x[len(q_pids) :])
        found = [ranks for _, ranks in common.distances_and_ranks(blocks, *ids) if len(ranks)]
        ours = 100 * np.mean([common.average_precision(ranks) for ranks in found])
        theirs = 100 * np.mean([by_trapezoids(ranks) for ranks in found])
        print(f"  {ours:5.1f}  {theirs:5.1f}  {ours - theirs:.1f} lower")


LARGE_RANKING = """
    g = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    q = torch.randn(10_000, 128, generator=g)
    x = torch.randn(100_000, 128, generator=g)
    ids = [
        rng.integers(1, 3000, 10_000),
        rng.integers(1, 7, 10_000),
        rng.integers(1, 3000, 100_000),
        rng.integers(1, 7, 100_000),
    ]
    before = peak()
    start = time.perf_counter()
    blocks = common.distance_blocks(q, x)
    common.cmc_and_map(((rows, d.numpy()) for rows, d in blocks), *ids)
    passed = time.perf_counter() - start
    print(f"{passed:.0f} s, {(peak() - before) / 2**20:.2f} GB beyond the features")
"""
RERANKING = """
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1980, 2048, generator=g)
    x = torch.randn(11_310, 2048, generator=g)
    before = peak()
    start = time.perf_counter()
    common.rerank(q, x)
    passed = time.perf_counter() - start
    print(f"{passed:.0f} s, {(peak() - before) / 2**20:.2f} GB beyond the features")
"""


def retrieval(args):
    """CMC/mAP and re-ranking at MARS' size with the real identities and cameras, and how ranking
    grows with the gallery."""
    ids = mars_ids()
    g = torch.Generator().manual_seed(0)
    blocks = common.distance_blocks(features(len(ids[0]), g), features(len(ids[2]), g))
    d = torch.cat([block for _, block in blocks]).numpy()
    add = args.results.add
    print(f"CMC/mAP, {d.shape[0]:,} x {d.shape[1]:,}, float32, one thread")
    ours, sort, ratio, low, high = paired(
        lambda: common.cmc_and_map(d, *ids), lambda: np.argsort(d), args.repeats
    )
    add(
        f"CMC/mAP of {d.shape[0]:,} x {d.shape[1]:,} over `numpy.argsort` alone, time (wanted 2.0)",
        f"{ours:.2f} s over {sort:.2f} s: {ratio:.2f} ({low:.2f} - {high:.2f})",
    )

    few = 60
    of_few = (d[:few], *(values[:few] for values in ids[:2]), *ids[2:])
    loop = seconds(lambda: running_list(*of_few)) * len(d) / few
    assert abs(common.cmc_and_map(*of_few)[1] - running_list(*of_few)[1]) < 1e-9
    add(
        f"the usual loop with a running list over it, time, from {few} queries (wanted 20)",
        f"{loop:.1f} s: {loop / ours:.0f}",
    )

    wide = torch.randn(len(ids[0]), 4096, generator=g), torch.randn(len(ids[2]), 4096, generator=g)
    for metric, plain in (
        ("euclidean", torch.cdist),
        ("cosine", lambda a, b: 1 - a @ b.T),
    ):
        ours, theirs, ratio, low, high = paired(
            lambda: [d for _, d in common.distance_blocks(*wide, metric)],
            lambda: [plain(part, wide[1]) for part in wide[0].split(512)],
            min(args.repeats, 3),
        )
        add(
            f"{metric} distances of 4,096 numbers each, in float64 over float32, time",
            f"{ours:.1f} s over {theirs:.1f} s: {ratio:.2f} ({low:.2f} - {high:.2f})",
        )
    trapezoids()

    print("growth with the gallery, 500 queries")
    rng = np.random.default_rng(0)
    for n in (5_000, 10_000, 20_000, 40_000):
        wide = rng.random((500, n), dtype=np.float32)
        random_ids = [
            rng.integers(1, 1000, 500),
            rng.integers(1, 7, 500),
            rng.integers(0, 1000, n),
            rng.integers(1, 7, n),
        ]
        t = min(seconds(lambda: common.cmc_and_map(wide, *random_ids)) for _ in range(3))
        add(
            f"CMC/mAP of 500 x {n:,}, in all and for each query n log2 n",
            f"{t:.2f} s, {1e9 * t / (500 * n * np.log2(n)):.2f} ns",
        )
    add("CMC/mAP of 10,000 x 100,000 (wanted below 4 GB)", alone(LARGE_RANKING))
    add("re-ranking of 1,980 x 11,310", alone(RERANKING))


# ------------------------------------------------------------------------- loader and extraction


def write_jpegs(folder, count, size=(256, 128)):
    """Frames with a texture like a photo's: smooth, with some noise."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        colours = rng.integers(0, 256, (size[0] // 16, size[1] // 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(colours).resize(size[::-1], Image.BICUBIC)
        frame = np.asarray(smooth, np.float32) + rng.normal(0, 8, (*size, 3))
        paths.append(f"{folder}/{i:05}.jpg")
        Image.fromarray(frame.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


class UsualClips(torch.utils.data.Dataset):
    """The usual path: Pillow -> ToTensor -> Normalize for each frame, float32, default collate."""

    def __init__(self, clips, size):
        self.clips = clips
        self.size = size
        self.transform = torchvision.transforms.Compose(
            [
                torchvision.transforms.Resize(size),
                torchvision.transforms.ToTensor(),
                torchvision.transforms.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD),
            ]
        )

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        frames = [self.transform(Image.open(path).convert("RGB")) for path in self.clips[i]]
        return torch.stack(frames), 0


class OurClips(UsualClips):
    """Our path: uint8 clips, which are normalised on the device."""

    def __getitem__(self, i):
        return data.read_clip(self.clips[i], self.size), 0


def loader(args):
    """Frames a second from JPEG files to batches of clips: uint8 against the usual float path, and
    decoding alone."""
    size = (args.height, args.width)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(folder, 512)
        clips = [paths[i : i + 8] for i in range(0, len(paths), 8)]

        def deliver(kind, workers):
            for _ in torch.utils.data.DataLoader(kind(clips, size), 8, num_workers=workers):
                pass

        print(
            f"loader, JPEG frames of 256x128 as clips of 8 frames of {args.height}x{args.width},"
            " batches of 8 clips"
        )
        for workers in (0, 2):
            usual, ours, ratio, low, high = paired(
                lambda: deliver(UsualClips, workers),
                lambda: deliver(OurClips, workers),
                args.repeats,
            )
            args.results.add(
                f"loader over the usual path, {workers} workers, frames/s (wanted 2.0)",
                f"{512 / ours:,.0f} over {512 / usual:,.0f}: {ratio:.2f} ({low:.2f} - {high:.2f})",
            )

        def pillow():
            for path in paths:
                Image.open(path).convert("RGB").load()

        def simplejpeg():
            for path in paths:
                data._decode(path)

        a, b, _, low, high = paired(pillow, simplejpeg, args.repeats)
        args.results.add(
            "decoding alone, simplejpeg over Pillow, frames/s",
            f"{512 / b:,.0f} over {512 / a:,.0f}: {a / b:.2f} ({low:.2f} - {high:.2f})",
        )


LONG_TRACKLET = """
    path, frames = sys.argv[1:]
    row = common.settings(
        sinet.RECIPE, sinet.ROWS, "sinet", weights="none", frames=4, height=64, width=64
    )
    tracklet = data.Tracklet((path,) * int(frames), 1, 1)
    common.extract(
        sinet.build(row, 2),
        [tracklet],
        split_clips=sinet.SPLIT,
        clip_length=4,
        size=(64, 64),
        batch_size=8,
    )
    print(peak() // 1024)
"""


def extraction(args):
    """All-frames features of tracklets as long as MARS' (2 to 920 frames): frames/s over the bare
    forward at the same batch size."""
    rows = loadmat(MARS / "tracks_test_info.mat")["track_test_info"].astype(int)
    lengths = (rows[:, 1] - rows[:, 0] + 1)[rows[:, 2] >= 0]
    lengths = np.sort(lengths)[np.linspace(0, len(lengths) - 1, args.tracklets).astype(int)]
    frames = int(lengths.sum())
    size = (args.height, args.width)
    T = 4
    batch = 8
    batches = -(-sum(-(-n // T) for n in lengths.tolist()) // batch)
    model = make(sinet, "sinet", T, size, args.device).eval()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(folder, 64, size)
        tracklets = [
            data.Tracklet(tuple(paths[i % 64] for i in range(n)), 1, 1) for n in lengths.tolist()
        ]
        clips = torch.randn(batch, T, 3, *size, device=args.device)

        def bare():
            with torch.inference_mode(), autocast(args.device, args.amp):
                for _ in range(batches):
                    model(clips)

        def whole():
            common.extract(
                model,
                tracklets,
                split_clips=sinet.SPLIT,
                clip_length=T,
                size=size,
                batch_size=batch,
                workers=args.workers,
                amp=args.amp,
            )

        print(
            f"extraction, {len(lengths)} tracklets of {lengths.min()} to {lengths.max()} frames,"
            f" mean {lengths.mean():.0f}, {size[0]}x{size[1]}, {batch} clips of {T} a batch,"
            f" {args.kind}"
        )
        a, b, ratio, low, high = paired(bare, whole, min(args.repeats, 3), args.device)
        args.results.add(
            f"all-frames extraction with SINet over the bare forward, {args.kind}, frames/s"
            " (wanted 0.92)",
            f"{frames / b:.1f} over {frames / a:.1f}: {ratio:.2f} ({low:.2f} - {high:.2f})",
        )
        if args.device.type == "cpu":
            for longest in (64, 1024):
                megabytes = alone(LONG_TRACKLET, paths[0], longest)
                args.results.add(
                    f"extraction, peak memory with a tracklet of {longest} frames",
                    f"{megabytes} MB",
                )


def waiting(args):
    """Clips/s of training SINet from JPEG files, and the share of that time in which the device
    waits for the loader: what is left beside the same steps on one batch that is there already."""
    size = (args.height, args.width)
    T, count = 4, 20 if args.device.type == "cuda" else 3
    settings = row_settings(sinet, "sinet", T, size)
    model = make(sinet, "sinet", T, size, args.device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step(clips, pids):
        with autocast(args.device, args.amp):
            outputs = model(data.normalize(clips.to(args.device, non_blocking=True)))
        parts = sinet.losses(outputs, pids.to(args.device, non_blocking=True), settings)
        optimizer.zero_grad(set_to_none=True)
        sum(parts.values()).backward()
        optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(folder, 256)
        tracklets = [data.Tracklet(tuple(paths[i : i + 32]), i // 64, 1) for i in range(0, 256, 32)]
        clips = data.TrainClips(tracklets, sinet.SAMPLE, T, size)
        items = [(i % 8, i) for i in range(count * args.clips)]
        loader = torch.utils.data.DataLoader(
            clips,
            batch_sampler=[items[i : i + args.clips] for i in range(0, len(items), args.clips)],
            num_workers=args.workers,
            persistent_workers=args.workers > 0,
            pin_memory=args.device.type == "cuda",
        )
        kept = [part.to(args.device) for part in next(iter(loader))]

        def bare():
            for _ in range(count):
                step(*kept)

        def whole():
            for batch in loader:
                step(*batch)

        a, b, ratio, low, high = paired(bare, whole, min(args.repeats, 3), args.device)
        args.results.add(
            f"training SINet from JPEG files, {args.clips} clips of {T} frames of {size[0]}x"
            f"{size[1]} a batch, {args.workers} workers, {args.kind}: clips/s, and the share of"
            " the time in which the device waits for the loader",
            f"{count * args.clips / b:.3g}, {100 * max(0, 1 - ratio):.0f} %"
            f" ({100 * (1 - high):.0f} - {100 * (1 - low):.0f})",
        )


# ----------------------------------------------------------------- growth, precision and start-up


def growth(args):
    """How a clip's inference grows with its frames, and a batch's with its clips."""
    size = (args.height, args.width)
    print(
        f"growth, inference at {args.height}x{args.width}, ms a frame (a module that grows faster"
        " than its frames shows here)"
    )
    for script, row, counts in (
        (sinet, "sinet", (4, 8, 16)),
        (tclnet, "tclnet", (4, 8, 16)),
        (bicnet_tks, "bicnet-tks", (8, 16)),
        (m3d, "m3d+ral", (4, 8, 16)),
        (strf, "strf-p3dc", (4, 8, 16)),
    ):
        shown = []
        for clips, frames in [(1, T) for T in counts] + [(4, counts[0])]:
            model = make(script, row, frames, size, args.device).eval()
            x = torch.randn(clips, frames, 3, *size, device=args.device)
            with torch.inference_mode():
                model(x)
                times = [
                    seconds(lambda: model(x), args.device) for _ in range(min(args.repeats, 5))
                ]
            t = statistics.median(times)
            shown.append(f"{clips} x {frames}: {1e3 * t / clips / frames:.1f}")
        args.results.add(
            f"inference with {script.__name__}.py {row}, clips x frames: ms a frame",
            ", ".join(shown),
        )


def precision(args):
    """What channels_last and bfloat16 autocast give in a training step of SINet."""
    size = (args.height, args.width)
    T = 4
    clips = torch.randn(args.clips, T, 3, *size, device=args.device)
    pids = torch.arange(args.clips, device=args.device) // 2
    settings = row_settings(sinet, "sinet", T, size)

    def step(model, amp):
        def run():
            with autocast(args.device, amp):
                outputs = model(clips)
            sum(sinet.losses(outputs, pids, settings).values()).backward()

        return run

    ours = make(sinet, "sinet", T, size, args.device).train()
    # its forward asks for channels_last maps: the weights are converted each time
    other = sinet.build(settings, 625).to(args.device).train()
    for name, a, b in (
        ("contiguous weights over channels_last", step(other, False), step(ours, False)),
        ("the same in bfloat16 autocast", step(other, True), step(ours, True)),
        ("float32 over bfloat16 autocast", step(ours, False), step(ours, True)),
    ):
        _, _, ratio, low, high = paired(a, b, args.repeats, args.device)
        args.results.add(
            f"training step of SINet, {name}, time", f"{ratio:.2f} ({low:.2f} - {high:.2f})"
        )


def write_mars_index(folder):
    """MARS' real index without its images: empty folders, the tables, and lists of file names."""
    for part in ("bbox_train", "bbox_test", "info"):
        (folder / part).mkdir()
    for part in ("train", "test"):
        table = f"tracks_{part}_info.mat"
        rows = loadmat(MARS / table)[f"track_{part}_info"].astype(int)
        names = [
            f"{pid:0>4}C{cam}T0001F{f:03}.jpg"
            for first, last, pid, cam in rows.tolist()
            for f in range(1, last - first + 2)
        ]
        (folder / f"info/{part}_name.txt").write_text("\n".join(names))
        (folder / "info" / table).write_bytes((MARS / table).read_bytes())
    (folder / "info/query_IDX.mat").write_bytes((MARS / "query_IDX.mat").read_bytes())


def startup(args):
    """`sinet.py --help` over the import of torch and torchvision, and MARS' index."""

    def start(*command):
        return lambda: subprocess.run([sys.executable, *command], check=True, capture_output=True)

    a, b, _, _, _ = paired(
        start(ROOT / "sinet.py", "--help"),
        start("-c", "import torch, torchvision"),
        min(args.repeats, 5),
    )
    args.results.add(
        "`sinet.py --help` beside `import torch, torchvision` (wanted below +0.50 s)",
        f"{a:.2f} s, {b:.2f} s: {a - b:+.2f} s",
    )
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_mars_index(folder)
        t = statistics.median(seconds(lambda: data.load_mars(folder)) for _ in range(3))
        args.results.add("reading the index of MARS (wanted 3 s)", f"{t:.2f} s")


# ------------------------------------------------------------------------------ the command line

PARTS = {
    part.__name__: part
    for part in (
        inference,
        training,
        retrieval,
        loader,
        extraction,
        waiting,
        growth,
        precision,
        startup,
    )
}


def in_order(parts, kinds, on_gpu):
    """[(part, kind, guess of its seconds)], on a GPU the most important first.

    parts, kinds: what the user asked for, or all.
    """
    if on_gpu:
        return [
            (part, kind or kinds[0], guess)
            for (part, kind), guess in ON_A_GPU.items()
            if part in parts and (kind is None or kind in kinds)
        ]
    found = []
    for part in parts:
        if (part, None) in ON_A_GPU:
            found.append((part, kinds[0], ON_A_GPU[part, None]))
        else:
            found += [
                (part, kind, ON_A_GPU[part, kind]) for kind in kinds if (part, kind) in ON_A_GPU
            ]
    return found


def main():
    described = [
        textwrap.fill(f"{name:12}{' '.join(part.__doc__.split())}", 80, subsequent_indent=12 * " ")
        for name, part in PARTS.items()
    ]
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="\n".join(described),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default all)"
    )
    parser.add_argument(
        "--clips", type=int, help="a batch of inference and training (default 2, on a GPU 32)"
    )
    parser.add_argument("--height", type=int, default=256, help="of a frame (default 256)")
    parser.add_argument("--width", type=int, default=128, help="of a frame (default 128)")
    parser.add_argument("--repeats", type=int, help="paired runs (default 9, on a GPU 5)")
    parser.add_argument("--tracklets", type=int, default=8, help="of the extraction (default 8)")
    parser.add_argument(
        "--workers", type=int, help="of extraction and waiting (default 0, on a GPU 8)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="what is not likely to end within so many is left out (default 7.5 on a GPU)",
    )
    parser.add_argument(
        "--only", metavar="TEXT", help="rows of inference and training with this text"
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        help="of arithmetic in inference, training, extraction and waiting (float32; on a GPU all:"
        " float32, TF32, bfloat16 autocast, and torch.compile with that)",
    )
    parser.add_argument("--amp", action="store_true", help="the same as --kinds bfloat16")
    parser.add_argument(
        "--recycle",
        action="store_true",
        help="glibc keeps freed memory, as CUDA's allocator does; else the kernel hands out and"
        " clears the pages of every large map anew, which can double the time of a pass over it",
    )
    parser.add_argument(
        "--gpu", default="0" if torch.cuda.is_available() else "cpu", help="GPU, or cpu"
    )
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(unknown)}")
    keep = {"MALLOC_MMAP_THRESHOLD_": str(2**40), "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    if args.recycle and not keep.items() <= os.environ.items():  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **keep})
    args.device = torch.device("cpu" if args.gpu == "cpu" else f"cuda:{args.gpu}")
    on_gpu = args.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(args.device)  # whose work and memory are waited for and counted
    for name, of_cpu, of_gpu in (("clips", 2, 32), ("repeats", 9, 5), ("workers", 0, 8)):
        if getattr(args, name) is None:
            setattr(args, name, of_gpu if on_gpu else of_cpu)
    if args.minutes is None:
        args.minutes = 7.5 if on_gpu else float("inf")
    torch.backends.cudnn.benchmark = True  # as common.Run
    kinds = args.kinds or (["bfloat16"] if args.amp else KINDS if on_gpu else KINDS[:1])
    args.budget = Budget(STARTED + 60 * args.minutes)
    args.results = Results()
    for part, kind, guess in in_order(args.parts or [*PARTS], kinds, on_gpu):
        set_kind(args, kind)
        if part in ("inference", "training"):  # which ask for each row whether there is time
            PARTS[part](args)
            continue
        name = f"{part} in {kind}" if part in ("extraction", "waiting") else part
        clear_memory(args)
        args.budget.run(name, name, guess, lambda: PARTS[part](args))
    where = f"{torch.get_num_threads()} CPU threads"
    if on_gpu:
        where = torch.cuda.get_device_name()
    print(
        f"\n`python tests/bench.py` on {where}, torch {torch.__version__}, {args.clips} clips of"
        f" {args.height}x{args.width} a batch. Ratios are medians of paired runs (in brackets the"
        " least and the largest).\n"
    )
    for line in [*args.results.lines(), "", *args.budget.lines()]:
        print(line)
    return 1 if args.budget.failed else 0


if __name__ == "__main__":
    sys.exit(main())
