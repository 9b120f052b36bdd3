"""From noise to samples: one walk for drawing, starting from a picture and painting over."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
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
    Step,
    cfg,
    denoiser,
    guided,
    inpainted,
    interval,
    keyed,
    rescaled,
)
from minidiffusion.shapes import Cond, Latent, Network
from minidiffusion.typed import unknown

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


class Start(NamedTuple):
    """Where a walk begins. seeds: one a sample. size: rows and columns, if not the network's own.

    init: clean samples to start from, noised to ``strength`` of the ladder. mask: 1 where init is
    to be painted over. Either may serve several samples, or several channels.
    """

    seeds: Sequence[int]
    size: tuple[int, int] | None = None
    init: Tensor | None = None
    strength: float = 1.0
    mask: Tensor | None = None


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


def walk(
    ask: Network, row: Row, how: Sampling, start: Start, conds: tuple[Cond, Cond | None],
    rescale: float, device: torch.device,
) -> Iterator[Step]:  # fmt: skip
    """Down the ladder; conds: what to draw, and what to lead away from."""
    count, init, mask = len(start.seeds), start.init, start.mask
    if count < 1:
        raise ValueError(f"count: must be at least 1, got {count}")
    if init is None and (mask is not None or start.strength != 1):
        raise ValueError("mask and strength: only with init, the picture to start from")
    shape = (count, *row.shape) if start.size is None else (count, row.shape[0], *start.size)
    noise = keyed(start.seeds, shape[1:], device)
    levels = row.path.ladder(how.steps, str(how.spacing), strength=start.strength)
    first = noise(START)
    cond, against = conds
    denoise = guide(ask, row, how, beside(cond, count, device), against, rescale)
    x0 = fitted("init", torch.zeros(1) if init is None else init, shape, device)
    # A picture to be painted over whole is not looked at: Stable Diffusion starts from noise alone.
    blank = init is None or (mask is not None and start.strength == 1)
    x = pure(how.sampler, levels[0], first) if blank else levels[0].mix(x0, first)
    if mask is not None:
        mask = fitted("mask", mask, shape, device)
        denoise = inpainted(denoise, x0, mask, first)
    if len(levels) == 1:
        yield Step(0, x, x, levels[0])
        return
    for step in SAMPLERS[how.sampler](denoise, x, levels, noise):
        if mask is not None and step.index == len(levels) - 2:
            step = step._replace(x=torch.lerp(x0, step.x, mask))
        yield step


def guide(
    ask: Network, row: Row, how: Sampling, cond: Cond, against: Cond | None, rescale: float
) -> Denoise:
    """One pass where nothing guides, both conditions in one batch where something does."""
    scale, span = how.guidance, how.guidance_interval
    if not scale >= 0 or scale == float("inf"):
        raise ValueError(f"guidance: must be 0 or more, got {scale}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale: must be in [0, 1], got {rescale}")
    alone = denoiser(ask, row.target, cond)
    if scale == 1 or against is None:
        return alone
    combine = rescaled(cfg(scale), rescale) if rescale else cfg(scale)
    both = guided(ask, row.target, [cond, against._replace(concat=cond.concat)], combine)
    return both if span is None else interval(both, alone, low=span[0], high=span[1])


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
