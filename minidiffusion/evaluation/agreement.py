"""Does a picture show what was asked for? As often as the judge says so."""

from typing import NamedTuple

from minidiffusion.evaluation.features import Judge
from minidiffusion.shapes import Image, Labels


class Agreement(NamedTuple):
    """A share, and the interval that covers the true one with 95 % confidence."""

    share: float
    low: float
    high: float


def agreement(judge: Judge, pictures: Image, labels: Labels) -> Agreement:
    """The share of the pictures that the judge calls by the label that was asked for."""
    if (labels >= len(judge.classes)).any() or (labels < 0).any():
        raise ValueError(f"labels of {judge.name} are 0..{len(judge.classes) - 1}")
    hits = int((judge(pictures) == labels).sum())
    return Agreement(hits / len(labels), *wilson(hits, len(labels)))


def wilson(hits: int | float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson 1927: an interval that stays honest near 0 and 1, where shares of this kind lie."""
    share = hits / count
    centre = share + z * z / (2 * count)
    spread = z * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
