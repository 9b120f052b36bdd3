"""The transformer of Stable Diffusion 3 and 3.5 (MMDiT, Esser et al. 2024, section 4; figure 2).

Text and picture are two streams of tokens, each with weights of its own, that meet in one
attention. Conditioning by adaLN-zero, as in the DiT.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minidiffusion.layers.attention import Heads, Projections, attend
from minidiffusion.layers.embeddings import TimeEmbedding, sinusoidal_grid
from minidiffusion.layers.modulation import AdaLN, Modulation
from minidiffusion.shapes import Cond, Context, Features, Image, Labels, Times, Tokens

Ladder = Float[Tensor, " levels"]
Pooled = Float[Tensor, "b p"]


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of an MMDiT; the defaults are Stable Diffusion 3 medium's.

    patch: side of a token's block of pixels. grid: side, in patches, of the largest picture.
    context_width, pooled_width: of cond.tokens and cond.pooled. qk_norm: RMS-normalise queries and
    keys per head. second_attention: in so many blocks, from the first, the picture also attends to
    itself alone (3.5 medium: 13).
    """

    name: ClassVar[str] = "mmdit"
    in_channels: int = field(default=16, metadata={"min": 1, "max": 2**16})
    width: int = field(default=1536, metadata={"min": 4, "max": 2**16})
    depth: int = field(default=24, metadata={"min": 1, "max": 2**10})
    heads: int = field(default=24, metadata={"min": 1, "max": 2**16})
    patch: int = field(default=2, metadata={"min": 1, "max": 2**8})
    grid: int = field(default=192, metadata={"min": 1, "max": 2**12})
    context_width: int = field(default=4096, metadata={"min": 1, "max": 2**16})
    pooled_width: int = field(default=2048, metadata={"min": 1, "max": 2**16})
    qk_norm: bool = False
    second_attention: int = field(default=0, metadata={"min": 0, "max": 2**10})

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} is no multiple of heads = {self.heads}")
        if self.width % 4:
            raise ValueError(f"width: must be a multiple of 4, got {self.width}")
        if self.second_attention > self.depth:
            raise ValueError(
                f"second_attention: at most depth = {self.depth}, got {self.second_attention}"
            )

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless pictures of this shape (channels, rows, columns) fit."""
        most = self.grid * self.patch
        ends = any(n % self.patch or not 0 < n <= most for n in shape[1:])
        if len(shape) != 3 or shape[0] != self.in_channels or ends:
            raise ValueError(
                f"this mmdit takes ({self.in_channels}, rows, columns) with rows and columns "
                f"multiples of {self.patch} up to {most}, got {tuple(shape)}"
            )


class Stream(nn.Module):
    """The text's or the picture's own part of a block: all but the attention that they share.

    second: attends to itself alone, too. last: is only read, since nothing follows.
    """

    def __init__(self, c: MMDiTConfig, *, second: bool = False, last: bool = False) -> None:
        super().__init__()
        self.modulations = AdaLN(c.width, 1 if last else 2 + second, gated=not last)
        self.attention = Projections(c.width, c.heads, qk_norm=c.qk_norm, out=not last)
        self.second = Projections(c.width, c.heads, qk_norm=c.qk_norm) if second else None
        self.enter = None if last else nn.Linear(c.width, 4 * c.width)
        self.leave = None if last else nn.Linear(4 * c.width, c.width)

    def take(self, x: Tokens, found: Heads, how: list[Modulation]) -> Tokens:
        """What the joint attention found, then the stream's own attention and feed-forward."""
        if self.enter is None or self.leave is None:
            return x
        y = how[0].add(x, self.attention.leave(found))
        if self.second is not None:
            own = attend(*self.second.enter(how[2].adapt(x)))
            y = how[2].add(y, self.second.leave(own))
        h = F.gelu(self.enter(how[1].adapt(y)), approximate="tanh")
        return how[1].add(y, self.leave(h))


class Block(nn.Module):
    """One attention over the tokens of both streams."""

    def __init__(self, c: MMDiTConfig, *, second: bool, last: bool) -> None:
        super().__init__()
        self.text = Stream(c, last=last)
        self.picture = Stream(c, second=second)

    def forward(
        self, text: Context, picture: Tokens, cond: Features | Labels
    ) -> tuple[Context, Tokens]:
        streams, tokens = (self.text, self.picture), (text, picture)
        how = [stream.modulations.read(cond) for stream in streams]
        parts = [
            s.attention.enter(m[0].adapt(x)) for s, x, m in zip(streams, tokens, how, strict=True)
        ]
        q, k, v = (torch.cat(both, dim=2) for both in zip(*parts, strict=True))
        found = attend(q, k, v).split([x.shape[1] for x in tokens], dim=2)
        text, picture = (
            s.take(*rest) for s, *rest in zip(streams, tokens, found, how, strict=True)
        )
        return text, picture


