"""The scripts as a user runs them: real processes on real files."""

import argparse
import importlib
import inspect
import json
import math
import re
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision

import common
import sinet
import test_sets
from conftest import TINY, Colours, read_log, write_mars_index
from data import (
    DATA_SETS,
    PKSampler,
    TrackletSampler,
    UserError,
    split_consecutive,
    split_segments,
    split_whole,
)

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "sinet.py": ("xent", "triplet", "mi"),
    "tclnet.py": ("xent", "triplet"),
    "bicnet_tks.py": ("xent", "triplet", "div"),
    "m3d.py": ("xent-spatial", "xent-temporal"),
    "strf.py": ("xent", "triplet"),
}  # parts of the loss


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, monkeypatch, capsys):
    module = importlib.import_module(Path(script).stem)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        module.main()
    out = capsys.readouterr().out
    assert end.value.code in (0, None)
    flags = "data root split chunk gpu variant workers amp compile seed eval-every checkpoint-every"
    flags += " small eval-first init export tensorboard"
    flags += " evaluate resume rerank output figure figure-format beside complexity plan"
    for flag in [*flags.split(), *(key.replace("_", "-") for key in module.RECIPE)]:
        assert f"\n  --{flag}" in out, flag
    assert max(map(len, out.splitlines())) <= 80
    words = "".join(out.split())  # lines break at spaces and behind hyphens
    for key, (paper, small, meaning, *_) in module.RECIPE.items():
        shown = " ".join(map(str, paper)) if isinstance(paper, tuple) else str(paper)
        assert "".join(f"{meaning} ({shown}".split()) in words, key
    said, name = {}, ""
    for line in out.split("flags they set:\n")[1].splitlines():
        if line.startswith("      "):
            said[name] += line[5:]
        else:
            name, about = line.strip().split("  ")
            said[name] = about
    assert [*said] == [*module.ROWS]
    for name, row in module.ROWS.items():
        where = r"([Tt]ext (to|on|about) )?(Tables?|Fig\.|Sec\.) \d[^:]*: ."
        assert re.match(where, row.about), name
        results = [f"{data} {mAP or '-'} / {first}" for data, (mAP, first) in row.results.items()]
        results += [f"{value} {common.COSTS[cost]}" for cost, value in row.costs.items()]
        flags = [common.as_flag(*setting) for setting in row.settings.items()]
        expected = f"{row.about} {', '.join(results) or 'no result in the paper'} {' '.join(flags)}"
        assert said[name] == (f"{row.about} (the same as {row.same})" if row.same else expected)


@pytest.mark.parametrize("script", SCRIPTS)
def test_recipes_and_rows_are_whole(script):
    """Every entry has both values, a meaning with its source and one kind; rows set what there is,
    aliases name rows, and what a row sets are the values that its network and losses get."""
    module = importlib.import_module(Path(script).stem)
    for key, (paper, small, meaning, *choices) in module.RECIPE.items():
        assert paper is None or type(paper) is type(small), key
        assert "(" in meaning or "Table" in meaning, key
        given = {*paper, *small} if isinstance(paper, tuple) else {paper, small}
        assert not choices or given <= set(choices[0]), key
    for name, row in module.ROWS.items():
        if row.same:
            assert not module.ROWS[row.same].same and not row.settings and not row.results
            continue
        assert row.settings.keys() <= module.RECIPE.keys(), name
        args = common.settings(module.RECIPE, module.ROWS, name)
        for key, value in row.settings.items():
            assert type(value) is type(module.RECIPE[key][0]), (name, key)
            assert getattr(args, key) == value
        small = common.settings(module.RECIPE, module.ROWS, name, small=True)
        for key in common.SCHEDULE_AND_BATCH:
            assert getattr(small, key) == module.RECIPE[key][1]
        assert all(len(result) == 2 for result in row.results.values())


