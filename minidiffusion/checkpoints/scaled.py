"""Weights of a byte each, and scales beside them: ComfyUI's text encoders, and what we ship."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from minidiffusion.checkpoints.archives import Lazy
from minidiffusion.checkpoints.weights import Weights

SCALE, INPUT, MARK = ".scale_weight", ".scale_input", "scaled_fp8"
"""Of a layer's weights, of its inputs (for kernels that we have not), and that there are any."""


def unscaled(weights: Weights) -> Weights:
    """The same names without the scales, each weight multiplied when it is read, in float32."""
    scales = [name for name in weights if name.endswith(SCALE)]
    if not scales:
        return weights
    tensors = {
        name: tensor
        for name, tensor in weights.tensors.items()
        if not name.endswith((SCALE, INPUT)) and name.rpartition(".")[2] != MARK
    }
    for name in scales:
        target, scale = f"{name.removesuffix(SCALE)}.weight", weights.tensors[name]
        rows = tensors[target].shape[:1] if target in tensors else ()
        if target not in tensors or scale.shape not in ((), (1,), rows):
            raise ValueError(
                f"{weights.files[0]}: {name}: expected a number, or one a row, beside {target}"
            )
        read = partial(_multiplied, tensors[target], scale, f"{weights.files[0]}: {name}")
        tensors[target] = Lazy(torch.float32, tensors[target].shape, read)
    return replace(weights, tensors=tensors)


def _multiplied(weight: Lazy, scale: Lazy, where: str) -> Tensor:
    numbers = scale.read().float()
    if not bool(((numbers > 0) & (numbers < torch.inf)).all()):
        raise ValueError(f"{where}: a scale must be positive and finite")
    whole = weight.read().float()
    return whole * (numbers if numbers.numel() == 1 else numbers.view(-1, *[1] * (whole.ndim - 1)))


LEAST = 2**13
"""Numbers of a weight from which on its bytes count."""


def scaled(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Large weights as int8, with a scale for each row that spans -127..127; the rest as bf16.

    `unscaled` gives them back with an error of at most 1/254 of their row's largest number.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not name.endswith(".weight") or tensor.ndim < 2 or tensor.numel() < LEAST:
            found[name] = tensor.bfloat16()
            continue
        rows = tensor.float().flatten(1)
        scale = rows.abs().amax(dim=1).clamp(min=1e-12) / 127
        found[name] = (rows / scale[:, None]).round().to(torch.int8).view(tensor.shape)
        found[name.removesuffix(".weight") + SCALE] = scale
    return found
