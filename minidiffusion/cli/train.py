"""`minidiffusion train`: a recipe, its overrides, and a live view of the run."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from minidiffusion.checkpoints import snapshot
from minidiffusion.checkpoints.catalog import MODEL_FILE, Denoiser
from minidiffusion.checkpoints.reader import write_whole
from minidiffusion.cli import dashboard, figures, logs
from minidiffusion.cli.main import MissingExtraError, fail
from minidiffusion.cli.runfolder import (
    LOG_FILE,
    RECIPE_FILE,
    check_free,
    claimed_run,
    replaced,
    restore_replaced,
)
from minidiffusion.cli.signals import Stop, is_first
from minidiffusion.data.dataset import Dataset
from minidiffusion.data.pictures import save_png
from minidiffusion.data.tar import NAME_MOST, printed
from minidiffusion.device import NAMES
from minidiffusion.models import Autoencoder, AutoencoderConfig, DualEncoder, MMDiTConfig
from minidiffusion.pipelines.load import pipeline
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.training.loop import CHECKPOINTS, Report, opened, train
from minidiffusion.training.recipe import AIMS, Recipe, load_recipe, read_yaml
from minidiffusion.training.start import LORA_FILE
from minidiffusion.training.state import ALLOWED
from minidiffusion.training.through import encoders
from minidiffusion.typed import fields_help, plain

SHORT = {
    "--model": ("model", "unet, dit, mmdit, mlp, autoencoder or dual_encoder"),
    "--data": ("data", "fashion_mnist, mnist, folder, shards or toy"),
    "--path": ("path", "rectified_flow, variance_preserving or variance_exploding"),
    "--target": ("objective.target", "what the network predicts: flow, eps, v or x0"),
    "--steps": ("run.steps", "length of the run in steps ..."),
    "--epochs": ("run.epochs", "... or in epochs ..."),
    "--minutes": ("run.minutes", "... or in minutes"),
    "--batch-size": ("run.batch_size", "pictures a step, or auto: the most that fit"),
    "--lr": ("optimizer.lr", "learning rate"),
    "--device": ("run.device", NAMES),
    "--precision": ("run.precision", "auto, fp32 or bf16"),
    "--seed": ("seed", "of everything random"),
    "--out": ("out", "folder of the run (default: runs/ and the recipe's name)"),
}
SHOWN = 32
"""Prompts of a sample sheet."""
LENGTHS = {"run.steps", "run.epochs", "run.minutes"}
EXAMPLES = """examples:
  minidiffusion train configs/fashion_unet.yaml
  minidiffusion train configs/fashion_unet.yaml --model dit --epochs 30 --batch-size 16 --lr 1e-4
  minidiffusion train configs/fashion_unet.yaml --model.channels 96 --objective.weighting min_snr
  minidiffusion train configs/sd_lora.yaml --finetune.model FILE --data.path my_pictures
  minidiffusion train --resume runs/fashion_unet
  torchrun --nproc-per-node 2 -m minidiffusion train configs/fashion_unet.yaml
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.epilog = EXAMPLES
    verb.usage = "%(prog)s RECIPE [--key VALUE ...]   or   %(prog)s --resume RUN"
    verb.add_argument("recipe", nargs="?", help="a YAML file, such as those in configs/")
    run_arguments(verb)
    common = verb.add_argument_group("common values")
    for option, (key, text) in SHORT.items():
        common.add_argument(option, dest=key, default=None, metavar="VALUE", help=text)
    every = verb.add_argument_group("every value, by its dotted key")
    seen = {option.removeprefix("--") for option in SHORT} | {"out"}
    for key, takes, default in fields_help(Recipe):
        if key not in seen:
            seen.add(key)
            text = f"{takes} (default {default})".replace("%", "%%")
            every.add_argument(f"--{key}", dest=key, default=None, metavar="VALUE", help=text)


def run_arguments(verb: argparse.ArgumentParser) -> None:
    """Those of every verb that trains."""
    verb.add_argument("--resume", metavar="RUN", help="go on with this run's newest checkpoint")
    verb.add_argument(
        "--until", type=int, metavar="STEP", help="stop after this step, to go on later"
    )
    verb.add_argument(
        "--allow", action="append", choices=ALLOWED, help="go on though these have changed since"
    )
    verb.add_argument("--force", action="store_true", help="replace a run that is in the way")


