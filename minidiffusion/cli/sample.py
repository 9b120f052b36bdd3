"""`minidiffusion sample`: pictures from a run."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minidiffusion.cli import figures
from minidiffusion.cli.generate import EXACT
from minidiffusion.cli.main import check_seeds, fail, seed
from minidiffusion.data.pictures import save_png, to_pil, to_pixels
from minidiffusion.data.sheets import grid
from minidiffusion.device import NAMES
from minidiffusion.diffusion import SAMPLERS, SPACINGS
from minidiffusion.files import claimed, sweep, whole_file
from minidiffusion.pipelines.inputs import MOST_PICTURES
from minidiffusion.pipelines.load import load
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.shapes import Latent

EXAMPLES = """examples:
  minidiffusion sample runs/demo
  minidiffusion sample runs/demo --labels sneaker,bag --count 16 --guidance 3 --sampler dpmpp_2m
  minidiffusion sample runs/demo --count 5000 --format npz --out samples.npz
  minidiffusion sample runs/demo --format strip
"""


FORMATS = {"grid": ".png", "png": "", "npz": ".npz", "strip": ".png"}


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.epilog = EXAMPLES
    verb.add_argument("run_folder", metavar="RUN", help="a run's folder or its model.safetensors")
    verb.add_argument("--labels", help="class names or numbers, by commas (default: all in turn)")
    verb.add_argument("--count", type=int, help="number of pictures (default: 4 of each class)")
    sampling_arguments(verb)
    formats = "one sheet; a file a picture; ADM's arrays; the way from noise to picture"
    verb.add_argument("--format", choices=FORMATS, default="grid", help=formats)
    verb.add_argument("--out", help="file, or folder for png (default: in the run's folder)")
    verb.add_argument("--batch-size", type=int, default=250, help="pictures at once")
    verb.add_argument("--exact", action="store_true", help=EXACT)
    verb.add_argument("--force", action="store_true", help="replace what is in the way")


def sampling_arguments(verb: argparse.ArgumentParser) -> None:
    """How to draw, for every verb that draws; what is not given is the run's own."""
    verb.add_argument("--steps", type=int, dest="num_steps", help="steps of the ladder")
    verb.add_argument("--sampler", help=", ".join(SAMPLERS))
    verb.add_argument("--spacing", help=", ".join(SPACINGS))
    verb.add_argument("--rescale", type=float, metavar="SHARE",
        help="keep the guided output's spread at the conditional one's, 0..1")  # fmt: skip
    verb.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="guide only between these network times, 0..1000")  # fmt: skip
    verb.add_argument("--seed", type=seed, default=0, help="picture i has seed + i")
    verb.add_argument("--device", default="auto", help=NAMES)
    # A picture must not depend on the machine; a figure over two thousand may be quick.
    usual = "auto" if verb.prog.endswith("evaluate") else "fp32"
    verb.add_argument("--precision", choices=("auto", "fp32", "bf16"), default=usual)
    if not verb.prog.endswith("evaluate"):
        verb.add_argument(
            "--guidance", type=float, dest="guidance_scale", help="1: the class alone"
        )


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `Pipeline.steps` that were given."""
    names = (
        "num_steps", "guidance_scale", "sampler", "spacing", "rescale", "guidance_interval",
    )  # fmt: skip
    given = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def opened(arguments: argparse.Namespace) -> Pipeline:
    """The pipeline of a run; what draws from words has a verb of its own."""
    pipe = load(arguments.run_folder, arguments.device, precision=arguments.precision)
    if pipe.row.family:
        fail(f"{arguments.run_folder}: no run but a Stable Diffusion model: generate draws from it")
    return pipe


def wanted(pipe: Pipeline, labels: str | None, count: int | None) -> list[int] | None:
    """Numbers of classes, repeated in turn up to the count; None for a model without."""
    if not pipe.row.classes:
        if labels is not None:
            fail("--labels: this run was trained without classes")
        return None
    numbers = list(range(len(pipe.row.classes)))
    if labels is not None:
        numbers = pipe.numbers([name.strip() for name in labels.split(",")])
    total = 4 * len(numbers) if count is None else count
    return [numbers[i % len(numbers)] for i in range(total)]


def draw(
    pipe: Pipeline, labels: list[int] | None, count: int, batch: int, seed: int,
    given: dict[str, Any],
) -> Latent:  # fmt: skip
    """Samples in batches; but for the last bits a picture depends on its seed alone."""
    parts = []
    for start in range(0, count, batch):
        some = labels[start : start + batch] if labels else None
        size = len(some) if some else min(batch, count - start)
        cond = pipe.condition(some, size)
        parts.append(pipe.sample(cond, size, seed=seed + start, **given).cpu())
    return torch.cat(parts)


def run(arguments: argparse.Namespace) -> None:
    if arguments.count is not None and not 1 <= arguments.count <= MOST_PICTURES:
        limit = "at least 1" if arguments.count < 1 else f"at most {MOST_PICTURES}"
        fail(f"--count: must be {limit}, got {arguments.count}")
    if arguments.batch_size < 1:
        fail(f"--batch-size: must be at least 1, got {arguments.batch_size}")
    pipe = opened(arguments)
    if pipe.autoencoder is not None:
        fail(f"{arguments.run_folder}: draws from words, by way of latents: generate does it")
    labels = wanted(pipe, arguments.labels, arguments.count)
    if arguments.format in ("png", "strip") and len(pipe.row.shape) != 3:
        fail(f"--format {arguments.format}: this run makes points; take grid or npz")
    check_seeds(arguments.seed, len(labels) if labels else arguments.count or 32)
    target = Path(arguments.out) if arguments.out else place(arguments)
    if target.exists() and not arguments.force:
        fail(f"{target}: exists already; --force replaces it, --out names another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK):
        fail(f"{target.parent}: cannot be written to; --out names another place")
    sweep(target.parent)
    began = time.monotonic()
    if arguments.format == "strip":
        label = labels[0] if labels and arguments.labels else None
        picture = figures.strip(pipe, prompt=label, seed=arguments.seed, **options(arguments))
        save_png(picture, target, fresh=not arguments.force)
    else:
        count = len(labels) if labels else arguments.count or 32
        size = 1 if arguments.exact else arguments.batch_size
        x = draw(pipe, labels, count, size, arguments.seed, options(arguments))
        write(pipe, x, labels, arguments, target)
    print(f"{target}  ({time.monotonic() - began:.1f} s)")


def place(arguments: argparse.Namespace) -> Path:
    run_folder = Path(arguments.run_folder)
    folder = run_folder if run_folder.is_dir() else run_folder.parent
    return folder / f"{arguments.format}-seed{arguments.seed}{FORMATS[arguments.format]}"


def write(
    pipe: Pipeline, x: Latent, labels: list[int] | None, arguments: argparse.Namespace,
    target: Path,
) -> None:  # fmt: skip
    classes = pipe.row.classes
    if arguments.format == "npz":
        known: dict[str, Any] = {}
        if labels:
            known = {"arr_1": np.array(labels)}
        pixels = to_pixels(x).numpy() if x.ndim == 4 else x.numpy()
        with whole_file(target, fresh=not arguments.force) as file:
            np.savez(file, arr_0=pixels, **known)
        return
    if x.ndim == 2:
        save_png(figures.scatter(x, labels), target, fresh=not arguments.force)
        return
    facts = {"run": str(arguments.run_folder), **{k: str(v) for k, v in options(arguments).items()}}
    names = [classes[number] for number in labels] if labels else None
    if arguments.format == "grid":
        width = len(classes) if names and not arguments.labels else min(8, len(x))
        sheet = grid(x, columns=min(width, len(x)), labels=names, scale=figures.scale_of(x))
        facts["seed"] = str(arguments.seed)
        save_png(sheet, target, facts, fresh=not arguments.force)
        return
    with claimed(target):
        sweep(target)
        for old in target.glob(5 * "[0-9]" + ".png"):  # more pictures of an earlier call
            old.unlink()
        for i, picture in enumerate(to_pil(x)):
            more = {"label": names[i]} if names else {}
            more["seed"] = str(arguments.seed + i)
            save_png(picture, target / f"{i:05d}.png", {**facts, **more})