BLOCK = {
    "h_e": "erased_block",
    "w_e": "erased_block",
    "s_h": "block_stride",
    "s_w": "block_stride",
}
NETWORKS = {  # their classes; settings that are arguments of another name, or of none
    "sinet.py": ("SINet", {"k": "kernel_size", "lambda2": "projection"}),
    "tclnet.py": ("TCLNet", BLOCK),
    "bicnet_tks.py": ("BiCnet", {}),
    "m3d.py": ("TwoStreamM3D", {"height": None, "width": None, "in_stages": None}),
    "strf.py": ("STRFNet", {"height": None, "width": None}),
}
TRAINING = dict.fromkeys("ids clips epoch erase epochs lr lr_step momentum weight_decay".split())
LOSSES = dict.fromkeys("loss margin lambda1 temperature divergence".split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_reaches_the_network_or_the_optimizer(script, monkeypatch):
    """Those of the losses are in the papers' tests, those of the batches in test_resume.py."""
    module, (name, others) = importlib.import_module(Path(script).stem), NETWORKS[script]
    others = {**TRAINING, **LOSSES, **others}
    signature = inspect.signature(getattr(module, name))
    monkeypatch.setattr(module, name, lambda *a, **k: signature.bind(*a, **k).arguments)

    def given(**changes):
        row = next(iter(module.ROWS))
        return common.settings(module.RECIPE, module.ROWS, row, **changes)

    def built(**changes):
        arguments = module.build(given(**changes), 7)
        return arguments | arguments.pop("strf_options", {})

    plain = built()
    for key, (paper, *_) in module.RECIPE.items():
        if paper in (None, ()):  # files, see test_m3d.py
            continue
        other = 0 if key == "lambda2" else not paper if isinstance(paper, bool) else 2 * paper
        changed = built(**{key: other})
        reached = {name for name in plain if plain[name] != changed[name]}
        assert reached == {others.get(key, key)} - {None}, key
        assert changed.get(key, other) == other, key
    assert built(resume="last.pt")["weights"] == "none"  # a checkpoint brings its own
    rates = {"lr": 0.5, "weight_decay": 0.25, "momentum": 0.125}
    group = module.make_optimizer(nn.Linear(2, 2), given(**rates)).param_groups[0]
    assert all(group[key] == value for key, value in rates.items() if key in module.RECIPE)


PLANS = {  # steps of an epoch, epochs, weighted losses, what the test reads: clips and frames
    "sinet.py": (235, 160, "1 x xent + 1 x triplet + 0.01 x mi", (168_487, 673_948)),
    "tclnet.py": (235, 150, "1 x xent + 1 x triplet", (168_487, 673_948)),
    "bicnet_tks.py": (117, 150, "1 x xent + 1 x triplet + 0.01 x div", (87_137, 697_096)),
    "strf.py": (235, 240, "1 x xent + 1 x triplet", (87_137, 697_096)),
}


@pytest.fixture(scope="module")
def mars_without_images(tmp_path_factory):
    """A --root with MARS' info folder alone."""
    root = tmp_path_factory.mktemp("root")
    write_mars_index(root / "mars")
    return root


def planned(script, monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", [script, "--plan", *map(str, flags)])
    importlib.import_module(Path(script).stem).main()
    return capsys.readouterr().out


@pytest.mark.parametrize("script", PLANS)
def test_a_plan_of_mars(script, mars_without_images, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    mars = ("--data", "mars", "--root", mars_without_images)
    out = planned(script, monkeypatch, capsys, *mars)
    steps, epochs, loss, (clips, frames) = PLANS[script]
    assert f"an epoch: {steps} steps of " in out and "which go through the tracklets" in out
    assert f"in all: {epochs} epochs, {steps * epochs:,} steps" in out
    assert f"\nloss: {loss}\n" in out
    assert f"reads 11,310 tracklets in {clips:,} clips, {frames:,} frames in all" in out
    assert "1,980 queries, 11,310 gallery tracklets, cosine distance" in out
    module = importlib.import_module(Path(script).stem)
    args = common.settings(module.RECIPE, module.ROWS, next(iter(module.ROWS)))
    # learning rates by epoch are those of the loop's scheduler
    optimizer = module.make_optimizer(nn.Linear(2, 2), args)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_step, gamma=0.1)
    rates = []
    for _ in range(args.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    lines = re.findall(r"epochs (\d+) to (\d+): (\S+)", out)
    said = [float(rate) for first, last, rate in lines for _ in range(int(first), int(last) + 1)]
    np.testing.assert_allclose(said, rates, rtol=1e-3)
    for key, (_, _, meaning, *_) in module.RECIPE.items():
        assert meaning in out, key
    out = planned(script, monkeypatch, capsys, *mars, "--epoch", "identities", "--epochs", 3)
    assert f"in all: 3 epochs, {3 * (40 if steps == 117 else 79)} steps" in out
    out = planned(script, monkeypatch, capsys, *mars, "--evaluate")
    assert "nothing is trained" in out and "steps" not in out and "1,980 queries" in out
    assert not any(tmp_path.iterdir())


def test_the_plan_of_m3d_has_three_parts(mars_without_images, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    out = planned("m3d.py", monkeypatch, capsys, "--data", "mars", "--root", mars_without_images)
    # every frame
    assert "an epoch: 3,984 steps of 128 clips, which show every tracklet at least once" in out
    assert "an epoch: 346 steps of 24 clips, which show every tracklet at least once" in out
    assert "in all: 20 epochs, 79,680 steps" in out and "400 epochs, 138,400 steps" in out
    assert "loss: 1 x xent-spatial\n" in out and "loss: 1 x xent-temporal\n" in out
    both = 657_709 + 77_445  # still frames, and whole clips of eight
    assert f"{both:,} clips, {657_709 + 8 * 77_445:,} frames in all" in out


def test_the_weights_of_a_plan_are_those_of_the_losses(one_backbone):
    """Each part of a loss is the weight that --plan prints times the part with the weight 1."""
    changes = {"sinet.py": dict(lambda1=0.5, lambda2=0.25), "bicnet_tks.py": dict(divergence=0.5),
               "tclnet.py": {}, "strf.py": {}, "m3d.py": {}}
    for script, weights in changes.items():
        module = importlib.import_module(Path(script).stem)
        row = next(iter(module.ROWS))

        def args(**others):
            return common.settings(module.RECIPE, module.ROWS, row, height=64, width=64,
                                   weights="none", **others)
        net = module.build(args(), 5)
        outputs = net(torch.rand(4, args().frames, 3, 64, 64))
        pids = torch.tensor([0, 0, 1, 1])
        ones = module.losses(outputs, pids, args(**dict.fromkeys(weights, 1.0)))
        parts = module.losses(outputs, pids, args(**weights))
        said = module.loss_weights(args(**weights))
        assert parts.keys() == said.keys() == ones.keys()
        for name in parts:
            torch.testing.assert_close(parts[name], said[name] * ones[name])


@pytest.mark.parametrize(
    "script, sampler, step, split, metric",
    [
        ("sinet.py", PKSampler, None, split_segments, "cosine"),
        ("tclnet.py", PKSampler, 8, split_consecutive, "cosine"),
        ("bicnet_tks.py", PKSampler, 4, split_consecutive, "cosine"),
        ("m3d.py", TrackletSampler, 1, split_whole, "euclidean"),
        ("strf.py", PKSampler, 4, split_consecutive, "cosine"),
    ],
)
def test_batches_clips_and_distance_of_the_papers(script, sampler, step, split, metric):
    """step: between the frames of a training clip; None: each is of its own part."""
    module = importlib.import_module(Path(script).stem)
    assert (module.SAMPLER, module.SPLIT, module.METRIC) == (sampler, split, metric)
    frames = module.SAMPLE(64, 4, np.random.default_rng(0))
    if step:
        assert np.diff(frames).tolist() == 3 * [step]
    else:
        assert (frames // 16).tolist() == [0, 1, 2, 3] and len({*np.diff(frames)}) > 1


def test_a_flag_goes_before_the_row_and_the_row_before_the_recipe(monkeypatch):
    def parsed(*flags, release=None):
        monkeypatch.setattr(sys, "argv", ["sinet.py", *flags])
        return common.parse_args(sinet.RECIPE, sinet.ROWS, sinet.__doc__, "sinet.py",
                                 release=release)

    args = parsed("--data", "mars", "--variant", "base+sbm", "--k", "5", "--beta", "3")
    assert (args.idms, args.sbm, args.k, args.beta) == (0, True, 5, 3.0)
    assert (args.epochs, args.lr, args.height) == (160, 3e-4, 256)
    assert args.paper_result == (85.7, 90.2)
    args = parsed("--variant", "base+sbm", "--no-sbm", "--sbm-blocks", "1",
                  "--sbm-splits", "2")
    assert (args.sbm, args.sbm_blocks, args.sbm_splits) == (False, (1,), (2,))
    assert (args.epochs, args.lr, args.height) == (8, 5e-4, 128) and args.paper_result is None
    args = parsed("--data", "mars", "--small", "--k", "5")
    assert args.small and (args.epochs, args.weights, args.height, args.k) == (8, "none", 128, 5)
    args = parsed("--no-small")
    assert not args.small and (args.epochs, args.weights, args.height) == (160, "imagenet", 256)
    args = parsed("--data", "mars", "--init", "last.pt", "--variant", "base")
    assert (args.init, args.weights, args.lr) == ("last.pt", "none", 3e-4)  # nothing to download
    assert parsed("--init", "last.pt", "--weights", "imagenet").weights == "imagenet"
    assert [parsed("--data", name).small for name in ("synthetic", "folder")] == [True, False]
    for name, others, ours in (("mars", 0, 0), ("duke", 32, 32), ("lsvid", 64, 48)):
        assert parsed("--data", name).chunk == others
        assert parsed("--data", name, release=sinet.RELEASE).chunk == ours
    assert parsed("--data", "lsvid", "--chunk", "9", release=sinet.RELEASE).chunk == 9


@pytest.mark.parametrize(
    "script, name, ids, frames, flags",
    [
        ("tclnet.py", "duke", 3, 2, ("--chunk", 5)),
        ("m3d.py", "lsvid", 2, 3, ("--no-in-stages",)),
        ("bicnet_tks.py", "folder", 2, 4, ()),
        ("strf.py", "prid", 2, 2, ("--split", 3)),
    ],
)
def test_every_script_trains_and_resumes_on_a_data_set(
    run, tmp_path, script, name, ids, frames, flags
):
    """sinet.py is tried in detail below; the others share its loop, which tests/test_same.py holds
    equal."""
    test_sets.WRITE[name](tmp_path / "sets")
    # not narrower: torch's bfloat16 convolution with stride 2 reads beyond maps of width 2 on some
    # CPUs (torch 2.15)
    size = ("--height", 64, "--width", 64, "--ids", ids, "--clips", 2, "--frames", frames)
    start = ("--root", tmp_path / "sets", "--weights", "none", "--epochs", 1)
    done = run(script, "--data", name, *start, *size, *flags)
    assert done.returncode == 0 and re.search(
        r"^.*, after epoch 1, .*mAP", done.stdout, re.M
    ), done.stderr
    folder = tmp_path / f"runs/{Path(script).stem}-{name}" / ("split-3" if name == "prid" else "")
    args = json.loads((folder / "args.json").read_text())
    assert (
        args["data"] == name
        and args["chunk"] == {"duke": 5, "lsvid": 64}.get(name, 0)
        and args["split"] == ("3" if name == "prid" else "0")
    )
    done = run(script, "--data", name, *flags, "--resume", "--epochs", 2, "--amp", "--workers", 1)
    assert done.returncode == 0 and re.search(
        r"^.*, after epoch 2, .*mAP", done.stdout, re.M
    ), done.stderr
    log = read_log(folder)
    assert [row["epoch"] for row in log] == ["1", "2"] and {"loss", *SCRIPTS[script]} < set(log[0])
    assert all(math.isfinite(float(row["loss"])) for row in log) and log[1]["mAP"]


def test_all_splits_one_after_another(tmp_path, monkeypatch, capsys, refuses):
    """Each is printed, with mean and deviation; after a restart the finished ones are not run
    again, an unfinished one is resumed."""
    test_sets.write_ilids(tmp_path)
    monkeypatch.setattr(sinet, "build", lambda args, num_classes: Colours(num_classes))
    monkeypatch.chdir(tmp_path)

    def start(*flags):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "sinet.py",
                "--data",
                "ilids",
                "--root",
                str(tmp_path),
                "--gpu",
                "cpu",
                *map(str, TINY),
                "--frames",
                "4",
                "--split",
                "all",
                *map(str, flags),
            ],
        )
        sinet.main()
        return capsys.readouterr().out

    start("--epochs", 2, "--split", 6)
    out = start("--epochs", 2)
    assert out.count("finished before") == 1 and re.search(
        "^sinet, split 6: .*finished before", out, re.M
    )  # the one that ran alone
    results = [float(v) for v in re.findall(r"^sinet, split \d: mAP ([\d.]+), ", out, re.M)]
    line = r"^sinet, mean of 10 splits: mAP ([\d.]+) \+- ([\d.]+), rank-1"
    mean, deviation = map(float, re.search(line, out, re.M).groups())
    assert (
        len(results) == 10
        and abs(mean - statistics.mean(results)) < 0.11
        and abs(deviation - statistics.stdev(results)) < 0.11
    )
    folder = tmp_path / "runs/sinet-ilids"
    shutil.rmtree(folder / "split-4")
    state = torch.load(folder / "split-7/last.pt", weights_only=True)
    torch.save({**state, "history": state["history"][:1]}, folder / "split-7/last.pt")
    again = start("--epochs", 2)
    assert (
        again.count("finished before") == 8
        and again.count("epoch 1/2:") == 1
        and again.count("epoch 2/2:") == 2
    )
    assert "resuming runs/sinet-ilids/split-7/last.pt after epoch 1" in again and (
        len(re.findall(r"^sinet, split \d: ", again, re.M)) == 10
    )
    assert start("--epochs", 3).count("last.pt after epoch 2\n") == 10
    command = ("--data", "ilids", "--root", tmp_path, *TINY, "--split", "all", "--epochs", 3)
    for flags, says in (
        (("--lr", 1), "was trained with --lr 0.0003, not with --lr 1.0"),
        (("--weights", "none"), "was trained with --weights imagenet, not with --weights none"),
        (("--amp",), "was trained with --no-amp, not with --amp"),
        (("--rerank",), "was trained with --no-rerank, not with --rerank"),
        (("--epochs", 1), "stopped after epoch 3, but --epochs says 1"),
    ):  # a mean of different settings would say nothing
        refuses((*command, *flags), f"split-0/last.pt: {says}")
    torch.save({"script": "sinet.py"}, folder / "split-2/last.pt")
    refuses(command, "split-2/last.pt: not a checkpoint of sinet.py")
    shutil.rmtree(tmp_path / "ilids/i-LIDS-VID/sequences/cam1/person003")
    refuses((*command, "--output", "new"), "row 0 of ls_set is not a permutation of the 7 persons")
    assert not (tmp_path / "new").exists()


def test_m3d_starts_from_a_2d_stream(run, refuses, small_root, tmp_path):
    common = ("--root", small_root, "--height", 64, "--width", 32, "--ids", 6, "--frames", 3)
    done = run("m3d.py", *common, "--variant", "2d", "--epochs", 1, "--output", "2d")
    assert done.returncode == 0, done.stderr
    start = ("--variant", "m3d", "--init-2d", "2d/last.pt")
    done = run("m3d.py", *common, *start, "--epochs", 1, "--output", "m3d")
    assert done.returncode == 0 and "mAP" in done.stdout, done.stderr
    assert run("m3d.py", "--resume", "m3d/last.pt", "--evaluate").returncode == 0
    refuses(
        (*common, "--init-2d", "m3d/last.pt"),
        "m3d/last.pt: contains no weights named streams.spatial.net.* of a run",
        script="m3d.py",
    )
    refuses((*common, "--init-2d", "none.pt"), "none.pt: no such file", script="m3d.py")
    refuses(
        (*common, "--stream", "spatial", "--init-2d", "2d/last.pt"),
        "init_2d is for the temporal stream",
        script="m3d.py",
    )


def test_a_run_prints_and_writes(trained):
    folder, out = trained
    assert "no GPU found" in out and "identities  tracklets" in out
    assert re.search(r"base: [\d,]+ parameters, \d+\.\d+ GFLOPs", out)
    assert "3 steps of 4 clips in an epoch, 6 in 2 epochs" in out
    results = re.findall(r"^(.*), all frames:  mAP ([\d.]+)   CMC-1 ([\d.]+)", out, re.M)
    assert [label for label, *_ in results] == ["base, untrained", "base, after epoch 2"]
    last, end = out.strip().splitlines()[-2:]  # the last epoch's result ends the output
    assert last.startswith("base, after epoch 2")
    mean_ap, first = results[1][1:]
    assert end == (
        f"base on synthetic, after epoch 2: mAP {mean_ap}, rank-1 {first}; "
        "the paper reports no result"
    )
    log = read_log(folder)
    assert (
        [row["epoch"] for row in log] == ["1", "2"]
        and log[0]["mAP"] == ""
        and f"{float(log[1]['mAP']):.1f}" == results[1][1]
    )
    assert {"lr", "loss", "xent", "triplet"} < set(log[0]) and re.search(
        r"^epoch 2/2: .* clips/s\)$", out, re.M
    )
    args = json.loads((folder / "args.json").read_text())
    assert (
        args["variant"] == "base"
        and args["height"] == 48
        and args["lr"] == 5e-4
        and args["weights"] == "none"
    )
    state = torch.load(folder / "last.pt", weights_only=True)
    assert {"model", "optimizer", "scheduler", "random", "args"} < set(state) and len(
        state["history"]
    ) == 2
    assert sorted(p.name for p in folder.iterdir()) == ["args.json", "last.pt", "log.csv"]


def test_evaluate_repeats_the_result_and_reranks(trained, run):
    folder, out = trained
    done = run("sinet.py", "--evaluate", "--resume", folder / "last.pt")
    assert done.returncode == 0 and out.strip().splitlines()[-2].split("(")[0] in done.stdout
    assert "epoch 1/" not in done.stdout and sorted(p.name for p in folder.iterdir()) == [
        "args.json",
        "last.pt",
        "log.csv",
    ]
    done = run(
        "sinet.py",
        "--evaluate",
        "--resume",
        folder / "last.pt",
        "--rerank",
        "--workers",
        1,
        "--amp",
    )
    assert (
        done.returncode == 0 and "after epoch 2, all frames, re-ranked:  mAP" in done.stdout
    ), done.stderr


def test_sinet_trains_with_amp_and_workers(run, small_root, tmp_path):
    flags = ("--epochs", 1, "--amp", "--workers", 2, "--pool", "avg", "--seed", 3)
    done = run("sinet.py", "--root", small_root, *TINY, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all frames") == 2 and "after epoch 1, all frames" in done.stdout
    assert all(row["mAP"] for row in read_log(tmp_path / "runs/sinet-synthetic"))


def test_backbone_weights_from_a_file(run, small_root, tmp_path):
    state = torchvision.models.resnet50().state_dict()
    torch.save(state, tmp_path / "resnet50.pth")
    done = run("sinet.py", "--evaluate", "--root", small_root, *TINY, "--weights", "resnet50.pth")
    assert done.returncode == 0 and "untrained, all frames" in done.stdout, done.stderr


def thin(state):
    """Tensors of the same shapes that take next to no room in a file."""
    return {name: torch.ones(()).expand(value.shape) for name, value in state.items()}


@pytest.fixture
def resnet_file(tmp_path, backbone):
    """resnet_file(change) -> a file with what change makes of the weights of ResNet-50."""

    def write(change=dict):
        path = tmp_path / "weights.pth"
        torch.save(change(thin(backbone.state_dict())), path)
        return path

    return write


def prefixed(prefix):
    return lambda state: {prefix + name: value for name, value in state.items()}


def in_a_classifier(state):
    """As repositories of classifiers and of re-identification save them."""
    head = {"head.fc.weight": torch.ones(5, 2048)}
    return {"meta": {"epoch": 3}, "state_dict": {**prefixed("backbone.")(state), **head}}


def without_counters(state):
    """As torch saved a BatchNorm before 0.4.1; with the classifier of a re-identification."""
    kept = {k: v for k, v in state.items() if not k.endswith("tracked") and k[:3] != "fc."}
    return {**kept, "classifier.weight": torch.ones(5, 2048)}


WRAPPED = {
    "plain": dict,
    "module": prefixed("module."),
    "backbone": prefixed("backbone."),
    "three prefixes": prefixed("module.model.encoder."),
    **{name: (lambda state, name=name: {name: state, "epoch": 3, "optimizer": {"state": {}}})
       for name in ("state_dict", "model", "net", "network", "model_state_dict")},
    "wrapper and prefix": lambda state: {"model": prefixed("module.")(state), "ema": {}},
    "two wrappers": lambda state: {"model": {"state_dict": state}},
    "with a head": in_a_classifier,
    "older": without_counters,
}


@pytest.mark.parametrize("form", WRAPPED)
def test_backbone_weights_in_wrappers(form, resnet_file, backbone, monkeypatch, capsys):
    path = resnet_file(WRAPPED[form])
    run = object.__new__(common.Run)
    run.args = argparse.Namespace(weights=str(path), resume=None)
    with run.setting_up():
        net = sinet.resnet50(run.args.weights)
    assert run.args.weights == str(path)  # what last.pt says
    assert net.state_dict().keys() == {n for n in backbone.state_dict() if n[:3] != "fc."}
    assert all(bool((p == 1).all()) for p in net.parameters())
    out = capsys.readouterr().out
    others = {"with a head": "head", "older": "classifier"}.get(form)
    assert f"in the file, but not used: {others}\n" in out if others else "not used" not in out


def renamed(state):
    return {name.replace("layer4", "stage4"): value for name, value in state.items()}


def deeper(state):
    """Of a ResNet-101."""
    return {**state, "layer3.6.conv1.weight": torch.ones(256, 1024, 1, 1)}


def one_channel(state):
    return {**state, "conv1.weight": state["conv1.weight"][:, :1]}


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda state: {"cls_token": torch.ones(3)}, ["lacks 'conv1.weight'", "'cls_token'"]),
        (lambda state: {"model": {"a.b": 3}}, ["lacks 'conv1.weight'", "'a.b'"]),
        (renamed, ["lacks 'layer4.0.conv1.weight'"]),
        (deeper, ["it has 'layer3.6.conv1.weight', which the network does not have"]),
        (one_channel, ["'conv1.weight' has the shape [64, 1, 7, 7], that of the network [64, 3"]),
        (lambda state: {**state, "bn1.weight": 3}, ["'bn1.weight' has no shape"]),
        (lambda state: [state], ["lacks 'conv1.weight'"]),
        (lambda state: {}, ["lacks 'conv1.weight'"]),
    ],
)
def test_other_weights_than_those_of_the_backbone(change, says, resnet_file, refuses, small_root):
    path = resnet_file(change)
    refuses(("--evaluate", "--root", small_root, "--weights", path),
            f"--weights {path}: does not fit torchvision's ResNet-50: ", *says)


def test_a_file_that_torch_did_not_write(refuses, tmp_path):
    """Its kind is named; torch's own reason is its last line, without the codes of a terminal."""
    (tmp_path / "log.csv").write_text("epoch,lr,loss\n1,0.1,2.3\n")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"args": argparse.Namespace()}, tmp_path / "code.pt")
    for flag in ("--resume", "--init", "--weights"):
        for file, says in (
            ("log.csv", "torch.save writes no file that begins with b'epoch,lr"),
            ("empty.pt", "torch.save writes no file that begins with b''"),
            ("code.pt", "(WeightsUnpickler error: Unsupported global: GLOBAL argparse.Namespace"),
        ):
            refuses((flag, file), f"{file}: not a readable checkpoint", says)


