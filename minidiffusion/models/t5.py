"""T5's text encoder, version 1.1 (Raffel et al. 2020, Shazeer 2020): Stable Diffusion 3's third.

It sees the padding: as in the reference, no mask keeps a token from attending to it.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from minidiffusion.layers.attention import ROOM, Heads, RMSNorm, merge_heads, split_heads
from minidiffusion.shapes import Tokens

Bias = Float[Tensor, "heads n n"]
HEADROOM = 64.0
"""In float16 the widest product is made so much smaller: XXL's leave its range now and then."""


@dataclass(frozen=True)
class T5Config:
    """Sizes of a text encoder; those of XXL unless given.

    buckets: kinds of distances between tokens, half of them for each direction. distance: from
    here on all distances are one kind. norm_eps: added to the mean square in every norm.
    """

    name: ClassVar[str] = "t5"
    vocabulary: int = field(default=32128, metadata={"min": 1})
    width: int = field(default=4096, metadata={"min": 1})
    layers: int = field(default=24, metadata={"min": 1})
    heads: int = field(default=64, metadata={"min": 1})
    head_width: int = field(default=64, metadata={"min": 1})
    feed_forward: int = field(default=10240, metadata={"min": 1})
    buckets: int = field(default=32, metadata={"min": 4})
    distance: int = field(default=128, metadata={"min": 2})
    norm_eps: float = field(default=1e-6, metadata={"min": 0})

    def __post_init__(self) -> None:
        if self.buckets % 2:
            raise ValueError(f"buckets: must be even, got {self.buckets}")
        if self.distance <= self.buckets // 4:
            least = self.buckets // 4
            raise ValueError(f"distance: must be above {least}, a quarter of buckets")


def bucket(distances: Int[Tensor, " n"], buckets: int, furthest: int) -> Int[Tensor, " n"]:
    """The kind of each distance, of what is attended to minus what attends.

    Kinds of small distances are exact, those of larger ones grow with the logarithm, in float32 as
    in the reference: its rounding decides where they begin.
    """
    half = buckets // 2
    exact, far = half // 2, distances.abs()
    grown = torch.log(far.float() / exact) / math.log(furthest / exact) * (half - exact)
    # The logarithm of no distance is infinite, and no integer; it is not looked at.
    kinds = torch.where(far < exact, far, exact + grown.clamp(0, half - exact - 1).long())
    return kinds + half * (distances > 0)


def attend(q: Heads, k: Heads, v: Heads, bias: Bias) -> Heads:
    """Softmax attention without the usual scale, with a bias for each head and pair of places.

    In bf16 on a CPU, where no gradient is wanted: matrix products of a few heads, whose scores the
    caches hold (at 256 tokens and 64 heads, AMD EPYC with AVX512: 10 ms against 17 ms of the
    fused kernel).
    """
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, bias))
    if learning or q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=1.0)
    count = max(1, ROOM // bias[0].numel())
    found = torch.empty_like(v, memory_format=torch.contiguous_format)
    for row in range(len(q)):
        for start in range(0, len(bias), count):
            part = slice(start, start + count)
            q_, k_, v_ = (x[row, part].contiguous() for x in (q, k, v))
            scores = torch.baddbmm(bias[part], q_, k_.mT)
            torch.bmm(torch.softmax(scores, dim=-1), v_, out=found[row, part])
    return found


class T5Block(nn.Module):
    """Self-attention and a gated perceptron; normalised before, added after."""

    def __init__(self, c: T5Config) -> None:
        super().__init__()
        self.heads, inner = c.heads, c.heads * c.head_width
        self.norm1 = RMSNorm(c.width, c.norm_eps)
        self.qkv = nn.Linear(c.width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, c.width, bias=False)
        self.norm2 = RMSNorm(c.width, c.norm_eps)
        self.enter = nn.Linear(c.width, 2 * c.feed_forward, bias=False)
        self.leave = nn.Linear(c.feed_forward, c.width, bias=False)

    def forward(self, x: Tokens, bias: Bias) -> Tokens:
        qkv = self.qkv(self.norm1(x).to(bias.dtype)).chunk(3, dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in qkv)
        x = x + self.out(merge_heads(attend(q, k, v, bias.to(q.dtype))))
        gate, value = self.enter(self.norm2(x).to(bias.dtype)).chunk(2, dim=-1)
        hidden = F.gelu(gate, approximate="tanh") * value
        if hidden.dtype != torch.float16:
            return x + self.leave(hidden)
        return x + self.leave(hidden / HEADROOM).float() * HEADROOM


class T5Encoder(nn.Module):
    """Token numbers (b, n), n as long as memory allows -> a vector for each token, (b, n, width).

    Norms take their statistics in float32. In bf16 nothing can overflow; in float16 what goes from
    block to block is float32, as in transformers, which keeps the last matrix of each in float32:
    here it is float16, and its product scaled. The result has the weights' dtype.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        c = self.config = config
        self.tokens = nn.Embedding(c.vocabulary, c.width)
        self.places = nn.Embedding(c.buckets, c.heads)
        self.blocks = nn.ModuleList(T5Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, c.norm_eps)

    def bias(self, length: int) -> Bias:
        """What is added to the scores of every block: of each head, from place to place."""
        distances = torch.arange(1 - length, length, device="cpu")
        kinds = bucket(distances, self.config.buckets, self.config.distance)
        rows = self.places.weight.T[:, kinds.to(self.places.weight.device)]
        # From place i to j the distance is j - i: window n - 1 - i of all distances, element j.
        return rows.unfold(1, length, 1).flip(1)

    def forward(self, ids: Int[Tensor, "b n"]) -> Tokens:
        x, bias = self.tokens(ids), self.bias(ids.shape[1])
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x).to(bias.dtype)
