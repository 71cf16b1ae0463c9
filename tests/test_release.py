"""Against the authors' code: the networks that SINet's authors offer for download, and AP3D's,
whose baselines are those of STRF's paper. tests/releases holds names, shapes and results; the
weights are made by a rule from the names."""

import argparse
import copy
import functools
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import data
import sinet
import strf

FOLDER = Path(__file__).parent / "releases"


def value(key, shape):
    """The entry of this name in a made state_dict, float64."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    last = key.rsplit(".", 1)[1]
    if last == "num_batches_tracked":
        return np.array(100)
    if last == "running_mean":
        return 0.1 * rng.standard_normal(shape)
    if last == "running_var":
        return 0.5 + rng.random(shape)
    if len(shape) > 1:
        return rng.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
    if last == "weight":
        return 0.3 + 0.4 * rng.random(shape)
    return 0.1 * rng.standard_normal(shape)


@functools.cache
def made(family, name):
    """The state_dict of a network of "sinet" or "ap3d"."""
    shapes = json.loads((FOLDER / f"{family}_keys.json").read_text())[name]
    return {key: torch.from_numpy(np.asarray(value(key, shape))) for key, shape in shapes.items()}


def made_clips(count):
    """Normalised clips (count, 4, 3, 256, 128), float64."""
    rng = np.random.default_rng(0)
    coarse = rng.standard_normal((count, 1, 3, 32, 16))
    coarse = coarse + 0.5 * rng.standard_normal((count, 4, 3, 32, 16))
    return torch.from_numpy(coarse.repeat(8, -2).repeat(8, -1))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """released(name) -> a file as SINet's release saves it."""
    folder = tmp_path_factory.mktemp("release")

    @functools.cache
    def file(name):
        path = folder / f"{name}.pth.tar"
        content = {"state_dict": made("sinet", name), "epoch": np.uint64(160),
                   "rank1": np.float64(0.909)}
        torch.save(content, path)
        return path

    return file


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


NETWORKS = {"sinet": "sinet", "sbnet": "base+sbm", "idnet": "base+idm"}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_released_network_gives_its_authors_embeddings(released, name, two_threads):
    expected = torch.from_numpy(np.load(FOLDER / "sinet_embeddings.npz")[name])
    model = sinet.load(released(name))
    assert (model.args.variant, model.args.release) == (NETWORKS[name], True)
    clips = made_clips(2)
    with torch.no_grad():
        torch.testing.assert_close(model(clips), expected, atol=1e-9, rtol=0)
        single = model.float()(clips.float())
    torch.testing.assert_close(single.double(), expected, atol=1e-4, rtol=0)


def changed_idm(**layers):
    """A change of every IDM of a network: these of its layers become identities."""

    def change(model):
        for module in model.modules():
            if isinstance(module, sinet.IntegrationDistributionModule):
                for name in layers:
                    setattr(module, name, torch.nn.Identity())

    return change


def without_biases(kind, *names):
    def change(model):
        for module in model.modules():
            if isinstance(module, kind):
                for name in names:
                    getattr(module, name).bias.data.zero_()

    return change


def with_attribute(kind, name, new):
    def change(model):
        for module in model.modules():
            if isinstance(module, kind):
                setattr(module, name, new)

    return change


def padded_stem(model):
    model.stem[3].padding = 1


def forget_the_folded_biases(model):
    mean = made("sinet", "sinet")["layer1.0.bn1.running_mean"]
    model.layer1[0].bn1.running_mean.copy_(mean)


def average(model):
    model.pool = "avg"


IDM, CAL = sinet.IntegrationDistributionModule, sinet.ChannelAttentionLayer
DIFFERENCES = {
    "biases of the backbone": forget_the_folded_biases,
    "stem": padded_stem,
    "IDM's first BatchNorm": changed_idm(bn_g=None),
    "IDM's second BatchNorm": changed_idm(bn_l=None),
    "IDM's ReLU": changed_idm(relu=None),
    "IDM's bias of L^D": without_biases(IDM, "l_d"),
    "IDM's bias of G^D": without_biases(IDM, "g_d"),
    "SE's biases": without_biases(CAL, "squeeze", "excite"),
    "Eq. 3 as printed": with_attribute(sinet.SuppressOperation, "scale", "none"),
    "Eq. 3 over the channels": with_attribute(sinet.SuppressOperation, "scale", "window+channels"),
    "CPM's means": with_attribute(sinet.CrossPropagationModule, "release", False),
    "maximum pooling": average,
}


