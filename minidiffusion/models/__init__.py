"""Architectures: one file each, a frozen config, modules, forward(x, t, cond)."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from minidiffusion.models.autoencoder import Autoencoder, AutoencoderConfig
from minidiffusion.models.clip import CLIPConfig, CLIPText
from minidiffusion.models.discriminator import Discriminator, DiscriminatorConfig
from minidiffusion.models.dit import DiT, DiTConfig
from minidiffusion.models.dual import DualEncoder, DualEncoderConfig
from minidiffusion.models.mlp import MLP, MLPConfig
from minidiffusion.models.mmdit import MMDiT, MMDiTConfig
from minidiffusion.models.t5 import T5Config, T5Encoder
from minidiffusion.models.unet import UNet, UNetConfig

ModelConfig = UNetConfig | DiTConfig | MMDiTConfig | MLPConfig
Model = UNet | DiT | MMDiT | MLP

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)

MODELS: dict[type[ModelConfig], type[Model]] = {
    UNetConfig: UNet,
    DiTConfig: DiT,
    MMDiTConfig: MMDiT,
    MLPConfig: MLP,
}
"""The denoisers that a recipe or a saved run may name."""


def create(config: ModelConfig) -> Model:
    """A freshly initialised network of this config."""
    return MODELS[type(config)](config)  # type: ignore[arg-type]  # each class takes its own config


class _Unfilled(TorchFunctionMode):
    """Leaves random numbers undrawn: on the meta device torch imports its compiler to draw none."""

    DRAWS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given: dict[str, Any] = kwargs or {}
        return given["tensor"] if func in self.DRAWS else func(*args, **given)


def hollow(make: Callable[[C], M], config: C) -> M:
    """What ``make`` makes of this config, on the meta device, to be given its weights."""
    with torch.device("meta"), _Unfilled():
        return make(config)


__all__ = [
    "MLP",
    "MODELS",
    "Autoencoder",
    "AutoencoderConfig",
    "CLIPConfig",
    "CLIPText",
    "DiT",
    "DiTConfig",
    "Discriminator",
    "DiscriminatorConfig",
    "DualEncoder",
    "DualEncoderConfig",
    "MLPConfig",
    "MMDiT",
    "MMDiTConfig",
    "Model",
    "ModelConfig",
    "T5Config",
    "T5Encoder",
    "UNet",
    "UNetConfig",
    "create",
    "hollow",
]
