"""The moving averages against closed forms, sums, quadrature and brute force."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from rounding import EPS, assert_near

from minidiffusion.training.average import (
    Profile,
    decay_at,
    exponent,
    inner,
    power_decay,
    reconstruction,
    update,
)


def test_closed_form() -> None:
    """The average of 1, 2, ..., n from 0: n - d (1 - d^n) / (1 - d)."""
    average = [torch.zeros((), dtype=torch.float64)]
    for value in range(1, 1001):
        update(average, [torch.tensor(float(value), dtype=torch.float64)], 0.99)
    assert_near(average[0], 901.0042739534938, 256)  # each sum's error lives for 100 steps
    closed = 1000 - 0.99 * (1 - 0.99**1000) / (1 - 0.99)
    assert_near(closed, 901.0042739534938, 256)


def test_in_place_and_for_every_tensor() -> None:
    average = [torch.zeros(3), torch.ones(2, 2)]
    kept = [a.data_ptr() for a in average]
    update(average, [torch.ones(3), torch.zeros(2, 2)], 0.75)
    assert [a.data_ptr() for a in average] == kept
    assert torch.equal(average[0], torch.full((3,), 0.25))
    assert torch.equal(average[1], torch.full((2, 2), 0.75))
    update(average, [torch.full((3,), 0.25), torch.full((2, 2), 0.75)], 0.3)
    assert torch.equal(average[0], torch.full((3,), 0.25))  # a constant stays itself


def test_no_gradient_is_recorded() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    average = [torch.zeros(2)]
    update(average, [weight], 0.5)
    assert not average[0].requires_grad


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.9999])
def test_warm_up(decay: float) -> None:
    """min(d, (1 + k) / (10 + k)): a tenth first, never falling, d in the end."""
    law = [decay_at(k, decay, warmup=True) for k in range(2000)]
    assert law[0] == 0.1 and law[1] == 2 / 11 and law[90] == min(decay, 0.91)
    assert law == sorted(law) and max(law) <= decay
    turn = (10 * decay - 1) / (1 - decay)  # where (1 + k) / (10 + k) = d
    assert decay_at(round(turn) + 2, decay, warmup=True) == decay
    assert decay_at(max(0, round(turn) - 2), decay, warmup=True) < decay
    assert decay_at(0, decay, warmup=False) == decay


def test_the_start_is_forgotten() -> None:
    """After 10 updates with warm-up the start weighs 0.1 * 2/11 * ... * 10/19."""
    average, share = [torch.ones((), dtype=torch.float64)], 1.0
    for k in range(10):
        decay = decay_at(k, 0.9999, warmup=True)
        update(average, [torch.zeros((), dtype=torch.float64)], decay)
        share *= (1 + k) / (10 + k)
    assert_near(average[0], share, 4, scale=1)
    assert share < 1.1e-5


WIDTHS = (0.01, 0.05, 0.1, 0.2, 0.28)


def profile_at(p: Profile, u: np.ndarray) -> np.ndarray:
    """The profile written down naively, 0 beyond its length."""
    return np.where(u <= p.length, (p.g + 1) / p.length * (u / p.length) ** p.g, 0.0)


def integral(a: Profile, b: Profile) -> float:
    """Of the product, by Gauss-Legendre quadrature on geometric pieces of the shorter length."""
    nodes, shares = np.polynomial.legendre.leggauss(60)
    edges = np.concatenate([[0.0], min(a.length, b.length) * 2.0 ** np.arange(-24, 1)])
    total = 0.0
    for low, high in pairwise(edges):
        u = (low + high) / 2 + (high - low) / 2 * nodes
        total += (high - low) / 2 * float(shares @ (profile_at(a, u) * profile_at(b, u)))
    return total


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_width_and_exponent(sigma_rel: float) -> None:
    """The profile's moments by quadrature: it sums to 1, and its deviation is sigma_rel."""
    p = Profile(exponent(sigma_rel), 1.0)
    nodes, shares = np.polynomial.legendre.leggauss(200)
    u, shares = (nodes + 1) / 2, shares / 2
    one, mean, square = (float(shares @ (profile_at(p, u) * u**k)) for k in range(3))
    # Gauss's rule on u^g is wrong by about n^-2(g + 1) at 0; at 0.28 the exponent is 0.17.
    wrong = max(200.0 ** (-2 * (p.g + 1)), 4096 * EPS)
    assert abs(one - 1) < wrong
    assert abs((square - mean**2) ** 0.5 / sigma_rel - 1) < 16 * wrong / sigma_rel**2
    closed = ((p.g + 1) / ((p.g + 2) ** 2 * (p.g + 3))) ** 0.5
    assert_near(closed, sigma_rel, 64)


