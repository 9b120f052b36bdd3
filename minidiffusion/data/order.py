"""Order without state: which picture comes when is a function of the seed and a count.

Global sample number g lies in epoch g // size at place g % size of that epoch's permutation.
"""

from collections.abc import Iterator, Sized
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@runtime_checkable
class Ordered(Protocol):
    """A data set that brings its own order; each epoch must visit every sample once."""

    def order(self, seed: int, start: int, count: int) -> list[int]: ...


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, size: int, stream: int = 0) -> Ints:
    """0 .. size - 1, shuffled; each (seed, epoch, stream) in its own way."""
    # Philox's bits are promised to stay the same in every numpy; the shuffles built on them are not
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    counter = np.array([0, 0, stream, 0], dtype=np.uint64)
    numbers = np.random.Philox(key=key, counter=counter).random_raw(size)
    return np.argsort(numbers, kind="stable")


def order(seed: int, start: int, count: int, size: int) -> list[int]:
    """Which of ``size`` samples are the global samples start .. start + count - 1."""
    return [
        number
        for epoch, first, last in epochs(start, count, size)
        for number in permutation(seed, epoch, size)[first:last].tolist()
    ]


def order_of(dataset: Sized, seed: int, start: int, count: int) -> list[int]:
    """The same of a data set: its own order if it has one, else all of it shuffled at once."""
    if isinstance(dataset, Ordered):
        return dataset.order(seed, start, count)
    return order(seed, start, count, len(dataset))


def windowed(
    seed: int, start: int, count: int, size: int, window: int
) -> Iterator[tuple[int, Ints]]:
    """(epoch, places in it) of the global samples, shuffled among ``window`` neighbours.

    An epoch is cut into windows, each of which is a permutation of itself: a place is found in
    the time of one window, however long the epoch.
    """
    if window < 1:
        raise ValueError(f"window {window}: at least 1")
    for epoch, first, last in epochs(start, count, size):
        while first < last:
            number, place = divmod(first, window)
            begin = number * window
            inside = permutation(seed, epoch, min(window, size - begin), number + 1)
            part = inside[place : place + last - first]
            yield epoch, begin + part
            first += len(part)


def epochs(start: int, count: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Global samples start .. start + count - 1 as (epoch, first place, place after the last)."""
    if size < 1 or start < 0:
        raise ValueError(f"size {size} and start {start}: at least 1 and 0")
    end = start + count
    while start < end:
        epoch, place = divmod(start, size)
        last = min(size, place + end - start)
        yield epoch, place, last
        start += last - place
