"""The README: its commands and its Python code run, and its numbers are those of the code."""

import ast
import contextlib
import importlib
import importlib.util
import math
import re
import shlex
import subprocess
import sys

import pytest
import torch

import common
import counting
import data
import sinet
from conftest import ROOT, Colours

README = (ROOT / "README.md").read_text()
SCRIPTS = ["bicnet_tks", "m3d", "sinet", "strf", "tclnet"]


def tables(*head):
    """The cells of all rows of the tables with this head, without the head."""
    found, inside = [], False
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells == [*head]:
            inside = True
        elif inside and set(line) - set("|- "):
            found.append(cells)
    assert found, head
    return found


# ----------------------------------------------------------------------------- numbers and pictures


def test_the_folded_sections_are_closed():
    """An empty line must follow each summary, or GitHub shows the section's Markdown as text."""
    folds = README.count("<details>\n<summary>")
    assert folds == README.count("</details>") == README.count("</summary>\n\n") > 5


def test_the_two_commands_are_where_ci_looks_for_them():
    part = README[README.index("\n## Start"):README.index("\n## Papers")]
    found = re.findall(r"^    pip install -r requirements.txt && (.*)$", part, re.M)
    assert found == ["python sinet.py", "pytest"] and part.count("\n    pip install") == 2


def test_what_is_compared_with_the_papers_is_counted():
    """The numbers above the list in the section on complexity are those of the audit."""
    total = counting.totals()
    counted = re.search(r"^Of \d+ values.*?\n\n", README, re.S | re.M)[0]
    assert [float(number) for number in re.findall(r"[\d.]+\d|\d", counted)] == [
        total.values, total.rows, total.equal,
        len(total.near), 1, len(total.middle), math.ceil(total.middle[-1]),
        len(total.far), round(total.far[0], 1),
    ]


