"""Pictures a second in training: our UNet beside those of other projects, in turns, on the CPU.

    python benchmarks/training_throughput.py

A step is the same work for all: draw levels, noise, network, loss, backward, AdamW. diffusers'
UNet2DModel has the same layers and weight shapes; denoising-diffusion-pytorch's Unet, which has
others, as many parameters and operations within 10 %. How to install the two: peers.py. A peer
that is not there is skipped.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product as pairs

import torch
from measure import GEMM, Work, flops, in_turns, machine, notes, parameters, product, ratio, show
from peers import Diffusers, Lucidrains, MissingPeerError
from torch import nn

from minidiffusion.device import autocast
from minidiffusion.diffusion import RectifiedFlow
from minidiffusion.models import UNet, UNetConfig
from minidiffusion.shapes import Cond
from minidiffusion.training.objectives import Objective, losses
from minidiffusion.training.optimizers import AdamW

OURS = "minidiffusion"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A size to train at, and who else does it."""

    name: str
    side: int
    batch: int
    ours: UNetConfig
    peer: str
    build: Callable[["Case"], nn.Module]


CASES = {
    "toy": Case(
        "28 px grey, 10 classes", 28, 64,
        UNetConfig(channels=64, multipliers=(1, 2), attention=(0, 1), head_width=32, classes=10),
        "diffusers", lambda case: Diffusers(case.ours, case.side),
    ),
    "cifar": Case(
        "32 px colour, half of DDPM's", 32, 16,
        UNetConfig(in_channels=3, channels=64, multipliers=(1, 2, 2, 2), attention=(0, 1, 0, 0),
                   head_width=128, blocks=1),
        "diffusers", lambda case: Diffusers(case.ours, case.side),
    ),
    "matched": Case(
        "28 px grey, other layers", 28, 64,
        UNetConfig(channels=80, multipliers=(1, 1), attention=(0, 1), head_width=80, groups=16),
        "denoising-diffusion-pytorch", lambda case: Lucidrains(48, (2, 2), case.ours.in_channels),
    ),
}  # fmt: skip


def step(network: nn.Module, case: Case, precision: str) -> Work:
    """One update as our trainer makes it, without the average and the clipping."""
    objective, path = Objective(), RectifiedFlow()
    (optimizer,) = AdamW().build(network)
    x0 = torch.rand(case.batch, case.ours.in_channels, case.side, case.side) * 2 - 1
    classes = case.ours.classes
    cond = Cond(labels=torch.randint(classes, (case.batch,)) if classes else None)

    def work() -> None:
        eps = torch.randn_like(x0)
        level = path.draw(len(x0), torch.rand(len(x0)), objective.density)
        with autocast(precision, CPU):
            out = network(level.mix(x0, eps), level.t, cond)
        losses(objective, level, out, x0, eps).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def networks(case: Case) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found: dict[str, nn.Module] = {OURS: UNet(case.ours)}
    try:
        found[case.peer] = case.build(case)
    except MissingPeerError as error:
        notes.print(f"skipped, not installed (see benchmarks/peers.py): {error}")
    return found


def measured(case: Case, rounds: int) -> tuple[list[list[object]], list[list[object]]]:
    """The rows of both tables."""
    found = networks(case)
    shape, classes = (case.ours.in_channels, case.side, case.side), case.ours.classes
    facts = {name: (parameters(net), flops(net, shape, classes)) for name, net in found.items()}
    works = {f"gemm {p}": product(dtype) for p, dtype in DTYPES.items()}
    works |= {f"{name} {p}": step(net, case, p) for (name, net), p in pairs(found.items(), DTYPES)}
    seconds = in_turns(works, rounds)
    speeds = [
        [case.name, name, f"{facts[name][0] / 1e6:.3f}", f"{facts[name][1] / 1e9:.2f}",
         *paces(case, name, facts[name][1], seconds)]
        for name in found
    ]  # fmt: skip
    return speeds, list(ratios(case, found, seconds))


def paces(case: Case, name: str, each: float, seconds: dict[str, list[float]]) -> Iterator[str]:
    """Pictures a second, and the share of the matrix rate of the same round."""
    for precision in DTYPES:
        pace = [case.batch / s for s in seconds[f"{name} {precision}"]]
        rates = [2 * GEMM**3 / s for s in seconds[f"gemm {precision}"]]
        share = statistics.median(p * each / r for p, r in zip(pace, rates, strict=True))
        yield f"{statistics.median(pace):.1f}"
        yield f"{100 * share:.0f} %"


def ratios(
    case: Case, found: dict[str, nn.Module], seconds: dict[str, list[float]]
) -> Iterator[list[object]]:
    """Of two works, how much faster the first is, round by round."""
    for peer in found.keys() - {OURS}:
        for precision in DTYPES:
            ours, theirs = f"{OURS} {precision}", f"{peer} {precision}"
            yield [case.name, ours, theirs, ratio(seconds[theirs], seconds[ours])]
    for name in found:
        slow, fast = f"{name} fp32", f"{name} bf16"
        yield [case.name, fast, slow, ratio(seconds[slow], seconds[fast])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--batch", type=int, help="another batch size, for a quick look")
    arguments = parser.parse_args()
    speeds: list[list[object]] = []
    faster: list[list[object]] = []
    for name in arguments.cases:
        case = CASES[name]
        batch = arguments.batch or case.batch
        case = replace(case, batch=batch, name=f"{case.name}, batch {batch}")
        notes.print(f"{case.name} ...")
        one, two = measured(case, arguments.rounds)
        speeds, faster = speeds + one, faster + two
    header = ["size", "network", "M parameters", "GFLOP a picture", "fp32 pictures/s",
              "of the matrix rate", "bf16 pictures/s", "of the matrix rate"]  # fmt: skip
    show("Training: forward, backward, AdamW; medians", header, speeds)
    header = ["size", "this", "over that", "median (least to most)"]
    show(f"How many times faster, over {arguments.rounds} rounds", header, faster)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
