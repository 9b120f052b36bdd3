"""Levels of noise, and the one table that every prediction type is a row of.

Every noising process is ``x = alpha * x0 + sigma * eps``; every network output is a mixture
``out = a * x0 + b * eps``. Aiming a loss is that row forwards, reading a network is the same row
inverted together with the noising equation: one 2x2 solve.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from minidiffusion.shapes import Cond, Latent, Network

Scalar = float | Float[Tensor, " b"]
"""One number a batch (sampling: Python floats, so float64) or one a picture (training)."""
Target = Literal["eps", "x0", "v", "flow"]


def spread(value: Scalar, like: Latent) -> float | Tensor:
    """One value a picture, shaped so that it multiplies ``like`` picture by picture."""
    if isinstance(value, float | int):
        return value
    return value.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


class Level(NamedTuple):
    """A place on a noising path: ``x = alpha * x0 + sigma * eps``.

    t is the time that a network is fed (variance preserving: 0..999, fractions allowed; rectified
    flow: 1000 * sigma; variance exploding: 0..1000). index is the place in a ladder.
    """

    t: Scalar
    alpha: Scalar
    sigma: Scalar
    index: int = 0  # type: ignore[assignment]  # the field wins over tuple.index

    def mix(self, x0: Latent, eps: Latent) -> Latent:
        """The noised sample."""
        return spread(self.alpha, x0) * x0 + spread(self.sigma, x0) * eps

    def input_scale(self) -> Scalar:
        """What the input of a network is multiplied by, so that its variance never exceeds one.

        1 on variance-preserving and flow paths; 1/sqrt(alpha^2 + sigma^2) where variance explodes
        (Karras et al. 2022, table 1, c_in for unit-variance data).
        """
        if isinstance(self.alpha, Tensor) and isinstance(self.sigma, Tensor):
            return torch.hypot(self.alpha, self.sigma).clamp(min=1).reciprocal()
        size = math.hypot(self.alpha, self.sigma)
        return 1 / size if size > 1 + 1e-9 else 1.0


class Estimate(NamedTuple):
    """What a network's output says about the clean sample and the noise within ``x``."""

    x0: Latent
    eps: Latent


class Step(NamedTuple):
    """One step taken by a sampler: x lies at ``level``; x0 is the live preview."""

    index: int  # type: ignore[assignment]  # the field wins over tuple.index
    x: Latent
    x0: Latent
    level: Level


Denoise = Callable[[Latent, Level], Estimate]
Noise = Callable[[int], Latent]
"""The draw of step k."""

TARGETS: dict[str, Callable[[Level], tuple[Scalar, Scalar]]] = {
    "eps": lambda level: (0.0, 1.0),  # Ho et al. 2020
    "x0": lambda level: (1.0, 0.0),
    "v": lambda level: (-level.sigma, level.alpha),  # Salimans & Ho 2022, section 4
    "flow": lambda level: (-1.0, 1.0),  # Liu et al. 2022: the velocity eps - x0
}
"""out = a * x0 + b * eps: the row (a, b) of each prediction type."""


def row(target: str, level: Level) -> tuple[Scalar, Scalar]:
    if target not in TARGETS:
        raise ValueError(f"target: unknown {target!r}; allowed: {', '.join(TARGETS)}")
    return TARGETS[target](level)


def aim(target: str, level: Level, x0: Latent, eps: Latent) -> Latent:
    """What a network of this prediction type should answer: a * x0 + b * eps."""
    a, b = row(target, level)
    return spread(a, x0) * x0 + spread(b, x0) * eps


def read(target: str, level: Level, x: Latent, out: Latent) -> Estimate:
    """What a network's output means: solve x = alpha*x0 + sigma*eps, out = a*x0 + b*eps.

    Raises ValueError where the two equations say the same thing: an eps-network at alpha = 0, an
    x0-network at sigma = 0.
    """
    a, b = row(target, level)
    alpha, sigma = level.alpha, level.sigma
    det = alpha * b - sigma * a
    if bool((det == 0).any() if isinstance(det, Tensor) else det == 0):
        raise ValueError(
            f"a network that predicts {target!r} says nothing at alpha = {alpha}, sigma = {sigma}: "
            "use another target, or a ladder without this level"
        )
    # The coefficients first: an eps-network's eps then comes back to the bit.
    x0 = spread(b / det, x) * x - spread(sigma / det, x) * out
    eps = spread(alpha / det, x) * out - spread(a / det, x) * x
    return Estimate(x0, eps)


def denoiser(network: Network, target: str, conds: Cond) -> Denoise:
    """A network and its prediction type, seen by a sampler: (x, level) -> (x0, eps).

    The network runs in its own dtype; the mathematics stays in that of x.
    """

    def denoise(x: Latent, level: Level) -> Estimate:
        times = level.t if isinstance(level.t, Tensor) else x.new_full((len(x),), level.t)
        out = network(spread(level.input_scale(), x) * x, times, conds)
        return read(target, level, x, out.to(x.dtype))

    return denoise
