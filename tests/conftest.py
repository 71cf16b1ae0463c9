"""Shared by the tests: a small synthetic data set, drawn once, a way to run a script as a user does, and small helpers."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def maps(T, C, H, W, B=2):
    return torch.randn(B, T, C, H, W, dtype=torch.float64).relu()


def randomize(module):
    """Float64, train mode, every parameter random: no zero-initialised one hides a mistake."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def check_gradients(model, loss):
    """Every parameter gets a finite gradient that is not zero."""
    model.zero_grad()
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def wake(model):
    """Zero-initialised BatchNorm weights to one, so that gradients pass."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.any():
            nn.init.ones_(module.weight)
    return model


def parameters(model):
    """Their number without those of the training heads: neck, classifier, projection."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("neck", "classifier", "projection")))


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
