"""A data set as our own small encoders see it: pictures as latents, captions as tokens.

All of it is encoded at once and kept in the run's folder, a file for the pictures and one for the
captions, each named by the hash of what it was made from and by.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minidiffusion.checkpoints import own
from minidiffusion.checkpoints.catalog import opened
from minidiffusion.checkpoints.weights import Weights
from minidiffusion.data.dataset import Dataset
from minidiffusion.models import Autoencoder, CLIPConfig
from minidiffusion.shapes import Cond
from minidiffusion.text.bpe import shortened
from minidiffusion.text.conditioning import Text
from minidiffusion.text.hashed import LEAST
from minidiffusion.training.latents import Latents, Words, data_of, digest, hash_of, kept, moments
from minidiffusion.training.latents import place as cache
from minidiffusion.training.recipe import Through
from minidiffusion.typed import ConfigError

BATCH = 64


class Encoders(NamedTuple):
    """What stands between a denoiser and the world, and how the files hold it."""

    autoencoder: Autoencoder
    text: Text
    packed: tuple[own.Packed, own.Packed]

    @property
    def config(self) -> CLIPConfig:
        return self.text.encoder.config


def encoders(through: Through, device: torch.device) -> Encoders:
    """Raises ConfigError for a place that does not hold what is wanted."""
    first = part(through.autoencoder, "autoencoder")
    second = part(through.clip, "clip")
    clip = own.load_clip(second, device).text
    packed = own.repacked(first, "autoencoder"), own.repacked(second, "clip")
    text = Text(clip, shortened(clip.config.vocabulary))
    return Encoders(own.load_autoencoder(first, device), text, packed)


def part(place: str, name: own.Name) -> Weights:
    try:
        weights, *_ = opened(Path(place))
    except (OSError, ValueError) as error:
        raise ConfigError(f"through.{name}: {error}") from None
    if not own.holds(weights, name):
        raise ConfigError(f"through.{name}: {place} holds no {name} of our own")
    return weights


@torch.no_grad()
def through(
    dataset: Dataset, encoders: Encoders, folder: Path | None, device: torch.device
) -> Latents:
    """Raises ConfigError for pictures without captions, or of sizes that do not fit."""
    config = encoders.autoencoder.config
    channels, *sides = dataset.shape
    if channels != config.picture_channels or any(side % config.factor for side in sides):
        raise ConfigError(f"data: the autoencoder takes {config.picture_channels} channels and "
                          f"multiples of {config.factor} pixels, got {dataset.shape}")  # fmt: skip
    if not dataset.batch([0]).captions:
        raise ConfigError("data: no captions, which a denoiser that is conditioned on words wants")
    # The config, too: scale and shift stand in no weight.
    makers = [
        f"{hash_of(one)} {one.config}" for one in (encoders.autoencoder, encoders.text.encoder)
    ]
    keys = [digest(dataset.fingerprint().encode(), one.encode()) for one in makers]
    captions = [c for start in starts(dataset) for c in dataset.batch(start).captions]
    pictures = kept(cache(folder), keys[0], lambda: encoded(dataset, encoders.autoencoder, device))
    found = kept(cache(folder), keys[1], lambda: read(captions, encoders.text))
    rows = {caption: row for row, caption in enumerate(unique(captions))}
    words: Words = {
        caption: Cond(found["tokens"][row : row + 1], found["pooled"][row : row + 1])
        for caption, row in rows.items()
    }
    return Latents(
        pictures["x"], tuple(captions), words, digest(*(k.encode() for k in keys)), pictures["rows"]
    )


def starts(dataset: Dataset) -> list[range]:
    return [
        range(start, min(start + BATCH, len(dataset))) for start in range(0, len(dataset), BATCH)
    ]


def unique(captions: list[str]) -> list[str]:
    """Each once, and the empty one."""
    return sorted({"", *captions})


def encoded(
    dataset: Dataset, autoencoder: Autoencoder, device: torch.device
) -> Mapping[str, Tensor]:
    """x: of every picture, once however often it comes; rows: which of them a sample is."""
    seen: dict[bytes, int] = {}
    rows: list[int] = []
    parts: list[Tensor] = []
    for indices in starts(dataset):
        fresh = []
        for picture in dataset.batch(indices).x:
            key = data_of(picture)
            if key not in seen:
                seen[key] = len(seen)
                fresh.append(picture)
            rows.append(seen[key])
        if fresh:
            parts.append(moments(autoencoder, torch.stack(fresh).to(device)).cpu())
    return {"x": torch.cat(parts), "rows": torch.tensor(rows)}


def read(captions: list[str], text: Text) -> Mapping[str, Tensor]:
    """Of every caption, or of what fits of it; float16 takes half the room."""
    every = unique(captions)
    room = text.encoder.config.positions - LEAST
    long = sum(len(text.tokenizer.encode(caption)) > room for caption in every)
    if long:
        warnings.warn(f"{long} of {len(every)} captions are cut at {room} tokens", stacklevel=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one line for each of them
        parts = [text.encode(every[start : start + BATCH]) for start in range(0, len(every), BATCH)]
    tokens = torch.cat([part.tokens for part in parts if part.tokens is not None])
    pooled = torch.cat([part.pooled for part in parts if part.pooled is not None])
    return {"tokens": tokens.half(), "pooled": pooled.half()}