class MMDiT(nn.Module):
    """x of (in_channels, rows, columns), t = 1000 sigma, cond -> the same shape; 0 when fresh.

    cond.tokens: any number of tokens, without a mask. cond.pooled: added to the time.
    """

    places: Tensor
    known: Tensor | None

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.enter = nn.Conv2d(c.in_channels, c.width, c.patch, stride=c.patch)
        places = sinusoidal_grid(c.grid, c.grid, c.width, backwards=True)
        self.register_buffer("places", places[None])
        self.time = TimeEmbedding(256, c.width)
        self.pooled = nn.Sequential(
            nn.Linear(c.pooled_width, c.width), nn.SiLU(), nn.Linear(c.width, c.width)
        )
        self.context = nn.Linear(c.context_width, c.width)
        self.blocks = nn.ModuleList(
            Block(c, second=k < c.second_attention, last=k == c.depth - 1) for k in range(c.depth)
        )
        self.modulation = AdaLN(c.width, branches=1, gated=False)
        self.leave = nn.Linear(c.width, c.patch**2 * c.in_channels)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.register_buffer("known", None, persistent=False)
        self.checkpointing = False

    def forward(self, x: Image, t: Times, cond: Cond, skip: tuple[int, ...] = ()) -> Image:
        """skip: numbers of blocks to leave out, for skip-layer guidance."""
        if cond.tokens is None or cond.pooled is None:
            raise ValueError("mmdit: cond needs tokens and pooled")
        embedding = self.embed(t, cond.pooled)
        patches = self.enter(x.to(self.enter.weight.dtype))
        rows, columns = patches.shape[2:]
        places = self.cropped(rows, columns).to(patches.dtype)
        tokens = patches.flatten(2).mT.contiguous() + places
        text = self.context(cond.tokens.to(self.enter.weight.dtype))
        for number, block in enumerate(self.blocks):
            if number not in skip:
                text, tokens = self._run(block, text, tokens, embedding)
        tokens = self.leave(self.modulation.read(embedding)[0].adapt(tokens))
        side = self.config.patch
        # A token's numbers run over its block's rows, columns, then channels.
        squares = tokens.unflatten(2, (side, side, -1)).unflatten(1, (rows, columns))
        return squares.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def cropped(self, rows: int, columns: int) -> Tokens:
        """The places of a picture of so many patches, which lies in the middle of the grid."""
        side = self.config.grid
        top, left = (side - rows) // 2, (side - columns) // 2
        grid = self.places.unflatten(1, (side, side))
        return grid[:, top : top + rows, left : left + columns].flatten(1, 2)

    def embed(self, t: Times, pooled: Pooled) -> Features | Labels:
        """Time and pooled prompt as one vector, through its SiLU; of a frozen one, its number."""
        if self.known is None:
            return F.silu(self.time(t) + self.pooled(pooled.to(self.enter.weight.dtype)))
        met = (_key(t, pooled)[:, None] == self.known).all(dim=2)
        return torch.where(met.any(dim=1), met.int().argmax(dim=1), len(self.known))

    @torch.no_grad()
    def freeze(self, times: Ladder, pooled: Pooled, weights: Mapping[str, Tensor]) -> None:
        """Compute what each block's norms do at these times for these prompts, once.

        times: of the whole ladder, as forward will get them. pooled: the rows of the batch that
        forward will get; bit-equal where it gets the same, within rounding for some of them. Any
        other time or prompt gives NaN. weights: of this network, by our names, read one by one;
        its own for the adaptive norms, a third of all, are dropped. Again for other prompts.
        """
        self.known = None
        conds = [self.embed(t.expand(len(pooled)), pooled) for t in times]
        for name, layer in self.named_modules():
            if isinstance(layer, AdaLN):
                pair = (weights[f"{name}.linear.{leaf}"] for leaf in ("weight", "bias"))
                # Rounded as the other weights are, which may be stored in fewer bits.
                near = (w.to(self.places, copy=True).to(conds[0]) for w in pair)
                layer.tabulate(conds, *near)
        self.known = torch.cat([_key(t.expand(len(pooled)), pooled) for t in times])

    def _run(
        self, block: nn.Module, text: Context, tokens: Tokens, cond: Features | Labels
    ) -> tuple[Context, Tokens]:
        if self.checkpointing and torch.is_grad_enabled():
            out: tuple[Context, Tokens] = checkpoint(block, text, tokens, cond, use_reentrant=False)
            return out
        return block(text, tokens, cond)


def _key(t: Times, pooled: Pooled) -> Features:
    return torch.cat([t.float()[:, None], pooled.float()], dim=1)
