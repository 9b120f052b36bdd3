"""`minidiffusion demo-train`: the whole way on real pictures, and what to look at afterwards."""

import argparse
from dataclasses import replace
from pathlib import Path

from minidiffusion.checkpoints.catalog import MODEL_FILE
from minidiffusion.cli import figures
from minidiffusion.cli.evaluate import check_enough, judgeable, judged, save
from minidiffusion.cli.runfolder import LOG_FILE, RECIPE_FILE
from minidiffusion.cli.train import watch
from minidiffusion.data.pictures import save_png
from minidiffusion.evaluation.features import judge
from minidiffusion.pipelines.load import load
from minidiffusion.training.recipe import load_recipe

GUIDE = """
Look at
  {out}/samples.png   a class a column, drawn with guidance 2
  {out}/strip.png     from noise to picture: x_t above, the network's guess of x0 below
  {out}/dashboard.png how the training went; log.jsonl has the numbers (tensorboard --logdir {out})
  {out}/report.md     agreement and Frechet distance, with the floor that real pictures reach
Try next
  {cmd}minidiffusion sample {out} --labels sneaker,bag --count 16 --guidance 4 --seed 7
  {cmd}minidiffusion train configs/fashion_unet.yaml         (five minutes: better pictures)
  {cmd}minidiffusion train configs/fashion_dit.yaml          (a transformer: half an hour)
  {cmd}minidiffusion train --help
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", nargs="?", default="configs/demo.yaml", help="default: %(default)s")
    verb.add_argument("--out", default="runs/demo", help="default: %(default)s")
    verb.add_argument("--minutes", type=float, help="length of the training")
    verb.add_argument("--count", type=int, default=500, help="pictures to judge (default 500)")
    verb.add_argument("--force", action="store_true", help="start over")


def run(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    lengths = {"run.steps": None, "run.epochs": None, "run.minutes": arguments.minutes}
    recipe = load_recipe(arguments.recipe, lengths if arguments.minutes is not None else {})
    recipe = replace(recipe, out=str(out))
    data = judgeable(recipe.data.name).name
    check_enough(arguments.count, judge(data).extractor)  # type: ignore[arg-type]  # a judge's
    if (out / MODEL_FILE).exists() and not arguments.force:
        print(f"{out} is trained already; --force starts over")
    elif (out / RECIPE_FILE).exists() and (out / LOG_FILE).exists() and not arguments.force:
        print(f"{out} was interrupted: going on")
        watch(replace(load_recipe(out / RECIPE_FILE), out=str(out)), resume=True)
    else:
        watch(recipe, resume=False, force=arguments.force)
    pipe = load(out, precision="auto")
    print("drawing ...")
    save_png(figures.sheet(pipe, rows=6), out / "samples.png")
    save_png(figures.strip(pipe), out / "strip.png")
    print("judging ...")
    settings = argparse.Namespace(
        data_folder=getattr(recipe.data, "folder", None),
        fid_weights=None,
        count=arguments.count,
        batch_size=250,
        seed=10_000,
    )
    scores = {
        f"guidance {scale:g}": judged(pipe, settings, {"guidance_scale": scale})
        for scale in (1.0, 2.0)
    }
    for name, score in scores.items():
        print(f"\n{name}\n{score.table()}")
    save(scores, out)
    print(
        GUIDE.format(out=out, cmd=".venv/bin/" if Path(".venv/bin/minidiffusion").exists() else "")
    )
