"""Samplers against equations that can be solved by hand: orders, fixed points, variances."""

import inspect
import itertools
import math
from functools import cache, partial

import pytest
import torch
from rounding import EPS, assert_near

from minidiffusion.diffusion import (
    PATHS,
    SAMPLERS,
    SPACINGS,
    TARGETS,
    Estimate,
    Level,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    aim,
    denoiser,
)
from minidiffusion.diffusion.samplers import ddim, dpmpp_2m, lms, log_sigma
from minidiffusion.shapes import Cond

DETERMINISTIC = ("ddim", "euler", "plms", "lms", "heun", "dpmpp_2m", "unipc")
STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "lcm")


def test_the_table_of_contents():
    assert sorted(SAMPLERS) == sorted(DETERMINISTIC + STOCHASTIC)


MEAN, VARIANCE = 0.3, 0.25


def exact_flow(x, here, there):
    """The solution of the probability flow of N(MEAN, VARIANCE): its quantiles move along."""

    def spread(level):
        return math.sqrt(level.alpha**2 * VARIANCE + level.sigma**2)

    return there.alpha * MEAN + (x - here.alpha * MEAN) * spread(there) / spread(here)


def graded(n, at_angles):
    """n equal steps, the first of them cut in halves until a first-order start is harmless."""
    h = -1.2 / n
    first = [1.3 + h * 2.0**-j for j in range(int(math.log2(n)) + 3, 0, -1)]
    return at_angles([1.3, *first, *(1.3 + h * k for k in range(1, n + 1))])


def straight(n):
    return [Level(0.0, k / n, 1 - k / n, k) for k in range(n + 1)]


@pytest.mark.parametrize(
    ("sampler", "ladder", "order"),
    [
        ("euler", "arc", 1),
        ("ddim", "arc", 1),
        ("heun", "arc", 2),
        ("plms", "arc", 2),
        ("dpmpp_2m", "arc", 2),
        ("lms", "arc", 2),  # its first step is Euler's
        ("unipc", "arc", 2.95),
        ("lms", "graded", 3.8),
        ("euler", "straight", 1),
        ("ddim", "straight", 1),
        ("heun", "straight", 2),
        ("unipc", "straight", 2.05),
    ],
)
def test_order_of_convergence(gaussian, last, arc, at_angles, sampler, ladder, order):
    make = {"arc": arc, "graded": partial(graded, at_angles=at_angles), "straight": straight}
    x = torch.tensor([[1.1], [-0.7]], dtype=torch.float64)

    def error(n):
        levels = make[ladder](n)
        found = last(SAMPLERS[sampler], gaussian(MEAN, VARIANCE), x, levels)
        return float((found - exact_flow(x, levels[0], levels[-1])).abs().max())

    errors = [error(n) for n in (64, 128, 256)]
    assert errors[-1] > 4096 * EPS  # else rounding is what we measure
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.1), slopes
    assert slopes[-1] > {"graded": 3.5, "straight": 1.9 if order > 1.5 else 0.9}.get(ladder, 0.9)


def test_the_clock_changes_the_second_order_only(gaussian, last):
    """On the straight path both clocks are second order, and they are not the same method."""
    levels = [
        Level(0.0, 1 - s, s, k) for k, s in enumerate([0.9 - 0.8 * k / 128 for k in range(129)])
    ]
    x = torch.tensor([[1.1]], dtype=torch.float64)
    by_snr = last(dpmpp_2m, gaussian(MEAN, VARIANCE), x, levels)
    by_sigma = last(partial(dpmpp_2m, clock=log_sigma), gaussian(MEAN, VARIANCE), x, levels)
    exact = exact_flow(x, levels[0], levels[-1])
    first = (last(ddim, gaussian(MEAN, VARIANCE), x, levels) - exact).abs().max()
    assert (by_snr - exact).abs().max() < first / 20
    assert (by_sigma - exact).abs().max() < first / 20
    assert (by_snr - by_sigma).abs().max() > 1e-7


def test_the_clock_of_sigma_is_second_order_from_pure_noise_on(gaussian, last):
    """-log(sigma) is finite at alpha = 0, so only one step of such a ladder is of first order."""
    levels = straight(4)
    seen = [float(s.x) for s in dpmpp_2m(gaussian(0.3), torch.ones(1, 1).double(), levels, no)]
    other = partial(dpmpp_2m, clock=log_sigma)
    mine = [float(s.x) for s in other(gaussian(0.3), torch.ones(1, 1).double(), levels, no)]
    assert seen[0] == mine[0] and seen[1] != mine[1]


