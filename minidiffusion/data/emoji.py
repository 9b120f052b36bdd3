"""Emoji in three styles, 64 x 64 pixels on white, each with captions: what our own model learns.

Held out are whole concepts in all styles, and single styles of concepts that are known in others:
what a model makes of both is not what it has seen.
"""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from minidiffusion.data.dataset import Tensors
from minidiffusion.data.sheets import cut

PACK = Path(__file__).parents[1] / "assets" / "emoji" / "emoji.zip"
SIDE = 64
Split = Literal["train", "combination", "concept", "all"]
Style = Literal["3d", "flat", "noto"]
STYLES: tuple[Style, ...] = ("3d", "flat", "noto")


class Pair(NamedTuple):
    """What is known of a picture. concept: the emoji's code, the same in every style and skin tone.

    label, tags, group: Unicode's (CLDR). tone: of a skin tone, or of two. split: train,
    combination (this concept is not trained in this style) or concept (nor in any other).
    """

    concept: str
    style: Style
    label: str
    tags: list[str]
    group: str
    tone: bool
    split: Split

    def captions(self) -> tuple[str, ...]:
        """From short to long; the first names all that decides the picture."""
        name, style = self.label, f"{self.style} style"
        longer = ", ".join([name, style, *(tag for tag in self.tags if tag != name)])
        return f"{name}, {style}", f"{article(name)}{name}, {style}", longer, article(name) + name


def article(label: str) -> str:
    """The article that a label goes with: none for proper names, lists and plurals."""
    first, last = label[0], label.split()[-1]
    plural = last.endswith("s") and not last.endswith(("ss", "us"))
    if plural or ":" in label or not first.islower():
        return ""
    return "an " if first in "aeio" else "a "


@dataclass(frozen=True)
class Emoji:
    """``split``: what to open. ``styles``: which. ``tones``: the skin tones, too. ``captions``: all
    gives each picture once with every caption of it, short once with the shortest."""

    name: ClassVar[str] = "emoji"
    split: Split = "train"
    styles: tuple[Style, ...] = STYLES
    tones: bool = False
    captions: Literal["all", "short"] = "all"
    limit: int | None = field(default=None, metadata={"min": 1})

    def open(self) -> Tensors:
        rows, pairs = zip(*self._wanted(), strict=True)
        every = zip(*(pair.captions() for pair in pairs), strict=True)
        kept = [*every][: None if self.captions == "all" else 1]
        pixels = _pixels(self.tones)[torch.tensor(rows)]
        return Tensors(pixels, captions=tuple(chain(*kept)))

    def pairs(self) -> list[Pair]:
        """Of each picture, in order."""
        return [pair for _, pair in self._wanted()]

    def _wanted(self) -> list[tuple[int, Pair]]:
        found = [
            (row, pair) for row, pair in enumerate(_pairs())
            if self.split in (pair.split, "all") and pair.style in self.styles
            and (self.tones or not pair.tone)
        ]  # fmt: skip
        if not found:
            raise ValueError(f"styles {list(self.styles)}: choose from {', '.join(STYLES)}")
        return found[: self.limit]


@cache
def _pairs() -> tuple[Pair, ...]:
    with zipfile.ZipFile(PACK) as pack:
        return tuple(Pair(**json.loads(line)) for line in pack.read("pairs.jsonl").splitlines())


def _sheets(tones: bool) -> Iterator[UInt8[Tensor, "n 3 h w"]]:
    """In order, as far as they are wanted: skin tones come last."""
    count = sum(tones or not pair.tone for pair in _pairs())
    with zipfile.ZipFile(PACK) as pack:
        for name in sorted(one for one in pack.namelist() if one.endswith(".avif")):
            if count > 0:
                sheet = cut(pack.read(name), SIDE, f"{PACK}: {name}")
                yield sheet
                count -= len(sheet)


@cache
def _pixels(tones: bool) -> UInt8[Tensor, "n 3 h w"]:
    return torch.cat([*_sheets(tones)])
