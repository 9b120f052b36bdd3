"""Tar shards as a data set: what is read, what is left out, and in which order."""

import io
import json
import subprocess
import tracemalloc
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tars import GOOD, LAST, header, member, numbered, picture, shards, tar

from minidiffusion.data import Batch, Dataset, Parts, Shards, Tars, batches, mapped, write_shards
from minidiffusion.data.order import Ordered
from minidiffusion.data.shards import braced, expanded


def opened(path: Path | str, **options: object) -> Tars:
    return Shards(str(path), **{"size": 8, **options}).open()


def everything(data: Tars) -> Batch:
    return data.batch(range(len(data)))


def greys(batch: Batch) -> list[int]:
    assert batch.x.shape[1:] == (3, 8, 8)
    return ((batch.x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards(tmp_path)
    return tmp_path


def test_samples_are_numbered_through_the_shards(folder: Path) -> None:
    data = opened(folder)
    assert isinstance(data, Dataset) and isinstance(data, Ordered)
    assert len(data) == 25 and data.shape == (3, 8, 8) and data.classes == ("0", "1", "2")
    batch = everything(data)
    assert greys(batch) == list(range(25)) and data.quarantined == []
    assert batch.captions == tuple(f"grey {n}" for n in range(25))
    assert batch.labels.tolist() == [n % 3 for n in range(25)]
    some = data.batch([24, 3, 24, 7])
    assert greys(some) == [24, 3, 24, 7] and some.captions[1] == "grey 3"
    for wrong in ([25], [-1]):
        with pytest.raises(IndexError, match="there are 25"):
            data.batch(wrong)
    assert opened(folder, channels=1).batch([3]).x.shape == (1, 1, 8, 8)
    assert opened(folder, size=4).batch([3]).x.shape == (1, 3, 4, 4)


@pytest.mark.parametrize("kind", [None, "PAX_FORMAT", "GNU_FORMAT"])
def test_what_webdataset_writes(kind: str | None, tmp_path: Path) -> None:
    pattern = str(tmp_path / "x-%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0, encoder=False, format=kind) as sink:
        for key, parts in numbered(10):
            sink.write({"__key__": f"in/{key}", **parts})
    data = opened(tmp_path / "x-{000..002}.tar")
    batch = everything(data)
    assert greys(batch) == list(range(10)) and batch.captions[9] == "grey 9"
    assert batch.labels.tolist() == [n % 3 for n in range(10)]


def test_captions_and_labels_in_json(tmp_path: Path) -> None:
    rows = [
        {"text": " one ", "label": "b"}, {"caption": "two", "label": "a"},
        {"text": "three", "label": 7}, {"text": None, "caption": "four", "label": "a"},
    ]  # fmt: skip
    files = {}
    for n, row in enumerate(rows):
        files |= {f"{n}.jpg": picture(n, "JPEG"), f"{n}.json": json.dumps(row).encode()}
    files |= {
        "4.jpg": picture(4, "JPEG"),
        "4.json": b'{"label": "b"}',
        "4.TXT": b"\xef\xbb\xbffive\n",
    }
    batch = everything(data := opened(tar(tmp_path / "x.tar", files)))
    assert data.quarantined == [] and data.classes == ("7", "a", "b")
    assert batch.captions == ("one", "two", "three", "four", "five")
    assert batch.labels.tolist() == [2, 1, 0, 1, 2]


def test_numbers_as_labels_are_sorted_as_numbers(tmp_path: Path) -> None:
    write_shards(numbered(12, classes=12), tmp_path, per_shard=5)
    data = opened(tmp_path)
    assert data.classes == tuple(map(str, range(12)))
    assert everything(data).labels.tolist() == list(range(12))


def test_neither_captions_nor_labels(tmp_path: Path) -> None:
    tar(tmp_path / "x.tar", {"a.png": picture(1), "b.png": picture(2)})
    data = opened(tmp_path)
    assert data.classes == () and everything(data).captions == ()
    assert everything(data).labels.tolist() == [0, 0]


def test_what_others_have_and_some_lack(tmp_path: Path) -> None:
    """Over all shards, as in one folder."""
    tar(tmp_path / "a.tar", {**GOOD, **LAST})
    tar(tmp_path / "b.tar", {"b.png": picture(2), "c.png": picture(3), "d.txt": b"no picture"})
    data = opened(tmp_path)
    assert everything(data).captions == ("first", "last")
    assert data.quarantined == [
        ("b.tar: d", "0 pictures: a sample has one"),
        ("b.tar", "2 samples lack a caption, which others have; the first is b"),
    ]
    write_shards(numbered(2), tmp_path, "c")
    data = opened(tmp_path)
    assert everything(data).captions == ("grey 0", "grey 1") and data.classes == ("0", "1")
    assert data.quarantined[0][0] == "a.tar" and "caption and a label" in data.quarantined[0][1]
    with pytest.raises(ValueError, match=r"3 bad, 2 good; the first: a\.tar: 2 samples lack"):
        opened(tmp_path, strict=True)


BAD_TEXTS = [
    ("txt", b"caf\xe9", "its caption is not UTF-8"),
    ("txt", b"x" * 2**20, "1,048,576 bytes in b.txt: 65,536 at most"),
    ("json", b'{"text": "caf\xe9"}', "its .json is not UTF-8"),
    ("json", b"{text}", "its .json is no JSON"),
    ("json", b"[" * 100_000, "nested too deep"),
    ("json", b'["text"]', "its .json is no object"),
    ("json", b'{"text": 3}', "the caption in its .json is no string"),
    ("json", b'{"text": "' + b"x" * 2**17 + b'"}', "a caption of more than 65,536 bytes"),
    ("json", b'{"text": "' + b"x" * 2**20 + b'"}', "1,048,588 bytes in b.json"),
    ("json", b'{"text": "\\ud800"}', "its caption holds half of a character"),
    ("json", b'{"text": "x", "label": "\\udfff"}', "its label holds half of a character"),
    ("json", b'{"text": "x", "label": [1]}', "neither a string nor a whole number"),
    ("json", b'{"text": "x", "label": true}', "neither a string nor a whole number"),
    ("json", b'{"text": "x", "label": ' + b"9" * 9999 + b"}", "digits"),
    ("cls", b"x" * 300, "a label of more than 255 bytes"),
    ("cls", b"\xff", "its class is not UTF-8"),
    ("jpg", b"x", "2 pictures"),
]


@pytest.mark.parametrize(("extension", "text", "reason"), BAD_TEXTS)
def test_bad_texts_cost_only_their_sample(
    extension: str, text: bytes, reason: str, tmp_path: Path
) -> None:
    files = {**GOOD, "b.png": picture(2), f"b.{extension}": text, **LAST}
    data = opened(tar(tmp_path / "x.tar", files))
    assert everything(data).captions == ("first", "last")
    ((name, found),) = data.quarantined
    assert name == "x.tar: b" and reason in found and "\n" not in found


def test_empty_captions_are_captions(tmp_path: Path) -> None:
    files = {
        **GOOD,
        "b.png": picture(2),
        "b.txt": b" \n",
        "c.png": picture(3),
        "c.json": b'{"text":""}',
    }
    assert everything(opened(tar(tmp_path / "x.tar", files))).captions == ("first", "", "")


def saved(picture: Image.Image, kind: str, **more: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **more)
    return buffer.getvalue()


def bad_pictures() -> dict[str, tuple[bytes, str]]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    jpeg = saved(noise, "JPEG")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    moving = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    return {
        "cut": (jpeg[: len(jpeg) // 2], "cut short"),
        "empty": (b"", "an empty picture"),
        "text": (b"no picture at all", "none of PNG"),
        "bomb": (saved(Image.new("1", (13_000, 13_000)), "PNG"), "megapixels"),
        "thin": (saved(Image.new("RGB", (1, 50)), "PNG"), "too thin"),
        "moving": (moving, "animated"),
    }


def test_bad_pictures_cost_only_themselves(tmp_path: Path) -> None:
    bad, files = bad_pictures(), dict(GOOD)
    for name, (data, _) in bad.items():
        files |= {f"{name}.png": data, f"{name}.txt": b"x"}
    data = opened(tar(tmp_path / "x.tar", files | LAST))
    assert everything(data).captions == ("first", "last") and greys(everything(data)) == [1, 9]
    reasons = dict(data.quarantined)
    assert list(reasons) == [f"x.tar: {name}" for name in bad]
    for reason, (_, expected) in zip(reasons.values(), bad.values(), strict=True):
        assert expected in reason and "\n" not in reason
    assert opened(tmp_path).quarantined == data.quarantined  # from the index, in the same words
    with pytest.raises(ValueError, match=r"6 bad, 2 good; the first: x\.tar: cut: damaged"):
        opened(tmp_path, strict=True)


def test_good_pictures_of_every_kind(tmp_path: Path) -> None:
    files = {
        "cmyk.jpg": saved(Image.new("CMYK", (9, 7)), "JPEG"),
        "deep.png": saved(Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "PNG"),
        "clear.png": saved(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "PNG"),
        "lies.png": picture(5, "WEBP"),
    }
    data = opened(tar(tmp_path / "x.tar", files))
    assert data.quarantined == [] and greys(everything(data))[1:3] == [156, 255]


def test_hostile_members_are_listed_and_nothing_leaves_the_archive(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    blocks = b"".join(member(name, data) for name, data in GOOD.items())
    blocks += member("../out.png", picture(5)) + header("l.png", kind=b"2", linkname="/etc/hosts")
    blocks += member("new\nline\x1b[2J.png", b"x") + header("n.png", -512)
    data = opened(tar(inside / "x.tar", blocks))
    assert everything(data).captions == ("first",)
    assert data.quarantined == [
        ("x.tar: ../out", "a name outside the archive"),
        ("x.tar: l", "a link"),
        ("x.tar: new\\nline\\x1b[2J", data.quarantined[2][1]),
        ("x.tar", f"a negative size at byte {len(blocks) - 512:,}"),
    ]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "x.tar", "x.tar.index"]


@pytest.mark.parametrize("more", [0, 300, 540, 700, 1024 + 600])
def test_a_shard_cut_short_gives_its_whole_samples(folder: Path, more: int) -> None:
    """Between samples, in a header, in a picture, in the zeros behind it, in a caption."""
    path = folder / "part-000001.tar"
    path.write_bytes(path.read_bytes()[: 3 * 3072 + more])
    data = opened(folder)
    assert len(data) == 25 - 7 + 3 and greys(data.batch([7, 9, 10])) == [7, 9, 14]
    names = [name for name, _ in data.quarantined]
    assert names == ["part-000001.tar: 000010"] * (more > 300) + ["part-000001.tar"]
    for _, reason in data.quarantined:
        assert "cut short" in reason or (more == 300 and "no tar header" in reason)


def test_a_file_that_is_no_tar(folder: Path) -> None:
    (folder / "part-000001.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    data = opened(folder)
    assert len(data) == 18
    ((name, reason),) = data.quarantined
    assert name == "part-000001.tar" and "no tar archive" in reason
    with pytest.raises(ValueError, match=r"1 bad, 18 good"):
        opened(folder, strict=True)
    with pytest.raises(ValueError, match=r"1 bad, 0 good; the first: part-000001\.tar: no tar"):
        opened(folder / "part-000001.tar")


def test_paths(folder: Path) -> None:
    for text in ("", "part-*.tar", "part-{000000..000003}.tar", "part-00000{0,1,2,3}.tar"):
        assert [p.name for p in expanded(str(folder / text))] == [
            f"part-{n:06d}.tar" for n in range(4)
        ]
    assert len(opened(folder / "part-000002.tar")) == 7
    assert braced("a{8..10}b{x,y}") == ["a8bx", "a8by", "a9bx", "a9by", "a10bx", "a10by"]
    assert braced("{08..10}") == ["08", "09", "10"] and braced("{0..10}")[-1] == "10"
    assert braced("{0..10}")[0] == "0"


@settings(max_examples=60, deadline=None)
@given(
    st.from_regex(
        r"[a-c]{0,2}(\{(0{0,2}[1-3]\.\.[4-9]{1,2}|a,b|x,,y)\}[a-c]?){0,3}", fullmatch=True
    )
)
def test_braces_are_those_of_webdataset(text: str) -> None:
    import braceexpand

    assert braced(text) == list(braceexpand.braceexpand(text))


MISTAKES = [
    ("gone.tar", "no such shard"),
    ("*.gone", "no such shard"),
    ("part-{000000..000009}.tar", "part-000004.tar: no such shard"),
    ("{part-000000,part-000000}.tar", "names a shard twice"),
    ("{9..1}.tar", "counts upwards"),
    ("{0..99999999}.tar", "1,000,000 shards at most"),
    ("{0..9999}{0..9999}.tar", "1,000,000 shards at most"),
    ("{a}" * 50, "8 pairs of braces at most"),
    ("empty", "no .tar here"),
    ("none.tar", "no samples here"),
    ("pipe:cat x.tar", "no such shard"),
]


@pytest.mark.parametrize(("text", "reason"), MISTAKES)
def test_mistakes(folder: Path, text: str, reason: str) -> None:
    (folder / "empty").mkdir()
    tar(folder / "none.tar", {})
    with pytest.raises(ValueError, match=reason) as error:
        opened(folder / text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("window", [1, 4, 10, 10_000])
def test_every_epoch_visits_every_sample_once(folder: Path, window: int) -> None:
    tar(folder / "part-000002b.tar", {"x.png": b"bad"})  # a shard without a good sample
    data = opened(folder, window=window)
    whole = data.order(3, 0, 100)
    parts = [tuple(whole[k : k + 25]) for k in range(0, 100, 25)]
    assert all(sorted(part) == list(range(25)) for part in parts) and len(set(parts)) == 4
    for start, count in ((0, 0), (1, 3), (24, 2), (20, 60), (99, 1)):
        assert data.order(3, start, count) == whole[start : start + count]
    assert data.order(4, 0, 25) != list(parts[0])


def test_shards_are_shuffled_as_wholes(folder: Path) -> None:
    """With a window of one sample, each shard's samples come one after the other."""
    found = opened(folder, window=1).order(0, 0, 25)
    firsts = [n for n in found if n % 7 == 0]
    assert firsts != sorted(firsts)
    assert found == [n for first in firsts for n in range(first, min(first + 7, 25))]


def test_the_order_is_pinned(folder: Path) -> None:
    """A checkpoint of today must continue tomorrow: these numbers may never change."""
    assert opened(folder, window=9).order(0, 20, 10) == [23, 21, 22, 24, 13, 14, 24, 21, 22, 15]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    window=st.integers(1, 40), seed=st.integers(0, 2**64), start=st.integers(0, 200),
)  # fmt: skip
def test_no_sample_is_lost_at_any_border(
    counts: list[int], window: int, seed: int, start: int
) -> None:
    ends, total = np.cumsum(counts), sum(counts)
    data = Tars(Shards("x", window=window), (), (), (), (False, False), np.array(counts), ends, [])
    first = start // total * total
    whole = data.order(seed, first, 2 * total)
    assert sorted(whole[:total]) == sorted(whole[total:]) == list(range(total))
    assert data.order(seed, start, total) == whole[start - first :][:total]


def test_a_thousand_million_samples_are_ordered_in_little_memory() -> None:
    counts = np.full(100_000, 10_000)
    data = Tars(Shards("x"), (), (), (), (False, False), counts, np.cumsum(counts), [])
    tracemalloc.start()
    for start in (0, 123_456_789_012, 999_999_999):
        assert len(set(data.order(0, start, 256))) == 256
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 20, 1004])
def test_any_start_workers_and_ranks(folder: Path, workers: int, start: int) -> None:
    data = opened(folder, window=6)
    wanted = data.order(5, start, 80)

    def taken(rank: int, ranks: int, source: Dataset = data) -> list[tuple[int, list[int]]]:
        stream = batches(source, 5, 8, start, workers, rank, ranks)
        found = [(first, greys(batch)) for first, batch in islice(stream, 10)]
        stream.close()
        return found

    alone = taken(0, 1)
    assert [n for _, part in alone for n in part] == wanted
    assert taken(0, 1, mapped(data, lambda batch: batch)) == alone
    both = sorted(taken(0, 2) + taken(1, 2))
    assert [n for _, part in both for n in part] == wanted


def test_the_fingerprint_is_of_the_content(folder: Path, tmp_path: Path) -> None:
    first = opened(folder)
    prints = {first.fingerprint()}
    for path in folder.glob("*.tar"):
        path.touch()
        path.rename(folder / f"renamed-{path.name}")
    assert opened(folder).fingerprint() in prints
    for change in ({"size": 9}, {"channels": 1}, {"fit": "pad"}, {"window": 5}):
        prints.add(replace(first.shards, **change).open().fingerprint())
    (folder / "renamed-part-000003.tar").unlink()
    prints.add(opened(folder).fingerprint())
    write_shards(numbered(4, first=22), folder, "s")
    prints.add(opened(folder).fingerprint())
    assert len(prints) == 7


def test_a_shard_that_is_gone_is_named(folder: Path) -> None:
    data = opened(folder)
    (folder / "part-000000.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"part-000000\.tar"):
        data.batch([0])
    assert greys(data.batch([7])) == [7]


def test_system_tar(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
        (tmp_path / f"{n}.txt").write_text(f"grey {n}")
    subprocess.run(["tar", "-cf", "x.tar", "--sort=name", "."], cwd=tmp_path, check=True)
    assert everything(opened(tmp_path)).captions == ("grey 0", "grey 1", "grey 2")


def test_samples_by_hand(tmp_path: Path) -> None:
    write_shards([Parts("a", {"webp": picture(7, "WEBP")})], tmp_path)
    assert len(opened(tmp_path, strict=True)) == 1


def test_what_is_no_file_is_not_read() -> None:
    """A device may never end."""
    with pytest.raises(ValueError, match="/dev/zero: a device or a pipe, not a file"):
        opened("/dev/zero")
