"""What a step's loss is made of: named figures to look at, summed on the device, read at once."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from minidiffusion.diffusion.ladders import GRID
from minidiffusion.training.parallel import World, mean

Parts = dict[str, Float[Tensor, "2"]]
"""By name: the sum of a figure over pictures, and over how many. A task says the same names, in
the same order, on every rank of a step."""
BINS = 8
"""Of equal width, over the time that networks are fed."""
EDGES = [f"{k / BINS:g}" for k in range(BINS + 1)]
TIMES = tuple(f"loss t {low}-{high}" for low, high in pairwise(EDGES))


def by_time(t: Float[Tensor, " b"], each: Float[Tensor, " b"]) -> Parts:
    """The losses of pictures, apart by their times. t: what networks are fed, 0 to 1000."""
    each = each.detach().float()
    place = (t * (BINS / GRID)).long().clamp(0, BINS - 1)
    mine = place == torch.arange(BINS, device=t.device)[:, None]
    sums = torch.where(mine, each, 0).sum(dim=1)  # a picture's NaN stays in its own bin
    return dict(zip(TIMES, torch.stack([sums, mine.sum(dim=1)], dim=1), strict=True))


def overall(each: Float[Tensor, " b"]) -> Float[Tensor, "2"]:
    """A part that is a mean over all pictures, from its value for each."""
    each = each.detach().float()
    return torch.stack([each.sum(), torch.ones_like(each).sum()])


def shared(figure: Float[Tensor, ""], count: int) -> Float[Tensor, "2"]:
    """A part of which only the mean over so many pictures is at hand."""
    figure = figure.detach().float()
    return torch.stack([figure * count, torch.full_like(figure, count)])


def added(total: Parts, more: Parts) -> Parts:
    """Two micro-batches' parts together."""
    return {name: total[name] + part if name in total else part for name, part in more.items()}


def read(loss: Float[Tensor, ""], parts: Parts, world: World) -> tuple[float, dict[str, float]]:
    """The mean loss over ranks, and the parts' means over all pictures: one exchange, one sync.

    A part that no picture belongs to is left out.
    """
    # The mean over ranks of sums and counts has the quotients of their totals.
    total, *rest = mean(torch.cat([loss[None], *parts.values()]), world).tolist()
    pairs = zip(parts, rest[::2], rest[1::2], strict=True)
    return total, {name: figure / count for name, figure, count in pairs if count}
