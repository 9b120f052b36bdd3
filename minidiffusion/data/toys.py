"""Clouds of points in the plane: a diffusion model trains on them in seconds, and one can look."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from minidiffusion.data.dataset import Tensors
from minidiffusion.typed import SEED

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Cloud(NamedTuple):
    points: Floats
    labels: Ints | None = None
    classes: tuple[str, ...] = ()


def two_moons(draw: np.random.Generator, count: int) -> Cloud:
    moon = draw.integers(2, size=count)
    angle = np.pi * draw.random(count)
    side = 1 - 2 * moon  # the lower moon is the upper one, turned by half a turn
    x = side * (np.cos(angle) - 0.5)
    y = side * (np.sin(angle) - 0.25)
    noise = 0.06 * draw.standard_normal((count, 2))
    return Cloud((np.stack([x, y], 1) + noise) * [1.15, 2], moon, ("upper", "lower"))


def eight_gaussians(draw: np.random.Generator, count: int) -> Cloud:
    mode = draw.integers(8, size=count)
    angle = mode * (np.pi / 4)
    centre = math.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], 1)
    return Cloud(
        centre + 0.1 * draw.standard_normal((count, 2)),
        mode,
        tuple(f"{45 * k} degrees" for k in range(8)),
    )


def checkerboard(draw: np.random.Generator, count: int) -> Cloud:
    """The dark fields of a board of 4 by 4, in [-sqrt(3), sqrt(3)] squared: variance one."""
    column = draw.integers(4, size=count)
    row = 2 * draw.integers(2, size=count) + column % 2
    corner = np.stack([column, row], 1) - 2
    return Cloud((corner + draw.random((count, 2))) * (math.sqrt(3) / 2))


def spiral(draw: np.random.Generator, count: int) -> Cloud:
    """Two arms of a turn and a half, evenly filled: a half turn maps each onto the other."""
    arm = draw.integers(2, size=count)
    angle = 3 * np.pi * np.sqrt(draw.random(count))
    radius = (1 - 2 * arm) * angle / (1.5 * np.pi)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    return Cloud(points + 0.05 * draw.standard_normal((count, 2)), arm, ("first", "second"))


TOYS: dict[str, Callable[[np.random.Generator, int], Cloud]] = {
    "two_moons": two_moons,
    "eight_gaussians": eight_gaussians,
    "checkerboard": checkerboard,
    "spiral": spiral,
}


@dataclass(frozen=True)
class Toy:
    """``count`` points of about unit scale; the same seed draws the same points."""

    name: ClassVar[str] = "toy"
    kind: Literal["two_moons", "eight_gaussians", "checkerboard", "spiral"] = "two_moons"
    count: int = field(default=10_000, metadata={"min": 1, "max": 10**8})
    seed: int = field(default=0, metadata=SEED)

    def open(self) -> Tensors:
        if self.kind not in TOYS:
            raise ValueError(f"toy {self.kind!r}: choose one of {', '.join(TOYS)}")
        if self.count < 1 or self.seed < 0:
            raise ValueError(f"count {self.count} and seed {self.seed}: at least 1 and 0")
        draw = np.random.Generator(np.random.Philox(key=self.seed))
        points, labels, classes = TOYS[self.kind](draw, self.count)
        x = torch.from_numpy(points.astype(np.float32))
        return Tensors(x, None if labels is None else torch.from_numpy(labels), classes)
