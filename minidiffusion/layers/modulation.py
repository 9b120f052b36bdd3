"""Adaptive layer norm: a condition shifts, scales and gates what a block does (adaLN-zero)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minidiffusion.shapes import Features, Labels, Tokens


class Modulation(NamedTuple):
    """What a condition does to one branch of a block."""

    shift: Features
    scale: Features
    gate: Features | None = None

    def enter(self, x: Tokens) -> Tokens:
        """Layer norm without weights of its own, then the condition's scale and shift."""
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return x * (1 + self.scale[:, None]) + self.shift[:, None]

    def leave(self, x: Tokens) -> Tokens:
        assert self.gate is not None
        return x * self.gate[:, None]

    def adapt(self, x: Tokens) -> Tokens:
        """As `enter`, scaled and shifted in one step: a kernel less, and rounded once."""
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return torch.addcmul(self.shift[:, None], x, 1 + self.scale[:, None])

    def add(self, x: Tokens, branch: Tokens) -> Tokens:
        """x + leave(branch), in one step."""
        assert self.gate is not None
        return torch.addcmul(x, branch, self.gate[:, None])


class AdaLN(nn.Module):
    """A condition to the modulations of ``branches`` branches, all zero at initialisation.

    With gates of zero a fresh block is the identity (Peebles & Xie 2023, section 3.2).
    """

    def __init__(self, width: int, branches: int, *, gated: bool = True) -> None:
        super().__init__()
        self.branches, self.each = branches, 3 if gated else 2
        self.linear: nn.Module = nn.Linear(width, self.each * branches * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, cond: Features) -> list[Modulation]:
        return self.read(F.silu(cond))

    def read(self, cond: Features | Labels) -> list[Modulation]:
        """Of a condition that went through its SiLU, or, after `tabulate`, of its number."""
        parts = self.linear(cond).chunk(self.each * self.branches, dim=-1)
        return [Modulation(*parts[i : i + self.each]) for i in range(0, len(parts), self.each)]

    def tabulate(self, conds: Sequence[Features], weight: Tensor, bias: Tensor) -> None:
        """What these weights make of each condition takes the place of the layer and its weights.

        conds: batches, projected one by one, as they would be if met one by one; `read` then takes
        the numbers of their rows. The number after the last stands for all others: NaN.
        """
        rows = [F.linear(cond, weight, bias) for cond in conds]
        rows.append(torch.full_like(rows[0][:1], torch.nan))
        self.linear = nn.Embedding.from_pretrained(torch.cat(rows))
