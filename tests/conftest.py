"""Shared by the tests: a small synthetic data set and a short training, once each, ways to run a
script, and small helpers."""

import contextlib
import copy
import csv
import gc
import importlib
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from scipy.io import loadmat

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # two take longer for networks and clips as small as here
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that the tests start

import common  # noqa: E402
import sinet  # noqa: E402
from data import UserError, draw_synthetic  # noqa: E402

MARS_INFO = ROOT / "tests/mars_info"  # MARS' public tables (Zheng et al., ECCV 2016)
TINY = ("--height", 48, "--width", 40, "--ids", 2, "--clips", 2)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def maps(T, C, H, W, B=2):
    return torch.randn(B, T, C, H, W, dtype=torch.float64).relu()


def randomize(module):
    """Float64, train mode, every parameter random: no zero-initialised one hides a mistake."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def check_gradients(model, loss):
    """Every parameter gets a finite gradient that is not zero."""
    model.zero_grad()
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def wake(model):
    """Zero-initialised BatchNorm weights to one, so that gradients pass."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.any():
            nn.init.ones_(module.weight)
    return model


def parameters(model):
    """Their number without those of the training heads: neck, classifier, projection."""
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if not name.startswith(("neck", "classifier", "projection"))
    )


def multiply_adds(model, T, height, width):
    """Those of `complexity`, which counts none of BatchNorm: without it, as it is slow on meta."""
    with mock.patch.object(nn.functional, "batch_norm", lambda x, *_, **__: x):
        return common.complexity(model, T, height, width)[1]


def pytest_collection_finish():
    """Lets Python's garbage collector skip what exists before the first test. Otherwise it goes
    through all of torch and thousands of tests again and again."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="SIGKILLs in test_signals.py")
    parser.addoption("--all-rows", action="store_true", help="not the first of a script alone")
    parser.addoption("--gpu-minutes", type=float, default=6, help="for the runs of test_gpu.py")


FAST = ("bicnet_tks", "m3d", "sinet", "strf", "tclnet", "common", "data", "sets")
# of these files: whole networks in every variant, and a data set of a million frames
SLOW = ("test_network", "test_every_", "test_settings_combine", "test_3d_variants", "test_a_large")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "fast: equations, metrics and data loaders; together less than two minutes"
    )


def pytest_collection_modifyitems(items):
    """Marks the tests of the files above as fast, but for the slow ones and for those that run a
    whole script as a process."""
    files = {f"test_{name}.py" for name in FAST}
    for item in items:
        whole = item.name.startswith(SLOW) or {"run", "trained"} & {*item.fixturenames}
        if item.path.name in files and not whole:
            item.add_marker(pytest.mark.fast)


@contextlib.contextmanager
def own_signals():
    """SIGTERM ends pytest as SIGINT does, also one that a main() in the block only noted, which
    leaves its handlers behind."""
    ends = signal.default_int_handler
    before = [signal.signal(number, ends) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(number, handler)
        asked, common._stop_signal = common._stop_signal, 0
    if asked:
        raise KeyboardInterrupt


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """Around a test and its fixtures; no process that it started outlives it."""
    try:
        with own_signals():
            return (yield)
    finally:
        while Forked.started:
            Forked.started.pop().end()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def backbone():
    return torchvision.models.resnet50(zero_init_residual=True)


@pytest.fixture
def one_backbone(backbone, monkeypatch):
    """Every network starts with the same weights: drawing them takes longer than a small clip."""

    def resnet50(**_):
        return copy.deepcopy(backbone).to(torch.get_default_dtype())

    monkeypatch.setattr(torchvision.models, "resnet50", resnet50)


class Colours(torch.nn.Module):
    """A small network in SINet's place."""

    def __init__(self, num_classes):
        super().__init__()
        self.neck, self.classifier = torch.nn.BatchNorm1d(3), torch.nn.Linear(3, num_classes)

    def forward(self, clips):
        frames = clips.mean((3, 4))
        embedding = self.neck(frames.mean(1))
        return (embedding, self.classifier(embedding), frames) if self.training else embedding