def no(step):
    raise AssertionError("no noise was needed")


@pytest.mark.parametrize(
    ("spacing", "constant"), [("leading", 0.9346730932606591), ("ldm", 0.9368588829992165)]
)
def test_ddim_on_a_unit_gaussian_is_a_product_of_cosines(gaussian, last, spacing, constant):
    """alpha = cos, sigma = sin: each step projects on the next angle."""
    levels = VariancePreserving().ladder(20, spacing)
    angles = [math.atan2(level.sigma, level.alpha) for level in levels]
    product = math.prod(math.cos(a - b) for a, b in itertools.pairwise(angles))
    found = last(ddim, gaussian(), torch.ones(1, 1, dtype=torch.float64), levels)
    assert_near(float(found), product, 40)  # 20 factors, of size 1: 0.9e-14
    assert_near(float(found), constant, 40)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_a_single_point_is_found_in_any_number_of_steps(gaussian, last, sampler, steps, path):
    point = 0.7
    rng = torch.Generator().manual_seed(1)
    draws = torch.randn(12, 4, 3, generator=rng, dtype=torch.float64)
    for spacing in ("trailing", "linspace", "karras", "ldm"):
        levels = path.ladder(steps, spacing)
        x = levels[0].mix(torch.full_like(draws[0], point), draws[-1])
        found = last(SAMPLERS[sampler], gaussian(point, 0.0), x, levels, draws.__getitem__)
        # What is left of the noise at the last level is all that differs ("ldm" ends above 0).
        rest = levels[-1].sigma
        wrong = found - levels[-1].alpha * point
        if rest and sampler in DETERMINISTIC:
            wrong = wrong - rest * draws[-1]
        elif rest:
            wrong = (wrong.abs() - 6 * rest).clamp(min=0)
        # Rounding is that of x / alpha; slopes of far-apart places, mixed, amplify it, and most
        # so the slope of PLMS's first correction, which is divided by the next, small sigma.
        size = levels[0].sigma / levels[0].alpha if levels[0].alpha else 1.0
        roundings = {"plms": 2.0**22, "lms": 2.0**15}.get(sampler, 256)
        assert_near(wrong, torch.zeros_like(wrong), roundings, scale=max(10.0, size))


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_every_draw_is_asked_for_once_and_none_at_the_clean_end(gaussian, sampler, path):
    asked = []

    def noise(step):
        asked.append(step)
        return torch.ones(1, 1, dtype=torch.float64)

    levels = path.ladder(6, "trailing")
    list(SAMPLERS[sampler](gaussian(), torch.ones(1, 1, dtype=torch.float64), levels, noise))
    assert asked == [0, 1, 2, 3, 4]


def response(sampler, denoise, levels):
    """How the result of a linear sampler depends on its start and on each draw: one run of all
    unit vectors at once. Column 0 is the start, column k + 1 the draw of step k."""
    n = len(levels)
    unit = torch.eye(n, dtype=torch.float64)[:, :, None]
    steps = list(sampler(denoise, unit[0], levels, lambda k: unit[k + 1]))
    return torch.stack([step.x[:, 0] for step in steps])


@pytest.mark.parametrize(("variance", "constant"), [(0.25, 0.24520390), (1.0, 0.99182055)])
def test_ddpm_of_stable_diffusion_loses_this_much_variance(gaussian, variance, constant):
    levels = VariancePreserving().ladder(1000, "leading")
    gains = response(SAMPLERS["ddpm"], gaussian(0.0, variance), levels)
    assert_near(float(gains[-1].square().sum()), constant, 0.5, eps=1e-8)  # of 8 decimals
    # The same by the recursion of the variance, step by step (Ho et al. 2020, eqs. 6-7).
    spread = 1.0
    for step, (here, there) in enumerate(itertools.pairwise(levels)):
        ratio = (here.alpha / there.alpha) ** 2
        share = there.alpha * (1 - ratio) / here.sigma**2
        keep = math.sqrt(ratio) * there.sigma**2 / here.sigma**2
        slope = here.alpha * variance / (here.alpha**2 * variance + here.sigma**2)
        fresh = there.sigma**2 / here.sigma**2 * (1 - ratio)
        spread = (share * slope + keep) ** 2 * spread + fresh
        if step % 111 == 0:
            assert_near(float(gains[step].square().sum()), spread, 4 * len(levels))
    assert_near(float(gains[-1].square().sum()), spread, 4 * len(levels))


