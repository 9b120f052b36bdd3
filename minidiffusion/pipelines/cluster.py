"""Jobs on a cluster: each of Ray Data's actors takes a shard to make, and then the next.

The only place that knows Ray. An actor that dies is started again, and so is its shard.
"""

import json
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

from minidiffusion.pipelines.jobs import Work
from minidiffusion.pipelines.making import Done, Job, Maker


@dataclass(frozen=True)
class Cluster:
    """Where a job is done. address: of a running cluster, HOST:PORT; None starts one here.

    workers: processes that hold the model, None: as many as there is room for. threads: CPU cores
    of each. gpus: of each, where 0.5 lets two share one; 0 draws on the CPU.
    """

    address: str | None = None
    workers: int | None = None
    threads: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("threads", 1), ("gpus", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}: must be at least {least}, got {value}")


def over(cluster: Cluster, job: Job, works: list[Work], folder: Path) -> Iterator[Done]:
    """The shards, as they get ready; in no order. Stop iterating to cancel what is left.

    Each shard is one row and one block of a Ray data set: what an actor takes at a time.
    """
    if not works:
        return
    with connected(cluster) as room:
        import ray.data

        count = room if cluster.workers is None else cluster.workers
        if count > room or not room:
            raise ValueError(
                f"workers: {count} of {cluster.threads} cores and {cluster.gpus:g} GPUs each: the "
                f"cluster has room for {room}"
            )
        rows = ray.data.from_items(
            [{"name": work.name, "what": work.what} for work in works],
            override_num_blocks=len(works),
        )
        made = rows.map_batches(
            Worker, batch_size=1, num_cpus=cluster.threads, num_gpus=cluster.gpus or None,
            compute=ray.data.ActorPoolStrategy(
                size=min(count, len(works)), max_tasks_in_flight_per_actor=1
            ),
            fn_constructor_args=(job, str(folder.absolute()), str(Path.cwd()), cluster.gpus > 0),
        )  # fmt: skip
        for row in made.iter_rows():
            done = Done(**json.loads(row["done"]))
            yield done._replace(said=tuple(done.said))


class Worker:
    """The actor. cwd: where the driver was started, so that the same names mean the same files."""

    def __init__(self, job: Job, folder: str, cwd: str, gpu: bool) -> None:
        with suppress(OSError):
            os.chdir(cwd)
        self.make = Maker(job, Path(folder), "auto" if gpu else "cpu")

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[str]]:
        pairs = zip(rows["name"], rows["what"], strict=True)
        return {"done": [json.dumps(self.make(Work(*map(str, pair)))._asdict()) for pair in pairs]}


@contextmanager
def connected(cluster: Cluster) -> Iterator[int]:
    """Ray, running and quiet; for how many workers it has room. A local one ends with the job."""
    # Before Ray is loaded; what it has to say of its own working is in its log, in /tmp/ray.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ours = not ray.is_initialized()
    if cluster.address is not None:
        reach(cluster.address)
    if ours:
        if cluster.address is None:
            cores = cluster.workers or max(1, (os.cpu_count() or 1) // cluster.threads)
            how: dict[str, Any] = {"num_cpus": cores * cluster.threads, "include_dashboard": False}
        else:
            how = {"address": cluster.address}
        main = current_thread() is main_thread()
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**how, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            if cluster.address is None:
                raise
            raise ValueError(f"{cluster.address}: no Ray cluster answers there") from error
        if main:  # Ray takes the signal for itself, and ends the process with code 1
            signal.signal(signal.SIGTERM, before)
    try:
        there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        room = int(there.get("CPU", 0) // cluster.threads)
        if cluster.gpus:
            room = min(room, int(there.get("GPU", 0) / cluster.gpus))
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield room
    finally:
        if ours:
            ray.shutdown()


def reach(address: str) -> None:
    """Ray itself waits for more than a minute, and says much, where nothing answers."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not (host and port.isdecimal() and 0 < int(port) < 2**16 and "/" not in host):
        raise ValueError(f"address: expected HOST:PORT, or auto, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ValueError(f"{address}: no Ray cluster answers there ({error})") from None
