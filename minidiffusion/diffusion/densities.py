"""Where on a path training spends its time: densities of t, as maps from uniform numbers.

A density is its inverse distribution function (or any map with that law), so that one keyed
uniform number a picture decides its time.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Density(Protocol):
    def at(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """t in [0, 1] for uniform u in (0, 1)."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Every time alike."""

    name: ClassVar[str] = "uniform"

    def at(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return u


UNIFORM = Uniform()


@dataclass(frozen=True)
class LogitNormal:
    """logit(t) is normal: most training in the middle (Esser et al. 2024, eq. 19)."""

    name: ClassVar[str] = "logit_normal"
    mean: float = 0.0
    std: float = field(default=1.0, metadata={"above": 0})

    def at(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        z = torch.special.ndtri(u.double().clamp(1e-12, 1 - 1e-12))
        return torch.sigmoid(self.mean + self.std * z).to(u.dtype)


@dataclass(frozen=True)
class Mode:
    """Heavy-tailed with an adjustable middle (Esser et al. 2024, eq. 20); scale in [-1, 1.75]."""

    name: ClassVar[str] = "mode"
    scale: float = field(default=1.29, metadata={"min": -1, "max": 2 / (math.pi - 2)})

    def at(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        t = 1 - u - self.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
        return t.clamp(0, 1)
