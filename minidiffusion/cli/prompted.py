"""What `minidiffusion evaluate` does with a model that draws from words: it asks for emoji."""

from collections.abc import Sequence
from typing import Any

import torch

from minidiffusion.cli.main import fail
from minidiffusion.data.emoji import SIDE
from minidiffusion.evaluation.prompted import SPLITS, Asked, Eyes, Prompted, asked, evaluate, naming
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.shapes import Image

COUNT = 250
"""Captions of each split, of which two have a few more."""


def judged(
    pipe: Pipeline, eyes: Eyes, count: int, batch: int, seed: int, given: dict[str, Any]
) -> Prompted:
    """The figures of so many pictures of each split, and of all that name a colour.

    given: options of `Pipeline.steps`. Picture i of a split has seed + i.
    """

    def drawn(wanted: Asked) -> tuple[Asked, Image]:
        return wanted, draw(pipe, wanted.captions, batch, seed, given)

    samples = [drawn(asked(split, count, seed)) for split in SPLITS]
    return evaluate(samples, eyes, seed, hues=[drawn(naming(split)) for split in SPLITS])


def check(pipe: Pipeline) -> None:
    """Better said before anything is drawn."""
    if pipe.text is None:
        fail("evaluate: this model of emoji takes no words")
    factor = 1 if pipe.autoencoder is None else pipe.autoencoder.config.factor
    channels = pipe.row.shape[0] if pipe.autoencoder is None else 3
    size = (channels, *(factor * side for side in pipe.row.shape[1:]))
    if size != (3, SIDE, SIDE):
        fail(f"evaluate: emoji are 3 x {SIDE} x {SIDE}, this model's pictures {size}")


def draw(
    pipe: Pipeline, captions: Sequence[str], batch: int, seed: int, given: dict[str, Any]
) -> Image:
    """A picture of each caption; it depends on its seed alone, not on its batch."""
    parts = []
    for start in range(0, len(captions), batch):
        cond = pipe.condition(captions[start : start + batch])
        parts.append(pipe.decode(pipe.sample(cond, seed=seed + start, **given)).cpu())
    return torch.cat(parts)
