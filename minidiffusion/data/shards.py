"""Captioned pictures in tar shards, as WebDataset writes them, read at any place.

A sample is the members 0001.jpg, 0001.txt (or "text" or "caption" in 0001.json) and perhaps
0001.cls (or "label" there). What is bad is put into quarantine, as of a folder.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from glob import glob, has_magic
from io import BufferedReader, BytesIO
from itertools import groupby
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from minidiffusion.data.dataset import Batch, as_floats
from minidiffusion.data.folder import Quarantine, judge
from minidiffusion.data.order import Ints, permutation, windowed
from minidiffusion.data.pictures import LARGEST_SIDE, BadPicture, Fit, load_pixels, open_plain
from minidiffusion.data.shardindex import (
    CAPTIONED,
    LABEL,
    Head,
    keep,
    known,
    sample_at,
    scan,
    table,
)
from minidiffusion.data.tar import printed
from minidiffusion.files import is_endless
from minidiffusion.typed import FILLED

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
SHARDS_MOST = 10**6
BRACES_MOST = 8
CLASSES_MOST = 2**16


@dataclass(frozen=True)
class Shards:
    """path: a tar, a folder of them, a glob, or a range such as data/part-{000..099}.tar.

    window: samples that are shuffled among each other; shards are shuffled as wholes. trusted:
    believe an index beside a shard of the right size, whenever the shard was changed.
    """

    name: ClassVar[str] = "shards"
    path: str = field(metadata=FILLED)
    size: int = field(default=64, metadata={"min": 1, "max": LARGEST_SIDE})
    channels: Literal[1, 3] = 3
    fit: Fit = "crop"
    window: int = field(default=10_000, metadata={"min": 1, "max": 2**24})
    strict: bool = False
    trusted: bool = False

    def open(self) -> "Tars":
        """Reads every shard that has no index of its own, and keeps one beside it."""
        paths = expanded(self.path)
        with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
            heads = list(pool.map(lambda path: known(path, trusted=self.trusted), paths))
        found = tuple(head or scanned(path) for path, head in zip(paths, heads, strict=True))
        tars = _joined(self, paths, found)
        judge(self.path, len(tars), tars.quarantined, strict=self.strict)
        if not len(tars):
            raise ValueError(f"{self.path}: no samples here")
        return tars


def scanned(path: Path) -> Head:
    found = scan(path)
    keep(path, found)
    return found.head


def expanded(text: str) -> tuple[Path, ...]:
    """The shards that a path means, sorted but for a range, which says its own order."""
    path = Path(text)
    if path.is_dir():
        found = sorted(p for p in path.glob("*.tar") if not p.name.startswith("."))
        if not found:
            raise ValueError(f"{text}: no .tar here")
        return tuple(found)
    if is_endless(path):
        raise ValueError(f"{text}: a device or a pipe, not a file")
    if path.exists():
        return (path,)
    shards: list[Path] = []
    for one in braced(text):
        found = [Path(name) for name in sorted(glob(one))] if has_magic(one) else [Path(one)]  # noqa: PTH207
        if not found or not found[0].exists():
            raise ValueError(f"{one}: no such shard")
        shards += found
    if len(set(shards)) < len(shards):
        raise ValueError(f"{text}: names a shard twice")
    return tuple(shards)


def braced(text: str) -> list[str]:
    """{000..099} counts, with as many digits as its ends have; {a,b} lists."""
    match = BRACES.search(text)
    if match is None:
        return [text]
    if text.count("{") > BRACES_MOST:
        raise ValueError(f"{text}: {BRACES_MOST} pairs of braces at most")
    words = match[1].split(",")
    if ends := RANGE.fullmatch(match[1]):
        first, last = int(ends[1]), int(ends[2])
        padded = any(len(end) > 1 and end[0] == "0" for end in ends.groups())
        width = max(map(len, ends.groups())) if padded else 0
        if not 0 <= last - first < SHARDS_MOST:
            raise ValueError(f"{match[0]}: counts upwards, {SHARDS_MOST:,} shards at most")
        words = [f"{number:0{width}}" for number in range(first, last + 1)]
    rests = braced(text[match.end() :])
    if len(words) * len(rests) > SHARDS_MOST:
        raise ValueError(f"{text}: {SHARDS_MOST:,} shards at most")
    return [text[: match.start()] + word + rest for word in words for rest in rests]


@dataclass(frozen=True, eq=False)
class Tars:
    """The good samples of shards, numbered through: those of the first shard, then the second's.

    Where some samples have a caption, or a label, those without are in quarantine.
    wanted: a caption, a label of every sample. counts: good samples a shard; ends: their sums.
    """

    shards: Shards
    paths: tuple[Path, ...]
    heads: tuple[Head, ...]
    classes: tuple[str, ...]
    wanted: tuple[bool, bool]
    counts: Ints
    ends: Ints
    quarantined: Quarantine

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.shards.channels, self.shards.size, self.shards.size)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def batch(self, indices: Sequence[int]) -> Batch:
        """Samples by number, each in one read, in the order in which they lie on the disk."""
        if indices and not 0 <= min(indices) <= max(indices) < len(self):
            raise IndexError(f"samples {min(indices)} to {max(indices)}: there are {len(self)}")
        numbers = {name: number for number, name in enumerate(self.classes)}
        found: dict[int, tuple[UInt8[Tensor, "c h w"], str, int]] = {}
        for shard, group in groupby(sorted(set(indices)), key=self._shard_of):
            head = self.heads[shard]
            rows = _rows(self.paths[shard], head, self.wanted)
            first = int(self.ends[shard] - self.counts[shard])
            with open_plain(self.paths[shard]) as file:
                for index in group:
                    row = rows[index - first]
                    label = numbers[head.classes[row[LABEL]]] if numbers else 0
                    found[index] = (*self._sample(file, index, row), label)
        taken = [found[index] for index in indices]
        return Batch(
            as_floats(torch.stack([pixels for pixels, _, _ in taken])),
            torch.tensor([label for _, _, label in taken], dtype=torch.int64),
            tuple(caption for _, caption, _ in taken) if self.wanted[0] else (),
        )

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self.ends, index, side="right"))

    def _sample(
        self, file: BufferedReader, index: int, row: Ints
    ) -> tuple[UInt8[Tensor, "c h w"], str]:
        how, key = self.shards, str(index)
        try:
            key, sample = sample_at(file, row)
            data = BytesIO(sample.picture)
            pixels = load_pixels(data, channels=how.channels, size=how.size, fit=how.fit)
        except ValueError as error:
            reason = error.reason if isinstance(error, BadPicture) else error
            raise ValueError(f"{file.name}: sample {key}: {reason}") from None
        return pixels, sample.caption or ""

    def order(self, seed: int, start: int, count: int) -> list[int]:
        """Shards in an order drawn anew for each epoch, and samples shuffled within windows."""
        numbers: list[int] = []
        for epoch, places in windowed(seed, start, count, len(self), self.shards.window):
            ends, moves = _route(self, seed, epoch)
            shard = np.searchsorted(ends, places, side="right")
            numbers += (places + moves[shard]).tolist()
        return numbers

    def fingerprint(self) -> str:
        """Of every shard's bytes (their SHA-256, which its index holds), which samples of them are
        good, and how they are read; not of the shards' names."""
        how = (self.shards.size, self.shards.channels, self.shards.fit, self.shards.window)
        what = [(head.digest, head.rows) for head in self.heads]
        return hashlib.sha256(repr((how, what)).encode()).hexdigest()


