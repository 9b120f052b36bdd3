"""Densities of training time against the laws that their papers state."""

import math

import pytest
import torch
from rounding import assert_near

from minidiffusion.diffusion import LogitNormal, Mode, RectifiedFlow, Uniform


def even(n):
    """The midpoints of n equal parts of (0, 1): every expectation becomes a sum."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def normal_cdf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


def test_uniform_is_u():
    u = even(10)
    assert torch.equal(Uniform().at(u), u)


def test_the_logit_normal_spends_13597_of_100000_below_a_quarter():
    share = (LogitNormal().at(even(1_000_000)) < 0.25).double().mean()
    assert_near(float(share), 0.13597, 0.5, scale=1, eps=1e-5)  # of 5 decimals
    assert_near(float(share), normal_cdf(math.log(1 / 3)), 2, scale=1, eps=1e-6)  # of a million


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.8), (-1.2, 2.0)])
def test_the_logit_of_t_is_normal(mean, std):
    t = LogitNormal(mean, std).at(even(20_001))
    logits = torch.logit(t)
    for share in (0.05, 0.3, 0.5, 0.9):
        expected = mean + std * torch.special.ndtri(torch.tensor(share, dtype=torch.float64))
        # the quantiles are 1 / 20,000 apart, and at 0.05 the normal has a tenth of its mass
        assert abs(float(logits.quantile(share) - expected)) < 0.0005 * std
    assert (t.diff() > 0).all()


def test_the_ends_of_u_stay_finite():
    u = torch.tensor([0.0, 2.0**-100, 1 - 2.0**-24, 1.0])
    for density in (Uniform(), LogitNormal(), LogitNormal(3.0, 2.0), Mode()):
        t = density.at(u)
        assert t.dtype == torch.float32 and ((t >= 0) & (t <= 1)).all()


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.81, 1.29, 1.75])
def test_the_mode_density_is_positive_and_normalised(scale):
    """density(t) = |du/dt|: positive where t is monotone in u, of integral 1 if t covers [0, 1]."""
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64, requires_grad=True)
    t = Mode(scale).at(u)
    (slope,) = torch.autograd.grad(t.sum(), u)
    inside = (t > 0) & (t < 1)
    # dt/du = -1 - s (1 - pi/2 sin(pi u)), Esser et al. 2024, eq. 20 differentiated by hand
    by_hand = -1 - scale * (1 - math.pi / 2 * torch.sin(math.pi * u.detach()))
    assert_near(slope[inside], by_hand[inside], 16)
    assert (by_hand[1:-1] < 0).all()
    t = t.detach()
    assert_near(t[[0, -1]], [1, 0], 4)
    density = 1 / -by_hand[1:-1]
    integral = torch.trapezoid(density.flip(0), t[1:-1].flip(0))
    assert abs(float(integral) - 1) < 0.002  # of 10,000 trapezoids


def test_a_larger_mode_scale_spends_more_in_the_middle():
    def middle(scale):
        t = Mode(scale).at(even(10_000))
        return float(((t > 0.4) & (t < 0.6)).double().mean())

    assert abs(middle(0.0) - 0.2) < 0.001  # of 10,000
    assert middle(-1.0) < 0.17 < 0.2 < middle(0.81) < middle(1.29)


def test_a_path_draws_by_its_density():
    u = even(1000)
    drawn = RectifiedFlow().draw(1000, u, LogitNormal()).sigma
    assert_near(drawn, LogitNormal().at(u), 4)
