"""Time of a training step on an accelerator, as it is and through torch.compile.

    python benchmarks/gpu.py

In bf16 autocast, beside the rate of bf16 matrix products measured in the same run. A machine
without an accelerator is told so.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from measure import Work, flops, notes, parameters, show

from minidiffusion.device import autocast, pick
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


def seconds(work: Work, count: int) -> float:
    """The median, each with the queue empty before and after."""
    each = []
    for k in range(count + 3):
        torch.accelerator.synchronize()
        began = time.perf_counter()
        work()
        torch.accelerator.synchronize()
        if k >= 3:
            each.append(time.perf_counter() - began)
    return statistics.median(each)


def matrix_rate(where: torch.device, side: int = 8192) -> float:
    """Operations a second of one large bf16 product."""
    a, b = (torch.randn(side, side, device=where, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, 20)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    arguments = parser.parse_args()
    where = pick()
    if where.type == "cpu":
        print("no accelerator on this machine: nothing to measure here")
        return
    rate = matrix_rate(where)
    rows = [measured(name, rate, where, arguments.steps) for name in arguments.presets]
    header = ["network", "batch", "M parameters", "GFLOP a picture"]
    for form in ("eager", "compiled"):
        header += [f"{form}: ms a step", "pictures/s", "of the matrix rate"]
    show("Training step: forward, backward, AdamW, bf16 autocast", header, rows)
    name = torch.accelerator.current_accelerator()
    kind = torch.get_device_module(where).get_device_name() if where.type != "mps" else name
    print(f"\n{kind}, bf16 products at {rate / 1e12:.0f} TFLOP/s, torch {torch.__version__}")


if __name__ == "__main__":
    main()
