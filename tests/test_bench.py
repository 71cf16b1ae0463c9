"""How tests/bench.py keeps to its minutes, and what it prints; it is run by hand, above all on a
GPU."""

import time

import pytest
import torch

import bench


class Clock:
    """A clock that only work moves on."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        def pass_time():
            self.now += seconds

        return pass_time


def test_what_would_end_too_late_is_left_out_and_named():
    clock = Clock()
    budget = bench.Budget(200.0, clock)
    budget.run("training in float32", "a", 20, clock.work(30))
    budget.run("training in float32", "b", 20, clock.work(10))  # to be done at 175, by the longest
    assert clock.now == 140
    budget.run("training in compile", "a", 41, clock.work(1))  # half as long again: at 201.5
    budget.run("training in compile", "b", 41, clock.work(1))
    budget.run("growth", "growth", 40, clock.work(30))
    budget.run("training in float32", "c", 20, clock.work(1))  # 45 seconds again: too late
    budget.run("growth", "growth", 1, clock.work(1))
    assert clock.now == 170
    assert [*budget.lines()] == [
        "Not measured, because the time was over: training in compile (a, b); training in float32"
        " (c); growth."
    ]


def test_a_failure_does_not_end_the_rest(capsys):
    clock = Clock()
    budget = bench.Budget(200.0, clock)

    def fail():
        clock.now += 7
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    budget.run("training in float32", "m3d m3d", 20, fail)
    assert "Traceback" in capsys.readouterr().err
    assert [*budget.lines()] == [
        "Failed: training in float32: m3d m3d (CUDA out of memory. Tried to allocate)."
    ]
    assert budget.longest == {"training in float32": 7}
    with pytest.raises(KeyboardInterrupt):
        budget.run("growth", "growth", 1, lambda: (_ for _ in ()).throw(KeyboardInterrupt))


def test_work_that_was_guessed_wrongly_ends_with_the_time(capsys):
    start = time.monotonic()
    budget = bench.Budget(start + 0.5)
    budget.run("training in compile", "m3d m3d", 0.1, lambda: time.sleep(60))
    assert time.monotonic() - start < 30
    assert [*budget.lines()] == ["Failed: training in compile: m3d m3d (the time was over)."]
    assert "TimeoutError" in capsys.readouterr().err


def test_a_gpu_measures_the_most_important_first():
    """Every part and kind is in its order, and what was asked for is in both."""
    every = bench.in_order([*bench.PARTS], bench.KINDS, on_gpu=True)
    assert [key[:2] for key in every[:2]] == [("training", "float32"), ("training", "bfloat16")]
    assert len(every) == len(bench.ON_A_GPU)
    assert {*every} == {*bench.in_order([*bench.PARTS], bench.KINDS, on_gpu=False)}
    asked = bench.in_order(["growth", "training"], ["tf32", "bfloat16"], on_gpu=True)
    assert [key[:2] for key in asked] == [
        ("training", "bfloat16"),
        ("training", "tf32"),
        ("growth", "tf32"),
    ]


@pytest.fixture
def measured(monkeypatch, capsys):
    """measured(*flags) -> the lines of the text that ends a run on the CPU."""

    def call(*flags):
        monkeypatch.setattr("sys.argv", ["bench.py", "--gpu", "cpu", *map(str, flags)])
        assert bench.main() == 0
        text = capsys.readouterr().out
        return text[text.index("`python tests/bench.py` on") :].splitlines()

    for name in ("benchmark", "allow_tf32"):  # restored afterwards
        monkeypatch.setattr(torch.backends.cudnn, name, False)
    return call


def test_without_time_nothing_is_measured(measured):
    lines = measured("--minutes", 0)
    assert not any(line.startswith("|") for line in lines)
    (missing,) = (line for line in lines if line.startswith("Not measured"))
    for name in bench.PARTS:
        assert name in missing
    assert "training in float32 (bicnet_tks bicnet-tks, sinet sinet, " in missing


def test_the_tables_are_markdown(measured):
    lines = measured(
        "training", "inference", "precision", "--only", "sinet", "--clips", 2, "--repeats", 1,
        "--height", 64, "--width", 48,
    )
    tables = [line for line in lines if line.startswith("|")]
    assert tables[0].count("|") == 7 and tables[0].endswith(" inference, time / baseline's |")
    assert tables[1] == "|---" * 6 + "|"
    assert tables[2].startswith("| sinet.py sinet / plain | float32 | ")
    assert tables[3:5] == ["| what | value |", "|---|---|"] and len(tables) == 8
    assert all(line.count("|") == 3 for line in tables[3:])
    assert not any("Not measured" in line for line in lines)