def write_mars_index(folder):
    """MARS' info folder: its real tables, and name lists that are made after them."""
    info = folder / "info"
    info.mkdir(parents=True)
    for table in MARS_INFO.glob("*.mat"):
        shutil.copy(table, info)
    for part in ("train", "test"):
        rows = loadmat(info / f"tracks_{part}_info.mat")[f"track_{part}_info"]
        number = {}
        names = []
        for first, last, pid, cam in rows.tolist():
            assert first == len(names) + 1
            number[pid, cam] = number.get((pid, cam), 0) + 1
            start = f"{pid:0>4}C{cam}T{number[pid, cam]:04}"
            names += [f"{start}F{frame:03}.jpg" for frame in range(1, last - first + 2)]
        (info / f"{part}_name.txt").write_text("\n".join(names) + "\n")


def read_log(folder):
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def small_root(tmp_path_factory):
    """A --root whose synthetic/ has 6 + 4 identities under 2 cameras."""
    root = tmp_path_factory.mktemp("root")
    draw_synthetic(
        root / "synthetic", identities=6, test_identities=4, cameras=2, frames=(3, 6), size=(64, 32)
    )
    return root


def child(command, folder, env, out, err, before):
    """What a `Forked` process does: the script as __main__, with its own folder, environment and
    output."""
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(folder)
    os.environ.update(env)
    before()
    os.fsync = lambda file: None  # waiting for the disk is not what is tested
    multiprocessing.set_start_method(
        None, force=True
    )  # the loader's workers start as in a fresh interpreter
    sys.argv, sys.path[0] = command, str(ROOT)
    runpy.run_path(command[0], run_name="__main__")


def kill_tree(pid):
    """SIGKILL to a process and those below it, which may have groups and sessions of their own."""
    below = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in below.split():
        kill_tree(int(child))


class Forked:
    """A script run by a process that is forked from one that has imported torch; like Popen.

    before: called by the process first; a function of a module.
    """

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "common"])
    started = []

    def __init__(self, command, folder, out, err, env=None, before=int):
        command = [str(ROOT / command[0]), *map(str, command[1:])]
        self.process = self.context.Process(
            target=child,
            args=(command, folder, {"CUDA_VISIBLE_DEVICES": "", **(env or {})}, out, err, before),
        )
        self.process.start()
        self.started.append(self)
        self.pid, self.kill, self.terminate = (
            self.process.pid,
            self.process.kill,
            self.process.terminate,
        )

    def poll(self):
        return self.process.exitcode

    def end(self):
        if self.poll() is None:
            kill_tree(self.pid)
            self.process.join()

    def wait(self, seconds=None):
        self.process.join(seconds)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("the script", seconds)
        return self.poll()


@pytest.fixture
def run(tmp_path):
    """run(script, *arguments) -> CompletedProcess, in an empty folder."""

    def start(*command, env=None):
        with tempfile.TemporaryDirectory() as files:
            out, err = Path(files, "out"), Path(files, "err")
            code = Forked(command, tmp_path, out, err, env).wait(240)
            return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())

    yield start
    drop_weights(tmp_path)


def drop_weights(folder):
    """pytest keeps the folders of its tests: without the gigabytes."""
    for path in folder.rglob("last.pt"):
        path.unlink()


@pytest.fixture(scope="session")
def trained(small_root, tmp_path_factory):
    """Two epochs of the baseline on the small set: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    command = [
        sys.executable,
        ROOT / "sinet.py",
        "--root",
        small_root,
        "--variant",
        "base",
        "--epoch",
        "tracklets",
        "--epochs",
        "2",
        *map(str, TINY),
        "--output",
        folder / "run",
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


@pytest.fixture
def refuses(tmp_path, monkeypatch):
    """The same without a process: refuses(arguments, texts...) runs main() and reads the UserError
    that becomes the line."""

    def call(arguments, *says, script="sinet.py"):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        with pytest.raises(UserError) as error:
            importlib.import_module(Path(script).stem).main()
        assert "\n" not in str(error.value)
        for text in says:
            assert text in str(error.value)

    return call


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


def wait_for(process, file, text, seconds=120):
    end = time.time() + seconds
    while text not in file.read_text():
        assert process.poll() is None and time.time() < end, file.read_text()
        time.sleep(0.05)


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


def cross_entropy(outputs, pids, args):
    """M3D's losses for the small network."""
    return {"xent": F.cross_entropy(outputs[1].float(), pids)}


def ended_by(main, capsys):
    """(exit code, line) of a script whose main() is this one."""
    with pytest.raises(SystemExit) as end:
        common.command_line(main)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return end.value.code, err
