"""The figures of pictures that are known to be right, or to be wrong in one way.

Asked is a judge that needs no weights: it compares small grey pictures with those of the pack.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import emoji_pack
import pytest
import torch
from rounding import EPS, SHORT, assert_near
from torch import Tensor
from torch.nn import functional as F

from minidiffusion.data.emoji import Emoji
from minidiffusion.evaluation.features import Extractor
from minidiffusion.evaluation.prompted import (
    SPLITS,
    Asked,
    Eyes,
    asked,
    evaluate,
    naming,
    real,
)

COUNT = 60


@pytest.fixture(scope="module", autouse=True)
def pack() -> Iterator[None]:
    with emoji_pack.thinned_pack():
        yield


def small(x: Tensor) -> Tensor:
    """Directions of the pictures, 8 x 8 in colour; of an empty one, of another picture's like."""
    y = F.avg_pool2d(1 - x, 8).flatten(1)
    return F.normalize(y - y.mean(dim=1, keepdim=True), dim=1)


@cache
def known() -> tuple[dict[str, int], Tensor]:
    captions = [pair.captions()[0] for pair in Emoji(split="all").pairs()]
    return {caption: i for i, caption in enumerate(captions)}, small(real("all"))


def lookup(pictures: Tensor, captions: Sequence[str]) -> Tensor:
    places, looks = known()
    looks = torch.cat([looks, torch.zeros_like(looks[:1])])  # for a style that is not there
    return small(pictures) @ looks[[places.get(caption, -1) for caption in captions]].T


EYES = Eyes(lookup, Extractor("4 x 4", 48, lambda x: F.avg_pool2d(x, 16).flatten(1)))


def concepts() -> set[str]:
    return {pair.concept for pair in Emoji(split="all").pairs()}


@cache
def wanted() -> tuple[Asked, ...]:
    return tuple(asked(split, COUNT) for split in SPLITS)


def drawn(change: Callable[[Asked, Tensor], Tensor], first: int = 0) -> list[tuple[Asked, Tensor]]:
    return [(one, change(one, real(one.split)[one.rows])) for one in wanted()[first:]]


def test_what_is_asked_for_is_some_of_a_split_at_random() -> None:
    few, same = asked("train", 20), asked("train", 20)
    assert few.rows == same.rows == sorted(set(few.rows)) and len(few.captions) == 20
    assert asked("train", 20, seed=1).rows != few.rows
    assert few.captions[3] == few.pairs[few.rows[3]].captions()[0]
    whole = asked("concept", 10_000)
    assert whole.rows == [*range(278)] and {pair.split for pair in whole.pairs} == {"concept"}


def test_real_pictures_score_what_real_pictures_score() -> None:
    scores = evaluate(drawn(lambda _, x: x), EYES)
    assert [one.split for one in scores.splits] == list(SPLITS) and scores.concepts == len(
        concepts()
    )
    for one in scores.splits:
        assert one.shown == one.real and one.count == COUNT
        assert one.shown.retrieval.share > 0.97 and one.shown.concept.share > 0.95
        assert min(one.shown.style.share, one.shown.group.share) > 0.95
        assert_near(one.frechet, 0, 1, scale=one.frechet_floor, eps=SHORT)
        assert one.frechet_floor is not None and one.frechet_floor > 0.5
    train, combination, concept = scores.splits
    assert [train.nearest_ratio, combination.nearest_ratio, concept.nearest_ratio] == [0, 1, 1]


def test_training_pictures_in_place_of_unseen_ones_are_seen_to_be_copies() -> None:
    one = asked("concept", 40)
    (found,) = evaluate([(one, real("train")[:40])], EYES).splits
    assert found.nearest_ratio == 0 and found.shown.retrieval.share < 0.2


def test_one_grey_picture_for_all_is_found_by_chance() -> None:
    grey = torch.zeros(3, 64, 64)
    grey[:, 20:40, 20:40] = -0.2
    scores = evaluate(drawn(lambda _, x: grey.expand_as(x).clone()), EYES)
    for one in scores.splits:
        assert one.shown.retrieval.share < 0.05 and one.shown.concept.share < 0.05
        assert one.shown.retrieval.low < 0.01 + EPS
        assert one.real.retrieval.share > 0.97
        assert one.frechet is not None and one.frechet_floor is not None
        assert one.frechet > 2 * one.frechet_floor