@pytest.fixture(scope="module")
def released_sinet(released):
    return sinet.load(released("sinet")).float()


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_every_difference_of_the_release_matters(released_sinet, difference):
    """Each of them left out moves the embedding by more than 1e-3 of its size, and by a multiple of
    what the comparison allows."""
    expected = torch.from_numpy(np.load(FOLDER / "sinet_embeddings.npz")["sinet"])[:1]
    model = copy.deepcopy(released_sinet)
    DIFFERENCES[difference](model)
    with torch.no_grad():
        moved = (model(made_clips(2)[:1].float()).double() - expected).abs()
    assert moved.max() > 1e-2 and moved.mean() > 1e-3 * expected.abs().mean()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step_is_that_of_the_authors(released, name, two_threads, request):
    """The losses of two steps; of one in two of the networks, where not all rows are asked for,
    because a step in float64 takes long."""
    model = sinet.load(released(name)).train()
    optimizer = sinet.make_optimizer(
        model, argparse.Namespace(**{**vars(model.args), "lr": 3e-4, "weight_decay": 5e-4})
    )
    clips, pids = made_clips(4), torch.tensor([3, 3, 5, 5])
    expected = np.load(FOLDER / "sinet_steps.npz")[name]
    steps = 2 if name == "sinet" or request.config.getoption("--all-rows") else 1
    for step, tolerance in zip(range(steps), (1e-6, 1e-4)):
        parts = sinet.losses(model(clips), pids, model.args)
        got = [float(parts[key].detach()) if key in parts else 0.0
               for key in ("xent", "triplet", "mi")]
        np.testing.assert_allclose(got, expected[step], atol=tolerance, rtol=0)
        if step + 1 < steps:
            optimizer.zero_grad()
            sum(parts.values()).backward()
            optimizer.step()


AP3D = {"i3d": "i3d", "p3d-a": "p3da", "p3d-b": "p3db", "p3d-c": "p3dc"}


def as_ours(key):
    """The name in strf.py of an entry of AP3D's networks."""
    parts = {"conv1": "stem.0", "bn1": "stem.1", "bn": "neck", "classifier": "classifier"}
    layer, _, kind = key.rpartition(".")
    inner = {"conv3d": "conv", "spatial_conv3d": "spatial", "temporal_conv3d": "temporal"}
    start, _, last = layer.rpartition(".")
    layer = f"{start}.{inner[last]}" if last in inner else parts.get(layer, layer)
    return f"{layer}.{kind}"


@pytest.mark.parametrize("name", AP3D)
def test_strf_baselines_are_those_of_ap3d(name, two_threads):
    args = common.settings(strf.RECIPE, strf.ROWS, AP3D[name], frames=4, weights="none")
    model = strf.build(args, 625).double().eval()
    state, own = {}, model.state_dict()
    for key, entry in made("ap3d", name).items():
        state[as_ours(key)] = entry.view_as(own[as_ours(key)])
    model.load_state_dict(state)
    expected = torch.from_numpy(np.load(FOLDER / "ap3d_embeddings.npz")[name])
    with torch.no_grad():
        torch.testing.assert_close(model(made_clips(2)), expected, atol=1e-9, rtol=0)
    assert args.pool == "max"


# ---------------------------------------------------------------- files, as a user has them


