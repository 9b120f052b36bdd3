"""A random model in one file, made as the one that ships: denoiser, autoencoder and CLIP."""

from pathlib import Path

import torch

from minidiffusion.checkpoints.catalog import Row, Sampling, save_denoiser
from minidiffusion.checkpoints.own import packed
from minidiffusion.diffusion import RectifiedFlow
from minidiffusion.models import (
    Autoencoder,
    AutoencoderConfig,
    CLIPConfig,
    DualEncoder,
    DualEncoderConfig,
    MMDiTConfig,
    create,
)
from minidiffusion.models.clip import PictureConfig


def write_model(path: Path) -> Path:
    """Pictures of 16 x 16 pixels; nothing in it is zero, so that every part counts."""
    torch.manual_seed(0)
    coder = AutoencoderConfig(
        channels=8, multipliers=(1, 1), blocks=1, latent_channels=4, groups=4, patch=2, quant=False
    )
    text = CLIPConfig(vocabulary=600, positions=16, width=16, layers=1, heads=2, feed_forward=32,
                      projection=8)  # fmt: skip
    seen = PictureConfig(size=16, patch=8, width=16, layers=1, heads=2, feed_forward=32,
                         projection=8)  # fmt: skip
    clip = DualEncoderConfig(text, seen)
    model = MMDiTConfig(in_channels=4, width=32, depth=2, heads=2, patch=2, grid=4,
                        context_width=16, pooled_width=8)  # fmt: skip
    network = create(model)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    row = Row(model, RectifiedFlow(), "flow", (4, 4, 4), sampling=Sampling("euler", 4, None, 3.0))
    beside = [
        packed("autoencoder", coder, Autoencoder(coder).state_dict()),
        packed("clip", clip, DualEncoder(clip).state_dict()),
    ]
    save_denoiser(network.state_dict(), row, path, beside)
    return path
