"""Long runs survive: kills, signals, full disks, another run in the folder, closed terminals."""

import io
import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.run

import common
import data
import m3d
import test_sets
from conftest import Forked, cross_entropy, ended_by, read_log, wait_for
from data import UserError, replacing


def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**8, 10**8))


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


@pytest.fixture
def signals_itself(monkeypatch, signalled):
    """A run gets SIGTERM in its first step."""
    log = common.Run.log

    def killed(*inputs):
        os.kill(os.getpid(), signal.SIGTERM)
        log(*inputs)

    monkeypatch.setattr(common.Run, "log", killed)


def test_a_signal_in_the_last_step_of_an_epoch(small, tmp_path, signals_itself):
    """An epoch of one step: it ends the run, too."""
    with pytest.raises(common.Stop):
        small("--ids", 6, "--epochs", 3, "--output", "a")
    assert [row["epoch"] for row in read_log(tmp_path / "a")] == ["1"]


def test_a_signal_in_the_first_epoch_if_every_epoch_is_tested(small, tmp_path, signals_itself):
    """There is no epoch yet of which one could ask whether it was tested."""
    with pytest.raises(common.Stop):
        small("--epochs", 3, "--eval-every", 1, "--output", "a")
    state = torch.load(tmp_path / "a/last.pt", weights_only=True)
    assert state["history"] == [] and state["progress"][0] == 1


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


def test_read_only_output(small, tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(data, "open", refuse, raising=False)  # root may write everywhere
    with pytest.raises(
        UserError, match=r"^run/args.json: cannot be written \(.*Permission denied.*\)$"
    ):
        small("--output", "run")
