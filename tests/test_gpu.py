"""The GPU: what can be checked without one, and what needs one.

pytest tests/test_gpu.py               # the first thing to run on a machine with a GPU
pytest tests/test_gpu.py --all-rows    # on tensors that claim to be on one every row, not five

With a GPU and 16 CPU cores the first is meant to take less than eight minutes. It ends with a table
in Markdown, which can go into the README as it is. The commands that it starts as a user does run
at the same time and together get six minutes; on a machine with fewer cores --gpu-minutes gives
them more.
"""

import concurrent.futures
import contextlib
import copy
import functools
import importlib
import io
import os
import re
import subprocess
import sys
import time
import types

import pytest
import torch
import torch.nn as nn
import tqdm
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import common
import data
import sinet
from conftest import ROOT, TINY, drop_weights, read_log, wake

SCRIPTS = ("bicnet_tks", "m3d", "sinet", "strf", "tclnet")
SIZES = {  # small ones: frames, height, width
    "bicnet_tks": (4, 64, 32),
    "m3d": (4, 64, 32),
    "sinet": (4, 64, 48),
    "strf": (4, 64, 32),
    "tclnet": (4, 64, 32),
}
# tensors that claim to be on a GPU need none since torch 2.8 or so; before, meta takes its place
FAKE = torch.cuda.is_available() or hasattr(torch._C, "_ensureCUDADeviceGuardSet")
DEVICE = torch.device("cuda:0" if FAKE else "meta")


# -------------------------------------------------------------------- every row at its full size


class Watch(TorchDispatchMode):
    """No tensor comes up on another device than DEVICE, but for single numbers; and none is made of
    Python's numbers, as `torch.tensor` does, because a GPU would have to wait for the copy."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        assert function is not torch.ops.aten.lift_fresh.default, "torch.tensor(numbers)"
        for x in tensors(out):
            assert x.device == DEVICE or x.dim() == 0, f"{function} gives one on {x.device}"
            self.dtypes.add(x.dtype)
        return out


def tensors(x):
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (list, tuple, dict)):
        for part in x.values() if isinstance(x, dict) else x:
            yield from tensors(part)


@pytest.fixture(scope="module")
def fake():
    """A fake tensor has a shape, a type and a device, but no memory. What asks such a tensor for
    its numbers, as `.item()` and `x[x > 0]` do, is an error: on a GPU it would wait."""
    return FakeTensorMode() if FAKE else contextlib.nullcontext()


def on_device(model):
    """Parameters and buffers become others of the same shapes on DEVICE."""
    twins = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, x in own.items():
                if x is not None and id(x) not in twins:
                    twin = torch.empty(x.shape, dtype=x.dtype, device=DEVICE)
                    twins[id(x)] = nn.Parameter(twin) if isinstance(x, nn.Parameter) else twin
                own[name] = x if x is None else twins[id(x)]
    return model


@contextlib.contextmanager
def autocast(enabled):
    """torch.autocast("cuda") without a GPU turns itself off."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all-rows")
        rows = []
        for script in SCRIPTS:
            names = importlib.import_module(script).ROWS
            own = [name for name, row in names.items() if not row.same]
            rows += [(script, name) for name in (own if every else own[:1])]
        metafunc.parametrize("script, row", rows, ids=["-".join(names) for names in rows])


@pytest.mark.parametrize("amp", [False, pytest.param(True, marks=pytest.mark.skipif(
    not FAKE, reason="no fake tensors on a GPU that is not there in this torch"))])
