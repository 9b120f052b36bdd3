"""The model that ships: how fast it draws, and how fast its parts train beside the matrix rate.

python benchmarks/emoji.py drawing
python benchmarks/emoji.py training --through RUN     (a folder with tiny_vae and tiny_clip in it)
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import GEMM, Work, in_turns, machine, notes, parameters, product, show
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minidiffusion import load, load_recipe
from minidiffusion.data.loader import batches
from minidiffusion.layers.quantized import How
from minidiffusion.training.loop import Trainer, opened
from minidiffusion.training.parallel import World

PROMPT = "a pizza, 3d style"
CONFIGS = Path(__file__).parents[1] / "configs"


def drawing(rounds: int, model: str) -> None:
    """Seconds: a fresh process to its first picture, and pictures of a process that is warm."""
    with tempfile.TemporaryDirectory() as out:
        words = ["generate", PROMPT, "--model", model, "--out", out]
        fresh = [began(words) for _ in range(rounds)]
    works: dict[str, Work] = {}
    ways: dict[str, tuple[str, How | None]] = {
        "fp32": ("fp32", None), "bf16": ("bf16", None), "int8": ("fp32", "int8-dynamic"),
    }  # fmt: skip
    for name, (precision, quantize) in ways.items():
        pipe = load(model, precision=precision, quantize=quantize)
        for steps in (20, 8):
            works[f"{steps} steps, {name}"] = lambda pipe=pipe, steps=steps: pipe.generate(
                PROMPT, num_steps=steps
            )
    seconds = in_turns(works, rounds)
    rows = [["fresh process to the first file, 20 steps", *spread(fresh)]]
    rows += [[f"one picture, {name}", *spread(each)] for name, each in seconds.items()]
    show(
        "Drawing 64 x 64 pixels, guidance in one batch", ["what", "seconds", "least", "most"], rows
    )


def began(words: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "minidiffusion", *words], check=True, capture_output=True)
    return time.perf_counter() - start


def spread(each: list[float]) -> list[str]:
    return [f"{x:.2f}" for x in (statistics.median(each), min(each), max(each))]


def training(rounds: int, through: Path) -> None:
    """Pictures a second of whole steps, and the share of the matrix rate that they come to."""
    rows = []
    runs = {"autoencoder": str(through / "tiny_vae"), "clip": str(through / "tiny_clip")}
    cache = tempfile.TemporaryDirectory()  # what is encoded for one denoiser serves the other
    encoded = {f"through.{part}": run for part, run in runs.items()} | {"out": cache.name}
    for name in ("tiny_vae", "tiny_clip", "tiny_mmdit", "tiny_unet"):
        changes = encoded if name in ("tiny_mmdit", "tiny_unet") else {}
        recipe = load_recipe(CONFIGS / f"{name}.yaml", changes)
        trainer = Trainer(recipe, opened(recipe), torch.device("cpu"), World())
        source = batches(trainer.dataset, 0, trainer.batch)
        flop = counted(trainer, *next(source))
        works: dict[str, Work] = {
            "step": lambda t=trainer, s=source: t.step(*next(s)),
            "product": product(torch.bfloat16),
        }
        notes.print(f"{name}: {flop / 1e9:.2f} GFLOP a picture")
        seconds = in_turns(works, rounds)
        rates = [trainer.batch / s for s in seconds["step"]]
        shares = [
            rate * flop / (2 * GEMM**3 / s)
            for rate, s in zip(rates, seconds["product"], strict=True)
        ]
        rows.append([
            name, f"{parameters(trainer.network) / 1e6:.2f}", trainer.batch, f"{flop / 1e9:.2f}",
            *(f"{x:.0f}" for x in (statistics.median(rates), min(rates), max(rates))),
            f"{100 * statistics.median(shares):.0f} %",
        ])  # fmt: skip
    head = ["recipe", "M weights", "batch", "GFLOP a picture", "pictures/s", "least", "most"]
    show("Training, bf16, whole steps", [*head, "of the bf16 matrix rate"], rows)


def counted(trainer: Trainer, first: int, batch: object) -> float:
    """Products and convolutions of a forward and backward pass, a picture."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trainer.gradients(first, batch)  # type: ignore[arg-type]
    trainer.network.zero_grad(set_to_none=True)
    return counter.get_total_flops() / trainer.batch


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("what", choices=("drawing", "training"))
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--model", default="emoji")
    words.add_argument("--through", type=Path, default=Path("runs"))
    given = words.parse_args()
    print(machine())
    if given.what == "drawing":
        drawing(given.rounds, given.model)
    else:
        training(given.rounds, given.through)


if __name__ == "__main__":
    main()
