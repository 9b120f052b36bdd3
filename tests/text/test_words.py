"""The tables are what the reference's libraries say of every code point."""

import random
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from minidiffusion.text.bpe import BPE
from minidiffusion.text.words import composed, tables, words

ALL = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
CLASSES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def test_letters_numbers_and_spaces_are_the_reference_s() -> None:
    text = "".join(ALL)
    split = pre_tokenizers.Split(Regex(CLASSES), "removed", invert=True)
    assert [word for word, _ in split.pre_tokenize_str(text)] == tables().clip.findall(text)


def test_every_character_is_lowered_as_the_reference_does() -> None:
    lower: Callable[[str], str] = normalizers.Lowercase().normalize_str
    text = "".join(ALL)
    assert text.translate(tables().lower).lower() == lower(text)
    assert [one.translate(tables().lower).lower() for one in ALL] == [lower(one) for one in ALL]


def test_every_mark_is_ordered_and_composed_as_the_reference_does() -> None:
    nfc: Callable[[str], str] = normalizers.NFC().normalize_str
    inert = [one for one in ALL if tables().inert.findall(one + "ab") == [one, "ab"]]
    marks = [one for one in ALL if unicodedata.combining(one)]
    assert len(marks) > 900 and len(inert) > 200
    for one in {*marks, *inert}:
        for text in (f"a\u0345{one}", f"a{one}\u0334", f"{one}\u0307", f"a{one}\u0301", one * 2):
            assert composed(text) == nfc(text), ascii(text)


def test_marks_that_are_newer_than_the_reference_keep_their_order(reference: Any) -> None:
    draw = random.Random(0)
    inert = [one for one in ALL if tables().inert.findall(one + "ab") == [one, "ab"]]
    known = ["a", "e", *map(chr, range(0x300, 0x346)), *map(chr, range(0x591, 0x5C0))]
    for _ in range(1500):
        text = "".join(draw.choice(draw.choice([inert, known])) for _ in range(6))
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert BPE().encode(text) == ids


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It's 2026!!", ["it", "'s", "2", "0", "2", "6", "!!"]),
        ("we'LLs 'tis", ["we", "'ll", "s", "'t", "is"]),
        ("a\u0085b\u3000c", ["a", "b", "c"]),
        ("e\u0301", ["é"]),
        (" \t\n", []),
        ("ΑΣ", ["ασ"]),
    ],
)
def test_words(text: str, found: list[str]) -> None:
    assert words(text, "clip") == found
