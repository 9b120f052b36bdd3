"""A whole model, of one file or of several: a denoiser, its autoencoder, its text encoders."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn

from minidiffusion.checkpoints import official, own
from minidiffusion.checkpoints.catalog import Denoiser, denoiser_of, is_run, opened, read_denoiser
from minidiffusion.checkpoints.official import Shelf, Source, pick, sources
from minidiffusion.checkpoints.recognise import Kind
from minidiffusion.checkpoints.sizes import SDXL_SCALE
from minidiffusion.layers.quantized import How, quantize_
from minidiffusion.layers.storage import store_slow_weights_
from minidiffusion.models import (
    Autoencoder,
    AutoencoderConfig,
    CLIPConfig,
    CLIPText,
    MMDiTConfig,
    ModelConfig,
    T5Encoder,
)

NO_CHANGES: Mapping[str, object] = {}


class Encoders(NamedTuple):
    """The three text encoders of Stable Diffusion 3; it draws without T5 as well."""

    clip_l: CLIPText
    clip_g: CLIPText
    t5: T5Encoder | None


class Parts(NamedTuple):
    """A whole model. The autoencoder and the text encoder of a run of our own may be None."""

    denoiser: Denoiser
    autoencoder: Autoencoder | None
    text: CLIPText | Encoders | None

    @property
    def networks(self) -> nn.ModuleList:
        """Those that there are."""
        text = self.text if isinstance(self.text, Encoders) else (self.text,)
        return nn.ModuleList(filter(None, (self.denoiser.network, *text, self.autoencoder)))

    @property
    def text_pad(self) -> int | None:
        """The token that fills a short text: number 0 in 2, else the end of text again (None)."""
        return 0 if self.denoiser.row.family.startswith("sd2") else None


def load_autoencoder(
    path: str | Path, device: torch.device | str = "cpu", *, dtype: torch.dtype | None = None,
    **changes: object,
) -> Autoencoder:  # fmt: skip
    """The autoencoder of an official file or folder, alone or with a model around it; eval mode.
    Or of a run of our own.

    changes: fields of its config, such as scale: four channels are taken for Stable Diffusion 1's
    and 2's unless an XL denoiser or a config.json is beside them.
    """
    found = read_autoencoder(Path(path), device, dtype, changes)
    store_slow_weights_(found, torch.device(device))
    return found


def read_autoencoder(
    path: Path, device: torch.device | str, dtype: torch.dtype | None,
    changes: Mapping[str, object],
) -> Autoencoder:  # fmt: skip
    """The same, whatever the device multiplies fast."""
    files = opened(path)
    if own.holds(files[0], "autoencoder"):
        return own.load_autoencoder(files[0], device).to(dtype or torch.float32)
    return _autoencoder(path, sources(path, files), device, dtype, changes)


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
) -> CLIPText | T5Encoder:  # fmt: skip
    """The CLIP text encoder of an official file or folder, alone or with a model around it; or T5
    alone. In eval mode.

    changes: fields of its config that shapes cannot tell: heads, activation, skip, final_norm,
    norm_eps of CLIP's; distance, norm_eps of T5's. CLIP's pooled vector is what the file's own
    dialect makes of it: projected where the file holds a text_projection (diffusers' and
    transformers' folders), else as the last layer left it (Stability's single files of CLIP-L).
    Raises OSError or ValueError with one line: what is missing or wrong.
    """
    path = Path(path)
    found = sources(path)
    text: CLIPText | T5Encoder
    if {source.part.kind for source in found} == {"T5"}:
        source = pick(found, "T5", path)
        config = official.config_of(source, changes)
        text = cast(T5Encoder, official.load(source, config, device, dtype))
    else:
        text = _text(path, found, device, dtype, changes)
    store_slow_weights_(text, torch.device(device))
    return text


def _text(
    path: Path, found: list[Source], device: torch.device | str, dtype: torch.dtype | None,
    changes: Mapping[str, object], shelf: Shelf | None = None,
) -> CLIPText:  # fmt: skip
    source = pick(found, "text encoder", path)
    config = cast(CLIPConfig, official.config_of(source, changes))
    return cast(CLIPText, official.load(source, config, device, dtype, shelf=shelf))


CLIP_L: dict[str, object] = {"skip": 1, "final_norm": False, "activation": "quick_gelu"}
CLIP_G = {"skip": 1, "final_norm": False, "activation": "gelu"}


def load_text_encoders(
    path: str | Path, device: torch.device | str = "cpu", *, dtype: torch.dtype | None = None,
    t5: bool | Mapping[str, object] = True, clip_l: Mapping[str, object] = NO_CHANGES,
    clip_g: Mapping[str, object] = NO_CHANGES,
) -> Encoders:  # fmt: skip
    """Stable Diffusion 3's text encoders: of a model's file, of a folder of theirs, or diffusers'.

    path: or their files with commas between them; of a model that holds none, they are looked for
    in a folder text_encoders beside its file. t5: False leaves it out, whether it is there or
    not. clip_l, clip_g, t5: fields of their configs, see `load_text_encoder`, which also says
    when CLIP-L's pooled vector is projected. `minidiffusion.text.TripleText` takes them.
    """
    encoders = _encoders(Path(path), held(path), device, dtype, t5, changes=(clip_l, clip_g))
    store_slow_weights_(nn.ModuleList(filter(None, encoders)), torch.device(device))
    return encoders


def _encoders(
    path: Path, found: list[Source], device: torch.device | str, dtype: torch.dtype | None,
    t5: bool | Mapping[str, object], quantize: How | None = None, shelf: Shelf | None = None,
    changes: tuple[Mapping[str, object], Mapping[str, object]] = (NO_CHANGES, NO_CHANGES),
) -> Encoders:  # fmt: skip
    if all(one.part.kind != "text encoder" for one in found) and near(path).is_dir():
        path, found = near(path), sources(near(path))
    clips = [one for one in found if one.part.kind == "text encoder"]
    if len(clips) != 2:
        there = f"{len(clips) or 'no'} CLIP text encoders"
        raise ValueError(f"{path}: holds {there}; Stable Diffusion 3 wants L and bigG: name their "
                         "folder, or FILE,FILE,FILE, with --text-encoders")  # fmt: skip
    if t5 is not False and not any(one.part.kind == "T5" for one in found):
        raise ValueError(
            f"{path}: holds no T5: name the encoders' folder with --text-encoders, or go on with "
            "--no-t5: long prompts and written words come out worse"
        )
    small, large = sorted(clips, key=role)
    modules = [
        official.load(one, official.config_of(one, {**usual, **given}), device, dtype, shelf=shelf)
        for one, usual, given in zip((small, large), (clip_l(small), CLIP_G), changes, strict=True)
    ]
    last = None
    if t5 is not False:
        source = pick(found, "T5", path)
        config = official.config_of(source, {} if t5 is True else t5)
        how = quantize and of_t5(quantize)
        last = official.load(source, config, device, dtype, quantize=how, shelf=shelf)
    first, second = (cast(CLIPText, module) for module in modules)
    return Encoders(first, second, cast(T5Encoder | None, last))


def clip_l(source: Source) -> dict[str, object]:
    """What no shape says of CLIP-L.

    A projection that changes nothing, as in diffusers' folders made of single files, is none.
    """
    weight = source.weights.get(f"{source.part.prefix}text_projection.weight")
    idle = weight is not None and torch.equal(weight.float(), torch.eye(len(weight)))
    return {**CLIP_L, "projection": None} if idle else CLIP_L


def near(path: Path) -> Path:
    """Where Stability's repositories have the text encoders of a model that holds none."""
    return (path if path.is_dir() else path.parent) / "text_encoders"


