"""Our samplers beside diffusers' schedulers: the same network, ladder and noise.

    python benchmarks/sampler_parity.py

prints the largest difference of the finished samples over their largest value, ours in float64.
"As shipped" is a scheduler untouched. Its tables are float32, so it is compared a second time with
float64 tables in their place: what is left then is the arithmetic, and shows why they differed.
"""

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from minidiffusion.diffusion import (
    SAMPLERS,
    Denoise,
    Estimate,
    Level,
    RectifiedFlow,
    VariancePreserving,
    denoiser,
    keyed,
)
from minidiffusion.shapes import Cond

STEPS = 20
SHAPE = (3, 4, 4)
SEEDS = (5, 6)
SD, FLOW = VariancePreserving(), RectifiedFlow(3.0)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}


@cache
def noise(step: int) -> Tensor:
    return keyed(SEEDS, SHAPE)(step).double()


@cache
def weights() -> Tensor:
    return keyed((1, 2, 3), (3, 1, 1))(0).double()


def network(x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
    """Random, smooth in x and in t; it mixes its channels."""
    gain, phase, mix = weights()
    wave = torch.cos(t.double() / 300).view(-1, 1, 1, 1)
    return torch.tanh(gain * x + phase + wave) + 0.2 * mix * x.roll(1, 1)


def bounded(denoise: Denoise) -> Denoise:
    """A consistency model's boundary condition (Song et al. 2023, eq. 5) as diffusers scales it.

    Theirs lives in the scheduler; here it belongs to the network, so it is a wrapper.
    """

    def inner(x: Tensor, level: Level) -> Estimate:
        estimate, t = denoise(x, level), 10 * level.t
        skip, out = 0.25 / (t**2 + 0.25), t / math.sqrt(t**2 + 0.25)
        return Estimate(out * estimate.x0 + skip * x, estimate.eps)

    return inner


def finished(steps: Iterator[Any]) -> Tensor:
    *_, last = steps
    return last.x


Ladder = Callable[[Any], list[Level]]


def named(path: Any, spacing: str) -> Ladder:
    """Our own ladder, at as many steps as the scheduler makes."""
    return lambda scheduler: path.ladder(scheduler.num_inference_steps, spacing)


def times(scheduler: Any) -> list[Level]:
    """The whole training times that a scheduler rounds to, on our own path."""
    return SD.ladder([float(t) for t in scheduler.timesteps])


def sigmas(scheduler: Any) -> list[Level]:
    """A scheduler's own noises and times, where it has a reason to differ from our ladders.

    Between two training times diffusers interpolates sigma, we its logarithm (as k-diffusion does);
    DPM-Solver and UniPC round the times of Karras's noises; flow times are cut to whole numbers.
    """
    flow = getattr(scheduler.config, "use_flow_sigmas", False)
    noises = scheduler.sigmas.double().unique_consecutive().tolist()
    ladder = []
    for k, (s, t) in enumerate(zip(noises, [*_times(scheduler), 0.0], strict=True)):
        alpha, sigma = (1 - s, s) if flow else (1 / math.hypot(1, s), s / math.hypot(1, s))
        ladder.append(Level(t, alpha, sigma, k))
    return ladder


def _times(scheduler: Any) -> list[float]:
    each = scheduler.timesteps.double()
    return (each[::2] if _calls_twice(scheduler) else each).tolist()


def _calls_twice(scheduler: Any) -> bool:
    return "Heun" in type(scheduler).__name__


class Row(NamedTuple):
    """One of our samplers and one scheduler of diffusers, with its options."""

    ours: str
    theirs: str
    ladder: Ladder
    options: dict[str, Any]
    targets: tuple[str, ...] = ("eps", "v", "x0")
    steps: int = STEPS
    wrap: Callable[[Denoise], Denoise] = lambda denoise: denoise
    note: str = ""


LEADING = {"clip_sample": False, "timestep_spacing": "leading"}
LDM = {**LEADING, "set_alpha_to_one": False, "steps_offset": 1}
TRAILING = {"clip_sample": False, "timestep_spacing": "trailing"}
# PLMS: eps only. diffusers averages a v-network's raw outputs and reads v once, at the last place;
# we average what they say about the noise, which is the method of the paper.
PNDM = {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
SDE = {"algorithm_type": "sde-dpmsolver++"}
FLOW_SIGMAS = {"use_flow_sigmas": True, "flow_shift": 3.0}
KARRAS = {"use_karras_sigmas": True}
NOISES = {name: {f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")}

ROWS = [
    Row("ddim", "DDIM", named(SD, "leading"), LEADING, note="leading"),
    Row("ddim", "DDIM", named(SD, "ldm"), LDM, note="ldm"),
    Row("ddim", "DDIM", named(SD, "trailing"), TRAILING, note="trailing"),
    Row("ddpm", "DDIM", named(SD, "leading"), LEADING, note="leading, eta 1"),
    Row("ddpm", "DDPM", named(SD, "leading"), LEADING, note="fixed_small"),
    Row("ddpm", "DDPM", named(SD, "leading"), LEADING, ("v",), steps=1000, note="1000 steps"),
    Row("plms", "PNDM", named(SD, "ldm"), PNDM, ("eps",), note="ldm"),
    Row("euler", "EulerDiscrete", named(SD, "linspace"), {}, steps=28, note="whole times"),
    Row("euler", "EulerDiscrete", sigmas, {}, note="fractional times"),
    *(
        Row("euler", "EulerDiscrete", named(SD, spacing), option, note=spacing)
        for spacing, option in NOISES.items()
    ),
    Row(
        "euler_ancestral",
        "EulerAncestralDiscrete",
        sigmas,
        {},
        ("eps", "v"),
        note="fractional times",
    ),
    Row("heun", "HeunDiscrete", sigmas, {}, note="fractional times"),
    Row("heun", "HeunDiscrete", named(SD, "karras"), KARRAS, note="karras"),
    Row("lms", "LMSDiscrete", sigmas, {}, note="fractional times"),
    Row("lms", "LMSDiscrete", named(SD, "karras"), KARRAS, note="karras"),
    Row("dpmpp_2m", "DPMSolverMultistep", times, {}, note="whole times"),
    Row("dpmpp_2m", "DPMSolverMultistep", sigmas, KARRAS, note="karras"),
    Row("dpmpp_2m", "DPMSolverMultistep", sigmas, FLOW_SIGMAS, ("flow",), note="flow"),
    Row("dpmpp_2m_sde", "DPMSolverMultistep", times, SDE, note="whole times"),
    Row("unipc", "UniPCMultistep", times, {}, note="whole times"),
    Row("unipc", "UniPCMultistep", sigmas, KARRAS, note="karras"),
    Row("unipc", "UniPCMultistep", sigmas, FLOW_SIGMAS, ("flow",), note="flow"),
    Row("lcm", "LCM", times, {"clip_sample": False}, steps=4, wrap=bounded),
    Row("euler", "FlowMatchEulerDiscrete", named(FLOW, "linspace"), {"shift": 3.0}, ("flow",)),
    Row("heun", "FlowMatchHeunDiscrete", named(FLOW, "linspace"), {"shift": 3.0}, ("flow",)),
]


def scheduled(row: Row, target: str) -> Any:
    """Their scheduler, set for one run."""
    kind = getattr(importlib.import_module("diffusers"), f"{row.theirs}Scheduler")
    options = dict(row.options)
    if "FlowMatch" not in row.theirs:
        options |= {**BETAS, "prediction_type": NAMES[target]}
    if row.theirs in ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete"):
        options |= {"timestep_spacing": "linspace"}
    scheduler = kind(**options)
    scheduler.set_timesteps(row.steps)
    return scheduler


def sharpen(scheduler: Any, levels: Sequence[Level]) -> None:
    """Replace a scheduler's float32 tables by float64 ones."""
    if hasattr(scheduler, "alphas_cumprod"):
        scheduler.alphas_cumprod = torch.from_numpy(SD.alphas_cumprod)
        scheduler.alphas = 1 - torch.from_numpy(SD.betas())
        scheduler.betas = torch.from_numpy(SD.betas())
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = torch.tensor(levels[-1].alpha, dtype=torch.float64) ** 2
    if hasattr(scheduler, "sigmas"):
        straight = abs(levels[0].alpha + levels[0].sigma - 1) < 1e-3
        ratios = [v.sigma if straight else v.sigma / v.alpha for v in levels]
        at = [level.t for level in levels[:-1]]
        if _calls_twice(scheduler):
            ratios = [ratios[0], *(r for r in ratios[1:-1] for _ in "ab"), ratios[-1]]
            at = [at[0], *(t for t in at[1:] for _ in "ab")]
        scheduler.sigmas = torch.tensor(ratios, dtype=torch.float64)
        if scheduler.timesteps.is_floating_point():
            scheduler.timesteps = torch.tensor(at, dtype=torch.float64)


@contextmanager
def our_noise(scheduler: Any) -> Iterator[None]:
    """Their draws become ours: the k-th draw is that of step k."""
    draws = (noise(k) for k in count())
    module = type(scheduler).__module__
    if not hasattr(sys.modules[module], "randn_tensor"):
        yield
        return
    with mock.patch(f"{module}.randn_tensor", lambda *_, dtype, **__: next(draws).to(dtype)):
        yield


def run(scheduler: Any, x: Tensor, **extra: Any) -> Tensor:
    with our_noise(scheduler):
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t) if _scales(scheduler) else x
            x = scheduler.step(network(scaled, t), t, x, **extra).prev_sample
    return x


def _scales(scheduler: Any) -> bool:
    return hasattr(scheduler, "scale_model_input")


def _explodes(row: Row) -> bool:
    """These work on x / alpha, and shrink it again for the network."""
    return row.theirs in ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete")


def samples(row: Row, target: str, sharp: bool = False) -> tuple[Tensor, Tensor]:
    """Where our sampler ends, and where their scheduler does."""
    scheduler = scheduled(row, target)
    levels = row.ladder(scheduler)
    if sharp:
        sharpen(scheduler, levels)
    x = levels[0].sigma * noise(-1)
    extra = {"eta": 1.0} if (row.ours, row.theirs) == ("ddpm", "DDIM") else {}
    theirs = run(scheduler, x / levels[0].alpha if _explodes(row) else x, **extra)
    denoise = row.wrap(denoiser(network, target, Cond()))
    return finished(SAMPLERS[row.ours](denoise, x, levels, noise)), theirs


def difference(row: Row, target: str, sharp: bool = False) -> float:
    """The largest difference of the finished samples, over the largest of their values."""
    return apart(*samples(row, target, sharp))


def apart(ours: Tensor, theirs: Tensor) -> float:
    assert ours.isfinite().all() and float(ours.std()) > 0.1  # a picture, not a constant
    return float((ours - theirs).abs().max() / ours.abs().max())


def main() -> None:
    table = Table("ours", "theirs", "targets", "as shipped", "in float64")
    for row in ROWS:
        shipped, sharp = (
            max(difference(row, target, sharp) for target in row.targets) for sharp in (False, True)
        )
        label = ", ".join(filter(None, (row.theirs, row.note)))
        table.add_row(row.ours, label, " ".join(row.targets), f"{shipped:.1e}", f"{sharp:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
