"""Sheets to look at, and sheets that small pictures lie in."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from minidiffusion.data.pictures import BadPicture, to_pixels
from minidiffusion.data.sheets import cut, grid


def avif(pixels: np.ndarray) -> bytes:
    """Without a loss."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "AVIF", quality=100, subsampling="4:4:4")
    return file.getvalue()


def test_cut_goes_row_by_row() -> None:
    """Two rows of three tiles, each of one grey: they come in the order of reading."""
    greys = np.array([[10, 60, 110], [160, 200, 250]], dtype=np.uint8)
    sheet = np.repeat(np.kron(greys, np.ones((8, 8), np.uint8))[..., None], 3, axis=2)
    tiles = cut(avif(sheet), 8, "sheet").float()
    assert tiles.shape == (6, 3, 8, 8)
    assert (tiles.mean(dim=(1, 2, 3)) - torch.tensor(greys).flatten()).abs().max() <= 2
    assert tiles.flatten(1).std(dim=1).max() <= 2


@pytest.mark.parametrize("kind", ["damaged", "shortened", "empty", "png"])
def test_bytes_that_are_no_sheet(kind: str) -> None:
    whole = avif(np.zeros((16, 16, 3), np.uint8))
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    data = {"damaged": b"x" * 12 + whole[12:], "shortened": whole[: len(whole) // 2],
            "empty": b"", "png": file.getvalue()}[kind]  # fmt: skip
    with pytest.raises(BadPicture) as error:
        cut(data, 8, "pack.zip: 01.avif")
    assert str(error.value).startswith("pack.zip: 01.avif: damaged (") and "\n" not in str(
        error.value
    )


def test_a_pillow_without_avif_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidiffusion.data.sheets.features.check", lambda name: False)
    with pytest.raises(BadPicture, match="sheet: AVIF.* pip install"):
        cut(b"", 8, "sheet")


def test_labels_head_the_columns_or_stand_below() -> None:
    x = -torch.ones(6, 1, 28, 28)
    plain, heads, below = (
        np.asarray(grid(x, 3, labels, scale=2))
        for labels in (None, ["a", "b", "c"], list("abcdef"))
    )
    gap = 4
    assert plain.shape == (gap + 2 * (56 + gap), gap + 3 * (56 + gap))
    assert (plain == 0).sum() == (heads == 0).sum() == (below == 0).sum() == 6 * 56**2
    assert plain.shape[1] == heads.shape[1] == below.shape[1]
    line = heads.shape[0] - plain.shape[0]
    assert 8 < line < 20 and below.shape[0] - plain.shape[0] == 2 * line
    assert heads[:line].min() < 100 and below[:gap].min() == 255  # where there is ink
    assert below[-line:].min() < 100 and heads[-gap:].min() == 255
    with pytest.raises(ValueError, match="labels: 3 or 6"):
        grid(x, 3, ["a", "b"])


def test_long_labels_stay_within_their_cell() -> None:
    x = torch.ones(2, 3, 64, 64)
    sheet = np.asarray(grid(x, 2, ["word " * 40, "W" * 200]))
    assert sheet[:, :4].min() > 200 and sheet[:, 68:72].min() > 200 and sheet[:, 136:].min() > 200
    assert sheet[:, 4:68].min() < 100 and sheet[:, 72:136].min() < 100


def test_scale_repeats_pixels() -> None:
    x = torch.tensor([[[[-1.0, 0.0], [1.0, 0.5]]]])
    sheet = np.asarray(grid(x, 1, scale=20))
    gap = (sheet.shape[0] - 40) // 2
    inner = sheet[gap : gap + 40, gap : gap + 40]
    assert np.array_equal(inner[::20, ::20], to_pixels(x)[0, :, :, 0].numpy())
    assert np.array_equal(inner, inner[::20, ::20].repeat(20, 0).repeat(20, 1))
