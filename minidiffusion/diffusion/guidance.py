"""Guidance and inpainting: wrappers around a denoiser or a network, invisible to the sampler.

The scale follows Stable Diffusion: 1 is the conditional model alone, 0 the unconditional one
(the classifier-free paper's w is scale - 1).
"""

from collections.abc import Callable, Sequence

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


def rescaled(combine: Combine, share: float = 0.7) -> Combine:
    """Keep the guided output's spread at the conditional one's (Lin et al. 2023, eqs. 14-16)."""

    def inner(outs: Sequence[Latent], level: Level) -> Latent:
        guided, conditional = combine(outs, level), outs[0]
        axes = tuple(range(1, guided.ndim))
        ratio = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
        return guided * (share * ratio + 1 - share)

    return inner


def guided(network: Network, target: str, conds: Sequence[Cond], combine: Combine) -> Denoise:
    """A denoiser that asks the network about every condition in one batch and combines."""
    stacked = Cond(*(_stack(parts) for parts in zip(*conds, strict=True)))

    def together(level: Level) -> Network:
        def ask(x: Latent, t: torch.Tensor, cond: Cond) -> Latent:
            count = len(conds)
            outs = network(x.repeat(count, *[1] * (x.ndim - 1)), t.repeat(count), cond)
            return combine(outs.to(x.dtype).chunk(count), level)

        return ask

    return lambda x, level: denoiser(together(level), target, stacked)(x, level)


def interval(inside: Denoise, outside: Denoise, low: float, high: float) -> Denoise:
    """Ask the one where low < t <= high, in network time, and the other elsewhere.

    Guided inside, the conditional model alone outside: guidance at the noisiest levels costs
    variety, at the cleanest it does nothing (Kynkäänniemi et al. 2024), and a pass as well.
    """

    def inner(x: Latent, level: Level) -> Estimate:
        return (inside if low < float(level.t) <= high else outside)(x, level)

    return inner


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
