"""Prompts for Stable Diffusion 3, which reads them three times: CLIP-L, OpenCLIP's bigG and T5."""

import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from minidiffusion.models.clip import CLIPText, Encoded
from minidiffusion.models.t5 import T5Encoder
from minidiffusion.shapes import Cond
from minidiffusion.text.bpe import BPE, cut
from minidiffusion.text.conditioning import Place, Text, listed, paired
from minidiffusion.text.unigram import t5_tokenizer

Window = tuple[int, ...]
Known = OrderedDict[Window, Encoded]
KEPT = 16
"""So many texts each encoder remembers: 5 MB a prompt in float32, of which T5's part is 4."""
T5_LENGTH, T5_LEAST, T5_MOST = 256, 77, 512
"""T5's tokens: as in diffusers; with which it was trained; and what its users go up to."""


@runtime_checkable
class T5Tokenizer(Protocol):
    """What is asked of a tokenizer for T5, such as `Unigram`."""

    @property
    def eos(self) -> int: ...
    @property
    def pad(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


class Prompt(NamedTuple):
    """A prompt's ids: windows of both CLIPs, which differ in the padding, and one row of T5's."""

    clip_l: list[Window]
    clip_g: list[Window]
    t5: Window


@dataclass(frozen=True)
class TripleText:
    """Three text encoders with their tokenizers: `encode` makes the Cond of prompts.

    clip_l, clip_g: with skip=1 and final_norm=False, clip_g with its projection; CLIP-L has one in
    diffusers' folders alone, and its pooled vector goes through it there. t5: None stands for
    zeros. t5_tokenizer: T5's own unless given. t5_length: of T5's tokens; the reference
    implementation has at least 77, diffusers 256; what is beyond is cut off with a warning. (The
    tokenizers are the reference's: diffusers' takes each ! of bigG's text for padding.) width: of
    the tokens. long_prompts: see `Text`; of CLIP alone. Texts that were encoded lately are
    remembered for as long as the weights stay what and where they are; `replace` forgets.
    """

    clip_l: CLIPText
    clip_g: CLIPText
    t5: T5Encoder | None = None
    tokenizer: BPE = field(default_factory=BPE)
    t5_tokenizer: T5Tokenizer | None = None
    t5_length: int = T5_LENGTH
    width: int = 4096
    long_prompts: Literal["truncate", "chunks"] = "truncate"
    weighting: Literal["a1111"] | None = None
    _known: dict[str, tuple[object, Known]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name, clip in (("clip_l", self.clip_l), ("clip_g", self.clip_g)):
            if clip.config.skip != 1 or clip.config.final_norm:
                raise ValueError(f"{name}: must be loaded with skip=1 and final_norm=False")
            Text(clip, self.tokenizer)
        if self.clip_g.projection is None:
            raise ValueError("clip_g: holds no projection (text_projection): not bigG")
        both = self.clip_l.config.width + self.clip_g.config.width
        if both > self.width:
            raise ValueError(f"width: must be at least {both}, of both CLIPs, got {self.width}")
        if self.t5 is not None and self.t5.config.width != self.width:
            raise ValueError(f"t5: makes {self.t5.config.width} features, expected {self.width}")
        if not T5_LEAST <= self.t5_length <= T5_MOST:
            raise ValueError(f"t5_length: must be {T5_LEAST}..{T5_MOST}, got {self.t5_length}")
        if self.weighting is not None:
            raise ValueError("weighting: not for Stable Diffusion 3, whose T5 knows no weights")

    @property
    def encoders(self) -> dict[str, CLIPText | T5Encoder]:
        """In the order in which they work: the largest first, to be gone when the others come."""
        large: dict[str, CLIPText | T5Encoder] = {} if self.t5 is None else {"t5": self.t5}
        return {**large, "clip_g": self.clip_g, "clip_l": self.clip_l}

    @property
    def encoder(self) -> nn.ModuleDict:
        """All of them in one."""
        return nn.ModuleDict(self.encoders)

    def tokenize(
        self, prompts: str | Sequence[str], windows: int | None = None
    ) -> Int[Tensor, "b n"]:
        """All ids of each prompt side by side: CLIP-L's windows, bigG's, T5's if it is there."""
        rows = self._prompts(prompts, windows)
        return torch.tensor([[*chain(*row.clip_l, *row.clip_g), *row.t5] for row in rows])

    @torch.no_grad()
    def encode(
        self, prompts: str | Sequence[str], windows: int | None = None, *,
        place: Place = nullcontext, device: torch.device | None = None,
    ) -> Cond:  # fmt: skip
        """Tokens (b, 77 k + t5_length, width) and pooled vectors (b, that of clip_l + of clip_g).

        k: see `Text.encode`. place: a context for each encoder in turn, such as one that holds it
        on a device only while it works; an encoder that knows all texts already is not placed.
        device: where `place` puts them, and where the result lies; None is where they are.
        """
        rows = self._prompts(prompts, windows)
        wanted = {
            "t5": dict.fromkeys(row.t5 for row in rows),
            "clip_g": dict.fromkeys(chain(*(row.clip_g for row in rows))),
            "clip_l": dict.fromkeys(chain(*(row.clip_l for row in rows))),
        }
        found = {name: self._found(name, wanted[name], place, device) for name in self.encoders}
        conds = [self._joined(row, found, device) for row in rows]
        return Cond(
            tokens=torch.stack([tokens for tokens, _ in conds]),
            pooled=torch.stack([pooled for _, pooled in conds]),
        )

    def encode_pair(
        self, prompts: str | Sequence[str], negatives: str | Sequence[str] = "", *,
        place: Place = nullcontext, device: torch.device | None = None,
    ) -> tuple[Cond, Cond]:  # fmt: skip
        """The Conds of prompts and of what they should not be, equally long, to be stacked.

        One negative prompt serves all. place, device: see `encode`.
        """
        return paired(partial(self.encode, place=place, device=device), prompts, negatives)

    def windows(self, length: int) -> int:
        """How many windows of CLIP's a Cond of so many tokens has."""
        return (length - self.t5_length) // self.clip_l.config.positions

    def _prompts(self, prompts: str | Sequence[str], windows: int | None) -> list[Prompt]:
        texts = listed(prompts)
        clip = Text(self.clip_g, self.tokenizer, pad=0, long_prompts=self.long_prompts)
        length, end = self.clip_g.config.positions, self.tokenizer.eos
        rows = clip.tokenize(texts, windows).unflatten(1, (-1, length)).tolist()
        return [
            Prompt([ended(w, end) for w in row], [tuple(w) for w in row], self._pieces(text))
            for text, row in zip(texts, rows, strict=True)
        ]

    def _pieces(self, text: str) -> Window:
        """T5's ids: text, end, padding; none where it is not there."""
        if self.t5 is None:
            return ()
        tokenizer, room = self.t5_tokenizer or t5_tokenizer(), self.t5_length - 1
        ids, lost = cut(tokenizer.encode(text), room, tokenizer.decode, "tokens of T5")
        if lost:
            warnings.warn(lost, stacklevel=5)
        there = self.t5.config.vocabulary
        if max(ids, default=0) >= there:
            raise ValueError(f"t5: knows {there} tokens, the tokenizer has {max(ids) + 1} or more")
        return (*ids, tokenizer.eos, *[tokenizer.pad] * (room - len(ids)))

    def _found(
        self, name: str, wanted: Collection[Window], place: Place, device: torch.device | None
    ) -> Mapping[Window, Encoded]:
        """What an encoder makes of each of these windows, one at a time: so their bits stay."""
        part = self.encoders[name]
        known = self._remembered(name, part, device)
        found = {window: known[window] for window in wanted if window in known}
        if len(found) < len(wanted):
            with place(part):
                known = self._remembered(name, part, None)
                for window in wanted:
                    found[window] = known.get(window) or self._encoded(part, window)
        for window in wanted:
            known[window] = found[window]
            known.move_to_end(window)
        while len(known) > KEPT:
            known.popitem(last=False)
        return found

    def _remembered(self, name: str, part: nn.Module, device: torch.device | None) -> Known:
        """What an encoder knows, which is nothing once its weights change.

        Weights that are not there (on the meta device, until they are needed) have not changed.
        """
        weights = [*part.parameters(), *part.buffers()]
        where = torch.empty(0, device=device or weights[0].device).device
        state = where, [(id(one), one.dtype, one._version) for one in weights]
        if name not in self._known or not (weights[0].is_meta or self._known[name][0] == state):
            self._known[name] = state, OrderedDict()
        return self._known[name][1]

    def _encoded(self, part: CLIPText | T5Encoder, window: Window) -> Encoded:
        ids = torch.tensor([window], device=next(part.parameters()).device)
        if isinstance(part, CLIPText):
            return part(ids)
        tokens = part(ids)
        return Encoded(tokens, tokens.new_zeros(1, 0))

    def _joined(
        self, row: Prompt, found: Mapping[str, Mapping[Window, Encoded]],
        device: torch.device | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One prompt's tokens and pooled vector: CLIP's side by side, T5's behind them."""
        small = [found["clip_l"][window] for window in row.clip_l]
        large = [found["clip_g"][window] for window in row.clip_g]
        where = device or large[0].tokens.device
        tokens = torch.cat([in_a_row(small, where), in_a_row(large, where)], dim=-1)
        tokens = F.pad(tokens, (0, self.width - tokens.shape[-1]))
        more = tokens.new_zeros(self.t5_length, self.width)
        if self.t5 is not None:
            more = in_a_row([found["t5"][row.t5]], where)
        pooled = [one.pooled[0].to(where) for one in (small[0], large[0])]
        return torch.cat([tokens, more]), torch.cat(pooled)


def in_a_row(windows: list[Encoded], device: torch.device) -> Float[Tensor, "n d"]:
    """The tokens of window after window."""
    return torch.cat([one.tokens[0] for one in windows]).to(device)


def ended(window: list[int], end: int) -> Window:
    """A window with ends where its padding is: what follows its last end."""
    inside = len(window) - window[::-1].index(end)
    return (*window[:inside], *[end] * (len(window) - inside))
