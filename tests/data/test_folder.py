"""A folder of pictures: classes, captions, and a quarantine for what is bad."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minidiffusion.data import Batch, Dataset, Folder, Pictures, folder
from minidiffusion.data.folder import CAPTION_MOST


def picture(path: Path, grey: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(path)
    return path


def opened(path: Path, **options: object) -> Pictures:
    return Folder(str(path), size=8, **options).open()


def everything(data: Pictures) -> Batch:
    return data.batch(range(len(data)))


def greys(batch: Batch) -> list[int]:
    assert batch.x.shape[1:] == (3, 8, 8)
    return ((batch.x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    picture(tmp_path / "dog" / "b.png", 30)
    picture(tmp_path / "cat" / "z.jpg", 10)
    picture(tmp_path / "dog" / "old" / "a.webp", 40)
    picture(tmp_path / "cat" / "Z.PNG", 20)
    picture(tmp_path / ".hidden" / "a.png")
    picture(tmp_path / "cat" / "._z.png")
    (tmp_path / "cat" / "notes.md").write_text("no picture, and none is expected")
    return tmp_path


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    for name, grey in (("a", 10), ("b", 20), ("c", 30)):
        picture(tmp_path / f"{name}.png", grey)
    (tmp_path / "a.txt").write_text("a naïve fox\n", "utf-8")
    (tmp_path / "b.txt").write_bytes("\ufeffwith a mark".encode())
    (tmp_path / "c.txt").write_text("")
    return tmp_path


def listing(path: Path, *rows: object) -> None:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (path / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n\n")


def test_sub_folders_are_classes(classes: Path) -> None:
    data = opened(classes)
    assert isinstance(data, Dataset) and data.shape == (3, 8, 8)
    assert data.classes == ("cat", "dog") and data.quarantined == []
    assert data.names == ("cat/Z.PNG", "cat/z.jpg", "dog/b.png", "dog/old/a.webp")
    batch = everything(data)
    assert batch.labels.tolist() == [0, 0, 1, 1] and batch.captions == ()
    assert np.abs(np.subtract(greys(batch), [20, 10, 30, 40])).max() <= 2  # jpeg and webp
    assert data.batch([3, 0]).labels.tolist() == [1, 0]


def test_a_picture_outside_the_sub_folders_means_no_classes(classes: Path) -> None:
    picture(classes / "stray.png")
    data = opened(classes)
    assert data.classes == () and len(data) == 5
    assert everything(data).labels.tolist() == [0] * 5


def test_one_channel(classes: Path) -> None:
    data = opened(classes, channels=1)
    assert data.shape == (1, 8, 8) and data.batch([0, 1]).x.shape == (2, 1, 8, 8)


def test_texts_beside_the_pictures(captioned: Path) -> None:
    data = opened(captioned)
    batch = everything(data)
    assert batch.captions == ("a naïve fox", "with a mark", "") and greys(batch) == [10, 20, 30]
    assert data.batch([1]).captions == ("with a mark",)
    assert everything(opened(captioned, captions="none")).captions == ()


def test_bad_texts_are_quarantined(captioned: Path) -> None:
    (captioned / "a.txt").write_bytes(b"caf\xe9")
    (captioned / "c.txt").unlink()
    data = opened(captioned)
    assert data.names == ("b.png",)
    assert data.quarantined == [
        ("a.png", "its caption a.txt is not UTF-8"),
        ("c.png", "has no caption c.txt"),
    ]


def test_a_caption_that_no_encoder_reads_costs_its_picture(captioned: Path) -> None:
    assert CAPTION_MOST == 65536
    (captioned / "a.txt").write_bytes("é".encode() * (CAPTION_MOST // 2))
    assert opened(captioned).quarantined == []
    (captioned / "a.txt").write_text("x" * (CAPTION_MOST + 1))
    (captioned / "b.txt").unlink()
    os.mkfifo(captioned / "b.txt")
    data = opened(captioned)
    assert data.names == ("c.png",)
    assert data.quarantined == [
        ("a.png", "a caption of more than 65,536 bytes"),
        ("b.png", "its caption b.txt is a device or a pipe, not a file"),
    ]


def test_a_listing(captioned: Path) -> None:
    picture(captioned / "in" / "d.png", 40)
    listing(
        captioned,
        {"file_name": "in/d.png", "text": "four", "label": "x"},
        {"file_name": "b.png", "text": "two", "label": "y"},
        {"file_name": "a.png", "text": "one", "label": "x"},
        {"file_name": "c.png", "text": "three", "label": "x"},
    )
    data = opened(captioned)
    batch = everything(data)
    assert data.quarantined == [] and data.classes == ("x", "y")
    assert batch.captions == ("four", "two", "one", "three")
    assert batch.labels.tolist() == [0, 1, 0, 0] and greys(batch) == [40, 20, 10, 30]


BAD_LINES = [
    (b'{"file_name": "a.png", "text": "caf\xe9"}', "not UTF-8"),
    (b"{file_name: a.png}", "not JSON"),
    (b"[" * 100_000, "recursion"),
    (b'["a.png", "text"]', "not an object"),
    ({"file_name": "a.png"}, "missing or no string"),
    ({"text": "x"}, "missing or no string"),
    ({"file_name": "a.png", "text": 3}, "missing or no string"),
    ({"file_name": "a.png", "text": "x", "label": 3}, "missing or no string"),
    ({"file_name": "gone.png", "text": "x"}, "gone.png: no such file"),
    ({"file_name": "../a.png", "text": "x"}, "outside the folder"),
    ({"file_name": "/etc/hosts", "text": "x"}, "outside the folder"),
    ({"file_name": "x" * 5000, "text": "x"}, "File name too long"),
    ({"file_name": "a.png", "text": "\ud800"}, "its caption holds half of a character"),
    ({"file_name": "a.png", "text": "x", "label": "\udfff"}, "its label holds half of a"),
    ({"file_name": "a.png", "text": "x" * 65_537}, "a caption of more than 65,536 bytes"),
    ({"file_name": "a.png", "text": "x", "label": "x" * 256}, "a label of more than 255 bytes"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[reason for _, reason in BAD_LINES])
def test_bad_lines_are_quarantined(captioned: Path, line: object, reason: str) -> None:
    listing(captioned, {"file_name": "b.png", "text": "two"}, line)
    data = opened(captioned)
    assert data.names == ("b.png",) and everything(data).captions == ("two",)
    (place, found), *rest = data.quarantined
    assert place == "metadata.jsonl line 2" and reason in found and "\n" not in found
    assert rest == [(name, "no good line in metadata.jsonl") for name in ("a.png", "c.png")]


def test_a_label_for_some_only(captioned: Path) -> None:
    rows = [{"file_name": f"{name}.png", "text": name} for name in "abc"]
    listing(captioned, rows[0] | {"label": "x"}, *rows[1:])
    data = opened(captioned)
    assert data.names == ("a.png",) and data.classes == ("x",)
    assert data.quarantined == [("b.png", "has no label"), ("c.png", "has no label")]


def spoil(classes: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(classes / "cat" / "z.jpg")
    whole = (classes / "cat" / "z.jpg").read_bytes()
    (classes / "cat" / "z.jpg").write_bytes(whole[: len(whole) // 2])
    (classes / "cat" / "Z.PNG").write_text("text")
    (classes / "dog" / "empty.gif").touch()
    Image.new("RGB", (1, 50)).save(classes / "dog" / "thin.png")
    (classes / "dog" / "link.png").symlink_to("nowhere")


def test_bad_pictures_cost_only_themselves(classes: Path) -> None:
    spoil(classes)
    data = opened(classes)
    assert data.names == ("dog/b.png", "dog/old/a.webp")
    assert data.classes == ("cat", "dog")  # as before, though no cat is left
    batch = everything(data)
    assert batch.labels.tolist() == [1, 1] and greys(batch)[0] == 30
    reasons = dict(data.quarantined)
    assert list(reasons) == [
        "cat/Z.PNG",
        "cat/z.jpg",
        "dog/empty.gif",
        "dog/link.png",
        "dog/thin.png",
    ]
    expected = ["none of PNG", "cut short", "empty file", "No such file", "too thin"]
    for part, reason in zip(expected, reasons.values(), strict=True):
        assert part in reason


def test_strict_refuses_the_folder(classes: Path) -> None:
    assert len(opened(classes, strict=True)) == 4
    spoil(classes)
    with pytest.raises(ValueError, match=r"5 bad, 2 good; the first: cat/Z\.PNG: none") as error:
        opened(classes, strict=True)
    assert str(classes) in str(error.value) and "\n" not in str(error.value)


def test_nothing_to_open(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "gone", "no such folder"), (tmp_path, "no pictures here")):
        with pytest.raises(ValueError, match=f"{path}: {reason}"):
            opened(path)
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"1 bad, 0 good; the first: a\.png: empty file"):
        opened(tmp_path)
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"jsonl need a file metadata\.jsonl"):
        opened(tmp_path, captions="jsonl")
    with pytest.raises(ValueError, match=r"1 bad, 0 good; the first: a\.png: has no caption"):
        opened(tmp_path, captions="txt")


def test_a_large_folder_is_decoded_batch_by_batch(
    classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = opened(classes)
    monkeypatch.setattr(folder, "IN_MEMORY", 4 * 3 * 8 * 8 - 1)
    lazy = opened(classes)
    assert kept.pixels is not None and lazy.pixels is None
    assert lazy.batch([3, 1]).x.equal(kept.batch([3, 1]).x)
    assert lazy.fingerprint() == kept.fingerprint()
    (classes / "cat" / "z.jpg").write_bytes(b"changed since")
    with pytest.raises(ValueError, match=r"z\.jpg: has changed since"):
        lazy.batch([1])


def test_the_fingerprint_is_of_the_content(classes: Path) -> None:
    first = opened(classes)
    for path in classes.rglob("*.png"):
        path.touch()
    assert opened(classes).fingerprint() == first.fingerprint()
    changed = [
        replace(first.folder, size=9).open(),
        replace(first.folder, channels=1).open(),
        replace(first.folder, fit="pad").open(),
    ]
    (classes / "dog").rename(classes / "wolf")
    changed.append(opened(classes))
    picture(classes / "wolf" / "b.png", 31)
    changed.append(opened(classes))
    assert len({data.fingerprint() for data in [first, *changed]}) == 6


@pytest.mark.parametrize("how", ["vanishes", "changes", "is cut", "is empty"])
def test_a_picture_that_is_not_what_it_was(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where pictures do not lie in memory: another picture must not be trained on silently."""
    monkeypatch.setattr("minidiffusion.data.folder.IN_MEMORY", 0)
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(path)
    data = Folder(str(tmp_path), size=8).open()
    first = data.batch([0]).x
    assert data.batch([0]).x.equal(first)
    if how == "vanishes":
        path.unlink()
    elif how == "changes":
        Image.new("RGB", (8, 8), "blue").save(path)
    else:
        path.write_bytes(path.read_bytes()[:40] if how == "is cut" else b"")
    with pytest.raises((ValueError, FileNotFoundError), match=r"a\.png"):
        data.batch([0])
