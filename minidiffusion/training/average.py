"""Moving averages of the weights: the one that ships, and those whose length is chosen afterwards.

The second kind is post-hoc EMA (Karras et al. 2024, EDM2, arXiv:2312.02696, section 3.1 and
appendix C). Update i of T weighs (i^(g+1) - (i-1)^(g+1)) / T^(g+1): the profile
p(u) = (g+1) u^g / T^(g+1) on [0, T], summed over unit cells. Such averages of one or two
exponents g, stored now and then, span the others: their weighted sum comes close to any.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """The decay of update ``step`` (from 0): less at first, so that the start is forgotten."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def update(average: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """average = decay * average + (1 - decay) * weights, in place."""
    torch._foreach_lerp_(list(average), list(weights), 1 - decay)


WIDEST = 12**-0.5
"""The relative width at exponent 0, where all updates weigh the same."""


def exponent(sigma_rel: float) -> float:
    """The exponent g > 0 of the profile whose standard deviation is ``sigma_rel`` times its length.

    Raises ValueError unless 0 < sigma_rel < 12^-1/2 (0.2887).
    """
    if not 0 < sigma_rel < WIDEST:
        raise ValueError(f"sigma_rel: must be above 0 and below {WIDEST:.4f}, got {sigma_rel:g}")
    # sigma_rel^2 (g + 2)^2 (g + 3) = g + 1; the other two roots are below 0.
    inverse = sigma_rel**-2
    g = float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())
    slope = (3 * g + 14) * g + 16 - inverse
    return g - (((g + 7) * g + 16 - inverse) * g + 12 - inverse) / slope  # the last digits


def power_decay(count: int, g: float) -> float:
    """The decay of update ``count`` (from 1) that makes a power-function average; first it is 0."""
    return float((1 - 1 / count) ** (g + 1))


class Profile(NamedTuple):
    """What each update up to ``length`` weighs in a power-function average of exponent g."""

    g: float
    length: float


class Fit(NamedTuple):
    """How much each stored average counts, and how far the sum's profile is from what was wanted.

    error: the L2 distance of the two, relative to the wanted one's length.
    """

    weights: Float[Tensor, " n"]
    error: float


def inner(a: Profile, b: Profile) -> float:
    """The integral of the two profiles' product."""
    a, b = sorted((a, b), key=lambda profile: profile.length)
    scale = (a.g + 1) * (b.g + 1) / (a.g + b.g + 1)
    return float(scale / b.length * (a.length / b.length) ** b.g)


def reconstruction(stored: Sequence[Profile], wanted: Profile) -> Fit:
    """The weights, of sum 1, whose combination of stored profiles is closest to the wanted one.

    Least squares in L2 over the updates; a profile that is stored itself is taken alone. That the
    sum is 1 keeps a constant what it is. Everything in float64.
    """
    if wanted in stored:
        alone = torch.zeros(len(stored), dtype=torch.float64)
        alone[list(stored).index(wanted)] = 1
        return Fit(alone, 0.0)
    # Profiles of length 1, else the short ones' large products drown the others.
    sizes = torch.tensor([inner(p, p) ** 0.5 for p in stored], dtype=torch.float64)
    products = torch.tensor([[inner(p, q) for q in stored] for p in stored], dtype=torch.float64)
    aims = torch.tensor([inner(p, wanted) for p in stored], dtype=torch.float64) / sizes
    # A Lagrange multiplier is the last unknown, that the sum is 1 the last equation.
    edge = 1 / sizes * sizes.min()
    system = torch.zeros(len(stored) + 1, len(stored) + 1, dtype=torch.float64)
    system[:-1, :-1] = products / torch.outer(sizes, sizes)
    system[:-1, -1] = system[-1, :-1] = edge
    right = torch.cat([aims, sizes.min()[None]])
    # Neighbours are nearly parallel: directions below rounding are left out, not blown up.
    found = torch.linalg.lstsq(system, right[:, None], rcond=1e-13, driver="gelsd").solution
    weights = found[:-1, 0] / sizes
    own = inner(wanted, wanted)
    rest = own - 2 * weights @ (aims * sizes) + weights @ products @ weights
    return Fit(weights, max(0.0, float(rest) / own) ** 0.5)
