"""Finetuning that torchrun starts: ``rank_sd3.py CASES.json``, a recipe in plain values each.

The first rank prints every run's hashes as JSON. Imported, it offers the same to this process.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from minidiffusion.training import loop, parallel
from minidiffusion.training.recipe import Recipe
from minidiffusion.typed import build


def run(values: dict[str, Any]) -> list[str]:
    """The hashes of weights, average, optimizer and of what the run leaves, and its last loss."""
    recipe = build(Recipe, values)
    *_, last = loop.train(recipe)
    if os.environ.get("RANK", "0") != "0":
        return []
    out = Path(str(recipe.out))
    newest = max((out / loop.CHECKPOINTS).iterdir())
    files = [newest / f"{part}.safetensors" for part in ("weights", "average", "optimizer")]
    files += sorted(out.glob("*.safetensors"))
    assert len(files) == 4
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] + [repr(last.loss)]


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    with parallel.joined(torch.device("cpu")) as world:
        for name, values in cases.items():
            found = run(values)
            if world.rank == 0:
                print(json.dumps({"name": name, "found": found}), flush=True)


if __name__ == "__main__":
    main()
