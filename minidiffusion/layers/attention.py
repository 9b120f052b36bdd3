"""Attention over a sequence, and the transformer block of Stable Diffusion's UNet."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from minidiffusion.shapes import Context, Image, Tokens

Heads = Float[Tensor, "b heads n each"]

ROOM = 2**21
"""Scores in hand at a time: 4 MB of bf16, which caches hold (AMD EPYC, AVX512: 2^20 to 2^22)."""


def attend(
    q: Heads, k: Float[Tensor, "b heads m each"], v: Float[Tensor, "b heads m each"], *,
    causal: bool = False,
) -> Heads:  # fmt: skip
    """Softmax attention (Vaswani et al. 2017, eq. 1); causal: nothing attends to what follows it.

    In bf16 on a CPU the fused kernel is no faster than in fp32, and its backward pass slower
    still: plain steps run at the matrix rate, and in pieces where no gradient needs the whole.
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu" or causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if torch.is_grad_enabled() and any(part.requires_grad for part in (q, k, v)):
        return torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT, dim=-1) @ v
    return _in_pieces(q, k, v)


def _in_pieces(
    q: Heads, k: Float[Tensor, "b heads m each"], v: Float[Tensor, "b heads m each"]
) -> Heads:
    """The same, a few heads or queries at a time, so that their scores never leave the cache."""
    shape, (n, each), m = q.shape[:2], q.shape[2:], k.shape[2]
    # Matrix products like multiples of 16: 1357 tokens take a fifth more time than 1360.
    q = F.pad(q, (0, 0, 0, -n % 16)).flatten(0, 1)
    # e^x = 2^(x log2 e), and powers of 2 are the fastest.
    k = F.pad(k.flatten(0, 1) * (each**-0.5 * math.log2(math.e)), (0, 0, 0, -m % 16)).mT
    # Where features have to be filled up, ones sum the weights by the way.
    v = F.pad(v, (0, -each % 16, 0, -m % 16), value=1.0).flatten(0, 1)
    rows, length = q.shape[1], k.shape[2]
    heads, queries = max(1, ROOM // (rows * length)), max(16, ROOM // length // 16 * 16)
    found = torch.empty(len(q), rows, each, dtype=q.dtype)
    for i in range(0, len(q), heads):
        some = slice(i, i + heads)
        for j in range(0, rows, queries):
            place = found[some, j : j + queries]
            _mean(q[some, j : j + queries], k[some], v[some], m, place)
    return found[:, :n].unflatten(0, shape)


def _mean(
    q: Float[Tensor, "h q each"], k: Float[Tensor, "h each m"], v: Float[Tensor, "h m more"],
    count: int, found: Float[Tensor, "h q each"], *, shifted: bool = False,
) -> None:  # fmt: skip
    """found becomes v's mean by the weights 2^(q k) of the first ``count`` keys.

    bf16 is as exact at 2^90 as at 1, so the usual shift by a row's largest score is spent only
    where a sum would leave its range.
    """
    scores = torch.bmm(q, k)
    scores[..., count:] = -math.inf
    if shifted:
        scores -= scores.amax(dim=-1, keepdim=True)
    total, each = torch.bmm(scores.exp2_(), v), found.shape[2]
    ones = total.shape[2] > each
    sums = total[..., each : each + 1] if ones else scores.sum(dim=-1, keepdim=True)
    if shifted or bool(((sums > 2.0**-100) & (sums < 2.0**100)).all()):
        torch.div(total[..., :each], sums, out=found)
    else:
        _mean(q, k, v, count, found, shifted=True)


def split_heads(x: Tokens, heads: int) -> Heads:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Heads) -> Tokens:
    return x.transpose(1, 2).flatten(2)


