"""The families of Stable Diffusion: what an official network was trained for; no shape says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from minidiffusion.checkpoints import beside
from minidiffusion.checkpoints.official import Source
from minidiffusion.checkpoints.rename import rules
from minidiffusion.checkpoints.tables import unet
from minidiffusion.diffusion import TARGETS, RectifiedFlow, Target, VariancePreserving
from minidiffusion.models import MMDiTConfig, UNetConfig
from minidiffusion.typed import build, unknown

BESIDE = {0: "", 1: "-depth", 5: "-inpaint"}
"""What is laid beside the input: a depth map, or a mask and the latent of what it keeps."""
SIDES = {"sd1": 64, "sd2": 64, "sdxl": 128}
"""Rows of the latents that a family was trained on; those that predict v have 96."""
SHIFT = 3.0
"""Of the rectified flow of Stable Diffusion 3, whose pictures have 1024 pixels a side."""
FLOW_SIDE = 128
V_SIDE = 96
V_BIAS = 0.09
"""Above this spread of one bias in the last attention, Stable Diffusion 2 predicts v (ComfyUI)."""


class Trained(NamedTuple):
    """The fields of a row that are not sizes."""

    family: str
    path: VariancePreserving | RectifiedFlow
    target: Target
    shape: tuple[int, ...]


def trained_for(
    source: Source, config: UNetConfig | MMDiTConfig, prediction: str | None = None
) -> Trained:
    """From the network's sizes, from the configs beside it, and from `prediction`, which wins."""
    if prediction is not None and prediction not in TARGETS:
        raise unknown("prediction", f"unknown {prediction!r}", prediction, TARGETS)
    said = {}
    if source.part.dialect == "diffusers":
        said = beside.config_of(source.folder, source.part.network)
    folder = source.folder if said else Path("/dev/null")
    if isinstance(config, MMDiTConfig):
        if prediction not in (None, "flow"):
            raise ValueError(
                f"prediction: Stable Diffusion 3 predicts flow and no other, got {prediction}"
            )
        flow = build(RectifiedFlow, {"shift": SHIFT, **beside.shift(folder)}, source.where)
        most = config.grid * config.patch
        sides = sample_sizes(said, min(FLOW_SIDE, most), source, most, config.patch)
        return Trained(line_of(config), flow, "flow", (config.in_channels, *sides))
    name, family = family_of(config, source.where)
    target = prediction or beside.prediction(folder)
    if target is None:
        target = "v" if family == "sd2" and looks_like_v(source, config) else "eps"
    sides = sample_sizes(said, V_SIDE if target == "v" else SIDES[name], source)
    path = build(VariancePreserving, beside.schedule(folder), source.where)
    channels = config.out_channels or config.in_channels
    return Trained(family, path, cast(Target, target), (channels, *sides))


def sample_sizes(
    said: Mapping[str, object], usual: int, source: Source, most: int = 2**12, unit: int = 1
) -> list[int]:
    """Rows and columns of the latents that a config.json names, in multiples of a unit."""
    size: Any = said.get("sample_size")
    sides: list[int] = size if isinstance(size, list) else [usual if size is None else size] * 2
    if len(sides) != 2 or not all(
        type(n) is int and 0 < n <= most and n % unit == 0 for n in sides
    ):
        raise ValueError(
            f"{source.folder / 'config.json'}: sample_size: expected rows and columns of a latent, "
            f"at most {most}, multiples of {unit}; got {size!r}"
        )
    return sides


def line_of(config: MMDiTConfig) -> str:
    """Large and its turbo are one architecture."""
    if config.second_attention:
        return "sd3.5-medium"
    return "sd3.5-large" if config.qk_norm else "sd3"


def family_of(config: UNetConfig, where: str) -> tuple[str, str]:
    """The line, and the line with what is laid beside the input."""
    name = "sdxl" if config.pooled_width else "sd2" if config.linear_projections else "sd1"
    channels = config.out_channels or config.in_channels
    if config.in_channels - channels not in BESIDE:
        raise ValueError(
            f"{where}: in_channels: {config.in_channels} input channels for {channels} of output: "
            "not supported; as many, one more (depth) or five more (inpainting) are"
        )
    return name, name + BESIDE[config.in_channels - channels]


def looks_like_v(source: Source, config: UNetConfig) -> bool:
    """By the first norm of the last attention; False where the file lacks it."""
    rows = unet.table(config, source.part.dialect)
    ours = [row[0] for row in rows if row[0].startswith("up.") and row[0].endswith("0.norm1")]
    last = max(ours, key=lambda name: int(name.split(".")[1]))
    (rule,) = rules({(last,): rows[(last,)]}, [f"{last}.bias"], source.part.prefix)
    bias = source.weights.get(rule.theirs[0])
    return bias is not None and bias.float().std(correction=0).item() > V_BIAS
