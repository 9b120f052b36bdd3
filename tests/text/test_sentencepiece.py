"""SentencePiece's files: every setting against sentencepiece itself, and files that are damaged."""

import random
import re
import struct
from typing import Any

import pytest
import sentencepieces as made
from sentencepieces import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER, Piece

from minidiffusion.text.unigram import Unigram

LETTERS = "ab é日▁"
PLAIN: list[Piece] = [("<unk>", 0, UNKNOWN), ("<s>", 0, CONTROL), ("</s>", 0, CONTROL)]
BYTES: list[Piece] = [(f"<0x{byte:02X}>", 0, BYTE) for byte in range(256)]
RULES = {
    "A": "a",
    "é": "e",
    "日日": " ",
    "日": "x  y",
    "\t": " ",
    "b\t": "",
    "\x01": "",
    "aa": "ab",
}


def word(draw: random.Random, letters: str, most: int) -> str:
    return "".join(draw.choices(letters, k=draw.randrange(1, most)))


def drawn(draw: random.Random) -> tuple[bytes, list[str]]:
    """A model of random pieces and settings, and texts for it."""
    fallback = draw.randrange(2)
    pieces = {
        word(draw, LETTERS, 5): draw.choice([-1.0, -2.0, -7.25, 0.5, 10.5]) for _ in range(20)
    }
    kinds = [NORMAL, NORMAL, NORMAL, UNUSED, USER]
    rows = [*PLAIN, *(BYTES if fallback else [])]
    rows += [(piece, score, draw.choice(kinds)) for piece, score in pieces.items()] + [("▁", -3, 1)]
    rows = list({row[0]: row for row in reversed(rows)}.values())[::-1]
    rules = made.character_map(RULES) if draw.randrange(3) else b""
    data = made.model(
        rows,
        {24: draw.randrange(2), 35: fallback} | ({44: "??"} if draw.randrange(2) else {}),
        {2: rules, 3: draw.randrange(2), 4: draw.randrange(2), 5: draw.randrange(5) > 0},
    )
    letters = LETTERS + " A\t\x01z🐈\0"
    return data, ["", " ", "  ", "\x01", "\t ", *(word(draw, letters, 20) for _ in range(40))]


@pytest.mark.parametrize("seed", range(80))
def test_every_setting_is_the_reference_s(seed: int) -> None:
    from sentencepiece import SentencePieceProcessor

    draw = random.Random(seed)
    data, texts = drawn(draw)
    ours, theirs = Unigram.from_bytes(data), SentencePieceProcessor(model_proto=data)
    names = (ours.unk, ours.bos, ours.eos, ours.pad, ours.vocabulary)
    assert names == (
        theirs.unk_id(),
        theirs.bos_id(),
        theirs.eos_id(),
        theirs.pad_id(),
        theirs.vocab_size(),
    )
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        some = [*ids[:5], *draw.choices(range(ours.vocabulary), k=6)]
        for shown in (ids, some):
            assert ours.decode(shown) == theirs.decode(shown)


def test_names_of_special_pieces_are_the_file_s() -> None:
    rows: list[Piece] = [
        ("?", 0, UNKNOWN),
        ("<b>", 0, CONTROL),
        ("a", -1, NORMAL),
        ("p", 0, CONTROL),
    ]
    found = Unigram.from_bytes(made.model(rows, {45: "?", 46: "<b>", 47: "a", 48: "p"}))
    assert (found.unk, found.bos, found.eos, found.pad) == (0, 1, -1, 3)


def test_a_message_may_come_in_parts_and_with_more_than_is_known() -> None:
    rows = [*PLAIN, ("▁", -1.0, NORMAL), ("a", -1.0, NORMAL)]
    data = made.model(rows) + made.field(3, made.field(3, 0)) + made.field(99, 1.5)
    data += made.varint(98 << 3 | 1) + bytes(8) + made.field(3, made.field(4, 0))
    assert Unigram.from_bytes(made.model(rows)).encode(" a ") == [3, 4]
    assert Unigram.from_bytes(data).encode(" a ") == [3, 4, 3]


