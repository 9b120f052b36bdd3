"""Shapes and types of every annotated function are checked while the tests run."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import shape_checks

shape_checks.install()

import pytest
import torch

from minidiffusion import device

# Tensors here are small: a second thread would only wait for the first. But sums of several threads
# round otherwise, so the numeric tests run a second time with two.
torch.set_num_threads(int(os.environ.get("MINIDIFFUSION_TEST_THREADS", "1")))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies nothing fast but float32."""
    monkeypatch.setattr(
        device,
        "multiplies_fast",
        lambda dtype, where: dtype == torch.float32 or where.type != "cpu",
    )


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that multiplies every type fast."""
    monkeypatch.setattr(device, "multiplies_fast", lambda dtype, where: True)
