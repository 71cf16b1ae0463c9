"""The papers' own comparisons on drawn sets: every row with three seeds, from the same weights.

    python tests/study.py                  # all rows, some hours on two cores; goes on where it was
    python tests/study.py --table          # only print the table of what is there

By hand, not a test. A plain ResNet-50 is trained once on 300 other drawn people; every row of every
script starts from it, as the papers start from ImageNet. The set `hard` was chosen so that SINet's
row `base` has between 50 and 80 mAP, before any other row was run. In the set `gait` all people
look alike but for their way to walk. A drawn set says nothing about MARS.
"""

import argparse
import concurrent.futures
import csv
import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.models import resnet50

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import energy, watch  # noqa: E402
from data import load_dataset, normalize, read_clip, replacing  # noqa: E402

SETS = {  # flags of data.py; the trunk's people are others than those of the two sets
    "trunk": "--identities 300 --test-identities 30 --cameras 6 --frames 8 12 --seed 1",
    "hard": "--identities 128 --test-identities 100 --cameras 3 --frames 8 8 --group 50 "
            "--occlusion 70 --seed 2",
    "gait": "--identities 32 --test-identities 60 --cameras 4 --frames 32 32 --gait --group 4999 "
            "--occlusion 0 --height 64 --width 32 --seed 3",
}
# of sinet.py: the plain trunk with its losses, on images of 64 tracklets a batch
TRUNK = ("--variant base --frames 2 --ids 16 --clips 4 --epochs 10 --lr-step 8 --lr 1e-3 "
         "--weight-decay 0")
SAME = "--amp --height 128 --width 64 --pool max --erase 0 --checkpoint-every 1000 --no-eval-first"
ADAM = "--ids 4 --clips 2 --epochs 3 --lr 3e-4 --lr-step 2"
SGD = "--ids 8 --clips 1 --epochs 2 --lr 0.0025 --lr-step 1"
# not in bfloat16: torch 2.15's convolutions of so small maps now and then gave NaN on the CPU
GAIT = "--frames 8 --height 64 --width 32 --chunk 8 --no-amp"
LONGER = "--epochs 30 --lr-step 25"  # of gait, where an epoch has 8 steps
FLAGS = {  # of a script, the same for all of its rows
    ("hard", "sinet"): f"{ADAM} --frames 4",
    ("hard", "tclnet"): f"{ADAM} --frames 4",
    ("hard", "bicnet_tks"): f"{ADAM} --frames 4",
    ("hard", "strf"): f"{ADAM} --frames 4",
    ("hard", "m3d"): f"{SGD} --frames 4",
    ("gait", "sinet"): f"{ADAM} {GAIT} {LONGER}",
    ("gait", "strf"): f"{ADAM} {GAIT} {LONGER}",
    ("gait", "m3d"): f"{SGD} {GAIT}",
}
# M3D's row 2d takes as many frames a batch and an epoch; the other rows start from it, as printed,
# and so does 2d-again, the same recipe once more, so that all have trained as long. The learning
# rate is in proportion to the images or clips of a batch
IMAGES = {"hard": "--frames 1 --ids 32 --chunk 2 --lr 0.01",
          "gait": "--frames 1 --ids 64 --chunk 1 --lr 0.02"}