A: Piece = ("a", -1.0, NORMAL)
WRONG: dict[str, bytes] = {
    "of kind 2; allowed: 1": made.model([*PLAIN, A], {3: 2}),
    "denormalizer": made.model([*PLAIN, A]) + made.field(5, made.field(2, b"abc")),
    "2 unknown pieces": made.model([*PLAIN, ("u", 0, UNKNOWN), A]),
    "0 unknown pieces": made.model([A]),
    "no piece is one": made.model(PLAIN),
    "spelled alike": made.model([*PLAIN, A, A]),
    "must have letters": made.model([*PLAIN, ("", 0, NORMAL)]),
    "no U+0000": made.model([*PLAIN, ("a\0", 0, NORMAL)]),
    "score nan": made.model([*PLAIN, ("a", float("nan"), NORMAL)]),
    "score inf": made.model([*PLAIN, ("a", float("inf"), NORMAL)]),
    "kind 7": made.model([*PLAIN, ("a", 0, 7)]),
    "kind 18446744073709551615": made.model([*PLAIN, ("a", 0, -1)]),
    "not 256": made.model([*PLAIN, A], {35: 1}),
    "without use": made.model([*PLAIN, A, *BYTES]),
    "1001 letters long": made.model([*PLAIN, ("a" * 1001, 0, NORMAL)]),
    "utf-8": made.field(1, made.field(1, b"\xff") + made.field(3, NORMAL)),
    "field 1 of type 0": made.field(1, 5),
    "field 2 of type 2": made.field(1, made.field(2, b"abcd")),
    "field 3 of type 5": made.model([A], {}, {}) + made.field(3, 1.0),
    "field 5 of type 3": made.varint(5 << 3 | 3),
    "field 0 of type 2": made.varint(2) + b"\0",
    "field 1: more than 1000000 of them": b"\x0a\0" * 1_000_001,
    "has no pieces": made.field(7, b"abc"),
    "more than ten bytes": b"\x80" * 11,
    "a number without an end": b"\x0a\xff",
    "a field of 8 bytes where 2 are": b"\x49ab",
    "a field of 9223372036854775807 bytes where 0 are": b"\x0a" + made.varint((1 << 63) - 1),
    "a character map of 3 bytes": made.model([*PLAIN, A], {}, {2: b"abc"}),
}


@pytest.mark.parametrize("complaint", WRONG)
def test_what_is_wrong_is_said_in_a_line(complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        Unigram.from_bytes(WRONG[complaint])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def survived(data: bytes, texts: Any) -> bool:
    """Whether a file is read; then every text has ids."""
    try:
        found = Unigram.from_bytes(data)
    except ValueError as error:
        assert "\n" not in str(error)
        return False
    for text in texts:
        assert found.decode(found.encode(text)) is not None
    return True


def test_cut_and_flipped_files_neither_crash_nor_hang() -> None:
    draw = random.Random(0)
    rows = [*PLAIN, A, ("▁", -1.0, NORMAL), ("ab", -2.0, USER), ("日", -2.0, UNUSED)]
    data = made.model(rows, {44: "?", 3: 1}, {2: made.character_map({"A": "a"}), 3: 1})
    short = made.model(rows, {44: "?", 3: 1}, {3: 1})
    texts = ["aAb 日\0z", "ab" * 50]
    cut = sum(survived(data[:k], texts) for k in [*range(len(short)), len(data) - 1])
    assert 0 < cut < len(short)
    for _ in range(800):
        flipped = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            flipped[draw.randrange(len(short))] = draw.randrange(256)
        survived(bytes(flipped), texts)


def test_scores_of_any_size_are_survived() -> None:
    huge = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]
    rows: list[Piece] = [*PLAIN, ("▁", huge, NORMAL), ("a", -huge, NORMAL), ("ab", huge, NORMAL)]
    for extra in ([], [("b", -huge, NORMAL)], [("aa", 0, USER)]):
        found = Unigram.from_bytes(made.model([*rows, *extra]))
        assert found.decode(found.encode("ab a aab zz " * 20))
    only = Unigram.from_bytes(made.model([*PLAIN, ("ab", 0, USER)]))
    assert only.encode("abz")[-1] == only.unk
