"""Several processes, on one machine or under torchrun, and the devices that they take."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed.run

import common
import processes
import sinet
from conftest import Colours, Forked, TINY, ended_by, read_log, wait_for
from data import UserError


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
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
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
