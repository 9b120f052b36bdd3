"""Pictures in files and tensors: the only place that knows PIL.

What a file holds is decided by its content, never by its name, and every defect is a BadPicture
with one line of reason, so that a bad picture costs one picture.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from uuid import uuid4

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import (
    Image,
    ImageDraw,
    ImageFile,
    ImageFont,
    ImageOps,
    PngImagePlugin,
    UnidentifiedImageError,
)
from torch import Tensor

from minidiffusion.data.dataset import as_floats
from minidiffusion.shapes import Image as Images
from minidiffusion.shapes import Pixels

Fit = Literal["crop", "pad", "resize"]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # none starts a program, as EPS does
MOST_PIXELS = 16 * 2**20
MOST_ASPECT = 32
MODES = {1: "L", 3: "RGB"}


class BadPicture(ValueError):  # noqa: N818
    """A picture that cannot be used; ``reason`` says why, the message names the file as well."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


def load_picture(
    path: str | Path, *, channels: int, size: int, fit: Fit = "crop"
) -> Float[Tensor, "c h w"]:
    """A picture of size x size in [-1, 1]. A path that cannot be opened stays an OSError."""
    return as_floats(load_pixels(path, channels=channels, size=size, fit=fit))


def load_pixels(
    path: str | Path, *, channels: int, size: int, fit: Fit = "crop"
) -> UInt8[Tensor, "c h w"]:
    """The same as bytes. crop: fill the square, cut the rest; pad: show all, on white."""
    if channels not in MODES or size < 1 or fit not in ("crop", "pad", "resize"):
        raise ValueError(
            f"channels {channels}, size {size}, fit {fit!r}: 1 or 3, at least 1, crop|pad|resize"
        )
    with Path(path).open("rb") as file:
        try:
            with Image.open(file, formats=FORMATS) as header:
                _check(header)
                header.load()
                picture = _plain(ImageOps.exif_transpose(header)).convert(MODES[channels])
            square = _fitted(picture, size, fit)
        except Exception as error:  # on damaged bytes PIL's decoders raise nearly everything
            raise BadPicture(path, _reason(error, path)) from error
    pixels = torch.from_numpy(np.array(square)).view(size, size, channels)
    return pixels.permute(2, 0, 1).contiguous()


class _RefusedError(Exception):
    """Why a picture that may be whole is not wanted."""


def _check(header: ImageFile.ImageFile) -> None:
    """Look at the header alone: nothing has been decoded yet."""
    width, height = header.size
    if width * height > MOST_PIXELS:
        raise _RefusedError(f"{width} x {height} is above {MOST_PIXELS // 2**20} megapixels")
    if min(width, height) < 2 or max(width, height) > MOST_ASPECT * min(width, height):
        raise _RefusedError(f"{width} x {height} is too thin (1 : {MOST_ASPECT} at most)")
    # phones keep a preview as the second picture of a JPEG: that is MPO, and its first one counts
    if header.format != "MPO" and getattr(header, "n_frames", 1) > 1:
        raise _RefusedError("animated or of many pages")


def _plain(picture: Image.Image) -> Image.Image:
    """Any colour mode becomes L or RGB; what is transparent becomes white."""
    if picture.mode.startswith("I"):  # 16 bits; PIL's own conversion would clip at 255
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise _RefusedError("integers of more than 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if picture.mode == "F":
        raise _RefusedError("floating-point values of unknown range")
    if picture.has_transparency_data:
        colours = picture.convert("RGBA")
        white = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    return picture if picture.mode == "L" else picture.convert("RGB")


def _fitted(picture: Image.Image, size: int, fit: Fit) -> Image.Image:
    square, method = (size, size), Image.Resampling.LANCZOS
    if fit == "crop":
        return ImageOps.fit(picture, square, method)
    if fit == "pad":
        return ImageOps.pad(picture, square, method, color="white")
    return picture.resize(square, method)


def _reason(error: Exception, path: str | Path) -> str:
    if isinstance(error, _RefusedError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"above {MOST_PIXELS // 2**20} megapixels"
    if isinstance(error, UnidentifiedImageError):
        if Path(path).stat().st_size == 0:
            return "empty file"
        return f"none of {', '.join(FORMATS)}, or its header is damaged"
    return f"damaged or cut short ({' '.join(str(error).split()) or type(error).__name__})"


def to_pixels(images: Images) -> Pixels:
    """[-1, 1] becomes 0..255, rounded to the nearest and clamped."""
    levels = (images.detach().float() + 1) * 127.5
    return levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def to_pil(images: Images) -> list[Image.Image]:
    if images.shape[1] not in MODES:
        raise ValueError(f"{images.shape[1]} channels: a picture has 1 or 3")
    pixels = to_pixels(images).numpy()
    return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in pixels]


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


def save_png(image: Image.Image, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a PNG with text in its header. The file appears whole or not at all."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder, cannot write {path.name} there")
    texts = PngImagePlugin.PngInfo()
    for key, text in (metadata or {}).items():
        texts.add_text(key, text)
    part = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        image.save(part, "PNG", pnginfo=texts)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts in a PNG's header; the picture itself is not decoded."""
    with Path(path).open("rb") as file:
        try:
            with Image.open(file, formats=("PNG",)) as header:
                return {str(k): v for k, v in header.info.items() if isinstance(v, str)}
        except Exception as error:
            raise BadPicture(path, "no PNG, or its header is damaged") from error
