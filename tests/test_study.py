"""What tests/study.py measures, on small networks; the study itself is run by hand."""

import importlib

import numpy as np
import pytest
import torch

import common
import study
from data import draw_synthetic, load_dataset


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A set of tracklets of eight frames."""
    folder = tmp_path_factory.mktemp("eight") / "set"
    draw_synthetic(folder, 2, 5, cameras=2, frames=(8, 8))
    return folder


def test_the_rows_and_flags_are_the_scripts():
    for (which, script), names in study.ROWS.items():
        module = importlib.import_module(script)
        assert which in study.SETS and {*names} - {"2d-again"} <= {*module.ROWS}
        assert (which, script) in study.FLAGS


def test_a_name_of_no_row_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["study.py", "--output", f"{tmp_path / 'a'}", "--only", "bse"])
    with pytest.raises(SystemExit, match="--only bse and --seeds name no row"):
        study.main()
    assert not [*tmp_path.iterdir()]


def test_alike_is_the_correlation_and_the_share_of_the_top_quarter():
    maps = torch.rand(3, 4, 8, 2)
    correlation, share = study.alike(maps)
    expected, shared = [], []
    for clip in maps.flatten(2).numpy():
        for i in range(4):
            for j in range(i):
                expected.append(np.corrcoef(clip[i], clip[j])[0, 1])
                top = [set(np.argsort(clip[k])[-4:]) for k in (i, j)]
                shared.append(len(top[0] & top[1]) / 4)
    assert correlation == pytest.approx(np.mean(expected), abs=1e-5)
    assert share == pytest.approx(np.mean(shared), abs=1e-6)
    same = maps[:, :1].expand(-1, 4, -1, -1)
    assert study.alike(same) == pytest.approx([1, 1], abs=1e-5)


def test_frames_of_all_branches():
    big, small = torch.rand(4, 8, 4), torch.rand(2, 6, 4, 2)
    maps = study.of_frames([big, small], 2, (4, 2))
    assert maps.shape == (2, 8, 4, 2)
    assert torch.allclose(maps[1, 0, 0, 0], big[2, :2, :2].mean())
    assert torch.equal(maps[:, 2:], small)


def test_told_apart(eight):
    """An embedding by which the first four people are known, and one that takes two for another."""
    queries = load_dataset("synthetic", eight).query
    pids = sorted({query.pid for query in queries})
    vectors = torch.eye(len(pids))
    for expected, order in ((1.0, [0, 1, 2, 3, 4]), (0.5, [1, 0, 2, 3, 4])):
        given = iter(vector for pid in range(len(pids)) for vector in (
            vectors[pid] + 0.1, vectors[order[pid]] + 0.1))
        # sorted by identity, the cameras of each in the order of the queries
        share = study.told_apart(lambda clip: next(given)[None], queries, (32, 16), 8)
        assert share == expected


@pytest.mark.parametrize("script, row, there", [
    ("sinet", "base", set()), ("sinet", "sinet", set()),
    ("tclnet", "base+tse", {"learners alike", "inside block"}),
    ("tclnet", "base+tse-wo-seo", {"learners alike"}), ("tclnet", "base", set()),
    ("bicnet_tks", "tb+csp+dao", {"A alike", "A top shared"}),
    ("m3d", "2d", set()), ("m3d", "m3d", set()), ("strf", "strf-p3dc", set())])
def test_measure(script, row, there, tmp_path, eight, one_backbone):
    module = importlib.import_module(script)
    frames = 1 if row == "2d" else 4
    args = common.settings(module.RECIPE, module.ROWS, row, small=True, data="synthetic",
                           root=str(eight), script=f"{script}.py", frames=frames,
                           height=128, width=64, weights="none")
    model = module.build(args, 5)
    for norm in model.modules():  # so that every block adds something
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(norm.weight)
    file = tmp_path / "last.pt"
    torch.save({"script": f"{script}.py", "args": vars(args), "num_classes": 5, "history": [],
                "model": model.state_dict()}, file)
    found = study.measure(file, eight, tracklets=3, gait=row == "strf-p3dc")
    always = {"ms a clip", "maps alike", "top cells shared"}
    if row == "strf-p3dc":
        assert 0 <= found.pop("told apart") <= 1
    assert set(found) == {"shuffled"} | always | there
    assert -1 <= found["maps alike"] <= 1 and 0 <= found["top cells shared"] <= 1
    if row in ("2d", "base"):  # of a mean over frames: rounding, over two clips that are alike
        assert abs(found["shuffled"]) < 0.01
    elif script == "bicnet_tks":  # the temporal kernels of M3D and P3D start at zero
        assert found["shuffled"] > 0.02
    if "inside block" in there:
        assert 0 <= found["inside block"] <= 4
