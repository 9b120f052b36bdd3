"""Encoders of our own, and a model of theirs, trained by torchrun: ``rank_own.py CASES.json``.

Each case names what is trained, what of its Run is changed, and its folder; the first rank prints
every run's hashes as JSON. Imported, it offers the same runs to this process alone.
"""

import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import encoders
import pytest
import torch

from minidiffusion.models import DiscriminatorConfig
from minidiffusion.training import loop, parallel, reconstruction
from minidiffusion.training.objectives import Reconstruction
from minidiffusion.training.recipe import Recipe


def recipe(case: dict[str, Any]) -> Recipe:
    out, how = Path(case["out"]), {"steps": 6, "batch_size": 8, "clip": 0.5, **case["run"]}
    if case["what"] == "through":
        return encoders.through(Path(case["place"]), out, **how)
    made = encoders.recipe("clip" if case["what"] == "clip" else "autoencoder", out, **how)
    if case["what"] != "game":
        return made
    # The discriminator stands by for two steps.
    return replace(made, objective=Reconstruction(lpips=0.0, adversarial=0.5, adversarial_from=2))


def run(case: dict[str, Any]) -> list[str]:
    """The hashes of weights, average, optimizer and model where the run ends; its last loss."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, "DiscriminatorConfig", small)
        for report in loop.train(recipe(case), dataset=encoders.captioned(20, times=2)):
            loss, parts = report.loss, report.parts
    if os.environ.get("RANK", "0") != "0":
        return []
    out = Path(case["out"])
    newest = max((out / loop.CHECKPOINTS).iterdir())
    files = [newest / f"{part}.safetensors" for part in ("weights", "average", "optimizer")]
    hashes = [hashlib.sha256(f.read_bytes()).hexdigest() for f in [*files, out / loop_file(out)]]
    return [*hashes, repr(loss), repr(parts)]


def small(**given: Any) -> DiscriminatorConfig:
    return DiscriminatorConfig(channels=8, **given)


def loop_file(out: Path) -> str:
    (found,) = out.glob("*.safetensors")
    return found.name


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    with parallel.joined(torch.device("cpu")) as world:
        for name, case in cases.items():
            found = run(case)
            if world.rank == 0:
                print(json.dumps({"name": name, "found": found}), flush=True)


if __name__ == "__main__":
    main()
