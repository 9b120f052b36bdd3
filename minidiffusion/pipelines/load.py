"""Files become a pipeline: a run of our own, or an official model in any of its dialects."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from minidiffusion import device as devices
from minidiffusion.checkpoints import lora
from minidiffusion.checkpoints.catalog import Denoiser, is_run, load_parts, opened
from minidiffusion.checkpoints.releases import MODELS
from minidiffusion.pipelines.memory import quantized
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.text.conditioning import Text

DOWNLOADED = Path("models")
"""Where `minidiffusion download` puts its files."""


def load(
    path: str | Path,
    device: str | None = "auto",
    dtype: torch.dtype | None = None,
    precision: devices.Precision | None = None,
    *,
    text_dtype: torch.dtype | None = None,
    autoencoder_dtype: torch.dtype | None = None,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    prediction: str | None = None,
    ema: bool = False,
    loras: Sequence[str] = (),
    quantize: Literal["int8"] | None = None,
    offload: bool = False,
    tile: int | None = None,
) -> Pipeline:
    """The pipeline of a run's folder, of its model file, or of an official model by file or name.

    dtype: of every part that has none of its own. Without it precision decides: auto, which is
    bf16 where that is faster, for official models; fp32 for runs of our own. text_encoder, vae:
    files for parts that are missing or not wanted as they are. prediction: eps or v, where the
    file cannot say. ema: the averaged weights of an official .ckpt. loras: FILE:WEIGHT each.
    quantize: see `memory.quantized`. offload, tile: see `Pipeline`.
    """
    where, path = devices.pick(device or "auto"), located(path)
    usual: devices.Precision = "fp32" if is_run(opened(path)) else "auto"
    dtype = dtype or devices.dtype(precision or usual, where)
    for asked in (dtype, text_dtype, autoencoder_dtype):
        devices.check(asked or dtype, where)
    parts = load_parts(
        path, vae=vae, text_encoder=text_encoder, device="cpu" if offload else where, dtype=dtype,
        text_dtype=text_dtype, autoencoder_dtype=autoencoder_dtype, prediction=prediction, ema=ema,
    )  # fmt: skip
    if loras:
        lora.apply([lora.parse(one) for one in loras], parts.denoiser.network, parts.text)
    if quantize is not None:
        quantized(parts.denoiser.network)
    text = None if parts.text is None else Text(parts.text, pad=parts.text_pad)
    network, row = parts.denoiser
    return Pipeline(network, row, where, text, parts.autoencoder, offload, tile)


def located(name: str | Path) -> Path:
    """A file or folder as it is; for a name, such as sd1.5, what was downloaded of it."""
    if Path(name).exists() or str(name) not in MODELS:
        return Path(name)
    files = MODELS[str(name)].files
    place = DOWNLOADED / (files[0] if len(files) == 1 else str(name))
    if not place.exists():
        raise FileNotFoundError(f"{place}: not there yet: minidiffusion download {name}")
    return place


def pipeline(
    trained: Denoiser, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Pipeline:
    """The pipeline of a network in memory, such as a training report's average()."""
    where = device or next(trained.network.parameters()).device
    return Pipeline(trained.network.to(where, dtype), trained.row, where)
