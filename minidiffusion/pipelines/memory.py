"""Where the parts of a model lie while they work, and what if memory or 16 bits run out."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from minidiffusion import device as devices
from minidiffusion.checkpoints.catalog import Row, Sampling
from minidiffusion.checkpoints.official import Stored
from minidiffusion.checkpoints.parts import Encoders, Parts, of_t5
from minidiffusion.layers.quantized import How, quantize_
from minidiffusion.models import Autoencoder, MMDiT, Model
from minidiffusion.pipelines.finite import FiniteGuard
from minidiffusion.pipelines.walk import ladder
from minidiffusion.shapes import Cond, FeatureMap, Image

T = TypeVar("T")
TILE = 64
"""Side of a tile in the latent's pixels, where the whole does not fit: 512 pixels of a picture."""


@contextmanager
def at_work(
    part: nn.Module, device: torch.device, offload: bool, stored: Stored | None = None
) -> Iterator[None]:
    """The part lies on the device; with ``offload`` only as long as it works.

    stored: where its weights are read each time, and left again, instead of waiting on the CPU.
    """
    taken(part, stored)
    part.to(device)
    try:
        yield
    finally:
        if stored is not None:
            part.load_state_dict(stored.empty, strict=False, assign=True)
        elif offload:
            part.to("cpu")


def taken(part: nn.Module, stored: Stored | None) -> None:
    """The part has its weights, which are read unless they are there."""
    if stored is not None and any(one.is_meta for one in part.state_dict().values()):
        part.load_state_dict(stored.read(), strict=False, assign=True)


def decoded(autoencoder: Autoencoder, latent: Image, tile: int | None = None) -> FeatureMap:
    """The picture of a latent, tile by tile if the whole does not fit."""
    return guarded(autoencoder, lambda side: autoencoder.decode(latent, side), tile)


def encoded(autoencoder: Autoencoder, image: Image, tile: int | None = None) -> FeatureMap:
    """The latent of a picture, tile by tile if the whole does not fit."""
    return guarded(autoencoder, lambda side: autoencoder.encode(image, tile=side), tile)


@torch.no_grad()
def guarded(autoencoder: Autoencoder, run: Callable[[int | None], T], tile: int | None) -> T:
    """run(tile), in smaller pieces if memory runs out, in float32 where 16 bits overflow."""
    try:
        with FiniteGuard(autoencoder, "autoencoder") as guard:
            return guard(lambda: run(tile))
    except (RuntimeError, MemoryError) as error:
        if tile is not None or not devices.out_of_memory(error):
            raise
        warnings.warn("memory ran out in the autoencoder: it works in tiles now", stacklevel=2)
    return guarded(autoencoder, run, TILE)


def freeze(
    network: Model, weights: Mapping[str, Tensor], how: Sampling, row: Row,
    conds: tuple[Cond, Cond | None], stored: Stored | None = None,
) -> None:  # fmt: skip
    """What an MMDiT's adaptive norms do on this ladder for these prompts, computed once."""
    assert isinstance(network, MMDiT)
    taken(network, stored)
    # All levels that a part of the ladder may have: strength takes some of them.
    levels = ladder(row, how)
    asked = [one for one in conds if one is not None][: 1 if how.guidance == 1 else 2]
    pooled = torch.cat([one.pooled for one in asked if one.pooled is not None])
    device = network.places.device
    times = torch.tensor([level.t for level in levels], dtype=torch.float32, device=device)
    network.freeze(times, pooled.to(device), weights)


def quantized(parts: Parts, how: How) -> None:
    """The linear layers of the denoiser and of T5, see `minidiffusion.layers.quantized`."""
    quantize_(parts.denoiser.network, how)
    if isinstance(parts.text, Encoders) and parts.text.t5 is not None:
        quantize_(parts.text.t5, of_t5(how))
