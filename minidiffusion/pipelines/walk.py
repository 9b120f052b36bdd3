"""From noise to samples: one walk for drawing, starting from a picture and painting over."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiffusion.checkpoints.catalog import Row, Sampling, Spacing
from minidiffusion.diffusion import (
    SAMPLERS,
    SPACINGS,
    START,
    Denoise,
    Level,
    RectifiedFlow,
    SkipLayers,
    Step,
    cfg,
    cfg_zero,
    denoiser,
    guided,
    inpainted,
    interval,
    keyed,
    rescaled,
)
from minidiffusion.diffusion.ladders import GRID
from minidiffusion.diffusion.samplers import dpmpp_2m, log_sigma
from minidiffusion.models import MMDiTConfig
from minidiffusion.pipelines.finite import NotFiniteError, is_finite
from minidiffusion.shapes import Cond, Latent
from minidiffusion.typed import SEED, unknown

CUSTOMARY: dict[str, Spacing] = {
    "ddim": "ldm",
    "ddpm": "ldm",
    "plms": "ldm",
    "lcm": "ldm",
    "dpmpp_2m": "karras",
    "dpmpp_2m_sde": "karras",
}
"""The ladder that a sampler is known with, where a model has none of its own; else linspace."""
FROM_SIGMA = ("euler", "euler_ancestral", "heun", "lms")
"""Samplers whose references start variance-preserving paths at sigma * noise, not at noise."""


TOO_MUCH = "samples that are not finite {}: is the guidance too high?"
Ask = Callable[..., Latent]
"""A network; one whose layers may be left out takes `skip` as well."""


class Guiding(NamedTuple):
    """How guidance is done beyond its scale: see `cfg_zero`, `rescaled` and `SkipLayers`.

    slg: the scale of what is led away from what a network without slg_layers says, in the first
    fifth of the ladder; None is not at all.
    """

    rescale: float = 0.0
    cfg_zero: bool = False
    slg: float | None = None
    slg_layers: tuple[int, ...] = (7, 8, 9)


class Start(NamedTuple):
    """Where a walk begins. seeds: one a sample. size: rows and columns, if not the network's own.

    init: clean samples to start from, noised to ``strength`` of the ladder. mask: 1 where init is
    to be painted over. Either may serve several samples, or several channels. latents: the noise
    to start from, of unit variance, one a sample; None is that of the seeds.
    """

    seeds: Sequence[int]
    size: tuple[int, int] | None = None
    init: Tensor | None = None
    strength: float = 1.0
    mask: Tensor | None = None
    latents: Tensor | None = None


def settled(usual: Sampling, **given: Any) -> Sampling:
    """What is given, what a model does otherwise, and the ladder that goes with it."""
    given = {key: value for key, value in given.items() if value is not None}
    for key, known in (("sampler", SAMPLERS), ("spacing", SPACINGS)):
        if key in given and given[key] not in known:
            raise unknown(key, f"unknown {given[key]!r}", given[key], known)
    if "guidance_interval" in given:
        given["guidance_interval"] = tuple(given["guidance_interval"])
    how = replace(usual, **given)
    return how if how.spacing else replace(how, spacing=CUSTOMARY.get(how.sampler, "linspace"))


def shifted(row: Row, size: tuple[int, int] | None, shift: float | None, dynamic: bool) -> Row:
    """The row with another shift of its rectified flow, or one for the size of the samples."""
    if shift is None and not dynamic:
        return row
    if not isinstance(row.path, RectifiedFlow):
        raise ValueError("shift: only for rectified flows, such as Stable Diffusion 3")
    path = row.path if shift is None else RectifiedFlow(shift)
    if dynamic and size is not None:
        path = path.resized(math.prod(size), math.prod(row.shape[1:]))
    return replace(row, path=path)


def walk(
    ask: Ask, row: Row, how: Sampling, start: Start, conds: tuple[Cond, Cond | None],
    guiding: Guiding, device: torch.device,
) -> Iterator[Step]:  # fmt: skip
    """Down the ladder; conds: what to draw, and what to lead away from."""
    count, init, mask = len(start.seeds), start.init, start.mask
    if count < 1:
        raise ValueError(f"count: must be at least 1, got {count}")
    if not 0 <= start.seeds[0] <= start.seeds[-1] <= SEED["max"]:
        raise ValueError(f"seed: must be 0..{SEED['max']}, that of the last picture, too")
    if init is None and (mask is not None or start.strength != 1):
        raise ValueError("mask and strength: only with init, the picture to start from")
    shape = (count, *row.shape) if start.size is None else (count, row.shape[0], *start.size)
    noise = keyed(start.seeds, shape[1:], device)
    levels = ladder(row, how, start.strength)
    first = noise(START) if start.latents is None else start_noise(start.latents, shape, device)
    cond, against = conds
    taken, last = 0, len(levels) - 1
    ask = reporting(ask, lambda: f"at step {taken + 1} of {last}")
    denoise = guide(ask, row, how, beside(cond, count, device), against, guiding)
    x0 = fitted("init", torch.zeros(1) if init is None else init, shape, device)
    # A picture to be painted over whole is not looked at: Stable Diffusion starts from noise alone.
    blank = init is None or (mask is not None and start.strength == 1)
    x = pure(how.sampler, levels[0], first) if blank else levels[0].mix(x0, first)
    if mask is not None:
        mask = fitted("mask", mask, shape, device)
        denoise = inpainted(denoise, x0, mask, first)
    if not last:
        yield Step(0, x, x, levels[0])
        return
    sampler = SAMPLERS[how.sampler]
    if row.family.startswith("sd3") and how.sampler == "dpmpp_2m":
        sampler = partial(dpmpp_2m, clock=log_sigma)
    for step in sampler(denoise, x, levels, noise):
        if step.index == last - 1:
            if not is_finite(step.x):
                raise ValueError(TOO_MUCH.format(f"at step {last} of {last}"))
            if mask is not None:
                step = step._replace(x=torch.lerp(x0, step.x, mask))
        yield step
        taken = step.index + 1


def reporting(ask: Ask, place: Callable[[], str]) -> Ask:
    """The network; what is not finite is reported with the step, and its inputs if it is theirs."""

    def asked(x: Latent, t: Tensor, cond: Cond, **less: Any) -> Latent:
        try:
            return ask(x, t, cond, **less)
        except NotFiniteError as error:
            if not is_finite(x):
                raise ValueError(TOO_MUCH.format(place())) from None
            bad = [name for name, part in cond._asdict().items() if not is_finite(part)]
            what = f"cond.{bad[0]}: numbers that are not finite" if bad else str(error)
            raise ValueError(f"{what} {place()}") from None

    return asked


def ladder(row: Row, how: Sampling, strength: float = 1.0) -> list[Level]:
    """The levels to walk; those of Stable Diffusion 3 as Stability's code and diffusers have them.

    There a part of a step is walked whole, and a time is the float32 product of a float32 sigma:
    a time near 1000 that is rounded once moves the fastest sines of its embedding by 6e-5.
    """
    if not row.family.startswith("sd3"):
        return row.path.ladder(how.steps, str(how.spacing), strength=strength)
    levels = row.path.ladder(how.steps, str(how.spacing))
    count = len(levels) - 1
    levels = levels[int(count - count * strength) :]
    times = (GRID * torch.tensor([float(level.sigma) for level in levels])).tolist()
    return [v._replace(t=t, index=k) for k, (v, t) in enumerate(zip(levels, times, strict=True))]


def guide(
    ask: Ask, row: Row, how: Sampling, cond: Cond, against: Cond | None, guiding: Guiding
) -> Denoise:
    """One pass where nothing guides, both conditions in one batch where something does."""
    check_guiding(row, how, guiding)
    scale, span, share = how.guidance, how.guidance_interval, guiding.rescale
    skipping = without_layers(ask, how.steps, guiding)
    alone = denoiser(ask, row.target, cond)
    if scale == 1 or against is None:
        return alone
    combine = cfg_zero(scale) if guiding.cfg_zero else cfg(scale)
    combine = rescaled(combine, share) if share else combine
    against = against._replace(concat=cond.concat)
    both = guided(ask, row.target, [cond, against], combine, skipping)
    return both if span is None else interval(both, alone, low=span[0], high=span[1])


def check_guiding(row: Row, how: Sampling, guiding: Guiding) -> None:
    """Raises ValueError for guidance that makes no sense, or none with this network."""
    scale, share = how.guidance, guiding.rescale
    if not scale >= 0 or scale == float("inf"):
        raise ValueError(f"guidance: must be 0 or more, got {scale}")
    if not 0 <= share <= 1:
        raise ValueError(f"rescale: must be in [0, 1], got {share}")
    if guiding.cfg_zero and row.target != "flow":
        raise ValueError("cfg_zero: only for rectified flows, such as Stable Diffusion 3")
    if guiding.slg is None:
        return
    if not isinstance(row.model, MMDiTConfig):
        raise ValueError("slg: only for Stable Diffusion 3, whose layers can be left out")
    if not 0 <= guiding.slg < float("inf"):
        raise ValueError(f"slg: must be 0 or more, got {guiding.slg}")
    depth = row.model.depth
    if not all(0 <= layer < depth for layer in guiding.slg_layers):
        layers = ", ".join(map(str, guiding.slg_layers))
        raise ValueError(f"slg_layers: {layers}: this network has the layers 0..{depth - 1}")


def without_layers(ask: Ask, steps: int, guiding: Guiding) -> SkipLayers | None:
    """Acts while .01 steps < step < .2 steps, as in Stability's code."""
    if guiding.slg is None:
        return None
    less = partial(ask, skip=tuple(guiding.slg_layers))
    return SkipLayers(less, guiding.slg, 0.01 * steps, 0.2 * steps)