def fails(done, *says):
    """One line on stderr, exit code 2, no traceback."""
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr.count("\n") == 1 and "Traceback" not in done.stdout + done.stderr
    ), done.stderr
    for text in says:
        assert text in done.stderr


@pytest.mark.parametrize(
    "arguments, says",
    [
        (
            ("--data", "mars", "--root", "nowhere"),
            ["nowhere: no such folder; --root names the folder that holds mars/, or the data set"],
        ),
        (("--gpu", "3"), ["--gpu 3: no GPU was found"]),
        (("--bogus",), ["--bogus", "--help"]),
        (
            ("--weights", "imagenet"),
            ["ResNet-50 are not available", "resnet50-0676ba61.pth", "--weights none"],
        ),
    ],
)
def test_errors_are_one_line(run, small_root, tmp_path, arguments, says):
    root = () if "--root" in arguments else ("--root", small_root)
    # no download: the proxy of every protocol is a closed port of this machine, and the cache of
    # weights is empty
    env = {
        **{f"{p}_proxy": "http://127.0.0.1:9" for p in ("http", "https", "HTTP", "HTTPS")},
        "TORCH_HOME": str(tmp_path / "cache"),
    }
    fails(run("sinet.py", *root, *arguments, env=env), *says)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--frames", "3"), ["at least 4 frames, not 3", "--frames"]),
        (("--height", "32"), ["at least 33x33 pixels, not 32x64", "--height"]),
        (("--ids", "7"), ["a batch needs 7 identities, but the training set has only 6"]),
        (("--epochs", "0"), ["--epochs", "whole number from 1 to"]),
        (("--lr", "nan"), ["--lr", "a number from 0 to"]),
        (("--seed", "1" + 30 * "0"), ["--seed", "whole number from 0 to"]),
        (("--erase", "1.5"), ["--erase", "a number from 0 to 1"]),
        (("--height", "8193"), ["--height", "whole number from 1 to 8192"]),
        (("--width", "100000"), ["--width", "whole number from 1 to 8192"]),
        (("--frames", "1025"), ["--frames", "whole number from 1 to 1024"]),
        (("--ids", "2147483647"), ["--ids", "whole number from 2 to 4096"]),
        (("--clips", "2147483647"), ["--clips", "whole number from 1 to 4096"]),
        (("--variant", "sinett"), ["--variant", "'sinett'"]),
        (("--data", "marz"), ["--data", "'marz'"]),
        (("--weights", "nothing.pth"), ["nothing.pth: no such file"]),
        (("--resume", "nothing.pt"), ["nothing.pt: no such file"]),
        (("--beta", "0"), ["--beta", "a number above 0"]),
        (("--temperature", "0"), ["--temperature", "a number above 0"]),
        (("--reduction", "0"), ["reduction of 1 to ", ", not 0; check --frames"]),
        (("--se-reduction", "2000"), ["reduction of 1 to 1024, not 2000"]),
        (("--init", ""), ["--init: the value is empty"]),
        (("--figure", ""), ["--figure: the value is empty"]),
    ],
)
def test_wrong_flags(refuses, small_root, tmp_path, arguments, says):
    refuses(("--root", small_root, *arguments), *says)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "script, arguments, says",
    [
        (
            "tclnet.py",
            ("--frames", 3),
            ["2 learners take clips of 2, 4, 6 ... frames, not 3", "--frames"],
        ),
        (
            "tclnet.py",
            ("--height", 16),
            ["1 erased block(s) of 1x4 can cover the whole 1x4 map of 16x64 frames"],
        ),
        ("tclnet.py", ("--loss", "tri"), ["--loss", "'tri'"]),
        ("bicnet_tks.py", ("--frames", 6), ["frames must be a multiple of 4", "not 6", "--frames"]),
        (
            "bicnet_tks.py",
            ("--height", 48),
            ["height must be a multiple of 64 and width a multiple of 32", "not 48x64"],
        ),
        ("bicnet_tks.py", ("--divergence", "-1"), ["--divergence", "a number from 0 to"]),
        *(
            (script, *case)
            for script in list(SCRIPTS)[1:]
            for case in (
                *(
                    (("--data", name, "--root", "nowhere"), ["nowhere: no such folder"])
                    for name in DATA_SETS
                    if name != "synthetic"
                ),
                (
                    ("--data", "mars", "--split", "1"),
                    ["--split: mars has no splits, only ilids and prid have"],
                ),
                (
                    ("--data", "prid", "--split", "all", "--evaluate"),
                    ["--split all is for training"],
                ),
                (("--gpu", "3"), ["--gpu 3: no GPU was found"]),
                (("--bogus",), ["--bogus", "--help"]),
                (("--resume", "sinet.pt"), [f"sinet.pt: not a checkpoint of {script}"]),
                (("--frames", "0"), ["--frames", "whole number from 1 to"]),
            )
        ),
        *(
            (script, ("--ids", "7"), ["a batch needs 7 identities, but the training set has only"])
            for script in list(SCRIPTS)[1:]
            if script != "m3d.py"
        ),
        ("m3d.py", ("--ids", "700"), ["a batch needs 700 tracklets, but the training set has"]),
        ("m3d.py", ("--stream", "both"), ["--stream", "'both'"]),
        ("strf.py", ("--kappa", "x"), ["--kappa", "a number from 0 to"]),
    ],
)
def test_wrong_flags_of_every_script(refuses, small_root, tmp_path, script, arguments, says):
    torch.save({"script": "sinet.py"}, tmp_path / "sinet.pt")
    refuses(
        (*(() if "--root" in arguments else ("--root", small_root)), *arguments),
        *says,
        script=script,
    )


