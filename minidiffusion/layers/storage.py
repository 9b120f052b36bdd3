"""Layers whose weights take 16 bits each but which compute in float32, where that is faster.

A processor without a unit for bfloat16 multiplies it up to 500 times slower than float32. There
each layer casts its weight when it is called, so that one such copy lives at a time. Results are
equal, to the bit, to those of a float32 network with the same rounded weights.
"""

import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from minidiffusion import device as devices
from minidiffusion.layers.attention import RMSNorm
from minidiffusion.layers.quantized import PIECE, QuantizedLinear, rows_at_once

UNIT = 64
"""Pieces of a multiple of so many rows leave every bit of a product as it is."""


class _Stored(nn.Module):
    """Whoever reads a parameter gets it in float32; it is saved, moved and counted as stored."""

    weight: Any = property(lambda layer: layer.in_float32("weight"))
    bias: Any = property(lambda layer: layer.in_float32("bias"))

    def in_float32(self, name: str) -> Tensor | None:
        found = self._parameters[name]
        return None if found is None else found.float()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Without torch's look at the attribute that was there, which would be cast."""
        self._parameters[name] = param


class StoredLinear(_Stored, nn.Linear):
    """A large weight is cast a piece at a time, for which see `quantized.PIECE`."""

    def forward(self, x: Float[Tensor, "*b enter"]) -> Float[Tensor, "*b out"]:
        count = max(UNIT, rows_at_once(x, PIECE, self.in_features) // UNIT * UNIT)
        weight, bias = self._parameters["weight"], self.bias
        assert weight is not None
        if count >= self.out_features:
            return F.linear(x, weight.float(), bias)
        pieces = weight.split(count)
        biases = [None] * len(pieces) if bias is None else bias.split(count)
        outs = [F.linear(x, w.float(), b) for w, b in zip(pieces, biases, strict=True)]
        return torch.cat(outs, dim=-1)


class StoredEmbedding(_Stored, nn.Embedding):
    """Casts the rows that are looked up, not the table."""

    def forward(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b width"]:
        weight = self._parameters["weight"]
        assert weight is not None
        return F.embedding(ids, weight).float()


class StoredConv2d(_Stored, nn.Conv2d): ...


class StoredGroupNorm(_Stored, nn.GroupNorm): ...


class StoredLayerNorm(_Stored, nn.LayerNorm): ...


class StoredRMSNorm(_Stored, RMSNorm): ...


STORED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: StoredLinear,
    nn.Embedding: StoredEmbedding,
    nn.Conv2d: StoredConv2d,
    nn.GroupNorm: StoredGroupNorm,
    nn.LayerNorm: StoredLayerNorm,
    RMSNorm: StoredRMSNorm,
}


def compute_in_float32_(network: nn.Module) -> None:
    """Every layer of the network casts its weights when it is called; the weights stay."""
    for layer in network.modules():
        layer.__class__ = STORED.get(type(layer), type(layer))


def store_slow_weights_(network: nn.Module, device: torch.device) -> None:
    """`compute_in_float32_` where the device multiplies what the network holds slowly.

    A warning says so. Layers are to be quantized, and adapters to be merged, before.
    """
    kinds = {weight.dtype for weight in network.parameters() if weight.itemsize == 2}
    if any(isinstance(layer, QuantizedLinear) and layer.dynamic for layer in network.modules()):
        kinds.add(torch.int8)
    slow = {kind for kind in kinds if not devices.multiplies_fast(kind, device)}
    if slow:
        warnings.warn(stored_as(slow, device), stacklevel=2)
    if slow - {torch.int8}:
        compute_in_float32_(network)


def stored_as(kinds: Any, device: torch.device) -> str:
    """One line about weights that are held in these types and not multiplied in them."""
    names = " and ".join(sorted(devices.SHORT[kind] for kind in kinds))
    return f"{names}: slow on this {device.type}; weights stay so, each layer computes in fp32"
