"""The scripts repeat what the papers do not touch, and their classes can be copied: held so."""

import ast
import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from common import settings

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(ROOT.glob("*.py"))
SCRIPTS = [file for file in FILES if file.name not in ("common.py", "data.py")]
PARTS = {  # in the order of the files
    "resnet50": "the network",
    "loss_weights": "the weights in the objective",
    "losses": "the objective",
    "RECIPE": "the recipe",
    "SAMPLER": "batches",
    "SAMPLE": "training clips",
    "SPLIT": "clips of the test",
    "METRIC": "distance of the test",
    "ROWS": "the rows",
    "RELEASE": "trained weights of the authors",
    "build": "the network of a row",
    "make_optimizer": "the optimiser",
    "train": "the training loop",
    "load": "a trained network",
    "main": "the command line",
    "picture": "the picture",
}
MARK = "  # same in every script"
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)


def marked(script):
    """The marked top-level functions and blocks, {name: (code without comments, lines)}."""
    text = script.read_text()
    lines, nodes, found = text.splitlines(), ast.parse(text).body, {}
    for node in nodes:
        if lines[node.lineno - 1].endswith(MARK):
            length = node.end_lineno - node.lineno + 1
            code = ast.dump(node).replace("'train_in_stages'", "'train'")  # M3D's main calls this
            found[getattr(node, "name", "__main__")] = code, length
    assert len(found) == text.count(MARK), f"{script.name}: a mark stands where it means nothing"
    return found


def imported(script):
    """The names that a script takes from common and data."""
    nodes = ast.walk(ast.parse(script.read_text()))
    return {
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module in ("common", "data")
        for alias in node.names
    }


def test_there_are_five_scripts():
    names = {"bicnet_tks.py", "m3d.py", "sinet.py", "strf.py", "tclnet.py"}
    assert {script.name for script in SCRIPTS} == names


@each_script
def test_the_same_in_every_script(script):
    reference, mine = marked(ROOT / "sinet.py"), marked(script)
    assert set(mine) == set(reference) >= {"resnet50", "train", "main", "__main__"}
    for name in reference:
        same = mine[name][0] == reference[name][0]
        assert same, f"{name} differs between sinet.py and {script.name}"
    nodes = ast.parse(script.read_text()).body
    names = [getattr(node, "name", None) for node in nodes]
    for i, node in enumerate(nodes):
        if isinstance(node, ast.Assign):
            names[i] = ast.unparse(node.targets[0])
    assert [name for name in names if name in PARTS] == list(PARTS)
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    for node in functions:  # whatever is the same in all is marked
        everywhere = all(ast.dump(node) in _dumps(s) for s in SCRIPTS)
        assert not everywhere or node.name in mine, f"{node.name} is not marked"


@functools.cache
def _dumps(script):
    return {ast.dump(node) for node in ast.parse(script.read_text()).body}


@each_script
def test_a_script_stands_alone(script):
    text = script.read_text()
    nodes = list(ast.walk(ast.parse(text)))
    modules = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
    allowed = {"torch", "torchvision", "numpy", "common", "data"}
    assert modules - set(sys.stdlib_module_names) <= allowed
    assert ".cuda(" not in text
    assert len(imported(script)) <= 20


@pytest.mark.parametrize(
    "file", [*FILES, *sorted((ROOT / "tests").glob("*.py"))], ids=lambda f: f.name
)
def test_at_most_100_columns_and_one_statement_a_line(file):
    text = file.read_text()
    wide = [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 100]
    assert not wide, f"{file.name}: lines {wide} have more than 100 columns"
    seen = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt) and not hasattr(node, "names"):
            assert node.lineno not in seen, f"{file.name}:{node.lineno}: two statements"
            seen.add(node.lineno)


def copied(script, name):
    """The class of this name with the classes, functions and constants above it that it names, run
    in an empty module as someone would who copies it."""
    nodes, wanted = ast.parse(script.read_text()).body, {name}
    kept = []
    for node in reversed(nodes):
        own = getattr(node, "name", None)
        if isinstance(node, ast.Assign):
            own = ast.unparse(node.targets[0])
        if own in wanted:
            kept.append(node)
            wanted |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    standard = [
        node
        for node in nodes
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and getattr(node, "module", node.names[0].name).split(".")[0] in sys.stdlib_module_names
    ]
    module = ast.Module([*standard, *reversed(kept)], [])
    space = {"torch": torch, "nn": nn, "F": F, "torchvision": torchvision, "__name__": "copied"}
    exec(compile(module, script.name, "exec"), space)
    return space[name]


# what each class is built with, and what it takes: maps (B, T, C, H, W) unless said
MAPS = (2, 4, 64, 8, 4)
FRAMES = (8, 64, 8, 4)
CLIPS = (2, 4, 3, 64, 64)
CONV = nn.Conv2d(64, 64, 3, 1, 1, bias=False)
POINT = nn.Conv2d(64, 32, 1, bias=False)


def tse(c):
    return c(
        nn.Identity(),
        [nn.Identity(), nn.Identity()],
        channels=64,
        feature_size=64,
        erased_block=(2, 4),
    )


