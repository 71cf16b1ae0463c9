"""What --figure draws and --complexity prints, and that the README's commands and pictures are there."""
import argparse
import importlib
import math
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import common
import sinet
from conftest import ROOT, TINY, Colours
from data import UserError, load_dataset, normalize

SCRIPTS = ["bicnet_tks", "m3d", "sinet", "strf", "tclnet"]


def network(name, **changes):
    script = importlib.import_module(name)
    args = argparse.Namespace(**{**script.RECIPE, **script.SMALL, "variant": next(iter(script.VARIANTS)), "frames": 4, "height": 64, "width": 64, **changes})
    return script, script.build(args, 5, "none").eval()


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_papers_pictures(name, tmp_path):
    script, model = network(name)
    frames = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    model.train()
    title, rows = script.picture(model, normalize(frames[None]), frames)
    assert model.training and title and len(rows) >= 3 and all(label and images for label, images in rows)
    assert any(len(images) == 4 + 1 for _, images in rows)                                   # a map for each frame, and the scale
    common.sheet(title, rows, tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png").convert("RGB")
    assert image.width < 2500 and len(image.getcolors(10 ** 6)) > 50
    assert image.getpixel((image.width - 1, 3)) == (255, 255, 255)


def test_pictures_of_other_variants():
    """Rows without the module that is drawn have fewer rows, not an error."""
    frames = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    for name, variants in dict(bicnet_tks=("base-s", "height-256", "tb+csp", "tks-k3"), m3d=("2d", "i3d", "m3d+ral-t"), sinet=("base", "base+gc"),
                               strf=("p3dc", "p3dc+fine"), tclnet=("base", "base+tse-wo-seo", "base+tse-n4")).items():
        for variant in variants:
            recipe = dict(importlib.import_module(name).ROW_RECIPE.get(variant, {}))
            recipe.pop("frames", 0)
            script, model = network(name, variant=variant, **recipe)
            _, rows = script.picture(model, normalize(frames[None]), frames)
            assert rows and all(images for _, images in rows), variant


def test_sinets_picture_is_eq_4():
    """The overlays are of S itself: 1 where nothing is damped, and the former frames have none."""
    script, model = network("sinet")
    frames, shown = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8), []
    clips = normalize(frames[None])
    (_, s), = common.watch(model, clips, model.after["layer3_1"][0].so)[0]
    original, script.overlays = script.overlays, lambda f, maps, *range: shown.append((maps, range)) or original(f, maps, *range)
    try:
        script.picture(model, clips, frames)
    finally:
        script.overlays = original
    maps, limits = shown[1]
    assert limits == (0, 1) and maps[:1].isnan().all() and torch.equal(maps[1:], s[0, :, 0]) and 0 < s.min() and s.max() <= 1


def test_overlays_go_from_blue_to_red():
    frames = torch.full((2, 3, 40, 20), 128, dtype=torch.uint8)
    maps = torch.stack([torch.tensor([[0.0, 1.0]]), torch.full((1, 2), math.nan)])
    ramp, plain = (np.asarray(im).astype(int) for im in common.overlays(frames, maps, height=80)[:2])
    assert ramp.shape == plain.shape == (80, 40, 3) and (plain == 128).all()
    assert ramp[40, 1, 2] > ramp[40, 1, 0] + 30 and ramp[40, -2, 0] > ramp[40, -2, 2] + 30
    half = np.asarray(common.overlays(frames[:1], torch.tensor([[[0.5]]]), 0, 1)[0])
    assert (half[..., 1] > half[..., 0]).all()                                               # green in the middle


def test_watch_sees_every_call_and_leaves_no_hooks():
    _, model = network("tclnet")
    clips = torch.randn(1, 4, 3, 64, 64)
    shared, = common.watch(model, clips, model.tse.shared)
    assert len(shared) == 2 and not model.tse.shared._forward_hooks                          # two learners


def small_run(monkeypatch, root, folder, *flags):
    monkeypatch.setattr(sys, "argv", ["sinet.py", "--root", str(root), "--gpu", "cpu", *map(str, (*TINY, "--figure", folder, *flags))])
    sinet.main()


def test_figure_writes_all_of_them(run, trained, tmp_path):
    done = run("sinet.py", "--figure", "f", "--figure-tracklets", 2, "--resume", trained[0] / "last.pt")
    assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in (tmp_path / "f").iterdir())
    people = [n.removesuffix("-ranked.png") for n in names if n.endswith("-ranked.png")]
    assert len(people) == 2 and set(names) == {*(f"{p}{end}" for p in people for end in (".png", "-ranked.png")), "cmc.png", "pca.png", "training.png"}
    assert done.stdout.count("wrote f/") == len(names) and "epoch 1/" not in done.stdout
    for name in names:
        image = Image.open(tmp_path / "f" / name)
        assert min(image.size) > 300 and len(image.convert("RGB").getcolors(10 ** 6)) > 10
    assert not (trained[0] / "f").exists() and "scikit-learn is not installed" in done.stdout


