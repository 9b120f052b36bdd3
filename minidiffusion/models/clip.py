"""CLIP's text encoder (Radford et al. 2021): token numbers become vectors to attend to.

Stable Diffusion 1 uses the small one (L), 2 OpenCLIP's H, XL and 3 add OpenCLIP's bigG: one
transformer, three configs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from minidiffusion.layers.attention import Attention
from minidiffusion.shapes import Features, Image, Tokens

Ids = Int[Tensor, "b n"]


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a text encoder.

    positions: the longest text. activation: quick_gelu is OpenAI's approximation, gelu OpenCLIP's
    exact function. projection: width of the pooled vector; None leaves it as the last layer made
    it. skip: so many last layers the tokens do without. final_norm: the tokens pass the final norm.
    norm_eps: added to the variance in every norm.
    """

    name: ClassVar[str] = "clip"
    vocabulary: int = field(default=49408, metadata={"min": 1, "max": 2**24})
    positions: int = field(default=77, metadata={"min": 1, "max": 2**16})
    width: int = field(default=768, metadata={"min": 1, "max": 2**16})
    layers: int = field(default=12, metadata={"min": 1, "max": 2**10})
    heads: int = field(default=12, metadata={"min": 1, "max": 2**16})
    feed_forward: int = field(default=3072, metadata={"min": 1, "max": 2**16})
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection: int | None = field(default=None, metadata={"min": 1, "max": 2**16})
    skip: int = field(default=0, metadata={"min": 0})
    final_norm: bool = True
    norm_eps: float = field(default=1e-5, metadata={"min": 0})

    def __post_init__(self) -> None:
        if self.skip >= self.layers:
            raise ValueError(f"skip: must be below layers = {self.layers}, got {self.skip}")


@dataclass(frozen=True)
class PictureConfig:
    """Sizes of a picture encoder. size: of its pictures, patch: of their squares, in pixels."""

    size: int = field(default=64, metadata={"min": 1, "max": 2**16})
    patch: int = field(default=8, metadata={"min": 1, "max": 2**8})
    width: int = field(default=192, metadata={"min": 1, "max": 2**16})
    layers: int = field(default=4, metadata={"min": 1, "max": 2**10})
    heads: int = field(default=3, metadata={"min": 1, "max": 2**16})
    feed_forward: int = field(default=768, metadata={"min": 1, "max": 2**16})
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection: int = field(default=256, metadata={"min": 1, "max": 2**16})

    def __post_init__(self) -> None:
        if self.size % self.patch:
            raise ValueError(f"size: {self.size} is no multiple of patch = {self.patch}")


class Encoded(NamedTuple):
    """A text as a network sees it: a vector for each token, and one for the whole."""

    tokens: Tokens
    pooled: Features


def quick_gelu(x: Tokens) -> Tokens:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tokens], Tokens]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class CLIPBlock(nn.Module):
    """Self-attention and a perceptron; normalised before, added after. A text's is causal."""

    def __init__(
        self, c: "CLIPConfig | PictureConfig", *, causal: bool = True, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[c.activation]
        self.norm1 = nn.LayerNorm(c.width, eps)
        self.attention = Attention(c.width, c.heads, bias=True, causal=causal)
        self.norm2 = nn.LayerNorm(c.width, eps)
        self.enter = nn.Linear(c.width, c.feed_forward)
        self.leave = nn.Linear(c.feed_forward, c.width)

    def forward(self, x: Tokens) -> Tokens:
        x = x + self.attention(self.norm1(x))
        return x + self.leave(self.activation(self.enter(self.norm2(x))))


class CLIPText(nn.Module):
    """Token numbers (b, n), n at most config.positions -> Encoded.

    The pooled vector is the last layer's, at each text's first token of the highest number: CLIP's
    end of text has the highest number of all.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        c = self.config = config
        self.tokens = nn.Embedding(c.vocabulary, c.width)
        self.places = nn.Embedding(c.positions, c.width)
        self.blocks = nn.ModuleList(CLIPBlock(c, eps=c.norm_eps) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width, c.norm_eps)
        self.projection = nn.Linear(c.width, c.projection, bias=False) if c.projection else None

    def forward(self, ids: Ids) -> Encoded:
        if ids.shape[1] > self.config.positions:
            raise ValueError(f"text: {ids.shape[1]} tokens, at most {self.config.positions}")
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        kept = x
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if number == self.config.layers - self.config.skip:
                kept = x
        last = self.norm(x)
        ends = last[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)]
        pooled = self.projection(ends) if self.projection is not None else ends
        if not self.config.final_norm:
            return Encoded(kept, pooled)
        return Encoded(self.norm(kept) if self.config.skip else last, pooled)


class CLIPPicture(nn.Module):
    """Pictures (b, 3, size, size) in [-1, 1] -> a vector each (b, projection): a vision transformer
    (Dosovitskiy et al. 2021), read off at its class token."""

    def __init__(self, config: PictureConfig) -> None:
        super().__init__()
        c = self.config = config
        self.enter = nn.Conv2d(3, c.width, c.patch, stride=c.patch, bias=False)
        self.whole = nn.Parameter(torch.empty(c.width))
        nn.init.normal_(self.whole, std=c.width**-0.5)
        self.places = nn.Embedding(1 + (c.size // c.patch) ** 2, c.width)
        self.norm1 = nn.LayerNorm(c.width)
        self.blocks = nn.ModuleList(CLIPBlock(c, causal=False) for _ in range(c.layers))
        self.norm2 = nn.LayerNorm(c.width)
        self.projection = nn.Linear(c.width, c.projection, bias=False)

    def forward(self, image: Image) -> Features:
        if tuple(image.shape[2:]) != (self.config.size, self.config.size):
            raise ValueError(f"picture: {self.config.size} pixels a side, got {image.shape[2:]}")
        x = self.enter(image).flatten(2).mT
        x = torch.cat([self.whole.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = self.norm1(x + self.places.weight)
        for block in self.blocks:
            x = block(x)
        return self.projection(self.norm2(x[:, 0]))