def of_t5(how: How) -> How:
    """How T5 is stored: it never works in 8 bits."""
    return "int8" if how == "int8-dynamic" else how


def role(source: Source) -> tuple[bool, bool, object]:
    """L before bigG: by the names around them, else by their widths."""
    part = source.part
    second = source.folder.name == "text_encoder_2"
    return "clip_g" in part.prefix, second, part.sizes["width"]


def load_parts(
    path: str | Path, *, vae: str | Path | None = None, text_encoder: str | Path | None = None,
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
    text_dtype: torch.dtype | None = None, autoencoder_dtype: torch.dtype | None = None,
    prediction: str | None = None, ema: bool = False, optional: bool = False,
    text_encoders: str | Path | None = None, t5: bool = True,
    later: re.Pattern[str] = official.NONE, quantize: How | None = None,
    shelf: Shelf | None = None,
) -> Parts:  # fmt: skip
    """A whole model: a single file, a diffusers folder, a folder of stand-alone parts, our own run.

    vae, text_encoder: files for parts that are missing, or not wanted as they are. optional: a
    part that is missing is None; else it is a ValueError that says which option names one.
    text_encoders, t5: of Stable Diffusion 3, see `load_text_encoders`. later, shelf: see
    `official.load`; of the denoiser, and of an official model's denoiser and text encoders.
    quantize: the denoiser's linear layers, and T5's.
    """
    path = Path(path)
    found = [] if is_run(files := opened(path)) else sources(path, files)
    if found:
        how = {"later": later, "quantize": quantize, "shelf": shelf}
        denoiser = denoiser_of(path, found, device, dtype, prediction, ema, {}, **how)
    else:
        denoiser = read_denoiser(path, device, dtype, prediction, ema, {})
        if quantize is not None:
            quantize_(denoiser.network, quantize)
    there, family = {source.part.kind for source in found}, denoiser.row.family
    optional = optional or not family
    check_options(family, text_encoder, text_encoders, t5)
    autoencoder: Autoencoder | None = None
    text: CLIPText | Encoders | None = None
    if own.holds(files[0] if vae is None else opened(Path(vae))[0], "autoencoder"):
        autoencoder = read_autoencoder(Path(vae or path), device, autoencoder_dtype or dtype, {})
    elif vae is not None or wanted("autoencoder", there, path, optional):
        place, inside = lying(vae, path, found)
        xl = family.startswith("sdxl")
        autoencoder = _autoencoder(place, inside, device, autoencoder_dtype or dtype, {}, xl)
    if not found and text_encoder is None and own.holds(files[0], "clip"):
        text = own.load_clip(files[0], device).text.to(text_dtype or dtype or torch.float32)
    elif family.startswith("sd3"):
        beside = "text encoder" in there or near(path).is_dir()
        if text_encoders is not None or not optional or beside:
            place, inside = lying(text_encoders, path, found)
            text = _encoders(place, inside, device, text_dtype or dtype, t5, quantize, shelf)
    elif text_encoder is not None or wanted("text encoder", there, path, optional):
        place, inside = lying(text_encoder, path, found)
        text = _text(place, inside, device, text_dtype or dtype, {}, shelf)
    return checked(Parts(denoiser, autoencoder, text), path)


