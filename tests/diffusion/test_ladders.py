"""Ladders: always as many steps as were asked for, the published constants, no bad request."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch
from rounding import EPS, assert_near

from minidiffusion.diffusion import (
    SPACINGS,
    Level,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
)
from minidiffusion.diffusion.ladders import beta as beta_spacing

# Some of those at which latent diffusion's own code fails; every n is tried below, more cheaply.
SOME_N = (1, 2, 3, 9, 30, 37, 101)


def check(levels, n):
    assert len(levels) == n + 1
    assert [level.index for level in levels] == list(range(n + 1))
    for level in levels:
        assert all(math.isfinite(value) for value in level)
    # The noise-to-signal ratio by angle, which is finite at alpha = 0.
    angles = [math.atan2(level.sigma, level.alpha) for level in levels]
    assert all(a >= b for a, b in pairwise(angles))
    times = [level.t for level in levels]
    assert all(a >= b - 1000 * 64 * EPS for a, b in pairwise(times))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_as_many_steps_as_asked_for(spacing, path):
    for n in (*SOME_N, 1000) if spacing == "ldm" else SOME_N:
        levels = path.ladder(n, spacing)
        check(levels, n)
        last = levels[-1]
        if spacing == "ldm":
            assert last[:3] == path.grid(0.0)[:3]
        else:
            assert (last.t, last.alpha, last.sigma) == (0.0, 1.0, 0.0)
        repeats = sum(a[:3] == b[:3] for a, b in pairwise(levels))
        assert repeats == (1 if (spacing, n) == ("ldm", 1000) else 0)


class Ruler:
    """A path that only remembers which t was asked for: cheap enough for every n."""

    def level(self, t):
        return Level(t, 1 - t, t)

    at = at_noise = level

    def grid(self, index):
        assert 0 <= index <= 999 and float(index).is_integer()
        return self.level((index + 1) / 1000)

    def ends(self):
        return 1.0, 0.001

    noises = ends

    def clean(self):
        return Level(0.0, 1.0, 0.0)


@pytest.mark.parametrize("spacing", sorted(set(SPACINGS) - {"beta"}))
def test_every_number_of_steps_from_1_to_1000(spacing):
    """A path only colours the points that a spacing chooses; the choice is checked for every n."""
    ruler = Ruler()
    for n in range(1, 1001):
        levels = SPACINGS[spacing](ruler, n)
        assert len(levels) == n + 1, n
        t = np.array([level.t for level in levels])
        assert np.isfinite(t).all() and t[0] <= 1 + 4 * EPS
        falls = np.diff(t) < 0
        assert falls.all() or ((spacing, n) == ("ldm", 1000) and falls[1:].all()), n


def test_every_quantile_of_the_beta_spacing_against_scipy():
    for n in (1, 2, 3, 7, 30, 111):
        t = [level.t for level in beta_spacing(Ruler(), n)][:-1]
        expected = 0.001 + 0.999 * scipy.stats.beta.ppf(np.linspace(1, 0, n), 0.6, 0.6)
        assert_near(t, expected, 64)
    for shape in (0.3, 1.0, 2.5):
        t = [level.t for level in beta_spacing(Ruler(), 9, shape)][:-1]
        expected = 0.001 + 0.999 * scipy.stats.beta.ppf(np.linspace(1, 0, 9), shape, shape)
        assert_near(t, expected, 64)


def test_stable_diffusion_3_constants():
    levels = RectifiedFlow(3.0).ladder(6, "linspace")
    sigmas = [level.sigma for level in levels]
    expected = [1, 0.92334, 0.81892, 0.66833, 0.43223, 0.0089286, 0]
    assert_near(sigmas, expected, 0.5, eps=1e-5)  # of 5 decimals
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert_near([level.t for level in levels], [1000 * s for s in sigmas], 4)


def test_latent_diffusion_walks_its_own_times_and_always_n_of_them():
    for n in (1, 3, 20, 30, 50, 251, 501, 1000):
        levels = VariancePreserving().ladder(n, "ldm")
        times = np.minimum(np.arange(n) * (1000 // n) + 1, 999)[::-1]
        assert [level.t for level in levels] == [*times, 0]
        assert levels[-1].alpha == math.sqrt(VariancePreserving().alphas_cumprod[0])


def test_grid_spacings_by_hand():
    def times(spacing):
        return [level.t for level in VariancePreserving().ladder(4, spacing)]

    assert times("leading") == [750, 500, 250, 0, 0]
    assert times("trailing") == [999, 749, 499, 249, 0]
    assert_near(times("linspace"), [999, 666, 333, 0, 0], 4)
    assert_near(times("sgm_uniform"), [999, 749.25, 499.5, 249.75, 0], 4)
    # Training time 0 still holds a little noise; the clean end is one more level.
    ends = [level.alpha for level in VariancePreserving().ladder(4, "leading")[-2:]]
    assert ends == [math.sqrt(VariancePreserving().alphas_cumprod[0]), 1.0]


def test_noise_spacings_by_their_laws(path):
    n = 12
    flow = isinstance(path, RectifiedFlow)
    high, low = path.noises()

    def noises(spacing):
        levels = path.ladder(n, spacing)[:-1]
        return np.array([v.sigma if flow else v.sigma / v.alpha for v in levels])

    for spacing in ("karras", "exponential", "beta"):
        assert_near(noises(spacing)[[0, -1]], [high, low], 64)
    for scaled in (noises("karras") ** (1 / 7), np.log(noises("exponential"))):
        assert_near(scaled, np.linspace(scaled[0], scaled[-1], n), 64)


@pytest.mark.parametrize("steps", [0, -1, math.nan, True, False, 1001, 10.0, "10", None])
def test_an_impossible_number_of_steps_gets_one_line(steps, path):
    # The call goes round the run-time check of types, as a user's call does.
    plain = getattr(type(path).ladder, "__wrapped__", type(path).ladder)
    with pytest.raises(ValueError, match=r"^steps: must be") as caught:
        plain(path, steps)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([], "must fall"),
        ([1.0, 2.0], "must fall"),
        ([5.0, 5.0], "must fall"),
        ([5.0, math.nan], "must fall"),
        ([math.nan], "time: must be in"),
        ([2000.0, 10.0], "time: must be in"),
        ([10.0, -1.0], "time: must be in"),
        ([math.inf], "time: must be in"),
    ],
)
def test_impossible_times_get_one_line(times, message, path):
    with pytest.raises(ValueError, match=message) as caught:
        path.ladder(times)
    assert "\n" not in str(caught.value)


def test_explicit_times(path):
    levels = path.ladder([900.0, 400.5, 3.0])
    check(levels, 3)
    assert [level.t for level in levels] == [900.0, 400.5, 3.0, 0.0]
    assert levels[1][:3] == path.at(400.5)[:3] and levels[-1].sigma == 0
    assert path.ladder((900.0, 3.0))[0][:3] == levels[0][:3]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_strength_keeps_the_last_share(spacing, path):
    whole = path.ladder(20, spacing)
    for strength, steps in ((1.0, 20), (0.75, 15), (0.5, 10), (0.05, 1), (0.0, 0)):
        kept = path.ladder(20, spacing, strength)
        assert len(kept) == steps + 1
        assert [level[:3] for level in kept] == [level[:3] for level in whole[20 - steps :]]
        assert [level.index for level in kept] == list(range(steps + 1))


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan, math.inf])
def test_an_impossible_strength_gets_one_line(strength, path):
    with pytest.raises(ValueError, match=r"strength: must be in \[0, 1\]"):
        path.ladder(10, "trailing", strength)


def test_an_unknown_spacing_is_refused_by_name(path):
    with pytest.raises(ValueError, match="unknown 'cosine'; allowed: leading, ldm, trailing"):
        path.ladder(10, "cosine")


def test_a_ladder_is_data_of_plain_numbers():
    for level in VarianceExploding().ladder(5, "karras") + VariancePreserving().ladder(5, "beta"):
        assert not any(isinstance(value, torch.Tensor) for value in level)
