"""Long runs survive: kills, signals, full disks, damaged checkpoints, diverged losses, several
processes."""

import argparse
import csv
import io
import itertools
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run
import torch.nn.functional as F

import common
import data
import m3d
import processes
import sinet
import test_sets
from conftest import ROOT, TINY, Colours, Forked, drop_weights, own_signals, read_log
from data import TrainClips, UserError, replacing


@pytest.fixture
def signalled(monkeypatch):
    """For a test that signals itself."""
    monkeypatch.setattr(common, "_stop_signal", 0)


@pytest.fixture
def start(tmp_path, small_root):
    """start(*flags) -> the running command of `trained`, with other flags, its output in the file
    tmp_path/out."""

    def popen(*flags, launcher=None, before=int):
        command = ["sinet.py", "--root", small_root, "--variant", "base", "--epochs", 2, *TINY]
        command += ["--epoch", "tracklets", *flags]
        out = tmp_path / "out"
        out.write_text("")
        if launcher:
            command = [*launcher, ROOT / command[0], *command[1:]]
        return Forked(command, tmp_path, out, out, {"PYTHONUNBUFFERED": "1"}, before)

    yield popen
    drop_weights(tmp_path)


def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**8, 10**8))


def wait_for(process, file, text, seconds=120):
    end = time.time() + seconds
    while text not in file.read_text():
        assert process.poll() is None and time.time() < end, file.read_text()
        time.sleep(0.05)


def same_run(folder, out, reference):
    """Bitwise the same final weights, optimiser, log and result as the uninterrupted run."""
    whole, other = (torch.load(f / "last.pt", weights_only=True) for f in (reference[0], folder))
    assert whole["model"].keys() == other["model"].keys() and all(
        torch.equal(v, other["model"][k]) for k, v in whole["model"].items()
    )
    for a, b in zip(
        whole["optimizer"]["state"].values(), other["optimizer"]["state"].values(), strict=True
    ):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert (folder / "log.csv").read_bytes() == (reference[0] / "log.csv").read_bytes()
    assert (
        whole["scheduler"] == other["scheduler"]
        and whole["history"] == other["history"]
        and whole["progress"] == other["progress"]
    )
    assert reference[1].strip().splitlines()[-1].split("(")[0] in out


def test_what_a_test_started_is_killed_with_all_below_it(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "script.py").write_text(
        "import subprocess, time\n"
        "fifo = open('fifo', 'w')\n"
        "subprocess.Popen(['sleep', '60'], stdout=fifo, start_new_session=True)\n"
        "print('started', file=fifo, flush=True)\n"
        "time.sleep(60)\n"
    )
    out = tmp_path / "out"
    process = Forked((tmp_path / "script.py",), tmp_path, out, out)
    with open(tmp_path / "fifo") as fifo:
        assert fifo.readline() == "started\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        assert process in Forked.started
        began = time.time()
        process.end()
        assert fifo.read() == "" and time.time() < began + 30  # nobody has it open


def test_sigterm_ends_pytest():
    """In a test, and behind one in which a main() noted it."""
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), own_signals():
        common.record_signals()
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    assert not common._stop_signal


def test_killed_runs_end_as_if_never_stopped(trained, start, tmp_path, request):
    """SIGKILL at random moments, also while last.pt is written; the same command with --resume goes
    on. `--kills 20` for more."""
    kills, rng, moments = request.config.getoption("--kills"), random.Random(), []
    while kills > 0 or (tmp_path / "run").exists():
        began, process = time.time(), start("--output", "run", "--resume")
        try:
            process.wait(rng.uniform(0, 6) if kills > 0 else 240)  # later parts come after a resume
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills -= 1
            lines = (tmp_path / "out").read_text().strip().splitlines()
            moments.append(
                f"{time.time() - began:.1f} s: {lines[-1][:60] if lines else '(nothing printed)'}"
                + " (last.pt.tmp half written)" * (tmp_path / "run/last.pt.tmp").exists()
            )
            (tmp_path / "run").mkdir(exist_ok=True)
            continue
        out = (tmp_path / "out").read_text()
        assert process.poll() == 0, out
        same_run(tmp_path / "run", out, trained)
        shutil.rmtree(tmp_path / "run")
    print(*moments, sep="\n")
    assert len(moments) == request.config.getoption("--kills")


def test_a_signal_ends_the_step_and_writes_the_checkpoint(trained, start, tmp_path):
    """SIGINT in the first epoch (130), SIGTERM in the next start (143), then to the end: as if
    never stopped."""
    process, folder = start("--output", "run"), tmp_path / "run"
    wait_for(process, tmp_path / "out", "untrained, all frames")
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 130, (tmp_path / "out").read_text()
    assert (
        (tmp_path / "out")
        .read_text()
        .endswith("sinet.py: stopped by SIGINT; the same command with --resume continues\n")
    )
    state = torch.load(folder / "last.pt", weights_only=True)
    assert (
        state["history"] == []
        and 1 <= state["progress"][0] < 3
        and not (folder / "log.csv").exists()
    )
    process = start("--output", "run", "--resume", "auto", "--workers", 1, before=os.setsid)
    wait_for(
        process,
        tmp_path / "out",
        f"resuming run/last.pt after {state['progress'][0]} steps of epoch 1\n",
    )
    while subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True
    ).returncode:  # the loader's worker
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(
        process.pid, signal.SIGTERM
    )  # as timeout, torchrun and Slurm do: the worker gets it, too
    assert process.wait(60) == 143 and (tmp_path / "out").read_text().endswith(
        "sinet.py: stopped by SIGTERM; the same command with --resume continues\n"
    )
    assert start("--output", "run", "--resume").wait(120) == 0
    same_run(folder, (tmp_path / "out").read_text(), trained)


def test_a_full_disk_leaves_the_previous_checkpoint(trained, start, tmp_path):
    """The size of files is limited instead."""
    shutil.copytree(trained[0], tmp_path / "run")
    before = (tmp_path / "run/last.pt").read_bytes()
    process = start("--resume", "run/last.pt", "--epochs", 3, before=small_files)
    assert process.wait(120) == 2
    assert re.search(
        r"^sinet.py: run/last.pt: cannot be written \(.*\); the previous file is unchanged$",
        (tmp_path / "out").read_text(),
        re.M,
    )
    assert (tmp_path / "run/last.pt").read_bytes() == before and sorted(
        p.name for p in (tmp_path / "run").iterdir()
    ) == ["args.json", "last.pt", "log.csv"]


@pytest.fixture
def small(monkeypatch, tmp_path, small_root, capsys):
    """small(*flags) -> what sinet.py's main(), or another's, prints with a small network."""
    monkeypatch.chdir(tmp_path)

    def call(*flags, script=sinet):
        flags = ("--root", small_root, "--gpu", "cpu", *TINY, *flags)
        monkeypatch.setattr(script, "build", lambda args, num_classes: Colours(num_classes))
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        script.main()
        return capsys.readouterr().out

    return call


def groups(state, **changes):
    """The optimiser of a checkpoint with other numbers."""
    (group,) = state["optimizer"]["param_groups"]
    return {**state["optimizer"], "param_groups": [{**group, **changes}]}


def moments(state, value):
    """The optimiser of a checkpoint with another first moment of the first parameter."""
    first = {**state["optimizer"]["state"][0], "exp_avg": value}
    return {**state["optimizer"], "state": {**state["optimizer"]["state"], 0: first}}


def test_a_checkpoint_from_before_the_fused_optimizer_goes_on(small, tmp_path):
    small("--epochs", 1, "--output", "a")
    state = torch.load(tmp_path / "a/last.pt", weights_only=True)
    torch.save({**state, "optimizer": groups(state, fused=None)}, tmp_path / "a/last.pt")
    small("--epochs", 2, "--output", "a", "--resume")
    state = torch.load(tmp_path / "a/last.pt", weights_only=True)
    assert len(state["history"]) == 2