M3D = ("2d", "2d-again", "p3d-c", "m3d", "m3d+ral")
ROWS = {
    ("hard", "sinet"): ("base", "base+sbm", "base+idm", "sinet"),
    ("hard", "tclnet"): ("base", "base+tse-wo-seo", "base+tse", "base+tsb", "tclnet-xent"),
    ("hard", "strf"): ("p3dc", "p3dc+dynamic+static", "p3dc+fine+coarse", "strf-p3dc"),
    ("hard", "bicnet_tks"): ("base-s", "base-b", "tb", "tb+csp", "tb+csp+ao", "tb+csp+dao",
                             "bicnet-tks"),
    ("hard", "m3d"): M3D,
    ("gait", "sinet"): ("base",),
    ("gait", "strf"): ("p3dc", "strf-p3dc"),
    ("gait", "m3d"): M3D,
}
QUANTITIES = {
    "mAP": "percent",
    "rank-1": "percent",
    "ms a clip": "a forward pass of clips in eval mode, float32, one thread, on a busy machine",
    "maps alike": "mean correlation of the last maps' energy over pairs of frames of a clip",
    "top cells shared": "share of a frame's top quarter of cells that is another frame's, too; of "
                        "maps of at least four cells",
    "A alike": "BiCnet-TKS: mean correlation of the attention maps A_k over pairs of frames",
    "A top shared": "the same share of cells for A_k",
    "learners alike": "TCLNet: cosine of two learners' vectors on a clip, each without its mean",
    "inside block": "TCLNet: energy of the second learner's map in the erased block, over all",
    "shuffled": "how far the embedding moves when a clip's frames are shuffled, over how far it "
                "moves between two clips of a tracklet (cosine distances)",
    "told apart": "set gait: of a person's and three others' tracklets under another camera, how "
                  "often his is the nearest; by chance 0.25",
}
KEYS = ("set", "script", "row", "seed", *QUANTITIES)


# --------------------------------------------------------------------------------- the quantities

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