def test_pictures_of_other_captions_are_good_pictures_but_wrong() -> None:
    scores = evaluate(drawn(lambda _, x: x.roll(1, dims=0), first=2), EYES)
    for one in scores.splits:
        # Neighbours are of one group and often of one concept, in other styles.
        assert one.shown.retrieval.share < 0.5 < one.real.retrieval.share
        assert one.shown.concept.share < 0.5
        assert_near(one.frechet, 0, 1, scale=one.frechet_floor, eps=SHORT)  # asks not who is who


def test_the_right_thing_in_a_wrong_style() -> None:
    pairs, x = Emoji(split="all").pairs(), real("all")
    places = {(pair.concept, pair.style): i for i, pair in enumerate(pairs)}

    def otherwise(one: Asked, truth: Tensor) -> Tensor:
        found = []
        for row, picture in zip(one.rows, truth, strict=True):
            pair = one.pairs[row]
            there = [
                places.get((pair.concept, s)) for s in ("3d", "flat", "noto") if s != pair.style
            ]
            found.append(next((x[place] for place in there if place is not None), picture))
        return torch.stack(found)

    for one in evaluate(drawn(otherwise, first=1), EYES).splits:
        assert one.shown.style.share < 0.25 and one.shown.concept.share > 0.9
        assert one.shown.group.share > 0.9


def test_colours_are_asked_of_captions_that_name_one() -> None:
    hues = [naming(split) for split in SPLITS]
    assert [len(one.rows) for one in hues] == [143, 9, 3]
    assert "blue heart, flat style" in hues[1].captions
    few = [(one, real(one.split)[one.rows]) for one in (asked(split, 2) for split in SPLITS)]
    truth = [(one, real(one.split)[one.rows]) for one in hues]
    for drawn in evaluate(few, EYES, hues=truth).splits:
        assert drawn.shown.colour == drawn.real.colour and drawn.shown.colour is not None
        assert drawn.shown.colour.share > 0.85
    pink = torch.ones(3, 64, 64)
    pink[:, 10:50, 10:50] = torch.tensor([1.0, 0.2, 0.55])[:, None, None]
    scores = evaluate(few, EYES, hues=[(one, pink.expand_as(x)) for one, x in truth])
    train, *rest = (drawn.shown.colour for drawn in scores.splits)
    assert train is not None and 0 < train.share < 0.1  # a few hearts are pink
    assert [one and one.share for one in rest] == [0, 0]
    assert scores.splits[0].as_dict()["real_colour"] > 0.85
    assert all(one.shown.colour is None for one in evaluate(few, EYES).splits)


def test_the_score_of_a_clip_is_of_each_picture_with_its_own_caption() -> None:
    one = asked("concept", 70)
    x = real("concept")[one.rows]
    by_hand = torch.stack([
        lookup(x[i : i + 1], [caption])[0, 0] for i, caption in enumerate(one.captions)
    ]).mean()  # fmt: skip
    other = x.roll(1, dims=0)
    scores = evaluate([(one, x), (one, other)], EYES._replace(clip=lookup))
    assert_near([scores.splits[0].shown.clip, float(by_hand)], [1, 1], 16, eps=SHORT)
    assert scores.splits[1].shown.clip is not None and scores.splits[1].shown.clip < 0.9
    assert_near(scores.splits[1].real.clip, 1, 16, eps=SHORT)
    assert "CLIP score" in scores.table() and scores.splits[1].as_dict()["real_clip"]


def test_the_table_and_the_dict() -> None:
    few = [(one._replace(rows=one.rows[:20]), x[:20]) for one, x in drawn(lambda _, x: x)]
    scores = evaluate(few, EYES)
    plain, table = scores.as_dict(), scores.table()
    assert json.loads(json.dumps(plain)) == plain and set(plain) == {"features", *SPLITS}
    first = plain["train"]
    assert isinstance(first, dict) and first["count"] == 20 and "frechet" not in first
    assert first["retrieval"] == first["real_retrieval"] and "concept_low" in first
    offered = len(concepts())
    for words in ("training captions", "unseen combinations", "unseen concepts", "4 x 4",
                  "found among 100", f"concept of {offered}", "Frechet distance"):  # fmt: skip
        assert words in table
    assert "CLIP" not in table


def test_as_many_pictures_as_captions() -> None:
    one = asked("concept", 5)
    with pytest.raises(ValueError, match="5 captions, but 4 pictures"):
        evaluate([(one, torch.zeros(4, 3, 64, 64))], EYES)
