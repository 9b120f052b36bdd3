"""Order without state: which picture comes when is a function of the seed and a count.

Global sample number g lies in epoch g // size at place g % size of that epoch's permutation. To
resume a run is to start at another number, and any number of workers gives the same batches.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import count as count_from

import numpy as np
from numpy.typing import NDArray

from minidiffusion.data.dataset import Batch, Dataset

AHEAD = 2  # batches that a worker prepares before they are asked for


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    # Philox's bits are promised to stay the same in every numpy; the shuffles built on them are not
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


def order(seed: int, start: int, count: int, size: int) -> list[int]:
    """Which of ``size`` samples are the global samples start .. start + count - 1."""
    if size < 1 or start < 0:
        raise ValueError(f"size {size} and start {start}: at least 1 and 0")
    numbers: list[int] = []
    end = start + count
    while start < end:
        epoch, place = divmod(start, size)
        part = _permutation(seed, epoch, size)[place : place + end - start].tolist()
        numbers += part
        start += len(part)
    return numbers


def batches(
    dataset: Dataset,
    seed: int,
    batch_size: int,
    start: int = 0,
    workers: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Generator[tuple[int, Batch], None, None]:
    """Yield (global number of its first sample, batch) without end, from sample ``start`` on.

    Of several ranks each gets its own equal part of every batch.

    Workers are threads: decoding a picture releases Python's lock, and nothing is copied between
    processes. A batch may cross the end of an epoch; no sample is dropped.
    """
    if batch_size < 1 or start < 0 or workers < 0:
        raise ValueError(
            f"batch_size {batch_size}, start {start}, workers {workers}: at least 1, 0 and 0"
        )
    if len(dataset) < 1:
        raise ValueError("the data set is empty")
    if batch_size % ranks:
        raise ValueError(f"batch_size {batch_size} is no multiple of {ranks} ranks")
    share = batch_size // ranks

    def fetch(first: int) -> Batch:
        return dataset.batch(order(seed, first, share, len(dataset)))

    firsts = count_from(start + rank * share, batch_size)
    if workers == 0:
        return ((first, fetch(first)) for first in firsts)
    return _prefetched(fetch, firsts, workers)


def _prefetched(
    fetch: Callable[[int], Batch], firsts: Iterable[int], workers: int
) -> Generator[tuple[int, Batch], None, None]:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
    try:
        waiting: deque[tuple[int, Future[Batch]]] = deque()
        for first in firsts:
            waiting.append((first, pool.submit(fetch, first)))
            if len(waiting) > AHEAD * workers:
                number, batch = waiting.popleft()
                yield number, batch.result()
    finally:
        pool.shutdown(cancel_futures=True)
