"""Noise schedules against their published constants and against diffusers' tables."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from rounding import all_in_float64, assert_near

from minidiffusion.diffusion import PATHS, RectifiedFlow, VarianceExploding, VariancePreserving


def test_stable_diffusion_constants():
    path = VariancePreserving()
    table = path.alphas_cumprod
    assert_near(path.betas()[[0, -1]], [0.00085, 0.012], 4)
    assert_near(table[0], 0.99915, 4)
    high, low = path.noises()
    for found, published, decimal in (
        (table[999], 0.004660098513, 1e-12), (high, 14.6146, 1e-4), (low, 0.029167, 1e-6)
    ):  # fmt: skip
        assert_near(found, published, 0.5, scale=1, eps=decimal)


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")],
)
def test_betas_are_those_of_diffusers(schedule, theirs):
    path = VariancePreserving(schedule)
    ends = {"linear": (1e-4, 0.02)}.get(schedule, (0.00085, 0.012))
    with all_in_float64():
        scheduler = DDPMScheduler(beta_schedule=theirs, beta_start=ends[0], beta_end=ends[1])
    assert_near(path.betas(), scheduler.betas, 8)
    assert_near(path.alphas_cumprod, scheduler.alphas_cumprod, 64)


def test_the_cap_of_cosine_betas_is_reached_only_at_the_end():
    betas = VariancePreserving("cosine").betas()
    assert betas[-1] == 0.999 and betas[-2] < 0.8
    assert (np.diff(betas) > 0).all()
    # alpha^2 is Nichol and Dhariwal's own curve until the cap.
    curve = np.cos((np.arange(1, 1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    ours = VariancePreserving("cosine").alphas_cumprod
    assert_near(ours[:-1], curve[:-1] / start, 64)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_zero_terminal_snr_is_that_of_diffusers(schedule):
    plain, moved = (
        VariancePreserving(schedule),
        VariancePreserving(schedule, zero_terminal_snr=True),
    )
    last = moved.level(1.0)
    assert (last.alpha, last.sigma) == (0.0, 1.0)
    assert_near(moved.level(0.0).alpha, plain.level(0.0).alpha, 4)
    theirs = rescale_zero_terminal_snr(torch.from_numpy(plain.betas()))
    table = torch.cumprod(1 - theirs, 0).numpy()
    assert_near(moved.alphas_cumprod, table, 64)
    assert (np.diff(moved.alphas_cumprod) < 0).all()


def test_a_table_of_their_own_scheduler_with_zero_terminal_snr():
    with all_in_float64():
        theirs = DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            rescale_betas_zero_snr=True,
        )
    ours = VariancePreserving(zero_terminal_snr=True).alphas_cumprod
    assert_near(ours, theirs.alphas_cumprod, 64)


def test_the_signal_falls_and_the_noise_grows(path):
    levels = [path.level(t) for t in np.linspace(0, 1, 501).tolist()]
    ratios = [v.sigma / v.alpha if v.alpha else math.inf for v in levels]
    assert all(a < b for a, b in itertools.pairwise(ratios))
    times = [v.t for v in levels]
    assert all(a < b for a, b in itertools.pairwise(times))
    assert times[0] == 0 and times[-1] == (999 if isinstance(path, VariancePreserving) else 1000)


def test_each_path_keeps_its_invariant(path):
    for t in np.linspace(0, 1, 97).tolist():
        level = path.level(t)
        if isinstance(path, VariancePreserving):
            assert_near(math.hypot(level.alpha, level.sigma), 1, 4)
        elif isinstance(path, RectifiedFlow):
            assert_near(level.alpha + level.sigma, 1, 4)
            assert_near(level.t, 1000 * level.sigma, 4, scale=1000)
        else:
            assert level.alpha == 1


def test_one_time_a_picture_is_each_time_alone(path):
    times = torch.linspace(0, 1, 23, dtype=torch.float64)
    many = path.level(times)
    alone = [path.level(float(t)) for t in times]
    for name in ("t", "alpha", "sigma"):
        mine = torch.tensor([getattr(v, name) for v in alone], dtype=torch.float64)
        assert_near(getattr(many, name), mine, 64)


def test_levels_by_time_and_by_noise_agree(path):
    for t in (0.013, 0.25, 0.5, 0.77):
        level = path.level(t)
        noise = level.sigma if isinstance(path, RectifiedFlow) else level.sigma / level.alpha
        for other in (path.at(level.t), path.at_noise(noise)):
            for name in ("t", "alpha", "sigma"):
                assert_near(getattr(other, name), getattr(level, name), 2048)


def test_a_fraction_of_a_training_time_interpolates_the_log_of_the_noise():
    path = VariancePreserving()
    ratios = [path.at(t).sigma / path.at(t).alpha for t in (500.0, 500.25, 501.0)]
    logs = [math.log(r) for r in ratios]
    assert_near(logs[1], 0.75 * logs[0] + 0.25 * logs[2], 8, scale=1)


@pytest.mark.parametrize("shift", [0.1, 0.3, 1.0, 1.15, 3.0, 7.7])
def test_every_shift_starts_in_pure_noise_and_moves_the_middle(shift):
    path = RectifiedFlow(shift)
    first = path.level(1.0)
    assert (first.t, first.alpha, first.sigma) == (1000.0, 0.0, 1.0)
    assert path.level(0.0).sigma == 0
    for t in (0.1, 0.5, 0.9):
        # The shift multiplies the noise-to-signal ratio and does nothing else.
        ratio = path.level(t).sigma / path.level(t).alpha
        assert_near(ratio, shift * t / (1 - t), 64)


def test_variance_exploding_is_geometric():
    path = VarianceExploding(0.01, 50.0)
    for t, wanted in ((0.0, 0.01), (1.0, 50), (0.5, math.sqrt(0.5))):
        assert_near(path.level(t).sigma, wanted, 16)  # a power of e of size 5


@pytest.mark.parametrize("bad", [-0.001, 1.001, math.nan, math.inf])
def test_times_outside_the_path_are_refused(path, bad):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        path.level(bad)
    with pytest.raises(ValueError, match=r"time: must be in \[0, (999|1000)\]"):
        path.at(1000 * bad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VariancePreserving(beta_start=0.5, beta_end=0.1), "beta_start <= beta_end"),
        (lambda: VariancePreserving(beta_end=1.0), "beta_end < 1"),
        (lambda: VariancePreserving(beta_end=math.nan), "beta_end < 1"),
        (lambda: RectifiedFlow(0.0), "shift: must be above 0"),
        (lambda: RectifiedFlow(-1.0), "shift: must be above 0"),
        (lambda: RectifiedFlow(math.nan), "shift: must be above 0"),
        (lambda: RectifiedFlow(math.inf), "shift: must be above 0"),
        (lambda: VarianceExploding(1.0, 0.5), "sigma_min < sigma_max"),
        (lambda: VarianceExploding(0.0, 0.5), "sigma_min < sigma_max"),
        (lambda: VarianceExploding(0.1, math.inf), "sigma_min < sigma_max"),
    ],
)
def test_impossible_paths_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_draws_cover_the_path(path):
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    level = path.draw(2000, u)
    assert level.t.shape == (2000,) and level.alpha.isfinite().all()
    if isinstance(path, VariancePreserving):
        assert level.t.tolist() == sorted(list(range(1000)) * 2)  # each training time alike
    else:
        assert_near(level.sigma, path.level(u).sigma, 8)
    assert path.draw(7).t.shape == (7,)


def test_a_draw_of_the_largest_uniform_number_stays_on_the_path(path):
    ends = torch.tensor([0.0, 1 - 2.0**-24], dtype=torch.float32)
    level = path.draw(2, ends)
    assert level.alpha.isfinite().all() and level.sigma.isfinite().all()
    assert float(level.t.max()) <= (999 if isinstance(path, VariancePreserving) else 1000)


def test_paths_are_values():
    assert VariancePreserving() == VariancePreserving() and hash(RectifiedFlow(3.0)) is not None
    assert {name: p.name for name, p in PATHS.items()} == {name: name for name in PATHS}
