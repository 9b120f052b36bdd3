"""Architectures: one file each, a frozen config, modules, forward(x, t, cond)."""

from minidiffusion.models.dit import DiT, DiTConfig
from minidiffusion.models.mlp import MLP, MLPConfig
from minidiffusion.models.unet import UNet, UNetConfig

ModelConfig = UNetConfig | DiTConfig | MLPConfig
Model = UNet | DiT | MLP

MODELS: dict[type[ModelConfig], type[Model]] = {UNetConfig: UNet, DiTConfig: DiT, MLPConfig: MLP}
"""The denoisers that a recipe or a saved run may name."""


def create(config: ModelConfig) -> Model:
    """A freshly initialised network of this config."""
    return MODELS[type(config)](config)  # type: ignore[arg-type]  # each class takes its own config


__all__ = [
    "MLP",
    "MODELS",
    "DiT",
    "DiTConfig",
    "MLPConfig",
    "Model",
    "ModelConfig",
    "UNet",
    "UNetConfig",
    "create",
]
