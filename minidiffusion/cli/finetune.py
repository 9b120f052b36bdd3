"""`minidiffusion finetune`: a model and a folder of captioned pictures, and no recipe."""

import argparse
from pathlib import Path
from typing import Any

from minidiffusion.checkpoints.catalog import is_run, opened
from minidiffusion.checkpoints.official import pick, sources
from minidiffusion.checkpoints.parts import load_parts
from minidiffusion.cli import train
from minidiffusion.cli.main import fail
from minidiffusion.device import NAMES
from minidiffusion.pipelines.load import SHIPPED, located
from minidiffusion.training.recipe import Recipe, merged
from minidiffusion.typed import build

OPTIONS = {
    "--model": (
        "finetune.model", "FILE",
        "file, folder, run or name, such as sd1.5, to start from (default: the model that ships)",
    ),
    "--data": ("data.path", "FOLDER", "pictures, NAME.txt beside NAME.png, or metadata.jsonl"),
    "--lora": ("finetune.lora", "RANK", "adapters of this rank; without it every weight learns"),
    "--steps": ("run.steps", "N", "length of the run"),
    "--batch-size": ("run.batch_size", "N", "pictures a step, or auto: the most that fit"),
    "--micro-batch": ("run.micro_batch", "N", "pictures at once; the rest accumulates"),
    "--lr": ("optimizer.lr", "RATE", "learning rate"),
    "--size": ("data.size", "PIXELS", "side of the square that every picture becomes"),
    "--vae": ("finetune.vae", "FILE", "where the model's file has no autoencoder"),
    "--text-encoder": ("finetune.text_encoder", "FILE", "where the model's file has none"),
    "--text-encoders": (
        "finetune.text_encoders", "FOLDER", "of Stable Diffusion 3, where its file has none"
    ),
    "--device": ("run.device", "NAME", NAMES),
    "--precision": ("run.precision", "NAME", "auto, fp32 or bf16"),
    "--seed": ("seed", "N", "of everything random"),
    "--out": ("out", "RUN", "folder of the run (default: runs/ and the model's name)"),
}  # fmt: skip
PLACES = {
    "finetune.model", "finetune.vae", "finetune.text_encoder", "finetune.text_encoders",
    "data.path", "out",
}  # fmt: skip
EXAMPLES = """examples:
  minidiffusion finetune --data my_pictures
  minidiffusion finetune --model v1-5-pruned-emaonly.safetensors --data my_pictures --lora 16
  minidiffusion finetune --model sd3.5_medium.safetensors --data my_pictures --lora 16 --no-t5
  minidiffusion finetune --model sd3.5_medium.safetensors --text-encoders encoders --data pictures
  minidiffusion finetune --resume runs/sd3.5_medium_lora
  torchrun --nproc-per-node 2 -m minidiffusion finetune --model FILE --data FOLDER
Every other value: minidiffusion train configs/sd_lora.yaml, sd_finetune, sd3_lora or sd3_finetune.
"""
OBJECTIVES: dict[str, dict[str, object]] = {
    "unet": {"density": "uniform", "weighting": "min_snr", "label_drop": 0.1},
    "mmdit": {"density": "logit_normal", "label_drop": 0.1},
}
SIZES = {"unet": (512, 2), "mmdit": (1024, 1)}
"""Pixels a side, and pictures at once."""
OWN: dict[str, Any] = {
    "optimizer": {"name": "muon", "lr": 2e-3},
    "schedule": {"warmup": 20, "decay": "cosine"},
    "run": {"steps": 500, "batch_size": 64, "ema": 0.99, "save_every": 100},
}
"""Of a model of our own, which is small."""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.epilog = EXAMPLES
    for option, (key, shown, text) in OPTIONS.items():
        verb.add_argument(option, dest=key, metavar=shown, help=text)
    verb.add_argument("--no-t5", dest="finetune.no_t5", action="store_const", const="true",
        help="of Stable Diffusion 3: captions are read without its largest encoder")  # fmt: skip
    train.run_arguments(verb)


def run(arguments: argparse.Namespace) -> None:
    if arguments.resume and arguments.force:
        fail("finetune: --resume goes on with a run: give it no --force")
    if arguments.resume:
        recipe = train.resumed(arguments.resume, given(arguments))
    else:
        recipe = asked(arguments)
    train.follow(recipe, arguments)


def given(arguments: argparse.Namespace) -> dict[str, object]:
    """What the command line says of the recipe, by dotted keys."""
    keys = {key for key, _, _ in OPTIONS.values()} | {"finetune.no_t5"}
    words = {key: text for key, text in vars(arguments).items() if key in keys and text is not None}
    return {key: text if key in PLACES else train.value(key, text) for key, text in words.items()}


def asked(arguments: argparse.Namespace) -> Recipe:
    """The recipe of configs/, with what the command line says laid over it."""
    changes = given(arguments)
    if "data.path" not in changes:
        fail("finetune: give --data FOLDER, or --resume RUN")
    name = str(changes.get("finetune.model", next(iter(SHIPPED))))
    model = located(name)
    changes["finetune.model"] = str(model)
    if "finetune.lora" in changes:
        changes["finetune.alpha"] = changes["finetune.lora"]
    lora = changes.get("finetune.lora") is not None
    stem = name if name in SHIPPED else model.stem
    changes.setdefault("out", f"runs/{stem}_{'lora' if lora else 'finetuned'}")
    files = opened(model)
    if is_run(files):
        return build(Recipe, merged(usual_of_ours(model), changes))
    network = pick(sources(model, files), "denoiser", model).part.network
    assert network in OBJECTIVES
    return build(Recipe, merged(usual(network, lora), changes))


def usual_of_ours(model: Path) -> dict[str, Any]:
    """For a run of our own that reads words."""
    parts = load_parts(model, device="meta")
    row = parts.denoiser.row
    if parts.autoencoder is None or parts.text is None:
        fail(f"--model: {model} reads no captions; `train --finetune.model` goes on from it")
    size = row.shape[-1] * parts.autoencoder.config.factor
    return {
        "data": {"name": "folder", "path": "", "size": size, "channels": 3, "fit": "pad"},
        "finetune": {},
        "objective": OBJECTIVES[row.model.name],
        **OWN,
    }


def usual(network: str, lora: bool) -> dict[str, Any]:
    """What stands in configs/ for this kind of network; the package has no folder of them."""
    size, at_once = SIZES[network]
    steps, batch, ema, warmup = (2000, 4, 0.99, 100) if lora else (5000, 16, 0.9995, 200)
    return {
        "data": {"name": "folder", "path": "", "size": size, "channels": 3, "fit": "crop"},
        "finetune": {},
        "objective": OBJECTIVES[network],
        "optimizer": {
            "name": "adamw", "lr": 1e-4 if lora else 1e-5, "betas": [0.9, 0.999],
            "weight_decay": 0.01,
        },
        "schedule": {"warmup": warmup, "decay": "cosine" if lora else "constant"},
        "run": {
            "steps": steps, "batch_size": batch, "micro_batch": at_once, "ema": ema,
            "checkpointing": True, "save_every": 250 if lora else 500,
        },
    }  # fmt: skip
