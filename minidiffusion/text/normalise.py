"""A text is normalised by the map of characters in the tokenizer's own file.

The map is a double-array trie (Aoe 1989) of UTF-8 strings in the layout of darts-clone, and a pool
of what they become: NFKC of some year, with what the model's makers added. SentencePiece applies it
to the longest match at every place; `tokenizers` applies the *shortest* match to a whole grapheme
of less than six bytes, so that marks of it may be lost, and to single characters elsewhere.
"""

import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from minidiffusion.text.words import ASSETS, inside

LARGEST_MAP = 1 << 20
"""Bytes of a character map; SentencePiece's own have 240,000."""
LONGEST_RULE = 64
"""Bytes of a string that a rule may be for."""
LONGEST_RESULT = 255
"""Bytes that a string may become; in NFKC 33."""
LABEL, LEAF, HAS_LEAF, FAR, VALUE = 0x800000FF, 1 << 31, 1 << 8, 1 << 9, (1 << 31) - 1
SHORT = 6
"""Bytes from which on a grapheme is taken apart."""


class CharacterMap(NamedTuple):
    """units: the double array, checked, of which every walk ends. pool: strings that end with 0."""

    units: Sequence[int]
    pool: bytes


NO_RULES = CharacterMap((1 << 10, *[LEAF] * 255), b"\0")


def offset(unit: int) -> int:
    return (unit >> 10) << ((unit & FAR) >> 6)


def read_map(blob: bytes) -> CharacterMap:
    """The map as files hold it: the size of the trie in four bytes, the trie, the pool.

    Raises ValueError for one that is cut short, leads out of itself, loops, or is out of bounds.
    """
    size = int.from_bytes(blob[:4], "little")
    if len(blob) > LARGEST_MAP:
        raise ValueError(f"a character map of {len(blob)} bytes; allowed: {LARGEST_MAP}")
    if size < 1024 or size % 1024 or size > len(blob) - 5:
        raise ValueError(f"a character map of {len(blob)} bytes cannot have a trie of {size}")
    found = CharacterMap(struct.unpack(f"<{size // 4}I", blob[4 : 4 + size]), blob[4 + size :])
    try:
        found.pool.decode()
    except UnicodeDecodeError:
        raise ValueError("the strings of the character map are not UTF-8") from None
    if found.pool[-1]:
        raise ValueError("the last string of the character map does not end")
    check_walks(found)
    return found


def check_walks(found: CharacterMap) -> None:
    """Every walk through the trie stays in it, ends soon, and finds strings of the pool."""
    units, ways = found.units, defaultdict(list)
    for place, unit in enumerate(units):
        if unit & LABEL < LEAF:
            ways[place ^ unit & LABEL].append(place)
    level, seen = {0}, {0}
    for _ in range(LONGEST_RULE + 1):
        bases = {place ^ offset(units[place]) for place in level}
        if any(base >= len(units) for base in bases):
            raise ValueError("the trie of the character map leads out of itself")
        level = {place for base in bases for place in ways.get(base, ())}
        seen |= level
        if not level:
            break
    else:
        raise ValueError(f"a rule of the character map loops, or is beyond {LONGEST_RULE} bytes")
    for place in seen:
        if units[place] & HAS_LEAF:
            check_leaf(units[place ^ offset(units[place])], found.pool)


def check_leaf(leaf: int, pool: bytes) -> None:
    value = leaf & VALUE
    # A string starts where a character does.
    if not leaf & LEAF or value >= len(pool) or pool[value] & 0xC0 == 0x80:
        raise ValueError("a rule of the character map has no result")
    if pool.find(0, value, value + LONGEST_RESULT + 1) < 0:
        raise ValueError(f"a result of the character map is beyond {LONGEST_RESULT} bytes")


class Spared(NamedTuple):
    """What no rule touches; and, by its first byte, every length that it has, the longest first."""

    symbols: frozenset[bytes]
    lengths: Mapping[int, Sequence[int]]


def spare(symbols: Iterable[str]) -> Spared:
    known = frozenset(symbol.encode() for symbol in symbols)
    lengths: defaultdict[int, set[int]] = defaultdict(set)
    for symbol in known:
        lengths[symbol[0]].add(len(symbol))
    ordered = {first: sorted(few, reverse=True) for first, few in lengths.items()}
    return Spared(known, ordered)


