"""A job's shards in their folder: which are there, and one more of them.

A shard has its name only when all of it is on the disk, so what is there need not be made again.
"""

import json
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from minidiffusion.checkpoints.reader import write_whole
from minidiffusion.data.folder import Quarantine
from minidiffusion.data.shardwriter import Parts, write_shard
from minidiffusion.device import out_of_memory
from minidiffusion.files import read_bounded
from minidiffusion.pipelines.jobs import Cut, Drawing, Encoding, Work, digest
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.pipelines.settings import VERSION, model_hash, opened

Job = Drawing | Encoding
JOB = "job.json"
BAD = ".quarantined.txt"
LARGEST = 2**24
"""Bytes of a job's description."""


class Done(NamedTuple):
    """A shard that is whole, or the error that ends the job. worker: the process that made it.

    made, bad: samples in it and in quarantine. said: warnings. seconds: that it took.
    """

    name: str
    made: int = 0
    bad: int = 0
    seconds: float = 0.0
    worker: int = 0
    said: tuple[str, ...] = ()
    error: str = ""


def claim(job: Job, cut: Cut, folder: Path) -> list[Work]:
    """What is left to make of a job's shards in this folder, which is made or goes on.

    Raises ValueError for a folder that holds the shards of another job.
    """
    facts = {**job.facts(), "shards": len(cut.works), "of": digest(cut.works)}
    path, text = folder / JOB, json.dumps(facts, indent=1, sort_keys=True) + "\n"
    if path.exists():
        try:
            there = dict(json.loads(read_bounded(path, LARGEST)))
        except (ValueError, TypeError):
            raise ValueError(f"{path}: damaged; name another folder") from None
        now = json.loads(text)
        for key in sorted(there.keys() | now.keys()):
            if there.get(key) != now.get(key):
                raise ValueError(
                    f"{folder}: begun with {key} {short(there.get(key))}, now "
                    f"{short(now.get(key))}: name another folder"
                )
        return [work for work in cut.works if not (folder / work.name).exists()]
    folder.mkdir(parents=True, exist_ok=True)
    if others := sorted(folder.glob("part-*.tar")):
        raise ValueError(f"{others[0]}: is here already, of no job; name another folder")
    write_whole(path, [text.encode(errors="backslashreplace")])
    return cut.works


def short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def ready(job: Job, device: str) -> Pipeline:
    """The job's pipeline. Raises ValueError where this machine's package or model is another."""
    s = job.settings
    if s.version != VERSION:
        raise ValueError(f"this machine has minidiffusion {VERSION}, the job wants {s.version}")
    if s.threads is not None:
        torch.set_num_threads(s.threads)
    if (found := model_hash(s.model)) != s.model_hash:
        raise ValueError(f"{s.model}: its hash on this machine is {found}, not {s.model_hash}")
    return opened(s, device)


def make(job: Job, pipe: Pipeline, folder: Path, work: Work) -> Done:
    """One shard, and beside it the list of what is in quarantine, if anything is."""
    began, bad = time.monotonic(), Quarantine()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        count = write_shard(folder / work.name, noted(job, pipe, folder, work, bad))
    texts = dict.fromkeys(str(one.message) for one in said)
    seconds = time.monotonic() - began
    return Done(work.name, count, len(bad), seconds, os.getpid(), tuple(texts))


def noted(job: Job, pipe: Pipeline, folder: Path, work: Work, bad: Quarantine) -> Iterator[Parts]:
    """A shard's samples; the list comes before the shard has its name, and is never missing."""
    yield from job.samples(pipe, work.what, bad)
    if bad:
        write_whole(folder / (work.name + BAD), [lines(bad)])


class Maker:
    """Makes shards on one machine: the pipeline is loaded with the first and stays.

    A mistake or a full disk is a Done with an error, since what raises would only be tried again.
    """

    def __init__(self, job: Job, folder: Path, device: str) -> None:
        self.job, self.folder, self.device = job, folder, device
        self.pipe: Pipeline | None = None

    def __call__(self, work: Work) -> Done:
        try:
            self.pipe = self.pipe or ready(self.job, self.device)
            return make(self.job, self.pipe, self.folder, work)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return Done(work.name, error=f"{where}{error.strerror or error}")
        except ValueError as error:
            return Done(work.name, error=str(error))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return Done(work.name, error=f"out of memory: {error}")


def listed(folder: Path, cut: Cut) -> int:
    """Writes quarantined.txt, of all shards in their order; how many are in it.

    All shards are there, so what else begins like one is what a killed worker left behind.
    """
    for path in folder.glob(".tmp-*-part-*.tar"):
        path.unlink(missing_ok=True)
    texts = [lines(cut.bad)]
    for work in cut.works:
        path = folder / (work.name + BAD)
        texts += [path.read_bytes()] if path.exists() else []
    if any(texts):
        write_whole(folder / "quarantined.txt", texts)
    return sum(text.count(b"\n") for text in texts)


def lines(bad: Quarantine) -> bytes:
    text = "".join(f"{' '.join(f'{name}: {reason}'.split())}\n" for name, reason in bad)
    return text.encode(errors="backslashreplace")
