"""What a picture is drawn from besides words: a size, a picture to start from, a mask, depth."""

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from minidiffusion.checkpoints.catalog import Row
from minidiffusion.data.pictures import (
    Fit,
    Source,
    load_depth,
    load_mask,
    load_picture,
    picture_size,
)
from minidiffusion.models import Autoencoder, MMDiTConfig
from minidiffusion.pipelines.memory import encoded
from minidiffusion.shapes import FeatureMap, Image

LEAST, MOST = 8, 4096
"""Pixels a side."""
MOST_PICTURES = 100_000
"""Of one call, or at once."""
LARGEST_OWN = 1024**2
"""Pixels of a picture that keeps its size; a larger one is made smaller unless a size is given."""
PAINT, DEPTH = 5, 1
"""Input channels beyond the latent's own: a mask and the latent around the hole; a depth map."""


class Given(NamedTuple):
    """What a user gives: pictures in files or in memory, and the size of the one to be drawn.

    fit: how a picture of another size is made to fit: crop, pad or resize.
    """

    init_image: Source | None = None
    mask: Source | None = None
    depth: Source | None = None
    width: int | None = None
    height: int | None = None
    fit: Fit = "crop"


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


def whole_patches(given: Given, row: Row, factor: int) -> Given:
    """With a size of whole patches, for a network that reads patches; not larger than it knows.

    A picture that is larger is made smaller, in its proportions, unless a size is given. Raises
    ValueError for a size that is asked for and has no whole number of them.
    """
    if not isinstance(row.model, MMDiTConfig):
        return given
    step, most = factor * row.model.patch, factor * row.model.patch * row.model.grid
    rows, columns = factor * row.shape[1], factor * row.shape[2]
    seen = given.init_image if given.init_image is not None else given.depth
    if seen is not None and given.width is None and given.height is None:
        (rows, columns), _ = own_size(*picture_size(seen))
        if (longest := max(rows, columns)) > most:
            rows, columns = (round(side * most / longest / step) * step for side in (rows, columns))
        rows, columns = (max(step, side // step * step) for side in (rows, columns))
    rows, columns = given.height or rows, given.width or columns
    for name, side in (("width", columns), ("height", rows)):
        if side % step or not 0 < side <= most:
            raise ValueError(f"{name}: must be a multiple of {step} in {step}..{most}, got {side}")
    return given._replace(width=columns, height=rows)


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


def check(given: Given, extra: int) -> None:
    """Raises ValueError for pictures that do not go together, or not with the network.

    extra: input channels that it has beyond its samples' own.
    """
    if given.mask is not None:
        if given.init_image is None:
            raise ValueError("mask: only with a picture to paint on (--init-image)")
        painted, under = picture_size(given.mask), picture_size(given.init_image)
        if painted != under:
            raise ValueError(
                f"mask: {painted[1]} x {painted[0]}, but the picture is {under[1]} x {under[0]}"
            )
    if extra not in (0, PAINT, DEPTH):
        raise ValueError(f"this network wants {extra} more channels: nothing known has so many")
    if (given.depth is not None) != (extra == DEPTH):
        wanted = given.depth is None
        reason = "this model draws after a depth map" if wanted else "not for this model"
        raise ValueError(f"depth: {reason}")


def as_they_are(given: Given, shape: tuple[int, ...], device: torch.device) -> Inputs:
    """For a network of pixels: its pictures have one size."""
    if given.width is not None or given.height is not None:
        raise ValueError(f"width, height: this model's pictures have the shape {shape}")
    if given.init_image is None:
        return Inputs()
    size, fit = (shape[1], shape[2]), given.fit
    image = load_picture(given.init_image, channels=shape[0], size=size, fit=fit)[None].to(device)
    if given.mask is None:
        return Inputs(image=image, init=image)
    area = load_mask(given.mask, size=size, fit=fit)[None].to(device)
    return Inputs(image=image, mask=area, init=image, hole=area)


def as_latents(
    given: Given, shape: tuple[int, ...], autoencoder: Autoencoder, extra: int,
    device: torch.device, tile: int | None,
) -> Inputs:  # fmt: skip
    """For a network of latents: any size, the picture's own if none is asked for."""
    factor, fit = autoencoder.config.factor, given.fit
    rows, columns = check_size(given.width, given.height, (factor * shape[1], factor * shape[2]))
    seen, whole = given.init_image if given.init_image is not None else given.depth, False
    if seen is not None and given.width is None and given.height is None:
        (rows, columns), whole = own_size(*picture_size(seen))
    frame = None if whole else (rows, columns)
    made = Inputs((rows // factor, columns // factor))
    if given.init_image is not None:
        image = load_picture(given.init_image, channels=3, size=frame, fit=fit, multiple=8)
        image = image[None].to(device)
        made = made._replace(image=image, init=encoded(autoencoder, image, tile))
    if given.mask is not None:
        area = load_mask(given.mask, size=frame, fit=fit, multiple=8)[None].to(device)
        hole = None if extra == PAINT else latent_mask(area, factor)
        made = made._replace(mask=area, hole=hole)
    if given.depth is not None:
        plane = load_depth(given.depth, size=(rows, columns), fit=fit)[None].to(device)
        made = made._replace(concat=latent_depth(plane, factor))
    if extra == PAINT:
        made = made._replace(concat=paint_channels(autoencoder, (rows, columns), made, tile))
    return made


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