def test_where_our_costs_and_the_papers_differ():
    """For each paper the section has how many values agree, and its largest difference. All
    percentages in it are differences that the audit finds."""
    fold = README[README.index("<summary>Complexity") :].partition("</details>")[0]
    for paper in re.findall(r"^- (.*?)(?=^- |\Z)", fold, re.S | re.M):
        name, equal, values = re.match(r"([\w-]+): (\d+) of (\d+) values agree\.", paper).groups()
        script = name.lower().replace("-", "_")
        total = counting.totals([script])
        assert (int(equal), int(values)) == (total.equal, total.values)
        sizes = [f"{size:.1f}" for size in total.near + total.middle + total.far]
        said = re.findall(r"([\d.]+) %", paper)
        assert {*said} <= {*sizes} and sizes[-1:] == sorted(said, key=float)[-1:], script
    assert len(re.findall("^- ", fold, re.M)) == len(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_papers_results_are_those_of_the_script(name):
    (row,) = re.findall(rf"^\| `{name}.py` \|.*\|$", README, re.M)
    script = importlib.import_module(name)
    results = script.ROWS[next(iter(script.ROWS))].results["mars"]  # of the full model
    named = [float(v) for v in re.search(r"\| ([\d.]+) / ([\d.]+) \|$", row).groups()]
    assert named == list(results)
    for link in re.findall(r"https?://[^\s)]+", script.__doc__):
        assert link in row, link


def test_the_pictures_are_small_and_all_used():
    named = set(re.findall(r"images/[\w-]+\.png", README))
    there = {f"images/{path.name}" for path in (ROOT / "images").iterdir()}
    assert named == there and sum((ROOT / name).stat().st_size for name in there) < 1.5e6


# ------------------------------------------------------------------------------------- the commands


def commands():
    """The commands of the README, each once, as lists of arguments."""
    text = re.sub(r"\\\n\s*", "", README)
    indented = re.findall(r"^    ((?:python|torchrun|pip) .*)$", text, re.M)
    inline = re.findall(r"[`>]((?:python|pytest|diff) [^`<]+)[`<]", text)
    lines = [line for part in indented + inline for line in part.split("&&")]
    return [*map(list, dict.fromkeys(tuple(shlex.split(line, comments=True)) for line in lines))]


def stub(module, monkeypatch):
    """Replaces a script's network by a small one, and its losses by those of SINet."""
    losses, args = sinet.losses, common.settings(sinet.RECIPE, sinet.ROWS, "sinet", small=True)
    monkeypatch.setattr(module, "build", lambda args, num_classes: Colours(num_classes))
    monkeypatch.setattr(module, "losses", lambda outputs, pids, _: losses(outputs, pids, args))
    monkeypatch.setattr(module, "make_optimizer", sinet.make_optimizer)
    monkeypatch.setattr(module, "picture", lambda *_: ("title", []))


def test_the_commands_run(monkeypatch, small_root, trained, tmp_path):
    """Commands that need no real data set run in their order, on a small data set and with a small
    network. The others are parsed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").symlink_to(small_root)
    # stand-ins for checkpoints of runs on other data, which are only parsed here
    for name, root in (("mars", "datasets"), ("folder", "mine")):
        checkpoint = torch.load(trained[0] / "last.pt", weights_only=True)
        checkpoint["args"].update(data=name, root=root)
        (tmp_path / f"runs/sinet-{name}").mkdir(parents=True)
        torch.save(checkpoint, tmp_path / f"runs/sinet-{name}/last.pt")
    # the parameters by which sinet.py recognises a file of the authors' release
    names = {"conv1.bias": 64, "bn.weight": 2048, "classifier.weight": 625}
    released = {name: torch.zeros(size) for name, size in names.items()}
    torch.save({"state_dict": released, "epoch": 160}, tmp_path / "sinet.pth.tar")
    ran = 0
    with monkeypatch.context() as patch:
        for name in SCRIPTS:
            stub(importlib.import_module(name), patch)
        for program, *words in filter(None, commands()):
            if program == "pip":
                assert words == ["install", "-r", "requirements.txt"]
                continue
            if program == "diff":
                assert all((ROOT / name).exists() for name in words)
                continue
            if program == "pytest":
                assert words in ([], ["-m", "fast"]) or (ROOT / words[0]).exists(), words
                if "-k" in words:
                    names = re.findall(r"^def (test_\w+)", (ROOT / words[0]).read_text(), re.M)
                    assert any(words[words.index("-k") + 1] in name for name in names)
                continue
            if program == "torchrun":
                assert words[0] == "--nproc_per_node"
                words = words[2:]
            script, *flags = words
            if script in ("tests/bench.py", "tests/study.py"):
                assert (ROOT / script).exists()
            elif script == "data.py" and "--help" not in flags:
                if flags[0] == "--check":
                    flags += ["--data", "synthetic"]
                else:
                    flags[flags.index("DIR")] = "harder"
                    flags += ["--identities", "2", "--test-identities", "1", "--frames", "1", "2"]
                patch.setattr(sys, "argv", [script, *flags])
                assert not data._main()
            elif not {"--help", "--complexity"} & {*flags}:
                ran += run_or_parse(importlib.import_module(script[:-3]), script, flags, patch)
    assert ran >= 12
    for name in ("features/features.npz", "features/queries.csv", "figures", "runs/tuned/last.pt"):
        assert (tmp_path / name).exists(), name


def run_or_parse(module, script, flags, patch):
    """Returns 1 if the command was run, 0 if it was only parsed."""
    flags = ["1" if flag == "SEED" else flag for flag in flags]
    if {"mars", "ilids", "folder"} & {*flags}:
        patch.setattr(sys, "argv", [script, *flags])
        parsed = common.parse_args(module.RECIPE, module.ROWS, module.__doc__, script,
                                   release=module.RELEASE)
        assert parsed.data == flags[flags.index("--data") + 1]
        return 0
    if "--seed" in flags:
        flags += ["--output", "runs/seed"]
    if "--resume" not in flags:
        flags += ["--ids", "4", "--clips", "2"]
    patch.setattr(sys, "argv", [script, *flags])
    module.main()
    return 1


def test_own_tracklets(monkeypatch, capsys, tmp_path):
    """The lines that copy frames into the folder "mine", then the command below them."""
    monkeypatch.chdir(tmp_path)
    data.draw_synthetic(tmp_path / "datasets/synthetic", cameras=2, frames=(1, 2), size=(32, 16))
    block = re.search(r"```bash\n(.*?)```\s*\n    python (sinet.py [^\n]*)\n", README, re.S)
    subprocess.run(["bash", "-euo", "pipefail", "-c", block[1]], check=True)
    stub(sinet, monkeypatch)
    monkeypatch.setattr(sys, "argv", shlex.split(block[2]) + ["--epochs", "1"])
    sinet.main()
    out = capsys.readouterr().out
    assert re.search(r"train +64 .*\n +query +20 .*\n +gallery +20 ", out)
    assert "after epoch 1, all frames" in out


# -------------------------------------------------------------------------------------- from Python


def blocks():
    return re.findall(r"^```python\n(.*?)^```$", README, re.S | re.M)


def test_the_python_code_runs(trained, small_root, monkeypatch, tmp_path):
    """With a trained network and the synthetic set: the embedding of crops, the features of the
    set, the ranks, and the ONNX export if its packages are installed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").symlink_to(small_root)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/sinet-synthetic").symlink_to(trained[0])
    _, _, embed, rank = blocks()
    space = {}
    exec(embed, space)
    assert space["x"].shape == (1, 2048) and not space["model"].training
    exec(rank, space)
    dataset = space["dataset"]
    assert space["q"].shape == (len(dataset.query), 2048)
    assert space["g"].shape == (len(dataset.gallery), 2048)
    assert len(space["ranks"]) == len(dataset.query)
    _, mean_ap, _ = common.cmc_and_map(space["distances"], *dataset.ids())
    assert f"mAP {100 * mean_ap:.1f}   CMC-1" in trained[1].splitlines()[-2]
    (export,) = re.findall(r"^    (torch\.onnx\.export\(.*\))$", README, re.M)
    ast.parse(export)
    if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript"):
        exec(export, space)
        assert (tmp_path / "sinet.onnx").exists()