def test_checkpoints_that_are_refused(small, refuses, tmp_path):
    small("--epochs", 1, "--output", "a")
    state = torch.load(tmp_path / "a/last.pt", weights_only=True)

    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    for change, says in (
        (dict(args=Code()), "not a readable checkpoint"),
        (dict(args=3), "not a checkpoint of sinet.py"),
        (dict(history=None), "not a checkpoint"),
        (dict(script="strf.py"), "not a checkpoint of sinet.py"),
        (dict(optimizer={}), "its optimizer does not fit"),
        (dict(model={}), "its model does not fit"),
        (dict(args={"frames": 4}), "not a checkpoint of sinet.py"),
        (
            dict(args={**state["args"], "variant": "old"}),
            "not a checkpoint of sinet.py",
        ),
        (
            dict(args={**state["args"], "data": [1]}),
            "not a checkpoint of sinet.py",
        ),
        (dict(random={"torch": 3}), "its random does not fit"),
        (dict(args={**state["args"], "root": 3}), "not a checkpoint of sinet.py"),
        (dict(history=[3]), "not a checkpoint of sinet.py"),
        (dict(history=[{**state["history"][0], "epoch": 7}]), "not a checkpoint of sinet.py"),
        (dict(history=[{**state["history"][0], "mAP": "x"}]), "not a checkpoint of sinet.py"),
        *((dict(history=[{k: v for k, v in state["history"][0].items() if k != key}]),
           "not a checkpoint of sinet.py") for key in ("epoch", "lr", "loss", "mAP", "rank-1")),
        (dict(progress=3), "not a checkpoint of sinet.py"),
        (dict(progress=(0, {"loss": "x"})), "not a checkpoint of sinet.py"),
        (dict(num_classes=10**12), "not a checkpoint of sinet.py"),
        (dict(num_classes="6"), "not a checkpoint of sinet.py"),
        (dict(model={"neck.weight": 3}), "not a checkpoint of sinet.py"),
        (dict(scheduler={**state["scheduler"], "last_epoch": "1"}), "its scheduler does not fit"),
        (dict(scheduler={**state["scheduler"], "base_lrs": []}), "its scheduler does not fit"),
        (dict(optimizer=groups(state, lr="0.1")), "its optimizer does not fit"),
        (dict(optimizer=moments(state, torch.zeros(7))), "its optimizer does not fit"),
        (dict(optimizer=moments(state, "x")), "its optimizer does not fit"),
    ):
        torch.save({**state, **change}, tmp_path / "odd.pt")
        refuses(("--resume", "odd.pt", "--epochs", 2, "--output", "new"), f"odd.pt: {says}")
        assert not (tmp_path / "executed").exists()
    torch.save({**state, "progress": (100, {"loss": 3.0})}, tmp_path / "odd.pt")
    says = "^odd.pt: was stopped after step 100, but an epoch of .* has 3 steps$"
    with pytest.raises(UserError, match=says):
        small("--resume", "odd.pt", "--epochs", 2, "--output", "new")
    (tmp_path / "elsewhere").mkdir()
    torch.save({**state, "args": {**state["args"], "root": "elsewhere"}}, tmp_path / "odd.pt")
    for flags in (("--evaluate",), ("--epochs", 2)):  # a folder that a file names is left alone
        refuses(("--resume", "odd.pt", *flags), "elsewhere: holds neither a folder synthetic")
    assert not [*(tmp_path / "elsewhere").iterdir()]
    torch.save(
        {k: v for k, v in state.items() if k not in ("optimizer", "random")}, tmp_path / "slim.pt"
    )
    refuses(("--resume", "slim.pt", "--epochs", 2), "slim.pt: holds the network only")
    for content in (b"", (tmp_path / "a/last.pt").read_bytes()[:-100]):
        (tmp_path / "cut.pt").write_bytes(content)
        refuses(("--resume", "cut.pt"), "cut.pt: not a readable checkpoint")
    refuses(("--evaluate", "--resume", "--output", "none"), "none/last.pt: no such file")
    refuses(("--resume", ""), "no such file")
    assert "resuming a/last.pt after epoch 1\n" in small("--epochs", 2, "--resume", "a")


def resumed(path, monkeypatch, *flags):
    """The settings of a run that is resumed with a checkpoint."""
    monkeypatch.setattr(sys, "argv", ["sinet.py", "--resume", str(path), *map(str, flags)])
    return common.parse_args(sinet.RECIPE, sinet.ROWS, sinet.__doc__, "sinet.py",
                             release=sinet.RELEASE)


def test_the_settings_in_a_checkpoint_are_checked_as_the_flags_are(
    small, monkeypatch, tmp_path, capsys
):
    """A forged value ends in one line, or is a value that the flag takes."""
    small("--epochs", 1, "--output", "a")
    state = torch.load(tmp_path / "a/last.pt", weights_only=True)
    state["model"] = {"classifier.weight": torch.zeros(6, 3)}
    torch.save(state, tmp_path / "whole.pt")
    assert resumed("whole.pt", monkeypatch).frames == 4
    values = (None, True, "4", "a", "", "\0", "\ud800", "all", "--help", 0, -1, 10**12, 4.5, -0.5,
              float("nan"), float("inf"), [], [3], (None,), ("s", []), {}, torch.zeros(2), b"4")
    kinds = common.flag_actions(sinet.RECIPE, sinet.ROWS)
    read = [key for key in kinds if key not in common.NOT_RESTORED]
    assert {"frames", "beta", "ids", "seed", "amp", "split", "root", "chunk", "variant"} < {*read}
    taken = 0
    for key in read:
        right = state["args"][key]
        for value in values:
            torch.save({**state, "args": {**state["args"], key: value}}, tmp_path / "odd.pt")
            try:
                args = resumed("odd.pt", monkeypatch)
            except UserError as error:
                text = str(error)
                named = text.startswith(f"{tmp_path}/{value}") and "--root names" in text
                assert named or text.startswith("odd.pt: "), error
                continue
            taken += 1
            if value is None:
                assert key == "init"
            else:
                assert type(value) is type(right) or key in ("init", "positions", "splits"), (
                    key, value)
                assert common.can_be_given(kinds[key], getattr(args, key)), (key, value)
    assert taken > 20
    # what is not a setting, or not read from a file, is left alone
    args = {**state["args"], "output": 3, "resume": [], "chosen": {}, "old": 7, 3: 4}
    torch.save({**state, "args": args}, tmp_path / "odd.pt")
    assert vars(resumed("odd.pt", monkeypatch)).keys() == vars(resumed("whole.pt", monkeypatch)
                                                               ).keys()


def test_forged_settings_are_one_line(small, refuses, tmp_path):
    small("--epochs", 1, "--output", "a")
    state = torch.load(tmp_path / "a/last.pt", weights_only=True)
    for key, value, flag in (
        ("frames", "4", "--frames"), ("frames", None, "--frames"), ("frames", -1, "--frames"),
        ("frames", float("nan"), "--frames"), ("ids", 0, "--ids"), ("seed", "a", "--seed"),
        ("amp", [], "--amp"), ("split", "all", "--split"), ("chunk", "x", "--chunk"),
        ("lr", "fast", "--lr"), ("positions", 3, "--positions"), ("weights", None, "--weights"),
        ("epochs", 0, "--epochs"), ("beta", 0.0, "--beta"), ("small", 1, "--small"),
        ("rerank", "no", "--rerank"), ("checkpoint_every", 0, "--checkpoint-every"),
        ("eval_every", None, "--eval-every"), ("root", "", "--root"),
    ):
        torch.save({**state, "args": {**state["args"], key: value}}, tmp_path / "odd.pt")
        for flags in (("--epochs", 2), ("--evaluate",)):
            refuses(("--resume", "odd.pt", *flags), f"odd.pt: its setting {key} is {value!r}, which"
                    f" {flag} does not take")
        with pytest.raises(UserError, match=f"^odd.pt: its setting {key} is"):
            sinet.load("odd.pt")


@pytest.fixture(scope="module")
def forged_state(trained):
    """What the short training of sinet.py wrote, but for its optimiser."""
    return torch.load(trained[0] / "last.pt", weights_only=True)


def test_settings_that_do_not_go_together_in_a_checkpoint(refuses, forged_state, tmp_path):
    """They are one line also where the network is built from Python, or for --beside."""
    args = {**forged_state["args"], "sbm": True, "frames": 2}
    torch.save({**forged_state, "args": args}, tmp_path / "odd.pt")
    refuses(("--resume", "odd.pt", "--evaluate"), "need at least 4 frames, not 2")
    with pytest.raises(UserError, match="odd.pt: its settings do not go together .*not 2"):
        sinet.load(tmp_path / "odd.pt")


def test_a_checkpoint_of_an_earlier_version_lacks_settings(
    small, refuses, trained, monkeypatch, tmp_path
):
    """They are named, and given as flags or from Python; no default is taken in silence."""
    state = torch.load(trained[0] / "last.pt", weights_only=True)
    for key in ("scale", "epoch"):
        del state["args"][key]
    state["args"]["scaled"] = True  # the earlier name
    torch.save(state, tmp_path / "old.pt")
    says = "old.pt: lacks settings that an earlier version did not have: give them as flags, "
    evaluate = ("--evaluate", "--resume", "old.pt")
    draw = ("--figure", "f", "--resume", "old.pt")
    for flags in (evaluate, draw, ("--resume", "old.pt", "--epochs", 3)):
        refuses(flags, says + "--epoch --scale, with the values of that run")
    refuses((*evaluate, "--scale", "none"), says + "--epoch, with")
    given = ("--scale", "none", "--epoch", "tracklets")
    args = resumed("old.pt", monkeypatch, "--evaluate", *given)
    assert (args.scale, args.epoch, args.beta) == ("none", "tracklets", 5.0)
    args = resumed("old.pt", monkeypatch, "--epochs", 3, *given)
    assert (args.scale, args.epoch) == ("none", "tracklets") and not hasattr(args, "scaled")
    with pytest.raises(UserError, match="old.pt: lacks .* --epoch --scale, .* arguments of load"):
        sinet.load("old.pt")
    model = sinet.load("old.pt", scale="none", epoch="tracklets")
    assert (model.args.scale, model.args.epoch) == ("none", "tracklets")
    with pytest.raises(UserError, match="was trained with --beta 5.0, not --beta 1.0"):
        sinet.load("old.pt", scale="none", epoch="tracklets", beta=1.0)
    with pytest.raises(TypeError, match="settings of the recipe, not scaled"):
        sinet.load("old.pt", scaled=True)


def test_a_part_of_a_run_of_an_earlier_version(small, tmp_path):
    """--split all resumes the runs in the folders of the splits, and takes no default there."""
    test_sets.write_ilids(tmp_path)
    flags = ("--data", "ilids", "--root", tmp_path, "--weights", "none", "--epochs", 1)
    small(*flags, "--split", 0)
    last = tmp_path / "runs/sinet-ilids/split-0/last.pt"
    state = torch.load(last, weights_only=True)
    del state["args"]["scale"]
    torch.save(state, last)
    with pytest.raises(UserError, match="split-0/last.pt: lacks settings .* --scale, "):
        small(*flags, "--split", "all")


