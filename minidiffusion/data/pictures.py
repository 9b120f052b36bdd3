"""Pictures in files and tensors: with `sheets` the only place that knows PIL.

What a file holds is decided by its content, never by its name, and every defect is a BadPicture
with one line of reason, so that a bad picture costs one picture.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from minidiffusion.data.dataset import as_floats
from minidiffusion.data.parameters import check_texts
from minidiffusion.files import is_endless, whole_file
from minidiffusion.shapes import Image as Images
from minidiffusion.shapes import Pixels

Fit = Literal["crop", "pad", "resize"]
Source = str | Path | BytesIO | Image.Image
Size = int | tuple[int, int] | None
"""A square's side, or (rows, columns), or None: the picture's own size."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # none starts a program, as EPS does
MOST_PIXELS = 16 * 2**20
MOST_ASPECT = 32
LARGEST_SIDE = 2**14
"""Pixels a side that a picture may be made to have."""
MODES = {1: "L", 3: "RGB"}


class BadPicture(ValueError):  # noqa: N818
    """A picture that cannot be used; ``reason`` says why, the message names the file as well."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


def load_picture(
    source: Source, *, channels: int, size: Size, fit: Fit = "crop", multiple: int = 1
) -> Float[Tensor, "c h w"]:
    """A picture in [-1, 1]. A path that cannot be opened stays an OSError."""
    return as_floats(load_pixels(source, channels=channels, size=size, fit=fit, multiple=multiple))


def load_pixels(
    source: Source, *, channels: int, size: Size, fit: Fit = "crop", multiple: int = 1
) -> UInt8[Tensor, "c h w"]:
    """The same as bytes. crop: fill the frame, cut the rest; pad: show all, on white.

    Of its own size a picture is rounded down to multiples of ``multiple``; crop then cuts the rows
    and columns that are too many, and leaves all others as they are.
    """
    if channels not in MODES:
        raise ValueError(f"channels {channels}: a picture has 1 or 3")

    def plain(picture: Image.Image) -> Image.Image:
        return _plain(picture).convert(MODES[channels])

    return _pixels(_loaded(source, plain, size, fit, multiple, "white"))


def load_mask(
    source: Source, *, size: Size, fit: Fit = "crop", multiple: int = 1, alpha: bool = False
) -> Float[Tensor, "1 h w"]:
    """A mask in [0, 1]: 1 (white) is to be painted anew, 0 (black, transparent, pad) is kept.

    With ``alpha`` it is taken from a picture's own transparency: what shows nothing is painted. A
    picture that is opaque everywhere is then a BadPicture.
    """

    def grey(picture: Image.Image) -> Image.Image:
        if not alpha:
            return _plain(picture, "black").convert("L")
        opacity = picture.convert("RGBA").getchannel("A")
        if opacity.getextrema() == (255, 255):
            raise _RefusedError("has no transparent part to take a mask from")
        return ImageOps.invert(opacity)

    return _pixels(_loaded(source, grey, size, fit, multiple, "black")).float() / 255


def load_depth(
    source: Source, *, size: Size, fit: Fit = "crop", multiple: int = 1
) -> Float[Tensor, "1 h w"]:
    """A depth map in [-1, 1], its own least and most, white the nearest, at all its bits (8, 16 or
    floating point); -1 where it is flat, and in a pad."""

    def depth(picture: Image.Image) -> Image.Image:
        deep = picture.mode == "F" or picture.mode.startswith("I")
        values = np.asarray(picture if deep else _plain(picture).convert("L"), dtype=np.float32)
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(high - low):
            raise _RefusedError("depths that are not finite")
        return Image.fromarray((values - low) / max(high - low, 1e-12) * 2 - 1)

    fitted = np.array(_loaded(source, depth, size, fit, multiple, -1))
    return torch.from_numpy(fitted)[None].clamp(-1, 1)


def picture_size(source: Source) -> tuple[int, int]:
    """Rows and columns as it is shown, from the header alone."""
    with _opened(source) as header:
        turned = header.getexif().get(0x0112, 1) > 4
        return header.size if turned else (header.height, header.width)


def _pixels(picture: Image.Image) -> UInt8[Tensor, "c h w"]:
    pixels = torch.from_numpy(np.array(picture)).view(picture.height, picture.width, -1)
    return pixels.permute(2, 0, 1).contiguous()


@contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    """A picture of which the header is checked; a defect found meanwhile is a BadPicture."""
    with ExitStack() as stack:
        if isinstance(source, str | Path):
            file: BinaryIO = stack.enter_context(open_plain(source))
        elif isinstance(source, BytesIO):
            file = source
        try:
            if isinstance(source, Image.Image):
                picture = source
            else:
                picture = stack.enter_context(Image.open(file, formats=FORMATS))
            _check(picture)
            yield picture
        except Exception as error:  # on damaged bytes PIL's decoders raise nearly everything
            name = source if isinstance(source, str | Path) else "a picture of PIL's"
            raise BadPicture(name, _reason(error, source)) from error


def open_plain(path: str | Path) -> BufferedReader:
    """The bytes of a file; a pipe or a device, which may never end, is a BadPicture."""
    if is_endless(Path(path)):
        raise BadPicture(path, "a device or a pipe, not a file")
    return Path(path).open("rb")


def _loaded(
    source: Source, prepare: Callable[[Image.Image], Image.Image], size: Size, fit: Fit,
    multiple: int, ground: str | int,
) -> Image.Image:  # fmt: skip
    sides = size if isinstance(size, tuple) else (1 if size is None else size,)
    if len(sides) > 2 or min(*sides, multiple, 1) < 1 or fit not in ("crop", "pad", "resize"):
        raise ValueError(f"size {size}, multiple {multiple}: at least 1; fit: crop, pad or resize")
    with _opened(source) as header:
        header.load()
        picture = prepare(ImageOps.exif_transpose(header))
        return _fitted(picture, size, fit, multiple, ground)


class _RefusedError(Exception):
    """Why a picture that may be whole is not wanted."""


def _check(header: Image.Image) -> None:
    """Look at the header alone: nothing has been decoded yet."""
    width, height = header.size
    if width * height > MOST_PIXELS:
        raise _RefusedError(f"{width} x {height} is above {MOST_PIXELS // 2**20} megapixels")
    if min(width, height) < 2 or max(width, height) > MOST_ASPECT * min(width, height):
        raise _RefusedError(f"{width} x {height} is too thin (1 : {MOST_ASPECT} at most)")
    if header.format not in (None, "MPO", *FORMATS):
        raise _RefusedError(f"{header.format}: none of {', '.join(FORMATS)}")
    # phones keep a preview as the second picture of a JPEG: that is MPO, and its first one counts
    if header.format != "MPO" and getattr(header, "n_frames", 1) > 1:
        raise _RefusedError("animated or of many pages")


def _plain(picture: Image.Image, ground: str = "white") -> Image.Image:
    """Any colour mode becomes L or RGB; what is transparent shows the ground."""
    if picture.mode.startswith("I"):  # 16 bits; PIL's own conversion would clip at 255
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise _RefusedError("integers of more than 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if picture.mode == "F":
        raise _RefusedError("floating-point values of unknown range")
    if picture.has_transparency_data:
        colours = picture.convert("RGBA")
        below = Image.new("RGBA", colours.size, ground)
        return Image.alpha_composite(below, colours).convert("RGB")
    return picture if picture.mode == "L" else picture.convert("RGB")


def _fitted(
    picture: Image.Image, size: Size, fit: Fit, multiple: int, ground: str | int
) -> Image.Image:
    if size is None:
        columns, rows = (side // multiple * multiple for side in picture.size)
        if min(rows, columns) < 1:
            raise _RefusedError(f"{picture.width} x {picture.height} is smaller than {multiple}")
        if fit == "crop":
            left, top = (picture.width - columns) // 2, (picture.height - rows) // 2
            return picture.crop((left, top, left + columns, top + rows))
    else:
        rows, columns = (size, size) if isinstance(size, int) else size
    frame, method = (columns, rows), Image.Resampling.LANCZOS
    if fit == "crop":
        return ImageOps.fit(picture, frame, method)
    if fit == "pad":
        return ImageOps.pad(picture, frame, method, color=ground)
    return picture.resize(frame, method)


def _reason(error: Exception, source: Source) -> str:
    if isinstance(error, _RefusedError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"above {MOST_PIXELS // 2**20} megapixels"
    if isinstance(error, UnidentifiedImageError):
        if isinstance(source, str | Path) and Path(source).stat().st_size == 0:
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


def png(image: Image.Image, metadata: Mapping[str, str]) -> bytes:
    """A PNG with text in its header. Raises ValueError for text that it cannot hold."""
    check_texts(metadata)
    texts = PngImagePlugin.PngInfo()
    for key, text in metadata.items():
        texts.add_text(key, text)
    written = BytesIO()
    image.save(written, "PNG", pnginfo=texts)
    return written.getvalue()


def save_png(
    image: Image.Image, path: str | Path, metadata: dict[str, str] | None = None, *,
    fresh: bool = False,
) -> None:  # fmt: skip
    """Write a PNG with text in its header. The file appears whole or not at all.

    fresh: FileExistsError where a file of this name is there.
    """
    path = Path(path)
    data = png(image, metadata or {})
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder, cannot write {path.name} there")
    with whole_file(path, sync=False, fresh=fresh) as file:
        file.write(data)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts in a PNG's header; the picture itself is not decoded."""
    with open_plain(path) as file:
        try:
            with Image.open(file, formats=("PNG",)) as header:
                return {str(k): str(v) for k, v in header.info.items() if isinstance(v, str)}
        except Exception as error:
            if "MAX_TEXT" in str(error):
                raise BadPicture(path, "a text in its header is beyond a megabyte") from error
            raise BadPicture(path, "no PNG, or its header is damaged") from error
