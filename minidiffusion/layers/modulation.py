"""Adaptive layer norm: a condition shifts, scales and gates what a block does (adaLN-zero)."""

from typing import NamedTuple

from torch import nn
from torch.nn import functional as F

from minidiffusion.shapes import Features, Tokens


class Modulation(NamedTuple):
    """What a condition does to one branch of a block."""

    shift: Features
    scale: Features
    gate: Features

    def enter(self, x: Tokens) -> Tokens:
        """Layer norm without weights of its own, then the condition's scale and shift."""
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return x * (1 + self.scale[:, None]) + self.shift[:, None]

    def leave(self, x: Tokens) -> Tokens:
        return x * self.gate[:, None]


class AdaLN(nn.Module):
    """A condition to the modulations of ``branches`` branches, all zero at initialisation.

    With gates of zero a fresh block is the identity (Peebles & Xie 2023, section 3.2).
    """

    def __init__(self, width: int, branches: int) -> None:
        super().__init__()
        self.branches = branches
        self.linear = nn.Linear(width, 3 * branches * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, cond: Features) -> list[Modulation]:
        parts = self.linear(F.silu(cond)).chunk(3 * self.branches, dim=-1)
        return [Modulation(*parts[3 * i : 3 * i + 3]) for i in range(self.branches)]
