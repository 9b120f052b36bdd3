"""Noising paths: how much signal (alpha) and how much noise (sigma) there is at each time.

A path is two functions of t. Training draws levels from it, sampling walks a ladder down it.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minidiffusion.diffusion.densities import UNIFORM, Density
from minidiffusion.diffusion.ladders import GRID, Path, ladder
from minidiffusion.diffusion.levels import Level, Scalar

BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": (0.0, 0.999)}
"""First and last beta: DDPM's, Stable Diffusion's; for cosine only the cap of the last counts."""


def _unit(t: Scalar) -> Scalar:
    if not isinstance(t, Tensor) and not 0 <= t <= 1:
        raise ValueError(f"t: must be in [0, 1], got {t}")
    return t


def clean(path: Path) -> Level:
    """Where every path ends."""
    return Level(0.0, 1.0, 0.0)


def draw(
    path: Path, n: int, u: Float[Tensor, " b"] | None = None, density: Density = UNIFORM
) -> Level:
    """n levels to train at, of any time. u: n numbers in (0, 1), else random."""
    return path.level(density.at(torch.rand(n) if u is None else u))


@dataclass(frozen=True)
class VariancePreserving:
    """DDPM's path (Ho et al. 2020): alpha^2 + sigma^2 = 1 over a thousand training times.

    beta_start and beta_end default to the schedule's usual values. Between two training times the
    log of sigma / alpha is interpolated. zero_terminal_snr moves the last alpha to 0 exactly
    (Lin et al. 2023, algorithm 1).
    """

    name: ClassVar[str] = "variance_preserving"
    ladder, clean = ladder, clean
    schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    beta_start: float | None = field(default=None, metadata={"above": 0})
    beta_end: float | None = field(default=None, metadata={"above": 0})
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in BETAS:
            raise ValueError(f"schedule: unknown {self.schedule!r}; allowed: {', '.join(BETAS)}")
        start, end = self._ends()
        if not 0 <= start <= end < 1:
            raise ValueError(f"betas: 0 <= beta_start <= beta_end < 1, got {start}, {end}")

    def _ends(self) -> tuple[float, float]:
        start, end = BETAS[self.schedule]
        return (
            start if self.beta_start is None else self.beta_start,
            end if self.beta_end is None else self.beta_end,
        )

    def betas(self) -> Float[np.ndarray, "1000"]:
        """The noise added at each training time, in float64."""
        start, end = self._ends()
        if self.schedule == "linear":
            return np.linspace(start, end, GRID)
        if self.schedule == "scaled_linear":
            return np.asarray(np.linspace(start**0.5, end**0.5, GRID) ** 2)
        times = np.arange(GRID + 1) / GRID  # Nichol & Dhariwal 2021, eq. 17
        signal = np.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.asarray(np.minimum(1 - signal[1:] / signal[:-1], end))

    @cached_property
    def alphas_cumprod(self) -> Float[np.ndarray, "1000"]:
        """alpha^2 at each training time, in float64."""
        cumulative = np.asarray(np.cumprod(1 - self.betas()))
        if not self.zero_terminal_snr:
            return cumulative
        alphas = np.sqrt(cumulative)
        alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
        return np.asarray(alphas**2)

    @cached_property
    def _log_noise(self) -> Float[np.ndarray, "1000"]:
        squares = np.maximum(self.alphas_cumprod, 2.0**-48)  # finite where alpha = 0
        return 0.5 * np.log((1 - squares) / squares)

    def level(self, t: Scalar) -> Level:
        return self.at((GRID - 1) * _unit(t))

    def at(self, time: Scalar) -> Level:
        if isinstance(time, Tensor):
            return self._at_many(time)
        if not 0 <= time <= GRID - 1:
            raise ValueError(f"time: must be in [0, {GRID - 1}], got {time}")
        if float(time).is_integer():
            square = float(self.alphas_cumprod[int(time)])
            return Level(float(time), math.sqrt(square), math.sqrt(1 - square))
        noise = math.exp(np.interp(time, np.arange(GRID), self._log_noise))
        return Level(float(time), 1 / math.hypot(1, noise), noise / math.hypot(1, noise))

    def _at_many(self, time: Float[Tensor, " b"]) -> Level:
        levels = [self.at(float(value)) for value in time.double().tolist()]
        numbers = torch.tensor([(v.alpha, v.sigma) for v in levels], dtype=torch.float64)
        alpha, sigma = numbers.to(device=time.device, dtype=time.dtype).unbind(1)
        return Level(time, alpha, sigma)

    def at_noise(self, noise: float) -> Level:
        """noise is sigma / alpha; the time is the interpolated one, as k-diffusion's users know."""
        time = float(np.interp(math.log(noise), self._log_noise, np.arange(GRID)))
        return Level(time, 1 / math.hypot(1, noise), noise / math.hypot(1, noise))

    def grid(self, index: float) -> Level:
        return self.at(index)

    def ends(self) -> tuple[float, float]:
        return 1.0, 0.0

    def noises(self) -> tuple[float, float]:
        return math.exp(self._log_noise[-1]), math.exp(self._log_noise[0])

    def draw(
        self, n: int, u: Float[Tensor, " b"] | None = None, density: Density = UNIFORM
    ) -> Level:
        """n levels to train at, of whole training times. u: n numbers in (0, 1), else random."""
        t = density.at(torch.rand(n) if u is None else u)
        return self.at((t * GRID).floor().clamp(max=GRID - 1))


