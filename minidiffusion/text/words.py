"""A text becomes the words that byte-pair encoding merges within: cleaned, lowered, cut apart.

``clip`` does it as transformers' CLIPTokenizer does, the reference of Stable Diffusion, with the
Unicode tables of its libraries instead of Python's own; ``openai`` as CLIP's authors did.
"""

import html
import re
import unicodedata
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

Dialect = Literal["clip", "openai"]
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SPECIAL = re.compile(f"({re.escape(BOS)}|{re.escape(EOS)})")
ASSETS = Path(__file__).parents[1] / "assets" / "clip"


class Tables(NamedTuple):
    """clip, openai: the words of a clean text. lower: what Python's lower() may do otherwise.

    inert: characters that the reference's normalisation is too old to know.
    """

    clip: re.Pattern[str]
    openai: re.Pattern[str]
    lower: dict[int, int]
    inert: re.Pattern[str]


@cache
def tables() -> Tables:
    rows: defaultdict[str, list[str]] = defaultdict(list)
    for line in (ASSETS / "unicode.txt").read_text("ascii").splitlines():
        name, *items = line.split()
        rows[name] += items
    sets = {name: inside(rows[name]) for name in ("letter", "number", "space", "inert")}
    letter, number, space = sets["letter"], sets["number"], sets["space"]
    first = f"{SPECIAL.pattern[1:-1]}|'(?:"
    rest = f"re|ve|ll|[tmd])|[{letter}]+|[{number}]|[^{space}{letter}{number}]+"
    pairs = (item.split(":") for item in rows["lower"])
    return Tables(
        re.compile(f"{first}s|{rest}"),
        # The original ignores case although it has lowered the text: a long s is still an s.
        re.compile(f"{first}[sſ]|{rest}"),
        # Python's lower() knows the last sigma of a word, the reference goes letter by letter.
        {int(upper, 16): int(lower, 16) for upper, lower in pairs} | {ord("Σ"): ord("σ")},
        re.compile(f"[{sets['inert']}]|[^{sets['inert']}]+"),
    )


def inside(items: list[str]) -> str:
    """Code points such as 41-5a, as what stands in a regular expression's brackets."""
    ranges = (item.partition("-") for item in items)
    return "".join(f"\\U{first:0>8}-\\U{last or first:0>8}" for first, _, last in ranges)


def words(text: str, dialect: Dialect) -> list[str]:
    """The words of a text, in lower case; what separated them is gone."""
    if dialect == "openai":
        return tables().openai.findall(plainer(text).lower())
    if not text.isascii():
        text = composed(text).translate(tables().lower)
    return tables().clip.findall(text.lower())


def composed(text: str) -> str:
    """The text in the normal form C of the reference, to which inert characters stand alone."""
    parts = tables().inert.findall(text)
    return "".join(unicodedata.normalize("NFC", part) for part in parts)


def plainer(text: str) -> str:
    """A text as the ``openai`` dialect cleans it.

    HTML is unescaped twice. Of the repairs that ftfy makes there, these are made: straight quotes,
    ligatures apart, usual widths, no control characters, NFC; neither wrongly decoded text
    ("schÃ¶n") nor colours of a terminal are repaired.
    """
    text = html.unescape(html.unescape(text)).translate(repairs())
    return " ".join(unicodedata.normalize("NFC", text).split())


@cache
def repairs() -> dict[int, str]:
    bare = [*range(9), 0xB, *range(0xE, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF]
    apart = [0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07)]
    wide = [0x3000, *range(0xFF01, 0xFFF0)]
    return (
        dict.fromkeys([*bare, *range(0xFFF9, 0xFFFD)], "")
        | {code: bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(128, 160)}
        | {code: unicodedata.normalize("NFKC", chr(code)) for code in apart + wide}
        | {0x149: "'n", 0xFB05: "ſt"}
        | dict.fromkeys([0x2BC, 0x82, 0x91, 0x92, *range(0x2018, 0x201C)], "'")
        | dict.fromkeys([0x84, 0x93, 0x94, *range(0x201C, 0x2020)], '"')
    )