@pytest.mark.parametrize("sampler", ["ddpm", "euler_ancestral", "dpmpp_2m_sde"])
def test_ancestral_steps_are_the_posterior_of_the_path(gaussian, sampler, path):
    """Given x0, one step draws from q(x_s | x_t, x0): the right spread at s, the right covariance
    with x_t, so that noising again, q(x_t | x_s), closes the loop."""
    t, s = path.level(0.7), path.level(0.3)
    gains = response(SAMPLERS[sampler], gaussian(0.0, 0.0), [t, s])[-1]
    marginal = (gains[0] * t.sigma) ** 2 + gains[1] ** 2
    assert_near(float(marginal), s.sigma**2, 64)
    # what a step keeps is the root of a small difference: kept^2 of sigma^2
    kept = s.sigma * t.alpha / (t.sigma * s.alpha)
    wanted = t.alpha / s.alpha * s.sigma**2
    assert_near(float(gains[0] * t.sigma**2), wanted, 8, scale=wanted / min(1, kept**2))


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_every_eta_keeps_the_marginals_of_a_point(gaussian, eta, path):
    levels = path.ladder(9, "trailing")
    for sampler in (ddim, dpmpp_2m):
        gains = response(partial(sampler, eta=eta), gaussian(0.0, 0.0), levels)
        for level, gain in zip(levels[1:], gains, strict=True):
            spread = (gain[0] * levels[0].sigma) ** 2 + gain[1:].square().sum()
            assert_near(float(spread), level.sigma**2, 512, scale=max(level.sigma**2, EPS))


def test_more_steps_bring_the_variance_home(gaussian):
    """Every sampler converges to the variance of the data, the stochastic ones too."""

    def wrong(sampler, steps):
        # Without the last jump to the clean end, which no number of steps makes shorter.
        levels = VariancePreserving().ladder(steps, "karras")[:-1]
        gains = response(SAMPLERS[sampler], gaussian(0.0, 0.25), levels)[-1]
        begin, end = (v.alpha**2 * 0.25 + v.sigma**2 for v in (levels[0], levels[-1]))
        return abs(float(gains[0] ** 2 * begin + gains[1:].square().sum()) - end)

    for sampler in sorted({*SAMPLERS} - {"lcm"}):
        assert wrong(sampler, 200) < 0.011, sampler
        assert wrong(sampler, 200) < 0.56 * wrong(sampler, 100), sampler


def test_ddim_is_euler_in_either_chart(gaussian, last):
    """x / alpha over sigma / alpha moved by eps, and on the straight path x over sigma by v."""
    denoise = gaussian(0.3, 0.2)
    x = torch.tensor([[1.1]], dtype=torch.float64)
    levels = VariancePreserving().ladder(5, "trailing")
    y, places = x / levels[0].alpha, [v.sigma / v.alpha for v in levels]
    for here, there, a, b in zip(levels, levels[1:], places, places[1:], strict=False):
        y = y + (b - a) * denoise(y * here.alpha, here).eps
        assert there.alpha > 0
    assert_near(last(ddim, denoise, x, levels), y * levels[-1].alpha, 64)
    levels, y = RectifiedFlow(3.0).ladder(5, "linspace"), x
    for here, there in itertools.pairwise(levels):
        found = denoise(y, here)
        y = y + (there.sigma - here.sigma) * (found.eps - found.x0)
    assert_near(last(ddim, denoise, x, levels), y, 64)


def test_consistency_sampling_mixes_each_estimate_with_new_noise(gaussian):
    levels = VariancePreserving().ladder(3)
    rng = torch.Generator().manual_seed(0)
    x, *draws = torch.randn(4, 2, 3, generator=rng, dtype=torch.float64)
    steps = list(SAMPLERS["lcm"](gaussian(0.1, 0.5), x, levels, draws.__getitem__))
    for k in range(3):
        x0 = gaussian(0.1, 0.5)(x, levels[k]).x0
        x = levels[k + 1].mix(x0, draws[k]) if k < 2 else x0
        assert_near(steps[k].x, x, 4)
        assert torch.equal(steps[k].x0, x0)


