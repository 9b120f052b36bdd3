"""A small perceptron for points of the plane: the whole of diffusion in a second of training."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn
from torch.nn import functional as F

from minidiffusion.layers.embeddings import LabelEmbedding, TimeEmbedding
from minidiffusion.shapes import Cond, Features, Times


@dataclass(frozen=True)
class MLPConfig:
    """Sizes of a residual perceptron: points of in_channels numbers, depth blocks of width."""

    name: ClassVar[str] = "mlp"
    in_channels: int = field(default=2, metadata={"min": 1, "max": 2**16})
    width: int = field(default=128, metadata={"min": 2, "max": 2**16})
    depth: int = field(default=4, metadata={"min": 1, "max": 2**10})
    classes: int = field(default=0, metadata={"min": 0, "max": 2**24})

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless points of this shape fit."""
        if tuple(shape) != (self.in_channels,):
            raise ValueError(f"this mlp takes ({self.in_channels},), got {tuple(shape)}")


class MLP(nn.Module):
    """x of (in_channels,), t, cond -> the same shape."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        c = self.config = config
        self.enter = nn.Linear(c.in_channels, c.width)
        self.time = TimeEmbedding(c.width // 2 * 2, c.width)
        self.labels = LabelEmbedding(c.classes, c.width) if c.classes else None
        self.blocks = nn.ModuleList(nn.Linear(c.width, c.width) for _ in range(c.depth))
        self.leave = nn.Linear(c.width, c.in_channels)
        self.checkpointing = False

    def forward(self, x: Features, t: Times, cond: Cond) -> Features:
        embedding = self.time(t)
        if self.labels is not None:
            embedding = embedding + self.labels(cond.labels, len(t))
        h = self.enter(x.to(embedding.dtype))
        for block in self.blocks:
            h = h + F.silu(block(h + embedding))
        return self.leave(h)
