"""`minidiffusion shard`: a folder of captioned pictures, packed, and trained on."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tars import by_webdataset, picture

from minidiffusion.cli.main import main
from minidiffusion.data import Folder, Shards, order


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for n in range(12):
        place = folder / ("cats" if n % 3 else "dogs")
        place.mkdir(parents=True, exist_ok=True)
        kind = ("PNG", "WEBP")[n % 2]
        (place / f"{n}.v1.{kind.lower()}").write_bytes(picture(n, kind))
        (place / f"{n}.v1.txt").write_text(f"grey {n}")
    return folder


def test_the_shards_hold_what_the_folder_holds(pictures: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["shard", str(pictures), "--out", str(out), "--per-shard", "5"]) == 0
    said = capsys.readouterr().out
    assert f"{out}  3 shards, 12 pictures, " in said and f"--data.path {out}" in said
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"part-{n:06d}.tar{end}" for n in range(3) for end in ("", ".index")]
    here = Folder(str(pictures), size=8).open()
    there = Shards(str(out), size=8).open()
    one, two = here.batch(range(12)), there.batch(range(12))
    assert one.captions != two.captions  # shuffled: classes lie mixed
    at = [two.captions.index(caption) for caption in one.captions]
    assert there.classes == here.classes == ("cats", "dogs")
    assert two.x[at].equal(one.x) and two.labels[at].equal(one.labels)


def test_every_file_as_it_is(pictures: Path, tmp_path: Path) -> None:
    assert main(["shard", str(pictures), "--out", str(tmp_path), "--prefix", "x"]) == 0
    found = by_webdataset(tmp_path / "x-000000.tar")
    assert [one["__key__"] for one in found] == [f"{n:09d}" for n in range(12)]
    for one in found:
        number = one["txt"].decode().removeprefix("grey ")
        label = json.loads(one["json"])["label"]
        (path,) = (pictures / label).glob(f"{number}.v1.[pw]*")
        assert one[path.suffix[1:]] == path.read_bytes()


def test_the_same_folder_gives_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    for name in "ab":
        assert main(["shard", str(pictures), "--out", str(tmp_path / name)]) == 0
    a, b = ((tmp_path / name / "part-000000.tar").read_bytes() for name in "ab")
    assert a == b


def test_bad_pictures_are_listed(pictures: Path, tmp_path: Path, refused, capsys) -> None:
    (pictures / "cats" / "bad.png").write_bytes(b"text")
    (pictures / "cats" / "bad.txt").write_bytes(b"x")
    out = tmp_path / "out"
    line = refused("shard", pictures, "--out", out, "--strict")
    assert "1 bad, 12 good" in line and not out.exists()
    assert main(["shard", str(pictures), "--out", str(out)]) == 0
    assert "1 bad pictures were left out" in capsys.readouterr().out
    assert (out / "quarantined.txt").read_text().startswith("cats/bad.png: none of PNG")


def test_bad_pictures_of_any_name_and_caption_are_listed(pictures: Path, tmp_path: Path) -> None:
    (pictures / "cats" / os.fsdecode(b"bad\n\xff.png")).write_bytes(b"text")
    (pictures / "cats" / os.fsdecode(b"bad\n\xff.txt")).write_bytes(b"x")
    (pictures / "cats" / "1.v1.txt").write_bytes(b"word " * 200_000)
    out = tmp_path / "out"
    assert main(["shard", str(pictures), "--out", str(out)]) == 0
    assert (out / "quarantined.txt").read_text().splitlines() == [
        "cats/1.v1.webp: a caption of more than 65,536 bytes",
        "cats/bad\\n\\udcff.png: none of PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM, "
        "or its header is damaged",
    ]


def test_mistakes(pictures: Path, tmp_path: Path, refused) -> None:
    out = tmp_path / "out"
    assert "no such folder" in refused("shard", tmp_path / "gone", "--out", out)
    assert "at least 1" in refused("shard", pictures, "--out", out, "--per-shard", 0)
    assert "at least 1" in refused("shard", pictures, "--out", out, "--max-bytes", -1)
    assert "a name without /" in refused("shard", pictures, "--out", out, "--prefix", "../x")
    assert main(["shard", str(pictures), "--out", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "is here already" in refused("shard", pictures, "--out", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "file").touch()
    assert "file" in refused("shard", pictures, "--out", tmp_path / "file")


def test_a_disk_that_is_full(pictures: Path, tmp_path: Path, refused, monkeypatch) -> None:
    real, synced = os.fsync, []

    def full(handle: int) -> None:
        synced.append(handle)
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    line = refused("shard", pictures, "--out", tmp_path / "out", "--per-shard", 5)
    assert line == (
        f"{tmp_path}/out/part-000001.tar: No space left on device; 1 shards before it are whole"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part-000000.tar"]


def test_a_picture_that_changes_while_it_is_packed(
    pictures: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at it and its turn: it was packed as it was then, unlooked at."""
    last = sorted(pictures.rglob("*.png"))[0]

    def changed(*given: int) -> list[int]:
        last.write_bytes(picture(200, "PNG"))
        return order(*given)

    monkeypatch.setattr("minidiffusion.cli.shard.order", changed)
    line = refused("shard", pictures, "--out", tmp_path / "out")
    assert f"{last}: has changed since it was opened" in line
    assert not list(tmp_path.glob("out/*"))
