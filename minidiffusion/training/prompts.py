"""Class names as prompts, for a network that is conditioned on words."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minidiffusion.checkpoints.catalog import Row
from minidiffusion.data.dataset import Batch, Dataset
from minidiffusion.data.order import order_of
from minidiffusion.shapes import Cond, Labels
from minidiffusion.text import BPE
from minidiffusion.text.hashed import LEAST, hashed

ROOM = 8
"""Tokens that every prompt has room for, however short the names are: "a photo of a sneaker"."""


@dataclass(frozen=True, eq=False)
class Named:
    """A data set whose labels are read as their names. names: a row a class, then the empty one."""

    dataset: Dataset
    names: Cond

    @property
    def shape(self) -> tuple[int, ...]:
        return self.dataset.shape

    @property
    def classes(self) -> tuple[str, ...]:
        return self.dataset.classes

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int]) -> Batch:
        return self.dataset.batch(indices)

    def order(self, seed: int, start: int, count: int) -> list[int]:
        return order_of(self.dataset, seed, start, count)

    def fingerprint(self) -> str:
        return self.dataset.fingerprint()

    def condition(self, labels: Labels) -> Cond:
        """The prompts of class numbers; the number of classes itself is the empty one."""
        assert self.names.tokens is not None and self.names.pooled is not None
        return Cond(tokens=self.names.tokens[labels], pooled=self.names.pooled[labels])


def room(names: Sequence[str]) -> int:
    """Tokens that the longest of these prompts has, start and end included; at least ROOM."""
    tokenizer = BPE()
    return max([ROOM, *(LEAST + len(tokenizer.encode(name)) for name in names)])


def prompted(dataset: Dataset, row: Row, device: torch.device) -> Dataset:
    """The data as a network of words sees them; any other network's as they are."""
    if (text := hashed(row.model, row.words, row.classes)) is None:
        return dataset
    return Named(dataset, text.encode([*dataset.classes, ""], device=device))
