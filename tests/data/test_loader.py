"""Order is a function of (seed, sample number), with any number of workers and from any start."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import pytest
import torch

from minidiffusion.data import Batch, Tensors, batches, order

DATA = Tensors(torch.arange(23, dtype=torch.float32)[:, None], torch.arange(23))


def loaders() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("loader")]


def test_each_epoch_is_another_permutation() -> None:
    epochs = [tuple(order(3, epoch * 23, 23, 23)) for epoch in range(5)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len(set(epochs)) == 5
    assert tuple(order(4, 0, 23, 23)) not in epochs


def test_any_slice_is_the_slice_of_the_whole() -> None:
    whole = order(7, 0, 200, 23)
    for start in (0, 1, 22, 23, 24, 69, 150):
        for count in (0, 1, 5, 23, 50):
            assert order(7, start, count, 23) == whole[start : start + count]


def test_the_order_is_pinned() -> None:
    """A checkpoint of today must continue tomorrow: these numbers may never change."""
    assert order(0, 0, 10, 10) == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert order(0, 10, 10, 10) == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert order(2**63 + 5, 10**6, 3, 10**4) == [870, 6080, 7804]


def test_every_place_is_equally_likely() -> None:
    counts = torch.zeros(5, 5)
    for seed in range(2000):
        for place, number in enumerate(order(seed, 0, 5, 5)):
            counts[place, number] += 1
    chi_squared = ((counts - 400) ** 2 / 400).sum()
    assert chi_squared < 45  # 16 degrees of freedom: above it once in 10,000


def taken(workers: int, start: int, count: int) -> list[tuple[int, list[int], list[float]]]:
    stream = batches(DATA, seed=5, batch_size=4, start=start, workers=workers)
    found = [(g, b.labels.tolist(), b.x.flatten().tolist()) for g, b in islice(stream, count)]
    stream.close()
    return found


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("start", [0, 8, 22, 1001])
def test_workers_change_nothing(workers: int, start: int) -> None:
    found = taken(workers, start, 15)
    numbers = order(5, start, 60, 23)
    assert [g for g, _, _ in found] == list(range(start, start + 60, 4))
    assert [label for _, labels, _ in found for label in labels] == numbers
    assert [value for _, _, x in found for value in x] == numbers


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_is_slicing(workers: int) -> None:
    whole = taken(workers, 0, 30)
    for passed in (1, 5, 6, 17):
        assert taken(workers, 4 * passed, 30 - passed) == whole[passed:]


def test_threads_end_with_the_generator() -> None:
    stream = batches(DATA, seed=0, batch_size=2, workers=2)
    next(stream)
    assert 1 <= len(loaders()) <= 2
    stream.close()
    assert not loaders()
    for _ in batches(DATA, seed=0, batch_size=2, workers=2):
        break  # a loop that is left closes its generator as well
    assert not loaders()


@dataclass(frozen=True)
class Slow:
    """Takes a while for a batch, and breaks at one sample."""

    broken: int = -1
    shape = (1,)
    classes = ()

    def __len__(self) -> int:
        return 10

    def batch(self, indices: Sequence[int]) -> Batch:
        time.sleep(0.02 * indices[0] / 10)  # later ones may be ready first
        if self.broken in indices:
            raise ValueError("sample is broken")
        return Batch(torch.tensor(indices).float()[:, None], torch.tensor(indices))

    def fingerprint(self) -> str:
        return "slow"


def test_order_holds_when_batches_are_ready_out_of_order() -> None:
    stream = batches(Slow(), seed=1, batch_size=1, workers=4)
    found = [batch.labels.item() for _, batch in islice(stream, 20)]
    stream.close()
    assert found == order(1, 0, 20, 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_at_its_own_batch(workers: int) -> None:
    place = order(1, 0, 10, 10).index(7)
    stream = batches(Slow(broken=7), seed=1, batch_size=1, workers=workers)
    assert len(list(islice(stream, place))) == place
    with pytest.raises(ValueError, match="sample is broken"):
        next(stream)
    assert not loaders()


def test_mistakes() -> None:
    for wrong in ({"batch_size": 0}, {"batch_size": 1, "start": -1}):
        with pytest.raises(ValueError, match="at least 1, 0 and 0"):
            batches(DATA, seed=0, **wrong)
    with pytest.raises(ValueError, match="empty"):
        batches(Tensors(torch.zeros(0, 2)), seed=0, batch_size=1)
    with pytest.raises(ValueError, match="at least 1 and 0"):
        order(0, 0, 1, 0)
