"""Every kind of bad or odd picture, and that pictures survive the way there and back."""

import os
import resource
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin
from rounding import assert_near

from minidiffusion.data.pictures import (
    BadPicture,
    load_depth,
    load_mask,
    load_picture,
    load_pixels,
    picture_size,
    read_metadata,
    save_png,
    to_pil,
    to_pixels,
)

RED, WHITE = (255, 0, 0), (255, 255, 255)


def noise(height: int = 16, width: int = 16, channels: int = 3) -> np.ndarray:
    draw = np.random.default_rng(0)
    return draw.integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(path: Path, picture: Image.Image, **options: object) -> Path:
    picture.save(path, **options)
    return path


def png_of_zeros(path: Path, side: int) -> Path:
    """A black-and-white PNG of side x side, valid to its last byte, made without its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(BadPicture) as caught:
        load_picture(path, channels=3, size=8)
    message = str(caught.value)
    assert message == f"{path}: {caught.value.reason}" and "\n" not in message
    return caught.value.reason


def first_pixel(path: Path, size: int = 8) -> tuple[int, ...]:
    return tuple(load_pixels(path, channels=3, size=size)[:, 0, 0].tolist())


@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_come_back_unchanged(tmp_path: Path, channels: int) -> None:
    array = noise(channels=channels)
    picture = Image.fromarray(array[..., 0] if channels == 1 else array)
    x = load_picture(saved(tmp_path / "a.png", picture), channels=channels, size=16)
    assert x.dtype == torch.float32 and x.shape == (channels, 16, 16)
    assert -1 <= x.min() < -0.9 and 0.9 < x.max() <= 1
    assert np.array_equal(to_pixels(x[None])[0].numpy(), array)


def test_rounding_is_to_the_nearest_and_clamped() -> None:
    values = torch.tensor([-9.0, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 1.0, 9.0])
    expected = [0, 0, 0, 1, 255, 255]
    x = values.view(1, 1, 1, 6)
    assert to_pixels(x).flatten().tolist() == expected
    assert np.asarray(to_pil(x)[0]).ravel().tolist() == expected
    assert to_pil(x)[0].mode == "L" and to_pil(x.expand(2, 3, 1, 6))[1].mode == "RGB"
    with pytest.raises(ValueError, match="4 channels"):
        to_pil(torch.zeros(1, 4, 2, 2))


def test_content_decides_and_not_the_name(tmp_path: Path) -> None:
    png = saved(tmp_path / "a.jpg", Image.new("RGB", (9, 9), RED), format="PNG")
    assert first_pixel(png) == RED
    text = tmp_path / "b.png"
    text.write_text("not a picture at all")
    assert "none of PNG" in refusal(text)


def test_eps_is_never_interpreted(tmp_path: Path) -> None:
    eps = saved(tmp_path / "a.eps", Image.new("RGB", (9, 9), RED)).rename(tmp_path / "a.png")
    assert eps.read_bytes().startswith(b"%!PS")
    assert "none of PNG" in refusal(eps)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff", "gif"])
def test_cut_short_is_bad(tmp_path: Path, kind: str) -> None:
    whole = saved(tmp_path / f"a.{kind}", Image.fromarray(noise(64, 64)))
    assert load_pixels(whole, channels=3, size=8).shape == (3, 8, 8)
    data = whole.read_bytes()
    for share in (0.02, 0.5, 0.9):
        whole.write_bytes(data[: int(len(data) * share)])
        assert refusal(whole)


def test_empty_and_missing(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    assert refusal(tmp_path / "a.png") == "empty file"
    with pytest.raises(FileNotFoundError, match=r"b\.png"):
        load_picture(tmp_path / "b.png", channels=3, size=8)


def test_cmyk(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=100)
    red, green, blue = first_pixel(path)
    assert red > 250 and green < 5 and blue < 5


def test_sixteen_bits_keep_their_tones(tmp_path: Path) -> None:
    tones = np.linspace(0, 65535, 16, dtype=np.uint16)[None].repeat(16, 0)
    path = saved(tmp_path / "a.png", Image.fromarray(tones))
    pixels = load_pixels(path, channels=1, size=16)
    assert pixels[0, 0].tolist() == np.round(tones[0] / 257).astype(int).tolist()
    assert load_pixels(path, channels=3, size=16)[1].equal(pixels[0])


def test_numbers_without_a_range_are_bad(tmp_path: Path) -> None:
    floats = Image.fromarray(np.full((9, 9), 0.5, np.float32))
    assert "floating-point" in refusal(saved(tmp_path / "a.tiff", floats))
    large = Image.fromarray(np.full((9, 9), 70000, np.int32))
    assert "16 bits" in refusal(saved(tmp_path / "b.tiff", large))


def test_palette_and_one_bit(tmp_path: Path) -> None:
    palette = Image.new("RGB", (9, 9), RED).quantize(4)
    assert palette.mode == "P"
    assert first_pixel(saved(tmp_path / "a.png", palette)) == RED
    assert first_pixel(saved(tmp_path / "b.png", Image.new("1", (9, 9), 1))) == WHITE


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(tmp_path: Path, mode: str) -> None:
    if mode == "P":
        path = saved(tmp_path / "a.png", Image.new("P", (9, 9), 0), transparency=0)
    else:
        path = saved(tmp_path / "a.png", Image.new("RGBA", (9, 9), (0, 0, 0, 0)).convert(mode))
    assert first_pixel(path) == WHITE
    half = saved(tmp_path / "b.png", Image.new("RGBA", (9, 9), (*RED, 128)))
    assert first_pixel(half) == (255, 127, 127)


def test_extreme_sides_are_bad(tmp_path: Path) -> None:
    for width, height in ((1, 40), (40, 1), (1, 1), (2, 65), (65, 2)):
        path = saved(tmp_path / "a.png", Image.new("RGB", (width, height)))
        assert f"{width} x {height} is too thin" in refusal(path)
    path = saved(tmp_path / "a.png", Image.new("RGB", (2, 64), RED))
    assert first_pixel(path) == RED


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_animated_is_bad(tmp_path: Path, kind: str) -> None:
    frames = [Image.fromarray(np.roll(noise(), k)) for k in range(3)]
    path = saved(tmp_path / f"a.{kind}", frames[0], save_all=True, append_images=frames[1:])
    assert "animated" in refusal(path)


def test_a_phone_picture_with_a_preview_is_good(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), RED), Image.new("RGB", (8, 8))]
    path = tmp_path / "a.jpg"
    frames[0].save(path, format="MPO", save_all=True, append_images=frames[1:])
    with Image.open(path) as opened:
        assert opened.n_frames == 2
    assert first_pixel(path)[0] > 250


def test_exif_turns_the_picture(tmp_path: Path) -> None:
    array = np.zeros((32, 32, 3), np.uint8)
    array[:8, :8] = 255  # the mark is at the upper left, as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter: the mark is at the upper right
    path = saved(tmp_path / "a.jpg", Image.fromarray(array), exif=exif, quality=100)
    pixels = load_pixels(path, channels=1, size=32)[0]
    assert pixels[2, 29] > 250 and pixels[2, 2] < 5


@pytest.mark.parametrize("side", [4097, 13_000])
@pytest.mark.parametrize("warn", ["error", "ignore"])
def test_a_bomb_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, warn: str
) -> None:
    path = png_of_zeros(tmp_path / "a.png", side)
    assert path.stat().st_size < 30_000
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded.append)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter(warn)
        assert "above 16 megapixels" in refusal(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert not decoded and grown < 10_000  # kB; 169 megapixels would take 169,000


def test_what_is_just_below_the_cap_is_decoded(tmp_path: Path) -> None:
    assert first_pixel(png_of_zeros(tmp_path / "a.png", 4096)) == (0, 0, 0)


def test_crop_pad_and_resize(tmp_path: Path) -> None:
    array = np.zeros((20, 40, 3), np.uint8)
    array[:, 10:30] = 200  # the middle square is light
    path = saved(tmp_path / "a.png", Image.fromarray(array))
    crop, pad, resize = (
        load_pixels(path, channels=1, size=20, fit=fit)[0] for fit in ("crop", "pad", "resize")
    )
    assert (crop == 200).all()
    assert (pad[:5] == 255).all() and (pad[15:] == 255).all() and (pad[8:12, :4] <= 2).all()
    assert resize[10, 0] == 0 and resize[10, 10] == 200
    for wrong in ({"channels": 2, "size": 8}, {"channels": 3, "size": 0}):
        with pytest.raises(ValueError, match="a picture has 1 or 3|at least 1"):
            load_pixels(path, **wrong)


def test_any_rectangle(tmp_path: Path) -> None:
    array = np.zeros((20, 40, 3), np.uint8)
    array[:, 10:30] = 200  # the middle square is light
    path = saved(tmp_path / "a.png", Image.fromarray(array))
    tall = load_pixels(path, channels=1, size=(20, 10))[0]
    assert tall.shape == (20, 10) and (tall == 200).all()
    wide = load_pixels(path, channels=1, size=(10, 40), fit="pad")[0]
    assert wide.shape == (10, 40) and (wide[:, :10] == 255).all() and (wide[:, 30:] == 255).all()
    assert abs(int(wide[5, 20]) - 200) < 3
    flat = load_pixels(path, channels=3, size=(8, 24), fit="resize")
    assert flat.shape == (3, 8, 24) and flat[0, 4, 0] == 0 and flat[0, 4, 12] == 200
    assert load_pixels(path, channels=1, size=(20, 20)).equal(
        load_pixels(path, channels=1, size=20)
    )
    for wrong in ((0, 8), (8, 0), (8, -1)):
        with pytest.raises(ValueError, match="at least 1"):
            load_picture(path, channels=3, size=wrong)


def test_a_picture_of_its_own_size(tmp_path: Path) -> None:
    array = noise(21, 38)
    path = saved(tmp_path / "a.png", Image.fromarray(array))
    assert picture_size(path) == picture_size(Image.fromarray(array)) == (21, 38)
    own = load_pixels(path, channels=3, size=None).permute(1, 2, 0)
    assert np.array_equal(own, array)
    cut = load_pixels(path, channels=3, size=None, multiple=8).permute(1, 2, 0)
    assert np.array_equal(cut, array[2:18, 3:35])  # the middle, and no pixel is blended
    for fit in ("pad", "resize"):
        assert load_pixels(path, channels=3, size=None, fit=fit, multiple=8).shape == (3, 16, 32)
    assert load_mask(path, size=None, multiple=8).shape == (1, 16, 32)
    with pytest.raises(BadPicture, match="38 x 21 is smaller than 24"):
        load_picture(path, channels=3, size=None, multiple=24)
    with pytest.raises(ValueError, match="multiple 0: at least 1"):
        load_picture(path, channels=3, size=None, multiple=0)


def test_the_size_is_that_of_the_turned_picture(tmp_path: Path) -> None:
    for turn, size in ((1, (16, 32)), (3, (16, 32)), (6, (32, 16)), (8, (32, 16))):
        exif = Image.Exif()
        exif[0x0112] = turn
        path = saved(tmp_path / f"{turn}.jpg", Image.new("RGB", (32, 16)), exif=exif)
        assert picture_size(path) == size == load_pixels(path, channels=1, size=None).shape[1:]
    with pytest.raises(BadPicture, match="none of PNG"):
        text = tmp_path / "a.png"
        text.write_text("words")
        picture_size(text)


def test_masks_are_white_where_to_paint(tmp_path: Path) -> None:
    array = np.zeros((20, 40), np.uint8)
    array[:, 20:] = 255
    path = saved(tmp_path / "a.png", Image.fromarray(array))
    mask = load_mask(path, size=None)
    assert mask.dtype == torch.float32 and mask.shape == (1, 20, 40)
    assert mask[0, :, :20].eq(0).all() and mask[0, :, 20:].eq(1).all()
    pad = load_mask(path, size=(40, 40), fit="pad")[0]
    assert pad[:9].eq(0).all() and pad[31:].eq(0).all() and pad[15:25, 25:].eq(1).all()
    assert load_mask(path, size=(20, 20))[0, 10].tolist() == [0.0] * 10 + [1.0] * 10
    grey = Image.new("L", (8, 8), 51)
    assert_near(load_mask(grey, size=4).unique(), [51 / 255], 1)
    assert load_mask(Image.new("1", (8, 8), 1), size=4).eq(1).all()
    assert load_mask(Image.new("RGB", (8, 8), WHITE), size=4).eq(1).all()


def test_masks_from_transparency() -> None:
    array = np.full((16, 16, 4), 255, np.uint8)
    array[:8, :, 3] = 0  # white everywhere, and the upper half cannot be seen
    holed = Image.fromarray(array)
    strokes = load_mask(holed, size=None)[0]
    assert strokes[:8].eq(0).all() and strokes[8:].eq(1).all()
    holes = load_mask(holed, size=None, alpha=True)[0]
    assert holes[:8].eq(1).all() and holes[8:].eq(0).all()
    array[0, 0, 3] = 255 - 51
    assert_near(load_mask(Image.fromarray(array), size=None, alpha=True)[0, 0, 0], 51 / 255, 1)
    for opaque in (Image.new("RGBA", (8, 8), WHITE), Image.new("RGB", (8, 8), WHITE)):
        with pytest.raises(BadPicture, match="no transparent part"):
            load_mask(opaque, size=8, alpha=True)


@pytest.mark.parametrize("fit", ["crop", "pad", "resize"])
@pytest.mark.parametrize("size", [(24, 40), (40, 24), 16])
def test_a_mask_lies_where_its_picture_lies(fit: str, size: int | tuple[int, int]) -> None:
    array = np.zeros((30, 50), np.uint8)
    array[5:12, 20:41] = 255
    picture = Image.fromarray(array)
    shown = (load_picture(picture, channels=1, size=size, fit=fit)[0] + 1) / 2
    mask = load_mask(picture, size=size, fit=fit)[0]
    if fit == "pad":
        rows, columns = (mask.nonzero().amin(0), mask.nonzero().amax(0))
        inside = (slice(int(rows[0]), int(columns[0])), slice(int(rows[1]), int(columns[1])))
        assert_near(mask[inside], shown[inside], 2)
    else:
        assert torch.equal(mask, torch.round(shown * 255) / 255)


def test_depth_keeps_all_its_bits(tmp_path: Path) -> None:
    depths = np.linspace(1000, 1255, 256).astype(np.uint16).reshape(16, 16)
    path = saved(tmp_path / "a.png", Image.fromarray(depths))
    depth = load_depth(path, size=None)
    assert depth.shape == (1, 16, 16) and depth.min() == -1 and depth.max() == 1
    assert_near(depth[0], torch.linspace(-1, 1, 256).view(16, 16), 4)
    assert load_picture(path, channels=1, size=16).unique().numel() == 2  # 16 bits made 8
    floats = saved(tmp_path / "b.tiff", Image.fromarray(depths.astype(np.float32) / 7))
    # a seventh of numbers up to 1,255 is rounded; a range of 255 is left of them
    assert_near(load_depth(floats, size=None), depth, 2, scale=2 * 1255 / 255)
    bytes_ = Image.fromarray((depths - 1000).astype(np.uint8))
    assert_near(load_depth(bytes_, size=None), depth, 4)
    assert load_depth(Image.new("L", (8, 8), 77), size=(4, 6)).eq(-1).all()
    pad = load_depth(path, size=(16, 32), fit="pad")[0]
    assert pad[:, :8].eq(-1).all() and pad[:, 24:].eq(-1).all() and pad.max() == 1
    assert load_depth(path, size=(40, 24)).abs().max() <= 1
    broken = Image.fromarray(np.array([[0, 1], [np.nan, 2]], np.float32))
    with pytest.raises(BadPicture, match="not finite"):
        load_depth(broken, size=2)


def test_pictures_in_memory(tmp_path: Path) -> None:
    array = noise(20, 30)
    picture = Image.fromarray(array)
    path = saved(tmp_path / "a.png", picture)
    for fit in ("crop", "pad", "resize"):
        assert load_pixels(picture, channels=3, size=8, fit=fit).equal(
            load_pixels(path, channels=3, size=8, fit=fit)
        )
    assert np.array_equal(picture, array)  # and it is as it was
    with Image.open(path) as lazy:
        assert load_pixels(lazy, channels=3, size=None).shape == (3, 20, 30)
        assert load_pixels(lazy, channels=1, size=None).shape == (1, 20, 30)  # still open
    for bad, reason in ((Image.new("L", (1, 9)), "too thin"), (Image.new("F", (9, 9)), "floating")):
        with pytest.raises(BadPicture, match=f"^a picture of PIL's: .*{reason}"):
            load_picture(bad, channels=3, size=8)
    large = saved(tmp_path / "b.png", Image.fromarray(noise(64, 64)))
    large.write_bytes(large.read_bytes()[:5000])
    with Image.open(large) as cut, pytest.raises(BadPicture, match="cut short"):
        load_picture(cut, channels=3, size=8)
    eps = saved(tmp_path / "a.eps", Image.new("RGB", (9, 9), RED))
    with Image.open(eps) as foreign, pytest.raises(BadPicture, match="EPS: none of PNG"):
        load_picture(foreign, channels=3, size=8)


def test_metadata_comes_back(tmp_path: Path) -> None:
    texts = {"prompt": "a fox\nin the snow", "seed": "7", "caption": "naïve 狐 🦊"}
    picture = Image.fromarray(noise())
    save_png(picture, tmp_path / "a.png", texts)
    save_png(picture, tmp_path / "b.png", texts)
    assert read_metadata(tmp_path / "a.png") == texts
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    save_png(picture, tmp_path / "a.png")
    assert read_metadata(tmp_path / "a.png") == {}
    (tmp_path / "c.png").write_bytes(b"GIF89a")
    with pytest.raises(BadPicture, match="no PNG"):
        read_metadata(tmp_path / "c.png")


def text_chunks(path: Path) -> dict[str, bytes]:
    """Kinds of the text chunks by name, read without PIL."""
    data, place, found = path.read_bytes(), 8, {}
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind = data[place + 4 : place + 8]
        if kind in (b"tEXt", b"iTXt", b"zTXt"):
            found[data[place + 8 : place + 8 + length].split(b"\0")[0].decode()] = kind
        place += 12 + length
    return found


@pytest.mark.parametrize(
    "text",
    ["", " a \n\n b\t\r\n", "naïve ÿ\x80\x9f", "狐 🦊 \u2028", "a" * 2_000_000, "🦊" * 900_000],
)
def test_texts_come_back_to_the_letter(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.png"
    save_png(Image.fromarray(noise()), path, {"parameters": text, "seed": "7"})
    found = read_metadata(path)
    assert found == {"parameters": text, "seed": "7"} and type(found["parameters"]) is str
    latin = all(ord(letter) < 256 for letter in text)
    kinds = text_chunks(path)
    assert kinds == {"parameters": b"tEXt" if latin else b"iTXt", "seed": b"tEXt"}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"prompt": "a\0b"}, "'prompt': holds the character NUL"),
        ({"prompt": "a\ud83e"}, "'prompt': holds half a surrogate pair"),
        ({"prompt": "狐" * 3_000_000}, "9000000 bytes of text; a PNG's header takes 8000000"),
        ({"a": "x" * 5_000_000, "b": "x" * 5_000_000}, "10000000 bytes of text"),
        ({"": "x"}, "a name has 1..79"),
        ({"k" * 80: "x"}, "a name has 1..79"),
        ({"狐": "x"}, "a name has 1..79"),
        ({"a\0b": "x"}, "a name has 1..79"),
    ],
)
def test_texts_that_a_png_cannot_hold(tmp_path: Path, metadata: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=r"^metadata.*\Z") as caught:
        save_png(Image.fromarray(noise()), tmp_path / "a.png", metadata)
    assert words in str(caught.value) and len(str(caught.value)) < 200
    assert not list(tmp_path.iterdir())


def test_a_text_that_swells_is_refused(tmp_path: Path) -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("prompt", "a" * 2**21, zip=True)
    Image.fromarray(noise()).save(tmp_path / "a.png", pnginfo=texts)
    with pytest.raises(BadPicture, match="a text in its header is beyond a megabyte"):
        read_metadata(tmp_path / "a.png")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    save_png(Image.fromarray(noise()), path)
    old = path.read_bytes()

    def full_disk(draft: Path, _: Path) -> None:
        assert draft.parent == tmp_path and draft.stat().st_size
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_png(Image.fromarray(noise(8, 8)), path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="no such folder"):
        save_png(Image.fromarray(noise()), tmp_path / "no" / "a.png")
