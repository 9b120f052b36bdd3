"""Shards are written whole or not at all, the same bytes each time, and webdataset reads them."""

import errno
import hashlib
import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from tars import by_webdataset as read
from tars import numbered, picture, shards

from minidiffusion.data import Parts, write_shards


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    samples = [*numbered(25), Parts("d/" * 70 + "ü", {"png": picture(3), "txt": "é".encode()})]
    paths = write_shards(samples, tmp_path, per_shard=7)
    assert [path.name for path in paths] == [f"part-{n:06d}.tar" for n in range(4)]
    found = [read(path) for path in paths]
    assert [len(part) for part in found] == [7, 7, 7, 5]
    wanted = [{"__key__": key, **parts} for key, parts in samples]
    assert [one for part in found for one in part] == wanted


def test_the_same_samples_are_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for name in "ab":
        paths = shards(tmp_path / name)
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])
    assert digests[0] == digests[1] and len(set(digests[0])) == 4
    (plain,) = write_shards([Parts("a", {"png": b"1", "txt": b"x"})], tmp_path)
    assert hashlib.sha256(plain.read_bytes()).hexdigest() == (
        "b62b38aaf80f828bc5162d7f1c0993e3d8fa39b774eef1e49d9cb3f9e4e9c198"
    )
    with tarfile.open(paths[0]) as archive:
        for one in archive:
            assert (one.mtime, one.uid, one.gid, one.uname, one.gname) == (0, 0, 0, "", "")


def test_a_shard_is_full_with_so_many_bytes(tmp_path: Path) -> None:
    samples = [Parts(f"{n}", {"png": bytes(1000)}) for n in range(10)]  # 1,536 bytes each
    paths = write_shards(samples, tmp_path, max_bytes=5000)
    assert [len(read(path)) for path in paths] == [3, 3, 3, 1]
    large = write_shards(samples[:2], tmp_path, "large", max_bytes=1)
    assert [len(read(path)) for path in large] == [1, 1]
    assert write_shards([], tmp_path, "none") == []


BAD = [
    (Parts("a.b", {"png": b""}), "cannot be told from its key again"),
    (Parts("", {"png": b""}), "cannot be told"),
    (Parts("a/", {"png": b""}), "cannot be told"),
    (Parts("__a__", {"/x": b""}), "cannot be told"),
    (Parts("a", {"PNG": b""}), "cannot be told"),
    (Parts("a", {"x/y": b""}), "cannot be told"),
    (Parts("../a", {"png": b""}), "cannot be told|outside"),
    (Parts("b/../a", {"png": b""}), "outside"),
    (Parts("/a", {"png": b""}), "outside"),
    (Parts("a\nb", {"png": b""}), "cannot be shown"),
    (Parts("a\udce9", {"png": b""}), "cannot be shown"),
    (Parts("a", {}), "no parts"),
    (Parts("a", {"png": bytes(2**27)}), "134,217,728 at most"),
    (Parts("000001", {"png": b""}), "comes twice"),
]


@pytest.mark.parametrize(("sample", "reason"), BAD)
def test_what_cannot_be_read_again_is_not_written(sample, reason, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        write_shards([*numbered(2), sample], tmp_path, per_shard=2 if "twice" not in reason else 9)
    names = [path.name for path in tmp_path.iterdir()]
    assert names == ([] if "twice" in reason else ["part-000000.tar"])


def test_mistakes(tmp_path: Path) -> None:
    for wrong in ({"per_shard": 0}, {"max_bytes": 0}, {"prefix": ""}, {"prefix": "a/b"}):
        with pytest.raises(ValueError, match="at least 1|a name without"):
            write_shards(numbered(1), tmp_path, **wrong)
    write_shards(numbered(1), tmp_path)
    before = (tmp_path / "part-000000.tar").read_bytes()
    with pytest.raises(ValueError, match=r"part-000000\.tar: is here already"):
        write_shards(numbered(3), tmp_path)
    assert (tmp_path / "part-000000.tar").read_bytes() == before


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fills while the third shard is synced: two are whole, and nothing else is there."""
    real, synced = os.fsync, []

    def full(handle: int) -> None:
        synced.append(handle)
        if len(synced) == 5:  # a shard, its folder, a shard, its folder, a shard
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device; 2 shards before it are") as error:
        shards(tmp_path)
    assert error.value.filename == str(tmp_path / "part-000002.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "part-000000.tar", "part-000001.tar"
    ]  # fmt: skip
    assert [len(read(path)) for path in sorted(tmp_path.iterdir())] == [7, 7]


def test_a_file_that_may_grow_no_further(tmp_path: Path) -> None:
    """The system itself stops the writing, in the middle of a shard."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from minidiffusion.data import Parts, write_shards\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, {resource.RLIM_INFINITY}))\n"
        "samples = [Parts(str(n), {'png': bytes(1000 * n)}) for n in range(1, 12)]\n"
        "try: write_shards(samples, sys.argv[1], per_shard=4)\n"
        "except OSError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert "File too large; 1 shards before it are whole" in done.stdout, done.stderr
    assert "part-000001.tar" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["part-000000.tar"]
    assert len(read(tmp_path / "part-000000.tar")) == 4


def test_an_error_of_the_source_is_its_own(tmp_path: Path) -> None:
    def samples():
        yield from numbered(3)
        yield Parts("x", {"png": (tmp_path / "gone.png").read_bytes()})

    with pytest.raises(OSError, match="1 shards before it are whole") as error:
        write_shards(samples(), tmp_path, per_shard=2)
    assert error.value.filename == str(tmp_path / "gone.png")
    assert [path.name for path in tmp_path.iterdir()] == ["part-000000.tar"]