def numbers_of(recipe):
    """The settings of a recipe that are numbers: (name, how many there are of it)."""
    for key, (paper, *_) in recipe.items():
        values = paper if isinstance(paper, tuple) else (paper,)
        if values and isinstance(values[0], (int, float)) and not isinstance(values[0], bool):
            yield key, len(values)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_of_a_recipe_is_tried(script, monkeypatch, tmp_path, one_backbone):
    """One line or a run, before any data are read: there are none here."""
    module = importlib.import_module(Path(script).stem)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "variant_help", lambda rows: ())  # which --help prints
    started = []
    monkeypatch.setattr(module, "train", started.append)
    monkeypatch.setattr(module, "train_in_stages", started.append, raising=False)
    outcomes = {}
    for key, count in numbers_of(module.RECIPE):
        for value in ("0", "-1", "1e9", "1000000000", "999999999", "nan", "inf", ""):
            started.clear()
            monkeypatch.setattr(sys, "argv", [script, common.as_flag(key), *[value] * count])
            try:
                module.main()
            except UserError as error:
                outcomes[key, value] = str(error)
                assert "\n" not in str(error) and not started
                continue
            outcomes[key, value] = "ran"
            (args,) = started
            if key not in common.TRAINING_ONLY and value != "999999999":  # what a clip goes through
                model = common.build_on_meta_device(module.build, args, 3)
                common.complexity(model, args.frames, args.height, args.width)
    assert not any(tmp_path.iterdir())
    for key, count in numbers_of(module.RECIPE):
        for value in ("-1", "nan", "inf", ""):
            assert typed_flag(key) in outcomes[key, value], (key, value)
    if script == "sinet.py":
        for key in ("beta", "k", "reduction", "se_reduction", "sbm_splits", "frames"):
            assert outcomes[key, "0"] != "ran" and outcomes[key, "0"], key
    assert {outcomes[key, "0"] for key in ("lr", "erase", "weight_decay")} == {"ran"}


