"""Shared fixtures: a small synthetic data set, drawn once, and a way to run a script as a user does."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_root(tmp_path_factory):
    """A --root whose synthetic/ has 6 + 4 identities under 2 cameras."""
    from data import draw_synthetic
    root = tmp_path_factory.mktemp("root")
    draw_synthetic(root / "synthetic", identities=6, test_identities=4, cameras=2, frames=(3, 9), size=(64, 32))
    return root


@pytest.fixture
def run(tmp_path):
    """run(script, *arguments) -> CompletedProcess, in an empty folder."""
    def start(*command, env=None):
        return subprocess.run([sys.executable, ROOT / command[0], *map(str, command[1:])], cwd=tmp_path, capture_output=True, text=True,
                              timeout=240, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **(env or {})})
    return start