def test_all_of_a_row_is_on_the_gpu(script, row, amp, fake):
    """At the recipe's full size, in training and in evaluation, with the losses."""
    script = importlib.import_module(script)
    args = common.settings(script.RECIPE, script.ROWS, row, weights="none")
    with torch.device("meta"):
        model = script.build(args, 625)
    with fake, Watch() as watch:
        on_device(model)
        shape = 4, args.frames, 3, args.height, args.width
        clips = data.normalize(torch.empty(shape, dtype=torch.uint8, device=DEVICE))
        pids = torch.empty(4, dtype=torch.long, device=DEVICE)
        with autocast(amp):
            outputs = model.train()(clips)
        parts = script.losses(outputs, pids, args)
        with autocast(amp), torch.no_grad():
            embeddings = model.eval()(clips)
        assert all(x.device == DEVICE for x in tensors([outputs, parts, embeddings]))
        assert {(part.dtype, part.dim()) for part in parts.values()} == {(torch.float32, 0)}
        assert embeddings.shape[0] == 4 and (torch.bfloat16 in watch.dtypes) == amp


@pytest.mark.parametrize(
    "script, layer",
    [("m3d", "M3DLayer"), ("m3d", "InflatedConv"), ("m3d", "P3DConv"), ("strf", "InflatedConv")]
    + [("strf", "P3DConv"), ("tclnet", "TemporalConv")],
)
def test_a_layer_is_where_the_convolution_is_that_it_replaces(script, layer):
    layer = getattr(importlib.import_module(script), layer)
    if layer.__name__ == "P3DConv":
        options = [{"kind": "a"}, {"kind": "b"}, {"kind": "c"}]
    elif layer.__name__ == "M3DLayer":
        options = [{"per_tap": False}, {"per_tap": True}]
    else:
        options = [{}]
    for option in options:
        conv = nn.Conv2d(8, 8, 1, bias=False, device="meta", dtype=torch.float64)
        for p in layer(conv, 4, **option).parameters():
            assert p.device.type == "meta" and p.dtype == torch.float64


def test_clips_are_normalised_where_they_are():
    clips = torch.empty(2, 4, 3, 8, 8, dtype=torch.uint8, device="meta")
    assert data.normalize(clips).device.type == "meta"


def test_the_losses_of_sinets_release_need_no_numbers(fake):
    """They are multiplied by the number of identities, which the GPU counts."""
    args = common.settings(sinet.RECIPE, sinet.ROWS, "sinet", weights="none", release=True)
    with fake, Watch():
        outputs = [torch.empty(shape, device=DEVICE) for shape in ((6, 8), (6, 5), (6, 4, 8))]
        parts = sinet.losses(outputs, torch.empty(6, dtype=torch.long, device=DEVICE), args)
        assert {part.device for part in parts.values()} == {DEVICE}


# --------------------------------------------------------------------------- the GPU of --gpu


