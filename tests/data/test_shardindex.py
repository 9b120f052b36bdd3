"""The index beside a shard: believed where it can be, made anew where not, never in the way."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from tars import GOOD, numbered, shards, tar

from minidiffusion.data import Shards, write_shards
from minidiffusion.data import shards as module
from minidiffusion.data.shardindex import (
    index_of,
    known,
    scan,
    table,
)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    (path,) = shards(tmp_path / "in", 7)
    Shards(str(path), size=8).open()
    assert index_of(path).is_file()
    return path


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The shards that were read whole."""
    read: list[Path] = []
    monkeypatch.setattr(module, "scan", lambda path: read.append(path) or scan(path))
    return read


def test_a_second_opening_reads_no_shard(shard: Path, scans: list[Path]) -> None:
    first = Shards(str(shard), size=8).open()
    assert scans == [] and len(first) == 7
    index_of(shard).unlink()
    again = Shards(str(shard), size=8).open()
    assert scans == [shard] and again.heads == first.heads
    assert again.fingerprint() == first.fingerprint()


def test_the_same_index_every_time(shard: Path) -> None:
    before = index_of(shard).read_bytes()
    index_of(shard).unlink()
    Shards(str(shard), size=16, fit="pad", channels=1).open()
    assert index_of(shard).read_bytes() == before


def test_another_shard_in_its_place_is_noticed(shard: Path, scans: list[Path]) -> None:
    first = Shards(str(shard), size=8).open()
    stat, data = shard.stat(), shard.read_bytes()
    changed = data.replace(b"grey 3", b"gray 3")
    assert changed != data
    shard.write_bytes(changed)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    second = Shards(str(shard), size=8).open()
    assert scans == [shard] and second.fingerprint() != first.fingerprint()
    assert second.batch([3]).captions == ("gray 3",)
    table.cache_clear()
    with pytest.raises(ValueError, match=r"000000\.tar: has changed since it was opened"):
        first.batch([3])


def test_a_change_that_hides_is_noticed_when_it_is_read(shard: Path) -> None:
    """Of the same size and time: the checksums of the samples are all that is left."""
    stat, data = shard.stat(), shard.read_bytes()
    shard.write_bytes(data.replace(b"grey 3", b"gray 3"))
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    opened = Shards(str(shard), size=8).open()
    with pytest.raises(ValueError, match=r"part-000000\.tar: sample 3: not what its index says"):
        opened.batch([0, 3])


def test_a_copy_keeps_its_index(shard: Path, scans: list[Path], tmp_path: Path) -> None:
    """The bytes are hashed, once: no picture is decoded."""
    first = Shards(str(shard), size=8).open()
    place = tmp_path / "copy"
    shutil.copytree(shard.parent, place, copy_function=shutil.copyfile)
    path = place / shard.name
    os.utime(path, ns=(0, 10**18))
    second = Shards(str(path), size=8).open()
    assert scans == [] and second.fingerprint() == first.fingerprint()
    said = json.loads(index_of(path).read_bytes().splitlines()[0].partition(b" ")[2])
    assert said["time"] == 10**18
    assert second.batch([6]).captions == ("grey 6",)


