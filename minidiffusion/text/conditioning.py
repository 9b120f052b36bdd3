"""Prompts become what a network is conditioned on: tokenizer, text encoder, and how they meet."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from minidiffusion.models.clip import CLIPText, Encoded
from minidiffusion.shapes import Cond
from minidiffusion.text.bpe import BPE
from minidiffusion.text.chunks import chunks
from minidiffusion.text.weighting import emphasised, weighted

Place = Callable[[nn.Module], AbstractContextManager[object]]
LONGEST = 64
"""So many windows a prompt may have: beyond 4,800 tokens it is a mistake."""


class Prompt(NamedTuple):
    """A prompt's windows of ids, and the weight of each token in them."""

    ids: list[list[int]]
    weights: list[list[float]]


@dataclass(frozen=True)
class Text:
    """A CLIP text encoder with its tokenizer: `encode` makes the Cond of prompts.

    pad: the id that fills a window; None is the end token (Stable Diffusion 1), OpenCLIP's is 0.
    long_prompts: "truncate" cuts what is beyond one window of 77 and warns, as the reference does;
    "chunks" encodes window after window of 75 tokens and lays their embeddings one after another.
    weighting: None takes brackets for text; "a1111" is `minidiffusion.text.weighting`.
    """

    encoder: CLIPText
    tokenizer: BPE = field(default_factory=BPE)
    pad: int | None = None
    long_prompts: Literal["truncate", "chunks"] = "truncate"
    weighting: Literal["a1111"] | None = None

    def __post_init__(self) -> None:
        self.tokenizer.padding(self.pad)
        there, asked = self.encoder.config.vocabulary, self.tokenizer.vocabulary
        if there < asked:
            raise ValueError(f"encoder: knows {there} tokens, the tokenizer has {asked}")

    def tokenize(
        self, prompts: str | Sequence[str], windows: int | None = None
    ) -> Int[Tensor, "b n"]:
        """Ids (b, 77 k): k windows, see `encode`."""
        rows = [list(chain(*prompt.ids)) for prompt in self._windows(prompts, windows)]
        return torch.tensor(rows, dtype=torch.int64)

    def encode(
        self, prompts: str | Sequence[str], windows: int | None = None, *,
        place: Place = nullcontext, device: torch.device | None = None,
    ) -> Cond:  # fmt: skip
        """Tokens (b, 77 k, d), and the pooled vector (b, e) of each prompt's first window.

        k is windows, and without it what the longest prompt needs: a shorter one goes on with
        empty windows, of one that is longer the rest is cut off with a warning. The bits of a
        window do not depend on the others: each is encoded on its own, equal ones once. place: a
        context for the encoder, such as one that holds it on a device only while it works; the
        result lies where it works, whatever ``device`` says.
        """
        rows = self._windows(prompts, windows)
        with place(self.encoder), torch.no_grad():
            return self._encoded(rows)

    def _encoded(self, prompts: list[Prompt]) -> Cond:
        device = next(self.encoder.parameters()).device
        known: dict[tuple[int, ...], Encoded] = {}
        tokens, pooled = [], []
        for prompt in prompts:
            found = []
            for window in map(tuple, prompt.ids):
                if window not in known:
                    known[window] = self.encoder(torch.tensor([window], device=device))
                found.append(known[window])
            weights = torch.tensor(prompt.weights, device=device)
            rows = emphasised(torch.cat([one.tokens for one in found]), weights)
            tokens.append(rows.flatten(0, 1))
            pooled.append(found[0].pooled)
        return Cond(tokens=torch.stack(tokens), pooled=torch.cat(pooled))

    def encode_pair(
        self, prompts: str | Sequence[str], negatives: str | Sequence[str] = "", *,
        place: Place = nullcontext, device: torch.device | None = None,
    ) -> tuple[Cond, Cond]:  # fmt: skip
        """The Conds of prompts and of what they should not be, equally long, to be stacked.

        One negative prompt serves all. place, device: see `encode`.
        """
        return paired(partial(self.encode, place=place, device=device), prompts, negatives)

    def windows(self, length: int) -> int:
        """How many windows a Cond of so many tokens has."""
        return max(1, length // self.encoder.config.positions)

    def _windows(self, prompts: str | Sequence[str], windows: int | None) -> list[Prompt]:
        length = self.encoder.config.positions
        given = None if windows is None else bounded(windows, length)
        most = 1 if self.long_prompts == "truncate" else given
        rows = [self._weighted(prompt, most) for prompt in listed(prompts)]
        if not rows:
            raise ValueError("prompts: expected at least one")
        count = given or bounded(max(len(chunks(ids, 0, 0, 0, length)) for ids, _ in rows), length)
        frame = self.tokenizer.bos, self.tokenizer.eos, self.tokenizer.padding(self.pad)
        return [
            Prompt(
                chunks(ids, *frame, length, count), chunks(weights, 1.0, 1.0, 1.0, length, count)
            )
            for ids, weights in rows
        ]

    def _weighted(self, prompt: str, most: int | None) -> tuple[list[int], list[float]]:
        """The ids of a prompt and their weights, as many as fit into so many windows."""
        parts = [(prompt, 1.0)] if self.weighting is None else weighted(prompt)
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in parts:
            new = self.tokenizer.encode(text)
            ids += new
            weights += [weight] * len(new)
        if most is not None:
            ids, lost = self.tokenizer.cut(ids, most * (self.encoder.config.positions - 2))
            if lost:
                hint = '; long_prompts="chunks" keeps it' if self.long_prompts != "chunks" else ""
                warnings.warn(lost + hint, stacklevel=5)
        return ids, weights[: len(ids)]


def paired(
    encode: Callable[[list[str]], Cond], prompts: str | Sequence[str],
    negatives: str | Sequence[str],
) -> tuple[Cond, Cond]:  # fmt: skip
    """Both read at once, so that they are equally long."""
    first, second = listed(prompts), listed(negatives)
    if isinstance(negatives, str):
        second *= len(first)
    if len(first) != len(second):
        raise ValueError(f"negatives: {len(second)} for {len(first)} prompts")
    both = encode(first + second)
    assert both.tokens is not None and both.pooled is not None
    tokens, pooled = both.tokens.split(len(first)), both.pooled.split(len(first))
    return Cond(tokens[0], pooled[0]), Cond(tokens[1], pooled[1])


def bounded(windows: int, length: int) -> int:
    if not 1 <= windows <= LONGEST:
        raise ValueError(f"prompt: {windows} windows of {length} tokens; allowed: 1..{LONGEST}")
    return windows


def listed(prompts: str | Sequence[str]) -> list[str]:
    return [prompts] if isinstance(prompts, str) else list(prompts)