def beside(cond: Cond, count: int, device: torch.device) -> Cond:
    """Channels laid beside the input are one for all samples, or one for each."""
    if cond.concat is None:
        return cond
    shape = (count, *cond.concat.shape[1:])
    return cond._replace(concat=fitted("concat", cond.concat, shape, device))


def fitted(name: str, given: Tensor, shape: tuple[int, ...], device: torch.device) -> Latent:
    """One for each sample; what has an axis of length 1, or too few, serves all along it."""
    try:
        return given.to(device, torch.float32).expand(shape)
    except RuntimeError:
        raise ValueError(f"{name}: expected the shape {shape}, got {tuple(given.shape)}") from None


def start_noise(latents: Tensor, shape: tuple[int, ...], device: torch.device) -> Latent:
    """The noise that a caller gives: of unit variance, as diffusers' pipelines take it."""
    usable = isinstance(latents, Tensor) and latents.layout == torch.strided
    if not usable or not latents.is_floating_point() or latents.is_meta:
        raise ValueError("latents: expected a dense tensor of floating-point numbers")
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents: expected the shape {shape}, got {tuple(latents.shape)}")
    if not is_finite(latents):
        raise ValueError("latents: numbers that are not finite")
    return latents.to(device, torch.float32)


def rows(cond: Cond, count: int) -> int:
    """As many samples as the condition has rows."""
    given = cond.tokens if cond.tokens is not None else cond.labels
    return count if given is None else len(given)


def pure(sampler: str, level: Level, noise: Latent) -> Latent:
    """The noise that sampling starts from.

    On a variance-preserving path a little signal is left at the first level; what stands for it
    is more noise, or nothing with the samplers that came from variance-exploding paths.
    """
    preserving = abs(float(level.alpha) ** 2 + float(level.sigma) ** 2 - 1) < 1e-6
    return noise if preserving and sampler not in FROM_SIGMA else float(level.sigma) * noise