def test_lms_integrates_any_cubic_exactly(last):
    """Four slopes, uneven places: a slope that is a cubic of sigma / alpha is no approximation."""
    coefficients = (0.3, -1.2, 0.7, 0.5)

    def cubic(s):
        return sum(c * s**k for k, c in enumerate(coefficients))

    def integral(s):
        return sum(c * s ** (k + 1) / (k + 1) for k, c in enumerate(coefficients))

    places = [4.0, 3.5, 2.9, 2.7, 1.6, 1.1, 0.35, 0.0]
    levels = [Level(0.0, 1.0, s, k) for k, s in enumerate(places)]

    def denoise(x, level):
        eps = torch.full_like(x, cubic(level.sigma))
        return Estimate(x - level.sigma * eps, eps)

    x = torch.zeros(1, 1, dtype=torch.float64)
    steps = list(lms(denoise, x, levels, no))
    for step, here, there in zip(steps[3:], places[3:], places[4:], strict=False):
        before = steps[step.index - 1].x
        wanted = integral(there) - integral(here)
        assert_near(float(step.x - before), wanted, 256, scale=max(1.0, abs(integral(here))))


ALL_PATHS = {
    **{name: make() for name, make in PATHS.items()},
    "zero_snr": VariancePreserving(zero_terminal_snr=True),
    "cosine": VariancePreserving("cosine"),
}


def perfect(target, mean=0.3, variance=0.25):
    """A network, not a denoiser: what it answers must still be read at every level."""

    def network(path):
        def answer(x, t, cond):
            level = path.at(float(t[0]))
            x = x / level.input_scale()
            total = level.alpha**2 * variance + level.sigma**2
            centred = x - level.alpha * mean
            x0 = mean + level.alpha * variance / total * centred
            return aim(target, level, x0, level.sigma / total * centred)

        return answer

    return network


def refusals(steps, target):
    """(path, spacing, sampler) of every combination that is refused; the rest must be right."""
    refused = set()
    rng = torch.Generator().manual_seed(0)
    start, *draws = torch.randn(steps + 1, 16, 2, generator=rng, dtype=torch.float64)
    for name, path in ALL_PATHS.items():
        denoise = denoiser(perfect(target)(path), target, Cond())
        for spacing in SPACINGS:
            levels = path.ladder(steps, spacing)
            for sampler, run in SAMPLERS.items():
                x = levels[0].sigma * start
                try:
                    for step in run(denoise, x, levels, draws.__getitem__):
                        assert step.x.isfinite().all(), (name, spacing, sampler)
                        assert step.x0.isfinite().all(), (name, spacing, sampler)
                except ValueError as error:
                    assert "\n" not in str(error) and "says nothing at alpha = 0" in str(error)
                    refused.add((name, spacing, sampler))
    return refused


FROM_PURE_NOISE = {
    "rectified_flow": ("trailing", "linspace", "sgm_uniform", "karras", "exponential", "beta"),
    "zero_snr": ("trailing", "linspace", "sgm_uniform"),
}
"""Ladders whose first level holds no signal at all: alpha = 0."""


@pytest.mark.parametrize("target", TARGETS)
def test_every_sampler_on_every_path_with_every_spacing(target):
    """Everything runs, but for one thing: noise predicted at alpha = 0 says nothing about x0."""
    expected = {
        (path, spacing, sampler)
        for path, spacings in FROM_PURE_NOISE.items()
        for spacing in spacings
        for sampler in SAMPLERS
    }
    assert refusals(4, target) == (expected if target == "eps" else set())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_is_enough_to_run(gaussian, last, sampler, path):
    x = torch.ones(2, 3, dtype=torch.float64)
    for spacing in SPACINGS:
        levels = path.ladder(1, spacing)
        found = last(SAMPLERS[sampler], gaussian(0.3, 0.2), x, levels, lambda k: x)
        assert found.isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_level_visited_twice_changes_nothing(gaussian, sampler, arc):
    """At the start, in the middle, thrice: what has no length moves nothing and is no history."""
    levels = [level._replace(index=k) for k, level in enumerate(arc(24))]
    rng = torch.Generator().manual_seed(0)
    x, *draws = torch.randn(40, 3, 2, generator=rng, dtype=torch.float64)
    doubled = [levels[0], *levels[:9], levels[8], levels[8], *levels[9:]]
    for run in (levels, doubled):
        steps = list(SAMPLERS[sampler](gaussian(0.3, 0.2), x, run, draws.__getitem__))
        assert all(step.x.isfinite().all() for step in steps)
    if sampler in DETERMINISTIC:
        plain = list(SAMPLERS[sampler](gaussian(0.3, 0.2), x, levels, draws.__getitem__))[-1].x
        # Multistep methods restart at a lower order there, so they need not agree to the bit.
        if sampler in EXACT:
            assert_near(steps[-1].x, plain, 64)
        assert (steps[-1].x - plain).abs().max() < 0.005


EXACT = ("ddim", "euler", "heun", "lms")


