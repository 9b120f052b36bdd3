"""Improved precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from minidiffusion.shapes import Features

EXACT = "donot_use_mm_for_euclid_dist"  # a matrix product would lose the small distances


class PrecisionRecall(NamedTuple):
    precision: float  # how much of the generated lies among the real
    recall: float  # how much of the real lies among the generated


def precision_recall(
    real: Float[Tensor, "n d"], generated: Float[Tensor, "m d"], k: int = 3, chunk: int = 512
) -> PrecisionRecall:
    """Both sets should be of one size: more samples reach further."""
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"{len(real)} and {len(generated)} samples have no {k} neighbours each")
    return PrecisionRecall(
        precision=covered(generated, real, radii(real, k, chunk), chunk),
        recall=covered(real, generated, radii(generated, k, chunk), chunk),
    )


def radii(points: Features, k: int, chunk: int) -> Float[Tensor, " b"]:
    """The distance of each point to its k-th neighbour; the nearest of all is the point itself."""
    return torch.cat(
        [
            torch.cdist(part, points, compute_mode=EXACT).kthvalue(k + 1, dim=1).values
            for part in points.split(chunk)
        ]
    )


def covered(
    points: Features, centres: Float[Tensor, "n d"], reach: Float[Tensor, " n"], chunk: int
) -> float:
    """The share of the points that lie in the ball of at least one centre."""
    hits = [
        (torch.cdist(part, centres, compute_mode=EXACT) <= reach).any(dim=1)
        for part in points.split(chunk)
    ]
    return float(torch.cat(hits).double().mean())