def overrides(arguments: argparse.Namespace) -> dict[str, object]:
    """What the command line says of the recipe; a length there replaces the recipe's."""
    known = {"recipe", "resume", "until", "allow", "force", "verb", "run"}
    given = {
        key: value(key, text) for key, text in vars(arguments).items()
        if key not in known and text is not None
    }  # fmt: skip
    if given.keys() & LENGTHS:
        given = dict.fromkeys(LENGTHS - given.keys()) | given
    return given


def value(key: str, text: str) -> object:
    """What a word of the command line would be in a recipe."""
    if key == "out":
        return text
    try:
        return read_yaml(text)
    except (yaml.YAMLError, RecursionError):
        raise ValueError(f"{key}: cannot be read as YAML: {text!r}") from None


def run(arguments: argparse.Namespace) -> None:
    given = overrides(arguments)
    if arguments.resume and (arguments.recipe or arguments.force):
        fail("train: --resume goes on with a run and its own recipe: give it no other, nor --force")
    if arguments.resume:
        recipe = resumed(arguments.resume, given)
    elif arguments.recipe:
        recipe = load_recipe(arguments.recipe, given)
        recipe = replace(recipe, out=recipe.out or f"runs/{Path(arguments.recipe).stem}")
    else:
        fail("train: give a recipe, such as configs/fashion_unet.yaml, or --resume RUN")
    follow(recipe, arguments)


def resumed(run: str, given: dict[str, object]) -> Recipe:
    """The recipe of a run, with what the command line says laid over it."""
    folder = Path(run)
    if is_first():
        restore_replaced(folder)
    if not (folder / RECIPE_FILE).exists():
        fail(f"{folder}: no run to resume: it holds no {RECIPE_FILE}")
    return replace(load_recipe(folder / RECIPE_FILE, given), out=str(folder))


