"""What lies where in a tar shard: found by reading it once, and kept beside it as NAME.tar.index.

An index is three lines: of JSON each, the first behind its own SHA-256 and with that of the others.
It is believed while its shard has the size and the time of change that it names, or else the same
SHA-256; and each sample's checksum is compared again whenever the sample is read.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from io import BufferedReader, BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minidiffusion.data.folder import CAPTION_MOST, LABEL_MOST, SUFFIXES, Quarantine, checked
from minidiffusion.data.order import Ints
from minidiffusion.data.pictures import BadPicture, load_pixels, open_plain
from minidiffusion.data.tar import MOST, Member, Span, printed, spans
from minidiffusion.files import whole_file

VERSION = 2
SAMPLES_MOST = 2**18
"""In a shard, which is judged in memory: about 1 kB a sample."""
TEXT_MOST = 2**20
LINE_MOST = 2**24
START, LENGTH, CHECKSUM, CAPTIONED, LABEL = range(5)
"""The columns of a shard's rows; a label is a number among the shard's own classes, or -1."""


class Head(NamedTuple):
    """A shard in short. digest, rows, reasons: the SHA-256 of the shard and of its index's lines.

    counts: the samples with neither caption nor label, with a label, with a caption, with both.
    bad: how many are in quarantine.
    """

    size: int
    time: int
    digest: str
    counts: tuple[int, ...]
    classes: tuple[str, ...]
    bad: int
    rows: str
    reasons: str


class Sample(NamedTuple):
    """caption is None, and label empty, where the sample has none."""

    picture: bytes
    caption: str | None
    label: str


class Scan(NamedTuple):
    head: Head
    rows: bytes
    reasons: bytes


def index_of(path: Path) -> Path:
    return path.with_name(path.name + ".index")


def contents(span: Span, data: bytes) -> Sample:
    """The picture, caption and label in a sample's bytes; ValueError says what is wrong with it."""
    if span.fault:
        raise ValueError(span.fault)

    def part(member: Member, most: int) -> bytes:
        if member.size > most:
            raise ValueError(f"{member.size:,} bytes in {printed(member.name)}: {most:,} at most")
        return data[member.offset - span.start :][: member.size]

    pictures = [m for extension, m in span.members.items() if f".{extension}" in SUFFIXES]
    if len(pictures) != 1:
        raise ValueError(f"{len(pictures)} pictures: a sample has one")
    said = _object(part(span.members["json"], TEXT_MOST)) if "json" in span.members else {}
    caption, label = _caption(said), _label(said.get("label"))
    if "txt" in span.members:
        caption = _decoded(part(span.members["txt"], CAPTION_MOST), "its caption").strip()
    if "cls" in span.members:
        label = _label(_decoded(part(span.members["cls"], TEXT_MOST), "its class"))
    if not pictures[0].size:
        raise ValueError("an empty picture")
    return Sample(part(pictures[0], MOST), caption, label)