def test_ranked_list_is_the_metrics(monkeypatch, small_root, tmp_path):
    """Its entries are the ranking of which match_ranks takes the matches: without the query's identity under its own camera."""
    sheets = {}
    monkeypatch.setattr(common, "sheet", lambda title, rows, path: sheets.update({path.name: rows}))
    monkeypatch.setattr(sinet, "build", lambda args, num_classes, weights: Colours(num_classes))
    monkeypatch.setattr(sinet, "picture", lambda *_: ("title", []))
    small_run(monkeypatch, small_root, tmp_path / "f", "--figure-tracklets", 100)
    dataset = load_dataset("synthetic", small_root)
    torch.manual_seed(0)
    q, g = common.test_features(Colours(dataset.num_identities), dataset, sinet.SPLIT, 4, (48, 40))
    d, ids = common.distances(q, g).numpy(), common.test_ids(dataset)
    ranks = common.match_ranks(d, *ids)
    lists = {name: rows for name, rows in sheets.items() if name.endswith("-ranked.png")}
    assert len(lists) == len(dataset.query)
    for t, places in zip(dataset.query, ranks):
        rows = lists[f"query-{dataset.query.index(t) + 1}-person-{t.pid}-camera-{t.cam}-ranked.png"]
        assert rows[0][0] == f"query: person {t.pid}, camera {t.cam}"
        right = [int(label.split(".")[0]) - 1 for label, _ in rows[1:] if ". right: " in label]
        assert right == [r for r in places.tolist() if r < 8]
        assert not any(f"person {t.pid}, camera {t.cam}," in label for label, _ in rows[1:])
        assert all(images[0].getpixel((1, 1)) == ((30, 160, 60) if ". right: " in label else (210, 40, 40)) for label, images in rows[1:])


def test_figure_errors(monkeypatch, small_root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--figure .*file/f: cannot be written"):
        small_run(monkeypatch, small_root, tmp_path / "file/f")
    with pytest.raises(UserError, match="none.pt: no such file"):
        small_run(monkeypatch, small_root, tmp_path / "f", "--resume", tmp_path / "none.pt")


@pytest.mark.parametrize("name", SCRIPTS)
def test_complexity(name, monkeypatch, capsys):
    script = importlib.import_module(name)                        # the first and the last rows; each script's own test has all figures
    monkeypatch.setattr(script, "VARIANTS", dict([*script.VARIANTS.items()][:3] + [*script.VARIANTS.items()][-1:]))
    if name == "m3d":
        monkeypatch.setattr(sys, "argv", ["m3d.py", "--complexity"])
        script.main()
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1 + len(script.VARIANTS) and len({len(line.rstrip()) for line in lines}) == 1 and "99.9 MB of parameters" in lines[3]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--complexity", "md"])
    script.main()
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(script.VARIANTS)
    assert set(table) <= set((ROOT / "README.md").read_text().splitlines())
    for row, variant, (_, printed) in zip(table[2:], script.VARIANTS, script.VARIANTS.values()):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[0] == variant and cells[5] == (", ".join(f"{figure} {key}" for figure, key in zip((printed or ())[2:], script.PRINTED)) or "-")
    first = dict(bicnet_tks="29,291,648", m3d="48,250,972", sinet="29,565,046", strf="25,534,129", tclnet="30,070,848")[name]   # see COMPLEXITY in each test
    assert first in table[2], table[2]


# ------------------------------------------------------------------------------------------------------------- README

def test_the_readmes_pictures_are_small_and_all_used():
    text = (ROOT / "README.md").read_text()
    named, there = set(re.findall(r"images/[\w-]+\.png", text)), {f"images/{p.name}" for p in (ROOT / "images").iterdir()}
    assert named == there and sum((ROOT / name).stat().st_size for name in there) < 1.5e6


def readme_commands():
    text = re.sub(r"\\\n\s*", "", (ROOT / "README.md").read_text())
    return [shlex.split(line, comments=True) for line in re.findall(r"^    (?:pip install [^&\n]*&& )?(python .*)$", text, re.M)]


def test_the_readmes_commands_run(monkeypatch, small_root, tmp_path):
    """Those that need no real data set, in order, on the small set and with a small network; the others are understood."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").symlink_to(small_root)
    ran, objective = 0, sinet.objective
    for _, script, *flags in readme_commands():
        if script.startswith("tests/"):
            assert (ROOT / script).exists()
            continue
        module = importlib.import_module(script.removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", [script, *flags])
        if script == "data.py":
            assert flags[0] in ("--check", "--synthetic")
            continue
        if "--help" in flags or "--complexity" in flags:
            continue                                              # tested above, and in test_cli.py
        if {"mars", "folder"} & {*flags}:
            if "--resume" not in flags:
                assert module.parse_args()[0].data in ("mars", "folder")
            continue
        monkeypatch.setattr(module, "build", lambda args, num_classes, weights: Colours(num_classes))
        monkeypatch.setattr(module, "objective", lambda outputs, pids, _: objective(outputs, pids, argparse.Namespace(**sinet.RECIPE)))
        monkeypatch.setattr(module, "picture", lambda *_: ("title", [("label", [Image.new("RGB", (400, 300))])]))
        monkeypatch.setattr(sys, "argv", [script, *flags, "--ids", "4", "--clips", "2"])
        module.main()
        ran += 1
    assert ran >= 4
