"""Maps of characters: as sentencepiece and tokenizers apply them, and files that are damaged."""

import random
import struct
from pathlib import Path

import pytest
import sentencepieces as made

from minidiffusion.text.normalise import (
    LARGEST_MAP,
    by_grapheme,
    by_longest,
    by_shortest,
    graphemes,
    read_map,
    spare,
)

ACCENT, ZWJ, KA, VIRAMA, SIGN = "\u0302\u200d\u0915\u094d\u2122"
CODES = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
LINES = {
    "joined": ("a", "a{}"),
    "pict": (SIGN, "{}" + ZWJ + SIGN + ACCENT),
    "extend": (SIGN, SIGN + "{}" + ZWJ + SIGN + ACCENT),
    "prepend": ("a", "{}a" + ACCENT),
    "linker": (KA, KA + "{}" + KA + ACCENT),
    "consonant": (KA, "{}" + VIRAMA + KA + ACCENT),
    "control": (ACCENT, "{}" + ACCENT * 2),
}
"""A rule for a letter, and a line that shows by it what a code point does to its neighbours."""


def same(name: str, codes: list[int]) -> bool:
    from tokenizers import normalizers

    letter, line = LINES[name]
    blob = made.character_map({letter: "#"})
    # A line feed stands apart from all but a carriage return.
    text = "\n".join(line.format(chr(code)) for code in codes if code != ord("\r"))
    return by_grapheme(text, read_map(blob)) == normalizers.Precompiled(blob).normalize_str(text)


@pytest.mark.parametrize("name", LINES)
def test_every_assigned_code_point_joins_as_in_the_reference(name: str) -> None:
    assert same(name, [code for code in CODES if code < 0x20000 or 0 <= code - 0xE0000 < 0x200])


@pytest.mark.long
@pytest.mark.parametrize("name", LINES)
def test_every_code_point_joins_as_in_the_reference(name: str) -> None:
    assert all(same(name, CODES[k : k + 8192]) for k in range(0, len(CODES), 8192))


BLOCKS = [(0x300, 0x370), (0x41, 0x5B), (0x900, 0xE00), (0x1100, 0x1200), (0x600, 0x610)]
BLOCKS += [(0x200B, 0x2010), (0x2100, 0x2150), (0xAC00, 0xAC40), (0xA0, 0xFF), (0xA, 0xE)]
BLOCKS += [(0x1F1E6, 0x1F200), (0x1F300, 0x1F600), (0x20D0, 0x20F0), (0, 0x20), (0x110B0, 0x110D0)]


def characters(draw: random.Random, count: int) -> str:
    few = [*draw.sample(BLOCKS, 3), BLOCKS[0]]
    return "".join(chr(draw.randrange(*draw.choice(few))) for _ in range(count))


@pytest.mark.parametrize("seed", range(30))
def test_random_maps_are_applied_as_by_the_reference(seed: int) -> None:
    from tokenizers import normalizers

    draw = random.Random(seed)
    texts = [characters(draw, draw.randrange(1, 9)) for _ in range(60)]
    starts = ["".join(text[: draw.randrange(1, 4)]) for text in texts]
    keys = {start for start in starts if "\0" not in start}
    rules = {
        key: draw.choice(["", " ", "x", "日本", characters(draw, 2).replace("\0", "")])
        for key in sorted(keys)
    }
    blob = made.character_map(rules)
    found, theirs = read_map(blob), normalizers.Precompiled(blob)
    assert by_shortest(rules, found).keys() == keys
    for _ in range(40):
        text = "".join(draw.choices(texts, k=3))
        assert by_grapheme(text, found) == theirs.normalize_str(text)


CLUSTERS = [
    "\u0600\x01",
    "\u0600\n",
    "\u0600\u0302",
    "\u0600\u0600a",
    "\r\n",
    "\n\r",
    "\n\u0302\u0302",
]
CLUSTERS += ["\u1100\u1161\u0302", "\uac00\u11a8\u0302", "\uac01\u1161\u0302", "\u11a8\u11a8\u0302"]
CLUSTERS += [
    "क\u094d\u200cक\u0302",
    "क\u200d\u094dक\u0302",
    "©\u0302\u200d©\u0302",
    "©\u200d\u0302©\u0302",
]


