"""Shuffled within windows: every sample once an epoch, any slice is the slice of the whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiffusion.data import Batch, Tensors, batches, mapped
from minidiffusion.data.order import Ordered, epochs, order, order_of, permutation, windowed

DATA = Tensors(torch.arange(7, dtype=torch.float32)[:, None], torch.arange(7))


def places(seed: int, start: int, count: int, size: int, window: int) -> list[tuple[int, int]]:
    found = windowed(seed, start, count, size, window)
    return [(epoch, place) for epoch, part in found for place in part.tolist()]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1), start=st.integers(0, 300), count=st.integers(0, 150),
    size=st.integers(1, 60), window=st.integers(1, 80),
)  # fmt: skip
def test_windows(seed: int, start: int, count: int, size: int, window: int) -> None:
    first = start // size * size
    last = -(-(start + count) // size) * size
    whole = places(seed, first, last - first, size, window)
    for k in range(0, len(whole), size):
        numbers = [place for _, place in whole[k : k + size]]
        assert {epoch for epoch, _ in whole[k : k + size]} == {(first + k) // size}
        assert sorted(numbers) == list(range(size))
        assert all(at // window == number // window for at, number in enumerate(numbers))
    assert places(seed, start, count, size, window) == whole[start - first :][:count]


def test_windows_differ_by_seed_epoch_and_place() -> None:
    parts = [
        tuple(p % 10 for _, p in places(seed, start, 10, 100, 10))
        for seed in (0, 1) for start in range(0, 300, 10)
    ]  # fmt: skip
    assert len(set(parts)) == len(parts) == 60


def test_the_windows_are_pinned() -> None:
    """A checkpoint of today must continue tomorrow: these numbers may never change."""
    assert [p for _, p in places(0, 0, 12, 12, 5)] == [1, 2, 3, 0, 4, 8, 7, 9, 6, 5, 11, 10]
    far = places(2**63 + 5, 10**15, 3, 10**9, 10**4)
    assert far == [(1000000, 298), (1000000, 9593), (1000000, 5720)]


def test_a_stream_is_a_permutation_of_its_own() -> None:
    """Stream 0 is what data sets in memory have always used."""
    whole = [tuple(permutation(3, 1, 20, stream)) for stream in range(4)]
    assert len(set(whole)) == 4 and list(whole[0]) == order(3, 20, 20, 20)


def test_far_into_a_long_epoch_costs_one_window() -> None:
    found = list(windowed(0, 123_456_789_012, 4, 10**12, 1000))  # all of it would be 8 TB
    assert [len(part) for _, part in found] == [4]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="window 0: at least 1"):
        list(windowed(0, 0, 1, 5, 0))
    with pytest.raises(ValueError, match="at least 1 and 0"):
        list(epochs(-1, 1, 5))


@dataclass(frozen=True)
class Backwards:
    """A data set that wants to be read from its end."""

    shape = (1,)
    classes = ()

    def __len__(self) -> int:
        return 7

    def batch(self, indices: Sequence[int]) -> Batch:
        return DATA.batch(indices)

    def fingerprint(self) -> str:
        return "backwards"

    def order(self, seed: int, start: int, count: int) -> list[int]:
        return [6 - n % 7 for n in range(start, start + count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_may_bring_its_order_through_a_function_as_well(workers: int) -> None:
    assert isinstance(Backwards(), Ordered) and not isinstance(DATA, Ordered)
    for data in (Backwards(), mapped(Backwards(), lambda batch: batch)):
        stream = batches(data, seed=1, batch_size=3, start=3, workers=workers)
        found = [n for _, batch in islice(stream, 3) for n in batch.labels.tolist()]
        stream.close()
        assert found == [3, 2, 1, 0, 6, 5, 4, 3, 2]


def test_others_keep_theirs_through_a_function() -> None:
    assert order_of(mapped(DATA, lambda b: b), 5, 3, 9) == order_of(DATA, 5, 3, 9)
    assert order_of(DATA, 5, 3, 9) == order(5, 3, 9, 7)
    assert np.array_equal(order(5, 0, 7, 7), permutation(5, 0, 7))