def test_the_columns_of_the_log_in_a_checkpoint_are_checked(small, refuses, tmp_path):
    small("--epochs", 2, "--output", "a")
    state = torch.load(tmp_path / "a/last.pt", weights_only=True)
    first, second = state["history"]

    def without(row, *keys):
        return {key: value for key, value in row.items() if key not in keys}

    turned = {"epoch": 2, **dict(reversed(without(second, "epoch").items()))}
    for rows in (
        *([without(first, key), without(second, key)] for key in ("lr", "loss", "mAP", "rank-1")),
        [first, without(second, "xent")],
        [without(first, "xent"), second],
        [first, {**second, "other": 1.0}],
        [first, turned],
        [{**first, 3: 1.0}, {**second, 3: 1.0}],
    ):
        torch.save({**state, "history": rows}, tmp_path / "odd.pt")
        for flags in (("--epochs", 3, "--output", "new"), ("--evaluate",)):
            refuses(("--resume", "odd.pt", *flags), "odd.pt: not a checkpoint of sinet.py")
    torch.save({**state, "progress": (1, {"loss": 1.0, "other": 2.0})}, tmp_path / "odd.pt")
    refuses(("--resume", "odd.pt", "--epochs", 3), "odd.pt: not a checkpoint of sinet.py")
    # columns that only the training itself shows to be others
    rows = [{**without(row, "mAP", "rank-1"), "more": 1.0, "mAP": 50.0, "rank-1": 50.0}
            for row in state["history"]]
    torch.save({**state, "history": rows}, tmp_path / "a/last.pt")
    says = "^a/last.pt: the columns of its log are epoch, .*, but those of this "
    with pytest.raises(UserError, match=says):
        small("--epochs", 3, "--output", "a", "--resume")


def test_a_checkpoint_in_wrappers(small, refuses, tmp_path):
    """--resume and --init take weights with a prefix, and in the usual dictionaries; what does not
    fit is named."""
    small("--epochs", 1, "--output", "a")
    result = small("--evaluate", "--resume", "a").splitlines()[-1].split("(")[0]
    state = torch.load(tmp_path / "a/last.pt", weights_only=True)
    model = state["model"]
    wrapped = {f"module.{name}": value for name, value in model.items()}
    for form in (wrapped, {"state_dict": model}, {"network": wrapped}):
        torch.save({**state, "model": form}, tmp_path / "b.pt")
        again = small("--evaluate", "--resume", "b.pt").splitlines()[-1].split("(")[0]
        assert again == result
    for form in (model, wrapped, {"net": wrapped}, {"model": wrapped}, {"state_dict": model},
                 {"backbone": model, "epoch": 3}):
        torch.save(form, tmp_path / "b.pt")
        out = small("--evaluate", "--init", "b.pt")
        assert result.split(":")[1] in out and "keeps its initialisation: classifier\n" in out
        assert "not used, because the file does not say on which data set it was trained" in out
    refuses(("--resume", "b.pt"), "b.pt: not a checkpoint of sinet.py "
            "(its first entry is 'neck.weight'); weights without settings go to --init")
    torch.save({**state, "model": {**model, "other": model["neck.bias"]}}, tmp_path / "b.pt")
    refuses(("--resume", "b.pt", "--epochs", 2, "--output", "x"),
            "b.pt: its model does not fit (it has 'other', which the network does not have)")
    del model["neck.bias"]
    torch.save({**state, "model": model}, tmp_path / "b.pt")
    refuses(("--resume", "b.pt", "--epochs", 2, "--output", "x"),
            "b.pt: its model does not fit (it lacks 'neck.bias')")
    with pytest.raises(UserError, match="b.pt: holds no streams.spatial.net of a run .its first"):
        common.load_part(tmp_path / "b.pt", "streams.spatial.net.")
    prefix = "module.streams.spatial.net."
    torch.save({"model": {f"{prefix}x": torch.ones(2)}}, tmp_path / "b.pt")
    assert [*common.load_part(tmp_path / "b.pt", "streams.spatial.net.")] == ["x"]
    circle = {}
    circle["model"] = circle
    torch.save(circle, tmp_path / "b.pt")
    for flag in ("--resume", "--init", "--weights"):
        refuses((flag, "b.pt"), "b.pt: ")