def check_options(
    family: str, text_encoder: str | Path | None, text_encoders: str | Path | None, t5: bool
) -> None:
    """Raises ValueError for an option that this family does not have."""
    if family.startswith("sd3"):
        if text_encoder is not None:
            raise ValueError("text_encoder: Stable Diffusion 3 has three: --text-encoders FOLDER")
    elif text_encoders is not None or not t5:
        option = "text_encoders" if text_encoders is not None else "no_t5"
        raise ValueError(f"{option}: only for Stable Diffusion 3")


def lying(given: str | Path | None, path: Path, found: list[Source]) -> tuple[Path, list[Source]]:
    """Where a part is taken from: the place that is given, else the model's own."""
    return (path, found) if given is None else (Path(given), held(given))


def held(place: str | Path) -> list[Source]:
    """Every network of a file, of a folder, or of files with commas between them."""
    files = [place] if Path(place).exists() else str(place).split(",")
    return [source for file in files for source in sources(Path(file))]


OPTIONS: dict[Kind, str] = {"autoencoder": "--vae", "text encoder": "--text-encoder"}


def wanted(kind: Kind, there: set[Kind], path: Path, optional: bool) -> bool:
    if kind not in there and not optional:
        raise ValueError(f"{path}: holds no {kind}: name one with {OPTIONS[kind]} FILE")
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
    if isinstance(parts.text, Encoders):
        check_encoders(parts.text, row.model, path)
        return parts
    width = getattr(row.model, "context_width", None)
    if parts.text is not None and width != parts.text.config.width:
        raise ValueError(
            f"{path}: the denoiser attends to texts of width {width}, "
            f"the text encoder makes {parts.text.config.width}"
        )
    return parts


def check_encoders(text: Encoders, model: ModelConfig, path: Path) -> None:
    assert isinstance(model, MMDiTConfig)
    configs = text.clip_l.config, text.clip_g.config
    pooled = sum(config.projection or config.width for config in configs)
    if pooled != model.pooled_width:
        raise ValueError(
            f"{path}: the denoiser wants a pooled text of {model.pooled_width} numbers, its CLIP "
            f"encoders make {pooled}"
        )
    if text.clip_g.projection is None:
        raise ValueError(
            f"{path}: the larger of its CLIP encoders holds no projection (text_projection): not "
            "bigG, which Stable Diffusion 3 wants"
        )
    widths = [sum(config.width for config in configs)]
    widths += [] if text.t5 is None else [text.t5.config.width]
    if max(widths) > model.context_width or widths[1:] not in ([], [model.context_width]):
        raise ValueError(
            f"{path}: the denoiser attends to texts of width {model.context_width}, the encoders "
            f"make {' and '.join(map(str, widths))}"
        )
