"""Encoders of our own at a tiny size, captioned pictures, and recipes that train on them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minidiffusion.checkpoints.own import save_part
from minidiffusion.data import Tensors
from minidiffusion.models import (
    Autoencoder,
    AutoencoderConfig,
    CLIPConfig,
    DualEncoder,
    DualEncoderConfig,
    MMDiTConfig,
)
from minidiffusion.models.clip import PictureConfig
from minidiffusion.training.objectives import Contrastive, Reconstruction
from minidiffusion.training.optimizers import AdamW
from minidiffusion.training.recipe import Recipe, Run, Through

AUTOENCODER = AutoencoderConfig(
    channels=8, multipliers=(1, 1), blocks=1, latent_channels=4, groups=4, patch=2
)
CLIP = DualEncoderConfig(
    CLIPConfig(
        vocabulary=600, positions=12, width=16, layers=2, heads=2, feed_forward=24, projection=8
    ),
    PictureConfig(size=16, patch=8, width=16, layers=1, heads=2, feed_forward=24, projection=8),
)
MMDIT = MMDiTConfig(width=16, depth=2, heads=2, qk_norm=True)
WORDS = ("apple", "bee", "cat", "dog", "egg", "fox", "goat", "hat")


def captioned(count: int = 24, times: int = 1, side: int = 16) -> Tensors:
    """Pictures of noise; each has ``times`` captions, which no other picture has."""
    numbers = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (count, 3, side, side), generator=numbers, dtype=torch.uint8)
    more = ("", " a", " b")
    captions = [f"{WORDS[i % 8]} {i}{more[k]}" for k in range(times) for i in range(count)]
    return Tensors(x, captions=tuple(captions))


def recipe(kind: str, out: Path | None = None, **run: Any) -> Recipe:
    """A recipe of 13 steps of 8 pictures on the CPU for an autoencoder, or for a CLIP."""
    usual = Run(steps=13, batch_size=8, precision="fp32", device="cpu", keep=100)
    made = Recipe(
        model=AUTOENCODER, objective=Reconstruction(lpips=0.0), optimizer=AdamW(lr=2e-3),
        run=replace(usual, **run), out=None if out is None else str(out),
    )  # fmt: skip
    if kind == "autoencoder":
        return made
    return replace(made, model=CLIP, objective=Contrastive(group=4))


def through(place: Path, out: Path | None = None, **run: Any) -> Recipe:
    """A recipe for a text-to-image model, with the encoders that `written` has put there."""
    files = Through(str(place / "autoencoder.safetensors"), str(place / "clip.safetensors"))
    made = recipe("autoencoder", out, **run)
    return replace(made, model=MMDIT, objective=Recipe().objective, through=files)


@torch.no_grad()
def written(place: Path) -> tuple[Autoencoder, DualEncoder]:
    """Both encoders with random weights, and a file of each."""
    torch.manual_seed(0)
    parts = Autoencoder(replace(AUTOENCODER, scale=0.7, shift=0.1)), DualEncoder(CLIP)
    for part in parts:
        for p in part.parameters():
            p += 0.05 * torch.randn(p.shape)
        part.eval().requires_grad_(False)
    first, second = parts
    save_part("autoencoder", first.config, first.state_dict(), place / "autoencoder.safetensors")
    save_part("clip", second.config, second.state_dict(), place / "clip.safetensors")
    return parts
