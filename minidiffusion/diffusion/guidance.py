"""Guidance and inpainting: wrappers around a denoiser or a network, invisible to the sampler.

The scale follows Stable Diffusion: 1 is the conditional model alone, 0 the unconditional one
(the classifier-free paper's w is scale - 1).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from minidiffusion.diffusion.levels import Denoise, Estimate, Level, denoiser
from minidiffusion.shapes import Cond, Latent, Network

Combine = Callable[[Sequence[Latent], Level], Latent]
"""Network outputs, one for each condition, become one output."""


def cfg(scale: float) -> Combine:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6) of (conditional, unconditional).

    Bit-equal to the conditional output at scale 1 and to the unconditional one at 0.
    """

    def combine(outs: Sequence[Latent], level: Level) -> Latent:
        conditional, unconditional = outs
        if scale in (0, 1):
            return conditional if scale == 1 else unconditional
        return unconditional + scale * (conditional - unconditional)

    return combine


def cfg_zero(scale: float, silent: int = 1) -> Combine:
    """CFG-Zero* (Fan et al. 2025) for flow: cfg from the unconditional output at its best length.

    In the first ``silent`` steps, where a velocity is worse than none, nothing moves.
    """

    def combine(outs: Sequence[Latent], level: Level) -> Latent:
        conditional, unconditional = outs
        if level.index < silent:
            return torch.zeros_like(conditional)
        axes = tuple(range(1, conditional.ndim))
        shared = (conditional * unconditional).sum(axes, keepdim=True)
        length = unconditional.square().sum(axes, keepdim=True)
        fitted = unconditional * (shared / length.clamp(min=torch.finfo(length.dtype).tiny))
        return fitted + scale * (conditional - fitted)

    return combine


class SkipLayers(NamedTuple):
    """Skip-layer guidance (Stability AI 2024): away from what the network says without some layers.

    network: the one that leaves them out. In ladders it acts at first < index < last.
    """

    network: Network
    scale: float = 2.5
    first: float = 0.0
    last: float = math.inf


def rescaled(combine: Combine, share: float = 0.7) -> Combine:
    """Keep the guided output's spread at the conditional one's (Lin et al. 2023, eqs. 14-16)."""

    def inner(outs: Sequence[Latent], level: Level) -> Latent:
        guided, conditional = combine(outs, level), outs[0]
        axes = tuple(range(1, guided.ndim))
        spread = guided.std(axes, keepdim=True)
        # What is one number everywhere, such as CFG-Zero*'s first step, has no spread to restore.
        ratio = torch.where(spread > 0, conditional.std(axes, keepdim=True) / spread, 1.0)
        return guided * (share * ratio + 1 - share)

    return inner


def guided(
    network: Network, target: str, conds: Sequence[Cond], combine: Combine,
    skipping: SkipLayers | None = None,
) -> Denoise:  # fmt: skip
    """A denoiser that asks the network about every condition in one batch and combines.

    skipping: its share of the first condition's output is added.
    """
    every = stacked(conds)

    def together(level: Level) -> Network:
        def ask(x: Latent, t: torch.Tensor, cond: Cond) -> Latent:
            count = len(conds)
            outs = network(x.repeat(count, *[1] * (x.ndim - 1)), t.repeat(count), cond)
            parts = outs.to(x.dtype).chunk(count)
            found = combine(parts, level)
            if skipping is None or not skipping.first < level.index < skipping.last:
                return found
            less = skipping.network(x, t, conds[0])
            return found + skipping.scale * (parts[0] - less.to(x.dtype))

        return ask

    return lambda x, level: denoiser(together(level), target, every)(x, level)


def interval(inside: Denoise, outside: Denoise, low: float, high: float) -> Denoise:
    """Ask the one where low < t <= high, in network time, and the other elsewhere.

    Guided inside, the conditional model alone outside: guidance at the noisiest levels costs
    variety, at the cleanest it does nothing (Kynkäänniemi et al. 2024), and a pass as well.
    """

    def inner(x: Latent, level: Level) -> Estimate:
        return (inside if low < float(level.t) <= high else outside)(x, level)

    return inner


def stacked(conds: Sequence[Cond]) -> Cond:
    """Their rows one below the other; ValueError where a field is given for some of them only."""
    return Cond(*(_stack(parts) for parts in zip(*conds, strict=True)))


def _stack(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    given = [part for part in parts if part is not None]
    if given and len(given) != len(parts):
        raise ValueError("a field of Cond must be given for every condition or for none")
    return torch.cat(given) if given else None


def inpainted(
    denoise: Denoise, known: Latent, mask: Latent, noise: Latent | None = None
) -> Denoise:
    """Paint only where mask is 1: elsewhere the estimate is the known picture, at every level.

    The noise is read again for the new estimate, so the sample stays on the path that it is on.
    With ``noise`` what is known lies under that noise at every level after the first, which is
    how Stable Diffusion paints with a model that was not trained to (Lugmayr et al. 2022, eq. 8).
    """

    def inner(x: Latent, level: Level) -> Estimate:
        if noise is not None:
            if level.index > 0:
                x = torch.lerp(level.mix(known, noise), x, mask)
            x0, eps = denoise(x, level)
            return Estimate(torch.lerp(known, x0, mask), torch.lerp(noise, eps, mask))
        x0 = torch.lerp(known, denoise(x, level).x0, mask)
        return Estimate(x0, (x - level.alpha * x0) / level.sigma)

    return inner
