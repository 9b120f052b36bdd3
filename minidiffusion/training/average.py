"""The exponential moving average of the weights: what is sampled from, and what ships."""

from collections.abc import Sequence

import torch
from torch import Tensor


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """The decay of update ``step`` (from 0): less at first, so that the start is forgotten."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def update(average: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """average = decay * average + (1 - decay) * weights, in place."""
    torch._foreach_lerp_(list(average), list(weights), 1 - decay)