HOLD = """
import fcntl, os, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_share_a_folder(small, tmp_path):
    """The second is refused while the first, another process, lives, even if it was killed."""
    (tmp_path / "a").mkdir()
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "a/args.json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert first.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="^a: another run is writing there$"):
        small("--epochs", 1, "--output", "a")
    assert not (tmp_path / "a/last.pt").exists() and not (tmp_path / "a/args.json").read_text()
    first.kill()
    first.communicate()
    small("--epochs", 1, "--output", "a")
    assert (tmp_path / "a/args.json").read_text().startswith('{\n  "')


def test_a_log_alone_is_a_run_that_is_not_overwritten(small, tmp_path):
    """Its last.pt may have been moved away."""
    small("--epochs", 1, "--output", "a")
    (tmp_path / "a/last.pt").unlink()
    log = (tmp_path / "a/log.csv").read_bytes()
    with pytest.raises(UserError, match="^a already holds a run"):
        small("--epochs", 1, "--output", "a")
    assert (tmp_path / "a/log.csv").read_bytes() == log
    assert not (tmp_path / "a/last.pt").exists()


def test_the_folder_of_a_run_is_locked_until_it_ends(small, tmp_path, monkeypatch):
    log = common.Run.log
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    codes = []

    def second(*inputs):
        if not codes:
            command = [sys.executable, "-c", code, tmp_path / "a/args.json"]
            codes.append(subprocess.run(command, capture_output=True).stderr)
        log(*inputs)

    monkeypatch.setattr(common.Run, "log", second)
    small("--epochs", 1, "--output", "a")
    assert b"BlockingIOError" in codes[0]


def test_writing_blames_only_what_it_did(tmp_path):
    """A full disk, as the file or as torch says it; an error from elsewhere stays what it is."""
    with pytest.raises(UserError, match="a: cannot be written .*No space left on device"):
        with replacing(tmp_path / "a"):
            raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match="a: cannot be written .*No space left on device"):
        with replacing(tmp_path / "a"):
            try:
                raise OSError(28, "No space left on device")
            except OSError:
                raise RuntimeError("unexpected pos 704 vs 598")
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        with replacing(tmp_path / "a"):
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    assert not [*tmp_path.iterdir()]


def test_ctrl_c_leaves_no_half_file(tmp_path):
    """Outside of a training the first one ends the program, also while it writes."""
    (tmp_path / "a").write_text("whole")
    with pytest.raises(KeyboardInterrupt):
        with replacing(tmp_path / "a") as file:
            file.write(b"half")
            signal.raise_signal(signal.SIGINT)
    assert [*tmp_path.iterdir()] == [tmp_path / "a"] and (tmp_path / "a").read_text() == "whole"


def test_a_second_ctrl_c_lets_the_checkpoint_be_written(
    small, tmp_path, monkeypatch, signalled, capsys
):
    """Both signals arrive while torch writes the first epoch. It is kept and then printed."""
    save, sent = torch.save, []

    class Interrupted:
        """A file whose first write is interrupted twice."""

        def __init__(self, file):
            self.file = file

        def write(self, content):
            while len(sent) < 2:
                sent.append(signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            return self.file.write(content)

        def flush(self):
            self.file.flush()

    monkeypatch.setattr(torch, "save", lambda state, file: save(state, Interrupted(file)))
    with pytest.raises((common.Stop, KeyboardInterrupt)) as end:
        small("--epochs", 3, "--output", "a")
    out = capsys.readouterr().out
    assert end.value.args == (signal.SIGINT,) and len(sent) == 2
    assert "epoch 1/3: " in out and "epoch 2/3: " not in out
    assert len(torch.load(tmp_path / "a/last.pt", weights_only=True)["history"]) == 1
    assert [row["epoch"] for row in read_log(tmp_path / "a")] == ["1"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["args.json", "last.pt", "log.csv"]
    common._stop_signal = 0
    out = small("--epochs", 2, "--output", "a", "--resume")
    assert "resuming a/last.pt after epoch 1\n" in out


def test_an_epoch_is_printed_as_done_when_it_is_kept(small, tmp_path, monkeypatch, capsys):
    """With --checkpoint-every it is printed when it ends, and the line says that it is not kept."""
    out = small("--epochs", 3, "--checkpoint-every", 2, "--output", "a")
    lines = re.findall(r"^epoch \d/3: .* clips/s\)(.*)$", out, re.M)
    assert lines == [", not yet in last.pt", "", ""]

    def full(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr(common, "save_rows", full)
    with pytest.raises(UserError, match="the disk is full"):
        small("--epochs", 1, "--output", "b")
    assert "epoch 1/1:" not in capsys.readouterr().out


def test_a_schedule_that_goes_on_is_no_reason_to_warn(small, tmp_path, monkeypatch):
    """torch warns where the schedule makes a step and the optimiser has made none."""
    small("--epochs", 1, "--output", "a")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.step")
        assert "epoch 2/2: " in small("--epochs", 2, "--output", "a", "--resume")
    monkeypatch.setattr(common.Run, "batches", lambda *_: [])
    monkeypatch.setattr(common.Run, "test_is_due", lambda *_: False)
    monkeypatch.setattr(common.Run, "finish", lambda *_: None)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        small("--epochs", 1, "--output", "b")


def test_log_has_every_epoch_once(small, tmp_path, monkeypatch):
    """--checkpoint-every 2 --eval-every 3, stopped after 3 and 4 epochs: the rows of the
    uninterrupted run."""
    flags = ("--checkpoint-every", 2, "--eval-every", 3, "--lr-step", 2)
    small(*flags, "--epochs", 7, "--output", "whole")
    small(*flags, "--epochs", 7, "--output", "parts", "--resume")  # nothing there to go on with
    log, folder = (tmp_path / "parts/log.csv").read_bytes(), tmp_path / "parts"
    assert log == (tmp_path / "whole/log.csv").read_bytes() and [
        row["epoch"] for row in read_log(folder)
    ] == list("1234567")
    rates = [5e-4, 5e-4, 5e-5, 5e-5, 5e-6, 5e-6, 5e-7]
    assert [float(row["lr"]) for row in read_log(folder)] == pytest.approx(rates)
    assert [bool(row["mAP"]) for row in read_log(folder)] == [
        False,
        False,
        True,
        False,
        False,
        True,
        True,
    ]
    saves, save_rows = [], common.save_rows

    def dies(rows, path):
        """A kill: after the checkpoint of epoch 4 nothing more is written."""
        saves.append(len(rows))
        if saves[-1] == 4:
            raise UserError("killed")
        save_rows(rows, path)

    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        patch.setattr(common, "save_rows", dies)
        with pytest.raises(UserError, match="killed"):
            small(*flags, "--epochs", 7, "--output", "parts")
    assert saves == [2, 3, 3, 4] and len(read_log(folder)) == 3
    assert "resuming parts/last.pt after epoch 4\n" in small(
        *flags, "--epochs", 7, "--output", "parts", "--resume"
    )
    assert (folder / "log.csv").read_bytes() == log
    (folder / "log.csv").write_text("older")  # a kill between last.pt and log.csv of the last epoch
    small(*flags, "--epochs", 7, "--output", "parts", "--resume")
    assert (folder / "log.csv").read_bytes() == log


def test_the_untrained_network_is_evaluated_on_the_synthetic_set_only(small, tmp_path):
    """Elsewhere with --eval-first; never when a run is resumed."""
    test_sets.write_folder(tmp_path)
    real = ("--data", "folder", "--root", tmp_path, "--weights", "none")
    cases = {"a": (), "b": ("--no-eval-first",), "c": real, "d": (*real, "--eval-first")}
    first = {}
    for folder, flags in cases.items():
        out = small(*flags, "--epochs", 1, "--output", folder)
        assert len(re.findall("^sinet, after epoch 1, all frames", out, re.M)) == 1
        first[folder] = re.findall("^sinet, untrained, all frames", out, re.M) != []
    assert first == {"a": True, "b": False, "c": False, "d": True}
    out = small(*cases["d"], "--epochs", 2, "--output", "c", "--resume")
    assert "untrained" not in out and out.count("all frames:") == 1


def test_the_small_recipe_on_any_data_set(small, refuses, tmp_path):
    """It holds for the whole run, and for its parts; a file of an older run does not say it."""
    test_sets.write_ilids(tmp_path)
    real = ("--data", "ilids", "--root", tmp_path)
    small(*real, "--small", "--epochs", 1, "--output", "a", "--split", 2)
    state = torch.load(tmp_path / "a/last.pt", weights_only=True)
    old = state["args"]
    assert old["small"] and (old["weights"], old["erase"], old["lr"]) == ("none", 0.0, 5e-4)
    assert "after epoch 2" in small("--epochs", 2, "--output", "a", "--resume", *real)
    refuses(("--no-small", "--resume", "a"), "a/last.pt: was trained with --small, not --no-small")
    del old["small"]
    torch.save(state, tmp_path / "a/last.pt")
    for flags in ((), ("--small",), ("--data", "ilids")):
        out = small(*flags, "--root", tmp_path, "--epochs", 2, "--output", "a", "--resume")
        assert "after epoch 2" in out
        torch.save(state, tmp_path / "a/last.pt")
    assert "after epoch 1" in small("--evaluate", *real, "--no-small", "--resume", "a")

    def parts(*flags):
        args = ("m3d.py", "--data", "ilids", *flags)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [*args])
            args = common.parse_args(m3d.RECIPE, m3d.ROWS, m3d.__doc__, "m3d.py")
        part = common.part_of(args, m3d.ROWS, "2d", variant="2d")
        return part.small, part.ids, part.epochs, part.frames, part.weights
    assert parts() == (False, 128, 20, 1, "imagenet")
    assert parts("--small") == (True, 8, 3, 1, "none")
    assert parts("--small", "--ids", "5") == (True, 5, 3, 1, "none")


def test_a_run_starts_from_the_network_of_another(small, refuses, tmp_path):
    """Of the same data set with its classifier, of another one without, and evaluated as it was;
    A resumed run does not read it again."""
    test_sets.write_folder(tmp_path)
    small("--epochs", 1, "--output", "a")
    others = ("--data", "folder", "--root", tmp_path)
    start = ("--init", "a/last.pt", "--epochs", 1, "--lr", 0)
    out = {"same": small(*start, "--output", "same")}
    out["other"] = small(*start, "--output", "other", *others, "--eval-first")
    files = {name: torch.load(tmp_path / name / "last.pt", weights_only=True) for name in out}
    models = {name: file["model"] for name, file in files.items()}
    model = torch.load(tmp_path / "a/last.pt", weights_only=True)["model"]
    for name in ("neck.weight", "classifier.weight"):
        assert torch.equal(models["same"][name], model[name]), name
    assert torch.equal(models["other"]["neck.weight"], model["neck.weight"])
    assert len(models["other"]["classifier.weight"]) == 2 != len(model["classifier.weight"])
    assert files["other"]["args"]["weights"] == "none"  # that of mars ... is not downloaded
    assert "starting from a/last.pt\n" in out["same"] and "not used" not in out["same"]
    assert ("\n  keeps its initialisation: classifier\n"
            "  in the file, but not used: classifier\n") in out["other"]
    assert "the classifier of the file is used, because it was also trained on synth" in out["same"]
    says = "the classifier of the file is not used, because the file was trained on synth"
    assert says in out["other"]
    for name, flags in (("same", ()), ("other", others)):
        (first,) = re.findall("^sinet, from a/last.pt, all frames: (.*) .*s\\)$", out[name], re.M)
        alone = small("--evaluate", *flags, "--init", "a/last.pt", "--output", "none")
        assert f"from a/last.pt, all frames: {first}" in alone and not (tmp_path / "none").exists()
        assert first in small("--evaluate", *flags, "--resume", "a/last.pt")
    again = ("--lr", 0, "--epochs", 2, "--output", "same", "--resume")
    for flags in ((), ("--init", "gone.pt")):
        out = small(*again, *flags)
        assert "after epoch 2" in out and "starting" not in out
    torch.save({}, tmp_path / "empty.pt")
    torch.save({"model": {"neck.weight": torch.zeros(4), "x": 3}}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("text")
    for file, says in (
        ("empty.pt", "holds no network of a run"),
        ("other.pt", "has no weights that fit this network: it has 'x', which the network does "
                     "not have, and it lacks 'neck.bias'$"),
        ("text.pt", "not a readable checkpoint"),
        ("gone.pt", "no such file"),
    ):
        with pytest.raises(UserError, match=f"^{file}: {says}"):
            small("--init", file, "--output", "new")
    assert not (tmp_path / "new").exists()


def test_every_result_says_of_which_network_it_is(small, tmp_path, signalled):
    """Its row, and for how long it was trained; beside it stands what the paper prints."""
    test_sets.write_ilids(tmp_path)
    real = ("--data", "ilids", "--root", tmp_path, "--small")
    paper = "; in the paper: rank-1 92.5\n"
    small(*real, "--epochs", 2, "--output", "a")
    out = small("--evaluate", *real, "--resume", "a")
    (line,) = re.findall("^.*, all frames: .*$", out, re.M)
    assert line.startswith("sinet, after epoch 2, all frames: ")
    assert re.search(f"^sinet on ilids, after epoch 2: mAP .*{paper}", out, re.M)
    assert "untrained" not in out
    out = small("--evaluate", *real, "--init", "a/last.pt", "--output", "new")
    assert re.search(f"^sinet on ilids, from a/last.pt: mAP .*{paper}", out, re.M)
    state = torch.load(tmp_path / "a/last.pt", weights_only=True)
    inside = {**state, "history": [], "progress": (2, {"loss": 1.0})}
    torch.save(inside, tmp_path / "inside.pt")
    out = small("--evaluate", *real, "--resume", "inside.pt")
    assert "\nsinet, after 2 steps of epoch 1, all frames: " in out and "untrained" not in out
    out = small(*real, "--split", "all", "--epochs", 1)
    assert len(re.findall(r"^sinet, split \d: mAP .*\d$", out, re.M)) == 10
    assert re.search(f"^sinet, mean of 10 splits: mAP .*{paper}", out, re.M)


def test_an_untrained_network_is_not_taken_for_the_trained_one_beside_it(small, tmp_path):
    """--evaluate without --resume says what lies where the run would write."""
    small("--epochs", 1, "--output", "b")
    resume = "  b/last.pt holds a trained network: take it with --resume b/last.pt\n"
    out = small("--evaluate", "--output", "b")
    assert "sinet is untrained here, because --resume was not given\n" + resume in out
    assert "\nsinet, untrained, all frames: " in out and "in the paper" not in out
    for flags in (("--resume", "b"), ("--init", "b/last.pt"), ("--resume", "--output", "b")):
        assert "untrained" not in small("--evaluate", *flags)
    (tmp_path / "c").mkdir()
    shutil.move(tmp_path / "b", tmp_path / "c/split-0")
    out = small("--evaluate", "--output", "c")
    assert resume.replace("b/", "c/split-0/") in out
    assert "trained network" not in small("--evaluate", "--output", "none")


def test_a_split_without_its_test_is_not_done(small, tmp_path):
    """It was stopped in the test of its last epoch, which --split all makes up for."""
    test_sets.write_ilids(tmp_path)
    flags = ("--data", "ilids", "--root", tmp_path, "--small", "--epochs", 1, "--split", "all")
    small(*flags)
    last = tmp_path / "runs/sinet-ilids/split-4/last.pt"
    state = torch.load(last, weights_only=True)
    state["history"][0].update({"mAP": "", "rank-1": ""})
    torch.save(state, last)
    out = small(*flags)
    assert out.count("(finished before)") == 9
    assert out.count("sinet, after epoch 1, all frames") == 1
    assert torch.load(last, weights_only=True)["history"][0]["mAP"] != ""


def test_one_clip_of_an_identity_has_no_triplet_loss(small, monkeypatch):
    says = "--clips 1: the triplet loss {} 0, because no batch has two clips of an identity"
    out = small("--epochs", 1, "--clips", 1, "--output", "a")
    assert says.format("and L_mi are") in out and "  triplet 0  mi 0  " in out
    out = small("--epochs", 1, "--clips", 1, "--lambda2", 0, "--output", "b")
    assert says.format("is") in out
    assert "--clips" not in small("--epochs", 1, "--output", "c")
    monkeypatch.setattr(m3d, "losses", cross_entropy)
    flags = ("--epochs", 1, "--clips", 1, "--ids", 6, "--no-in-stages", "--output", "d")
    out = small(*flags, script=m3d)
    assert "--clips" not in out


def test_long_work_says_how_far_it_is(small, small_root, tmp_path, monkeypatch, capsys):
    """Where nobody looks at a terminal: a line a minute, which says how long the rest will take."""
    lines = data.progress(what="work", total=7200, unit=" pieces")
    clock = itertools.count(lines.start + 1)
    monkeypatch.setattr(data, "monotonic", lambda: next(clock))
    with lines as bar:
        for _ in range(150):
            bar.update(2)
    assert capsys.readouterr().out == (
        "work: 120 of 7,200 pieces, 01:00 elapsed, about 59:00 left\n"
        "work: 240 of 7,200 pieces, 02:00 elapsed, about 58:00 left\n"
    )
    # a minute passes between two looks at the clock
    clock = itertools.count(0, 60)
    out = small("--epochs", 1, "--output", "a")
    line = r"^epoch 1/1: (\d+) of 12 clips, 0\d:00 elapsed, about 0\d:00 left$"
    done = re.findall(line, out, re.M)
    assert done == ["4", "8"]
    assert re.search(r"^features: 4 of \d+ clips, 01:00 elapsed, about 0\d:\d\d left$", out, re.M)
    data.check_images(data.load_dataset("synthetic", small_root))
    assert re.search(r"^checking: 2 of \d+ frames, 02:00 elapsed", capsys.readouterr().out, re.M)
    data.draw_synthetic(tmp_path / "set", 2, 2, 2, frames=(1, 1), size=(32, 16))
    assert re.search(r"^drawing: 3 of 9 people, 03:00 elapsed", capsys.readouterr().out, re.M)
    # processes that are not the first say nothing
    for _ in data.progress([1, 2], unit=" pieces", hidden=True):
        pass
    assert capsys.readouterr() == ("", "")


def test_at_a_terminal_long_work_has_a_bar(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(data, "monotonic", itertools.count(0, 60).__next__)
    assert [*data.progress([1, 2], "work", unit=" pieces", mininterval=0)] == [1, 2]
    assert "work: 100%|" in sys.stderr.getvalue() and not capsys.readouterr().out


SYNTHETIC, FOLDER = (dict(data=data, split="0", root="here") for data in ("synthetic", "folder"))
MARS, PRID = dict(data="mars", split="0", root="here"), dict(data="prid", split="3", root="here")


@pytest.mark.parametrize(
    "theirs, ours, why",
    [
        (SYNTHETIC, SYNTHETIC, None),
        (SYNTHETIC, {**SYNTHETIC, "root": os.path.abspath("here")}, None),
        (SYNTHETIC, {**SYNTHETIC, "root": "there"}, "the file was trained on synthetic in /"),
        (SYNTHETIC, FOLDER, "the file was trained on synthetic in /"),
        (FOLDER, {**FOLDER, "root": "there"}, "the file was trained on folder in /"),
        (MARS, {**MARS, "root": "there", "chunk": 5}, None),
        (MARS, {**MARS, "data": "duke"}, "the file was trained on mars, and this run is on duke"),
        (PRID, {**PRID, "root": "there"}, None),
        (PRID, {**PRID, "split": "4"}, "the file was trained on prid, split 3, and this run is on "
                                       "prid, split 4"),
        (None, MARS, "the file does not say on which data set it was trained"),
        ({"data": [3], "root": "\0"}, MARS, "the file was trained on [3], and"),
    ],
)
def test_whose_classifier_is_kept(theirs, ours, why, tmp_path, capsys):
    """Only one of the same identities, although the number of identities is the same."""
    file, model = Colours(6), Colours(6)
    content = {"model": file.state_dict(), "args": theirs}
    torch.save(content if theirs else content["model"], tmp_path / "a.pt")
    common.load_matching_weights(tmp_path / "a.pt", model, None, argparse.Namespace(**ours))
    assert torch.equal(model.neck.running_mean, file.neck.running_mean)
    assert torch.equal(model.classifier.weight, file.classifier.weight) == (why is None)
    out = capsys.readouterr().out
    if why is None:
        assert "  the classifier of the file is used, because it was also trained on" in out
        assert "keeps its initialisation" not in out
    else:
        assert f"  the classifier of the file is not used, because {why}" in out
        assert "  keeps its initialisation: classifier\n" in out


def test_a_run_tells_the_identities_of_another_split_apart(small, tmp_path):
    """Two splits have as many identities."""
    test_sets.write_ilids(tmp_path)
    flags = ("--data", "ilids", "--root", tmp_path, "--weights", "none", "--epochs", 1, "--lr", 0)
    small(*flags, "--split", 1, "--output", "a")
    first = torch.load(tmp_path / "a/last.pt", weights_only=True)["model"]
    for split, kept in ((1, True), (2, False)):
        out = small(*flags, "--split", split, "--init", "a/last.pt", "--output", f"b{split}",
                    "--seed", 7)
        assert f"classifier of the file is {'used' if kept else 'not used'}, because" in out
        model = torch.load(tmp_path / f"b{split}/last.pt", weights_only=True)["model"]
        assert torch.equal(model["neck.weight"], first["neck.weight"])
        assert torch.equal(model["classifier.weight"], first["classifier.weight"]) == kept


def test_export_with_an_evaluation_and_at_the_end_of_a_training(small, refuses, tmp_path):
    """Alone it evaluates; the parts of a run have folders of their own."""
    exported = ["features.npz", "queries.csv"]
    test_sets.write_ilids(tmp_path)
    out = small("--epochs", 2, "--eval-every", 1, "--no-evaluate", "--export", "x", "--output", "a")
    assert out.count("all frames") == 3 and out.count("wrote features.npz") == 1
    assert sorted(file.name for file in (tmp_path / "x").iterdir()) == exported
    whole = (tmp_path / "x/queries.csv").read_text()
    out = small("--export", "y", "--resume", "a")
    assert "epoch 2/2" not in out and (tmp_path / "y/queries.csv").read_text() == whole
    assert "export" not in (tmp_path / "a/log.csv").read_text()
    small("--export", "z", "--resume", "a", "--rerank")
    assert (tmp_path / "z/queries.csv").read_text() != whole
    assert "wrote" not in small("--evaluate", "--resume", "a")
    flags = ("--data", "ilids", "--root", tmp_path, "--weights", "none", "--split", "all")
    refuses((*flags, "--export", "s"), "not for --evaluate, --export, --figure")
    small(*flags, "--epochs", 1, "--no-evaluate", "--export", "s")
    for split in range(10):
        folder = tmp_path / f"s/split-{split}"
        assert sorted(file.name for file in folder.iterdir()) == exported
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="^file/features.npz: cannot be written"):
        small("--export", "file", "--resume", "a")


@pytest.mark.parametrize("script", ["sinet", "m3d", "bicnet_tks", "strf", "tclnet"])
def test_only_a_training_draws(refuses, tmp_path, script, monkeypatch):
    monkeypatch.setattr(data, "draw_synthetic", lambda folder: (_ for _ in ()).throw(
        UserError(f"draws {folder}")))
    script = f"{script}.py"
    for flags in (("--evaluate",), ("--export", "x"), ("--figure", "f")):
        for root in ("nowhere", "."):
            says = f"{tmp_path}{'/nowhere: no such folder' * (root == 'nowhere')}"
            refuses((*flags, "--root", root), says, "only a training run", script=script)
    refuses(("--root", "nowhere"), "draws nowhere/synthetic", script=script)
    refuses(("--root", "nowhere", "--export", "x", "--no-evaluate"), "draws", script=script)
    assert not os.listdir(tmp_path)


FOLDER = ("--data", "folder", "--weights", "none")


def test_to_test_a_folder_needs_no_train(small, tmp_path, monkeypatch):
    """As initialised and with the network of another data set."""
    small("--epochs", 1, "--output", "a")
    folder = test_sets.write_folder(tmp_path / "sets")
    whole = re.search("mAP .*gallery tracklets", small("--evaluate", *FOLDER, "--root", folder))[0]
    shutil.rmtree(folder / "train")
    monkeypatch.setattr(sinet, "picture", lambda *_: ("title", {}))
    for flags in ((), ("--resume", "a")):
        flags = (*FOLDER, "--root", folder, *flags)
        out = small("--evaluate", *flags)
        assert "2 queries" in out and ("--resume" in flags or whole in out)
        small("--export", "x", *flags)
        assert len(np.load(tmp_path / "x/features.npz")["gallery_features"]) == 9
        small("--figure", "f", *flags)
        assert (tmp_path / "f/cmc.png").exists()
        shutil.rmtree(tmp_path / "f")
    with pytest.raises(UserError, match="missing train"):
        small(*FOLDER, "--root", folder, "--output", "b")


@pytest.mark.parametrize("script", [sinet, m3d], ids=["sinet", "m3d"])
def test_without_a_match_the_training_leaves_out_its_test(small, tmp_path, script, monkeypatch):
    settings = common.settings(sinet.RECIPE, sinet.ROWS, "sinet", small=True)
    losses = sinet.losses
    monkeypatch.setattr(script, "losses", lambda outputs, pids, _: losses(outputs, pids, settings))
    monkeypatch.setattr(script, "make_optimizer", sinet.make_optimizer)
    folder = test_sets.write_folder(tmp_path)
    test_sets.rename_gallery(folder)
    flags = (*FOLDER, "--root", tmp_path, "--small")
    often = ("--eval-first", "--eval-every", 1, "--checkpoint-every", 3)
    more = ("--in-stages",) if script is m3d else ()
    out = small(*flags, "--epochs", 2, *often, *more, "--output", "a", script=script)
    assert "epoch 2/2" in out and "all frames" not in out and "mAP" not in out
    says = "no query has a match"
    if script is m3d:  # a line of each of its three parts, of which the last is only a test
        assert out.count("epoch 2/2") == 2 and out.count(says) == 3
        return
    assert out.count(says) == out.count("the training runs without a test") == 1
    assert len(torch.load(tmp_path / "a/last.pt")["history"]) == 2
    assert "epoch 3/3" in small(*flags, "--epochs", 3, "--resume", "a")
    again = small(*flags, "--epochs", 3, "--resume", "a")
    assert "epoch 3/3" not in again and "mAP" not in again

    export = ("--no-evaluate", "--export", "x")  # features there are, at the end
    out = small(*flags, "--epochs", 2, *often, *export, "--output", "b")
    assert "after epoch 2: nothing can be ranked: no query" in out and out.count("wrote") == 1
    for export in ((), ("--rerank",)):
        out = small(*flags, "--export", "y", "--resume", "a", *export)
        assert "give each query tracklet a camera name of its own" in out
        assert ("queries.csv uses the re-ranked distances" in out) == bool(export)
        with open(tmp_path / "y/queries.csv") as file:
            rows = [*csv.DictReader(file)]
        assert len(rows) == 2 and all(row["AP"] == row["rank"] == "" and row["9"] for row in rows)
        assert np.load(tmp_path / "y/features.npz")["query_features"].shape == (2, 3)
    for wants in (("--evaluate",), ("--figure", "f")):
        with pytest.raises(UserError, match=says) as error:
            small(*flags, *wants, "--resume", "a")
        assert "a camera name of its own" in str(error.value)
    assert not (tmp_path / "f").exists()


def test_a_tilde_is_the_home_folder_in_every_flag_that_is_a_path(tmp_path, monkeypatch, refuses):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = {"root", "output", "init", "export", "figure", "beside", "weights"}
    for script in (sinet, m3d):
        more = {"init_2d"} if script is m3d else set()
        for chosen in ((keys | more) - {"figure", "beside"}, {"figure", "beside"}):
            words = [f"{common.as_flag(key)}=~/{key}" for key in chosen]
            if script is m3d:
                words += ["--join", "~/2d.pt", "~/3d.pt"]
            monkeypatch.setattr(sys, "argv", ["x.py", *words])
            args = common.parse_args(script.RECIPE, script.ROWS, script.__doc__, script.__file__)
            assert all(getattr(args, key) == f"{tmp_path}/{key}" for key in chosen)
            if script is m3d:
                assert args.join == (f"{tmp_path}/2d.pt", f"{tmp_path}/3d.pt")
        refuses(("--resume=~/gone.pt",), f"{tmp_path}/gone.pt: no such file",
                script=f"{script.__name__}.py")


def test_tensorboard_gets_the_log(small, tmp_path, monkeypatch):
    """Every number, also of a resumed run what was logged before the flag was given."""
    points, flushed = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert purge_step == 0  # what an earlier file has is hidden
            points.append(str(folder))

        def add_scalar(self, tag, value, step):
            points.append((tag, value, step))

        def flush(self):
            flushed.append(len(points))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)

    def logged():
        rows = read_log(tmp_path / "a")
        return [(key, float(v), int(row["epoch"])) for row in rows for key, v in row.items()
                if v and key != "epoch"]

    flags = ("--eval-every", 2, "--output", "a")
    small(*flags, "--epochs", 3, "--tensorboard")
    assert points[0] == "a" and flushed[-1] == len(points)
    assert sorted({*points[1:]}) == sorted(logged())
    assert {("mAP", 2), ("mAP", 3), ("rank-1", 3), ("loss", 1), ("xent", 1), ("lr", 1)} <= {
        (tag, step) for tag, _, step in points[1:]}
    points.clear()
    small(*flags, "--epochs", 4, "--resume")
    assert not points
    small(*flags, "--epochs", 4, "--resume", "--tensorboard")
    assert sorted({*points[1:]}) == sorted(logged())
    start = common.Run.start

    def second(run, **states):
        with monkeypatch.context() as patch:
            patch.setattr(common, "process_rank", lambda: 1)
            return start(run, **states)

    monkeypatch.setattr(common.Run, "start", second)
    points.clear()
    small("--epochs", 1, "--output", "b", "--tensorboard")
    assert not points


def test_without_tensorboard_a_run_goes_on(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    out = small("--epochs", 1, "--output", "a", "--tensorboard")
    (line,) = [line for line in out.splitlines() if "tensorboard" in line]
    assert line.startswith("--tensorboard: not available (") and "after epoch 1" in out
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["args.json", "last.pt", "log.csv"]


def test_what_is_not_taken_is_named_by_its_parts(tmp_path, capsys):
    def network(**parts):
        parts = {name: torch.nn.Linear(*size) for name, size in parts.items()}
        return torch.nn.ModuleDict({"stem": torch.nn.ModuleDict(parts)})

    theirs = network(a=(2, 3), b=(2, 2), c=(2, 2), **{f"x{i}": (1, 1) for i in range(30)})
    torch.save({"model": theirs.state_dict()}, tmp_path / "a.pt")
    model = network(a=(2, 3), b=(2, 4), d=(2, 2))
    common.load_matching_weights(tmp_path / "a.pt", model)
    assert torch.equal(model["stem"]["a"].weight, theirs["stem"]["a"].weight)
    assert capsys.readouterr().out == (
        f"starting from {tmp_path / 'a.pt'}\n"
        "  keeps its initialisation: stem.b, stem.d\n"
        "  in the file, but not used: "
        f"stem.b, stem.c, {', '.join(f'stem.x{i}' for i in range(14))}, [...]\n"
    )


def test_batches_are_as_the_command_line_says(small, monkeypatch):
    """Frames, size, erasing; the seeds of the draws: --seed, the epoch and the place in it."""
    seen, take = [], TrainClips.__getitem__

    def watched(clips, item):
        seen.append((clips.T, clips.size, clips.erase, *item[1:]))
        return take(clips, item)

    monkeypatch.setattr(TrainClips, "__getitem__", watched)
    small("--epochs", 2, "--output", "a", "--erase", 0.25, "--seed", 5, "--ids", 3)
    places = [(epoch, place) for epoch in (1, 2) for place in range(12)]  # 2 batches of 3 x 2
    assert seen == [(4, (48, 40), 0.25, 5, *place) for place in places]


@pytest.mark.parametrize("amp, dtype", [((), torch.float32), (("--amp",), torch.bfloat16)])
def test_amp_reaches_the_training_and_the_test(small, monkeypatch, amp, dtype):
    seen, forward = set(), Colours.forward

    def watched(model, clips):
        if clips.device.type != "meta":  # where operations are counted
            seen.add((model.training, (clips[0, 0, 0] @ clips[0, 0, 0].T).dtype))
        return forward(model, clips)

    monkeypatch.setattr(Colours, "forward", watched)
    small("--epochs", 1, "--output", "a", *amp)
    assert seen == {(True, dtype), (False, dtype)}


def cross_entropy(outputs, pids, args):
    """M3D's losses for the small network."""
    return {"xent": F.cross_entropy(outputs[1].float(), pids)}


