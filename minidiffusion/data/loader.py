"""Batches in an order without state, prepared by threads.

To resume a run is to start at another number, and any number of workers gives the same batches.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count as count_from

from minidiffusion.data.dataset import Batch, Dataset
from minidiffusion.data.order import order_of

AHEAD = 2  # batches that a worker prepares before they are asked for


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
        return dataset.batch(order_of(dataset, seed, first, share))

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
