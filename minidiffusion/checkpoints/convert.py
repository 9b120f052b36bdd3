"""A model in other names: single file or diffusers folder, written tensor by tensor, never half."""

import errno
import json
import os
import shutil
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from minidiffusion.checkpoints import foreign
from minidiffusion.checkpoints.families import Trained
from minidiffusion.checkpoints.official import (
    Config,
    Source,
    blueprint,
    config_of,
    in_our_names,
    joined,
    pick,
    shapes_of,
    table_rules,
)
from minidiffusion.checkpoints.reader import pieces, write_durably, write_whole
from minidiffusion.checkpoints.recognise import Kind, inside
from minidiffusion.checkpoints.rename import Renamed, Rule, their_shapes
from minidiffusion.checkpoints.text_encoders import CLIP_G, clip_l, role
from minidiffusion.files import draft_of, locked, sync_folder
from minidiffusion.models import CLIPConfig, MMDiTConfig

OPENCLIP = "cond_stage_model.model."
INDEX = "model_index.json"
METADATA = {"format": "pt"}
"""Without this line transformers and diffusers refuse a file."""
NONE: Mapping[str, Mapping[str, bytes]] = {}
FOLDERS: dict[str, tuple[str, str]] = {
    "denoiser": ("unet", "diffusion_pytorch_model.safetensors"),
    "transformer": ("transformer", "diffusion_pytorch_model.safetensors"),
    "autoencoder": ("vae", "diffusion_pytorch_model.safetensors"),
    "text encoder": ("text_encoder", "model.safetensors"),
    "text encoder 2": ("text_encoder_2", "model.safetensors"),
    "T5": ("text_encoder_3", "model.safetensors"),
}
DIALECTS = {
    "denoiser": "diffusers", "autoencoder": "diffusers", "text encoder": "transformers",
    "text encoder 2": "transformers", "T5": "transformers-shared",
}  # fmt: skip
FLOW_PREFIXES = {
    "text encoder": "text_encoders.clip_l.transformer.",
    "text encoder 2": "text_encoders.clip_g.transformer.",
    "T5": "text_encoders.t5xxl.transformer.",
}
"""Where files of Stable Diffusion 3 hold the encoders that are bundled with it."""


class Content(NamedTuple):
    """A network to be written: its config, its tensors under our names, read when their turn comes.

    spare: what lies unused beside it in OpenCLIP's files, under the names of a single file.
    """

    config: Config
    tensors: Mapping[str, Tensor]
    spare: Renamed | None = None


Contents = Mapping[str, Content]
"""By kind; Stable Diffusion 3's second CLIP is the "text encoder 2"."""


def contents_of(found: list[Source], path: Path, *, ema: bool = False) -> Contents:
    """Every part of a model, each checked whole."""
    clips = sorted((one for one in found if one.part.kind == "text encoder"), key=role)
    if len(clips) == 2 and any(one.part.network == "mmdit" for one in found):
        made = {
            "text encoder": checked(clips[0], clip_l(clips[0])),
            "text encoder 2": checked(clips[1], CLIP_G),
        }
        others = [one for one in found if one.part.kind != "text encoder"]
        return {**contents_of(others, path, ema=ema), **made}
    kinds = dict.fromkeys(one.part.kind for one in found)
    return {kind: content(found, kind, path, ema=ema and kind == "denoiser") for kind in kinds}


def content(found: list[Source], kind: Kind, path: Path, *, ema: bool = False) -> Content:
    """The one part of this kind, checked whole."""
    return checked(pick(found, kind, path), {}, ema=ema)


def checked(source: Source, changes: Mapping[str, object], *, ema: bool = False) -> Content:
    config = config_of(source, changes)
    tensors = in_our_names(source, config, ema=ema)
    return Content(config, tensors, spare_of(source, tensors))


def spare_of(source: Source, tensors: Renamed) -> Renamed | None:
    """Other programs want the last layer and the projection, which Stable Diffusion 2 does not."""
    part, shapes = source.part, source.weights.shapes
    if part.dialect != "openclip":
        return None
    used = {name for rule in tensors.rules.values() for name in rule.theirs}
    names = [
        name
        for name, shape in inside(shapes, part.prefix).items()
        if name.startswith(("transformer.", "text_projection")) and shape
        if part.prefix + name not in used
    ]
    made = [Rule((OPENCLIP + name,), (part.prefix + name,)) for name in names]
    return Renamed(made, source.weights, {r.ours[0]: shapes[r.theirs[0]] for r in made}, "ours")


def theirs(one: Content, dialect: str, prefix: str = "") -> Renamed:
    """A network's tensors under the names of a dialect."""
    ours = shapes_of(blueprint(one.config))
    made = table_rules(one.config, dialect, ours, prefix)
    return Renamed(made, one.tensors, their_shapes(made, ours), "theirs")


