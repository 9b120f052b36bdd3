"""What decides a picture, as plain data: from the command line, into its PNG, and back."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import file_digest
from importlib.metadata import version
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

import torch

from minidiffusion.checkpoints.catalog import Row, SamplerName, Spacing
from minidiffusion.checkpoints.weights import open_weights
from minidiffusion.data.parameters import Facts, write_parameters
from minidiffusion.data.pictures import Fit, open_plain, picture_size
from minidiffusion.device import Precision
from minidiffusion.layers.quantized import How
from minidiffusion.models import MMDiTConfig
from minidiffusion.pipelines.activations import FACTOR
from minidiffusion.pipelines.inputs import (
    LEAST,
    MOST,
    MOST_PICTURES,
    Given,
    Inputs,
    check_size,
    whole_patches,
)
from minidiffusion.pipelines.inputs import check as check_given
from minidiffusion.pipelines.load import load, located
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.pipelines.walk import Guiding, check_guiding, shifted
from minidiffusion.pipelines.walk import settled as sampling
from minidiffusion.text import HashedText, Text, TripleText
from minidiffusion.text.triple import T5_LEAST, T5_LENGTH, T5_MOST
from minidiffusion.typed import FILLED, SEED, build, plain

VERSION = version("minidiffusion")
KEY = "minidiffusion"
"""The name of the settings' text in a PNG."""
SIDE = {"min": LEAST, "max": MOST}


@dataclass(frozen=True)
class Settings:
    """One picture: what to draw, with what, how. None is the model's own.

    model, vae, text_encoder, loras, init_image, mask, depth: files. row, rows: the picture's place
    in its batch, whose shape decides the last bits, and so do the threads. digests: the SHA-256 of
    init_image, mask and depth, those that there are.
    """

    model: str = field(metadata=FILLED)
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = field(default=0, metadata=SEED)
    steps: int | None = field(default=None, metadata={"min": 1, "max": 1000})
    guidance: float | None = field(default=None, metadata={"min": 0})
    sampler: SamplerName | None = None
    spacing: Spacing | None = None
    rescale: float = field(default=0.0, metadata={"min": 0, "max": 1})
    guidance_interval: tuple[float, float] | None = field(default=None, metadata={"min": 0})
    cfg_zero: bool = False
    slg: float | None = field(default=None, metadata={"min": 0})
    slg_layers: tuple[int, ...] = field(default=(7, 8, 9), metadata={"min": 0, "max": 2**10})
    shift: float | None = field(default=None, metadata={"above": 0})
    dynamic_shift: bool = False
    width: int | None = field(default=None, metadata=SIDE)
    height: int | None = field(default=None, metadata=SIDE)
    init_image: str | None = field(default=None, metadata=FILLED)
    strength: float | None = field(default=None, metadata={"min": 0, "max": 1})
    mask: str | None = field(default=None, metadata=FILLED)
    depth: str | None = field(default=None, metadata=FILLED)
    fit: Fit = "crop"
    vae: str | None = field(default=None, metadata=FILLED)
    text_encoder: str | None = field(default=None, metadata=FILLED)
    text_encoders: str | None = field(default=None, metadata=FILLED)
    no_t5: bool = False
    t5_length: int = field(default=T5_LENGTH, metadata={"min": T5_LEAST, "max": T5_MOST})
    loras: tuple[str, ...] = field(default=(), metadata=FILLED)
    prediction: Literal["eps", "v"] | None = None
    ema: bool = False
    weighting: Literal["a1111"] | None = None
    long_prompts: Literal["truncate", "chunks"] = "truncate"
    precision: Precision | None = None
    quantize: How | None = None
    tile: int | None = field(default=None, metadata={"min": 8, "max": MOST})
    freeze_ladder: bool = False
    row: int = field(default=0, metadata={"min": 0})
    rows: int = field(default=1, metadata={"min": 1, "max": MOST_PICTURES})
    threads: int | None = field(default=None, metadata={"min": 1, "max": 4096})
    model_hash: str = ""
    digests: tuple[str, ...] = ()
    version: str = VERSION

    def __post_init__(self) -> None:
        check_size(self.width, self.height, (0, 0))
        if self.mask is not None and self.init_image is None:
            raise ValueError("mask: only with init_image, the picture to paint on")
        if self.strength is not None and self.init_image is None:
            raise ValueError("strength: only with init_image, the picture to start from")
        if self.row >= self.rows:
            raise ValueError(f"row: must be below rows = {self.rows}, got {self.row}")
        first = self.seed - self.row
        if not SEED["min"] <= first <= first + self.rows - 1 <= SEED["max"]:
            raise ValueError(f"seed: those of a batch go from 0 to {SEED['max']}, got {self.seed}")

    @property
    def share(self) -> float:
        """The strength, or what is usual: 1 where nothing was, or where it is painted over."""
        usual = 1.0 if self.init_image is None or self.mask is not None else 0.75
        return usual if self.strength is None else self.strength

    @property
    def pictures(self) -> list[str]:
        return [path for path in (self.init_image, self.mask, self.depth) if path is not None]

    def facts(self) -> dict[str, str]:
        """The texts of the picture's PNG: for other programs, and for `read_settings`."""
        known = Facts(
            prompt=self.prompt, negative_prompt=self.negative_prompt, steps=self.steps or 0,
            sampler=self.sampler, spacing=self.spacing, guidance_scale=self.guidance,
            seed=self.seed, width=self.width, height=self.height, model=Path(self.model).stem,
            model_hash=self.model_hash or None, strength=self.strength,
            version=f"minidiffusion {self.version}",
        )  # fmt: skip
        return {"parameters": write_parameters(known), KEY: json.dumps(plain(self))}