@pytest.mark.parametrize("text", CLUSTERS)
def test_a_grapheme_that_is_short_loses_what_follows_its_first_rule(text: str) -> None:
    from tokenizers import normalizers

    for letter in set(text):
        blob = made.character_map({letter: "#"})
        theirs = normalizers.Precompiled(blob).normalize_str(text)
        assert by_grapheme(text, read_map(blob)) == theirs


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_rule_counts_and_what_is_spared_stays(seed: int) -> None:
    draw = random.Random(seed)

    def word(most: int) -> str:
        return "".join(draw.choices("abé日", k=draw.randrange(1, most)))

    rules = {word(4): word(4) if draw.randrange(3) else "" for _ in range(8)}
    symbols = [word(4) for _ in range(draw.randrange(4))]
    found = read_map(made.character_map(rules))
    for text in (word(20) for _ in range(30)):
        normal, place = "", 0
        while place < len(text):
            rest = text[place:]
            here = max(filter(rest.startswith, symbols), key=len, default="")
            rule = max(filter(rest.startswith, rules), key=len, default="")
            normal += here or (rules[rule] if rule else rest[0])
            place += len(here or rule or rest[0])
        assert b"".join(by_longest(text.encode(), found, spare(symbols))).decode() == normal
        plain = b"".join(by_longest(f"{text}\0\0".encode(), None, spare([])))
        assert plain.decode() == f"{text}\0\0"


def test_graphemes_are_cut_in_linear_time() -> None:
    for text in ["\u0600" * 10**5, KA + VIRAMA * 10**5, "©" + "\u0301" * 10**5, "\u1100" * 10**5]:
        assert len(graphemes().one.findall(text + "\n")) == 2


UNITS = [1 << 10, *[made.FREE] * 255]
DAMAGED = {
    "of 0 bytes": b"",
    "of 3 bytes": b"abc",
    "trie of 4294967295": b"\xff" * 2000,
    "trie of 1000": struct.pack("<I", 1000) + bytes(2000),
    "cannot have a trie of 1024": struct.pack("<I", 1024) + bytes(1024),
    "does not end": made.packed_map(UNITS, b"a"),
    "not UTF-8": made.packed_map(UNITS, b"\xff\0"),
    "leads out of itself": made.packed_map([300 << 10, *UNITS[1:]], b"\0"),
    "loops": made.packed_map([1 << 10, *UNITS[1:96], (1 ^ 96) << 10 | 97, *UNITS[97:]], b"\0"),
    "has no result": made.packed_map([*UNITS[:96], 97 | 1 << 8, *UNITS[97:]], b"\0"),
    "beyond 255": made.packed_map([1 << 10 | 1 << 8, *UNITS[1:]], b"a" * 256 + b"\0"),
    f"allowed: {LARGEST_MAP}": bytes(LARGEST_MAP + 1),
}


@pytest.mark.parametrize("complaint", DAMAGED)
def test_damaged_maps_are_refused_in_a_line(complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        read_map(DAMAGED[complaint])
    assert "\n" not in str(caught.value)


def test_a_rule_of_a_string_is_of_64_bytes() -> None:
    assert read_map(made.character_map({"a" * 64: "b"}))
    with pytest.raises(ValueError, match="beyond 64 bytes"):
        read_map(made.character_map({"a" * 65: "b"}))


def test_flipped_bits_neither_crash_nor_hang() -> None:
    draw, blob = random.Random(0), made.character_map({"a": "b", "ab": "é", "é": "", "日本": "x"})
    kept = 0
    for _ in range(600):
        data = bytearray(blob)
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(4, len(data))] ^= 1 << draw.randrange(8)
        try:
            rules = read_map(bytes(data))
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        kept += 1
        list(by_longest("ab\0é日本z".encode() * 20, rules, spare([])))
        by_grapheme("ab\0é日本z" * 20, rules)
    assert 0 < kept < 600


def test_the_table_s_own_folder_says_where_it_is_from() -> None:
    import minidiffusion

    folder = Path(minidiffusion.__file__).parent / "assets" / "t5"
    names = {path.name for path in folder.iterdir()}
    assert names == {"LICENSE", "README.md", "graphemes.txt", "tokenizer.json.xz"}
    text = (folder / "README.md").read_text()
    assert all(f"`{name}`" in text for name in ("graphemes.txt", "tokenizer.json.xz"))
