"""What --figure draws and --complexity prints, and that the README's commands and pictures are
there."""

import importlib
import math
import re
import shlex
import sys
import types

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import common
import sinet
from conftest import ROOT, TINY, Colours, read_log
from data import UserError, load_dataset, normalize

SCRIPTS = ["bicnet_tks", "m3d", "sinet", "strf", "tclnet"]


def network(name, variant=None, **changes):
    """A script and its network of a row, for 64x64 pixels."""
    script = importlib.import_module(name)
    variant = variant or next(iter(script.ROWS))
    others = {"weights": "none", "frames": 4, "height": 64, "width": 64, **changes}
    args = common.settings(script.RECIPE, script.ROWS, variant, small=True, **others)
    return script, script.build(args, 5).eval()


def random_frames():
    return torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)


def axes_of(panel):
    """Axes that the panel has drawn into."""
    ax = Figure((1, 1), dpi=120).add_axes((0, 0, 1, 1))
    panel(ax)
    return ax


def pixels_of(panel):
    """The panel's colours, (120, 120, 3), its own part of them where it is narrower than high."""
    ax = axes_of(panel)
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    colours = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    left, right = (round(float(x)) for x in ax.get_window_extent().intervalx)
    return colours[:, left:right]


# ----------------------------------------------------------------------------------------- panels


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_papers_pictures(name, tmp_path, one_backbone):
    script, model = network(name)
    frames = random_frames()
    model.train()
    title, rows = script.picture(model, normalize(frames[None]), frames)
    assert model.training and title and len(rows) >= 3
    assert all(label and panels for label, panels in rows)
    # a map for each frame, and the scale
    assert any(len(panels) == 4 + 1 for _, panels in rows)
    common.sheet(title, rows, tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png").convert("RGB")
    assert image.width < 2500 and len(image.getcolors(10**6)) > 50
    assert image.getpixel((image.width - 1, 3)) == (255, 255, 255)


OTHERS = {
    "bicnet_tks": ("base-s", "height-256", "tb+csp", "tks-k3"),
    "m3d": ("2d", "i3d", "m3d+ral-t"),
    "sinet": ("base", "base+gc"),
    "strf": ("p3dc", "p3dc+fine"),
    "tclnet": ("base", "base+tse-wo-seo", "base+tse-n4"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_pictures_of_other_variants(name, one_backbone):
    """Rows without the module that is drawn have fewer rows, not an error."""
    frames = random_frames()
    for variant in OTHERS[name]:
        script, model = network(name, variant)
        _, rows = script.picture(model, normalize(frames[None]), frames)
        assert rows and all(panels for _, panels in rows), variant
        for _, panels in rows:
            axes_of(panels[0])
            axes_of(panels[-1])


def test_sinets_picture_is_eq_4(monkeypatch):
    """The overlays are of S itself: 1 where nothing is damped; the former frames have none."""
    script, model = network("sinet")
    frames, seen = random_frames(), []
    clips = normalize(frames[None])
    first = next(m for m in model.modules() if isinstance(m, sinet.SuppressOperation))
    (_, s), = common.watch(model, clips, first)[0]
    original = script.overlays

    def overlays(frames, maps, *limits):
        seen.append((maps, limits))
        return original(frames, maps, *limits)
    monkeypatch.setattr(script, "overlays", overlays)
    script.picture(model, clips, frames)
    maps, limits = seen[1]
    assert limits == (0, 1) and maps[:1].isnan().all() and torch.equal(maps[1:], s[0, :, 0])
    assert 0 < s.min() and s.max() <= 1


def test_overlays_go_from_blue_to_red():
    frames = torch.full((2, 3, 40, 20), 128, dtype=torch.uint8)
    maps = torch.stack([torch.tensor([[0.0, 1.0]]), torch.full((1, 2), math.nan)])
    ramp, plain, scale = common.overlays(frames, maps)
    ramp = pixels_of(ramp)
    assert ramp.shape == (120, 60, 3)
    assert ramp[60, 15, 2] > ramp[60, 15, 0] + 50 and ramp[60, 45, 0] > ramp[60, 45, 2] + 50
    # cells keep their edge
    assert np.abs(ramp[60, 5:27] - ramp[60, 5]).max() <= 1
    assert np.abs(ramp[60, 33:55] - ramp[60, 33]).max() <= 1
    # a frame without a map has its own colour, and a white hatch
    plain = pixels_of(plain)
    assert plain.shape == (120, 60, 3) and (np.ptp(plain, axis=2) == 0).all()
    own = (plain == 128).all(2)
    assert 0.5 < own.mean() < 0.98 and plain[~own].min() > 128
    half = pixels_of(common.overlays(frames[:1], torch.tensor([[[0.5]]]), 0, 1)[0])
    assert (np.ptp(half[20:100, 20:40], axis=2) < 10).all()  # grey in the middle
    assert axes_of(scale).get_ylim() == (0, 1)


def test_overlays_share_one_range():
    frames = torch.randint(0, 256, (3, 3, 32, 16), dtype=torch.uint8)
    maps = torch.linspace(-2, 3, 3 * 8).view(3, 4, 2)
    maps[1] = math.nan
    assert axes_of(common.overlays(frames, maps)[-1]).get_ylim() == (-2, 3)
    assert axes_of(common.overlays(frames, maps, high=9)[-1]).get_ylim() == (-2, 9)
    grey = frames[:1].float().mean(1, keepdim=True).byte().expand(1, 3, -1, -1)
    coloured, same = (pixels_of(common.overlays(f, maps[:1])[0]) for f in (frames[:1], grey))
    assert np.abs(coloured - same).max() <= 1  # of rounding
    for value in (0.0, 0.5, -7.0):
        equal = common.overlays(frames, torch.full((3, 4, 2), value, dtype=torch.bfloat16))
        assert all(axes_of(panel) for panel in equal)


def test_bars():
    values = [torch.tensor(0.25), -2, 1.5]
    ax = axes_of(common.bars(values, ["a", "b", "c"]))
    assert [bar.get_height() for bar in ax.patches] == [0.25, -2, 1.5]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["a", "b", "c"]
    assert len(axes_of(common.bars(torch.rand(40))).patches) == 40
    ax = axes_of(common.bars(values, line=True))
    assert ax.lines[0].get_xydata().tolist() == [[1, 0.25], [2, -2], [3, 1.5]]
    assert all(x == round(x) for x in ax.get_xticks())


def test_watch_sees_every_call_and_leaves_no_hooks():
    _, model = network("tclnet")
    clips = torch.randn(1, 4, 3, 64, 64)
    shared, = common.watch(model, clips, model.tse.shared)
    assert len(shared) == 2 and not model.tse.shared._forward_hooks  # two learners
    with pytest.raises(RuntimeError):
        common.watch(model, clips[:, :, :1], model.tse.shared)
    assert not model.tse.shared._forward_hooks


def test_sheet_is_readable(monkeypatch, tmp_path):
    """Text of at least 9 pixels; long labels are wrapped, frames of any size equally high."""
    drawn, savefig = [], Figure.savefig

    def save(figure, *args, **options):
        drawn.append(figure)
        savefig(figure, *args, **options)
    monkeypatch.setattr(Figure, "savefig", save)
    narrow, wide = (torch.zeros(1, 3, 40, width, dtype=torch.uint8) for width in (20, 80))
    words = "a long label of many words " * 4
    panels = [*common.overlays(narrow, torch.rand(1, 4, 2)), common.photo(wide[0], color="red")]
    rows = [(words, panels), ("bars", [common.bars([1, 2], ["a", "b"])])]
    common.sheet(words, rows, tmp_path / "a.png")
    figure, = drawn
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    assert len(texts) > 6 and all(t.get_fontsize() * figure.dpi / 72 >= 9 for t in texts)
    labels = [text.get_window_extent() for text in figure.texts]
    assert all(label.width < 600 for label in labels) and figure.texts[1].get_text().count("\n") > 2
    frames = [ax.get_window_extent() for ax in figure.axes if ax.images]
    assert len(frames) == 2 and {round(frame.height) for frame in frames} == {120}
    assert [round(frame.width) for frame in frames] == [60, 240]
    assert labels[1].x1 < frames[0].x0 and frames[0].x1 < frames[1].x0
    boxes = [ax.get_tightbbox() for ax in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    image = Image.open(tmp_path / "a.png")
    assert image.size[0] > boxes[2].x1 and [*tmp_path.iterdir()] == [tmp_path / "a.png"]


# ----------------------------------------------------------------------------------------- --figure


def small_run(monkeypatch, root, folder, *flags):
    command = ["sinet.py", "--root", root, "--gpu", "cpu", *TINY, "--figure", folder, *flags]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    sinet.main()


def test_figure_writes_all_of_them(run, trained, tmp_path):
    command = "sinet.py", "--figure", "f", "--figure-tracklets", 2
    done = run(*command, "--resume", trained[0] / "last.pt")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "f").iterdir()}
    end = "-ranked.png"
    people = [name.removesuffix(end) for name in names if name.endswith(end)]
    assert len(people) == 2 and all(re.fullmatch(r"query-\d+-person-\d+-camera-\d", p)
                                    for p in people)
    charts = {"cmc.png", "pca.png", "training.png"}
    assert names == charts | {p + kind for p in people for kind in (".png", end)}
    assert done.stdout.count("wrote f/") == len(names) and "epoch 1/" not in done.stdout
    for name in names:
        image = Image.open(tmp_path / "f" / name)
        assert min(image.size) > 300 and len(image.convert("RGB").getcolors(10**6)) > 10
    assert not (trained[0] / "f").exists()


@pytest.fixture
def colours(monkeypatch):
    """A small network in SINet's place, of which there is no picture."""
    monkeypatch.setattr(sinet, "build", lambda args, num_classes: Colours(num_classes))
    monkeypatch.setattr(sinet, "picture", lambda *_: ("title", []))


@pytest.fixture
def sheets(monkeypatch, colours):
    """What the stubbed `sheet` is given, {file name: rows}."""
    found = {}

    def sheet(title, rows, path, height=1.2):
        found[path.name] = rows
    monkeypatch.setattr(common, "sheet", sheet)
    return found


def test_ranked_list_is_the_metrics(monkeypatch, small_root, tmp_path, sheets):
    """Its entries are the ranking of which match_ranks takes the matches: without the query's
    identity under its own camera."""
    monkeypatch.setattr(common, "photo", lambda image, **look: look)
    small_run(monkeypatch, small_root, tmp_path / "f", "--figure-tracklets", 100)
    dataset = load_dataset("synthetic", small_root)
    torch.manual_seed(0)
    model = Colours(dataset.num_identities)
    q, g = common.test_features(model, dataset, sinet.SPLIT, 4, (48, 40))
    d = torch.cat([block for _, block in common.distance_blocks(q, g, sinet.METRIC)]).numpy()
    ranks = common.match_ranks(d, *dataset.ids())
    lists = {name: rows for name, rows in sheets.items() if name.endswith("-ranked.png")}
    assert len(lists) == len(dataset.query)
    for i, (t, places) in enumerate(zip(dataset.query, ranks), 1):
        rows = lists[f"query-{i}-person-{t.pid}-camera-{t.cam}-ranked.png"]
        assert rows[0][0] == f"query: person {t.pid}, camera {t.cam}"
        assert len(rows) == 1 + 8
        right = [". right, " in label for label, _ in rows[1:]]
        assert np.flatnonzero(right).tolist() == [place for place in places.tolist() if place < 8]
        assert not any(f"person {t.pid}, camera {t.cam}" in label for label, _ in rows[1:])
        for n, (is_right, (label, panels)) in enumerate(zip(right, rows[1:]), 1):
            assert label.startswith(f"{n}. " + ("right, " if is_right else "wrong, "))
            assert panels[0]["color"] == ("green" if is_right else "red")
    own = {name.replace("-ranked", "") for name in lists}
    assert set(sheets) - set(lists) - own == {"cmc.png", "pca.png"}  # untrained: no training.png


def test_charts(monkeypatch, small_root, tmp_path, sheets):
    """The CMC, the losses of whole epochs, and each tracklet of ten people once in the PCA."""
    network = Colours(5)
    dataset = load_dataset("synthetic", small_root)
    args = types.SimpleNamespace(
        figure=tmp_path / "f", figure_tracklets=1, frames=4, height=48, width=40, variant="v",
        data="synthetic", rerank=True,
    )
    history = [{"epoch": n, "lr": 1, "loss": 9 / n, "xent": 5 / n, "mAP": "", "rank-1": ""}
               for n in (1, 2, 3)]
    run = types.SimpleNamespace(
        args=args, device=torch.device("cpu"), history=history, extraction={"batch": 4},
        size=(48, 40),
    )
    rest = run, network, dataset, sinet.SPLIT, "euclidean", sinet.picture
    common.figures(*rest)
    q, g = common.test_features(network, dataset, sinet.SPLIT, 4, (48, 40))
    ids = dataset.ids()
    cmc, mean_ap, _ = common.cmc_map(common.rerank(q, g, "euclidean"), *ids)
    (label, (panel,)), = sheets["cmc.png"]
    assert f"mAP {100 * mean_ap:.1f}" in label
    assert axes_of(panel).lines[0].get_ydata() == pytest.approx(100 * cmc)
    assert [label for label, _ in sheets["training.png"]] == ["loss", "xent"]
    line = axes_of(sheets["training.png"][1][1][0]).lines[0]
    assert line.get_xydata().tolist() == [[1, 5], [2, 2.5], [3, 5 / 3]]
    ax = axes_of(sheets["pca.png"][0][1][0])
    people = sorted({t.pid for t in dataset.query})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [str(p) for p in people]
    rings = [line for line in ax.lines if line.get_marker() == "o"]
    assert sum(len(line.get_xdata()) for line in rings) == len(dataset.query)
    assert len({line.get_color() for line in rings}) == len(people) == 4
    numbers = [line.get_marker() for line in ax.lines if line not in rings]
    shown = [t for t in dataset.gallery if t.pid in people]
    assert sorted(numbers) == sorted(f"${t.cam}$" for t in shown)
    sheets.clear()
    args.figure = tmp_path / "g"
    monkeypatch.setattr(common, "test_features", lambda *_, **__: (q, g))
    monkeypatch.setattr(common, "rank", lambda: 1)
    common.figures(*rest)
    assert not sheets  # the first process draws


def test_figure_errors(monkeypatch, small_root, tmp_path, colours):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/f/.*png: cannot be written"):
        small_run(monkeypatch, small_root, tmp_path / "file/f")
    with pytest.raises(UserError, match="none.pt: no such file"):
        small_run(monkeypatch, small_root, tmp_path / "f", "--resume", tmp_path / "none.pt")


# --------------------------------------------------------------------------------- load(FILE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_load(name, monkeypatch, tmp_path, one_backbone):
    """The network of a file as it was, without any other file, and its settings."""
    variant = "m3d+ral" if name == "m3d" else [*importlib.import_module(name).ROWS][0]
    script, model = network(name, variant)
    for p in [*model.parameters(), *model.buffers()]:
        if p.is_floating_point():
            p.data.uniform_(0.01, 0.02)
    args = common.settings(script.RECIPE, script.ROWS, variant, small=True, frames=4, height=64)
    saved = {**vars(args), "width": 64, "data": "synthetic", "root": "gone", "weights": "gone.pth"}
    if name == "m3d":
        saved |= {"init_2d": "gone.pt", "join": ["gone.pt", "gone.pt"]}
    del saved["pool"]  # of a time when there was no such flag
    file = {"script": f"{name}.py", "args": saved, "num_classes": 5, "history": [],
            "model": model.state_dict()}
    torch.save(file, tmp_path / "last.pt")
    loaded = script.load(tmp_path / "last.pt")
    assert not loaded.training and loaded.args.width == 64 and loaded.args.variant == variant
    assert loaded.args.pool == args.pool and next(loaded.parameters()).device.type == "cpu"
    clips = torch.randn(2, 4, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(clips), model(clips))
    wrong = {"no.pt": "no such file", "other.pt": f"not a checkpoint of {name}.py",
             "text.pt": "not a readable checkpoint", "short.pt": "its model does not fit"}
    (tmp_path / "text.pt").write_text("text")
    torch.save({**file, "script": "other.py"}, tmp_path / "other.pt")
    few = {key: value for key, value in file["model"].items() if "classifier" in key}
    torch.save({**file, "model": few}, tmp_path / "short.pt")
    for path, says in wrong.items():
        with pytest.raises(UserError, match=says):
            script.load(tmp_path / path)


def test_load_of_a_run(trained, small_root):
    """The features are those of the run's own evaluation."""
    model = sinet.load(trained[0] / "last.pt")
    dataset = load_dataset("synthetic", small_root)
    assert model.args.variant == "base" and model.args.root == str(small_root)
    result = common.evaluate(model, dataset, sinet.SPLIT, 4, (48, 40), sinet.METRIC)
    logged = read_log(trained[0])[-1]
    assert [f"{result[key]:.4f}" for key in ("mAP", "rank-1")] == [
        f"{float(logged[key]):.4f}" for key in ("mAP", "rank-1")]


# ------------------------------------------------------------------------------------- --complexity

FIRST = {  # see COMPLEXITY in each script's test
    "bicnet_tks": "29,291,648",
    "m3d": "48,250,972",
    "sinet": "29,565,046",
    "strf": "25,534,129",
    "tclnet": "30,070,848",
}


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_complexity(name, monkeypatch, capsys):
    """Of the first rows, the base and the last; each script's own test has all figures."""
    script = importlib.import_module(name)
    names = [*script.ROWS]
    base = script.COUNTING.get("base", names[0])
    names = [*dict.fromkeys([*names[:3], base, names[-1]])]
    rows = {row: common.row_of(script.ROWS, row) for row in names}
    monkeypatch.setattr(script, "ROWS", rows)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--complexity"])
    script.main()
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(rows) and len({len(line) for line in table}) == 1
    head, _, *lines = map(cells_of, table)
    for cells, (row, given) in zip(lines, rows.items()):
        printed = [f"{figure} {common.COSTS[cost][0]}" for cost, figure in given.costs.items()]
        assert cells[0] == row and cells[5] == ", ".join(printed)
    assert lines[0][2] == FIRST[name]
    readme = [cells_of(line) for line in (ROOT / "README.md").read_text().splitlines()]
    missing = [cells for cells in (head, *lines) if cells not in readme]
    assert not missing, f"README.md lacks rows of {name}.py --complexity"


# ------------------------------------------------------------------------------------------- README


def test_the_readmes_pictures_are_small_and_all_used():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"images/[\w-]+\.png", text))
    there = {f"images/{path.name}" for path in (ROOT / "images").iterdir()}
    assert named == there and sum((ROOT / name).stat().st_size for name in there) < 1.5e6