def _joined(shards: Shards, paths: tuple[Path, ...], heads: tuple[Head, ...]) -> Tars:
    sums = np.array([head.counts for head in heads], dtype=np.int64)
    captioned, labelled = bool(sums[:, 2:].any()), bool(sums[:, 1::2].any())
    kinds = [kind for kind in range(4) if kind >= 2 * captioned and kind % 2 >= labelled]
    counts = sums[:, kinds].sum(axis=1)
    wanted, quarantined = (captioned, labelled), Quarantine()
    for path, head, good in zip(paths, heads, counts.tolist(), strict=True):
        quarantined += table(path, head)[1] if head.bad else []
        if good < sum(head.counts):
            quarantined.append((path.name, _lacking(path, head, wanted)))
    classes = sorted({name for head in heads for name in head.classes})
    if len(classes) > CLASSES_MOST:
        raise ValueError(f"{shards.path}: {len(classes):,} labels: {CLASSES_MOST:,} at most")
    if all(re.fullmatch(r"[0-9]{1,18}", name) for name in classes):
        classes.sort(key=int)
    return Tars(
        shards, paths, heads, tuple(classes), wanted, counts, np.cumsum(counts), quarantined
    )


def _lacking(path: Path, head: Head, wanted: tuple[bool, bool]) -> str:
    """How many samples of a shard have not what others have, and the first one's name."""
    rows = table(path, head)[0]
    left = rows[~_complete(rows, wanted)]
    with path.open("rb") as file:
        key = sample_at(file, left[0])[0]
    what = " and a ".join(w for w, want in zip(("caption", "label"), wanted, strict=True) if want)
    return f"{len(left)} samples lack a {what}, which others have; the first is {printed(key)}"


def _complete(rows: Ints, wanted: tuple[bool, bool]) -> NDArray[np.bool_]:
    captioned, labelled = rows[:, CAPTIONED] > 0, rows[:, LABEL] >= 0
    return (captioned | (not wanted[0])) & (labelled | (not wanted[1]))


def _rows(path: Path, head: Head, wanted: tuple[bool, bool]) -> Ints:
    rows = table(path, head)[0]
    return rows[_complete(rows, wanted)]


@lru_cache(maxsize=4)
def _route(tars: Tars, seed: int, epoch: int) -> tuple[Ints, Ints]:
    """Where each shard ends in an epoch's order, and how far from there its numbers are."""
    shuffled = permutation(seed, epoch, len(tars.counts))
    ends = np.cumsum(tars.counts[shuffled])
    return ends, tars.ends[shuffled] - ends