def test_every_test_takes_the_distance_of_the_script(small, monkeypatch):
    seen, blocks = [], common.distance_blocks

    def watched(a, b, metric="cosine", **options):
        seen.append(metric)
        return blocks(a, b, metric, **options)

    monkeypatch.setattr(common, "distance_blocks", watched)
    monkeypatch.setattr(common, "save_sheet", lambda *_, **__: None)
    monkeypatch.setattr(m3d, "losses", cross_entropy)
    monkeypatch.setattr(m3d, "picture", lambda *_: ("title", []))
    start = ("--output", "a", "--no-in-stages", "--ids", 6, "--epochs", 1)
    for flags in (start, ("--evaluate", "--rerank"), ("--figure", "f", "--figure-tracklets", 1)):
        seen.clear()
        small(*flags, script=m3d)
        assert {*seen} == {"euclidean"}, flags


def test_batch_norm_is_synchronised_between_gpus(monkeypatch, tmp_path):
    flags = ("--gpu", "cpu", "--output", tmp_path, *TINY)
    monkeypatch.setattr(sys, "argv", ["sinet.py", *map(str, flags)])
    run = common.Run(common.parse_args(sinet.RECIPE, sinet.ROWS, sinet.__doc__, sinet.__file__))
    for processes_of_it, run.cuda, kind in (
        (1, True, torch.nn.BatchNorm1d),
        (2, False, torch.nn.BatchNorm1d),
        (2, True, torch.nn.SyncBatchNorm),
    ):
        monkeypatch.setattr(common, "world_size", lambda: processes_of_it)
        assert type(run.prepare(Colours(5)).neck) is kind


