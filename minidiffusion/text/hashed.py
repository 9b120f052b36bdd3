"""Prompts without a text encoder: every token is a fixed random vector of its own.

A network that is trained from scratch learns what the vectors mean. There is nothing to train or
to ship: a vector is a function of the token's id. Its numbers are signs, which keep vectors apart
as Gaussian ones would (Achlioptas 2003, theorem 1.1) and are exact in every dtype.
"""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minidiffusion.models import MMDiTConfig, ModelConfig
from minidiffusion.shapes import Cond
from minidiffusion.text.bpe import BPE, SHOWN
from minidiffusion.text.conditioning import Place, paired

LEAST = 2
"""Tokens of the empty prompt: its start and its end."""
Kind = Literal["token", "place", "pooled"]
KINDS: tuple[Kind, ...] = ("token", "place", "pooled")


@lru_cache(maxsize=65_536)
def signs(kind: Kind, number: int, count: int) -> Float[Tensor, " count"]:
    """So many random signs, -1 or 1, which belong to this kind and number.

    They are the first bits of Philox (Salmon et al. 2011), the same on every machine.
    """
    key = np.array([number, KINDS.index(kind)], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(-(-count // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), count=count, bitorder="little")
    return torch.from_numpy(2 * bits.astype(np.float32) - 1)


def hashed(model: ModelConfig, words: int, names: tuple[str, ...]) -> "HashedText | None":
    """What reads prompts of so many tokens for a network of this config; None where none does.

    names: the prompts that it was trained with.
    """
    if not (words and isinstance(model, MMDiTConfig)):
        return None
    return HashedText(words, model.context_width, model.pooled_width, names)


@dataclass(frozen=True)
class HashedText:
    """Has the doors of `Text`, but no weights. length: tokens of every prompt, from 2 on.

    width, pooled_width: of the Cond's tokens and pooled vector. names: prompts that were learned,
    none if that is not known; words of no name are warned of.
    """

    length: int
    width: int
    pooled_width: int
    names: tuple[str, ...] = ()
    tokenizer: BPE = field(default_factory=BPE)
    encoder: nn.Module = field(default_factory=nn.Identity)
    long_prompts: ClassVar[Literal["truncate"]] = "truncate"

    def __post_init__(self) -> None:
        for name, least in (("length", LEAST), ("width", 1), ("pooled_width", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, got {getattr(self, name)}")

    def tokenize(
        self, prompts: str | Sequence[str], windows: int | None = None
    ) -> Int[Tensor, "b n"]:
        """Ids (b, length): start, text, end and ends again; what does not fit is warned of."""
        return self.tokenizer.tokenize(prompts, length=self.length)

    def encode(
        self, prompts: str | Sequence[str], windows: int | None = None, *,
        place: Place = nullcontext, device: torch.device | None = None,
    ) -> Cond:  # fmt: skip
        """Tokens (b, length, width), each with its place added, and pooled (b, pooled_width).

        pooled: the mean over the prompt's own tokens, without start and end; over those for the
        empty prompt. windows, place: not used; device: where the result lies.
        """
        rows = self.tokenize(prompts).tolist()
        if not rows:
            raise ValueError("prompts: expected at least one")
        self._warn_of_strangers(rows)
        tokens, pooled = torch.stack([self._row(row) for row in rows]), map(self._pooled, rows)
        return Cond(tokens=tokens.to(device), pooled=torch.stack([*pooled]).to(device))

    def encode_pair(
        self, prompts: str | Sequence[str], negatives: str | Sequence[str] = "", *,
        place: Place = nullcontext, device: torch.device | None = None,
    ) -> tuple[Cond, Cond]:  # fmt: skip
        """The Conds of prompts and of what they should not be. One negative prompt serves all."""
        return paired(partial(self.encode, device=device), prompts, negatives)

    def windows(self, length: int) -> int:
        """Every prompt has one."""
        return 1

    def _warn_of_strangers(self, rows: list[list[int]]) -> None:
        """A vector that was never met means nothing to the network."""
        known = {number for row in self.tokenize(self.names or "").tolist() for number in row}
        strange = [number for row in rows for number in row if number not in known]
        if strange and self.names:
            words = self.tokenizer.decode(strange)[:SHOWN]
            warnings.warn(
                f"prompt: {words!r}: not met in training, which had {', '.join(self.names)}",
                stacklevel=4,
            )

    def _row(self, ids: list[int]) -> Float[Tensor, "n d"]:
        vectors = [
            signs("token", number, self.width) + signs("place", place, self.width)
            for place, number in enumerate(ids)
        ]
        return torch.stack(vectors)

    def _pooled(self, ids: list[int]) -> Float[Tensor, " p"]:
        frame = self.tokenizer.bos, self.tokenizer.eos
        own = [number for number in ids if number not in frame] or frame
        return torch.stack([signs("pooled", number, self.pooled_width) for number in own]).mean(0)
