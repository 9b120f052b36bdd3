"""What a saved network is: a row of facts that travels in its file's metadata."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minidiffusion.checkpoints.reader import read_metadata, read_safetensors, write_safetensors
from minidiffusion.diffusion import (
    RectifiedFlow,
    Target,
    VarianceExploding,
    VariancePreserving,
)
from minidiffusion.models import DiTConfig, MLPConfig, Model, UNetConfig, create, hollow
from minidiffusion.typed import build, plain

Spacing = Literal[
    "leading", "ldm", "trailing", "linspace", "sgm_uniform", "karras", "exponential", "beta"
]
SamplerName = Literal[
    "ddim", "ddpm", "plms", "lms", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde",
    "unipc", "lcm",
]  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn unless the call says otherwise.

    guidance: 1 is the condition alone. guidance_interval: guide only between these network times.
    """

    sampler: SamplerName = "heun"
    steps: int = field(default=20, metadata={"min": 1, "max": 1000})
    spacing: Spacing = "trailing"
    guidance: float = field(default=2.0, metadata={"min": 0})
    guidance_interval: tuple[float, float] | None = field(default=None, metadata={"min": 0})

    def __post_init__(self) -> None:
        span = self.guidance_interval
        if span is not None and not span[0] <= span[1]:
            raise ValueError(f"guidance_interval: must not fall, got {span[0]} to {span[1]}")


@dataclass(frozen=True)
class Row:
    """A network's architecture, the path and target that it was trained for, and its data."""

    model: UNetConfig | DiTConfig | MLPConfig
    path: RectifiedFlow | VariancePreserving | VarianceExploding
    target: Target
    shape: tuple[int, ...]
    classes: tuple[str, ...] = ()
    data: str = ""
    sampling: Sampling = field(default_factory=Sampling)


class Denoiser(NamedTuple):
    """A network ready to sample from, and its row."""

    network: Model
    row: Row


MODEL_FILE = "model.safetensors"


def save_denoiser(weights: dict[str, Tensor], row: Row, path: Path) -> None:
    """One safetensors file that holds everything `load_denoiser` needs."""
    facts = {"format": "minidiffusion", "row": json.dumps(plain(row))}
    write_safetensors(weights, path, facts)


def load_denoiser(path: str | Path, device: torch.device | str = "cpu") -> Denoiser:
    """The network of a run's folder, or of a model file that a run wrote; in eval mode, float32.

    Raises FileNotFoundError or ValueError with one line: what is missing, foreign or damaged.
    """
    path = Path(path)
    file = path / MODEL_FILE if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise FileNotFoundError(f"{path}: holds no {MODEL_FILE}: not a finished run")
    metadata = read_metadata(file)
    if "row" not in metadata:
        raise ValueError(f"{file}: not written by this project: its metadata has no row")
    try:
        facts = json.loads(metadata["row"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its metadata's row is no JSON: {error}") from None
    row = build(Row, facts, str(file))
    network = hollow(create, row.model)
    # MKL's rounding depends on where in memory a matrix begins, in a mapped file anywhere: a copy
    # begins where all do, and a picture does not depend on the length of the file's header.
    weights = {name: tensor.clone() for name, tensor in read_safetensors(file).items()}
    load_strictly(network, weights, str(file))
    return Denoiser(network.to(device).eval(), row)


def load_strictly(network: torch.nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Give a network on the meta device its weights; every missing or unknown key is named."""
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    missing, unknown = sorted(wanted.keys() - weights), sorted(weights.keys() - wanted)
    if missing or unknown:
        raise ValueError(f"{where}: missing keys: {missing}; unknown keys: {unknown}")
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(weights[name].shape)}, expected {tuple(shape)}"
            )
    network.load_state_dict(weights, assign=True)
