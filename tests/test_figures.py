"""What --figure draws and --complexity prints."""

import functools
import importlib
import math
import re
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
import counting
import sinet
from conftest import TINY, Colours, read_log
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
    panel.draw(ax)
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
    # a map for each frame
    assert any(len(row.values) == 4 for row in rows.values())
    drawn = common.rows_with_common_ranges([common.Picture(name, title, rows)])
    # of random weights a row can be constant
    assert [label.split(": not drawn")[0] for label, _ in drawn] == [*rows] and drawn[0].panels
    left_out = "not drawn, because all values are about"
    assert all(panels or left_out in label for label, panels in drawn)
    common.save_sheet(title, drawn, tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png").convert("RGB")
    assert image.width < 830 and len(image.getcolors(10**6)) > 50
    assert image.getpixel((image.width - 1, 3)) == (255, 255, 255)


OTHERS = {
    "bicnet_tks": ("base-s", "height-256", "tb+csp", "tks-k3"),
    "m3d": ("2d", "i3d", "m3d+ral-t"),
    "sinet": ("base", "base+gc"),
    "strf": ("p3dc", "p3dc+fine", "strf-nofam", "p3dc+nonlocal"),
    "tclnet": ("base", "base+tse-wo-seo", "base+tse-n4"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_pictures_of_other_variants(name, one_backbone):
    """Rows without the module that is drawn have fewer rows, not an error; and stand beside others
    with the labels of what both have."""
    frames = random_frames()
    clips = normalize(frames[None])
    script, model = network(name)
    first = script.picture(model, clips, frames)[1]
    for variant in OTHERS[name]:
        script, model = network(name, variant)
        _, rows = script.picture(model, clips, frames)
        assert rows and rows.keys() & first.keys(), variant
        for _, panels in compared(a=rows, b=first):
            for panel in panels[:1] + panels[-1:]:
                axes_of(panel)


def compared(**rows):
    """The rows of a sheet of the rows of networks' pictures, by the networks' names."""
    pictures = [common.Picture(name, "", value) for name, value in rows.items()]
    return common.rows_with_common_ranges(pictures)


def captions_of(row):
    return [axes_of(panel).get_title() for panel in row.panels(0, 1)]


def test_heads_of_columns(one_backbone):
    """What a column is: the size of a frame, its learner, the dimension and window of a mask."""
    frames = random_frames()
    clips = normalize(frames[None])
    for name, label, heads in (
        ("bicnet_tks", "last map", ["full size"] + 3 * ["1/2 size"] + [""]),
        ("tclnet", "map of the frame's learner", 2 * ["learner 1", "learner 2"] + [""]),
        ("strf", "stage 3", ["t-dynamic", "t-static", "s-fine", "s-coarse", ""]),
        ("m3d", "spatial masks", ["stage 1", "stage 2", "stage 3", ""]),
        ("m3d", "what the temporal kernels add", ["stages 1 to 4"]),
    ):
        script, model = network(name)
        rows = script.picture(model, clips, frames)[1]
        (row,) = [row for key, row in rows.items() if key.startswith(label)]
        assert captions_of(row) == heads, name


def test_sinets_picture_is_eq_4(one_backbone):
    """The overlays are of 1 - S: 0 where nothing is damped; the former frames have none."""
    script, model = network("sinet")
    frames = random_frames()
    clips = normalize(frames[None])
    sbms = [m for m in model.modules() if isinstance(m, sinet.SuppressOperation)]
    rows = [*script.picture(model, clips, frames)[1].values()][1:]
    assert len(rows) == 3
    for n, (sbm, (maps, limits, panels)) in enumerate(zip(sbms, rows), 1):
        ((_, s),) = common.watch(model, clips, sbm)[0]
        assert limits == (0, 1) and torch.equal(torch.stack(maps), 1 - s[0, :, 0])
        assert len(maps) == 4 - n and 0 < s.min() and s.max() <= 1
        hatches = [axes_of(panel).patches[0].get_hatch() for panel in panels(0, 1)[:-1]]
        assert hatches == n * ["//"] + (4 - n) * [None]


def test_tclnets_picture_shows_the_erased_block(one_backbone):
    script, model = network("tclnet")
    frames = random_frames()
    rows = script.picture(model, normalize(frames[None]), frames)[1]
    maps, _, panels = rows["block that is erased from the frame"]
    # of the second and the fourth frame; 1 of 4 rows of the map are erased
    assert [m.sum().item() / m.numel() for m in maps] == [0.25, 0.25]
    assert [bool(axes_of(p).patches[0].get_hatch()) for p in panels(0, 1)[:-1]] == 2 * [True, False]


def test_strfs_middle_is_black(one_backbone):
    script, model = network("strf")
    frames = random_frames()
    rows = script.picture(model, normalize(frames[None]), frames)[1]
    for label, (maps, _, panels) in rows.items():
        if label.startswith("stage"):
            H, W = maps[0].shape
            assert all(m.isnan().nonzero().tolist() == [[H // 2, W // 2]] for m in maps)
    black = torch.full((2, 2), 0.5)
    black[1, 1] = math.nan
    white = torch.full((1, 3, 20, 20), 255, dtype=torch.uint8)
    pixels = pixels_of(common.overlays(white, [black]).panels(0, 1)[0])
    assert (np.ptp(pixels[80:110, 80:110], axis=2) == 0).all() and pixels[90, 90].max() < 130
    assert np.ptp(pixels[30, 30]) > 50


def test_overlays_go_from_blue_to_red():
    frames = torch.full((2, 3, 40, 20), 128, dtype=torch.uint8)
    maps, _, panels = common.overlays(frames, [torch.tensor([[0.0, 1.0]]), None])
    assert len(maps) == 1
    ramp, plain, scale = panels(0, 1)
    ramp = pixels_of(ramp)
    assert ramp.shape == (120, 60, 3)
    assert ramp[60, 6, 2] > ramp[60, 6, 0] + 50 and ramp[60, 45, 0] > ramp[60, 45, 2] + 50
    # cells keep their edge; the first one's middle is the first pixel: half of it is seen
    assert np.abs(ramp[60, 2:13] - ramp[60, 2]).max() <= 1
    assert np.abs(ramp[60, 21:55] - ramp[60, 21]).max() <= 1
    # a frame without a map has its own colour, and a white hatch
    plain = pixels_of(plain)
    assert plain.shape == (120, 60, 3) and (np.ptp(plain, axis=2) == 0).all()
    own = (plain == 128).all(2)
    assert 0.5 < own.mean() < 0.98 and plain[~own].min() > 128
    assert axes_of(scale).get_ylim() == (0, 1)
    # maps of other sizes beside each other, on frames whose colour does not count
    grey = torch.randint(0, 256, (1, 3, 32, 16)).byte()
    same = grey.float().mean(1, keepdim=True).byte().expand(1, 3, -1, -1)
    sizes = [torch.rand(4, 2), torch.rand(8, 4)]
    for n in range(2):
        a, b = (pixels_of(common.overlays(f.expand(2, -1, -1, -1), sizes).panels(0, 1)[n])
                for f in (grey, same))
        assert np.abs(a - b).max() <= 1  # of rounding


def test_a_cell_lies_where_a_resnet_sees_it():
    """Cell (i, j) depends most on the pixels around (i H / h, j W / w): the middle of its part of
    the picture is there, but for the first ones."""
    # the strides of conv1, the pooling, layer2 and layer3
    layers = [torch.nn.Conv2d(1, 1, 7, 2, 3), *(torch.nn.Conv2d(1, 1, 3, 2, 1) for _ in range(3))]
    for layer in layers:
        torch.nn.init.ones_(layer.weight)
    pixels = torch.zeros(1, 1, 128, 64, requires_grad=True)
    torch.nn.Sequential(*layers)(pixels)[0, 0, 4, 2].backward()
    for dim, middle in ((1, 4 * 128 / 8), (0, 2 * 64 / 4)):
        weights = pixels.grad[0, 0].sum(dim)
        assert (weights * torch.arange(len(weights))).sum() / weights.sum() == middle


def ranges(drawn):
    """What stands beside the maps of each row."""
    return [axes_of(panels[-1]).get_ylim() for _, panels in drawn if panels]


def test_rows_of_two_networks_share_a_range():
    frames = torch.randint(0, 256, (3, 3, 32, 16), dtype=torch.uint8)
    low, high = torch.linspace(-2, 3, 8).view(4, 2), torch.linspace(4, 9, 8).view(4, 2)
    a = {"only a": common.overlays(frames, [low, low, None]),
         "both": common.overlays(frames, [None, low, low])}
    b = {"both": common.overlays(frames, [high, high, high])}
    drawn = compared(a=a, b=b)
    assert [label for label, _ in drawn] == ["a: both", "b: both", "a: only a"]
    assert ranges(drawn) == [(-2, 9), (-2, 9), (-2, 3)]
    drawn = compared(a=a)
    assert [label for label, _ in drawn] == ["only a", "both"] and ranges(drawn) == 2 * [(-2, 3)]
    # numbers that the range shall have
    limited = {"S": common.overlays(frames, [0.1 * high / 9, low.clamp(0, 0.2)], limits=(0, 1))}
    assert ranges(compared(a=limited)) == [(0, 1)]


def test_small_differences_are_not_stretched():
    """A range is 5 % of the mean size at least; below 1 % a row is a line that says so."""
    frames = torch.randint(0, 256, (1, 3, 32, 16), dtype=torch.uint8)

    def drawn(*values):
        return compared(a={"x": common.overlays(frames, [torch.tensor([values])])})
    assert ranges(drawn(0.9, 1.1)) == [pytest.approx((0.9, 1.1))]
    for values in ((0.99, 1.01), (-1.01, -0.99)):
        assert ranges(drawn(*values)) == [pytest.approx((np.mean(values) - 0.025,
                                                         np.mean(values) + 0.025))]
    for value in (0.0, 0.5, -7.0):
        (row,) = drawn(value, value * 1.001)
        assert row == (f"x: not drawn, because all values are about {value:.3g}", [])
    (row,) = compared(a={"T": common.bars(3 * [torch.ones(4)], "abc")})
    assert row == ("T: not drawn, because all values are about 1", [])


def test_bars_share_their_axis():
    charts = [torch.tensor([0.25, -2, 1.5]), torch.tensor([3.0, 1.0])]
    ((label, panels),) = compared(a={"x": common.bars(charts, ["one", "two"])})
    one, two = map(axes_of, panels)
    assert [bar.get_height() for bar in one.patches] == [0.25, -2, 1.5]
    assert one.get_ylim() == two.get_ylim() == pytest.approx((-2, 3.15))
    assert (one.get_title(), two.get_title()) == ("one", "two")
    assert [ax.yaxis.get_tick_params()["labelright"] for ax in (one, two)] == [False, True]
    assert all(x == round(x) for ax in (one, two) for x in ax.get_xticks())
    ((_, (panel,)),) = compared(a={"x": common.bars([torch.rand(40)], [""])})
    assert len(axes_of(panel).patches) == 40 and axes_of(panel).get_ylim()[0] == 0


def test_curves():
    ax = axes_of(common.curves({"a": {1: 5.0, 2: 2.5}, "b": {2: 7.0}}, 2, "epoch"))
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[1, 5], [2, 2.5]], [[2, 7]]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    assert all(x == round(x) for x in ax.get_xticks()) and ax.get_xlabel() == "epoch"


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
    panels = common.overlays(narrow, [torch.rand(4, 2)], ["a head"]).panels(0, 1)
    panels.append(common.photo(wide[0], color="red"))
    chart = common.bars([torch.rand(2)], ["stage 1"]).panels(0, 1)
    rows = [common.SheetRow(words, panels), common.SheetRow(words + ": not drawn", []),
            common.SheetRow("bars", chart)]
    common.save_sheet(words, rows, tmp_path / "a.png")
    figure, = drawn
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    assert len(texts) > 6 and all(t.get_fontsize() * figure.dpi / 72 >= 9 for t in texts)
    title = figure.get_suptitle()
    labels = [text for text in texts if text.get_text().split()[:2] in (["a", "long"], ["bars"])
              and text.get_text() != title]
    assert len(labels) == 3 and labels[0].get_text().count("\n") > 2
    labels = [text.get_window_extent() for text in labels]
    assert all(label.width < 600 for label in labels)
    frames = [ax.get_window_extent() for ax in figure.axes if ax.images]
    assert len(frames) == 2 and abs(frames[0].height - frames[1].height) < 1
    assert [round(frame.width / frame.height, 1) for frame in frames] == [0.5, 2]
    assert all(100 < frame.height < 150 for frame in frames)
    assert labels[0].x1 < frames[0].x0 and frames[0].x1 < frames[1].x0
    panels = [ax.get_tightbbox() for ax in figure.axes if ax.axison or ax.images]
    title = next(text for text in texts if text.get_text() == title).get_window_extent()
    boxes = [*panels, *labels, title]
    assert len(boxes) == 4 + 3 + 1
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    image = Image.open(tmp_path / "a.png")
    assert all(0 <= box.x0 and box.x1 <= image.width for box in boxes)
    assert all(0 <= box.y0 and box.y1 <= image.height for box in boxes)
    assert [*tmp_path.iterdir()] == [tmp_path / "a.png"]


# ----------------------------------------------------------------------------------------- --figure


def small_run(monkeypatch, root, folder, *flags):
    command = ["sinet.py", "--root", root, "--gpu", "cpu", *TINY, "--figure", folder, *flags]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    sinet.main()


def test_figure_writes_all_of_them(run, trained, tmp_path):
    command = "sinet.py", "--figure", "f", "--figure-tracklets", 2
    done = run(*command, "--resume", trained[0] / "last.pt")
    assert done.returncode == 0, done.stderr
    wrote = re.findall(r"^wrote f/(.*)$", done.stdout, re.M)
    end = "-ranked.png"
    people = [name.removesuffix(end) for name in wrote if name.endswith(end)]
    assert len(people) == 2 and all(re.fullmatch(r"query-\d+-person-\d+-camera-\d", p)
                                    for p in people)
    # the paper's pictures and the training before the test
    assert wrote == [*(p + ".png" for p in people), "training.png", *(p + end for p in people),
                     "cmc.png", "pca.png"]
    assert {path.name for path in (tmp_path / "f").iterdir()} == {*wrote}
    assert "epoch 1/" not in done.stdout
    for name in wrote:
        image = Image.open(tmp_path / "f" / name)
        assert min(image.size) > 250 and len(image.convert("RGB").getcolors(10**6)) > 10
        assert image.width < 830
    assert not (trained[0] / "f").exists()


def test_pictures_of_two_checkpoints_for_papers(monkeypatch, trained, tmp_path, small_root):
    """--beside: rows of both, above that of the same row; --figure-format; no test before."""
    last, seen = trained[0] / "last.pt", []
    state = torch.load(last, weights_only=True)
    state["args"]["variant"] = "base+idm"
    state["args"]["idms"] = 2
    state["model"] = sinet.build(types.SimpleNamespace(**state["args"]), 6).state_dict()
    torch.save(state, tmp_path / "b.pt")
    original = common.rows_with_common_ranges

    def compare(pictures):
        seen.append(pictures)
        return original(pictures)
    monkeypatch.setattr(common, "rows_with_common_ranges", compare)

    def no_test(*_, **__):
        raise UserError("the test")
    monkeypatch.setattr(common, "tracklet_features", no_test)
    flags = ("--resume", last, "--figure-tracklets", 1, "--figure-format")
    for format, first in (("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")):
        folder = tmp_path / format
        with pytest.raises(UserError, match="the test"):
            small_run(monkeypatch, small_root, folder, *flags, format, "--beside",
                      tmp_path / "b.pt")
        files = sorted(folder.iterdir())
        assert [file.suffix for file in files] == 2 * ["." + format]
        assert files[1].name == f"training.{format}"
        assert all(file.read_bytes().startswith(first) for file in files)
    assert [picture.name for picture in seen[0]] == ["base+idm", "base"]
    label = "last map of each frame, divided by its mean"
    assert [label for label, _ in original(seen[0])] == [f"base+idm: {label}", f"base: {label}"]
    assert not torch.equal(*(picture.rows[label].values[0] for picture in seen[0]))
    small = sinet.load(last).state_dict()
    for change, says in (({"height": 64}, "is for 4 frames of 64x40, not for 4 of 48x40"),
                         ({"frames": 8}, "is for 8 frames"), ({"frames": 1}, "the test")):
        args = {**state["args"], "idms": 0, **change}
        torch.save({**state, "args": args, "model": small}, tmp_path / "c.pt")
        with pytest.raises(UserError, match=says):
            small_run(monkeypatch, small_root, tmp_path / "g", *flags, "png", "--beside",
                      tmp_path / "c.pt")
    with pytest.raises(UserError, match="none.pt: no such file"):
        small_run(monkeypatch, small_root, tmp_path / "g", *flags, "png", "--beside", "none.pt")


@pytest.fixture
def colours(monkeypatch):
    """A small network in SINet's place, of which there is no picture."""
    monkeypatch.setattr(sinet, "build", lambda args, num_classes: Colours(num_classes))
    monkeypatch.setattr(sinet, "picture", lambda *_: ("title", {}))


@pytest.fixture
def sheets(monkeypatch, colours):
    """What the stubbed `save_sheet` is given, {file name: rows}."""
    found = {}

    def sheet(title, rows, path, height=1.2):
        found[path.name] = rows
    monkeypatch.setattr(common, "save_sheet", sheet)
    return found


def test_ranked_list_is_the_metrics(monkeypatch, small_root, tmp_path, sheets):
    """Its entries are the ranking of which match_ranks takes the matches: without the query's
    identity under its own camera. The first right one is shown wherever it stands."""
    monkeypatch.setattr(common, "photo", lambda image, *_, **look: look)
    dataset = load_dataset("synthetic", small_root)
    torch.manual_seed(0)
    model = Colours(dataset.num_identities)
    q, g = common.tracklet_features(model, dataset, split_clips=sinet.SPLIT, clip_length=4,
                                    size=(48, 40))
    q = torch.cat([q[1:], -q[:1]])  # bad features
    monkeypatch.setattr(common, "tracklet_features", lambda *_, **__: (q, g))
    small_run(monkeypatch, small_root, tmp_path / "f", "--figure-tracklets", 100)
    d = torch.cat([block for _, block in common.distance_blocks(q, g, sinet.METRIC)]).numpy()
    ranks = common.match_ranks(d, *dataset.ids())
    lists = {name: rows for name, rows in sheets.items() if name.endswith("-ranked.png")}
    assert len(lists) == len(dataset.query)
    late = 0
    for i, (t, places) in enumerate(zip(dataset.query, ranks), 1):
        rows = lists[f"query-{i}-person-{t.pid}-camera-{t.cam}-ranked.png"]
        assert rows[0][0] == f"query: person {t.pid}, camera {t.cam}"
        shown = sorted({*range(8), places[0]})
        assert len(rows) == 1 + len(shown)
        if places[0] >= 8:
            late += 1
            assert rows[-1][0].startswith(f"{places[0] + 1}. right, the first match, ")
        assert not any(f"person {t.pid}, camera {t.cam}" in label for label, _ in rows[1:])
        for place, (label, panels) in zip(shown, rows[1:]):
            is_right = place in places
            assert label.startswith(f"{place + 1}. " + ("right, " if is_right else "wrong, "))
            assert panels[0]["color"] == ("green" if is_right else "red")
    assert late
    own = {name.replace("-ranked", "") for name in lists}
    assert set(sheets) - set(lists) - own == {"cmc.png", "pca.png"}  # untrained: no training.png


def test_charts(monkeypatch, small_root, tmp_path, sheets):
    """The CMC, the losses of whole epochs, and each tracklet of ten people once in the PCA."""
    network = Colours(5)
    dataset = load_dataset("synthetic", small_root)
    args = types.SimpleNamespace(
        figure=tmp_path / "f", figure_tracklets=1, frames=4, height=48, width=40, variant="v",
        data="synthetic", rerank=True, beside=None, figure_format="png",
    )
    history = [{"epoch": n, "lr": 1, "loss": 9 / n, "xent": 5 / n, "mAP": "", "rank-1": ""}
               for n in (1, 2, 3)]
    run = types.SimpleNamespace(
        args=args, device=torch.device("cpu"), history=history, before_training={},
        extract_options={"batch_size": 4}, size=(48, 40), origin="after epoch 3",
    )
    draw = functools.partial(
        common.figures, run, network, dataset, split=sinet.SPLIT, metric="euclidean",
        picture=sinet.picture, load=sinet.load,
    )
    draw()
    q, g = common.tracklet_features(network, dataset, split_clips=sinet.SPLIT, clip_length=4,
                                    size=(48, 40))
    ids = dataset.ids()
    cmc, mean_ap, _ = common.cmc_and_map(common.rerank(q, g, "euclidean"), *ids)
    (label, (panel,)), = sheets["cmc.png"]
    line, = axes_of(panel).lines
    assert f"mAP {100 * mean_ap:.1f}" in line.get_label()
    assert line.get_ydata() == pytest.approx(100 * cmc)
    # not tested yet: the losses alone
    (label, (panel,)), = sheets["training.png"]
    loss, xent = axes_of(panel).lines
    assert (loss.get_label(), xent.get_label()) == ("loss", "xent")
    assert loss.get_xydata().tolist() == [[1, 9], [2, 4.5], [3, 3]]
    assert xent.get_xydata().tolist() == [[1, 5], [2, 2.5], [3, 5 / 3]]
    # queries, which are in the gallery, too, once and with an edge; a colour a person
    ax = axes_of(sheets["pca.png"][0][1][0])
    people = sorted({t.pid for t in dataset.query})
    cams = sorted({t.cam for t in dataset.query})
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    people_and_cameras = [*(f"person {p}" for p in people), *(f"camera {c}" for c in cams)]
    assert names == [*people_and_cameras, "black edge: a query"]
    points = [line for line in ax.lines if len(line.get_xdata())]
    shown = {t.frames[0]: t for t in dataset.gallery + dataset.query if t.pid in people}
    assert len(points) == len(shown) < len(dataset.query) + len(dataset.gallery)
    asked = [line for line in points if line.get_markeredgecolor() == "black"]
    assert len(asked) == len(dataset.query)
    assert len({line.get_color() for line in points}) == len(people) == 4
    assert len({line.get_marker() for line in points}) == len(cams) == 2
    history[1].update({"mAP": 50.0, "rank-1": 60.0})
    draw()
    (_, (panel,)) = sheets["training.png"][1]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes_of(panel).lines}
    assert lines == {"mAP": [[2, 50]], "rank-1": [[2, 60]]}
    run.before_training = {"mAP": 20.0, "rank-1": 30.0}  # the first dot
    draw()
    (label, (panel,)) = sheets["training.png"][1]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes_of(panel).lines}
    assert lines == {"mAP": [[0, 20], [2, 50]], "rank-1": [[0, 30], [2, 60]]}
    assert "before the training" in label and axes_of(panel).get_xlim()[0] < 0
    sheets.clear()
    args.figure = tmp_path / "g"
    monkeypatch.setattr(common, "tracklet_features", lambda *_, **__: (q, g))
    monkeypatch.setattr(common, "process_rank", lambda: 1)
    draw()
    assert not sheets  # the first process draws


def test_titles_say_how_long_a_network_was_trained(monkeypatch, small_root, tmp_path, colours):
    """A picture outlives the command that drew it: maps of an untrained network are called so."""
    titles = {}

    def sheet(title, rows, path, *_):
        titles[path.stem] = title

    monkeypatch.setattr(common, "save_sheet", sheet)
    flags = ("--figure-tracklets", 1)
    small_run(monkeypatch, small_root, tmp_path / "f", *flags)
    own, ranked = (titles.pop(name) for name in sorted(titles) if name.startswith("query"))
    assert own == "title; sinet, untrained, on synthetic"
    assert ranked == "Ranked list; sinet on synthetic, untrained"
    assert titles == {"cmc": "CMC; sinet on synthetic, untrained",
                      "pca": "PCA; sinet on synthetic, untrained"}
    command = ["sinet.py", "--root", small_root, "--gpu", "cpu", *TINY, "--epochs", 1]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--output", str(tmp_path / "a")])
    sinet.main()
    last = tmp_path / "a/last.pt"
    two = ("--beside", last)
    for beside, names in (((), "sinet, {}"), (two, "sinet, after epoch 1 and sinet, {}")):
        for resume, state in (((), "untrained"), (("--resume", last), "after epoch 1")):
            titles.clear()
            small_run(monkeypatch, small_root, tmp_path / "f", *flags, *resume, *beside)
            own = titles[min(name for name in titles if name.startswith("query"))]
            assert own == f"title; {names.format(state)}, on synthetic"
            assert titles["cmc"] == f"CMC; sinet on synthetic, {state}"


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
    says = "last.pt: was written by .* settings: --pool. Give them as flags, w"
    with pytest.raises(UserError, match=says):
        script.load(tmp_path / "last.pt")
    loaded = script.load(tmp_path / "last.pt", pool=args.pool)
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
            script.load(tmp_path / path, pool=args.pool)


def test_load_of_a_run(trained, small_root):
    """The features are those of the run's own evaluation."""
    model = sinet.load(trained[0] / "last.pt")
    dataset = load_dataset("synthetic", small_root)
    assert model.args.variant == "base" and model.args.root == str(small_root)
    result = common.evaluate(model, dataset, split_clips=sinet.SPLIT, clip_length=4,
                             size=(48, 40), metric=sinet.METRIC)
    logged = read_log(trained[0])[-1]
    assert [f"{result[key]:.4f}" for key in ("mAP", "rank-1")] == [
        f"{float(logged[key]):.4f}" for key in ("mAP", "rank-1")]


# ------------------------------------------------------------------------------------- --complexity

FIRST = {
    "bicnet_tks": "29,291,648",
    "m3d": "48,250,972",
    "sinet": "29,565,046",
    "strf": "24,253,504",
    "tclnet": "30,070,848",
}


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_complexity(name, monkeypatch, capsys):
    """Of the first rows, one with a value of the paper and the last; test_complexity.py has all."""
    script = importlib.import_module(name)
    names = [*script.ROWS]
    names = [*dict.fromkeys([*names[:2], [*counting.with_printed_costs(name)][-1], names[-1]])]
    rows = {row: common.row_of(script.ROWS, row) for row in names}
    monkeypatch.setattr(script, "ROWS", rows)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--complexity"])
    script.main()
    says, table = capsys.readouterr().out.split("\n\n")
    assert "without neck, classifier and projection" in says and "|" not in says
    table = table.splitlines()
    assert len(table) == 2 + len(rows) and len({len(line) for line in table}) == 1
    assert all(set(cell) == {"-"} for cell in cells_of(table[1]))
    head, _, *lines = map(cells_of, table)
    assert head == ["variant", "clip", "parameters", "GFLOPs per clip", "per frame", "in the paper"]
    for cells, (row, given) in zip(lines, rows.items()):
        args, parameters, _, macs, _ = counting.cost(name, row)
        paper = [f"{value} {common.COSTS[cost]}" for cost, value in given.costs.items()]
        assert cells == [
            row,
            f"{args.frames}x{args.height}x{args.width}",
            f"{parameters:,}",
            f"{macs / 1e9:.3f}",
            f"{macs / args.frames / 1e9:.3f}",
            ", ".join(paper),
        ]
    assert lines[0][2] == FIRST[name] and any(cells[5] for cells in lines)
