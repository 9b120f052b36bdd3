"""Where the parts of a model lie while they work, and what if memory or 16 bits run out."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from minidiffusion import device as devices
from minidiffusion.models import Autoencoder
from minidiffusion.shapes import FeatureMap, Image

TILE = 64
"""Side of a tile in the latent's pixels, where the whole does not fit: 512 pixels of a picture."""


@contextmanager
def at_work(part: nn.Module, device: torch.device, offload: bool) -> Iterator[None]:
    """The part lies on the device; with ``offload`` only as long as it works."""
    part.to(device)
    try:
        yield
    finally:
        if offload:
            part.to("cpu")


def decoded(autoencoder: Autoencoder, latent: Image, tile: int | None = None) -> FeatureMap:
    """The picture of a latent, tile by tile if the whole does not fit."""
    return guarded(autoencoder, lambda side: autoencoder.decode(latent, side), tile)


def encoded(autoencoder: Autoencoder, image: Image, tile: int | None = None) -> FeatureMap:
    """The latent of a picture, tile by tile if the whole does not fit."""
    return guarded(autoencoder, lambda side: autoencoder.encode(image, tile=side), tile)


@torch.no_grad()
def guarded(
    autoencoder: Autoencoder, run: Callable[[int | None], FeatureMap], tile: int | None
) -> FeatureMap:
    """run(tile), in smaller pieces if memory runs out, in float32 if 16 bits overflow."""
    try:
        found = run(tile)
    except (RuntimeError, MemoryError) as error:
        if tile is not None or not devices.out_of_memory(error):
            raise
        warnings.warn("memory ran out in the autoencoder: it works in tiles now", stacklevel=2)
        return guarded(autoencoder, run, TILE)
    half = next(autoencoder.parameters()).dtype != torch.float32
    if not half or bool(found.isfinite().all()):
        return found
    warnings.warn("the autoencoder overflowed: it works in float32 from here on", stacklevel=2)
    autoencoder.float()
    return run(tile)


def quantized(network: nn.Module) -> None:
    """Weights of linear layers as 8-bit numbers with a scale a row, through torchao.

    Half of bf16's memory for them; outputs move by about one percent. Raises ValueError where
    torchao is not installed.
    """
    for talkative in ("torchao", "torch.utils._pytree"):  # of GPU kernels and of torch's own names
        logging.getLogger(talkative).setLevel(logging.ERROR)
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise ValueError(
            "int8 weights need torchao: pip install 'minidiffusion[quantize]'"
        ) from None
    quantize_(network, Int8WeightOnlyConfig())
