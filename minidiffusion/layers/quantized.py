"""Linear layers whose weights take one byte each, as int8 or float8, with a scale for each row.

A weight is stored as weight / scale, where scale is its row's largest magnitude over the largest
number of the type. int8 products (Dettmers et al. 2022, section 2.1) also round each token.
"""

import sys
from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn import functional as F

from minidiffusion import device as devices

How = Literal["int8", "int8-dynamic", "fp8"]
Stored = Int8[Tensor, "out enter"] | Float[Tensor, "out enter"]
Scale = Float[Tensor, " out"]

FP8 = torch.float8_e4m3fn
TINY = torch.finfo(torch.float32).tiny
PIECE = 7 * 2**20
"""Numbers in hand at a time: above 32 MB malloc takes fresh pages at every call."""
CACHED = 2**18
"""Numbers that are rounded at a time: 1 MB of float32, which stays in a core's own cache."""
NARROW = 320
"""Layers with fewer features on either side stay: their bytes are few, and no time is gained."""
PER_PICTURE = {"modulation", "modulations", "time", "pooled", "labels", "embed"}
"""Parts of names of layers that see one row a picture: their errors reach every token alike."""


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W = weight * scale[:, None], weight in int8 or float8_e4m3fn.

    Buffers: weight (out, in); scale (out,), float32. bias: as the layer's that it stands for.
    dynamic: int8 only. Where no gradient is wanted, x is rounded to int8 too, each token by its
    own largest magnitude, so no token's result depends on another; on a GPU, and a CPU that is
    fast at it, the product is then one of int8 numbers. Elsewhere, and of other kinds, W is put
    together for each call, a piece at a time. x and y have the same dtype: float32, bfloat16 or
    float16.
    """

    weight: Tensor
    scale: Tensor

    def __init__(
        self, weight: Stored, scale: Scale, bias: Scale | None = None, *, dynamic: bool = False
    ) -> None:
        super().__init__()
        if weight.dtype not in (torch.int8, FP8) or (dynamic and weight.dtype != torch.int8):
            wanted = "int8" if dynamic else "int8 or float8_e4m3fn"
            raise ValueError(f"quantized weights: must be {wanted}, got {weight.dtype}")
        if weight.dtype == FP8 and not weight.is_meta and _has_nan(weight):
            raise ValueError("quantized weights: one is not a number")
        self.out_features, self.in_features = weight.shape
        self.dynamic = dynamic
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.float())
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @staticmethod
    def of(layer: nn.Linear, how: How) -> "QuantizedLinear":
        """The layer with its weight rounded; of one on the meta device, the shapes.

        Raises ValueError for weights that are not finite.
        """
        bias = None if layer.bias is None else layer.bias.detach()
        pair = divided(layer.weight.detach(), FP8 if how == "fp8" else torch.int8)
        return QuantizedLinear(*pair, bias, dynamic=how == "int8-dynamic")

    def forward(self, x: Float[Tensor, "*b enter"]) -> Float[Tensor, "*b out"]:
        if self.dynamic and not torch.is_grad_enabled() and _multiplies_int8(x, self.weight):
            out = self._by_int8(x.reshape(-1, self.in_features))
            return out.view(*x.shape[:-1], self.out_features)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        count = rows_at_once(x, PIECE, self.in_features)
        if count >= self.out_features:
            return F.linear(x, restored(self.weight, self.scale, x.dtype), bias)
        pairs = zip(self.weight.split(count), self.scale.split(count), strict=True)
        out = torch.cat([F.linear(x, restored(*pair, x.dtype)) for pair in pairs], dim=-1)
        return out if bias is None else out + bias

    def _by_int8(self, x: Float[Tensor, "n enter"]) -> Float[Tensor, "n out"]:
        """Products summed in int32, times both scales."""
        wide = _wide(x.dtype)
        scale = self.scale.to(wide)
        bias = scale.new_zeros(()) if self.bias is None else self.bias.to(wide)
        out = x.new_empty(len(x), self.out_features)
        count = rows_at_once(x, PIECE, self.out_features)
        for piece, room in zip(x.split(count), out.split(count), strict=True):
            whole, each = rounded(piece)
            sums = torch._int_mm(whole, self.weight.T).to(wide)
            torch.addcmul(bias, sums.mul_(scale), each.to(wide), out=room)
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """To a device, not to a dtype: float8 would be cast like every floating-point buffer."""
        weight, scale = self.weight, self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        if self.weight.dtype != weight.dtype or self.scale.dtype != scale.dtype:
            self.weight, self.scale = (part.to(self.weight.device) for part in (weight, scale))
        return self

    def extra_repr(self) -> str:
        kind = f"{self.weight.dtype}".removeprefix("torch.") + ", dynamic" * self.dynamic
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, {bias=}, {kind}"


def divided(weight: Float[Tensor, "out enter"], kind: torch.dtype) -> tuple[Stored, Scale]:
    """A weight over its scale as int8 or float8, and the scale of each row.

    Raises ValueError for a weight that is not finite.
    """
    if weight.is_meta:  # on which torch imports its compiler to take an absolute value
        return torch.empty_like(weight, dtype=kind), weight.new_empty(len(weight)).float()
    stored, scale = rounded(weight, kind)
    if not bool(scale.isfinite().all()):
        raise ValueError("a weight is not a finite number")
    return stored, scale.flatten()


def rounded(
    x: Float[Tensor, "n enter"], kind: torch.dtype = torch.int8
) -> tuple[Stored, Float[Tensor, "n 1"]]:
    """Numbers up to the largest of the type, and a scale for each row; not finite where it is not.

    A few rows at a time.
    """
    most = 127 if kind == torch.int8 else torch.finfo(kind).max
    whole = torch.empty_like(x, dtype=kind)
    scale = x.new_empty(len(x), 1, dtype=torch.float32)
    pieces = (part.split(rows_at_once(x, CACHED, x.shape[1])) for part in (x, whole, scale))
    for piece, room, each in zip(*pieces, strict=True):
        piece = piece.to(torch.float32, copy=True)
        each.copy_(piece.abs().amax(dim=1, keepdim=True) / most).clamp_(min=TINY)
        piece.div_(each)
        room.copy_(piece.round_() if kind == torch.int8 else piece)
    return whole, scale


def restored(weight: Stored, scale: Scale, dtype: torch.dtype) -> Float[Tensor, "out enter"]:
    """The weight that was stored, in this dtype."""
    if weight.dtype == FP8 and weight.device.type == "cpu":
        # torch casts number by number there; as bits it is eight times faster. The same bits lie
        # in a bfloat16 at the same places, but for an exponent that counts from 127, not from 7.
        bits = (weight.view(torch.int8).to(torch.int16) << 4).bitwise_and_(-0x7810)
        weight = bits.view(torch.bfloat16).mul_(2.0**120)
    wide = _wide(dtype)
    return weight.to(wide).mul_(scale[:, None].to(wide)).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What scales are multiplied in: int32 sums are out of float16's range."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def rows_at_once(x: Tensor, numbers: int, length: int) -> int:
    """How many rows of this length to have in hand; all of them but on a CPU."""
    return max(1, numbers // length) if x.device.type == "cpu" else sys.maxsize


def _multiplies_int8(x: Tensor, weight: Tensor) -> bool:
    """Whether the hardware has products of int8, and torch has them for such sizes."""
    if x.device.type == "cpu":
        return devices.multiplies_fast(torch.int8, x.device)
    return x.is_cuda and x.numel() > 16 * x.shape[-1] and not any(n % 8 for n in weight.shape)


def _has_nan(weight: Tensor) -> bool:
    """Of float8: all bits of the number set, with either sign."""
    signs = (torch.int8, 127), (torch.uint8, 255)
    return any(weight.view(dtype).amax() == nan for dtype, nan in signs)


def sensitive(name: str, layer: nn.Linear) -> bool:
    """Whether a layer stays as it is: narrow ones, and those that see one row a picture."""
    narrow = min(layer.in_features, layer.out_features) < NARROW
    return narrow or not PER_PICTURE.isdisjoint(name.split("."))


def quantize_(
    module: nn.Module, how: How, skip: Callable[[str, nn.Linear], bool] = sensitive
) -> None:
    """Put a QuantizedLinear in place of each linear layer inside a module, one after the other.

    Measured on normal numbers, 1536 features and more, beside bf16 on an AMD EPYC with AVX512 and
    VNNI: int8 moves a layer's output by .9 % at .9 to 1 times the speed; int8-dynamic by 1.2 % at
    1.6 to 1.9 times; fp8 by 2.6 % at .8 to .9. skip: which layers stay, by name. Adapters are to be
    merged first. Raises ValueError for an unknown kind, a layer with an adapter, or a weight that
    is not finite.
    """
    if how not in get_args(How):
        raise ValueError(f"quantize: unknown kind {how!r}; allowed: {', '.join(get_args(How))}")
    names = [
        name
        for name, layer in module.named_modules()
        if name and type(layer) is nn.Linear and not skip(name, layer)
    ]
    for name in names:
        if any(module.get_submodule(name).children()):
            raise ValueError(f"quantize: {name} has an adapter; merge it first")
    for name in names:  # no list of layers, which would hold all their weights to the end
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        try:
            module.set_submodule(name, QuantizedLinear.of(layer, how))
        except ValueError as error:
            raise ValueError(f"quantize: {name}: {error}") from None
