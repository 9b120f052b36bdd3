"""`minidiffusion regenerate`: a picture once more, from nothing but what its PNG says."""

import argparse
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minidiffusion.cli.generate import check_target, count_steps, drawn
from minidiffusion.cli.main import fail
from minidiffusion.cli.progress import Progress
from minidiffusion.data.pictures import read_metadata, save_png
from minidiffusion.device import NAMES, available_bytes
from minidiffusion.pipelines.generation import ImageLoop
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.pipelines.settings import (
    Settings,
    batch_of,
    digests,
    model_hash,
    opened,
    prepared,
    read_settings,
)

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

LEAST_BYTES = 504
"""That the smallest model takes for every pixel of a batch, measured with the one that ships."""
MANY = 16
"""Pictures of a batch, above which it is said that all of them are generated again."""
EXAMPLES = """examples:
  minidiffusion regenerate out/0001.png
  minidiffusion regenerate out/0001.png --model elsewhere/v1-5-pruned-emaonly.safetensors
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.epilog = EXAMPLES
    verb.add_argument("picture", metavar="PNG", help="a picture that minidiffusion drew")
    verb.add_argument("--model", help="where the model lies now (default: where it lay then)")
    verb.add_argument("--out", help="the new file (default: beside it, NAME-again.png)")
    verb.add_argument("--device", default="auto", help=NAMES)
    verb.add_argument("--force", action="store_true", help="replace what is in the way")


def run(arguments: argparse.Namespace) -> None:
    source = Path(arguments.picture)
    texts = read_metadata(source)
    settings = read_settings(texts, str(source))
    target = Path(arguments.out or source.with_name(f"{source.stem}-again.png"))
    check_target(target, arguments.force)
    if settings.digests != digests(settings):
        given = ", ".join(settings.pictures) or "none"
        fail(f"{given}: not the pictures that {source} was drawn from")
    drawn = redrawn(replace(settings, model=arguments.model or settings.model), arguments.device)
    known = {key: texts[key] for key in settings.facts() if key in texts}
    save_png(drawn, target, known, fresh=not arguments.force)
    same = target.read_bytes() == source.read_bytes()
    print(f"{target}  {'the same bytes' if same else f'not the same bytes as {source}'}")


def usable_cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_room(settings: Settings, pipe: Pipeline) -> None:
    """A file must not ask for a batch that fills all memory."""
    height, width = settings.height or pipe.row.shape[-2], settings.width or pipe.row.shape[-1]
    needed = settings.rows * height * width * LEAST_BYTES
    if (room := available_bytes(pipe.device)) < needed:
        fail(f"rows: a batch of {settings.rows} pictures takes {needed / 1e9:.1f} GB at least, "
             f"{room / 1e9:.1f} GB are free")  # fmt: skip


def redrawn(settings: Settings, device: str) -> "Picture":
    if settings.threads is not None:  # the number of threads decides the last bits of sums
        torch.set_num_threads(min(settings.threads, cores := usable_cores()))
        if settings.threads > cores:
            warnings.warn(
                f"drawn with {settings.threads} threads, this machine has {cores} cores: the last "
                "bits may differ", stacklevel=1,
            )  # fmt: skip
    pipe = opened(settings, device)
    check_room(settings, pipe)
    found = model_hash(settings.model)
    if found != settings.model_hash:
        fail(f"{settings.model}: its hash is {found}, the picture's {settings.model_hash}: "
             "--model names another file")  # fmt: skip
    if settings.rows > MANY:
        warnings.warn(f"drawn in a batch of {settings.rows}: as many are drawn again", stacklevel=1)
    loop = ImageLoop(pipe, prepared(settings, pipe))
    with Progress(count_steps(pipe, settings), settings.rows) as show:
        return drawn(loop, batch_of(settings), show)[settings.row]
