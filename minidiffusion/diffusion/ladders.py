"""Ladders: the levels that a sampler visits, from noisy to clean. Data; a sampler knows no more.

Grid spacings walk the thousand training times; noise spacings walk the noise itself. Each ladder
of n steps has n + 1 levels and ends at the clean picture, except "ldm", whose last level is the
first training time, as in latent diffusion's own code.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np

from minidiffusion.diffusion.levels import Level, Scalar

GRID = 1000
"""Training times of a path."""


@runtime_checkable
class Path(Protocol):
    """A noising process as two functions, alpha and sigma, of one time."""

    def level(self, t: Scalar) -> Level:
        """The level at t in [0, 1]: 0 is clean (or the least noise), 1 the most."""
        ...

    def at(self, time: Scalar) -> Level:
        """The level at the time that a network is fed."""
        ...

    def at_noise(self, noise: float) -> Level:
        """The level of this much noise: sigma / alpha, or sigma itself on a flow."""
        ...

    def grid(self, index: float) -> Level:
        """The level of training time ``index`` in 0..999."""
        ...

    def ends(self) -> tuple[float, float]:
        """t of the first and the last level of an evenly spaced ladder."""
        ...

    def noises(self) -> tuple[float, float]:
        """The most and the least noise, as ``at_noise`` takes it."""
        ...

    def clean(self) -> Level: ...


Spacing = Callable[[Path, int], list[Level]]


def leading(path: Path, n: int, offset: int = 0) -> list[Level]:
    """Every (1000 // n)-th training time, from the cleanest on (Ho et al. 2020, DDIM's code)."""
    places = [float(min(k * (GRID // n) + offset, GRID - 1)) for k in range(n)]
    return [path.grid(i) for i in reversed(places)] + [path.clean()]


def ldm(path: Path, n: int) -> list[Level]:
    """Leading plus one, ending at training time 0 instead of at the clean picture."""
    return [*leading(path, n, offset=1)[:-1], path.grid(0.0)]


def trailing(path: Path, n: int) -> list[Level]:
    """From the last training time downwards (Lin et al. 2023, table 2)."""
    places = np.round(np.arange(GRID, 0, -GRID / n))[:n] - 1
    return [path.grid(float(i)) for i in places] + [path.clean()]


def linspace(path: Path, n: int) -> list[Level]:
    """Even in t, both ends included."""
    return [path.level(float(t)) for t in np.linspace(*path.ends(), n)] + [path.clean()]


def sgm_uniform(path: Path, n: int) -> list[Level]:
    """Even in t down to the clean end, which is left out: n + 1 points, the last replaced."""
    return [path.level(float(t)) for t in np.linspace(1, 0, n + 1)[:-1]] + [path.clean()]


def karras(path: Path, n: int, rho: float = 7.0) -> list[Level]:
    """Even in noise^(1/rho) (Karras et al. 2022, eq. 5)."""
    high, low = path.noises()
    ramp = np.linspace(high ** (1 / rho), low ** (1 / rho), n) ** rho
    return [path.at_noise(float(s)) for s in ramp] + [path.clean()]


def exponential(path: Path, n: int) -> list[Level]:
    """Even in log noise."""
    high, low = path.noises()
    ramp = np.exp(np.linspace(math.log(high), math.log(low), n))
    return [path.at_noise(float(s)) for s in ramp] + [path.clean()]


def beta(path: Path, n: int, shape: float = 0.6) -> list[Level]:
    """Noise at the quantiles of Beta(0.6, 0.6): more steps at both ends (Lee et al. 2024)."""
    high, low = path.noises()
    ramp = [low + (high - low) * _beta_quantile(u, shape) for u in np.linspace(1, 0, n)]
    return [path.at_noise(float(s)) for s in ramp] + [path.clean()]


def _beta_quantile(u: float, a: float) -> float:
    """The point below which a symmetric Beta(a, a) holds the share u, by bisection.

    The lower half's integral is the series x^a * sum_k (1-a)_k x^k / (k! (a+k)), which gains a
    binary digit a term for x <= 1/2; the upper half is its mirror image.
    """
    if u > 0.5:
        return 1 - _beta_quantile(1 - u, a)
    whole = math.gamma(a) ** 2 / math.gamma(2 * a)
    terms = np.cumprod([1.0] + [(k + 1 - a) / (k + 1) for k in range(80)]) / (a + np.arange(81))
    low, high = 0.0, 0.5
    for _ in range(100):
        x = (low + high) / 2
        share = x**a * float(terms @ x ** np.arange(81)) / whole
        low, high = (x, high) if share < u else (low, x)
    return (low + high) / 2


SPACINGS: dict[str, Spacing] = {
    "leading": leading,
    "ldm": ldm,
    "trailing": trailing,
    "linspace": linspace,
    "sgm_uniform": sgm_uniform,
    "karras": karras,
    "exponential": exponential,
    "beta": beta,
}


def ladder(
    path: Path, steps: int | Sequence[float], spacing: str = "trailing", strength: float = 1.0
) -> list[Level]:
    """The levels of a run of ``steps`` steps, or of the network times named one by one.

    strength below 1 keeps the last share of the steps, for starting from a noised picture. Raises
    ValueError for fewer than 1 or more than 1000 steps, an unknown spacing, rising times.
    """
    if isinstance(steps, int) and not isinstance(steps, bool):
        if spacing not in SPACINGS:
            raise ValueError(f"spacing: unknown {spacing!r}; allowed: {', '.join(SPACINGS)}")
        if not 1 <= steps <= GRID:
            raise ValueError(f"steps: must be 1..{GRID}, got {steps}")
        levels = SPACINGS[spacing](path, steps)
    elif isinstance(steps, list | tuple):
        times = [float(time) for time in steps]
        if not times or any(not a > b for a, b in pairwise(times)):
            raise ValueError(f"steps: explicit times must fall, got {times}")
        levels = [path.at(time) for time in times] + [path.clean()]
    else:
        raise ValueError(f"steps: must be a whole number or a list of times, got {steps!r}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: must be in [0, 1], got {strength}")
    count = len(levels) - 1
    levels = levels[count - int(count * strength) :]
    return [level._replace(index=k) for k, level in enumerate(levels)]
