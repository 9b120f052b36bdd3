"""Has a picture the colour that its caption names?

A pixel bears the name of the nearest of a few examples, in a space where distances are those that
are seen. White is not asked for: the background is made of it.
"""

import re
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minidiffusion.shapes import Image

EXAMPLES = {
    "red": ("f8312f", "ca1f3d"), "orange": ("ff822d", "ff9900", "e06a2c"),
    "yellow": ("fcd53f", "f5b93a"), "green": ("00b84f", "5fb030", "3f8f3f", "8fd94a"),
    "blue": ("0074ba", "2f7ff0", "26b8f0", "8fcdfa", "3050c0"),
    "purple": ("8d65c5", "9b30b0", "7a3ff5", "b78ff0"), "pink": ("ff5fb0", "ff9bc5", "f7b0d8"),
    "brown": ("6d4534", "9a6248", "7f5340"), "black": ("000000", "2f2d36", "45434d"),
    "grey": ("9a9a9a", "7a7a80", "c4c4c8"),
}  # fmt: skip
"""Hexadecimal red, green and blue of what people call by the name."""
COLOURS = tuple(EXAMPLES)
NAMED = re.compile(rf"(?:an? )?(?:(?:hollow|large|small|light) )?({'|'.join(COLOURS)}) \w")
FROM_WHITE = 0.12
"""A pixel whose channels, from 0 to 1, are all nearer to white belongs to the background."""


def named(caption: str) -> str | None:
    """The colour of what the caption is of; None where it names none, or that of a part."""
    found = NAMED.match(caption)
    return found[1] if found and "button" not in caption else None


def oklab(x: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
    """From sRGB in [0, 1] to Ottosson's space (2020): lightness, green to red, blue to yellow."""
    linear = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    cones = x.new_tensor([
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ])  # fmt: skip
    mixed = x.new_tensor([
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ])  # fmt: skip
    return (linear @ cones.T).clamp(min=0) ** (1 / 3) @ mixed.T


def dominant(pictures: Image) -> list[str | None]:
    """The name that most pixels beside the background bear; None for an empty picture."""
    return [_dominant((picture.clamp(-1, 1).flatten(1).T + 1) / 2) for picture in pictures]


def _dominant(pixels: Float[Tensor, "n 3"]) -> str | None:
    pixels = pixels[(pixels < 1 - FROM_WHITE).any(dim=1)]
    if not len(pixels):
        return None
    owners = torch.tensor([i for i, shown in enumerate(EXAMPLES.values()) for _ in shown])
    shown = [int(one, 16).to_bytes(3, "big") for some in EXAMPLES.values() for one in some]
    examples = torch.tensor([[*one] for one in shown]).to(pixels) / 255
    nearest = torch.cdist(oklab(pixels), oklab(examples)).argmin(dim=1).cpu()
    return COLOURS[int(owners[nearest].bincount().argmax())]


def coloured(pictures: Image, captions: Sequence[str]) -> Bool[Tensor, " named"]:
    """Of every picture whose caption names a colour, whether it is the dominant one."""
    asked = [(i, name) for i, one in enumerate(captions) if (name := named(one))]
    seen = dominant(pictures[[i for i, _ in asked]])
    return torch.tensor(
        [had == name for had, (_, name) in zip(seen, asked, strict=True)], dtype=torch.bool
    )