def test_trusted(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of shards on a slow mount that keeps no times, only the size is compared."""
    os.utime(shard, ns=(0, 10**18))
    monkeypatch.setattr(hashlib, "file_digest", None)  # whoever reads the shard fails
    opened = Shards(str(shard), size=8, trusted=True).open()
    assert opened.batch([2]).captions == ("grey 2",)
    with shard.open("ab") as file:
        file.write(bytes(512))
    assert known(shard, trusted=True) is None


def damaged(data: bytes) -> list[bytes]:
    head, rows, reasons, end = data.split(b"\n")
    said = json.loads(head.partition(b" ")[2])

    def lying(**changes: object) -> bytes:
        line = json.dumps({**said, **changes}).encode()
        return hashlib.sha256(line).hexdigest().encode() + b" " + line

    flipped = bytes([head[100] ^ 1])
    heads = [
        b"", b"{}", b"[]", b"null", b"\xff" * 99, head[:100] + flipped + head[101:], head[65:],
        lying(version=3), lying(size=True), lying(size=-1), lying(counts=[1]), lying(counts=7),
        lying(classes=[3]), lying(digest=None), lying(strange=1), lying(bad=2**64),
        lying(size=said["size"] + 1),
    ]  # fmt: skip
    return [b"\n".join([one, rows, reasons, end]) for one in heads]


def test_an_index_that_cannot_be_is_made_anew(shard: Path, scans: list[Path]) -> None:
    whole = index_of(shard).read_bytes()
    for number, data in enumerate(damaged(whole), start=1):
        index_of(shard).write_bytes(data)
        opened = Shards(str(shard), size=8).open()
        assert len(scans) == number and len(opened) == 7, data[:200]
        assert index_of(shard).read_bytes() == whole


def test_rows_that_are_damaged_are_made_anew(shard: Path) -> None:
    whole = index_of(shard).read_bytes()
    head, rows, reasons, end = whole.split(b"\n")
    for parts in ([head], [head, rows[:-9], reasons, end], [head, rows, reasons[:-1], end]):
        index_of(shard).write_bytes(b"\n".join(parts))
        opened = Shards(str(shard), size=8).open()
        table.cache_clear()
        assert opened.batch([5]).captions == ("grey 5",)


LIES = [
    "[[0,512,1,1,0]]", "[[0,-5,1,1,0]]", "[[-5,512,1,1,0]]", "[[0,9e99,1,1,0]]", "[[0,1]]",
    '[["a",1,1,1,1]]', "{}", "null", "[" * 20_000, f"[[{2**70},1,1,1,1]]", "[]",
]  # fmt: skip


@pytest.mark.parametrize("line", LIES)
def test_an_index_that_lies_with_the_right_checksums(shard: Path, line: str) -> None:
    head, _, reasons, _ = index_of(shard).read_bytes().split(b"\n")
    said = json.loads(head.partition(b" ")[2]) | {"rows": hashlib.sha256(line.encode()).hexdigest()}
    first = json.dumps(said).encode()
    first = hashlib.sha256(first).hexdigest().encode() + b" " + first
    index_of(shard).write_bytes(b"\n".join([first, line.encode(), reasons, b""]))
    with pytest.raises(ValueError, match=r"index: an index that cannot be; remove it"):
        Shards(str(shard), size=8).open().batch([0])


def test_a_lost_index_and_another_shard(shard: Path) -> None:
    opened = Shards(str(shard), size=8).open()
    index_of(shard).unlink()
    shard.unlink()
    write_shards(numbered(7, first=1), shard.parent)
    table.cache_clear()
    with pytest.raises(ValueError, match=r"000000\.tar: has changed since it was opened"):
        opened.batch([0])


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = shards(tmp_path, 7)

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    opened = Shards(str(path), size=8).open()
    assert list(tmp_path.iterdir()) == [path]
    assert opened.batch([5]).captions == ("grey 5",)


def test_an_index_that_is_a_link_or_a_pipe(shard: Path, scans: list[Path]) -> None:
    index_of(shard).unlink()
    os.mkfifo(index_of(shard))
    assert len(Shards(str(shard), size=8).open()) == 7 and scans == [shard]
    assert index_of(shard).is_file()


def test_a_shard_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tar(tmp_path / "x.tar", GOOD)
    real = hashlib.file_digest

    def slow(file: object, name: str) -> object:
        with path.open("ab") as more:
            more.write(bytes(512))
        return real(file, name)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", slow)
    with pytest.raises(ValueError, match="changes while it is being read"):
        scan(path)


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidiffusion.data.shardindex.SAMPLES_MOST", 6)
    (path,) = shards(tmp_path, 7)
    with pytest.raises(ValueError, match="more than 6 samples: make smaller shards"):
        scan(path)
