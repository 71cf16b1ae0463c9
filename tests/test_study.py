"""What tests/study.py measures, on small networks; the study itself is run by hand."""

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import common
import sinet
import study
from data import draw_synthetic, load_dataset


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A set of tracklets of eight frames."""
    folder = tmp_path_factory.mktemp("eight") / "set"
    draw_synthetic(folder, 2, 5, cameras=2, frames=(8, 8), masks=True)
    return folder


def test_the_rows_and_flags_are_the_scripts(monkeypatch):
    """Each script accepts the flags of its rows."""
    for (which, script), names in study.ROWS.items():
        module = importlib.import_module(script)
        assert which in study.SETS
        for name in names:
            monkeypatch.setattr("sys.argv", [script, *study.flags_of(which, script, name, 0)])
            release = getattr(module, "RELEASE", None)
            args = common.parse_args(module.RECIPE, module.ROWS, module.__doc__, f"{script}.py",
                                     release=release)
            assert args.data == "synthetic" and args.seed == 0


def test_the_results_are_those_of_the_rows(capsys):
    """tests/study.csv has rows of the study, none twice, and --table prints them."""
    rows = study.results(study.RESULTS)
    assert rows and {*rows[0]} <= {*study.KEYS}
    runs = [tuple(row[key] for key in study.KEYS[:4]) for row in rows]
    assert len({*runs}) == len(runs)
    assert all(row in study.ROWS[which, script] for which, script, row, _ in runs)
    study.table(rows)
    printed = capsys.readouterr().out
    for row in rows:
        assert f"| {row['script']} | {row['row']} | " in printed


def test_rows_are_compared_seed_by_seed():
    """Of seeds that both have, and only where both have the quantity."""
    rows = [{"script": script, "row": row, "seed": seed, "mAP": mAP} for script, row, seed, mAP in (
        ("sinet", "base", "1", "40.25"), ("sinet", "base", "0", "50.5"),
        ("sinet", "sinet", "0", "48"), ("sinet", "sinet", "1", "44.3"),
        ("sinet", "sinet", "2", "90"), ("tclnet", "base", "2", "10"))]
    found = study.differences(rows, "sinet", "mAP", of="sinet", minus="base")
    assert found == pytest.approx([-2.5, 4.05])
    assert study.differences(rows, "sinet", "A alike", of="sinet", minus="base") == []


def test_the_interval_is_students():
    """With three values, the quantile of a table of Student's t for two degrees of freedom."""
    assert study.interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3 ** 0.5, rel=1e-3)


def test_a_claim_is_decided_by_the_interval(capsys):
    """Beyond the interval on the paper's side, on the other, and within it. A row with one seed is
    left out, and so is another set. The paper's values are those of the scripts."""
    seeds = {
        "base": ((50, 0.8), (52, 0.82), (48, 0.78)),
        "base+sbm": ((55, 0.9), (57.5, 0.93), (52.5, 0.87)),
        "base+idm": ((45,), (46.5,), (43.5,)),
        "sinet": ((50, 0.7), (57, 0.73), (43, 0.67)),
    }
    rows = [{"set": "hard", "script": "sinet", "row": row, "seed": str(seed),
             **dict(zip(("mAP", "maps alike"), map(str, values)))}
            for row, runs in seeds.items() for seed, values in enumerate(runs)]
    rows.append({**rows[0], "row": "sinet-release"})
    rows.append({**rows[0], "set": "gait", "mAP": "0"})
    study.claims(rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| sinet")]
    assert lines == [
        "| sinet | mAP | base+sbm | base | +2.5 | +5.0 ± 1.2 | agrees |",
        "| sinet | mAP | base+idm | base | +2.7 | -5.0 ± 1.2 | contradicts |",
        "| sinet | mAP | sinet | base | +3.0 | +0.0 ± 12.4 | open |",
        "| sinet | maps alike | base+sbm | base | lower | +0.10 ± 0.02 | contradicts |",
        "| sinet | maps alike | sinet | base | lower | -0.10 ± 0.02 | agrees |",
    ]


def test_the_readme_has_the_claims_as_they_are_printed(capsys):
    study.claims(study.results(study.RESULTS))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(study.CLAIMS)
    assert "\n".join(lines) in (study.ROOT / "README.md").read_text()


def test_the_claims_are_about_rows_of_the_study():
    for script, quantity, name, other in study.CLAIMS:
        assert {name, other} <= {*study.ROWS["hard", script]}
        assert quantity in study.QUANTITIES


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


def test_where_maps_lie():
    """A map on the person's cells, and one on the border."""
    masks = torch.zeros(2, 32, 16)
    masks[:, 8:24, 4:12] = 1                            # 4 x 2 of 8 x 4 cells
    maps = torch.ones(2, 8, 4)
    maps[:, 2:6, 1:3] = 3
    assert study.where_maps_lie(maps, masks) == pytest.approx((1.0, -np.corrcoef(
        (masks[0, ::4, ::4] == 0).flatten(), study_border(8, 4).flatten())[0, 1]), abs=1e-6)
    share, border = study.where_maps_lie(study_border(8, 4)[None].expand(2, -1, -1), masks)
    assert share == 0 and border == pytest.approx(1)
    assert np.isnan(study.where_maps_lie(torch.rand(2, 4, 2), masks)[1])  # all border


def study_border(height, width):
    """1 at the border, else 0, in a loop."""
    return torch.tensor([[float(y in (0, height - 1) or x in (0, width - 1))
                          for x in range(width)] for y in range(height)])


def test_share_outside():
    masks = torch.zeros(2, 8, 4)
    masks[0] = 1
    maps = torch.rand(2, 3, 4, 2)
    assert study.share_outside(maps, masks).item() == pytest.approx(0.5)
    masks[1, :4] = 1
    strength = maps[1].square().sum(0).sqrt()
    expected = strength[2:].sum() / strength.sum() / 2
    assert study.share_outside(maps, masks).item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_crop_moves_the_mask_with_the_image():
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, 10:20, 12:20] = 255
    rng = np.random.default_rng(0)
    for _ in range(5):
        crop, mask = study.random_crop(image, image[0] / 255, rng, size=(32, 16))
        assert crop.shape == (3, 32, 16) and mask.shape == (32, 16)
        assert torch.allclose(crop[0] / 255, mask, atol=0.005) and mask.max() == 1


