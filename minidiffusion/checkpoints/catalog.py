"""Files become networks: runs of our own by the row in their metadata, official ones by content.

A row is what a saved network is, beyond its weights: config, path, target, and how to draw.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from minidiffusion.checkpoints import official
from minidiffusion.checkpoints.families import trained_for
from minidiffusion.checkpoints.official import Source, pick, sources
from minidiffusion.checkpoints.reader import write_safetensors
from minidiffusion.checkpoints.recognise import Kind
from minidiffusion.checkpoints.sizes import SDXL_SCALE
from minidiffusion.checkpoints.weights import Weights
from minidiffusion.diffusion import (
    RectifiedFlow,
    Target,
    VarianceExploding,
    VariancePreserving,
)
from minidiffusion.models import (
    Autoencoder,
    AutoencoderConfig,
    CLIPConfig,
    CLIPText,
    DiTConfig,
    MLPConfig,
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

    family: of Stable Diffusion, see `families.FAMILIES`; "" for what is none. shape: of a sample.
    """

    model: UNetConfig | DiTConfig | MLPConfig
    path: RectifiedFlow | VariancePreserving | VarianceExploding
    target: Target
    shape: tuple[int, ...]
    classes: tuple[str, ...] = ()
    data: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    family: str = ""


class Denoiser(NamedTuple):
    """A network ready to sample from, and its row."""

    network: Model
    row: Row


MODEL_FILE = "model.safetensors"


def save_denoiser(weights: dict[str, Tensor], row: Row, path: Path) -> None:
    """One safetensors file that holds everything `load_denoiser` needs."""
    facts = {"format": "minidiffusion", "row": json.dumps(plain(row))}
    write_safetensors(weights, path, facts)


SAMPLING = Sampling("dpmpp_2m", 30, None, 7.5)
"""How official models draw."""


class Parts(NamedTuple):
    """A whole model. The autoencoder and the text encoder of a run of our own may be None."""

    denoiser: Denoiser
    autoencoder: Autoencoder | None
    text: CLIPText | None

    @property
    def text_pad(self) -> int:
        """The token that fills a short text: the end of text again in 1, number 0 in 2."""
        return 49407 if self.denoiser.row.family.startswith("sd1") else 0


def load_denoiser(
    path: str | Path, device: torch.device | str = "cpu", *, dtype: torch.dtype | None = None,
    prediction: str | None = None, ema: bool = False, **changes: object,
) -> Denoiser:  # fmt: skip
    """The denoiser of a run of our own, or of an official file or folder; in eval mode.

    dtype: of the weights, float32 unless given. prediction: eps, v or x0, where the file cannot
    say or is wrong. ema: the averaged weights that an official .ckpt may hold. changes: fields of
    the config that shapes cannot tell, such as heads, head_width, groups. A run of our own says
    all of it itself. Raises OSError or ValueError with one line: what is missing or wrong.
    """
    path = Path(path)
    files = opened(path)
    if is_run(files):
        if prediction or ema or changes:
            raise ValueError(f"{path}: a run of our own: its file says all of its options")
        return load_run(files[0], device, dtype)
    return _denoiser(path, sources(path, files), device, dtype, prediction, ema, changes)


def is_run(files: list[Weights]) -> bool:
    return len(files) == 1 and "row" in files[0].metadata


def opened(path: Path) -> list[Weights]:
    """The files of a path. FileNotFoundError for the folder of a run that has not made its own."""
    unfinished = path.is_dir() and not (path / MODEL_FILE).exists()
    if unfinished and ((path / "recipe.yaml").exists() or not any(path.iterdir())):
        raise FileNotFoundError(f"{path}: holds no {MODEL_FILE}: not a finished run")
    return official.opened(path)


def _denoiser(
    path: Path, found: list[Source], device: torch.device | str, dtype: torch.dtype | None,
    prediction: str | None, ema: bool, changes: Mapping[str, object],
) -> Denoiser:  # fmt: skip
    source = pick(found, "denoiser", path)
    config = cast(UNetConfig, official.config_of(source, changes))
    row = Row(config, **trained_for(source, config, prediction)._asdict(), sampling=SAMPLING)
    return Denoiser(cast(UNet, official.load(source, config, device, dtype, ema=ema)), row)