def typed_flag(key):
    return common.as_flag(key)


def test_a_number_is_of_the_kind_of_its_default(monkeypatch):
    """0.0 is a number with decimals as 0.5 is."""
    for script in SCRIPTS:
        module = importlib.import_module(Path(script).stem)
        monkeypatch.setattr(sys, "argv", [script, "--erase", "0.25", "--weight-decay", "0"])
        args = common.parse_args(module.RECIPE, module.ROWS, module.__doc__, script)
        assert args.erase == 0.25 and type(args.weight_decay) is float


def test_modules_name_the_sizes_they_take():
    for make, says in (
        (lambda: sinet.ChannelAttentionLayer(64, reduction=0), "a reduction of 1 to 64, not 0"),
        (lambda: sinet.ChannelAttentionLayer(64, reduction=65), "a reduction of 1 to 64, not 65"),
        (lambda: sinet.GlobalContextBlock(64, reduction=65), "a reduction of 1 to 64, not 65"),
        (
            lambda: sinet.KernelGenerationModule(64, kernel_size=2),
            "odd kernel size of at least 1, not 2",
        ),
        (
            lambda: sinet.KernelGenerationModule(64, kernel_size=-1),
            "odd kernel size of at least 1, not -1",
        ),
        (lambda: sinet.SuppressOperation(beta=0.0), "beta above 0, not 0.0"),
        (lambda: sinet.SuppressOperation(beta=math.nan), "beta above 0, not nan"),
        (lambda: sinet.SuppressOperation(beta=math.inf), "beta above 0, not inf"),
        (lambda: sinet.IntegrationDistributionModule(64, 1, 4, 2, reduction=9), "of 1 to 8, for"),
        (lambda: sinet.IntegrationDistributionModule(4, 4, 4, 2, reduction=5), "of 1 to 4, for"),
        (lambda: sinet.IntegrationDistributionModule(64, 4, 4, 2, reduction=0), "not 0"),
    ):
        with pytest.raises(ValueError, match=says):
            make()
    sinet.IntegrationDistributionModule(64, 1, 4, 2, reduction=8)
    sinet.ChannelAttentionLayer(64, reduction=64)