def test_a_signal_in_the_last_step_of_an_epoch(small, tmp_path, monkeypatch, signalled):
    """An epoch of one step: it ends the run, too."""
    log = common.Run.log

    def killed(*inputs):
        os.kill(os.getpid(), signal.SIGTERM)
        log(*inputs)

    monkeypatch.setattr(common.Run, "log", killed)
    with pytest.raises(common.Stop):
        small("--ids", 6, "--epochs", 3, "--output", "a")
    assert [row["epoch"] for row in read_log(tmp_path / "a")] == ["1"]


def test_a_signal_that_reaches_the_workers(capsys, signalled):
    """As where every process of a job gets it by name."""

    def main():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    common.record_signals()
    with pytest.raises(SystemExit) as end:  # no signal was asked: out of memory
        common.command_line(main)
    err = capsys.readouterr().err
    assert end.value.code == 1 and err.count("\n") == 1
    assert "loader process was killed" in err and "reduce --workers; the same command with" in err
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        common.command_line(main)
    assert (
        end.value.code == 143
        and "stopped by SIGTERM during a step; the same command with --resume continues from the "
        "last checkpoint\n" in capsys.readouterr().err
    )


@pytest.mark.parametrize("stage", ["2d", "temporal", "both"])
def test_a_signal_in_a_stage_of_m3d(stage, small, tmp_path, monkeypatch, signalled):
    """The line says that the same command with --resume continues, and it does."""
    monkeypatch.setattr(m3d, "losses", cross_entropy)
    flags = ("--in-stages", "--ids", 6, "--epochs", 2, "--frames", 2, "--output", "x")
    log, extract, sent = common.Run.log, common.extract, []

    def interrupt(folder):
        if folder == stage and not sent:
            sent.append(folder)
            os.kill(os.getpid(), signal.SIGINT)

    def watched_step(run, parts):
        log(run, parts)
        interrupt(Path(run.args.output).name)

    def watched_test(*inputs, **options):
        logs = [*(tmp_path / "x").glob("*/log.csv")]
        if len(logs) == 2 and all(len(read_log(log.parent)) == 2 for log in logs):
            interrupt("both")
        return extract(*inputs, **options)

    monkeypatch.setattr(common.Run, "log", watched_step)
    monkeypatch.setattr(common, "extract", watched_test)
    with pytest.raises(common.Stop):
        small(*flags, script=m3d)
    common._stop_signal = 0
    out = small(*flags, "--resume", script=m3d)
    assert "\nresuming x/" in out
    assert out.splitlines()[-1].startswith("two-stream, ")
    for folder in ("2d", "temporal"):
        assert [row["epoch"] for row in read_log(tmp_path / "x" / folder)] == ["1", "2"]