def test_the_gpu_is_chosen_before_anything_else_asks_for_one(monkeypatch):
    """What asks for "the" GPU otherwise gets the first: a question about bfloat16, and NCCL."""
    calls = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("set_device", "get_device_name", "is_bf16_supported"):
        monkeypatch.setattr(torch.cuda, name, lambda *of, name=name, **_: calls.append((name, *of)))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *of, **_: calls.append(of)
    )
    monkeypatch.setattr(sys, "argv", ["sinet.py", "--gpu", "1", "--amp", *map(str, TINY)])
    args = common.parse_args(sinet.RECIPE, sinet.ROWS, sinet.__doc__, sinet.__file__)
    common.Run(args)
    second = torch.device("cuda:1")
    chosen = [("set_device", second), ("get_device_name", second)]
    assert calls == [*chosen, ("is_bf16_supported",)]
    calls.clear()
    for name, value in (("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2), ("LOCAL_RANK", 1)):
        monkeypatch.setenv(name, str(value))
    assert common.pick_device() == second
    assert calls == [chosen[0], ("nccl",), chosen[1]]


class Loaded(Exception):
    """A DataLoader would now start to pin memory."""


@pytest.mark.skipif(not FAKE, reason="no fake tensors on a GPU that is not there in this torch")
def test_features_are_pinned_for_the_networks_gpu(monkeypatch):
    """Also from Python, where nobody has chosen a GPU before."""
    entered = []

    @contextlib.contextmanager
    def device(chosen):
        entered.append(chosen)
        yield
        entered.pop()

    class Loader:
        def __init__(self, *_, **options):
            assert options["pin_memory"]

        def __iter__(self):
            assert entered == [torch.device("cuda:1")]
            raise Loaded

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    with FakeTensorMode():
        model = nn.Linear(1, 1, device="cuda:1")
        with pytest.raises(Loaded):
            common.extract(
                model, [["one.jpg"]], split_clips=sinet.SPLIT, clip_length=4, size=(8, 4)
            )


# ------------------------------------------------------------------------- the loop, without a GPU


class OnGpu(torch.Tensor):
    """What is computed from it is an OnGpu, too; its numbers are read in the steps `read`."""

    read, step = [], 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        readers = ("__float__", "__int__", "__bool__", "__index__", "item", "tolist", "cpu")
        if function.__name__ in readers:
            cls.read.append(cls.step)
        return super().__torch_function__(function, types, args, kwargs or {})


class Batches(list):
    """In the place of a DataLoader and of its sampler."""

    def __init__(self, count):
        super().__init__([[torch.zeros(1)]] * count)
        self.batch_sampler = self

    def set_epoch(self, *_):
        pass


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """steps(cuda, kind, batches) -> a Run, after so many steps with losses of this kind."""
    monkeypatch.setattr(common, "_stop_signal", 0)
    monkeypatch.setattr(OnGpu, "read", [])
    flags = ("--gpu", "cpu", "--epochs", 2, "--checkpoint-every", 2, "--output", tmp_path, *TINY)
    monkeypatch.setattr(sys, "argv", ["sinet.py", *map(str, flags)])
    numbers = torch.rand(100, 2, generator=torch.Generator().manual_seed(0)).tolist()

    def call(cuda, kind=torch.Tensor, batches=23, each=lambda step: None):
        args = common.parse_args(sinet.RECIPE, sinet.ROWS, sinet.__doc__, sinet.__file__)
        run = common.Run(args)
        run.cuda = cuda
        run.states = {"optimizer": types.SimpleNamespace(param_groups=[{"lr": 0.1}])}
        for _ in run.batches(Batches(batches), 1):
            OnGpu.step = run.steps + 1
            parts = [torch.tensor(x, requires_grad=True) * 3 for x in numbers[run.steps]]
            run.log({name: x.as_subclass(kind) for name, x in zip(("xent", "triplet"), parts)})
            each(run.steps)
        return run

    return call


def test_losses_are_read_every_ten_steps(steps):
    """As sums in float64, so that they are those of Python's floats."""
    steps(False, OnGpu)
    assert {*OnGpu.read} == {*range(1, 24)}
    OnGpu.read.clear()
    run = steps(True, OnGpu)
    assert {*OnGpu.read} == {10, 20, 23} and run.loss_sums == {}
    sums, totals = {"loss": 0.0, "xent": 0.0, "triplet": 0.0}, {}

    def python(step):
        numbers = torch.rand(100, 2, generator=torch.Generator().manual_seed(0))[step - 1] * 3
        xent, triplet = numbers.tolist()
        for name, x in zip(sums, (xent + triplet, xent, triplet)):
            sums[name] += x
        if step == 22:
            common._stop_signal = 15

    with pytest.raises(common.Stop), pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "save", lambda run: totals.update(run.loss_sums))
        steps(True, OnGpu, each=python)
    assert totals == sums and {type(x) for x in totals.values()} == {float}


def test_a_signal_is_noticed_in_its_step_but_that_of_others_when_losses_are_read(steps):
    def fourth(step):
        if step == 4:
            common._stop_signal = 15

    with pytest.MonkeyPatch.context() as patch:
        saved, asked = [], []
        patch.setattr(common.Run, "save", lambda run: saved.append(run.steps))
        with pytest.raises(common.Stop):
            steps(True, each=fourth)
        common._stop_signal = 0
        patch.setattr(common, "world_size", lambda: 2)
        patch.setattr(common, "stop_signal",
                      lambda: asked.append(OnGpu.step) or common._stop_signal)
        with pytest.raises(common.Stop):
            steps(True, each=fourth)
    assert saved == [4, 10] and asked == [10, 10]


def test_a_loss_that_is_not_finite_is_found_when_it_is_read(steps):
    def spoil(step):
        if step == 13:
            run[0].loss_sums["loss"] *= float("nan")

    run, batches = [], common.Run.batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "batches", lambda own, *x: run.append(own) or batches(own, *x))
        with pytest.raises(common.UserError, match="step 20: the loss is not finite"):
            steps(True, each=spoil)


