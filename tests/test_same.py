"""The scripts repeat what the papers do not touch; this holds the repetition equal."""
import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(set(ROOT.glob("*.py")) - {ROOT / "common.py", ROOT / "data.py"})
MARK = "  # same in every script"


def parts(script):
    """The marked top-level functions and blocks, {name: code without comments}, and all top-level names in order."""
    text = script.read_text()
    lines, nodes = text.splitlines(), ast.parse(text).body
    marked = {getattr(node, "name", "__main__"): ast.dump(node) for node in nodes if lines[node.lineno - 1].endswith(MARK)}
    assert len(marked) == text.count(MARK), f"{script.name}: a mark stands where it means nothing"
    names = [node.name if hasattr(node, "name") else ast.unparse(node.targets[0]) for node in nodes if hasattr(node, "name") or isinstance(node, ast.Assign)]
    return marked, names


def test_there_are_scripts():
    assert len(SCRIPTS) >= 3 and {"sinet.py", "tclnet.py", "bicnet_tks.py"} <= {s.name for s in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_the_same_in_every_script(script):
    marked, names = parts(script)
    reference, reference_names = parts(ROOT / "sinet.py")
    assert set(marked) == set(reference) >= {"resnet50", "parse_args", "train_epoch", "main", "run", "__main__"}
    for name in reference:
        assert marked[name] == reference[name], f"{name} differs between sinet.py and {script.name}"
    shared = [name for name in reference_names if name in names]  # the rest of the frame, in the same order
    assert shared == [name for name in names if name in reference_names]
    assert {"VARIANTS", "COLUMNS", "ROW_RECIPE", "(PRINTED, HEADS)", "objective", "picture", "(SAMPLER, SAMPLE, SPLIT, METRIC)", "RECIPE", "SMALL", "build", "make_optimizer"} <= set(shared)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_a_script_stands_alone(script):
    tree = ast.parse(script.read_text())
    imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) <= {"torch", "torchvision", "numpy", "tqdm", "common", "data"}
    assert ".cuda(" not in script.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_the_readme_knows_it(script):
    readme = (ROOT / "README.md").read_text()
    row, = re.findall(rf"^\| `{script.name}` \|.*\|$", readme, re.M)
    figures = re.search(r"\((\d+\.\d+), (\d+\.\d+)[,)]", script.read_text().split("VARIANTS = {")[1])   # of the first row, the full model
    assert row.endswith(f"| {figures[1]} / {figures[2]} |")
