"""The networks of other projects, called as ours are: (x, t, cond) -> the same shape.

    pip install -c constraints.txt diffusers
    pip install -c constraints.txt --no-deps denoising-diffusion-pytorch ema-pytorch einops
    pip install -c constraints.txt --no-deps accelerate

(scipy, tqdm and packaging, which the second wants too, come with the test extra. Without --no-deps
it would bring torchvision, of which there is no build for CPUs; with_torchvision stands in.)
"""

import importlib
import sys
from contextlib import suppress
from types import ModuleType

from torch import Tensor, nn

from minidiffusion.models import UNetConfig
from minidiffusion.shapes import Cond, Image, Times


class MissingPeerError(Exception):
    """A project to compare with is not installed; the message says which and why."""


class Diffusers(nn.Module):
    """diffusers.UNet2DModel of the same layers and weight shapes as our UNet of this config."""

    def __init__(self, c: UNetConfig, side: int) -> None:
        super().__init__()
        self.unet = _class("diffusers", "UNet2DModel")(
            sample_size=side,
            in_channels=c.in_channels,
            out_channels=c.in_channels,
            block_out_channels=tuple(c.widths),
            layers_per_block=c.blocks,
            down_block_types=[("AttnDown" if a else "Down") + "Block2D" for a in c.attention],
            up_block_types=[("AttnUp" if a else "Up") + "Block2D" for a in reversed(c.attention)],
            attention_head_dim=c.head_width,
            norm_num_groups=c.groups,
            num_class_embeds=c.classes + 1 if c.classes else None,
        )

    def forward(self, x: Image, t: Times, cond: Cond) -> Image:
        out: Tensor = self.unet(x, t, cond.labels, return_dict=False)[0]
        return out


class Lucidrains(nn.Module):
    """denoising-diffusion-pytorch's Unet: linear attention on every level but the last."""

    def __init__(self, dim: int, multipliers: tuple[int, ...], channels: int) -> None:
        super().__init__()
        with_torchvision()
        place = "denoising_diffusion_pytorch.denoising_diffusion_pytorch"
        self.unet = _class(place, "Unet")(dim=dim, dim_mults=multipliers, channels=channels)

    def forward(self, x: Image, t: Times, cond: Cond) -> Image:
        out: Tensor = self.unet(x, t)
        return out


def _class(module: str, name: str) -> type:
    try:
        found: type = getattr(importlib.import_module(module), name)
    except (ImportError, RuntimeError) as error:
        raise MissingPeerError(f"{module.split('.')[0]}: {error}") from error
    return found


def with_torchvision() -> None:
    """Something empty to import where torchvision is absent: the peer names it, and needs none.

    diffusers asks whether torchvision is there, so it must be imported before.
    """
    with suppress(ImportError):
        importlib.import_module("diffusers")
    try:
        importlib.import_module("torchvision")
    except ImportError:
        for name in ("torchvision", "torchvision.transforms", "torchvision.utils"):
            sys.modules[name] = ModuleType(name)
        sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]
        sys.modules["torchvision"].utils = sys.modules["torchvision.utils"]  # type: ignore[attr-defined]