def test_exponents_of_the_paper() -> None:
    """EDM2, section 3.1: gamma = 6.94 is sigma_rel = 0.10, gamma = 16.97 is 0.05."""
    assert round(exponent(0.10), 2) == 6.94 and round(exponent(0.05), 2) == 16.97


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 12**-0.5, 0.3, float("nan"), float("inf")])
def test_widths_that_no_exponent_has(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"sigma_rel: must be above 0 and below 0\.2887, got"):
        exponent(sigma_rel)


def test_inner_products_by_quadrature() -> None:
    profiles = [Profile(exponent(s), length) for s in (0.02, 0.05, 0.1, 0.25)
                for length in (1, 7.5, 1000)]  # fmt: skip
    for a, b in product(profiles, repeat=2):
        assert_near(inner(a, b), integral(a, b), 4096)  # of powers up to 50, by quadrature


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_the_running_average_is_the_sum(sigma_rel: float) -> None:
    """Of 400 random weights: the profile's integral over each update's cell is its share."""
    g, count = exponent(sigma_rel), 400
    values = torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    average = [torch.full((3,), 1e6, dtype=torch.float64)]  # the start counts for nothing
    for i, value in enumerate(values, 1):
        update(average, [value], power_decay(i, g))
    edges = (torch.arange(count + 1, dtype=torch.float64) / count) ** (g + 1)
    naive = sum((edges[i + 1] - edges[i]) * values[i] for i in range(count))
    assert_near(average[0], naive, 64, scale=float(values.abs().max()))


def snapshots(count: int, widths: tuple[float, ...]) -> list[Profile]:
    return [Profile(exponent(s), 1000 * k / count) for s in widths for k in range(1, count + 1)]


@pytest.mark.parametrize(("widths", "order"), [((0.05, 0.1), 1.7), ((0.05,), 0.75)])
@pytest.mark.parametrize("wanted", [0.07, 0.15, 0.2])
def test_more_snapshots_come_closer(widths, order, wanted) -> None:
    """Second order of two averages, first of one; and the error that is said is the real one."""
    target = Profile(exponent(wanted), 1000.0)
    errors = []
    for count in (8, 16, 32, 64, 128):
        stored = snapshots(count, widths)
        fit = reconstruction(stored, target)
        assert_near(fit.weights.sum(), 1, 512)  # of a system of 10 to 256 equations
        assert float(fit.weights.abs().sum()) < 3  # rounding of what is stored is not blown up
        errors.append(fit.error)
    slopes = [np.log2(a / b) for a, b in pairwise(errors)]
    assert min(slopes[1:]) > order
    u = (np.arange(200000) + 0.5) / 200
    made = sum(w * profile_at(p, u) for w, p in zip(fit.weights.tolist(), stored, strict=True))
    gap = np.linalg.norm(made - profile_at(target, u)) / np.linalg.norm(profile_at(target, u))
    assert abs(gap / errors[-1] - 1) < 0.02  # sampled


def test_the_weights_are_the_best() -> None:
    """Brute force on sampled profiles: least squares with the sum as a heavy equation."""
    stored, target = snapshots(5, (0.05, 0.1)), Profile(exponent(0.08), 900.0)
    u = (np.arange(100000) + 0.5) / 100
    columns = np.stack([profile_at(p, u) for p in stored], axis=1) * 100
    heavy = 1e5 * np.ones((1, len(stored)))
    wanted = np.concatenate([profile_at(target, u) * 100, [1e5]])
    brute = np.linalg.lstsq(np.concatenate([columns, heavy]), wanted, rcond=None)[0]
    # 100,000 samples of a curve, and an equation that is not exact but heavy
    assert np.abs(reconstruction(stored, target).weights.numpy() - brute).max() < 0.001


def test_a_stored_profile_is_taken_alone() -> None:
    stored = snapshots(6, (0.05, 0.1))
    for place, profile in enumerate(stored):
        fit = reconstruction(stored, profile)
        assert fit.weights.tolist() == [float(i == place) for i in range(12)] and fit.error == 0


def test_a_sequence_is_averaged_anew() -> None:
    """A walk with noise: from 32 snapshots of two averages, a third one that was tracked too."""
    numbers = torch.Generator().manual_seed(2)
    steps = torch.randn(2000, 8, dtype=torch.float64, generator=numbers)
    walk = steps.cumsum(0) / 45 + torch.randn(2000, 8, dtype=torch.float64, generator=numbers)
    tracked = {s: torch.zeros(8, dtype=torch.float64) for s in (0.05, 0.1, 0.15)}
    kept: dict[Profile, torch.Tensor] = {}
    for i, value in enumerate(walk, 1):
        for s, average in tracked.items():
            update([average], [value], power_decay(i, exponent(s)))
            if s != 0.15 and (i % 62 == 0 or i == 2000):
                kept[Profile(exponent(s), i)] = average.clone()
    fit = reconstruction(list(kept), Profile(exponent(0.15), 2000))
    made = sum(w * x for w, x in zip(fit.weights, kept.values(), strict=True))
    apart = float((tracked[0.1] - tracked[0.15]).norm())
    assert float((made - tracked[0.15]).norm()) < 0.01 * apart
