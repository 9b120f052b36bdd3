"""The best way to cut a text, against all ways to cut it."""

import random
from array import array
from collections.abc import Iterator
from itertools import pairwise

import pytest

from minidiffusion.text.lattice import LONGEST_PIECE, UNKNOWN, Pieces, checked, lattice

Scores = dict[str, float]


def vocabulary(draw: random.Random, letters: str, ties: bool) -> Scores:
    """Some pieces; where sums are to tie, their scores are few and exact."""
    pieces = {
        "".join(draw.choices(letters, k=draw.randrange(1, 5))) for _ in range(draw.randrange(1, 14))
    }
    return {
        piece: draw.choice([-1.0, -2.0, -0.5, 0.0]) if ties else draw.uniform(-9, 1)
        for piece in sorted(pieces)
    }


def pieces_of(scores: Scores, single: bool) -> Pieces:
    rows = tuple((piece, number, score) for number, (piece, score) in enumerate(scores.items()))
    unknown = min(scores.values()) - 10
    return Pieces(tuple(scores), rows, array("f", [unknown])[0], {"unk": 0}, {}, single)


def ways(text: str) -> Iterator[list[str]]:
    for bits in range(1 << max(len(text) - 1, 0)):
        cuts = [0, *(k for k in range(1, len(text)) if bits >> (k - 1) & 1), len(text)]
        yield [text[a:b] for a, b in pairwise(cuts)]


def brute(text: str, scores: Scores, unknown: float, single: bool) -> list[str]:
    """Of all ways the best; of equal ones that whose last piece is longest, and so on before it."""
    if not text:
        return []
    known = scores | {letter: unknown for letter in text if letter not in scores}
    sums = []
    for way in ways(text):
        if all(piece in known for piece in way):
            total = array("f" if single else "d", [0.0])
            for piece in way:
                total[0] += known[piece]
            sums.append((total[0], len(way[-1])))
    last = text[-max(sums)[1] :]
    return [*brute(text[: -len(last)], scores, unknown, single), last]


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_best_of_all_ways(seed: int, single: bool, ties: bool) -> None:
    draw = random.Random(seed)
    letters = "abcd"[: draw.randrange(1, 5)]
    scores = vocabulary(draw, letters, ties)
    if single:
        scores = {piece: array("f", [score])[0] for piece, score in scores.items()}
    pieces = pieces_of(scores, single)
    found = lattice(pieces)
    for _ in range(4):
        text = "".join(draw.choices(letters + "z", k=draw.randrange(0, 10)))
        best = found.best(text)
        assert [text[a:b] for a, b, _ in best] == brute(text, scores, pieces.unknown, single)
        names = [
            UNKNOWN if text[a:b] not in scores else pieces.spelled.index(text[a:b])
            for a, b, _ in best
        ]
        assert [number for _, _, number in best] == names


def test_float32_decides_where_sums_are_near() -> None:
    """Far from zero .001 is lost in float32, and the first way that was found stays."""
    scores = {"a": -20_000.0, "b": -0.0004, "c": -0.0004, "bc": -0.0009}
    text = "aaa" + "bc"
    exact, rounded = (lattice(pieces_of(scores, single)).best(text) for single in (False, True))
    assert [text[a:b] for a, b, _ in exact] == ["a", "a", "a", "b", "c"]
    assert [text[a:b] for a, b, _ in rounded] == ["a", "a", "a", "bc"]


def test_sums_begin_anew_where_float32_ends() -> None:
    scores = {"a": -20_000.0, "b": -0.001, "c": -0.001, "bc": -0.0021, "abc": -20_000.5}
    text = "a" * 6 + "bc" * 3
    found = lattice(pieces_of(scores, True)).best(text)
    assert [text[a:b] for a, b, _ in found] == [*"aaaaaa", *"bcbcbc"]


def test_of_pieces_that_are_spelled_alike_the_later_counts() -> None:
    rows = (("a", 0, -1.0), ("a", 1, -5.0), ("", 2, 0.0))
    pieces = Pieces(("a", "a", ""), rows, -15.0, {"unk": 0}, {}, False)
    assert lattice(pieces).best("aa") == [(0, 1, 1), (1, 2, 1)]


def test_pieces_are_bounded() -> None:
    assert checked(["a" * LONGEST_PIECE]) == ("a" * LONGEST_PIECE,)
    with pytest.raises(ValueError, match="piece 1: 1001 letters long; allowed: 1000000 pieces"):
        checked(["a", "b" * (LONGEST_PIECE + 1)])
