"""A training step on an accelerator, as it is and through torch.compile, in bf16 autocast."""

from collections.abc import Callable

import torch
from accelerator import seconds
from measure import Work, flops, notes, parameters, show

from minidiffusion.device import autocast
from minidiffusion.diffusion import RectifiedFlow
from minidiffusion.models import DiTConfig, UNetConfig, create
from minidiffusion.shapes import Cond, Network
from minidiffusion.training.objectives import Objective, losses
from minidiffusion.training.optimizers import AdamW

Config = UNetConfig | DiTConfig
LATENT = {"in_channels": 4, "rows": 32, "columns": 32, "patch": 2, "classes": 1000}
PRESETS: dict[str, tuple[Config, int, int]] = {
    "UNet, DDPM's for 32 px": (
        UNetConfig(in_channels=3, channels=128, multipliers=(1, 2, 2, 2), attention=(0, 1, 0, 0),
                   heads=1), 32, 256),
    "UNet, 64 px": (
        UNetConfig(in_channels=3, channels=192, multipliers=(1, 2, 3, 4), attention=(0, 1, 1, 1),
                   head_width=64), 64, 64),
    "DiT-S/2, 32 px latents": (DiTConfig(size="S", **LATENT), 32, 256),
    "DiT-B/2, 32 px latents": (DiTConfig(size="B", **LATENT), 32, 256),
    "DiT-XL/2, 32 px latents": (DiTConfig(size="XL", **LATENT), 32, 64),
}  # fmt: skip
"""Config, side and batch."""


def step(
    network: torch.nn.Module, called: Network, c: Config, side: int, batch: int,
    where: torch.device,
) -> Work:  # fmt: skip
    """One update; ``called`` is the network or its compiled form."""
    objective, path = Objective(), RectifiedFlow()
    (optimizer,) = AdamW().build(network)
    x0 = torch.randn(batch, c.in_channels, side, side, device=where)
    labels = torch.randint(c.classes, (batch,), device=where) if c.classes else None

    def work() -> None:
        eps, u = torch.randn_like(x0), torch.rand(batch, device=where)
        level = path.draw(batch, u, objective.density)
        with autocast("bf16", where):
            out = called(level.mix(x0, eps), level.t, Cond(labels=labels))
        losses(objective, level, out, x0, eps).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def measured(name: str, rate: float, where: torch.device, count: int) -> list[object]:
    config, side, batch = PRESETS[name]
    network = create(config).to(where)
    each = flops(network, (config.in_channels, side, side), config.classes)
    forms: dict[str, Callable[..., torch.Tensor]] = {
        "eager": network, "compiled": torch.compile(network)
    }  # fmt: skip
    row: list[object] = [name, batch, f"{parameters(network) / 1e6:.1f}", f"{each / 1e9:.1f}"]
    for form, called in forms.items():
        notes.print(f"{name}, {form} ...")
        spent = seconds(step(network, called, config, side, batch, where), count)
        share = each * batch / spent / rate
        row += [f"{1000 * spent:.1f}", f"{batch / spent:.0f}", f"{100 * share:.0f} %"]
    return row


def table(names: list[str], rate: float, where: torch.device, count: int) -> None:
    header = ["network", "batch", "M parameters", "GFLOP a picture"]
    for form in ("eager", "compiled"):
        header += [f"{form}: ms a step", "pictures/s", "of the matrix rate"]
    rows = [measured(name, rate, where, count) for name in names]
    show("Training step: forward, backward, AdamW, bf16 autocast", header, rows)
