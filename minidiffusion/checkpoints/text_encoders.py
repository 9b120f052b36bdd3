"""Text encoders: one CLIP, T5 alone, or the three of Stable Diffusion 3."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn

from minidiffusion.checkpoints import official
from minidiffusion.checkpoints.official import Shelf, Source, pick, sources
from minidiffusion.layers.quantized import How
from minidiffusion.layers.storage import store_slow_weights_
from minidiffusion.models import CLIPConfig, CLIPText, MMDiTConfig, ModelConfig, T5Encoder

NO_CHANGES: Mapping[str, object] = {}
CLIP_L: dict[str, object] = {"skip": 1, "final_norm": False, "activation": "quick_gelu"}
CLIP_G = {"skip": 1, "final_norm": False, "activation": "gelu"}
"""What no shape says of Stable Diffusion 3's."""


class Encoders(NamedTuple):
    """The three text encoders of Stable Diffusion 3; it draws without T5 as well."""

    clip_l: CLIPText
    clip_g: CLIPText
    t5: T5Encoder | None


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
        text = read_encoder(path, found, device, dtype, changes)
    store_slow_weights_(text, torch.device(device))
    return text


def read_encoder(
    path: Path, found: list[Source], device: torch.device | str, dtype: torch.dtype | None,
    changes: Mapping[str, object], shelf: Shelf | None = None,
) -> CLIPText:  # fmt: skip
    source = pick(found, "text encoder", path)
    config = cast(CLIPConfig, official.config_of(source, changes))
    return cast(CLIPText, official.load(source, config, device, dtype, shelf=shelf))


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
    changes = clip_l, clip_g
    encoders = read_encoders(Path(path), held(path), device, dtype, t5, changes=changes)
    store_slow_weights_(nn.ModuleList(filter(None, encoders)), torch.device(device))
    return encoders


def read_encoders(
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


def held(place: str | Path) -> list[Source]:
    """Every network of a file, of a folder, or of files with commas between them."""
    files = [place] if Path(place).exists() else str(place).split(",")
    return [source for file in files for source in sources(Path(file))]


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
