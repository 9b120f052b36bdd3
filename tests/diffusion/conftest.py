"""Closed forms shared by this room's tests: data whose best denoiser is known exactly."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from minidiffusion.diffusion import (
    Denoise,
    Estimate,
    Level,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
)


def _gaussian(mean: float = 0.0, variance: float = 1.0) -> Denoise:
    """The best denoiser of data N(mean, variance); variance 0 is a single point."""

    def denoise(x: torch.Tensor, level: Level) -> Estimate:
        centred = x - level.alpha * mean
        total = level.alpha**2 * variance + level.sigma**2
        x0 = mean + level.alpha * variance / total * centred
        return Estimate(x0, level.sigma / total * centred)

    return denoise


def _last(
    sampler: Callable, denoise: Denoise, x: torch.Tensor, levels: Sequence[Level], noise=None
):
    """Where a sampler ends; a deterministic one must not ask for noise."""
    steps = list(sampler(denoise, x, levels, noise or _no_noise))
    assert [step.index for step in steps] == list(range(len(levels) - 1))
    return steps[-1].x


def _no_noise(step: int) -> torch.Tensor:
    raise AssertionError(f"a deterministic sampler asked for the noise of step {step}")


def _arc(n: int, start: float = 1.3, end: float = 0.1) -> list[Level]:
    """n steps of equal angle with alpha = cos, sigma = sin."""
    return _at_angles([start + (end - start) * k / n for k in range(n + 1)])


def _at_angles(angles: Sequence[float]) -> list[Level]:
    return [Level(0.0, math.cos(a), math.sin(a), k) for k, a in enumerate(angles)]


@pytest.fixture
def gaussian():
    return _gaussian


@pytest.fixture
def last():
    return _last


@pytest.fixture
def arc():
    return _arc


@pytest.fixture
def at_angles():
    return _at_angles


@pytest.fixture(
    params=[
        VariancePreserving(),
        VariancePreserving("linear"),
        VariancePreserving("cosine"),
        VariancePreserving(zero_terminal_snr=True),
        RectifiedFlow(),
        RectifiedFlow(3.0),
        VarianceExploding(),
    ],
    ids=["sd", "ddpm", "cosine", "zero_snr", "flow", "flow3", "exploding"],
)
def path(request):
    return request.param
