"""Weights in 8-bit floating point with a scale beside them, as ComfyUI stores text encoders."""

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
        if target not in tensors or scale.shape not in ((), (1,)):
            raise ValueError(f"{weights.files[0]}: {name}: expected one number beside {target}")
        read = partial(_multiplied, tensors[target], scale, f"{weights.files[0]}: {name}")
        tensors[target] = Lazy(torch.float32, tensors[target].shape, read)
    return replace(weights, tensors=tensors)


def _multiplied(weight: Lazy, scale: Lazy, where: str) -> Tensor:
    number = scale.read().float()
    if not 0 < number.item() < torch.inf:
        raise ValueError(f"{where}: a scale must be positive, got {number.item()}")
    return weight.read().float() * number