MODULES = tables("module", "takes", "returns", "copy along", "use")


def copied(script, name, along):
    """A namespace with the imports and the input x of the README's example, the class `name` of a
    script, and what the table names to copy along, which must be all that the class needs."""
    nodes = {getattr(n, "name", None): n for n in ast.parse((ROOT / script).read_text()).body}
    named, new = {name}, {name}
    while new:
        new = {n.id for one in new for n in ast.walk(nodes[one]) if isinstance(n, ast.Name)}
        new = (new & nodes.keys()) - named
        named |= new
    assert named == {name, *along}
    space = {}
    for line in blocks()[1].splitlines():
        if line.startswith(("import ", "x = ")):
            exec(line, space)
    kept = [node for one, node in nodes.items() if one in named]
    exec(compile(ast.Module(kept, []), script, "exec"), space)
    return space


def test_the_equation_is_that_of_the_script():
    """The lines below the equation are lines of bicnet_tks.py."""
    assert blocks()[0] in (ROOT / "bicnet_tks.py").read_text()


def test_the_copied_module_runs():
    """The example puts three SBMs into a ResNet-50, at the places that the network has."""
    along = re.findall(r"`([^`]+)`", MODULES[0][3])
    space = copied("sinet.py", "SalientToBroadModule", along)
    exec(blocks()[1], space)
    assert space["y"].shape == (8, 1000)
    places, blocks_before = [], 0  # (blocks before an SBM, its split)
    for module in space["net"].layer3:
        if hasattr(module, "sbm"):
            places.append((blocks_before, module.sbm.split))
        else:
            blocks_before += 1
    settings = common.settings(sinet.RECIPE, sinet.ROWS, "sinet", weights="none")
    assert places == [*zip(settings.sbm_blocks, settings.sbm_splits)] and len(places) == 3


@pytest.mark.parametrize(
    "name, takes, returns, along, use", MODULES, ids=[row[0].split("`")[1] for row in MODULES]
)
def test_a_module_runs_when_copied(name, takes, returns, along, use):
    """A copied class runs with the README's imports and exactly what the table names under "copy
    along"."""
    name, script = re.findall(r"`([^`]+)`", name)
    along, (use,) = (re.findall(r"`([^`]+)`", cell) for cell in (along, use))
    space = copied(script, name, along)
    inputs = []
    with contextlib.ExitStack() as stack:
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, given: inputs.append(given) if type(module).__name__ == name else None)
        stack.callback(hook.remove)
        out = eval(use, space)
    assert shapes(inputs[0]) == sizes(takes)
    assert shapes(out if isinstance(out, (tuple, list)) else [out]) == sizes(returns)
    assert isinstance(out, list) == returns.startswith("a list")


def shapes(tensors):
    return [tuple(tensor.shape) for tensor in tensors]


def sizes(cell):
    """The shapes in a cell of the table, as numbers, for the README's example input."""
    letters = {"B": 2, "T": 4, "C": 256, "H": 16, "W": 8}
    cell = cell.replace("`x`", "(B, T, C, H, W)")
    return [tuple(int(eval(part.replace("·", "*"), letters)) for part in shape.split(","))
            for shape in re.findall(r"\(([^()]*)\)", cell)]
