"""Pictures a second of a 20-step DDIM, beside diffusers with the same layers, in turns.

    python benchmarks/sampling_speed.py

Ours is Pipeline.sample. Theirs is the loop of their DDIMPipeline (its draw of the noise, the
network, DDIMScheduler) written out, so that it runs in bf16 too. Both networks hold their weights
in the precision they run in. How to install diffusers: peers.py.
"""

import argparse
import statistics
from collections.abc import Iterator

import torch
from measure import Work, in_turns, machine, notes, parameters, ratio, show
from peers import Diffusers, MissingPeerError

from minidiffusion.checkpoints.catalog import Denoiser, Row
from minidiffusion.diffusion import VariancePreserving
from minidiffusion.models import UNet, UNetConfig
from minidiffusion.pipelines.load import pipeline
from minidiffusion.shapes import Cond

STEPS, SIDE = 20, 28
TOY = UNetConfig(channels=32, multipliers=(1, 2), attention=(0, 1), head_width=32, groups=8)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ours(batch: int, dtype: torch.dtype) -> Work:
    row = Row(TOY, VariancePreserving(schedule="linear"), "eps", (1, SIDE, SIDE))
    pipe = pipeline(Denoiser(UNet(TOY).eval(), row), torch.device("cpu"), dtype)
    return lambda: pipe.sample(
        Cond(), batch, sampler="ddim", num_steps=STEPS, spacing="trailing", guidance_scale=1.0
    )


def theirs(batch: int, dtype: torch.dtype) -> Work:
    network = Diffusers(TOY, SIDE).eval().to(dtype)
    from diffusers import DDIMScheduler

    schedule = {"beta_schedule": "linear", "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False, **schedule)

    @torch.no_grad()
    def work() -> torch.Tensor:
        scheduler.set_timesteps(STEPS)
        x = torch.randn(batch, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            out = network(x.to(dtype), t, Cond()).float()
            x = scheduler.step(out, t, x).prev_sample
        return x

    return work


def works(batch: int) -> dict[str, Work]:
    found = {f"minidiffusion {name}": ours(batch, dtype) for name, dtype in DTYPES.items()}
    try:
        found |= {f"diffusers {name}": theirs(batch, dtype) for name, dtype in DTYPES.items()}
    except MissingPeerError as error:
        notes.print(f"skipped, not installed (see benchmarks/peers.py): {error}")
    return found


def ratios(batch: int, seconds: dict[str, list[float]]) -> Iterator[list[object]]:
    for precision in DTYPES:
        slow, fast = f"diffusers {precision}", f"minidiffusion {precision}"
        if slow in seconds:
            yield [batch, fast, slow, ratio(seconds[slow], seconds[fast])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64], metavar="PICTURES")
    arguments = parser.parse_args()
    speeds: list[list[object]] = []
    faster: list[list[object]] = []
    for batch in arguments.batches:
        notes.print(f"batch {batch} ...")
        rounds = arguments.rounds * (4 if batch == 1 else 1)  # short works want more rounds
        seconds = in_turns(works(batch), rounds)
        for name, each in seconds.items():
            middle = statistics.median(each)
            speeds.append([batch, name, f"{batch / middle:.1f}", f"{1000 * middle / STEPS:.1f}"])
        faster += ratios(batch, seconds)
    size = f"{parameters(UNet(TOY)) / 1e6:.2f} M parameters, {SIDE} px, {STEPS} steps of DDIM"
    show(f"Sampling: {size}; medians", ["batch", "network", "pictures/s", "ms a step"], speeds)
    header = ["batch", "this", "over that", "median (least to most)"]
    show("How many times faster", header, faster)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
