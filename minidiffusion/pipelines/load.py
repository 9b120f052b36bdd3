"""Files become a pipeline: a run of our own, or an official model in any of its dialects."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minidiffusion import device as devices
from minidiffusion.checkpoints import lora
from minidiffusion.checkpoints.catalog import Denoiser, Row, is_run, opened
from minidiffusion.checkpoints.official import NONE, Shelf, in_our_names, pick, sources
from minidiffusion.checkpoints.parts import Encoders, Parts, load_parts
from minidiffusion.checkpoints.releases import MODELS
from minidiffusion.layers.quantized import How
from minidiffusion.layers.storage import store_slow_weights_
from minidiffusion.models import CLIPText, MMDiTConfig
from minidiffusion.pipelines.memory import quantized
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.text import Text, TripleText
from minidiffusion.text.bpe import BPE, shortened
from minidiffusion.text.hashed import hashed

MODULATIONS = re.compile(r"(^|\.)modulations?\.linear\.")
"""What depends on the level and the prompt alone: a third of the weights."""
DOWNLOADED = Path("models")
"""Where `minidiffusion download` puts its files."""
SHIPPED = {"emoji": Path(__file__).parents[1] / "assets" / "emoji" / "model.safetensors"}
"""Models that come with the package."""


def load(
    path: str | Path, device: str | None = "auto", dtype: torch.dtype | None = None,
    precision: devices.Precision | None = None, *, text_dtype: torch.dtype | None = None,
    autoencoder_dtype: torch.dtype | None = None, text_encoder: str | Path | None = None,
    text_encoders: str | Path | None = None, t5: bool = True, vae: str | Path | None = None,
    prediction: str | None = None, ema: bool = False, loras: Sequence[str] = (),
    quantize: How | None = None, offload: bool = False, tile: int | None = None,
    freeze_ladder: bool = False, check: Callable[[Row], None] | None = None,
) -> Pipeline:  # fmt: skip
    """The pipeline of a run's folder, of its model file, or of an official model by file or name.

    dtype: of every part that has none of its own. Without it precision decides: auto, which is
    bf16 where that is faster, for official models; fp32 for runs of our own. Weights of 16 bits on
    a device that multiplies them slowly: see `layers.storage`. text_encoder, vae:
    files for parts that are missing or not wanted as they are. prediction: eps or v, where the
    file cannot say. text_encoders: the place of Stable Diffusion 3's, where its file has none; t5:
    False draws without its largest. ema: the averaged weights of an official .ckpt. loras:
    FILE:WEIGHT each. quantize: see `memory.quantized`. offload, tile: see `Pipeline`.
    freeze_ladder: leave a third of Stable Diffusion 3's weights in the file, see `MMDiT.freeze`.
    check: given an official model's row before its weights are read; what it raises ends all.
    """
    where, path = devices.pick(device or "auto"), located(path)
    ours = is_run(opened(path))
    usual: devices.Precision = "fp32" if ours else "auto"
    dtype = dtype or devices.dtype(precision or usual, where)
    for asked in (dtype, text_dtype, autoencoder_dtype):
        devices.check(asked or dtype, where)
    reading = partial(
        load_parts, path, vae=vae, text_encoder=text_encoder, text_encoders=text_encoders, t5=t5,
        dtype=dtype, prediction=prediction, ema=ema,
    )  # fmt: skip
    adapters = [lora.parse(one) for one in loras]
    if not ours:  # what headers tell of a mistake is said before gigabytes are read
        foresee(reading(device="meta"), adapters, freeze_ladder, check)
    shelf: Shelf | None = {} if offload and where.type == "cpu" and not loras else None
    parts = reading(
        device="cpu" if offload else where, text_dtype=text_dtype,
        autoencoder_dtype=autoencoder_dtype, later=MODULATIONS if freeze_ladder else NONE,
        quantize=None if loras else quantize, shelf=shelf,
    )  # fmt: skip
    if loras:
        lora.apply(adapters, parts.denoiser.network, parts.text)
        if quantize is not None:  # only now: adapters are added to whole weights
            quantized(parts, quantize)
    store_slow_weights_(parts.networks, where)
    network, row = parts.denoiser
    words = hashed(row.model, row.words, row.classes)
    text = words if parts.text is None else reader(parts.text, parts.text_pad, row)
    weights = mapped(path, row) if freeze_ladder else None
    return Pipeline(
        network, row, where, text, parts.autoencoder, offload, tile, weights, shelf or {}
    )


def foresee(
    parts: Parts, adapters: Sequence[tuple[Path, float]], freeze_ladder: bool,
    check: Callable[[Row], None] | None,
) -> None:  # fmt: skip
    """Raises ValueError for what the parts, which have no weights yet, cannot do."""
    row = parts.denoiser.row
    if freeze_ladder and not isinstance(row.model, MMDiTConfig):
        raise ValueError("freeze_ladder: only for Stable Diffusion 3")
    if check is not None:
        check(row)
    if adapters:
        lora.apply(adapters, parts.denoiser.network, parts.text)


def mapped(path: Path, row: Row) -> Mapping[str, Tensor]:
    """The denoiser's weights where they lie in its file, by our names."""
    if not isinstance(row.model, MMDiTConfig) or not row.family:
        raise ValueError("freeze_ladder: only for Stable Diffusion 3")
    return in_our_names(pick(sources(path), "denoiser", path), row.model)


def reader(text: CLIPText | Encoders, pad: int | None, row: Row) -> Text | TripleText:
    """What makes a Cond of words."""
    if not isinstance(text, Encoders):
        return Text(text, BPE() if row.family else shortened(text.config.vocabulary), pad=pad)
    assert isinstance(row.model, MMDiTConfig)
    return TripleText(*text, width=row.model.context_width)


def located(name: str | Path) -> Path:
    """A file or folder as it is; for a name, what is shipped or was downloaded of it."""
    if Path(name).exists() or str(name) not in MODELS.keys() | SHIPPED:
        return Path(name)
    if str(name) in SHIPPED:
        return SHIPPED[str(name)]
    files = MODELS[str(name)].files
    place = DOWNLOADED / (files[0] if len(files) == 1 else str(name))
    if not place.exists():
        raise FileNotFoundError(f"{place}: not there yet: minidiffusion download {name}")
    return place


def pipeline(
    trained: Denoiser, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Pipeline:
    """The pipeline of a network in memory, such as a training report's average()."""
    network, row = trained
    where = device or next(network.parameters()).device
    store_slow_weights_(network.to(where, dtype), where)
    return Pipeline(network, row, where, hashed(row.model, row.words, row.classes))
