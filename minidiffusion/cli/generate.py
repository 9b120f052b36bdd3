"""`minidiffusion generate`: words, a picture, a mask become pictures, each with its own recipe."""

import argparse
import re
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from threading import Thread
from typing import TYPE_CHECKING, get_args

from minidiffusion.cli.main import check_seeds, fail, seed
from minidiffusion.cli.progress import Progress
from minidiffusion.cli.prompts import PromptFile
from minidiffusion.data.parameters import check_texts
from minidiffusion.data.pictures import save_png
from minidiffusion.device import NAMES
from minidiffusion.diffusion import SAMPLERS, SPACINGS
from minidiffusion.files import sweep
from minidiffusion.layers.quantized import How
from minidiffusion.pipelines.generation import ImageLoop
from minidiffusion.pipelines.inputs import MOST_PICTURES
from minidiffusion.pipelines.load import DOWNLOADED, SHIPPED
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.pipelines.settings import (
    Settings,
    batches,
    model_hash,
    opened,
    prepared,
    settled,
    stream_options,
)
from minidiffusion.typed import build

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

EXAMPLES = """examples:
  minidiffusion generate "a red apple, 3d style" --num-images 4
  minidiffusion generate "an astronaut scuba diving" --model v1-5-pruned-emaonly.safetensors
  minidiffusion generate "..." --init-image sketch.png --strength 0.75
  minidiffusion generate "..." --init-image room.png --mask mask.png
  minidiffusion generate --from-file prompts.txt --batch-size 4 --steps 20 --sampler dpmpp_2m
"""
EXACT = "each picture to the byte as if alone, whatever the batch size: one at a time"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.epilog = EXAMPLES
    verb.add_argument("prompt", nargs="?", help="what to draw")
    verb.add_argument("--from-file", metavar="FILE", help="a prompt a line, instead of one")
    verb.add_argument("--negative", dest="negative_prompt", help="what to keep away from")
    verb.add_argument(
        "--model", help="file, folder or name such as sd1.5 (the only one in models/, else emoji)"
    )
    verb.add_argument("--num-images", type=int, default=1, help="pictures of each prompt")
    verb.add_argument("--batch-size", type=int, default=1, help="pictures at once")
    verb.add_argument("--exact", action="store_true", help=EXACT)
    verb.add_argument("--out", default="out", help="folder; pictures are numbered on (out)")
    drawing_arguments(verb)
    picture_arguments(verb)
    model_arguments(verb)


def drawing_arguments(verb: argparse.ArgumentParser) -> None:
    how = verb.add_argument_group("how to draw (default: the model's own way)")
    how.add_argument("--steps", type=int, help="steps of the ladder")
    how.add_argument("--guidance", type=float, help="1: the prompt alone; 7.5 is usual")
    how.add_argument("--sampler", help=", ".join(SAMPLERS))
    how.add_argument("--spacing", help=", ".join(SPACINGS))
    how.add_argument("--seed", type=seed, help="picture i has seed + i (0)")
    how.add_argument("--width", type=int, help="pixels, a multiple of 8; of a transformer, 16")
    how.add_argument("--height", type=int, help="pixels, a multiple of 8; of a transformer, 16")
    how.add_argument("--rescale", type=float, metavar="SHARE",
        help="keep the guided output's spread at the conditional one's, 0..1")  # fmt: skip
    how.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="guide only between these network times, 0..1000")  # fmt: skip
    how.add_argument("--cfg-zero", action="store_true", help="of a flow: CFG-Zero*")
    how.add_argument("--slg", type=float, nargs="?", const=2.5, metavar="SCALE",
        help="of Stable Diffusion 3: away from what it says without some layers (2.5)")  # fmt: skip
    how.add_argument("--slg-layers", type=int, nargs="+", metavar="N", help="which (7 8 9)")
    how.add_argument("--shift", type=float, help="of a flow: more of the path at high noise (3)")
    how.add_argument("--dynamic-shift", action="store_true", help="larger for larger pictures")
    how.add_argument("--weighting", help="a1111: (word:1.3) counts more, [word] less")
    how.add_argument("--long-prompts", help="beyond 77 tokens (emoji: 24): truncate, or chunks")


def picture_arguments(verb: argparse.ArgumentParser) -> None:
    given = verb.add_argument_group("pictures to draw from")
    given.add_argument("--init-image", metavar="FILE", help="start from this picture")
    given.add_argument("--strength", type=float, help="how much of it may change, 0..1 (0.75)")
    given.add_argument("--mask", metavar="FILE", help="paint only where this picture is white")
    given.add_argument("--depth", metavar="FILE", help="depth map, for models that want one")
    given.add_argument("--fit", help="pictures of another size: crop, pad or resize (crop)")


def model_arguments(verb: argparse.ArgumentParser) -> None:
    parts = verb.add_argument_group("the model and the machine")
    parts_arguments(parts)
    parts.add_argument("--device", default="auto", help=NAMES)
    parts.add_argument("--offload", action="store_true",
        help="a part lies on the device only while it works")  # fmt: skip


def parts_arguments(parts: argparse._ArgumentGroup) -> None:
    parts.add_argument("--vae", metavar="FILE", help="another autoencoder")
    parts.add_argument("--text-encoder", metavar="FILE", help="another text encoder")
    parts.add_argument("--text-encoders", metavar="FOLDER",
        help="of Stable Diffusion 3, where its file has none; or FILE,FILE,FILE")  # fmt: skip
    parts.add_argument("--no-t5", action="store_true", help="draw without the largest of them")
    parts.add_argument("--t5-length", type=int, help="its tokens, 77..512 (256)")
    parts.add_argument("--lora", dest="loras", action="append", metavar="FILE:WEIGHT")
    parts.add_argument("--prediction", help="eps or v, where the file cannot say")
    parts.add_argument("--ema", action="store_true", help="the averaged weights of a .ckpt")
    parts.add_argument("--precision", help="auto, fp32 or bf16 (auto)")
    parts.add_argument("--quantize", help=", ".join(get_args(How)))
    parts.add_argument("--freeze-ladder", action="store_true",
        help="of Stable Diffusion 3: leave a third of its weights in the file")  # fmt: skip
    parts.add_argument("--tile", type=int, help="autoencoder in tiles of so many latent pixels")


