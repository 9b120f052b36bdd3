"""The emoji: how many, what is held out of what, and what is said of them."""

import hashlib
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from minidiffusion.data import emoji
from minidiffusion.data.dataset import Dataset, as_floats
from minidiffusion.data.emoji import PACK, STYLES, Emoji, Pair, article
from minidiffusion.typed import ConfigError, build

COUNTS = {"train": (4803, 9143), "combination": (276, 536), "concept": (278, 618)}
"""Without the skin tones, and with them."""
APPLE = Pair(
    "1f34e", "3d", "red apple", ["apple", "fruit", "red apple", "ripe"], "food & drink", False,
    "train",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def forgotten() -> Iterator[None]:
    """Pixels are kept for the next one who opens them: 60 MB."""
    yield
    emoji._pixels.cache_clear()


@pytest.mark.parametrize("split", COUNTS)
def test_counts(split) -> None:
    plain, toned = (Emoji(split, tones=tones).pairs() for tones in (False, True))
    assert (len(plain), len(toned)) == COUNTS[split]
    assert not any(pair.tone for pair in plain) and {p.split for p in toned} == {split}
    assert [pair for pair in toned if not pair.tone] == plain
    assert {pair.style for pair in plain} == set(STYLES)
    assert len(Emoji("all").pairs()) == sum(count for count, _ in COUNTS.values())


def test_what_is_held_out_is_not_trained() -> None:
    """No concept of the split "concept" is in "train", in any style or skin tone; of the split
    "combination" each is there, but not in this style."""
    splits = {split: Emoji(split, tones=True).pairs() for split in COUNTS}
    concepts = {split: {pair.concept for pair in pairs} for split, pairs in splits.items()}
    assert len(concepts["concept"]) == 100
    assert not concepts["concept"] & (concepts["train"] | concepts["combination"])
    assert concepts["combination"] <= concepts["train"] and len(concepts["combination"]) == 276
    styles: dict[str, set[str]] = {}
    for pair in splits["train"]:
        styles.setdefault(pair.concept, set()).add(pair.style)
    for pair in splits["combination"]:
        assert pair.style not in styles[pair.concept] and styles[pair.concept]
    plain = {pair.concept for pair in Emoji("train").pairs()}  # without tones, too
    assert {pair.concept for pair in Emoji("combination").pairs()} <= plain


def test_no_picture_stands_there_twice() -> None:
    named = Counter((p.label, p.style) for p in Emoji("all").pairs() if not p.tone)
    assert max(named.values()) == 1 and len(named) == 5357


def test_captions_from_short_to_long() -> None:
    assert APPLE.captions() == (
        "red apple, 3d style", "a red apple, 3d style",
        "red apple, 3d style, apple, fruit, ripe", "a red apple",
    )  # fmt: skip
    bare = APPLE._replace(label="eyes", tags=[])
    assert bare.captions() == ("eyes, 3d style", "eyes, 3d style", "eyes, 3d style", "eyes")


@pytest.mark.parametrize(
    ("label", "wanted"),
    [
        ("red apple", "a "), ("eye", "an "), ("octopus", "an "), ("umbrella", "a "),
        ("grapes", ""), ("dress", "a "), ("cactus", "a "), ("flag: France", ""),
        ("Christmas tree", ""), ("keycap: 1", ""), ("person with glasses", ""), ("1st place", ""),
    ],
)  # fmt: skip
def test_articles(label: str, wanted: str) -> None:
    assert article(label) == wanted


def test_pixels_lie_beside_their_names() -> None:
    """A red apple is red, a blue heart blue, whatever the split; and all of them on white."""
    data = Emoji("all", captions="short")
    opened = data.open()
    assert isinstance(opened, Dataset) and opened.shape == (3, 64, 64) and opened.classes == ()
    pairs = data.pairs()
    assert len(opened) == len(pairs) and opened.captions == tuple(p.captions()[0] for p in pairs)
    for label, channel in (("red apple", 0), ("red heart", 0), ("blue heart", 2)):
        rows = [row for row, pair in enumerate(pairs) if pair.label == label]
        assert len(rows) == 3
        for row in rows:
            means = opened.x[row, :, 16:48, 16:48].float().mean(dim=(1, 2))
            assert int(means.argmax()) == channel, pairs[row]
    corners = opened.x[:, :, 0, 0].float()
    assert (corners.mean(dim=1) > 245).float().mean() > 0.95


def test_every_picture_comes_with_each_of_its_captions() -> None:
    data = Emoji("concept").open()
    pairs = Emoji("concept").pairs()
    assert data.x.shape == (278, 3, 64, 64) and len(data) == 4 * 278
    batch = data.batch([5, 278 + 5, 3 * 278 + 5])
    names = pairs[5].captions()
    assert batch.captions == (names[0], names[1], names[3])
    assert torch.equal(batch.x, as_floats(data.x[5]).expand(3, -1, -1, -1))


def test_a_choice_of_styles_and_a_limit() -> None:
    pairs = Emoji("concept", styles=("noto", "flat")).pairs()
    assert {pair.style for pair in pairs} == {"noto", "flat"}
    few = Emoji("concept", limit=3)
    assert few.pairs() == Emoji("concept").pairs()[:3]
    assert torch.equal(few.open().x, Emoji("concept").open().x[:3])
    with pytest.raises(ValueError, match=r"styles \[\]: choose from 3d, flat, noto"):
        Emoji(styles=()).open()
    with pytest.raises(ConfigError, match=r"styles\[0\]: unknown 'oil'"):
        build(Emoji, {"styles": ["oil"]})


def test_the_fingerprint_is_that_of_what_is_opened() -> None:
    first = Emoji("concept", limit=4).open()
    found = [
        first, Emoji("concept", limit=5).open(), Emoji("concept", limit=4, captions="short").open(),
        Emoji("train", limit=4).open(), replace(first, captions=first.captions[::-1]),
    ]  # fmt: skip
    assert len({data.fingerprint() for data in found}) == 5
    emoji._pixels.cache_clear()
    assert Emoji("concept", limit=4).open().fingerprint() == first.fingerprint()


def test_the_pack_is_the_one_that_models_were_trained_on() -> None:
    with zipfile.ZipFile(PACK) as pack:
        assert pack.testzip() is None
        lines = pack.read("pairs.jsonl")
        assert len(lines.splitlines()) == 10297
        digest = "4d8d1ecba9b28e6f9213defe6d2fe60bb52cb03d846201191b8e0bcc049591c5"
        assert hashlib.sha256(lines).hexdigest() == digest
