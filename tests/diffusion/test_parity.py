"""Our samplers beside diffusers' schedulers, row by row of benchmarks/sampler_parity.py."""

import diffusers
import numpy as np
import pytest
import sampler_parity as parity
import torch
from faults import FAULT
from rounding import EPS, FACTOR, FLOOR, all_in_float64, assert_near, check, rms

from minidiffusion.diffusion import SAMPLERS, Estimate, RectifiedFlow, VariancePreserving

# diffusers turns its tables into numpy arrays in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CASES = [
    pytest.param(
        row,
        target,
        id=f"{row.ours}-{row.theirs}-{row.note.replace(' ', '_')}-{target}",
        marks=[pytest.mark.long] if row.steps == 1000 else [],
    )
    for row in parity.ROWS
    for target in row.targets
]


def limit(row):
    """Four roundings a step, of ours and theirs."""
    return 4 * row.steps * EPS


@pytest.mark.parametrize("sharp", [False, True], ids=["its tables", "our levels"])
@pytest.mark.parametrize(("row", "target"), CASES)
def test_the_arithmetic_is_that_of_diffusers(row, target, sharp):
    """Where its tables, the sample and the coefficients that it casts to float32 are float64."""
    with all_in_float64():
        check(parity.difference(row, target, sharp), limit(row), "difference over scale")


@pytest.mark.parametrize(("row", "target"), CASES)
def test_the_samples_are_those_of_diffusers_as_shipped(row, target):
    """But for what its float32 rounds away."""
    ours, shipped = parity.samples(row, target)
    with all_in_float64():
        _, truth = parity.samples(row, target)
    short = np.finfo(np.float32).eps
    rounding = max(rms(shipped - truth), FLOOR * short * rms(truth))
    check(rms(ours - shipped), FACTOR * rounding, "rms")


def at_fault(row, fault):
    """The row with one part in 10,000 wrong: a level in the middle, or every estimate."""

    def ladder(scheduler):
        levels = row.ladder(scheduler)
        k = len(levels) // 2
        return [*levels[:k], levels[k]._replace(alpha=FAULT * levels[k].alpha), *levels[k + 1 :]]

    def wrap(denoise):
        def inner(x, level):
            estimate = row.wrap(denoise)(x, level)
            return estimate._replace(x0=FAULT * estimate.x0, eps=FAULT * estimate.eps)

        return inner

    return row._replace(**{"level": {"ladder": ladder}, "estimate": {"wrap": wrap}}[fault])


@pytest.mark.parametrize("fault", ["level", "estimate"])
@pytest.mark.parametrize("sampler", parity.SAMPLERS)
def test_a_fault_of_one_part_in_10000_is_found(sampler, fault):
    for row in parity.ROWS:
        if row.ours == sampler and row.steps < 1000:
            with all_in_float64():
                assert parity.difference(at_fault(row, fault), row.targets[0]) > 1e6 * limit(row)


def test_every_sampler_has_a_row():
    assert {row.ours for row in parity.ROWS} == set(parity.SAMPLERS)


def test_the_network_depends_on_everything():
    """A difference could hide where the network did not look."""
    x, t = parity.noise(0), parity.torch.tensor(500.0)
    plain = parity.network(x, t)
    for other in (parity.network(x + 1e-3, t), parity.network(x, t + 1)):
        assert float((other - plain).abs().max()) > 1e-5
    steps = [float(parity.noise(k).std()) for k in range(3)]
    assert len(set(steps)) == 3


def noises(levels):
    return np.array([level.sigma / level.alpha for level in levels])


@pytest.mark.parametrize("n", [2, 5, 28, 112])  # for 1 theirs starts at the cleanest time
@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_ladders_of_noise_are_those_of_diffusers(spacing, n):
    with all_in_float64():
        scheduler = diffusers.EulerDiscreteScheduler(**parity.BETAS, **parity.NOISES[spacing])
        scheduler.set_timesteps(n)
    levels = VariancePreserving().ladder(n, spacing)
    # An end's 1 - alpha^2 is 0.00085, a thousandth of what is rounded; so are times between.
    assert_near(noises(levels), scheduler.sigmas, 1024)
    assert_near([level.t for level in levels[:-1]], scheduler.timesteps, 1024)