TRAINED = ("--resume", "LAST")  # LAST: last.pt of the short training of sinet.py, base


@pytest.mark.parametrize(
    "script, flags, says",
    [
        ("sinet.py", ("--beside", "a.pt"), "--beside has no effect without --figure"),
        ("m3d.py", ("--figure-tracklets", 2), "--figure-tracklets has no effect without --figure"),
        ("strf.py", ("--evaluate", "--figure-format", "pdf"), "--figure-format has no effect w"),
        *(
            ("sinet.py", (*mode, *flag), f"{flag[0]} is for training, but with {mode[0]} noth")
            for mode in (("--evaluate",), ("--figure", "f"), ("--export", "e"))
            for flag in (("--eval-every", 2), ("--checkpoint-every", 2), ("--eval-first",),
                         ("--tensorboard",), ("--chunk", 9), ("--lr", 1), ("--epochs", 3),
                         ("--margin", 1))
        ),
        ("m3d.py", ("--evaluate", "--in-stages"), "--in-stages is for training"),
        ("m3d.py", ("--evaluate", "--momentum", 0.5), "--momentum is for training"),
        ("tclnet.py", ("--evaluate", "--loss", "xent"), "--loss is for training"),
        ("bicnet_tks.py", ("--evaluate", "--divergence", 1), "--divergence is for training"),
        ("sinet.py", ("--evaluate", "--plan", "--lr", 1), "--lr is for training"),
        ("sinet.py", ("--figure", "f", "--export", "e"), "--export has no effect with --figure"),
        ("sinet.py", ("--figure", "f", "--compile"), "--compile has no effect with --figure"),
        ("sinet.py", ("--figure", "f", "--evaluate"), "--evaluate has no effect with --figure"),
        ("sinet.py", ("--evaluate", *TRAINED, "--seed", 3), "--seed has no effect with --evalu"),
        ("sinet.py", ("--evaluate", *TRAINED, "--weights", "imagenet"), "--weights has no effec"),
        ("sinet.py", ("--evaluate", *TRAINED, "--init", "a.pt"), "--init has no effect with --re"),
        ("sinet.py", (*TRAINED, "--init", "a.pt"), "--init has no effect with --resume"),
        ("sinet.py", (*TRAINED, "--weights", "imagenet"), "--weights has no effect with --resum"),
        ("sinet.py", ("--split", "all", "--data", "prid", *TRAINED), "--resume FILE has no eff"),
        ("sinet.py", ("--complexity", "--variant", "base"), "--variant has no effect with --comp"),
        ("strf.py", ("--gpu", "cpu", "--complexity"), "--gpu has no effect with --complexity"),
    ],
)
def test_flags_without_effect(refuses, trained, script, flags, says):
    last = trained[0] / "last.pt"
    refuses([last if flag == "LAST" else flag for flag in flags], says, script=script)


