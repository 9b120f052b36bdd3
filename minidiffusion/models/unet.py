"""The UNet, from 28-pixel toys to Stable Diffusion by one config.

Down a few levels, through the middle, up again with what each level left behind. Ho et al. 2020
built it for DDPM; Rombach et al. 2022 let its feature maps attend to a prompt.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minidiffusion.layers.attention import SpatialAttention, SpatialTransformer, pick_heads
from minidiffusion.layers.convolution import Downsample, ResBlock, Size, Upsample, silu, zeroed
from minidiffusion.layers.embeddings import LabelEmbedding, TimeEmbedding
from minidiffusion.shapes import Cond, Context, FeatureMap, Features, Image, Times


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet.

    in_channels, out_channels: of the picture or latent (out: as in, unless given).
    channels, multipliers: width of the first level, and each level's multiple of it.
    blocks: residual blocks a level. attention: attention depth a level, 0 for none.
    heads, head_width: so many heads, or heads so wide. context_width: of the tokens to attend to;
    None gives plain self-attention. classes, pooled_width: class or vector conditioning.
    patch: side of the pixel blocks folded into channels. scale_shift: see ResBlock.
    norm_eps: added to the variance in the residual blocks' norms and the last one.
    """

    name: ClassVar[str] = "unet"
    in_channels: int = field(default=1, metadata={"min": 1, "max": 2**16})
    out_channels: int | None = field(default=None, metadata={"min": 1, "max": 2**16})
    channels: int = field(default=64, metadata={"min": 1, "max": 2**16})
    multipliers: tuple[int, ...] = field(default=(1, 2), metadata={"min": 1, "max": 2**6})
    blocks: int = field(default=2, metadata={"min": 1, "max": 2**6})
    attention: tuple[int, ...] = field(default=(0, 1), metadata={"min": 0, "max": 2**6})
    middle_attention: int = field(default=1, metadata={"min": 0, "max": 2**6})
    heads: int = field(default=4, metadata={"min": 1, "max": 2**16})
    head_width: int | None = field(default=None, metadata={"min": 1, "max": 2**16})
    context_width: int | None = field(default=None, metadata={"min": 1, "max": 2**16})
    linear_projections: bool = False
    classes: int = field(default=0, metadata={"min": 0, "max": 2**24})
    pooled_width: int | None = field(default=None, metadata={"min": 1, "max": 2**16})
    patch: int = field(default=1, metadata={"min": 1, "max": 2**8})
    scale_shift: bool = False
    groups: int = field(default=32, metadata={"min": 1, "max": 2**16})
    dropout: float = field(default=0.0, metadata={"min": 0, "max": 1})
    norm_eps: float = field(default=1e-5, metadata={"min": 0})

    def __post_init__(self) -> None:
        levels = len(self.multipliers)
        if not 1 <= levels <= 16 or len(self.attention) != levels:
            raise ValueError(
                f"attention: one depth a level, 1 to 16 levels; got {len(self.attention)} for "
                f"{levels} multipliers"
            )
        if self.channels % 2:
            raise ValueError(f"channels: must be even, got {self.channels}")
        for width in (self.channels, *self.widths):
            if width < 1 or width % self.groups:
                raise ValueError(f"channels: {width} is no multiple of groups = {self.groups}")
        depths = (*self.attention, self.middle_attention)
        for width, depth in zip((*self.widths, self.widths[-1]), depths, strict=True):
            if depth:
                pick_heads(width, self.heads, self.head_width)

    @property
    def widths(self) -> list[int]:
        return [self.channels * multiplier for multiplier in self.multipliers]

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless pictures of this shape (channels, rows, columns) fit."""
        ends = any(n < 1 or n % self.patch for n in shape[1:])
        if len(shape) != 3 or shape[0] != self.in_channels or ends:
            raise ValueError(
                f"this unet takes ({self.in_channels}, rows, columns) with rows and columns "
                f"multiples of {self.patch}, got {tuple(shape)}"
            )


class Stage(nn.Module):
    """A residual block, attention where the level has it, and a change of size where it ends."""

    def __init__(self, c: UNetConfig, enter: int, leave: int, depth: int, resize: bool) -> None:
        super().__init__()
        self.block = ResBlock(
            enter, leave, 4 * c.channels, c.groups, scale_shift=c.scale_shift, dropout=c.dropout,
            eps=c.norm_eps,
        )  # fmt: skip
        self.attention = _attention(c, leave, depth) if depth else None
        self.upsample = Upsample(leave) if resize else None

    def forward(
        self, x: Image, embedding: Features, context: Context | None, size: Size | None = None
    ) -> FeatureMap:
        """size: rows and columns that come next; half of an odd number was rounded up."""
        x = self.block(x, embedding)
        if self.attention is not None:
            x = self.attention(x, context)
        return x if self.upsample is None else self.upsample(x, size)


def _attention(c: UNetConfig, width: int, depth: int) -> nn.Module:
    heads = pick_heads(width, c.heads, c.head_width)
    if c.context_width is None:
        return SpatialAttention(width, heads, c.groups)
    return SpatialTransformer(width, heads, c.context_width, depth, c.groups, c.linear_projections)


def _perceptron(enter: int, leave: int) -> nn.Module:
    return nn.Sequential(nn.Linear(enter, leave), nn.SiLU(), nn.Linear(leave, leave))


class UNet(nn.Module):
    """x of (in_channels, rows, columns), t, cond -> (out_channels, rows, columns)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        c = self.config = config
        width, embedding, fold = c.channels, 4 * c.channels, c.patch**2
        self.time = TimeEmbedding(width, embedding)
        self.labels = LabelEmbedding(c.classes, embedding) if c.classes else None
        self.pooled = _perceptron(c.pooled_width, embedding) if c.pooled_width else None
        self.enter = nn.Conv2d(c.in_channels * fold, width, 3, padding=1)
        self.down, widths = self._build_down()
        width = widths[-1]
        self.middle = nn.ModuleList([
            Stage(c, width, width, c.middle_attention, resize=False),
            Stage(c, width, width, 0, resize=False),
        ])  # fmt: skip
        self.up = self._build_up(widths)
        self.norm = nn.GroupNorm(c.groups, c.widths[0], c.norm_eps)
        out = c.in_channels if c.out_channels is None else c.out_channels
        self.leave = zeroed(nn.Conv2d(c.widths[0], out * fold, 3, padding=1))
        self.checkpointing = False

    def _build_down(self) -> tuple[nn.ModuleList, list[int]]:
        """The way down, and the width of each feature map that it leaves for the way up."""
        c, stages, widths = self.config, nn.ModuleList(), [self.config.channels]
        for level, (width, depth) in enumerate(zip(c.widths, c.attention, strict=True)):
            for _ in range(c.blocks):
                stages.append(Stage(c, widths[-1], width, depth, resize=False))
                widths.append(width)
            if level < len(c.widths) - 1:
                stages.append(Downsample(width))
                widths.append(width)
        return stages, widths

    def _build_up(self, widths: list[int]) -> nn.ModuleList:
        c, stages, skips, enter = self.config, nn.ModuleList(), list(widths), widths[-1]
        for level in reversed(range(len(c.widths))):
            for k in range(c.blocks + 1):
                resize = level > 0 and k == c.blocks
                width = c.widths[level]
                stages.append(Stage(c, enter + skips.pop(), width, c.attention[level], resize))
                enter = width
        return stages

    def embed(self, t: Times, cond: Cond) -> Features:
        """Time, class and pooled vector as one vector, through its SiLU."""
        embedding = self.time(t)
        if self.labels is not None:
            embedding = embedding + self.labels(cond.labels, len(t))
        if self.pooled is not None and cond.pooled is not None:
            embedding = embedding + self.pooled(cond.pooled.to(embedding.dtype))
        return F.silu(embedding)

    def forward(self, x: Image, t: Times, cond: Cond) -> Float[Tensor, "b out h w"]:
        x = x if cond.concat is None else torch.cat([x, cond.concat], dim=1)
        x = x.to(self.enter.weight.dtype)
        embedding = self.embed(t, cond)
        context = None if cond.tokens is None else cond.tokens.to(x.dtype)
        h = self.enter(F.pixel_unshuffle(x, self.config.patch))
        skips = [h]
        for stage in self.down:
            h = self._run(stage, h, embedding, context)
            skips.append(h)
        for stage in self.middle:
            h = self._run(stage, h, embedding, context)
        for stage in self.up:
            h = torch.cat([h, skips.pop()], dim=1)
            size = skips[-1].shape[2:] if skips else None
            h = self._run(stage, h, embedding, context, size)
        return F.pixel_shuffle(self.leave(silu(self.norm(h))), self.config.patch)

    def _run(self, stage: nn.Module, h: Image, *more: Tensor | Size | None) -> FeatureMap:
        if self.checkpointing and torch.is_grad_enabled():
            out: FeatureMap = checkpoint(stage, h, *more, use_reentrant=False)
            return out
        return stage(h, *more)