@pytest.mark.parametrize("n", [1, 3, 7, 20, 50, 333])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ladders_of_times_are_those_of_diffusers(spacing, n):
    scheduler = diffusers.DDIMScheduler(**parity.BETAS, timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    times = [level.t for level in VariancePreserving().ladder(n, spacing)]
    assert times[:-1] == scheduler.timesteps.tolist()


@pytest.mark.parametrize("n", [1, 2, 6, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.5])
@pytest.mark.parametrize("spacing", ["linspace", "karras", "exponential", "beta"])
def test_ladders_of_flow_are_those_of_diffusers(spacing, shift, n):
    with all_in_float64():
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
            shift=shift, **parity.NOISES.get(spacing, {})
        )
        scheduler.set_timesteps(n)
    levels = RectifiedFlow(shift).ladder(n, spacing)
    assert_near([level.sigma for level in levels], scheduler.sigmas, 64)
    assert_near([level.t for level in levels[:-1]], scheduler.timesteps, 64)


# --- where PLMS is another one than diffusers' ----------------------------------------------------

WIDTH = 0.5
"""The data are a Gaussian of this spread: what a perfect network answers is known."""


def perfect(x, level):
    x0 = level.alpha * WIDTH**2 / (level.alpha**2 * WIDTH**2 + level.sigma**2) * x
    return x0, (x - level.alpha * x0) / level.sigma


def pndm(kind, steps, x, first=0, doubled=None):
    """diffusers' PLMS from the entry ``first`` of its list of times, with one of them doubled."""
    path = VariancePreserving()
    scheduler = diffusers.PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True,
        steps_offset=1, prediction_type=kind,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()[first:]
    for t in times if doubled is None else [*times[: doubled + 1], *times[doubled:]]:
        level = path.at(float(t))
        x0, eps = perfect(x, level)
        out = level.alpha * eps - level.sigma * x0 if kind == "v_prediction" else eps
        x = scheduler.step(out, t, x).prev_sample
    return x


def plms(levels, x):
    steps = SAMPLERS["plms"](lambda x, v: Estimate(*perfect(x, v)), x, levels, torch.zeros_like)
    return list(steps)[-1].x


def apart(one, other):
    return float((one - other).norm() / other.norm())


def solution(x, first, last):
    spread = [float(v.alpha**2 * WIDTH**2 + v.sigma**2) ** 0.5 for v in (first, last)]
    return x * spread[1] / spread[0]


@pytest.mark.parametrize(("steps", "ours", "theirs"), [(20, 0.0143, 0.0741), (50, 0.0027, 0.0285)])
def test_plms_averages_eps_where_diffusers_averages_v(steps, ours, theirs):
    """The figures of docs/stable-diffusion/2-drawing.md."""
    levels = VariancePreserving().ladder(steps, "ldm")
    x = parity.noise(0).double()
    exact, found = solution(x, levels[0], levels[-1]), plms(levels, x)
    with all_in_float64():
        assert_near(pndm("epsilon", steps, x), found, 4 * steps)
    assert apart(found, exact) == pytest.approx(ours, rel=0.02)
    assert apart(pndm("v_prediction", steps, x), exact) == pytest.approx(theirs, rel=0.02)


def test_plms_begins_anew_where_the_ladder_begins_late():
    """As diffusers' own does where its list of times doubles the second one, which it lacks."""
    levels = VariancePreserving().ladder(20, "ldm")
    first = 5  # strength 0.75 of 20 steps; their list is one longer
    place = [level.t for level in levels].index(751.0)
    x = levels[place].mix(WIDTH * parity.noise(1).double(), parity.noise(2).double())
    found = plms(levels[place:], x)
    with all_in_float64():
        assert_near(pndm("epsilon", 20, x, first, doubled=1), found, 4 * 20)
    assert apart(pndm("epsilon", 20, x, first), found) == pytest.approx(0.013, rel=0.1)
