"""Runs that are continued, started from other networks, tested and exported, and the checks of
checkpoints."""

import argparse
import csv
import os
import random
import re
import shutil
import struct
import sys
import types
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.run

import numpy as np
import common
import data
import m3d
import sinet
import test_sets
from conftest import Colours, cross_entropy, read_log
from data import TrainClips, UserError


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
    refuses(("--resume", "slim.pt", "--epochs", 2), "slim.pt: contains only the network")
    for content in (b"", (tmp_path / "a/last.pt").read_bytes()[:-100]):
        (tmp_path / "cut.pt").write_bytes(content)
        refuses(("--resume", "cut.pt"), "cut.pt: not a readable checkpoint")
    refuses(("--evaluate", "--resume", "--output", "none"), "none/last.pt: no such file")
    refuses(("--resume", ""), "--resume: the value is empty")
    assert "resuming a/last.pt after epoch 1\n" in small("--epochs", 2, "--resume", "a")
    with pytest.raises(UserError, match="^a/last.pt: stopped after epoch 2, but --epochs says 1"):
        small("--epochs", 1, "--resume", "a")


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
    _, kinds = common.make_parser(sinet.RECIPE, sinet.ROWS, "")
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
                assert type(value) is type(right) or key in ("init", "sbm_blocks", "sbm_splits"), (
                    key, value)
                assert common.flag_accepts(kinds[key], getattr(args, key)), (key, value)
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
        ("lr", "fast", "--lr"), ("sbm_blocks", 3, "--sbm-blocks"), ("weights", None, "--weights"),
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
    says = "old.pt: was written by an earlier version, without these settings: "
    evaluate = ("--evaluate", "--resume", "old.pt")
    draw = ("--figure", "f", "--resume", "old.pt")
    for flags in (evaluate, draw, ("--resume", "old.pt", "--epochs", 3)):
        refuses(flags, says + "--epoch --scale. Give them as flags, with the values")
    refuses((*evaluate, "--scale", "none"), says + "--epoch. Give")
    given = ("--scale", "none", "--epoch", "tracklets")
    args = resumed("old.pt", monkeypatch, "--evaluate", *given)
    assert (args.scale, args.epoch, args.beta) == ("none", "tracklets", 5.0)
    args = resumed("old.pt", monkeypatch, "--epochs", 3, *given)
    assert (args.scale, args.epoch) == ("none", "tracklets") and not hasattr(args, "scaled")
    with pytest.raises(UserError, match="old.pt: was .* --epoch --scale. .* arguments of load"):
        sinet.load("old.pt")
    model = sinet.load("old.pt", scale="none", epoch="tracklets")
    assert (model.args.scale, model.args.epoch) == ("none", "tracklets")
    with pytest.raises(UserError, match="was trained with --beta 5.0, not with --beta 1.0"):
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
    with pytest.raises(UserError, match="split-0/last.pt: was .* settings: --scale. "):
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
            "(its first entry is 'neck.weight'); to load weights without settings, use --init")
    torch.save({**state, "model": {**model, "other": model["neck.bias"]}}, tmp_path / "b.pt")
    refuses(("--resume", "b.pt", "--epochs", 2, "--output", "x"),
            "b.pt: its model does not fit (it has 'other', which the network does not have)")
    del model["neck.bias"]
    torch.save({**state, "model": model}, tmp_path / "b.pt")
    refuses(("--resume", "b.pt", "--epochs", 2, "--output", "x"),
            "b.pt: its model does not fit (it lacks 'neck.bias')")
    says = "b.pt: contains no weights named streams.spatial.net.. of a run .its first"
    with pytest.raises(UserError, match=says):
        common.load_part(tmp_path / "b.pt", "streams.spatial.net.")
    prefix = "module.streams.spatial.net."
    torch.save({"model": {f"{prefix}x": torch.ones(2)}}, tmp_path / "b.pt")
    assert [*common.load_part(tmp_path / "b.pt", "streams.spatial.net.")] == ["x"]
    circle = {}
    circle["model"] = circle
    torch.save(circle, tmp_path / "b.pt")
    for flag in ("--resume", "--init", "--weights"):
        refuses((flag, "b.pt"), "b.pt: ")


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
    refuses(("--no-small", "--resume", "a"),
            "a/last.pt: was trained with --small, not with --no-small")
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
    os.rename(tmp_path / "a", tmp_path / "moved")
    again = ("--lr", 0, "--epochs", 2, "--output", "same", "--resume")
    for flags in ((), ("--init", "a/last.pt")):
        out = small(*again, *flags)
        assert "after epoch 2" in out and "starting" not in out
    for name, init, says in (
        ("same", "gone.pt", "was trained with --init a/last.pt, not with --init gone.pt"),
        ("moved", "gone.pt", "was trained without --init, not with --init gone.pt"),
    ):
        with pytest.raises(UserError, match=f"^{name}/last.pt: {says}"):
            small("--output", name, "--resume", "--init", init)
    torch.save({}, tmp_path / "empty.pt")
    torch.save({"model": {"neck.weight": torch.zeros(4), "x": 3}}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("text")
    for file, says in (
        ("empty.pt", "contains no weights of a network"),
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
    resume = "  b/last.pt contains a trained network; to evaluate it: --resume b/last.pt\n"
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
    out = small("--no-evaluate", "--export", "w", "--resume", "a")
    assert "epoch 2/2" not in out and (tmp_path / "w/queries.csv").read_text() == whole
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
        for root, says in (("nowhere", f"{tmp_path}/nowhere: no such folder"),
                           (".", f"{tmp_path}")):
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
    more = ("--in-stages", "--no-evaluate") if script is m3d else ()
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
        assert "give each query tracklet a camera name that no other" in out
        assert ("queries.csv uses the re-ranked distances" in out) == bool(export)
        with open(tmp_path / "y/queries.csv") as file:
            rows = [*csv.DictReader(file)]
        assert len(rows) == 2 and all(row["AP"] == row["rank"] == "" and row["9"] for row in rows)
        assert np.load(tmp_path / "y/features.npz")["query_features"].shape == (2, 3)
    for wants in (("--evaluate",), ("--figure", "f")):
        with pytest.raises(UserError, match=says) as error:
            small(*flags, *wants, "--resume", "a")
        assert "a camera name that no other" in str(error.value)
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
    common.load_matching_weights(tmp_path / "a.pt", model, None, argparse.Namespace())
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


def test_amp_on_a_gpu_without_bfloat16(monkeypatch, capsys):
    monkeypatch.setattr(common, "pick_device", lambda gpu: torch.device("cuda:0"))
    monkeypatch.setattr(sys, "argv", ["sinet.py", "--amp"])
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)
        common.Run(common.parse_args(sinet.RECIPE, sinet.ROWS, sinet.__doc__, "sinet.py"))
        assert ("--amp: this GPU does not support bfloat16" in capsys.readouterr().out) != supported


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
        says = f"bad.pt: the file is damaged: the checksum of its entry {entry.filename} is wrong"
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