@dataclass(frozen=True)
class RectifiedFlow:
    """The straight path x = (1 - sigma) x0 + sigma eps (Liu et al. 2022), with a timestep shift.

    sigma(t) = shift t / (1 + (shift - 1) t) (Esser et al. 2024, eq. 23): a shift above 1 spends
    more of the path at high noise, which larger pictures want.
    """

    name: ClassVar[str] = "rectified_flow"
    ladder, clean, draw = ladder, clean, draw
    shift: float = field(default=1.0, metadata={"above": 0})

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift: must be above 0, got {self.shift}")

    def resized(self, pixels: int, usual: int) -> "RectifiedFlow":
        """The path for pictures of so many pixels instead of the usual number: more of them hide
        less under the same noise, so the shift grows as the root (Esser et al. 2024, eq. 23)."""
        return RectifiedFlow(self.shift * math.sqrt(pixels / usual))

    def _shifted(self, t: Scalar) -> Scalar:
        return self.shift * t / (self.shift * t + (1 - t))  # exactly 1 at t = 1, for any shift

    def level(self, t: Scalar) -> Level:
        return self.at(GRID * self._shifted(_unit(t)))

    def at(self, time: Scalar) -> Level:
        if not isinstance(time, Tensor) and not 0 <= time <= GRID:
            raise ValueError(f"time: must be in [0, {GRID}], got {time}")
        sigma = time / GRID
        return Level(time, 1 - sigma, sigma)

    def at_noise(self, noise: float) -> Level:
        """noise is sigma."""
        return self.at(GRID * noise)

    def grid(self, index: float) -> Level:
        return self.level((index + 1) / GRID)

    def ends(self) -> tuple[float, float]:
        """Stable Diffusion 3's convention: the least sigma has been shifted once already."""
        return 1.0, float(self._shifted(1 / GRID))

    def noises(self) -> tuple[float, float]:
        high, low = self.ends()
        return float(self._shifted(high)), float(self._shifted(low))


@dataclass(frozen=True)
class VarianceExploding:
    """The signal stays, the noise grows: x = x0 + sigma eps (Song et al. 2021, eq. 30).

    sigma is geometric in t; the network is fed t in 0..1000 and its input is scaled to variance 1.
    """

    name: ClassVar[str] = "variance_exploding"
    ladder, clean, draw = ladder, clean, draw
    sigma_min: float = field(default=0.002, metadata={"above": 0})
    sigma_max: float = field(default=80.0, metadata={"above": 0})

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigmas: 0 < sigma_min < sigma_max, got {self.sigma_min}, {self.sigma_max}"
            )

    def level(self, t: Scalar) -> Level:
        return self.at(GRID * _unit(t))

    def at(self, time: Scalar) -> Level:
        if not isinstance(time, Tensor) and not 0 <= time <= GRID:
            raise ValueError(f"time: must be in [0, {GRID}], got {time}")
        span = math.log(self.sigma_max / self.sigma_min)
        if isinstance(time, Tensor):
            sigma = self.sigma_min * torch.exp(span * time / GRID)
            return Level(time, torch.ones_like(sigma), sigma)
        return Level(float(time), 1.0, self.sigma_min * math.exp(span * time / GRID))

    def at_noise(self, noise: float) -> Level:
        """noise is sigma."""
        span = math.log(self.sigma_max / self.sigma_min)
        return Level(GRID * math.log(noise / self.sigma_min) / span, 1.0, noise)

    def grid(self, index: float) -> Level:
        return self.level(index / (GRID - 1))

    def ends(self) -> tuple[float, float]:
        return 1.0, 0.0

    def noises(self) -> tuple[float, float]:
        return self.sigma_max, self.sigma_min


PATHS = {p.name: p for p in (VariancePreserving, RectifiedFlow, VarianceExploding)}