def _decoded(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not UTF-8") from None


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(_decoded(data, "its .json"))
    except json.JSONDecodeError as error:
        raise ValueError(f"its .json is no JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError("its .json is nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError("its .json is no object")
    return found


def _caption(said: Mapping[str, Any]) -> str | None:
    found = next((said[key] for key in ("text", "caption") if said.get(key) is not None), None)
    if found is None:
        return None
    if not isinstance(found, str):
        raise ValueError("the caption in its .json is no string")
    return checked(found.strip())


def _label(found: object) -> str:
    if found is None:
        return ""
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise ValueError("its label is neither a string nor a whole number")
    return checked(str(found).strip(), "label", LABEL_MOST)


def at(file: BufferedReader, start: int, length: int) -> bytes:
    """Bytes of a file, in any thread; fewer where it ends."""
    data = bytearray()
    while more := os.pread(file.fileno(), length - len(data), start + len(data)):
        data += more
    return bytes(data)


def sample_at(file: BufferedReader, row: Ints) -> tuple[str, Sample]:
    """The sample of an index's row, and its key. Raises ValueError where it is another by now."""
    data = at(file, int(row[START]), int(row[LENGTH]))
    if len(data) != row[LENGTH] or zlib.crc32(data) != row[CHECKSUM]:
        raise ValueError("not what its index says: it has changed since")
    span = next(spans(BytesIO(data), len(data)))
    return span.key, contents(span, data)


def scan(path: Path) -> Scan:
    """Read all of a shard, decode every picture once, in threads, and note what is good."""
    with open_plain(path) as file, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        before = os.fstat(file.fileno())
        found = list(islice(spans(file, before.st_size), SAMPLES_MOST + 1))
        if len(found) > SAMPLES_MOST:
            raise ValueError(f"{path}: more than {SAMPLES_MOST:,} samples: make smaller shards")
        judged = list(pool.map(lambda span: _judged(file, span), found))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"{path}: changes while it is being read")
    good = [(s, one) for s, one in zip(found, judged, strict=True) if isinstance(one, _Good)]
    classes = sorted({one.label for _, one in good} - {""})
    numbers = {"": -1} | {name: number for number, name in enumerate(classes)}
    rows = [
        [span.start, span.end - span.start, one.checksum, one.captioned, numbers[one.label]]
        for span, one in good
    ]
    reasons = [
        (f"{path.name}: {printed(span.key)}" if span.key else path.name, reason)
        for span, reason in zip(found, judged, strict=True)
        if isinstance(reason, str)
    ]
    kinds = [2 * row[CAPTIONED] + (row[LABEL] >= 0) for row in rows]
    counts = tuple(kinds.count(kind) for kind in range(4))
    lines = [json.dumps(part, separators=(",", ":")).encode() for part in (rows, reasons)]
    head = Head(
        after.st_size, after.st_mtime_ns, digest, counts, tuple(classes), len(reasons),
        *(hashlib.sha256(line).hexdigest() for line in lines),
    )  # fmt: skip
    return Scan(head, *lines)


class _Good(NamedTuple):
    checksum: int
    captioned: int
    label: str


def _judged(file: BufferedReader, span: Span) -> _Good | str:
    """What a row says of a sample, or why it is bad."""
    if span.fault:
        return span.fault
    data = at(file, span.start, span.end - span.start)
    if len(data) < span.end - span.start:
        return "cut short: the archive ends in it"
    try:
        sample = contents(span, data)
        load_pixels(BytesIO(sample.picture), channels=3, size=8, fit="resize")
    except BadPicture as error:
        return error.reason
    except ValueError as error:
        return str(error)
    return _Good(zlib.crc32(data), int(sample.caption is not None), sample.label)


def keep(path: Path, found: Scan) -> None:
    """Write the index beside its shard, whole or not at all; not where that is not allowed."""
    head = json.dumps({"version": VERSION, **found.head._asdict()}).encode()
    lines = [hashlib.sha256(head).hexdigest().encode() + b" " + head, found.rows, found.reasons]
    with suppress(OSError), whole_file(index_of(path), sync=False) as file:
        file.write(b"\n".join(lines) + b"\n")  # read-only or full: it is scanned again next time


def known(path: Path, *, trusted: bool = False) -> Head | None:
    """What the index beside a shard says, if it can be believed."""
    try:
        with open_plain(index_of(path)) as file:
            checksum, _, line = file.readline(LINE_MOST).rstrip(b"\n").partition(b" ")
    except (OSError, BadPicture):
        return None
    stat = path.stat()
    if hashlib.sha256(line).hexdigest().encode() != checksum or (head := _head(line)) is None:
        return None
    if head.size != stat.st_size:
        return None
    if trusted or head.time == stat.st_mtime_ns:
        return head
    with open_plain(path) as shard:
        if hashlib.file_digest(shard, "sha256").hexdigest() != head.digest:
            return None
    head = head._replace(time=stat.st_mtime_ns)  # a copy: the same bytes at another time
    if lines := _lines(path, head):
        keep(path, Scan(head, *lines))
    return head


def _head(line: bytes) -> Head | None:
    try:
        said = json.loads(line)
        if said.pop("version") != VERSION:
            return None
        head = Head(**said)
        head = head._replace(counts=tuple(head.counts), classes=tuple(head.classes))
        numbers = (head.size, head.time, head.bad, *head.counts)
        words = (head.digest, head.rows, head.reasons, *head.classes)
        right = len(head.counts) == 4 and all(type(word) is str for word in words)
        right = right and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return head if right else None


def _lines(path: Path, head: Head) -> tuple[bytes, bytes] | None:
    """The rows and the reasons of an index, if they are those of this head."""
    try:
        with open_plain(index_of(path)) as file:
            file.readline(LINE_MOST)
            # no line of an honest index is longer than its shard: a sample has 1,024 bytes there
            rows, reasons, *_ = file.read(2 * head.size + LINE_MOST).split(b"\n")
    except (OSError, ValueError):
        return None
    digests = [hashlib.sha256(line).hexdigest() for line in (rows, reasons)]
    return (rows, reasons) if digests == [head.rows, head.reasons] else None


@lru_cache(maxsize=64)
def table(path: Path, head: Head) -> tuple[Ints, Quarantine]:
    """The good samples of a shard, a row each, and the bad ones. A lost index is made anew."""
    lines = _lines(path, head)
    if lines is None:
        found = scan(path)
        if found.head._replace(time=head.time) != head:
            raise ValueError(f"{path}: has changed since it was opened")
        lines = found.rows, found.reasons
    try:
        rows = np.array(json.loads(lines[0]), dtype=np.int64).reshape(-1, 5)
        reasons = [(printed(name), printed(why)) for name, why in json.loads(lines[1])]
        right = len(reasons) == head.bad and _possible(rows, head)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        right = False
    if not right:
        raise ValueError(f"{index_of(path)}: an index that cannot be; remove it")
    return rows, reasons


def _possible(rows: Ints, head: Head) -> bool:
    start, length, _, captioned, label = rows.T
    kinds = np.bincount(2 * (captioned > 0) + (label >= 0), minlength=4)
    bounded = (start >= 0) & (start <= head.size) & (length >= 0) & (length <= MOST)
    return bool(bounded.all() and (label < len(head.classes)).all()) and (
        tuple(kinds.tolist()) == head.counts
    )