@cache
def thousand(name):
    """The levels that the test is about, and of the long rest every fifth."""
    levels = ALL_PATHS[name].ladder(1000, "ldm")
    return [*levels[:8], *levels[8:-1:5], levels[-1]]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ALL_PATHS)
def test_the_thousand_steps_of_latent_diffusion(gaussian, last, sampler, name):
    """Its times are 1..1000, the last of them clipped: the first two levels are one."""
    levels = thousand(name)
    assert levels[0][:3] == levels[1][:3]
    rng = torch.Generator().manual_seed(0)
    draw = torch.randn(64, 2, generator=rng, dtype=torch.float64)
    x = levels[0].sigma * draw
    found = last(SAMPLERS[sampler], gaussian(0.3, 0.25), x, levels, lambda k: draw.roll(k, 0))
    assert found.isfinite().all()
    if sampler in DETERMINISTIC:
        exact = exact_flow(x, levels[0], levels[-1])
        assert (found - exact).abs().max() < (0.05 if sampler in ("ddim", "euler") else 0.02)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_hold_no_state(gaussian, sampler):
    """Two runs that take turns end where each ends alone."""
    first, second = VariancePreserving().ladder(7), RectifiedFlow(3.0).ladder(7, "linspace")
    rng = torch.Generator().manual_seed(0)
    x, y, *draws = torch.randn(12, 2, 3, generator=rng, dtype=torch.float64)
    run = partial(SAMPLERS[sampler], gaussian(0.3, 0.2))
    alone = [
        list(run(start, ladder, draws.__getitem__)) for start, ladder in ((x, first), (y, second))
    ]
    one, two = run(x, first, draws.__getitem__), run(y, second, draws.__getitem__)
    for k in range(7):
        for other, mine in ((next(one), alone[0][k]), (next(two), alone[1][k])):
            assert torch.equal(other.x, mine.x) and torch.equal(other.x0, mine.x0)
            assert other.index == mine.index == k and other.level == mine.level


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_is_changed_in_place_and_each_picture_is_its_own(gaussian, last, sampler, path):
    levels = path.ladder(5, "karras")
    rng = torch.Generator().manual_seed(0)
    x, *draws = torch.randn(6, 4, 3, generator=rng, dtype=torch.float64)
    copies = x.clone(), [d.clone() for d in draws], list(levels)
    together = last(SAMPLERS[sampler], gaussian(0.3, 0.2), x, levels, draws.__getitem__)
    assert torch.equal(x, copies[0]) and levels == copies[2]
    assert all(torch.equal(a, b) for a, b in zip(draws, copies[1], strict=True))
    alone = last(SAMPLERS[sampler], gaussian(0.3, 0.2), x[1:2], levels, lambda k: draws[k][1:2])
    assert_near(alone[0], together[1], 64)


CALLS = {"heun": 11, "plms": 7}  # of 6 steps; a second call where the step does not end clean


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_calls_of_the_network(gaussian, last, sampler):
    seen = []

    def counted(x, level):
        seen.append(level.index)
        return gaussian()(x, level)

    x = torch.ones(1, 1, dtype=torch.float64)
    last(SAMPLERS[sampler], counted, x, VariancePreserving().ladder(6), lambda k: x)
    assert len(seen) == CALLS.get(sampler, 6)
    assert 6 not in seen  # never at the clean end, where eps is 0 / 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_ladder_that_does_not_fall_is_refused(gaussian, sampler):
    x = torch.ones(1, 1, dtype=torch.float64)
    noisy, middle, clean = Level(2.0, 0.3, 0.9), Level(1.0, 0.7, 0.7), Level(0.0, 1.0, 0.0)
    for levels in (
        [middle, noisy],
        [clean, clean],
        [middle, clean, noisy],
        [middle, Level(0, 0.0, 1.0)],
    ):
        with pytest.raises(ValueError, match="must fall from noise to signal; step"):
            list(SAMPLERS[sampler](gaussian(), x, levels, lambda k: x))
    for levels in ([], [noisy]):
        with pytest.raises(ValueError, match="at least two levels"):
            list(SAMPLERS[sampler](gaussian(), x, levels, lambda k: x))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_to_cancel_is_to_stop_iterating(gaussian, sampler):
    calls = []

    def counted(x, level):
        calls.append(level)
        return gaussian()(x, level)

    x = torch.ones(1, 1, dtype=torch.float64)
    run = SAMPLERS[sampler](counted, x, VarianceExploding().ladder(50), lambda k: x)
    assert inspect.isgenerator(run) and not calls
    next(run)
    run.close()
    assert len(calls) <= 2