def test_the_bar_fits_a_terminal_of_80_columns(steps, monkeypatch):
    """Epoch, bar, time left, clips a second and loss, nothing else."""
    shown = io.StringIO()

    def bar(*inputs, **options):
        return tqdm.tqdm(*inputs, **options, ncols=80, mininterval=0)

    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(shown, "isatty", lambda: True)
    monkeypatch.setattr(data, "tqdm", bar)
    steps(False)
    lines = [line for line in re.split("[\r\n]", shown.getvalue()) if line.strip()]
    assert len(lines) >= 23 and max(map(len, lines)) <= 80
    for line in lines[2:]:
        assert re.fullmatch(
            r"epoch 1/2 \|.{20,}\| \d\d:\d\d left, +[\d.]+ clips/s, loss=[\d.]+ *", line
        ), line


# ----------------------------------------------------------------------------------- with a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
needs_two = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs 2 GPUs, here are {torch.cuda.device_count()}"
)


COLUMNS = (  # of the table, after the script's name
    "embeddings, float32",
    "gradient, float32",
    "embeddings, float64",
    "gradient, float64",
    "clips/s with --amp --compile",
    "goes on between GPU and CPU",
)


class Table:
    """What the tests find on a GPU; pytest prints it at its end.

    cells: {script: {column: text}}.
    """

    def __init__(self, gpu):
        self.gpu = gpu
        self.cells = {script: {} for script in SCRIPTS}

    def lines(self):
        """The table in Markdown with a sentence above it; "-" is what was not run."""
        yield (
            f"`pytest tests/test_gpu.py` on {self.gpu}, torch {torch.__version__}: how far the "
            "embeddings of a clip and the gradient of a batch are from the CPU's, as shares of "
            "their lengths; the speed of the last of three short epochs, on batches of 4 clips of "
            "4 small frames and while other runs share the GPU; and whether a run that is resumed "
            "on the other device, and on the first again, goes on."
        )
        yield ""
        yield "| script | " + " | ".join(COLUMNS) + " |"
        yield "|---" * (1 + len(COLUMNS)) + "|"
        for script, cells in self.cells.items():
            texts = [cells.get(column, "-") for column in COLUMNS]
            yield f"| `{script}.py` | " + " | ".join(texts) + " |"

    def pytest_terminal_summary(self, terminalreporter):
        """A hook of pytest."""
        terminalreporter.section("for the README")
        for line in self.lines():
            terminalreporter.write_line(line)


@pytest.fixture(scope="module")
def table(pytestconfig):
    """The table of this session."""
    found = Table(torch.cuda.get_device_name())
    pytestconfig.pluginmanager.register(found)
    return found


def small_network(script):
    """(network in float32 on the CPU, settings, clips, identities): nothing is zero-initialised,
    and BatchNorm, in evaluation mode, has a mean and a variance of its own."""
    script = importlib.import_module(script)
    frames, height, width = SIZES[script.__name__]
    args = common.settings(
        script.RECIPE, script.ROWS, next(iter(script.ROWS)), small=True, weights="none",
        pool="avg", frames=frames, height=height, width=width,
    )
    torch.manual_seed(0)
    model = wake(script.build(args, 3))
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.0)
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return model, args, torch.randn(6, frames, 3, height, width), torch.tensor([0, 0, 1, 1, 2, 2])


