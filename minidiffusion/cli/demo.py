"""`minidiffusion demo`: words become pictures by the model that ships, in ways to look at."""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from minidiffusion.cli import figures
from minidiffusion.cli.main import check_seeds, seed
from minidiffusion.data.pictures import load_picture, save_png, to_pil
from minidiffusion.data.sheets import grid
from minidiffusion.pipelines.load import SHIPPED, load
from minidiffusion.pipelines.pipeline import Pipeline

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

T = TypeVar("T")
PROMPTS = (
    "a red apple", "a smiling cat face, flat style", "a pizza, 3d style",
    "a rocket, noto style", "a red heart, 3d style", "a blue heart, flat style",
    "a panda, noto style", "a hot beverage, 3d style", "a sunflower, flat style",
    "an automobile, noto style", "a house with garden, 3d style", "a full moon, flat style",
    "a christmas tree, noto style", "a guitar, 3d style", "a snowman, flat style",
    "a fish, noto style",
)  # fmt: skip
STRIP = "a cat face, 3d style"
BEGIN, TURNED = "a red heart, 3d style", "a blue heart, 3d style"
FACE, WORN = "a grinning face, 3d style", "smiling face with sunglasses, 3d style"
STRENGTHS = (0.3, 0.5, 0.7, 0.9)
GUIDE = """
Look at
  {out}/prompts.png   what the prompts say, each in {steps} steps
  {out}/strip.png     from noise to picture: "{strip}", x above, the network's guess of x0 below
  {out}/img2img.png   "{begin}", then from it "{turned}" at strengths {strengths}
  {out}/inpaint.png   "{face}", the part to paint anew, "{worn}" in it
Try next
  {cmd}minidiffusion generate "a pizza, 3d style" --num-images 4
  {cmd}minidiffusion demo-train                    (train a network yourself: three minutes)
  {cmd}minidiffusion train configs/tiny_vae.yaml   (then tiny_clip, tiny_mmdit, tiny_mmdit_longer)
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--model", default=next(iter(SHIPPED)), help="default: %(default)s")
    verb.add_argument("--out", default="runs/emoji", help="default: %(default)s")
    verb.add_argument("--seed", type=seed, default=0, help="default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    check_seeds(arguments.seed, len(PROMPTS))
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    pipe = timed("to load the model", lambda: load(arguments.model, precision="auto"))
    if pipe.text is None or pipe.autoencoder is None:
        raise ValueError(f"{arguments.model}: demo wants a model of words and latents")
    seed, steps = arguments.seed, pipe.row.sampling.steps
    timed("for the first picture", lambda: pipe.generate(PROMPTS[0], seed=seed))
    timed("for one more picture", lambda: pipe.generate(PROMPTS[0], seed=seed))
    timed("for one in 8 steps", lambda: pipe.generate(PROMPTS[0], num_steps=8, seed=seed))
    ways = {
        f"for {len(PROMPTS)} prompts at once": ("prompts", lambda: prompts(pipe, seed)),
        "for the strip": ("strip", lambda: figures.strip(pipe, prompt=STRIP, seed=seed)),
        f"for {len(STRENGTHS)} pictures from one": ("img2img", lambda: turned(pipe, seed)),
        "for a picture painted over": ("inpaint", lambda: painted(pipe, seed)),
    }
    for name, (file, draw) in ways.items():
        save_png(timed(name, draw), out / f"{file}.png")
    print(GUIDE.format(
        out=out, steps=steps, strip=STRIP, begin=BEGIN, turned=TURNED, face=FACE, worn=WORN,
        strengths=", ".join(map(str, STRENGTHS)),
        cmd=".venv/bin/" if Path(".venv/bin/minidiffusion").exists() else "",
    ))  # fmt: skip


def timed(name: str, work: Callable[[], T]) -> T:
    """What the work gives; its time is said at once, as the whole takes a minute."""
    began = time.perf_counter()
    found = work()
    print(f"  {time.perf_counter() - began:6.2f} s  {name}", flush=True)
    return found


def prompts(pipe: Pipeline, seed: int) -> "Picture":
    return figures.sheet(pipe, prompts=PROMPTS, seed=seed)


def turned(pipe: Pipeline, seed: int) -> "Picture":
    """A picture, and what becomes of it."""
    (first,) = pipe.generate(BEGIN, seed=seed)
    made = [pipe.img2img(first, TURNED, strength=s, seed=seed)[0] for s in STRENGTHS]
    return beside([first, *made], ["given", *(f"strength {s}" for s in STRENGTHS)])


def painted(pipe: Pipeline, seed: int) -> "Picture":
    """A picture, its upper half as the mask hides it, and what is painted there."""
    (first,) = pipe.generate(FACE, seed=seed)
    mask = torch.full((1, 3, *first.size[::-1]), -1.0)
    rows = first.height
    mask[:, :, rows // 4 : rows // 2 + rows // 16] = 1
    (hole,) = to_pil(mask)
    (made,) = pipe.inpaint(first, hole, WORN, seed=seed)
    return beside([first, hole, made], ["given", "mask", "painted"])


def beside(pictures: Sequence["Picture"], labels: Sequence[str]) -> "Picture":
    x = torch.stack([load_picture(one, channels=3, size=None) for one in pictures])
    return grid(x, columns=len(x), labels=labels, scale=figures.scale_of(x))