def readme_commands():
    text = re.sub(r"\\\n\s*", "", (ROOT / "README.md").read_text())
    lines = re.findall(r"^    (?:pip install [^&\n]*&& )?(python .*)$", text, re.M)
    return [shlex.split(line, comments=True) for line in lines]


def test_the_readmes_commands_run(monkeypatch, small_root, tmp_path):
    """Those that need no real data set, in order, on the small set and with a small network; the
    others are understood."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").symlink_to(small_root)
    args = common.settings(sinet.RECIPE, sinet.ROWS, "sinet", small=True)
    ran, losses = 0, sinet.losses
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
            continue  # tested above, and in test_cli.py
        if {"mars", "folder"} & {*flags}:
            if "--resume" not in flags:
                understood = common.parse_args(module.RECIPE, module.ROWS, module.__doc__, script)
                assert understood.data in ("mars", "folder")
            continue
        monkeypatch.setattr(module, "build", lambda args, num_classes: Colours(num_classes))
        monkeypatch.setattr(module, "losses", lambda outputs, pids, _: losses(outputs, pids, args))
        rows = [("label", [common.bars([1, 2])])]
        monkeypatch.setattr(module, "picture", lambda *_: ("title", rows))
        monkeypatch.setattr(sys, "argv", [script, *flags, "--ids", "4", "--clips", "2"])
        module.main()
        ran += 1
    assert ran >= 4