def row_of(weights: Weights) -> Row:
    """The row in the file of a run. Raises ValueError for one that is damaged."""
    file = weights.files[0]
    try:
        facts = json.loads(weights.metadata["row"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its metadata's row is no JSON: {error}") from None
    return build(Row, facts, str(file))


def load_run(
    weights: Weights, device: torch.device | str, dtype: torch.dtype | None = None
) -> Denoiser:
    file, row = weights.files[0], row_of(weights)
    network = hollow(create, row.model)
    # MKL's rounding depends on where in memory a matrix begins, in a mapped file anywhere: a copy
    # begins where all do, and a picture does not depend on the length of the file's header.
    load_strictly(network, {name: tensor.clone() for name, tensor in weights.items()}, str(file))
    return Denoiser(network.to(device, dtype).eval(), row)


def load_autoencoder(
    path: str | Path, device: torch.device | str = "cpu", *, dtype: torch.dtype | None = None,
    **changes: object,
) -> Autoencoder:  # fmt: skip
    """The autoencoder of an official file or folder, alone or with a model around it; eval mode.

    changes: fields of its config, such as scale: four channels are taken for Stable Diffusion 1's
    and 2's unless an XL denoiser or a config.json is beside them.
    """
    path = Path(path)
    return _autoencoder(path, sources(path), device, dtype, changes)


def _autoencoder(
    path: Path, found: list[Source], device: torch.device | str, dtype: torch.dtype | None,
    changes: Mapping[str, object], xl: bool = False,
) -> Autoencoder:  # fmt: skip
    source = pick(found, "autoencoder", path)
    xl = xl or any(one.part.sizes.get("pooled_width") for one in found)
    sizes = source.part.sizes
    if xl and sizes["latent_channels"] == 4:
        source = source._replace(part=source.part._replace(sizes={**sizes, "scale": SDXL_SCALE}))
    config = cast(AutoencoderConfig, official.config_of(source, changes))
    return cast(Autoencoder, official.load(source, config, device, dtype))


def load_text_encoder(
    path: str | Path, device: torch.device | str = "cpu", *, dtype: torch.dtype | None = None,
    **changes: object,
) -> CLIPText:  # fmt: skip
    """The CLIP text encoder of an official file or folder, alone or with a model around it.

    The pooled vector is projected where the file holds a projection that its model uses. changes:
    fields of its config, such as heads, activation, skip, final_norm.
    """
    path = Path(path)
    return _text(path, sources(path), device, dtype, changes)


def _text(
    path: Path, found: list[Source], device: torch.device | str, dtype: torch.dtype | None,
    changes: Mapping[str, object],
) -> CLIPText:  # fmt: skip
    source = pick(found, "text encoder", path)
    config = cast(CLIPConfig, official.config_of(source, changes))
    return cast(CLIPText, official.load(source, config, device, dtype))


def load_parts(
    path: str | Path, *, vae: str | Path | None = None, text_encoder: str | Path | None = None,
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
    text_dtype: torch.dtype | None = None, autoencoder_dtype: torch.dtype | None = None,
    prediction: str | None = None, ema: bool = False, optional: bool = False,
) -> Parts:  # fmt: skip
    """A whole model: a single file, a diffusers folder, a folder of stand-alone parts, our own run.

    vae, text_encoder: files for parts that are missing, or not wanted as they are. optional: a
    part that is missing is None; else it is a ValueError that says which option names one.
    """
    path = Path(path)
    files = opened(path)
    found = [] if is_run(files) else sources(path, files)
    if found:
        denoiser = _denoiser(path, found, device, dtype, prediction, ema, {})
    else:
        denoiser = load_denoiser(path, device, dtype=dtype, prediction=prediction, ema=ema)
    there, family = {source.part.kind for source in found}, denoiser.row.family
    optional = optional or not family
    autoencoder = text = None
    if vae is not None or wanted("autoencoder", there, path, "--vae", optional):
        place = path if vae is None else Path(vae)
        inside, xl = found if vae is None else sources(place), family.startswith("sdxl")
        autoencoder = _autoencoder(place, inside, device, autoencoder_dtype or dtype, {}, xl)
    if text_encoder is not None or wanted("text encoder", there, path, "--text-encoder", optional):
        place = path if text_encoder is None else Path(text_encoder)
        inside = found if text_encoder is None else sources(place)
        text = _text(place, inside, device, text_dtype or dtype, {})
    return checked(Parts(denoiser, autoencoder, text), path)


def wanted(kind: Kind, there: set[Kind], path: Path, option: str, optional: bool) -> bool:
    if kind not in there and not optional:
        raise ValueError(f"{path}: holds no {kind}: name one with {option} FILE")
    return kind in there


def checked(parts: Parts, path: Path) -> Parts:
    """Raises ValueError for parts that do not fit each other."""
    row = parts.denoiser.row
    if parts.autoencoder is not None:
        channels = parts.autoencoder.config.latent_channels
        if channels != row.shape[0]:
            raise ValueError(
                f"{path}: the denoiser wants latents of {row.shape[0]} channels, "
                f"the autoencoder makes {channels}"
            )
    width = row.model.context_width if isinstance(row.model, UNetConfig) else None
    if parts.text is not None and width != parts.text.config.width:
        raise ValueError(
            f"{path}: the denoiser attends to texts of width {width}, "
            f"the text encoder makes {parts.text.config.width}"
        )
    return parts


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