class RMSNorm(nn.Module):
    """x over its root mean square, times a weight (Zhang & Sennrich 2019), in the dtype of x."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=self.eps)


class Attention(nn.Module):
    """Multi-head attention of x to itself, or to a context of another width.

    qk_norm: RMS-normalise queries and keys per head, which keeps bf16 training stable
    (Esser et al. 2024, section 5.3.2). causal: no token attends to one that follows it.
    """

    def __init__(
        self, width: int, heads: int, context: int | None = None, *, bias: bool = False,
        qk_norm: bool = False, causal: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if width % heads:
            raise ValueError(f"attention: width {width} is no multiple of {heads} heads")
        self.heads, self.causal = heads, causal
        self.q = nn.Linear(width, width, bias=bias)
        self.kv = nn.Linear(context or width, 2 * width, bias=bias)
        self.out = nn.Linear(width, width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tokens, context: Context | None = None) -> Tokens:
        k, v = self.kv(x if context is None else context).chunk(2, dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in (self.q(x), k, v))
        return self.out(merge_heads(attend(self.q_norm(q), self.k_norm(k), v, causal=self.causal)))


class Projections(nn.Module):
    """What stands around an attention that several sequences share, or that one has to itself.

    Queries, keys and values in one product; no way out of it for a sequence that is only read.
    qk_norm: see Attention.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, out: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width) if out else None

    def enter(self, x: Tokens) -> tuple[Heads, Heads, Heads]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        # Normalised before they are turned to heads: their rows lie closer together.
        q, k, v = (part.transpose(1, 2) for part in (self.q_norm(q), self.k_norm(k), v))
        return q, k, v

    def leave(self, x: Heads) -> Tokens:
        assert self.out is not None
        return self.out(merge_heads(x))


class GatedFeedForward(nn.Module):
    """GEGLU (Shazeer 2020): a linear layer, gated by the GELU of another, and one back."""

    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__()
        self.enter = nn.Linear(width, 2 * ratio * width)
        self.leave = nn.Linear(ratio * width, width)

    def forward(self, x: Tokens) -> Tokens:
        value, gate = self.enter(x).chunk(2, dim=-1)
        return self.leave(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward; normalised before, added after."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = Attention(width, heads)
        self.cross_attention = Attention(width, heads, context)
        self.feed_forward = GatedFeedForward(width)

    def forward(self, x: Tokens, context: Context | None) -> Tokens:
        x = x + self.self_attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), context)
        return x + self.feed_forward(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the places of a feature map (Rombach et al. 2022, appendix E)."""

    def __init__(
        self, width: int, heads: int, context: int, depth: int, groups: int, linear: bool
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        # Stable Diffusion 1 stores these two as 1x1 convolutions, 2 as linear layers.
        self.enter = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, context) for _ in range(depth))
        self.leave = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Image, context: Context | None) -> Image:
        tokens = _project(self.enter, self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        for block in self.blocks:
            tokens = block(tokens, context)
        tokens = _project(self.leave, tokens)
        return x + tokens.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def _project(layer: nn.Module, x: Tokens) -> Float[Tensor, "b n out"]:
    """A linear layer, however its weight is stored: a 1x1 convolution is one too."""
    if not isinstance(layer, nn.Conv2d):
        found: Tensor = layer(x)
        return found
    assert isinstance(layer.weight, Tensor) and isinstance(layer.bias, Tensor)
    return F.linear(x, layer.weight.flatten(1), layer.bias)


class SpatialAttention(nn.Module):
    """Plain self-attention over the places of a feature map (Ho et al. 2020, appendix B)."""

    def __init__(self, width: int, heads: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps)
        self.attention = Attention(width, heads, bias=True)
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(self.attention.out.bias)

    def forward(self, x: Image, context: Context | None = None) -> Image:
        tokens = self.attention(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        return x + tokens.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def pick_heads(width: int, heads: int, head_width: int | None) -> int:
    """The number of heads: as given, or such that each has head_width features."""
    if width % (head_width or heads):
        into = f"heads of {head_width}" if head_width else f"{heads} equal heads"
        raise ValueError(f"attention: {width} channels cannot be split into {into}")
    return width // head_width if head_width else heads