def test_older_files_and_other_contents(released, refuses, small_root, tmp_path):
    """As torch.save wrote before it wrote zip files; with NumPy's number of either version."""
    content = torch.load(released("idnet"), weights_only=False)
    file = tmp_path / "idnet.pth.tar"
    torch.save(content, file, _use_new_zipfile_serialization=False)
    written = file.read_bytes()
    file.write_bytes(written.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert len(file.read_bytes()) < len(written)  # as NumPy 1 names it
    assert sinet.load(file).args.variant == "base+idm"

    evaluate = ["--evaluate", "--data", "synthetic", "--root", small_root, "--resume", file]
    refuses(evaluate, str(file), "not a checkpoint of tclnet.py", script="tclnet.py")
    content["state_dict"]["layer2.2.thw_reduction.0.weight"] = torch.zeros(3, 5, 1, 1)
    torch.save(content, file)
    refuses(evaluate, str(file), "does not fit")
    del content["state_dict"]["layer3.0.conv1.bias"]
    content["state_dict"]["layer2.2.thw_reduction.1.running_mean"] = torch.zeros(7)
    torch.save(content, file)
    refuses(evaluate, str(file), "its tensors have other names or shapes")


def test_a_released_network_in_other_wrappers(released):
    """With the prefix of several GPUs, or in another dictionary, as people save it again."""
    state = made("sinet", "idnet")
    (plain,) = [sinet.RELEASE.to_checkpoint({"state_dict": state}, "sinet.py")]
    parallel = {f"module.{name}": value for name, value in state.items()}
    for file in (state, parallel, {"state_dict": parallel}, {"model": {"net": parallel}}):
        found = sinet.RELEASE.to_checkpoint(file, "sinet.py")
        assert found["args"] == plain["args"] and found["model"].keys() == plain["model"].keys()
    assert sinet.RELEASE.to_checkpoint({"state_dict": {"a.b": torch.zeros(3)}}, "sinet.py") is None
    for file in ({}, {1: torch.zeros(3)}, {"state_dict": {("a", 2): torch.zeros(3)}}, {"model": 3}):
        assert sinet.RELEASE.to_checkpoint(file, "sinet.py") is None


def test_nothing_in_a_file_is_executed(refuses, tmp_path):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    torch.save({"state_dict": {}, "rank1": Harm()}, tmp_path / "harmful.pth.tar")
    refuses(["--evaluate", "--resume", tmp_path / "harmful.pth.tar"], "not a readable checkpoint")
    assert not (tmp_path / "harm").exists()
    objects = np.array([Path("x")], dtype=object)[0:1]
    torch.save({"state_dict": {}, "rank1": objects}, tmp_path / "objects.pth.tar")
    refuses(["--evaluate", "--resume", tmp_path / "objects.pth.tar"], "not a readable checkpoint")


def test_settings_that_a_released_network_does_not_have(released, refuses):
    evaluate = ["--evaluate", "--data", "mars", "--resume", released("idnet")]
    refuses([*evaluate, "--reduction", 4],
            "was trained with --reduction 16, not with --reduction 4")
    refuses([*evaluate, "--variant", "base"], "--variant base+idm, not with --variant base")
    refuses([*evaluate, "--no-release"], "was trained with --release")
    refuses(["--data", "mars", "--resume", released("idnet")], "contains only the network",
            "--init")
    start = ["--data", "mars", "--init", released("idnet")]
    refuses([*start, "--variant", "sinet"], "--variant base+idm; leave out --variant sinet")
    refuses([*start, "--idms", 3], "--idms 2; leave out --idms 3")


def test_a_released_network_is_used_like_one_of_ours(released, run, small_root, tmp_path):
    """Evaluated, exported and drawn by the command line, and trained further on own people."""
    small = ["--data", "synthetic", "--root", small_root, "--height", 64, "--width", 48]
    done = run("sinet.py", *small, "--export", "out", "--resume", released("sbnet"))
    assert done.returncode == 0, done.stderr
    assert "the authors' release" in done.stdout and "untrained" not in done.stdout
    model = sinet.load(released("sbnet")).float()
    dataset = data.load_dataset("synthetic", small_root)
    with torch.no_grad():
        q, _ = common.tracklet_features(model, dataset, split_clips=sinet.SPLIT, clip_length=4,
                                        size=(64, 48))
    saved = np.load(tmp_path / "out/features.npz")["query_features"]
    np.testing.assert_allclose(saved, q.numpy(), atol=1e-5)

    done = run("sinet.py", *small, "--figure", "pictures", "--figure-tracklets", 1, "--resume",
               released("sbnet"))
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "pictures").glob("query-*.png"))


def test_a_training_starts_from_a_released_network(released, run, small_root, tmp_path):
    part = small_root / "synthetic/bbox_train"
    for person in sorted(part.iterdir())[:3]:
        for frame in sorted(person.iterdir()):
            name = frame.name  # 0001C1T0001F001.jpg
            for kind, pid in ("train", name[:4]), ("gallery", f"test{name[:4]}"):
                to = tmp_path / "mine" / kind / pid / name[4:6] / name[6:11] / name
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(frame.read_bytes())
    done = run("sinet.py", "--data", "folder", "--root", "mine", "--init", released("sbnet"),
               "--epochs", 1, "--ids", 2, "--clips", 2, "--height", 64, "--width", 48)
    assert done.returncode == 0, done.stderr
    assert "keeps its initialisation: classifier" in done.stdout
    model = sinet.load(tmp_path / "runs/sinet-folder-base+sbm/last.pt")
    assert model.args.release and model.classifier.out_features == 3
    assert model.args.lambda2 == 0.001
