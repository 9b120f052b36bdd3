"""The diffusion transformer (Peebles & Xie 2023): patches as tokens, conditioning by adaLN-zero."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minidiffusion.layers.attention import Attention
from minidiffusion.layers.embeddings import LabelEmbedding, TimeEmbedding, sinusoidal_grid
from minidiffusion.layers.modulation import AdaLN, Modulation
from minidiffusion.shapes import Cond, Features, Image, Times, Tokens

PRESETS: dict[str, tuple[int, int, int]] = {
    "tiny": (192, 6, 6),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
"""Width, depth and heads of each preset; S to XL are the paper's table 1."""


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a diffusion transformer.

    size: a preset; width, depth and heads override it one by one. patch: side of a token's block
    of pixels. rows, columns: of the picture. classes: 0 for none. qk_norm: see Attention.
    """

    name: ClassVar[str] = "dit"
    in_channels: int = field(default=1, metadata={"min": 1, "max": 2**16})
    rows: int = field(default=28, metadata={"min": 1, "max": 2**14})
    columns: int = field(default=28, metadata={"min": 1, "max": 2**14})
    size: Literal["tiny", "S", "B", "L", "XL"] = "tiny"
    width: int | None = field(default=None, metadata={"min": 4, "max": 2**16})
    depth: int | None = field(default=None, metadata={"min": 1, "max": 2**10})
    heads: int | None = field(default=None, metadata={"min": 1, "max": 2**16})
    patch: int = field(default=2, metadata={"min": 1, "max": 2**8})
    classes: int = field(default=0, metadata={"min": 0, "max": 2**24})
    qk_norm: bool = True

    def __post_init__(self) -> None:
        width, _, heads = self.sizes
        if width % heads:
            raise ValueError(f"width: {width} is no multiple of heads = {heads}")
        if width % 4:
            raise ValueError(f"width: must be a multiple of 4, got {width}")
        if self.rows % self.patch or self.columns % self.patch:
            raise ValueError(
                f"patch: {self.patch} does not divide rows = {self.rows}, columns = {self.columns}"
            )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Width, depth, heads."""
        width, depth, heads = PRESETS[self.size]
        return self.width or width, self.depth or depth, self.heads or heads

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless pictures of this shape (channels, rows, columns) fit."""
        wanted = (self.in_channels, self.rows, self.columns)
        if tuple(shape) != wanted:
            raise ValueError(f"this dit takes {wanted}, got {tuple(shape)}")


class Block(nn.Module):
    """Self-attention and a feed-forward, each modulated by the condition."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.modulations = AdaLN(width, branches=2)
        self.attention = Attention(width, heads, bias=True, qk_norm=qk_norm)
        self.enter = nn.Linear(width, 4 * width)
        self.leave = nn.Linear(4 * width, width)

    def forward(self, x: Tokens, cond: Features) -> Tokens:
        first, second = self.modulations(cond)
        x = x + first.leave(self.attention(first.enter(x)))
        h = F.gelu(self.enter(second.enter(x)), approximate="tanh")
        return x + second.leave(self.leave(h))


class DiT(nn.Module):
    """x of (in_channels, rows, columns), t, cond -> the same shape; exactly 0 when fresh."""

    places: torch.Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        c = self.config = config
        width, depth, heads = c.sizes
        self.enter = nn.Linear(c.in_channels * c.patch**2, width)
        grid = sinusoidal_grid(c.rows // c.patch, c.columns // c.patch, width)
        self.register_buffer("places", grid)
        self.time = TimeEmbedding(256, width)
        self.labels = LabelEmbedding(c.classes, width) if c.classes else None
        self.blocks = nn.ModuleList(Block(width, heads, c.qk_norm) for _ in range(depth))
        self.modulation = AdaLN(width, branches=1)
        self.leave = nn.Linear(width, c.in_channels * c.patch**2)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.checkpointing = False

    def forward(self, x: Image, t: Times, cond: Cond) -> Image:
        embedding = self.time(t)
        if self.labels is not None:
            embedding = embedding + self.labels(cond.labels, len(t))
        tokens = self.enter(self._patches(x.to(embedding.dtype))) + self.places.to(embedding.dtype)
        for block in self.blocks:
            tokens = self._run(block, tokens, embedding)
        final: Modulation = self.modulation(embedding)[0]
        return self._picture(self.leave(final.enter(tokens)))

    def _patches(self, x: Image) -> Tokens:
        return F.pixel_unshuffle(x, self.config.patch).flatten(2).transpose(1, 2)

    def _picture(self, tokens: Tokens) -> Image:
        side = self.config.rows // self.config.patch
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, -1)), self.config.patch)

    def _run(self, block: nn.Module, tokens: Tokens, embedding: Features) -> Tokens:
        if self.checkpointing and torch.is_grad_enabled():
            out: Tokens = checkpoint(block, tokens, embedding, use_reentrant=False)
            return out
        return block(tokens, embedding)