def told_apart(embed, queries, size, T):
    """How often a person's tracklet under another camera is nearer than those of three others, the
    next people of the set; of queries with one tracklet for each person and camera."""
    of_camera = {}
    for query in sorted(queries, key=lambda query: query.pid):
        frames = query.frames[:len(query.frames) // T * T]
        clips = normalize(read_clip(frames, size).unflatten(0, (-1, T)))
        of_camera.setdefault(query.cam, []).append(F.normalize(embed(clips).mean(0), dim=0))
    fours = [torch.stack(x[:len(x) // 4 * 4]).unflatten(0, (-1, 4)) for x in of_camera.values()]
    pairs = itertools.permutations(fours, 2)
    nearest = torch.stack([(a @ b.transpose(1, 2)).argmax(2) for a, b in pairs])
    return (nearest == torch.arange(4)).float().mean().item()


@torch.no_grad()
def measure(file, root, tracklets=32, gait=False):
    """The quantities of a trained network but for mAP and rank-1, on clips of some queries."""
    name = Path(torch.load(file, map_location="cpu", weights_only=True)["script"]).stem
    model = importlib.import_module(name).load(file)
    dataset, size = load_dataset("synthetic", root), (model.args.height, model.args.width)
    T = max(4, model.args.frames)
    clips = []  # (queries, one or two clips, T, 3, H, W)
    for query in dataset.query[::max(1, len(dataset.query) // tracklets)][:tracklets]:
        two = np.arange(len(query.frames) // T * T).reshape(-1, T)[:2]
        clips.append(torch.stack([read_clip([query.frames[i] for i in clip], size)
                                  for clip in two]))
    clips = normalize(torch.stack(clips))
    B, first = len(clips), clips[:, 0]

    def as_taken(x):  # the 2D network of M3D takes images
        return x.flatten(0, 1)[:, None] if model.args.frames == 1 else x

    def embed(x):
        x = model(as_taken(x)).view(len(x), -1, width).mean(1)
        return model.finish(x) if hasattr(model, "finish") else x

    def distance(a, b):
        return (1 - F.cosine_similarity(a, b)).mean().item()
    width = model(as_taken(first[:1])).shape[1]  # and a warm-up
    start = time.perf_counter()
    embedding = embed(first)
    found = {"ms a clip": 1000 * (time.perf_counter() - start) / B}
    if clips.shape[1] == 2:
        rng = np.random.default_rng(0)
        orders = [rng.permutation(T) for _ in range(3)]
        moved = [distance(embedding, embed(first[:, order])) for order in orders]
        found["shuffled"] = np.mean(moved) / distance(embedding, embed(clips[:, 1]))
    if gait:
        found["told apart"] = told_apart(embed, dataset.query, size, T)

    if tse := getattr(model, "tse", None):
        learners = tse.learners
        ((_, c),), *seen = watch(model, first, tse, *learners)
        maps = [energy(y) for ((_, y),) in seen]
        frames = torch.stack(maps, 1).view(B, -1, *maps[0].shape[1:])
        if len(learners) > 1:
            vectors = c.flatten(0, 1) - c.flatten(0, 1).mean(0)
            cosine = F.cosine_similarity(vectors[:, 0], vectors[:, 1])
            found["learners alike"] = cosine.mean().item()
        if tse.seo:
            (_, b), = watch(model, first, tse.seo.binarization)[0]  # of the second learner
            erased = 1 - b[:, 0]
            inside = (maps[1] * erased).sum((1, 2)) / erased.sum((1, 2))
            found["inside block"] = (inside / maps[1].mean((1, 2))).mean().item()
    else:
        net = next(iter(model.streams.values())).net if hasattr(model, "streams") else model
        maps = [energy(y) for _, y in watch(model, as_taken(first), net.layer4[-1])[0]]
        smallest = (4, 2) if name == "bicnet_tks" else maps[0].shape[-2:]
        frames = of_frames(maps, B, smallest)
    found["maps alike"], shared = alike(frames)
    if frames[0, 0].numel() >= 4:  # else no quarter
        found["top cells shared"] = shared
    if len(getattr(model, "dao", ())):
        maps = [y[1] for ((_, y),) in watch(model, first, *model.dao)]
        found["A alike"], found["A top shared"] = alike(of_frames(maps, B, (4, 2)))
    return found


# ------------------------------------------------------------------------------------- the runs

def command(*words, log, threads):
    """Runs python with these words in the repository's folder; its output goes to a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(log, "ab") as file:
        code = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, stdout=file,
                              stderr=file, env=environment).returncode
    if code:
        raise SystemExit(f"{' '.join(map(str, words))} ended with {code}: see {log}")


def prepare(folder, threads):
    """Draws the sets, and trains the trunk: folder/trunk.pth, with torchvision's names."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    log = folder / "prepare.log"
    for name, flags in SETS.items():
        if not (folder / name).exists():
            command("data.py", "--synthetic", folder / name, *flags.split(), log=log, threads=1)
    if not (folder / "trunk.pth").exists():
        # torchvision's own random weights. With those of the scripts, whose residual branches start
        # at zero, a short training leaves them there (1 to 5 % of what is added to them), and what
        # stands within a block does next to nothing
        torch.manual_seed(0)
        torch.save(resnet50().state_dict(), folder / "random.pth")
        command("sinet.py", "--root", folder / "trunk", *TRUNK.split(), *SAME.split(), "--weights",
                folder / "random.pth", "--resume", "--output", folder / "runs/trunk", log=log,
                threads=threads)
        state = torch.load(folder / "runs/trunk/last.pt", map_location="cpu",
                           weights_only=True)["model"]
        stem = {"stem.0.": "conv1.", "stem.1.": "bn1."}
        state = {stem.get(key[:7], key[:7]) + key[7:]: value for key, value in state.items()
                 if key.startswith(("stem", "layer"))}
        with replacing(folder / "trunk.pth") as file:
            torch.save(state, file)


def study(folder, which, script, row, seed, threads):
    """Trains and measures a row with a seed; returns its results."""
    output = folder / f"runs/{which}/{script}/{row}-{seed}"
    log = output.with_suffix(".log")
    output.parent.mkdir(parents=True, exist_ok=True)
    flags = f"{SAME} {FLAGS[which, script]}".split()
    if row.startswith("2d"):
        flags += IMAGES[which].split()
    if script == "m3d" and row != "2d":
        flag = "--init" if row == "2d-again" else "--init-2d"
        flags += [flag, output.with_name(f"2d-{seed}") / "last.pt"]
    command(f"{script}.py", "--root", folder / which, "--weights", folder / "trunk.pth",
            "--variant", row.removesuffix("-again"), "--seed", seed, *flags, "--resume",
            "--output", output, log=log, threads=threads)
    command("tests/study.py", "--output", folder, "--measure", output, which, log=log,
            threads=1)
    with open(output / "log.csv") as file:
        *_, last = csv.DictReader(file)
    found = json.loads((output / "measured.json").read_text())
    found |= {key: float(last[key]) for key in ("mAP", "rank-1")}
    return {"set": which, "script": script, "row": row, "seed": seed, **found}


def drop_states(folder, row):
    """When a run's results are written: leaves the network of seed 0 or of row 2d, from which
    other rows start; of others nothing."""
    last = folder / f"runs/{row['set']}/{row['script']}/{row['row']}-{row['seed']}/last.pt"
    if row["seed"] and row["row"] != "2d":
        last.unlink()
        return
    checkpoint = torch.load(last, map_location="cpu", weights_only=True)
    for key in ("optimizer", "scheduler", "random"):  # what pictures do not need
        checkpoint.pop(key, None)
    with replacing(last) as file:
        torch.save(checkpoint, file)


def results(folder):
    file = folder / "results.csv"
    if not file.exists():
        return []
    with open(file, newline="") as lines:
        return [{key: value for key, value in row.items() if value != ""}
                for row in csv.DictReader(lines)]


def table(rows):
    """Prints, in Markdown, mean and standard deviation over the seeds, a table for each set."""
    for which in SETS:
        mine = [row for row in rows if row["set"] == which]
        keys = [key for key in QUANTITIES if any(key in row for row in mine)]
        if not mine:
            continue
        print(f"\n**{which}**\n\n| script | row | seeds | {' | '.join(keys)} |")
        print("|" + "---|" * (3 + len(keys)))
        for (a, script), names in ROWS.items():
            for name in names if a == which else ():
                seeds = [row for row in mine if (row["script"], row["row"]) == (script, name)]
                if not seeds:
                    continue
                cells = []
                for key in keys:
                    values = [round(float(row[key]), 6) + 0.0 for row in seeds if key in row]
                    spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
                    cells.append(f"{np.mean(values):.3g}{spread}" if values else "")
                print(f"| {script} | {name} | {len(seeds)} | {' | '.join(cells)} |")
    print("\n" + "\n".join(f"- {key}: {meaning}" for key, meaning in QUANTITIES.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "study", help="folder (study)")
    parser.add_argument("--seeds", type=int, nargs="*", default=(0, 1, 2), help="(0 1 2)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--only", nargs="*", help="sets, scripts, rows or hard/m3d, nothing else")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.output.resolve()
    if args.measure:
        output, which = Path(args.measure[0]), args.measure[1]
        found = measure(output / "last.pt", folder / which, gait=which == "gait")
        (output / "measured.json").write_text(json.dumps(found))
        return
    if args.table:
        return table(results(folder))
    todo = [(which, script, row, seed) for seed in args.seeds
            for (which, script), names in ROWS.items() for row in names
            if not args.only or {which, script, row, f"{which}/{script}"} & {*args.only}]
    if not todo:
        raise SystemExit(f"--only {' '.join(args.only or ())} and --seeds name no row")
    threads = max(1, os.cpu_count() // args.jobs)
    prepare(folder, os.cpu_count())
    done = {tuple(str(row[key]) for key in KEYS[:4]) for row in results(folder)}
    todo = [run for run in todo if tuple(map(str, run)) not in done]
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
                row, new = future.result(), not (folder / "results.csv").exists()
                with open(folder / "results.csv", "a", newline="") as file:
                    writer = csv.DictWriter(file, KEYS)
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
                drop_states(folder, row)
                count += 1
                print(f"[{count}/{len(todo)}] {row['set']} {row['script']} {row['row']} seed "
                      f"{row['seed']}: mAP {row['mAP']:.1f}, rank-1 {row['rank-1']:.1f}  "
                      f"({time.time() - start:.0f} s)", flush=True)
    table(results(folder))
    if failed:
        raise SystemExit(f"{failed} of {len(todo)} runs failed, see above")


if __name__ == "__main__":
    main()