def test_perplexity():
    one_hot = F.one_hot(torch.arange(4), 4).float()
    assert study.perplexity(one_hot) == pytest.approx(1 / 4)
    assert study.perplexity(torch.full((2, 8, 3), 1 / 8)) == pytest.approx(1)


def test_slope_of_suppression():
    """Against small changes of each number of a clip's kernel; nearly 0 where R is one-hot."""
    torch.manual_seed(0)
    q = torch.randn(2, 2, 16, 6, 4, dtype=torch.float64)
    kernel = torch.randn(2, 9, 16, dtype=torch.float64)
    so = sinet.SuppressOperation(scale="window+channels")
    found = study.slope_of_suppression(so, q, kernel)
    for clip in range(2):
        own_q, own_kernel = q[clip:clip + 1], kernel[clip:clip + 1]
        amount = (1 - so(own_q, own_kernel)).sum()
        changes = torch.zeros_like(own_kernel)
        for index in np.ndindex(*own_kernel.shape):
            moved = own_kernel.clone()
            moved[index] += 1e-6
            changes[index] = (1 - so(own_q, moved)).sum() - amount
        expected = (changes / 1e-6).norm() * own_kernel.norm() / amount
        assert found[clip].item() == pytest.approx(expected.item(), rel=1e-4)
    one_hot = sinet.SuppressOperation(scale="none")
    assert (study.slope_of_suppression(one_hot, 100 * q, kernel) < 1e-9).all() and found.min() > 0.1


def test_the_trunk_trains_and_is_measured(tmp_path):
    """One short epoch: the file has torchvision's names, and its maps are measured."""
    draw_synthetic(tmp_path / "trunk", 6, 1, cameras=2, frames=(2, 2), size=(128, 128), masks=True)
    study.train_trunk(tmp_path, epochs=1, batch=4)
    net = torchvision.models.resnet50()
    net.load_state_dict(torch.load(tmp_path / "trunk.pth", weights_only=True))
    share, border, person = study.measure_trunk(tmp_path / "trunk.pth", tmp_path / "trunk")
    assert 0 < share < 1 and -1 < border < 1 and 0.05 < person < 0.5


@pytest.mark.parametrize("script, row, there", [
    ("sinet", "base", set()),
    ("sinet", "sinet", {"R positions", "masks fixed", "suppressed on person", "person"}),
    ("tclnet", "base+tse", {"learners alike", "inside block", "block on person"}),
    ("tclnet", "base+tse-wo-seo", {"learners alike"}), ("tclnet", "base", set()),
    ("bicnet_tks", "tb+csp+dao", {"A alike", "A top shared"}),
    ("m3d", "2d", set()), ("m3d", "m3d+ral", {"temporal norm", "RAL spread"}),
    ("strf", "strf-p3dc", {"mask positions"})])
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
    always = {"maps alike", "top cells shared", "on person"}
    if script not in ("bicnet_tks", "m3d"):  # their small maps are all border
        always.add("at border")
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
    for share in there - {"learners alike", "inside block", "A alike", "temporal norm"}:
        assert 0 <= found[share] <= 1, share