def written(parts: list[Renamed], dtype: torch.dtype | None) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor in memory at a time.

    dtype: None leaves each its own.
    """
    lying = {
        name: torch.empty(
            part.shapes[name], dtype=dtype or part.pieces(name)[0].dtype, device="meta"
        )
        for part in parts
        for name in part
    }
    header = bytes(next(pieces(lying, METADATA)))
    yield header
    for name in json.loads(header[8:]):
        if name in lying:
            part = next(part for part in parts if name in part.rules)
            whole = joined(part.pieces(name), "cpu", lying[name].dtype)
            yield whole.reshape(-1).view(torch.uint8).numpy().data


def single_file(
    contents: Contents, family: str, out: Path, dtype: torch.dtype | None = None,
    *, fresh: bool = False,
) -> None:  # fmt: skip
    """Stability's layout: all parts in one file, which appears whole or not at all.

    fresh: FileExistsError where a file is there.
    """
    parts = []
    for kind, one in contents.items():
        dialect, prefix = single_names(kind, family)
        parts.append(theirs(one, dialect, prefix))
        if dialect == "openclip" and one.spare:
            parts.append(one.spare)
    write_whole(out, written(parts, dtype), fresh=fresh)


def single_names(kind: str, family: str) -> tuple[str, str]:
    """The dialect and the prefix of a part in a single file."""
    if kind == "denoiser":
        return "ldm", "model.diffusion_model."
    if kind == "autoencoder":
        return "ldm", "first_stage_model."
    if family.startswith("sd3"):
        return "transformers", FLOW_PREFIXES[kind]
    if family.startswith("sd1"):
        return "transformers", "cond_stage_model.transformer."
    return "openclip", OPENCLIP


def diffusers_folder(
    contents: Contents, trained: Trained, out: Path, dtype: torch.dtype | None = None,
    tokenizers: Mapping[str, Mapping[str, bytes]] = NONE, variant: str = "", fresh: bool = False,
) -> None:  # fmt: skip
    """diffusers' layout: a folder a part, and the configs that its loaders read.

    tokenizers: their folders, and the files in each. variant: a word in the weights' names, "fp16".
    The folder appears whole or not at all; one that is there before is replaced, or with ``fresh``
    a FileExistsError.
    """
    restore(out)
    draft = draft_of(out)
    draft.mkdir()
    with locked(draft):
        try:
            write_parts(contents, trained, draft, dtype, tokenizers, variant)
            replace_folder(draft, out, fresh)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def write_parts(
    contents: Contents, trained: Trained, folder: Path, dtype: torch.dtype | None,
    tokenizers: Mapping[str, Mapping[str, bytes]], variant: str,
) -> None:  # fmt: skip
    """What `diffusers_folder` holds, down to the disk."""
    for kind, one in contents.items():
        place, name = place_of(kind, one)
        (folder / place).mkdir()
        if kind == "text encoder" and "text encoder 2" in contents:
            one = projected(one)
        name = name.replace(".", f".{variant}.") if variant else name
        write_durably(folder / place / name, written([theirs(one, DIALECTS[kind])], dtype))
        config = foreign.config_file(one.config, trained.shape[-1])
        write_json(folder / place / "config.json", config)
        sync_folder(folder / place)
    names = {place_of(kind, one)[0] for kind, one in contents.items()} | {"scheduler"}
    if "denoiser" in contents:
        (folder / "scheduler").mkdir()
        scheduler = foreign.scheduler_config(trained.path, trained.target)
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for place, files in tokenizers.items():
        (folder / place).mkdir()
        names.add(place)
        for file, data in files.items():
            write_durably(folder / place / file, [data])
    if {"denoiser", "autoencoder", "text encoder"} <= contents.keys():
        write_json(folder / INDEX, foreign.model_index(trained.family, names))
    sync_folder(folder)


def projected(one: Content) -> Content:
    """With a projection, if only one that changes nothing.

    diffusers' Stable Diffusion 3 asks for one, and draws the numbers of what is missing.
    """
    config = one.config
    assert isinstance(config, CLIPConfig)
    if config.projection is not None:
        return one
    kind = one.tensors["norm.weight"].dtype
    more = {"projection.weight": torch.eye(config.width).to(kind)}
    return Content(replace(config, projection=config.width), ChainMap(more, cast(Any, one.tensors)))


def place_of(kind: str, one: Content) -> tuple[str, str]:
    """The folder and the file of a part."""
    return FOLDERS["transformer" if isinstance(one.config, MMDiTConfig) else kind]


def replace_folder(draft: Path, out: Path, fresh: bool) -> None:
    """The draft takes the folder's name; what is there before is moved aside, and then removed."""
    if out.exists():
        if fresh:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out))
        out.rename(aside_of(out))
    draft.rename(out)
    sync_folder(out.parent)
    restore(out)


def aside_of(out: Path) -> Path:
    """Where a folder stands while another takes its place: a name that is nobody else's."""
    return out.with_name(f".minidiffusion-old-{out.name}")


def restore(out: Path) -> None:
    """A folder that was moved aside comes back, unless the one that replaces it is there."""
    aside = aside_of(out)
    if out.exists():
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.is_dir():
        aside.rename(out)


def write_json(path: Path, values: object) -> None:
    write_durably(path, [json.dumps(values, indent=2).encode() + b"\n"])