def by_longest(data: bytes, rules: CharacterMap | None, spared: Spared) -> Iterator[bytes]:
    """What the parts of a text in UTF-8 become, one after the other, as in SentencePiece."""
    units, pool = rules or NO_RULES
    root, place, size = offset(units[0]), 0, len(data)
    while place < size:
        first = data[place]
        end, part = place + 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0), None
        for length in spared.lengths.get(first, ()):
            if data[place : place + length] in spared.symbols:
                end, part = place + length, data[place : place + length]
                break
        else:
            base = root
            for there in range(place, size):
                here = base ^ data[there]
                if (unit := units[here]) & LABEL != data[there]:
                    break
                base = here ^ (unit >> 10) << ((unit & FAR) >> 6)
                if unit & HAS_LEAF:
                    end, value = there + 1, units[base] & VALUE
                    part = pool[value : pool.index(0, value)]
        yield data[place:end] if part is None else part
        place = end


def by_shortest(parts: Iterable[str], rules: CharacterMap) -> dict[str, str]:
    """What parts become by the shortest rule for the start of each, where there is one."""
    units, pool = rules
    root, found = offset(units[0]), {}
    for part in parts:
        base = root
        for byte in part.encode():
            here = base ^ byte
            if (unit := units[here]) & LABEL != byte:
                break
            base = here ^ (unit >> 10) << ((unit & FAR) >> 6)
            if unit & HAS_LEAF:
                value = units[base] & VALUE
                found[part] = pool[value : pool.index(0, value)].decode()
                break
    return found


def by_grapheme(text: str, rules: CharacterMap) -> str:
    """A text as `tokenizers` normalises it."""
    letters = set(text)
    found = {letter: letter for letter in letters} | by_shortest(letters, rules)
    if not graphemes().joins.search(text):
        return "".join([found[letter] for letter in text])
    parts = graphemes().one.findall(text)
    several = {part for part in parts if len(part) > 1}
    found |= {part: "".join([found[letter] for letter in part]) for part in several}
    found |= by_shortest([part for part in several if len(part.encode()) < SHORT], rules)
    return "".join([found[part] for part in parts])


class Graphemes(NamedTuple):
    """joins: a sign that a text has graphemes of more than a character. one: a grapheme."""

    joins: re.Pattern[str]
    one: re.Pattern[str]


@cache
def graphemes() -> Graphemes:
    """Extended grapheme clusters (Unicode Standard Annex 29) as `tokenizers` 0.23 cuts them.

    Left out are pairs of regional indicators: whether they hold together or not, they and what
    follows them are six bytes or more.
    """
    rows: defaultdict[str, list[str]] = defaultdict(list)
    for line in (ASSETS.parent / "t5" / "graphemes.txt").read_text("ascii").splitlines():
        name, *items = line.split()
        rows[name] += items
    has = {name: inside(items) for name, items in rows.items()}
    control, pict, consonant, linker = (has[n] for n in ("control", "pict", "consonant", "linker"))
    extend, joined = f"{has['extend']}\u200d", f"{has['extend']}{has['spacing']}\u200d"
    lead, vowel, tail = (
        "\u1100-\u115f\ua960-\ua97c",
        "\u1160-\u11a7\ud7b0-\ud7c6",
        "\u11a8-\u11ff\ud7cb-\ud7fb",
    )
    open_syllable = "".join(map(chr, range(0xAC00, 0xD7A4, 28)))
    cores = [
        f"[{lead}]*(?:[{open_syllable}{vowel}][{vowel}]*|[\uac00-\ud7a3])[{tail}]*",
        f"[{lead}]+|[{tail}]+",
        f"[{pict}](?:[{has['extend']}]*+\u200d[{pict}])*",
        # Consonants hold together where one of the signs between them links; U+200C parts them.
        f"[{consonant}](?:(?=(?:(?![{linker}])[{extend}])*+[{linker}])"
        f"(?:(?!\u200c)[{extend}{linker}])++[{consonant}])*",
        f"[^{control}]",
    ]
    return Graphemes(
        re.compile(f"[{joined}{has['prepend']}]|\r\n"),
        re.compile(f"\r\n|[{control}]|[{has['prepend']}]*(?:{'|'.join(cores)})[{joined}]*+"),
    )