class Deadly(torch.utils.data.Dataset):
    """A loader process ends as one does that finds no room in the shared memory."""

    def __len__(self):
        return 1

    def __getitem__(self, item):
        os.kill(os.getpid(), signal.SIGBUS)
        time.sleep(60)


def ended_by(main, capsys):
    """(exit code, line) of a script whose main() is this one."""
    with pytest.raises(SystemExit) as end:
        common.command_line(main)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return end.value.code, err


SHARED_MEMORY = [  # of torch
    "unable to allocate shared memory(shm) for file </torch_7_8_0>: No space left on device (28)",
    "unable to mmap 4096 bytes from file </torch_7_8_0>: Cannot allocate memory (12)",
    "unable to write to file </torch_7_8_0>: No space left on device (28)",
]


def test_no_room_in_the_shared_memory(capsys, signalled):
    """A container has 64 MB of it, unless it was started with more."""
    loader = torch.utils.data.DataLoader(Deadly(), num_workers=1)
    code, err = ended_by(lambda: next(iter(loader)), capsys)
    assert code == 1 and "docker run --shm-size" in err and "reduce --workers" in err
    assert "the same command with --resume continues" in err
    for text in SHARED_MEMORY:
        def main():
            raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\n"
                               f"Original Traceback (most recent call last):\nRuntimeError: {text}")

        assert "docker run --shm-size" in ended_by(main, capsys)[1]


def test_a_mistake_in_a_loader_process_is_not_called_a_lack_of_memory(signalled):
    def main():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\n"
                           "Original Traceback (most recent call last):\nRuntimeError: a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        common.command_line(main)


def test_names_with_control_characters_stay_in_their_line(small, tmp_path, capsys, signalled):
    """A name begins no line and colours no terminal: in an error, from a loader process, too, and
    in a warning."""
    test_sets.write_folder(tmp_path)
    evil = "\x1b[31mred\nsinet.py: all is well\r\u202e.jpg"
    for folder in tmp_path.glob("folder/train/*/*/*"):
        (folder / evil).write_text("no image")
        (folder / evil).with_suffix(".bmp").write_text("left out")
    flags = ("--data", "folder", "--root", tmp_path, "--weights", "none", "--epochs", 1)
    for workers in (0, 1):
        with pytest.raises(UserError) as error:
            small(*flags, "--workers", workers, "--frames", 16, "--output", f"{workers}")
        out, text = capsys.readouterr().out, str(error.value)
        assert text.startswith(f"{tmp_path}/folder/train/") and "unreadable image" in text
        assert r"/\x1b[31mred\nsinet.py: all is well\r\u202e.jpg: " in text
        assert text.isprintable()
        assert "\x1b" not in out and "\nsinet.py" not in out and "red\\nsinet.py" in out
    code, err = ended_by(lambda: data.load_file(evil), capsys)
    assert code == 2 and err[:-1].isprintable() and r"\x1b[31mred\nsinet.py" in err
    assert data.first_line(RuntimeError("\x1b[1mbold\x1b[0m\nmore")) == r"\x1b[1mbold\x1b[0m more"


def test_a_signal_between_two_runs(signalled):
    """--split all: what comes after the last step of a split ends the next one."""
    common.record_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    common.record_signals()
    assert common.stop_signal() == signal.SIGTERM


def test_a_closed_terminal_and_a_second_ctrl_c(signalled):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    common.record_signals()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    common.record_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert common.stop_signal() == signal.SIGHUP
    common._stop_signal = 0
    os.kill(os.getpid(), signal.SIGINT)
    assert common.stop_signal() == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def open_output():
    """The forked process has that of another kind of file."""
    sys.stdout = open(1, "w", closefd=False)


def test_output_that_is_read_no_more(tmp_path):
    """--complexity | head"""
    script = "import common\ncommon.command_line(lambda: [print(i) for i in range(10 ** 6)])"
    (tmp_path / "long.py").write_text(script)
    os.mkfifo(tmp_path / "pipe")
    files = tmp_path / "pipe", tmp_path / "err"
    process = Forked([tmp_path / "long.py"], tmp_path, *files, before=open_output)
    with open(tmp_path / "pipe") as pipe:
        assert pipe.readline() == "0\n"
    assert process.wait(60) == 141
    err = (tmp_path / "err").read_text()
    assert err == "long.py: stopped, because its output pipe was closed\n"


def test_names_that_are_no_text(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    common.command_line(lambda: print(os.fsdecode(b"caf\xe9")))
    assert out.buffer.getvalue() == b"caf\\udce9\n"


def test_systems_without_process_groups(monkeypatch):
    monkeypatch.delattr(os, "setpgrp")
    common.ignore_terminal_signals(0)


def test_amp_on_a_gpu_without_bfloat16(monkeypatch, capsys):
    monkeypatch.setattr(common, "pick_device", lambda gpu: torch.device("cuda:0"))
    monkeypatch.setattr(sys, "argv", ["sinet.py", "--amp"])
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)
        common.Run(common.parse_args(sinet.RECIPE, sinet.ROWS, sinet.__doc__, "sinet.py"))
        assert ("--amp: this GPU does not support bfloat16" in capsys.readouterr().out) != supported


@pytest.mark.parametrize(
    "rank, local, order", [(4, "0", "block barrier"), (1, "1", "barrier block")]
)
def test_the_first_process_of_each_machine_goes_first(rank, local, order, monkeypatch):
    calls = []
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(common, "world_size", lambda: 8)
    monkeypatch.setattr(common, "process_rank", lambda: rank)
    monkeypatch.setattr(common.dist, "barrier", lambda: calls.append("barrier"))
    run = object.__new__(common.Run)
    run.args = argparse.Namespace(weights="none", resume=None)
    with run.setting_up():
        calls.append("block")
    assert calls == order.split()


def test_a_loss_that_is_not_finite(small, tmp_path, monkeypatch):
    losses, calls = sinet.losses, []

    def third_is_infinite(*inputs):
        parts = losses(*inputs)
        calls.append(parts)
        return {**parts, "xent": parts["xent"] * (float("inf") if len(calls) == 3 else 1)}

    monkeypatch.setattr(sinet, "losses", third_is_infinite)
    with pytest.raises(
        UserError,
        match=r"^epoch 1, step 3: the loss is not finite \(loss inf, xent inf, triplet .*, "
        r"mi .*\); "
        "the last checkpoint, if there is one, is not affected; try a smaller --lr$",
    ):
        small("--epochs", 1, "--output", "a")
    small("--epochs", 1, "--output", "b")
    state = torch.load(tmp_path / "b/last.pt", weights_only=True)
    state["model"]["classifier.weight"][0] = float("nan")
    torch.save(state, tmp_path / "b/last.pt")
    with pytest.raises(
        UserError,
        match="epoch 2, step 1: the loss is not finite .* the last checkpoint, if there",
    ):
        small("--epochs", 2, "--output", "b", "--resume")