@pytest.mark.parametrize(
    "flags",
    [
        ("--evaluate", "--ids", 3, "--clips", 2, "--seed", 3, "--amp", "--rerank", "--compile"),
        ("--evaluate", "--frames", 8, "--height", 64, "--weights", "a.pth", "--output", "x"),
        ("--figure", "f", "--beside", "a.pt", "--figure-tracklets", 2, "--rerank", "--amp"),
        ("--export", "e", "--no-evaluate", "--eval-every", 2, "--tensorboard", "--lr", 1),
        ("--export", "e", "--evaluate", "--no-tensorboard", "--no-eval-first"),
        ("--plan", "--gpu", "cpu", "--workers", 2, "--amp", "--output", "x", "--epochs", 3),
        ("--resume", "--init", "gone.pt", "--weights", "none", "--lr", 1, "--eval-first"),
        ("--data", "prid", "--split", "all", "--resume", "--init", "gone.pt"),
        # what the checkpoint says, too, as when a flag is added to the command of the training
        ("--evaluate", *TRAINED, "--epochs", 2, "--lr", 5e-4, "--seed", 0, "--weights", "none"),
        ("--evaluate", *TRAINED, "--epoch", "tracklets", "--checkpoint-every", 1),
        (*TRAINED, "--weights", "none", "--epochs", 5),
    ],
)
def test_flags_with_an_effect(flags, trained, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    last = trained[0] / "last.pt"
    flags = [str(last if flag == "LAST" else flag) for flag in flags]
    monkeypatch.setattr(sys, "argv", ["sinet.py", *flags])
    common.parse_args(sinet.RECIPE, sinet.ROWS, sinet.__doc__, "sinet.py",
                      release=sinet.RELEASE)


def test_what_only_a_training_takes_is_what_no_network_takes():
    """The other settings of a recipe reach the network or the clips of the test."""
    for script in SCRIPTS:
        module = importlib.import_module(Path(script).stem)
        training = module.RECIPE.keys() & {*TRAINING, *LOSSES, "in_stages"} - {"ids", "clips"}
        assert module.RECIPE.keys() & common.TRAINING_ONLY == training, script


def test_damaged_data_is_one_line(run, small_root, tmp_path):
    shutil.copytree(small_root / "synthetic", tmp_path / "d/synthetic")
    frame = next((tmp_path / "d/synthetic/bbox_train/0003").glob("*.jpg"))
    for damaged in (tmp_path / "d/synthetic/bbox_train/0003").glob("*.jpg"):
        damaged.write_bytes(frame.read_bytes()[:100])
    for workers in (0, 2):
        fails(
            run(
                "sinet.py",
                "--root",
                "d",
                *TINY,
                "--ids",
                6,
                "--epochs",
                1,
                "--variant",
                "base",
                "--workers",
                workers,
                "--output",
                f"o{workers}",
            ),
            "bbox_train/0003/0003C",
            "unreadable image",
        )
    (tmp_path / "d/synthetic/info/tracks_test_info.mat").unlink()
    fails(run("sinet.py", "--root", "d"), "missing info/tracks_test_info.mat")


def test_checkpoint_errors(trained, run, refuses, tmp_path):
    last = trained[0] / "last.pt"
    (tmp_path / "cut.pt").write_bytes(last.read_bytes()[:100_000])
    fails(run("sinet.py", "--resume", "cut.pt"), "cut.pt: not a readable checkpoint")
    state = torch.load(last, weights_only=True)
    del state["model"]["stem.0.weight"], state["optimizer"]["state"]
    torch.save(state, tmp_path / "odd.pt")
    refuses(("--resume", "odd.pt"), "odd.pt: its model does not fit")
    for flags, says in (
        (("--variant", "sinet"), "--variant base, not with --variant sinet"),
        (("--height", 64), "--height 48, not with --height 64"),
        (("--lr", 1), "--lr 0.0005, not with --lr 1.0"),
        (("--evaluate", "--beta", 1), "--beta 5.0, not with --beta 1.0"),
    ):
        refuses(("--resume", "odd.pt", *flags), f"was trained with {says}")
    for content, says in (
        ({"a": 1}, "not a checkpoint of sinet.py"),
        ({"script": "sinet.py"}, "not a checkpoint of sinet.py"),
        ([1], "not a checkpoint of sinet.py"),
        ({"script": Path("x")}, "not a readable checkpoint"),
    ):  # a Path is more than data
        torch.save(content, tmp_path / "odd.pt")
        refuses(("--resume", "odd.pt"), f"odd.pt: {says}")


def test_output_folder_errors(trained, refuses, small_root, tmp_path, monkeypatch):
    shutil.copytree(
        trained[0], tmp_path / "other"
    )  # a resumed run does not overwrite another one, either
    refuses(
        ("--resume", trained[0] / "last.pt", "--output", "other", "--epochs", 3),
        "other already holds a run",
    )
    monkeypatch.setattr(sinet, "build", lambda args, num_classes: Colours(num_classes))
    refuses(("--root", small_root, "--output", trained[0]), "already holds a run", "--resume")
    (tmp_path / "file").write_text("")
    refuses(("--root", small_root, "--output", "file/run"), "file/run/args.json: cannot be written")
