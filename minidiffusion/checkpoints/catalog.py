"""Files become networks: runs of our own by the row in their metadata, official ones by content.

A row is what a saved network is, beyond its weights: config, path, target, and how to draw.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from minidiffusion.checkpoints import official
from minidiffusion.checkpoints.families import trained_for
from minidiffusion.checkpoints.official import Source, pick, sources
from minidiffusion.checkpoints.reader import write_safetensors
from minidiffusion.checkpoints.weights import Weights
from minidiffusion.diffusion import (
    RectifiedFlow,
    Target,
    VarianceExploding,
    VariancePreserving,
)
from minidiffusion.layers.storage import store_slow_weights_
from minidiffusion.models import (
    DiTConfig,
    MLPConfig,
    MMDiT,
    MMDiTConfig,
    Model,
    UNet,
    UNetConfig,
    create,
    hollow,
)
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

    spacing: None is the one that the sampler is known with. guidance: 1 is the condition alone.
    guidance_interval: guide only between these network times.
    """

    sampler: SamplerName = "heun"
    steps: int = field(default=20, metadata={"min": 1, "max": 1000})
    spacing: Spacing | None = "trailing"
    guidance: float = field(default=2.0, metadata={"min": 0})
    guidance_interval: tuple[float, float] | None = field(default=None, metadata={"min": 0})

    def __post_init__(self) -> None:
        span = self.guidance_interval
        if span is not None and not span[0] <= span[1]:
            raise ValueError(f"guidance_interval: must not fall, got {span[0]} to {span[1]}")


@dataclass(frozen=True)
class Row:
    """A network's architecture, the path and target that it was trained for, and its data.

    family: of Stable Diffusion, such as sd1, sd2-inpaint, sd3.5-large, see `families.trained_for`;
    "" for what is none. shape: of a sample.
    words: tokens of the prompts, read as `HashedText` does; 0 where none are, or by an encoder.
    """

    model: UNetConfig | DiTConfig | MMDiTConfig | MLPConfig
    path: RectifiedFlow | VariancePreserving | VarianceExploding
    target: Target
    shape: tuple[int, ...] = field(metadata={"max": 2**16})
    classes: tuple[str, ...] = ()
    data: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    family: str = ""
    words: int = field(default=0, metadata={"min": 0, "max": 2**12})


class Denoiser(NamedTuple):
    """A network ready to sample from, and its row."""

    network: Model
    row: Row


MODEL_FILE = "model.safetensors"
BESIDE = ("autoencoder.", "clip.")
"""How names begin that are of other parts than the denoiser, see `own`."""


def save_denoiser(
    weights: dict[str, Tensor], row: Row, path: Path,
    beside: Sequence[tuple[dict[str, Tensor], dict[str, str]]] = (),
) -> None:  # fmt: skip
    """One safetensors file that holds everything `load_denoiser` needs.

    beside: parts of our own, as `own.packed` gives them.
    """
    tensors, facts = whole(weights, row, beside)
    write_safetensors(tensors, path, facts)


def whole(
    weights: Mapping[str, Tensor], row: Row,
    beside: Sequence[tuple[dict[str, Tensor], dict[str, str]]] = (),
) -> tuple[dict[str, Tensor], dict[str, str]]:  # fmt: skip
    """The tensors of that file, and its metadata."""
    tensors, facts = dict(weights), {"format": "minidiffusion", "row": json.dumps(plain(row))}
    for more, metadata in beside:
        tensors, facts = tensors | more, facts | metadata
    return tensors, facts


SAMPLING = Sampling("dpmpp_2m", 30, None, 7.5)
"""How official UNets draw."""
FLOW_SAMPLING = {
    "sd3": Sampling("dpmpp_2m", 50, "linspace", 5.0),
    "sd3.5-medium": Sampling("dpmpp_2m", 50, "linspace", 5.0),
    "sd3.5-large": Sampling("dpmpp_2m", 40, "linspace", 4.5),
}
"""How Stable Diffusion 3 draws; large turbo: 4 steps of euler with guidance 1."""


def load_denoiser(
    path: str | Path, device: torch.device | str = "cpu", *, dtype: torch.dtype | None = None,
    prediction: str | None = None, ema: bool = False, **changes: object,
) -> Denoiser:  # fmt: skip
    """The denoiser of a run of our own, or of an official file or folder; in eval mode.

    dtype: of the weights, float32 unless given; of 16 bits, see `layers.storage`. prediction: eps,
    v or x0, where the file cannot say or is wrong. ema: the averaged weights that an official .ckpt
    may hold. changes: fields of the config that shapes cannot tell, such as heads, head_width,
    groups. A run of our own says all of it itself. Raises OSError or ValueError with one line: what
    is missing or wrong.
    """
    found = read_denoiser(Path(path), device, dtype, prediction, ema, changes)
    store_slow_weights_(found.network, torch.device(device))
    return found


def read_denoiser(
    path: Path, device: torch.device | str, dtype: torch.dtype | None, prediction: str | None,
    ema: bool, changes: Mapping[str, object],
) -> Denoiser:  # fmt: skip
    """The same, whatever the device multiplies fast."""
    files = opened(path)
    if is_run(files):
        if prediction or ema or changes:
            raise ValueError(f"{path}: a run of our own: its file says all of its options")
        return load_run(files[0], device, dtype)
    return denoiser_of(path, sources(path, files), device, dtype, prediction, ema, changes)


def is_run(files: list[Weights]) -> bool:
    return len(files) == 1 and "row" in files[0].metadata


def opened(path: Path) -> list[Weights]:
    """The files of a path. FileNotFoundError for the folder of a run that has not made its own."""
    unfinished = path.is_dir() and not (path / MODEL_FILE).exists()
    if unfinished and ((path / "recipe.yaml").exists() or not any(path.iterdir())):
        raise FileNotFoundError(f"{path}: holds no {MODEL_FILE}: not a finished run")
    return official.opened(path)


def denoiser_of(
    path: Path, found: list[Source], device: torch.device | str, dtype: torch.dtype | None,
    prediction: str | None, ema: bool, changes: Mapping[str, object],
    **reading: Any,
) -> Denoiser:  # fmt: skip
    source = pick(found, "denoiser", path)
    config = cast(UNetConfig | MMDiTConfig, official.config_of(source, changes))
    trained = trained_for(source, config, prediction)
    how = FLOW_SAMPLING.get(trained.family, SAMPLING)
    row = Row(config, **trained._asdict(), sampling=how)
    network = official.load(source, config, device, dtype, ema=ema, **reading)
    return Denoiser(cast(UNet | MMDiT, network), row)


def row_of(weights: Weights) -> Row:
    """The row in the file of a run. Raises ValueError for one that is damaged."""
    file = weights.files[0]
    try:
        facts = json.loads(weights.metadata["row"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its metadata's row is no JSON: {error}") from None
    row = build(Row, facts, str(file))
    try:
        row.model.check(row.shape)
    except ValueError as error:
        raise ValueError(f"{file}: its metadata's shape: {error}") from None
    return row


def load_run(
    weights: Weights, device: torch.device | str, dtype: torch.dtype | None = None
) -> Denoiser:
    file, row = weights.files[0], row_of(weights)
    network = hollow(create, row.model)
    # MKL's rounding depends on where in memory a matrix begins, in a mapped file anywhere: a copy
    # begins where all do, and a picture does not depend on the length of the file's header.
    tensors = {name: weights[name].clone() for name in weights if not name.startswith(BESIDE)}
    load_strictly(network, tensors, str(file))
    return Denoiser(network.to(device, dtype or torch.float32).eval(), row)


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
