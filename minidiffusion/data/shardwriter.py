"""Tar shards written as WebDataset reads them: the same samples, the same bytes.

A shard appears whole or not at all: it is written aside, synced to the disk and renamed.
"""

import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from minidiffusion.data.tar import BLOCK, META, MOST, NAME, refusal
from minidiffusion.files import whole_file


class Parts(NamedTuple):
    """A sample: parts by extension ("jpg", "txt", "json", "cls"). key: no dot after its last /."""

    key: str
    parts: Mapping[str, bytes]


def write_shards(
    samples: Iterable[Parts],
    folder: str | Path,
    prefix: str = "part",
    per_shard: int = 10_000,
    max_bytes: int = 2**30,
) -> list[Path]:
    """Write folder/part-000000.tar and so on; a shard is full with so many samples or bytes.

    One sample is never divided, so a single one may make a shard larger than max_bytes. Raises
    ValueError for what cannot be a sample and where shards of this name are already, and OSError,
    as of a full disk, that says how many shards are whole; an unfinished one is removed.
    """
    folder = Path(folder)
    if per_shard < 1 or max_bytes < 1:
        raise ValueError(f"per_shard {per_shard} and max_bytes {max_bytes}: at least 1")
    if not prefix or "/" in prefix or prefix.startswith("."):
        raise ValueError(f"prefix {prefix!r}: a name without / that does not begin with a dot")
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("*.tar*")):
        if path.name.startswith(f"{prefix}-"):
            raise ValueError(f"{path}: is here already; name another folder or prefix")
    written: list[Path] = []
    source = iter(samples)
    left: Parts | None = None
    while True:
        path = folder / f"{prefix}-{len(written):06d}.tar"
        try:
            first = left or next(source, None)
            if first is None:
                return written
            left = _shard(path, first, source, per_shard, max_bytes)
        except OSError as error:
            whole = f"{error.strerror or error}; {len(written)} shards before it are whole"
            raise OSError(error.errno, whole, error.filename or str(path)) from error
        written.append(path)


def _shard(
    path: Path, first: Parts, rest: Iterator[Parts], per_shard: int, max_bytes: int
) -> Parts | None:
    """Write one shard, and give the sample that did not fit into it."""
    sample: Parts | None = first
    with _whole(path) as file:
        count, key = 0, ""
        while sample is not None:
            packed = pack(sample)
            if count and file.tell() + len(packed) > max_bytes:
                break
            if sample.key == key:
                raise ValueError(f"sample {key!r}: comes twice, one after the other")
            file.write(packed)
            count, key = count + 1, sample.key
            sample = next(rest, None) if count < per_shard else None
    return sample


def write_shard(path: Path, samples: Iterable[Parts]) -> int:
    """Write one shard of all these samples, of none as well; how many they were.

    It replaces what is there. What the samples raise leaves nothing behind.
    """
    count = 0
    with _whole(path) as file:
        for sample in samples:
            file.write(pack(sample))
            count += 1
    return count


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file for samples, which gets its end mark and its name when all of it is on the disk."""
    with whole_file(path) as file:
        yield file
        file.write(bytes(2 * BLOCK))
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))


def pack(sample: Parts) -> bytes:
    """A sample as it stands in a tar; it says nothing of when, where and by whom it was written.

    Raises ValueError unless it can be read again as it is.
    """
    check(sample)
    blocks = []
    for extension, data in sample.parts.items():
        info = tarfile.TarInfo(f"{sample.key}.{extension}")
        info.size = len(data)
        header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
        blocks += [header, data, bytes(-len(data) % BLOCK)]
    packed = b"".join(blocks)
    if len(packed) > MOST:
        raise ValueError(f"sample {sample.key!r}: {len(packed):,} bytes: {MOST:,} at most")
    return packed


def check(sample: Parts) -> None:
    key, parts = sample
    if not parts:
        raise ValueError(f"sample {key!r}: has no parts")
    for extension, data in parts.items():
        name = f"{key}.{extension}"
        named = NAME.fullmatch(name)
        if named is None or named[1] != key or extension != extension.lower() or META.match(name):
            raise ValueError(f"sample {key!r}: {extension!r} cannot be told from its key again")
        if not name.isprintable():
            raise ValueError(f"sample {key!r}: a name of letters that cannot be shown")
        if fault := refusal(name, tarfile.REGTYPE, len(data), {}):
            raise ValueError(f"sample {key!r}: {extension}: {fault}")