def test_weights_that_are_not_finite_are_not_saved(small, tmp_path, monkeypatch):
    """The last step of an epoch may spoil the weights after its finite loss."""
    small("--epochs", 1, "--output", "a")
    before = (tmp_path / "a/last.pt").read_bytes()
    log = common.Run.log

    def spoiled(run, parts):
        log(run, parts)
        if run.steps == 3:
            run.states["model"].classifier.weight.data[0] = float("inf")

    monkeypatch.setattr(common.Run, "log", spoiled)
    with pytest.raises(
        UserError, match="epoch 2: the weights are not finite; the last checkpoint, if there"
    ):
        small("--epochs", 2, "--output", "a", "--resume")
    assert (tmp_path / "a/last.pt").read_bytes() == before


def test_read_only_output(small, tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(data, "open", refuse, raising=False)  # root may write everywhere
    with pytest.raises(
        UserError, match=r"^run/args.json: cannot be written \(.*Permission denied.*\)$"
    ):
        small("--output", "run")


def test_random_states_go_on():
    states = common.RandomStates().state_dict()
    first = torch.rand(3)
    assert not torch.equal(torch.rand(3), first)
    common.RandomStates().load_state_dict(states)
    assert torch.equal(torch.rand(3), first)


def test_a_flipped_bit_is_named(small, refuses, tmp_path):
    """--resume, --weights and the cached file of --weights imagenet: the entry whose checksum does
    not fit; a file without checksums, of an old torch, is read."""
    small("--epochs", 1, "--output", "a")
    whole = (tmp_path / "a/last.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "a/last.pt") as file:
        entries = file.infolist()
    rng = random.Random(0)
    for n in range(20):
        damaged = bytearray(whole)
        entry = rng.choice([e for e in entries if e.file_size > 8])
        # the data of an entry: behind its header, 30 bytes, the name and the padding
        name, extra = struct.unpack(
            "<HH", whole[entry.header_offset + 26 : entry.header_offset + 30]
        )
        place = entry.header_offset + 30 + name + extra + rng.randrange(entry.file_size)
        damaged[place] ^= 1 << rng.randrange(8)
        (tmp_path / "bad.pt").write_bytes(damaged)
        says = f"bad.pt: damaged file, the checksum of its entry {entry.filename} is wrong"
        refuses(("--resume", "bad.pt", "--evaluate"), says)
        if n < 3:
            refuses(("--resume", "bad.pt", "--epochs", 2), says)
            refuses(("--weights", "bad.pt"), says)
    page = bytearray(whole)
    page[len(page) // 2 : len(page) // 2 + 4096] = bytes(4096)
    (tmp_path / "bad.pt").write_bytes(page)
    refuses(("--resume", "bad.pt", "--evaluate"), "bad.pt: ")
    torch.save({"a": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert common.load_file(tmp_path / "old.pt") == {"a": 1}


def test_compile_trains_and_falls_back(small, monkeypatch):
    """torch cannot compile on every machine (no compiler, or a CPU capability set from outside):
    the run then says so and trains all the same."""
    try:
        torch.compile(lambda x: x.cos() + 2)(torch.zeros(8))
        compiles = True
    except Exception:  # of many kinds
        compiles = False
    out = small("--compile", "--epochs", 1, "--output", "a")
    assert ("continues without it" in out) != compiles
    assert re.search("^sinet, after epoch 1, .*mAP", out, re.M)

    def no_compiler(function):
        raise RuntimeError("no C++ compiler\nat all")

    monkeypatch.setattr(torch, "compile", no_compiler)
    out = small("--compile", "--epochs", 1, "--output", "b")
    assert "--compile: failed (no C++ compiler at all); the run continues without it\n" in out
    assert re.search("^sinet, after epoch 1, .*mAP", out, re.M)


# -------------------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def several(small_root, tmp_path_factory):
    """What tests/processes.py writes with 2 and 3 processes, and with this one alone."""
    folder = tmp_path_factory.mktemp("processes")
    found = {1: processes.evaluation(small_root)}
    for count in (2, 3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free.getsockname()[1]),
            }  # what torchrun sets
        started = [
            Forked(
                ("tests/processes.py", small_root, folder / f"{count}.pt"),
                folder,
                folder / f"out{i}",
                folder / f"out{i}",
                {**group, "RANK": str(i), "LOCAL_RANK": str(i)},
            )
            for i in range(count)
        ]
        assert [p.wait(240) for p in started] == [0] * count, "".join(
            (folder / f"out{i}").read_text() for i in range(count)
        )
        found[count] = torch.load(folder / f"{count}.pt", weights_only=True)
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_evaluation_does_not_depend_on_the_processes(several, count):
    """Exactly, although BatchNorm's statistics differed between the processes before."""
    assert several[count]["result"] == several[1]["result"]
    assert torch.equal(several[count]["features"], several[1]["features"])


@pytest.mark.parametrize("script", ["bicnet_tks", "m3d", "sinet", "strf", "tclnet"])
def test_two_processes_have_the_gradient_of_one(several, script):
    gradients = several[2][script]
    for name, (one, two) in gradients.items():
        assert one.any() and (two - one).norm() <= 1e-6 * one.norm(), name


TORCHRUN = (torch.distributed.run.__file__, "--standalone", "--nproc_per_node", "2")


def test_torchrun_trains_prints_once_and_stops_on_a_signal(start, tmp_path):
    process = start("--output", "run", "--gpu", "cpu", "--epochs", 50, launcher=TORCHRUN)
    wait_for(process, tmp_path / "out", "epoch 1/50:")
    process.terminate()
    assert process.wait(90) != 0
    out = (tmp_path / "out").read_text()
    assert (
        out.count("device: cpu (no GPU found), 2 processes")
        == out.count("untrained, all frames")
        == out.count("epoch 1/50:")
        == 1
    )
    assert "sinet.py: stopped by SIGTERM; the same command with --resume continues" in out
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    done = len(state["history"])
    assert done >= 1 and len(read_log(tmp_path / "run")) == done
    process = start(
        "--output", "run", "--resume", "--epochs", done + 1
    )  # a single process may go on
    assert (
        process.wait(120) == 0
        and f"after epoch {done + 1}, all frames:" in (tmp_path / "out").read_text()
    )


def test_a_refused_setting_is_easy_to_find_under_torchrun(start, tmp_path):
    """torchrun prints some fifty lines of its own; it stands before them and ends them."""
    process = start("--gpu", "mps", launcher=TORCHRUN)
    assert process.wait(90) == 1
    lines = (tmp_path / "out").read_text().splitlines()
    said = [number for number, line in enumerate(lines) if "sinet.py: --gpu mps: " in line]
    assert len(said) == 2 and len(lines) > 20
    assert lines[said[0]].startswith("sinet.py: ") and said[0] < 3
    assert said[1] == len(lines) - 2 and not lines[-1].strip("=")


def test_all_processes_refuse_a_setting_but_the_first_says_it(tmp_path, monkeypatch, capsys):
    """The others wait to be ended; when they are not, it was theirs alone, and they say it."""
    waited = []

    def main():
        raise UserError("no")

    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(sys, "argv", ["sinet.py"])
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none/error.json"))
    for process, name in (("0", "sinet.py"), ("1", "sinet.py: process 1")):
        monkeypatch.setenv("LOCAL_RANK", process)
        monkeypatch.setenv("RANK", process)
        assert ended_by(main, capsys) == (2, f"{name}: no\n")
        assert len(waited) == int(process)


@pytest.mark.parametrize("flag", ["--local-rank=0", "--local_rank=0"])
def test_the_launcher_before_torchrun(flag, monkeypatch, capsys):
    """python -m torch.distributed.launch adds a flag to the script's."""
    monkeypatch.setattr(sys, "argv", ["sinet.py", flag, "--data", "mars"])
    code, err = ended_by(sinet.main, capsys)
    assert code == 2 and "torch.distributed.launch adds --local-rank" in err
    assert "use torchrun with the same flags instead" in err


def test_a_killed_process_ends_the_others(start, tmp_path):
    process = start("--output", "run", "--gpu", "cpu", "--epochs", 50, launcher=TORCHRUN)
    wait_for(process, tmp_path / "out", "untrained, all frames")
    workers = [
        int(p)
        for p in subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
    ]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert process.wait(60) == 1
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_does_not_fit_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="--gpu 0: torchrun gives every process a GPU of its own"):
        common.pick_device("0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # every process says it, not only the fourth
    says = "^torchrun needs a GPU for each process, but here are 4 processes and 2 GPUs"
    with pytest.raises(UserError, match=says):
        common.pick_device()
    monkeypatch.delenv("WORLD_SIZE")
    for gpu in ("٣", "-1", "2", "cuda:2"):
        with pytest.raises(UserError, match=f"--gpu {gpu}: there are GPUs 0 to 1"):
            common.pick_device(gpu)


def test_names_of_devices(monkeypatch, capsys):
    """As torch has them; of other kinds than CUDA and CPU there are none."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    names = {None: "cuda:0", "1": "cuda:1", "cuda": "cuda:0", "cuda:1": "cuda:1", "CPU": "cpu"}
    assert {name: str(common.pick_device(name)) for name in names} == names
    for name in ("mps", "xpu:0", "mps:1", "cuda:", "cuda:x", "auto"):
        says = f"^--gpu {name}: there are GPUs 0 to 1; .*of a CUDA GPU"
        with pytest.raises(UserError, match=says):
            common.pick_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("cuda", "cuda:0", "0"):
        with pytest.raises(UserError, match=f"^--gpu {name}: no GPU was found"):
            common.pick_device(name)
