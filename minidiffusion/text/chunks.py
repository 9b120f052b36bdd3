"""Numbers in windows of a text encoder's length, each with its start and end."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def chunks(
    values: Sequence[T], first: T, last: T, pad: T, length: int = 77, count: int = 1
) -> list[list[T]]:
    """Windows of (first, up to length - 2 values, last, padding), cut wherever one is full.

    As many as the values need, and at least count: the last ones may hold padding alone. Values
    are a prompt's ids, or what belongs to each of them.
    """
    room = length - 2
    if room < 1:
        raise ValueError(f"length: must be at least 3, got {length}")
    count = max(count, -(-len(values) // room))
    parts = [values[k * room : (k + 1) * room] for k in range(count)]
    return [[first, *part, last, *[pad] * (room - len(part))] for part in parts]