def embeddings_and_gradients(script, model, args, clips, pids):
    """{name: embeddings, losses and the gradient of each parameter}, on the CPU in float64."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)
    with torch.no_grad():
        found = {"embeddings": model.eval()(clips)}
    model.train()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
    parts = importlib.import_module(script).losses(model(clips), pids, args)
    sum(parts.values()).backward()
    found |= {f"loss {name}": part.detach() for name, part in parts.items()}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()
              if p.grad is not None}
    return {name: x.double().cpu() for name, x in found.items()}


def compare(script, device, dtype, cells):
    """Embeddings, losses and gradients on a device against the CPU's, to 1e-3 of their length. The
    largest difference of a clip's embedding, and that of the whole gradient, become `cells`.

    In float32 the gradient as a whole, to 1e-2: a rectifier close to zero may let pass what it held
    back, so that single gradients of float32 and float64 differ by 2e-2 on one CPU, the whole by
    6e-4."""
    model, args, clips, pids = small_network(script)
    model, clips = model.to(dtype), clips.to(dtype)
    other = copy.deepcopy(model).to(device)
    ours = embeddings_and_gradients(script, model, args, clips, pids)
    theirs = embeddings_and_gradients(script, other, args, clips.to(device), pids.to(device))
    assert ours.keys() == theirs.keys() and len(ours) > 100
    gradients = [name for name in ours if name.startswith("gradient")]
    norm = torch.cat([ours[name].flatten() for name in gradients]).norm()
    off = torch.cat([(ours[name] - theirs[name]).flatten() for name in gradients]).norm()
    embeddings = ours["embeddings"], theirs["embeddings"]
    largest = ((embeddings[1] - embeddings[0]).norm(dim=1) / embeddings[0].norm(dim=1)).max()
    name = str(dtype).removeprefix("torch.")
    cells[f"embeddings, {name}"] = f"{float(largest):.1e}"
    cells[f"gradient, {name}"] = f"{float(off / norm):.1e}"
    assert off <= 1e-2 * norm
    for name, x in ours.items():
        if name not in gradients:
            assert (theirs[name] - x).norm() <= 1e-3 * x.norm(), name
        elif dtype == torch.float64:  # where a gradient is zero only rounding is left
            assert (theirs[name] - x).norm() <= 1e-3 * max(x.norm(), 1e-6 * norm), name


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("script", SCRIPTS)
def test_embeddings_and_gradients_are_those_of_the_cpu(script, dtype, table, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    compare(script, "cuda", dtype, table.cells[script])


def test_the_table_is_markdown():
    """Also when some of it was not run."""
    table = Table("a GPU")
    compare("sinet", "cpu", torch.float32, table.cells["sinet"])
    table.cells["strf"]["goes on between GPU and CPU"] = "yes"
    sentence, empty, *rows = table.lines()
    assert "on a GPU, torch" in sentence and empty == ""
    assert {row.count("|") for row in rows} == {len(COLUMNS) + 2} and len(rows) == 7
    assert rows[4] == "| `sinet.py` | 0.0e+00 | 0.0e+00 | - | - | - | - |"
    assert rows[5] == "| `strf.py` | - | - | - | - | - | yes |"


def start_as_user(folder, root, end, script, *flags, processes=1):
    """What a run prints that is started as a user does; it must be done at the time `end`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    frames, height, width = SIZES[script]
    size = ("--frames", frames, "--height", height, "--width", width, "--ids", 2, "--clips", 2)
    command = [sys.executable, *(launcher if processes > 1 else ()), ROOT / f"{script}.py"]
    command += ["--root", root, *(() if "--resume" in flags else size), *flags]
    command += ["--no-in-stages"] if script == "m3d" and "--resume" not in flags else []
    done = subprocess.run(
        [*map(str, command)], cwd=folder, capture_output=True, text=True,
        timeout=max(0.1, end - time.monotonic()),
        env={**os.environ, "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def short_epochs(user, script, folder, gpu):
    """Three epochs of the small run, with all that speeds it up: (what it prints, the clips a
    second of the last epoch, when everything is compiled)."""
    flags = ("--amp", "--compile", "--workers", 2, "--output", folder)
    out = user(script, "--gpu", gpu, "--epochs", 3, *flags)
    rate = re.search(r"^epoch 3/3: lr .* ([^ ]+) clips/s\)$", out, re.M)[1]
    assert "after epoch 3," in out and "--compile: failed" not in out
    return out, rate


def back_and_forth(user, script, folder, gpus):
    """A run goes on on the other device, and again on the first; both evaluate it."""
    flags = ("--output", folder, "--workers", 0)
    user(script, *flags, "--epochs", 1, "--gpu", gpus[0])
    for epochs, gpu in ((2, gpus[1]), (3, gpus[0])):
        out = user(script, *flags, "--resume", "--epochs", epochs, "--gpu", gpu)
        assert f"last.pt after epoch {epochs - 1}\n" in out
    log = read_log(folder)
    assert [row["epoch"] for row in log] == ["1", "2", "3"]
    maps = []
    for gpu in gpus:
        out = user(script, *flags, "--resume", "--evaluate", "--gpu", gpu)
        maps.append(float(re.search(r"^\S+, after epoch 3, .*mAP ([\d.]+)", out, re.M)[1]))
    assert maps == pytest.approx([float(log[2]["mAP"])] * 2, abs=5)  # a pair may change places


def several(user, folder, gpus):
    """The loss of the first step is that of one process: BatchNorm sees the whole batch."""
    losses = []
    for processes in (1, gpus):
        out = user(
            "sinet", "--ids", 6, "--epochs", 1, "--output", folder / f"{processes}",
            processes=processes,
        )
        assert f", {processes} processes" in out or processes == 1
        losses.append(float(read_log(folder / f"{processes}")[0]["loss"]))
    return losses


DIRECTIONS = {"from-gpu": (0, "cpu"), "from-cpu": ("cpu", 0)}


def start_jobs(user, pool, folder, directions=DIRECTIONS, gpu=0):
    """{(what, script): future}, the longest first. All at once, because each spends most of its
    time on one CPU core: it imports torch and compiles."""
    jobs = {}
    for script in SCRIPTS:
        own = folder / f"{script}-compiled"
        jobs["compiled", script] = pool.submit(short_epochs, user, script, own, gpu)
    for name, gpus in directions.items():
        for script in SCRIPTS:
            own = folder / f"{script}-{name}"
            jobs[name, script] = pool.submit(back_and_forth, user, script, own, gpus)
    return jobs


@pytest.fixture(scope="module")
def jobs(pytestconfig, tmp_path_factory, small_root):
    """All of `start_jobs`, which together have --gpu-minutes."""
    folder = tmp_path_factory.mktemp("gpu")
    end = time.monotonic() + 60 * pytestconfig.getoption("--gpu-minutes")
    user = functools.partial(start_as_user, folder, small_root, end)
    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        yield start_jobs(user, pool, folder)
        pool.shutdown(cancel_futures=True)
    drop_weights(folder)


@needs_gpu
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_epoch_on_a_gpu(jobs, table, script):
    out, rate = jobs["compiled", script].result()
    table.cells[script]["clips/s with --amp --compile"] = rate
    assert "device: cuda:0 (" in out


@needs_gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_goes_on_between_gpu_and_cpu(jobs, table, script, direction):
    column = "goes on between GPU and CPU"
    before = table.cells[script].get(column, "yes")
    table.cells[script][column] = "no"
    jobs[direction, script].result()
    table.cells[script][column] = before


@needs_two
def test_two_gpus_have_the_loss_of_one(tmp_path, small_root):
    user = functools.partial(start_as_user, tmp_path, small_root, time.monotonic() + 300)
    one, two = several(user, tmp_path, 2)
    drop_weights(tmp_path)
    assert two == pytest.approx(one, rel=1e-3)
