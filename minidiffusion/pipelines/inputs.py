"""What a picture is drawn from besides words: a size, a picture to start from, a mask, depth."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F

from minidiffusion.data.pictures import Fit, load_depth, load_mask, load_picture, picture_size
from minidiffusion.models import Autoencoder
from minidiffusion.pipelines.memory import encoded
from minidiffusion.shapes import FeatureMap, Image

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

    Picture = str | Path | PILImage

LEAST, MOST = 8, 4096
"""Pixels a side."""
LARGEST_OWN = 1024**2
"""Pixels of a picture that keeps its size; a larger one is made smaller unless a size is given."""
PAINT, DEPTH = 5, 1
"""Input channels beyond the latent's own: a mask and the latent around the hole; a depth map."""


class Inputs(NamedTuple):
    """latent_size: rows and columns of the samples; None as the network has them.

    image, mask: in pixels; mask is 1 where to paint. init, hole, concat: what they become for the
    sampler: where it starts, where it paints, what is laid beside its samples.
    """

    latent_size: tuple[int, int] | None = None
    image: Image | None = None
    mask: Image | None = None
    init: Image | None = None
    hole: Image | None = None
    concat: Image | None = None


def check_size(width: int | None, height: int | None, usual: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns; what is not given is the model's own."""
    for name, side in (("width", width), ("height", height)):
        if side is not None and not (LEAST <= side <= MOST and side % 8 == 0):
            raise ValueError(f"{name}: must be a multiple of 8 in {LEAST}..{MOST}, got {side}")
    return height or usual[0], width or usual[1]


def own_size(rows: int, columns: int) -> tuple[tuple[int, int], bool]:
    """A picture's own size in multiples of 8, and whether it stays: a large one is made smaller."""
    shrink = min(1.0, math.sqrt(LARGEST_OWN / (rows * columns)))
    sides = (max(8, int(side * shrink) // 8 * 8) for side in (rows, columns))
    return (next(sides), next(sides)), shrink == 1 and min(rows, columns) >= 8


def latent_mask(mask: Image, factor: int) -> FeatureMap:
    """Whole latent pixels: the nearest of the mask's pixels, painted from one half on."""
    size = (mask.shape[2] // factor, mask.shape[3] // factor)
    return F.interpolate((mask >= 0.5).float(), size=size, mode="nearest")


def latent_depth(depth: Image, factor: int) -> FeatureMap:
    """A depth map at the latent's size, spread over [-1, 1] whatever its range was."""
    size = (depth.shape[2] // factor, depth.shape[3] // factor)
    depth = F.interpolate(depth.float(), size=size, mode="bicubic", align_corners=False)
    low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
    return 2 * (depth - low) / (high - low).clamp(min=1e-12) - 1


def prepared(
    autoencoder: Autoencoder | None,
    shape: tuple[int, ...],
    extra: int,
    device: torch.device,
    *,
    init_image: "Picture | None" = None,
    mask: "Picture | None" = None,
    depth: "Picture | None" = None,
    width: int | None = None,
    height: int | None = None,
    fit: Fit = "crop",
    tile: int | None = None,
) -> Inputs:
    """Pictures in files or in memory as a network wants them.

    shape: of the network's samples. extra: input channels that it has beyond them. fit: how a
    picture of another size is made to fit.
    """
    if mask is not None and init_image is None:
        raise ValueError("mask: only with a picture to paint on (--init-image)")
    if mask is not None and init_image is not None:
        painted, under = picture_size(mask), picture_size(init_image)
        if painted != under:
            raise ValueError(
                f"mask: {painted[1]} x {painted[0]}, but the picture is {under[1]} x {under[0]}"
            )
    if extra not in (0, PAINT, DEPTH):
        raise ValueError(f"this network wants {extra} more channels: nothing known has so many")
    if (depth is not None) != (extra == DEPTH):
        reason = "this model draws after a depth map" if depth is None else "not for this model"
        raise ValueError(f"depth: {reason}")
    if autoencoder is None:
        return as_they_are(shape, device, init_image, mask, width, height, fit)
    factor = autoencoder.config.factor
    size = check_size(width, height, (factor * shape[1], factor * shape[2]))
    seen = init_image if init_image is not None else depth
    whole = False
    if seen is not None and width is None and height is None:
        size, whole = own_size(*picture_size(seen))
    given = Inputs((size[0] // factor, size[1] // factor))
    frame = None if whole else size
    if init_image is not None:
        image = load_picture(init_image, channels=3, size=frame, fit=fit, multiple=8)
        image = image[None].to(device)
        given = given._replace(image=image, init=encoded(autoencoder, image, tile))
    if mask is not None:
        area = load_mask(mask, size=frame, fit=fit, multiple=8)[None].to(device)
        hole = None if extra == PAINT else latent_mask(area, factor)
        given = given._replace(mask=area, hole=hole)
    if depth is not None:
        plane = load_depth(depth, size=size, fit=fit)[None].to(device)
        given = given._replace(concat=latent_depth(plane, factor))
    if extra == PAINT:
        given = given._replace(concat=paint_channels(autoencoder, size, given, tile))
    return given


def as_they_are(
    shape: tuple[int, ...], device: torch.device, init_image: "Picture | None",
    mask: "Picture | None", width: int | None, height: int | None, fit: Fit,
) -> Inputs:  # fmt: skip
    """For a network of pixels: its pictures have one size."""
    if width is not None or height is not None:
        raise ValueError(f"width, height: this model's pictures have the shape {shape}")
    if init_image is None:
        return Inputs()
    size = (shape[1], shape[2])
    image = load_picture(init_image, channels=shape[0], size=size, fit=fit)[None].to(device)
    if mask is None:
        return Inputs(image=image, init=image)
    area = load_mask(mask, size=size, fit=fit)[None].to(device)
    return Inputs(image=image, mask=area, init=image, hole=area)


def paint_channels(
    autoencoder: Autoencoder, size: tuple[int, int], given: Inputs, tile: int | None
) -> Image:
    """What a network trained to inpaint sees: the mask, and the picture with a hole of grey."""
    device = next(autoencoder.parameters()).device
    picture, hole = torch.zeros(1, 3, *size, device=device), torch.ones(1, 1, *size, device=device)
    if given.image is not None and given.mask is not None:
        hole = (given.mask >= 0.5).float()
        picture = given.image * (1 - hole)
    latent = encoded(autoencoder, picture, tile)
    return torch.cat([latent_mask(hole, autoencoder.config.factor), latent], dim=1)
