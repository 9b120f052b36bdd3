"""Parts of our own models, alone in a file or beside their denoiser.

The weights lie under the part's name, and the file's metadata hold its config by the same name.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from minidiffusion.checkpoints.catalog import load_strictly
from minidiffusion.checkpoints.reader import write_safetensors
from minidiffusion.checkpoints.weights import Weights
from minidiffusion.models import (
    Autoencoder,
    AutoencoderConfig,
    DualEncoder,
    DualEncoderConfig,
    hollow,
)
from minidiffusion.typed import build, plain

Name = Literal["autoencoder", "clip"]
Config = AutoencoderConfig | DualEncoderConfig


class Packed(NamedTuple):
    """A part as a file holds it."""

    weights: dict[str, Tensor]
    metadata: dict[str, str]


def packed(name: Name, config: Config, weights: Mapping[str, Tensor]) -> Packed:
    named = {f"{name}.{key}": tensor for key, tensor in weights.items()}
    return Packed(named, {name: json.dumps(plain(config))})


def alone(name: Name, config: Config, weights: Mapping[str, Tensor]) -> Packed:
    """A part that has a file to itself."""
    tensors, metadata = packed(name, config, weights)
    return Packed(tensors, {"format": "minidiffusion", **metadata})


def save_part(name: Name, config: Config, weights: Mapping[str, Tensor], path: Path) -> None:
    """One safetensors file that `load_autoencoder` or `load_clip` opens."""
    tensors, metadata = alone(name, config, weights)
    write_safetensors(tensors, path, metadata)


def holds(weights: Weights, name: Name) -> bool:
    return weights.metadata.get("format") == "minidiffusion" and name in weights.metadata


def repacked(weights: Weights, name: Name) -> Packed:
    """A part as it lies in a file, to be laid beside another's."""
    found = {key: weights[key].clone() for key in weights if key.startswith(f"{name}.")}
    return Packed(found, {name: weights.metadata[name]})


def load_autoencoder(weights: Weights, device: torch.device | str = "cpu") -> Autoencoder:
    """In float32 and eval mode. Raises ValueError for a file that is damaged."""
    config = config_of(weights, "autoencoder", AutoencoderConfig)
    return cast(Autoencoder, _filled(hollow(Autoencoder, config), weights, "autoencoder", device))


def load_clip(weights: Weights, device: torch.device | str = "cpu") -> DualEncoder:
    """In float32 and eval mode. Raises ValueError for a file that is damaged."""
    config = config_of(weights, "clip", DualEncoderConfig)
    return cast(DualEncoder, _filled(hollow(DualEncoder, config), weights, "clip", device))


C = TypeVar("C", bound=Config)


def config_of(weights: Weights, name: Name, kind: type[C]) -> C:
    file = weights.files[0]
    try:
        facts = json.loads(weights.metadata[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its metadata's {name} is no JSON: {error}") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{file}: its metadata's {name} is no block of keys")
    return build(kind, facts, f"{file}: {name}")


def _filled(part: nn.Module, weights: Weights, name: Name, device: torch.device | str) -> nn.Module:
    found = {
        key.removeprefix(f"{name}."): tensor.float()
        for key, tensor in repacked(weights, name).weights.items()
    }
    load_strictly(part, found, str(weights.files[0]))
    return part.to(device).eval().requires_grad_(False)
