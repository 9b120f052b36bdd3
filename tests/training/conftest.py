"""Tiny data and recipes, and the fingerprint of a run's whole state."""

import hashlib
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from minidiffusion.data import Tensors, batches
from minidiffusion.models import DiTConfig, MLPConfig, UNetConfig
from minidiffusion.training.loop import Report, Trainer
from minidiffusion.training.objectives import drawn
from minidiffusion.training.recipe import Recipe, Run

UNET = UNetConfig(channels=8, multipliers=(1, 2), attention=(0, 1), blocks=1, groups=4, heads=2)
DIT = DiTConfig(width=16, depth=2, heads=2)
MLP = MLPConfig(width=16, depth=2)


def _pictures(count: int = 24, channels: int = 1) -> Tensors:
    numbers = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (count, channels, 8, 8), generator=numbers, dtype=torch.uint8)
    return Tensors(x, torch.randint(0, 3, (count,), generator=numbers), ("a", "b", "c"))


def _points(count: int = 24) -> Tensors:
    return Tensors(torch.randn(count, 2, generator=torch.Generator().manual_seed(0)))


def _tiny(model: UNetConfig | DiTConfig | MLPConfig, out: Path | None = None, **run: Any) -> Recipe:
    """A recipe of 13 steps of 8 pictures on the CPU; keywords change its Run."""
    lengths = run.keys() & {"epochs", "minutes"}
    steps = None if lengths else 13
    usual = Run(steps=steps, batch_size=8, precision="fp32", device="cpu", keep=100)
    return Recipe(model=model, run=replace(usual, **run), out=None if out is None else str(out))


def _trainer(report: Report) -> Trainer:
    owner = report.average.__self__  # type: ignore[attr-defined]  # a bound method
    assert isinstance(owner, Trainer)
    return owner


def _digest(report: Report) -> str:
    """SHA-256 of weights, average, optimizer, counts, and the next batch with its noise."""
    trainer = _trainer(report)
    s, seed = trainer.state, trainer.recipe.seed
    found = hashlib.sha256(repr((s.step, s.total, s.skipped)).encode())
    for part, tensors in s.tensors().items():
        assert tensors, part
        for name, tensor in sorted(tensors.items()):
            found.update(f"{part}/{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            found.update(tensor.contiguous().cpu().numpy().tobytes())
    source = batches(trainer.dataset, seed, trainer.batch, start=s.step * trainer.batch)
    for first, batch in islice(source, 1):
        for tensor in (batch.x, batch.labels, *drawn(seed, s.step, first, batch.x.shape)):
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="session")
def models() -> dict[str, Any]:
    return {"unet": UNET, "dit": DIT, "mlp": MLP}


@pytest.fixture(scope="session")
def pictures():
    return _pictures


@pytest.fixture(scope="session")
def points():
    return _points


@pytest.fixture(scope="session")
def tiny():
    return _tiny


@pytest.fixture(scope="session")
def digest():
    return _digest


@pytest.fixture(scope="session")
def trainer_of():
    return _trainer


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Everything here is too small to share, and processes are compared with one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