def read_settings(texts: dict[str, str], where: str) -> Settings:
    """The settings that a PNG carries. Raises ValueError where there are none, or damaged ones."""
    if KEY not in texts:
        raise ValueError(f"{where}: holds no settings of minidiffusion")
    try:
        values = json.loads(texts[KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: its settings are no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: its settings are no block of keys")
    return build(Settings, values, where)


def digests(settings: Settings) -> tuple[str, ...]:
    """The SHA-256 of each picture that is drawn from."""
    found = []
    for path in settings.pictures:
        with open_plain(path) as file:
            found.append(file_digest(file, "sha256").hexdigest())
    return tuple(found)


def model_hash(model: str) -> str:
    """The short hash of the model's file; of a folder of parts, of its denoiser's."""
    place = located(model)
    inner = [place / name for name in ("unet", "transformer") if (place / name).is_dir()]
    return open_weights(inner[0] if inner else place).hash()


def opened(settings: Settings, device: str = "auto", offload: bool = False) -> Pipeline:
    """The pipeline of the settings' model, with everything laid on it."""
    pipe = load(
        settings.model, device, precision=settings.precision, vae=settings.vae,
        text_encoder=settings.text_encoder, text_encoders=settings.text_encoders,
        t5=not settings.no_t5, loras=settings.loras, ema=settings.ema,
        prediction=settings.prediction, quantize=settings.quantize, offload=offload,
        tile=settings.tile, freeze_ladder=settings.freeze_ladder, check=partial(check, settings),
    )  # fmt: skip
    return replace(pipe, text=None if pipe.text is None else reading(pipe.text, settings))


def check(settings: Settings, row: Row) -> None:
    """Raises ValueError, before weights are read, for what an official model cannot draw."""
    given = Given(
        settings.init_image, settings.mask, settings.depth, settings.width, settings.height
    )
    for picture in settings.pictures:
        picture_size(picture)
    check_given(given, getattr(row.model, "in_channels", row.shape[0]) - row.shape[0])
    whole_patches(given, row, FACTOR)
    how = sampling(
        row.sampling, guidance=settings.guidance, guidance_interval=settings.guidance_interval
    )
    guiding = Guiding(settings.rescale, settings.cfg_zero, settings.slg, settings.slg_layers)
    check_guiding(row, how, guiding)
    shifted(row, None, settings.shift, settings.dynamic_shift)
    if isinstance(row.model, MMDiTConfig) and settings.weighting is not None:
        raise ValueError("weighting: not for Stable Diffusion 3, whose T5 knows no weights")


def reading(
    text: Text | TripleText | HashedText, settings: Settings
) -> Text | TripleText | HashedText:
    """The same encoders, reading prompts as the settings say."""
    weighting, long_prompts = settings.weighting, settings.long_prompts
    if isinstance(text, HashedText):
        if weighting is not None or long_prompts != "truncate":
            raise ValueError("weighting, long_prompts: not for a run, which knows short names")
        return text
    if isinstance(text, Text):
        return replace(text, weighting=weighting, long_prompts=long_prompts)
    return replace(
        text, weighting=weighting, long_prompts=long_prompts, t5_length=settings.t5_length
    )


def prepared(settings: Settings, pipe: Pipeline) -> Inputs:
    return pipe.prepare(
        init_image=settings.init_image, mask=settings.mask, depth=settings.depth,
        width=settings.width, height=settings.height, fit=settings.fit,
    )  # fmt: skip


def settled(settings: Settings, pipe: Pipeline, inputs: Inputs, model_hash: str) -> Settings:
    """Nothing is left to be the model's own: what stands in the picture's PNG."""
    how = pipe.sampling(
        num_steps=settings.steps, guidance_scale=settings.guidance, sampler=settings.sampler,
        spacing=settings.spacing, guidance_interval=settings.guidance_interval,
    )  # fmt: skip
    height, width = (None, None) if pipe.autoencoder is None else pipe.picture_size(inputs)
    dtype = next(pipe.network.parameters()).dtype
    return replace(
        settings, steps=how.steps, guidance=how.guidance, sampler=how.sampler,
        spacing=how.spacing, guidance_interval=how.guidance_interval, width=width, height=height,
        strength=None if settings.init_image is None else settings.share,
        precision="fp32" if dtype == torch.float32 else "bf16",
        threads=torch.get_num_threads(), model_hash=model_hash, digests=digests(settings),
        version=VERSION,
    )  # fmt: skip


def batches(pipe: Pipeline, wanted: Iterable[Settings], size: int) -> Iterator[list[Settings]]:
    """Neighbours in groups of at most ``size``; long prompts only beside equally long ones."""
    for _, alike in groupby(wanted, key=lambda one: windows(pipe, one.prompt)):
        while batch := list(islice(alike, size)):
            yield [replace(one, row=i, rows=len(batch)) for i, one in enumerate(batch)]


def windows(pipe: Pipeline, prompt: str) -> int:
    if pipe.text is None or pipe.text.long_prompts == "truncate":
        return 1
    return int(pipe.text.tokenize(prompt).shape[1])


def batch_of(settings: Settings) -> list[Settings]:
    """A batch of the shape that this picture was drawn in: neighbours do not change its bits."""
    first = settings.seed - settings.row
    return [replace(settings, seed=first + i, row=i) for i in range(settings.rows)]


def stream_options(batch: Sequence[Settings]) -> dict[str, Any]:
    """The arguments of `Pipeline.stream` for a batch, whose settings differ in prompt and seed."""
    s = batch[0]
    return {
        "prompt": [one.prompt for one in batch], "negative_prompt": s.negative_prompt,
        "seed": s.seed, "num_steps": s.steps, "guidance_scale": s.guidance, "sampler": s.sampler,
        "spacing": s.spacing, "rescale": s.rescale, "guidance_interval": s.guidance_interval,
        "cfg_zero": s.cfg_zero, "slg": s.slg, "slg_layers": s.slg_layers, "shift": s.shift,
        "dynamic_shift": s.dynamic_shift, "strength": s.share,
    }  # fmt: skip