def follow(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """The run as `run_arguments` ask for it, to its end."""
    if arguments.allow and not arguments.resume:
        fail("--allow: says what may differ from the run that --resume names")
    watch(recipe, bool(arguments.resume), arguments.until, arguments.force, arguments.allow or ())
    if is_first():
        show_next(recipe, Path(str(recipe.out)))


def show_next(recipe: Recipe, out: Path) -> None:
    """What a finished run is for."""
    tuned = recipe.finetune
    if tuned is not None:
        more = f" --text-encoders {tuned.text_encoders}" if tuned.text_encoders else ""
        more += " --no-t5" if tuned.no_t5 else ""
        begin = 'Next: minidiffusion generate "..." --model'
        if (out / LORA_FILE).exists():
            print(f"{begin} {tuned.model} --lora {out / LORA_FILE}{more}")
        elif (out / MODEL_FILE).exists():
            print(f"{begin} {out / MODEL_FILE}{more}")
    elif (out / MODEL_FILE).exists() and type(recipe.model) in AIMS:
        part = "autoencoder" if isinstance(recipe.model, AutoencoderConfig) else "clip"
        path = getattr(recipe.data, "path", None)
        own = f" --data {recipe.data.name} --data.path {path}" if path else ""
        print(f"Next: minidiffusion train configs/tiny_mmdit.yaml{own} --through.{part} {out}")
    elif (out / MODEL_FILE).exists() and recipe.through is not None:
        print(f'Next: minidiffusion generate "a red apple" --model {out}')
        print(f"   or: minidiffusion evaluate {out}")
    elif (out / MODEL_FILE).exists():
        print(f"Next: minidiffusion sample {out}   or   minidiffusion evaluate {out}")
        if isinstance(recipe.model, MMDiTConfig):
            print(f'   or: minidiffusion generate "..." --model {out}')


def watch(
    recipe: Recipe, resume: bool, until: int | None = None, force: bool = False,
    allow: Sequence[str] = (),
) -> None:  # fmt: skip
    """Train, with a progress display, the log, sample sheets and, at the end, the loss curve."""
    out, stop = Path(str(recipe.out)), Stop(recipe.out)
    if is_first():
        restore_replaced(out)
    if is_first() and not (resume or force):
        check_free(out)
    dataset = opened(recipe)
    with claimed_run(out) if is_first() else nullcontext():
        # Killed before its first checkpoint: a run is a function of its recipe, so it starts over.
        resume = resume and bool(snapshot.listing(out / CHECKPOINTS))
        reports = train(
            recipe, resume=out if resume else None, until=until, dataset=dataset, allow=allow,
            stop=stop,
        )  # fmt: skip
        with replaced(out) if is_first() and force else nullcontext():
            first = next(reports, None)
        if first is not None:
            with stop.heeded():
                last = show(first, reports, recipe, resume, dataset)
            if last.step != last.total:
                stop.leave()
        elif is_first():
            print(f"{out}: nothing to do, the run has its length already")


def show(
    first: Report, reports: Iterator[Report], recipe: Recipe, resume: bool, dataset: Dataset
) -> Report:
    """What `watch` makes of a run's reports, of which it gives the last."""
    out, report = Path(str(recipe.out)), first
    if not is_first():
        for report in reports:
            sampled(report, recipe, out, None)
        return report
    if not resume:
        text = yaml.safe_dump(plain(recipe), sort_keys=False)
        write_whole(out / RECIPE_FILE, [text.encode()])
        list_quarantined(dataset, out / "quarantined.txt")
    refresh = dashboard.Refreshed(out, recipe.run.clip)
    with logs.opened(out, first.step - 1) as log, logs.display(out.name) as line:
        for report in chained(first, reports):
            log.add(report)
            line(log.recent)
            sampled(report, recipe, out, log)
            if any(every and report.step % every == 0
                   for every in (recipe.run.save_every, recipe.run.sample_every)):  # fmt: skip
                refresh()
    try:
        figures.loss_curve(out / LOG_FILE, out / "loss.png")
        dashboard.draw(out / LOG_FILE, out / dashboard.FILE, recipe.run.clip)
    except MissingExtraError as error:
        print(f"no loss.png, no {dashboard.FILE}: {error}")
    return report


def list_quarantined(dataset: Dataset, path: Path) -> None:
    """Say how many pictures were left out, and leave the list with the reasons."""
    bad: list[tuple[str, str]] = getattr(dataset, "quarantined", [])
    if bad:
        # A name may hold a newline, or bytes that are in no UTF-8.
        lines = (f"{printed(name, NAME_MOST)}: {printed(reason)}\n" for name, reason in bad)
        write_whole(path, ["".join(lines).encode()])
        print(f"{len(bad)} bad pictures were left out; {path} lists them")


def chained(first: Report, rest: Iterator[Report]) -> Iterator[Report]:
    yield first
    yield from rest


def sampled(report: Report, recipe: Recipe, out: Path, log: logs.Log | None) -> None:
    """Every sample_every steps a sheet of the averaged network; gathering takes every rank."""
    every = recipe.run.sample_every
    if not every or report.step % every:
        return
    trained = report.average()
    if log is None or isinstance(trained, DualEncoder):  # which draws nothing
        return
    if isinstance(trained, Autoencoder):
        picture = figures.compared(trained, opened(recipe))
    else:
        picture = figures.sheet(*drawing(trained, recipe))
    (out / "samples").mkdir(exist_ok=True)
    save_png(picture, out / "samples" / f"step_{report.step:06d}.png")
    log.picture("samples", np.asarray(picture), report.step)


def drawing(trained: Denoiser, recipe: Recipe) -> tuple[Pipeline, int, Sequence[str]]:
    """What draws a sheet, its rows of classes, its prompts: the recipe's, or some of its data's."""
    pipe = pipeline(trained)
    if recipe.through is None:
        return pipe, 2, ()
    found = encoders(recipe.through, pipe.device)
    data = opened(recipe)
    spread = [i * len(data) // SHOWN for i in range(SHOWN)]
    prompts = recipe.run.prompts or data.batch(spread).captions
    return replace(pipe, text=found.text, autoencoder=found.autoencoder), 2, prompts
