"""The kernel inception distance (Binkowski et al. 2018, arXiv:1801.01401): unbiased at any size."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class KID(NamedTuple):
    """The squared maximum mean discrepancy, and its standard error; it may come out negative."""

    mean: float
    error: float


def mmd(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """The unbiased estimate with the kernel (x.y/d + 1)^3: no sample is compared with itself."""
    x, y = x.cpu().double(), y.cpu().double()
    n, m, dim = len(x), len(y), x.shape[1]
    within_x, within_y, across = ((a @ b.T / dim + 1).pow(3) for a, b in ((x, x), (y, y), (x, y)))
    return float(
        (within_x.sum() - within_x.trace()) / (n * (n - 1))
        + (within_y.sum() - within_y.trace()) / (m * (m - 1))
        - 2 * across.mean()
    )


def kid(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], blocks: int = 10, seed: int = 0) -> KID:
    """The mean over ``blocks`` disjoint parts of both sets.

    Disjoint and not drawn anew each time: only then are the parts independent, and the spread of
    their values a standard error.
    """
    if min(len(x), len(y)) < 2 * blocks or blocks < 2:
        raise ValueError(f"{blocks} blocks of {len(x)} and {len(y)} samples: two of each at least")
    draw = torch.Generator().manual_seed(seed)
    parts = [
        features[torch.randperm(len(features), generator=draw).to(features.device)].tensor_split(
            blocks
        )
        for features in (x, y)
    ]
    values = torch.tensor([mmd(a, b) for a, b in zip(*parts, strict=True)], dtype=torch.float64)
    return KID(float(values.mean()), float(values.std()) / blocks**0.5)