NUMBERED = re.compile(r"[0-9]{1,12}\.png")
OTHERS = {
    "verb", "run", "prompt", "from_file", "num_images", "batch_size", "exact", "out", "device",
    "offload",
}  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    for name in ("num_images", "batch_size"):
        if not 1 <= (given := getattr(arguments, name)) <= MOST_PICTURES:
            fail(f"--{name.replace('_', '-')}: must be 1..{MOST_PICTURES}, got {given}")
    template = asked(arguments)
    check_texts(template.facts())
    prompts = listed(arguments, template)
    count = len(prompts) * arguments.num_images
    check_seeds(template.seed, count)
    out = Path(arguments.out)
    check_folder(out)
    pipe = opened(template, arguments.device, arguments.offload)
    digest = aside(template.model)  # reads 4 GB: while the first steps are taken
    inputs = prepared(template, pipe)
    loop, number = ImageLoop(pipe, inputs), None
    size = 1 if arguments.exact else arguments.batch_size
    wanted = every(template, prompts, arguments.num_images)
    with Progress(count_steps(pipe, template), count) as show:
        for batch in batches(pipe, wanted, size):
            pictures = drawn(loop, batch, show)
            for one, picture in zip(batch, pictures, strict=True):
                done = settled(one, pipe, inputs, digest.result())
                target = save_numbered(picture, out, done.facts(), number)
                number = int(target.stem)
                show.say(f"{target}  seed {done.seed}  {picture.width} x {picture.height}")


def every(template: Settings, prompts: list[str] | PromptFile, count: int) -> Iterator[Settings]:
    """Each prompt so many times, one after the other: there may be millions."""
    repeated = (prompt for prompt in prompts for _ in range(count))
    for number, prompt in enumerate(repeated):
        yield replace(template, prompt=prompt, seed=template.seed + number)


def aside(model: str) -> Future[str]:
    """The model's hash, read by a thread that an error or an interrupt does not wait for."""
    found: Future[str] = Future()

    def work() -> None:
        try:
            found.set_result(model_hash(model))
        except Exception as error:
            found.set_exception(error)

    Thread(target=work, daemon=True).start()
    return found


def count_steps(pipe: Pipeline, settings: Settings) -> int:
    return int(pipe.sampling(settings.steps).steps * settings.share)


def drawn(loop: ImageLoop, batch: list[Settings], show: Progress) -> list["Picture"]:
    """The pictures of one batch, step by step."""
    x = None
    for step in loop.steps(**stream_options(batch)):
        show.step(step.index, len(batch))
        x = step.x
    assert x is not None
    show.finish(len(batch))
    return loop.images(x)


def listed(arguments: argparse.Namespace, template: Settings) -> list[str] | PromptFile:
    """The prompts: the one on the command line, or a file's lines."""
    if (arguments.prompt is None) == (arguments.from_file is None):
        fail("generate: give a prompt, or --from-file FILE with a prompt a line")
    if arguments.from_file is not None:
        return PromptFile(Path(arguments.from_file), template)
    check_texts(replace(template, prompt=arguments.prompt).facts())
    return [arguments.prompt]


def asked(arguments: argparse.Namespace) -> Settings:
    """The settings that the command line gives, checked before anything large is read."""
    given = {key: value for key, value in vars(arguments).items()
             if key not in OTHERS and value is not None}  # fmt: skip
    if "slg_layers" in given and "slg" not in given:
        fail("--slg-layers: only with --slg")
    given["model"] = arguments.model or usual_model()
    return build(Settings, given)


def usual_model() -> str:
    """The one that was downloaded, else the one that ships."""
    found = sorted(DOWNLOADED.glob("[!.]*")) if DOWNLOADED.is_dir() else []
    if len(found) > 1:
        fail(f"--model: which one? models/ holds {len(found)}; emoji is the one that ships")
    return str(found[0]) if found else next(iter(SHIPPED))


def check_folder(out: Path) -> None:
    """Say now, not after minutes, that nothing can be written there."""
    if "\0" in str(out):
        fail("--out: a name cannot hold the character NUL")
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir():
        fail(f"{there}: not a folder; --out names another place")
    try:
        TemporaryFile(dir=there).close()
    except OSError:
        fail(f"{there}: cannot be written to; --out names another place")
    sweep(out)


def check_target(target: Path, force: bool) -> None:
    if target.exists() and not force:
        fail(f"{target}: exists already; --force replaces it, --out names another place")
    if target.is_dir():
        fail(f"{target}: a folder; --out names a file")
    check_folder(target.parent)


def save_numbered(
    picture: "Picture", out: Path, facts: dict[str, str], number: int | None = None
) -> Path:
    """The picture under the next number, after all that are there, or after this one."""
    out.mkdir(parents=True, exist_ok=True)
    if number is None:
        there = (int(path.stem) for path in out.iterdir() if NUMBERED.fullmatch(path.name))
        number = max(there, default=0)
    while True:
        number += 1
        target = out / f"{number:04d}.png"
        try:
            save_png(picture, target, facts, fresh=True)
        except FileExistsError:  # another program took the number
            continue
        return target
