"""Times, classes and places as vectors."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiffusion.shapes import Features, Labels, Times


def sinusoidal(t: Times, width: int, period: float = 10_000.0) -> Features:
    """Cosines, then sines, of t at frequencies from 1 down to 1 / period (Ho et al. 2020)."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(period) / half * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def sinusoidal_grid(
    rows: int, columns: int, width: int, *, backwards: bool = False
) -> Float[Tensor, "n d"]:
    """A fixed place code for each patch of a picture: half of it for the row, half the column.

    backwards: columns before rows and sines before cosines, as Stable Diffusion 3 counts.
    """
    if torch.get_default_device().type == "meta":  # torch imports its compiler to compute nothing
        return torch.empty(rows * columns, width // 4 * 4)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    halves = [sinusoidal(axis.flatten().float(), width // 2) for axis in (y, x)]
    quarters = torch.cat(halves, dim=1).chunk(4, dim=1)
    return torch.cat(quarters[::-1] if backwards else quarters, dim=1)


class TimeEmbedding(nn.Module):
    """Network time to a feature vector: sinusoids and a two-layer perceptron."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Linear(width, out)
        self.second = nn.Linear(out, out)

    def forward(self, t: Times) -> Features:
        waves = sinusoidal(t, self.width).to(self.first.weight.dtype)
        return self.second(nn.functional.silu(self.first(waves)))


class LabelEmbedding(nn.Module):
    """Class numbers to feature vectors; one row more than classes means "no class"."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.table = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, labels: Labels | None, count: int) -> Features:
        """No labels at all: ``count`` rows of "no class"."""
        if labels is None:
            return self.table.weight[-1:].expand(count, -1)
        return self.table(labels)
