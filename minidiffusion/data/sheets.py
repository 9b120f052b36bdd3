"""Sheets of pictures: contact sheets to look at, and sheets that small pictures are kept in."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

from minidiffusion.data.pictures import BadPicture, to_pil
from minidiffusion.shapes import Image as Images

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def cut(sheet: bytes, side: int, name: str) -> UInt8[Tensor, "n 3 h w"]:
    """The square pictures of a sheet, row by row. Raises BadPicture for bytes that are none."""
    if not features.check("avif"):
        raise BadPicture(name, "AVIF, which this Pillow cannot read: pip install 'pillow>=11.3'")
    try:
        with Image.open(io.BytesIO(sheet), formats=("AVIF",)) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    except Exception as error:  # on damaged bytes PIL's decoders raise nearly everything
        raise BadPicture(name, f"damaged ({type(error).__name__})") from error
    rows, columns = (length // side for length in pixels.shape[:2])
    tiles = pixels.view(rows, side, columns, side, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, side, side)


def grid(
    images: Images, columns: int, labels: Sequence[str] | None = None, scale: int = 1
) -> Image.Image:
    """A contact sheet on white. As many labels as columns head the columns; as many labels as
    pictures stand under the pictures."""
    count, _, height, width = images.shape
    if columns < 1 or scale < 1 or (labels is not None and len(labels) not in (columns, count)):
        raise ValueError(
            f"columns {columns} and scale {scale} are at least 1; labels: {columns} or {count}"
        )
    width, height = width * scale, height * scale
    text_size = min(max(width / 7, 9.5), 15)
    font = ImageFont.load_default(text_size)
    captions = [_wrapped(label, font, width) for label in labels or ()]
    lines = max((text.count("\n") + 1 for text in captions), default=0)
    text_height = round(lines * text_size * 1.25)
    heads = len(captions) == columns
    gap = max(2, min(width // 14, 12))
    step_x, step_y = width + gap, height + gap + (0 if heads else text_height)
    top = gap + (text_height if heads else 0)
    size = (gap + step_x * columns, top + step_y * -(-count // columns))
    sheet = Image.new("L" if images.shape[1] == 1 else "RGB", size, "white")
    for i, picture in enumerate(to_pil(images)):
        place = (gap + i % columns * step_x, top + i // columns * step_y)
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), place)
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(captions):
        x = gap + i % columns * step_x + width / 2
        y = gap / 2 if heads else top + i // columns * step_y + height + text_size * 0.15
        draw.multiline_text((x, y), text, "#333333", font, "ma", text_size * 0.15, "center")
    return sheet


def _wrapped(text: str, font: Font, width: int) -> str:
    """Break between words into at most three lines, and end what does not fit with dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > 3:
        lines = [*lines[:2], " ".join(lines[2:])]
    return "\n".join(_shortened(line, font, width) for line in lines)


def _shortened(line: str, font: Font, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line.rstrip() + "..."