COPIED = {
    "bicnet_tks": {
        "CrossScalePath": (lambda c: c(64, alpha=3), [(2, 1, 64, 8, 4), (2, 3, 64, 4, 2)]),
        "DiverseAttentionsOperation": (lambda c: c(64, 4, 8, 4), [MAPS]),
        "TemporalKernelSelection": (lambda c: c(64), [MAPS]),
        "BranchBatchNorm": (lambda c: c(nn.BatchNorm2d(64), 2), [FRAMES]),
        "BiCnet": (lambda c: c(5, 4, 64, 64), [CLIPS]),
    },
    "m3d": {
        "M3DLayer": (lambda c: c(CONV, 4), [FRAMES]),
        "ResidualAttentionLayer": (lambda c: c(64, 4), [MAPS]),
        "InflatedConv": (lambda c: c(CONV, 4), [FRAMES]),
        "P3DConv": (lambda c: c(CONV, 4, "c"), [FRAMES]),
        "Stream": (lambda c: c(4, layer="m3d", ral="sct"), [CLIPS]),
        "TwoStreamM3D": (lambda c: c(5, 4), [CLIPS]),
    },
    "sinet": {
        "ChannelAttentionLayer": (lambda c: c(64), [MAPS]),
        "KernelGenerationModule": (lambda c: c(64), [MAPS]),
        "SuppressOperation": (lambda c: c(), [MAPS, (2, 9, 64)]),
        "CrossPropagationModule": (lambda c: c(), [MAPS, MAPS, MAPS]),
        "SalientToBroadModule": (lambda c: c(64, 2), [MAPS]),
        "IntegrationDistributionModule": (lambda c: c(64, 4, 8, 4), [MAPS]),
        "NonLocalBlock": (lambda c: c(64), [MAPS]),
        "GlobalContextBlock": (lambda c: c(64), [MAPS]),
        "SINet": (lambda c: c(5, 4, 64, 64), [CLIPS]),
    },
    "strf": {
        "FeatureFactorizationModule": (lambda c: c([Products()]), [MAPS]),
        "FactorizedAttentionMask": (lambda c: c(64, dimension="s", resolution=3), [MAPS]),
        "SelfProductMask": (lambda c: c(), [MAPS]),
        "STRF": (lambda c: c(64), [MAPS]),
        "InflatedConv": (lambda c: c(CONV, 4), [FRAMES]),
        "P3DConv": (lambda c: c(CONV, 4, "c"), [FRAMES]),
        "NonLocalBlock": (lambda c: c(64), [MAPS]),
        "STRFNet": (lambda c: c(5, 4), [CLIPS]),
    },
    "tclnet": {
        "CorrelationLayer": (lambda c: c(64, 32), [(2, 64, 8, 4), (2, 3, 32)]),
        "BlockBinarization": (lambda c: c((2, 4)), [(2, 3, 8, 4)]),
        "SaliencyErasingOperation": (
            lambda c: c(64, 32, erased_block=(2, 4)),
            [(2, 64, 8, 4), (2, 3, 32)],
        ),
        "TemporalSaliencyErasing": (tse, [MAPS]),
        "TemporalSaliencyBoosting": (lambda c: c(64), [MAPS]),
        "NonLocalBlock": (lambda c: c(64), [MAPS]),
        "TemporalConv": (lambda c: c(POINT, 4), [FRAMES]),
        "TCLNet": (lambda c: c(5, 4, 64, 64), [CLIPS]),
    },
}


class Products(nn.Module):
    """A mask for FeatureFactorizationModule: (B, H W, H W)."""

    def forward(self, f):
        f = f.movedim(2, 4).flatten(2, 3).transpose(1, 2).flatten(2)
        return (f @ f.transpose(1, 2)).softmax(1)


def modules_of(script):
    nodes = ast.parse(script.read_text()).body
    return [n.name for n in nodes if isinstance(n, ast.ClassDef) and "nn.Module" in ast.unparse(n)]


@pytest.mark.parametrize(
    "script, name",
    [(s, n) for s in SCRIPTS for n in modules_of(s)],
    ids=lambda v: getattr(v, "name", v),
)
def test_a_class_runs_when_copied(script, name, one_backbone):
    make, shapes = COPIED[script.stem][name]
    inputs = [torch.rand(shape) for shape in shapes]
    torch.manual_seed(0)
    out = make(copied(script, name)).eval()(*inputs)
    torch.manual_seed(0)
    expected = make(getattr(importlib.import_module(script.stem), name)).eval()(*inputs)
    torch.testing.assert_close(out, expected, atol=0, rtol=0)


@each_script
def test_the_blocks_keep_channels_last(script, one_backbone):
    """No module between the blocks leaves their maps, or the gradients, in another layout: it would
    cost a copy of every map behind it."""
    module = importlib.import_module(script.stem)
    row, size = [*module.ROWS][0], {"height": 64, "width": 64}
    args = settings(module.RECIPE, module.ROWS, row, weights="none", **size)
    net = module.build(args, 5).train()
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):  # as Run.prepare does
            layer.to(memory_format=torch.channels_last)
    found = []

    def note(x):
        found.append(x.is_contiguous(memory_format=torch.channels_last))

    def hook(block, inputs):
        note(inputs[0])
        inputs[0].register_hook(note)

    blocks = [m for m in net.modules() if isinstance(m, torchvision.models.resnet.Bottleneck)]
    for block in blocks:
        block.register_forward_pre_hook(hook)
    outputs = net(torch.rand(2, args.frames, 3, 64, 64))
    streams = outputs.values() if isinstance(outputs, dict) else [outputs]
    sum(embedding.sum() + logits.sum() for embedding, logits, *_ in streams).backward()
    assert len(found) >= 2 * len(blocks) >= 32 and all(found)
