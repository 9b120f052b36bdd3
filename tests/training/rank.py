"""Runs that torchrun starts, one after the other in one world: ``rank.py CASES.json``.

Each case names a model, a strategy and a folder; the first rank prints every run's hashes as JSON.
Imported, it offers the same runs to this process alone.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minidiffusion.data import Tensors
from minidiffusion.models import DiTConfig, ModelConfig, UNetConfig
from minidiffusion.training import loop, memory, parallel
from minidiffusion.training.optimizers import AdamW, Muon, Schedule
from minidiffusion.training.recipe import Recipe, Run

# Widths that no vector register divides, and pieces of unequal size: rounding must not care.
MODELS: dict[str, ModelConfig] = {
    "unet": UNetConfig(
        channels=10, multipliers=(1, 2), attention=(0, 1), blocks=1, groups=5, heads=2
    ),
    "dit": DiTConfig(width=20, depth=2, heads=2),
}
STEPS = 15
AVERAGES = {"averages": (0.05, 0.1), "average_every": 5}
PARTS = ("weights", "average", "power_0", "power_1", "optimizer")


def dataset() -> Tensors:
    numbers = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (40, 3, 8, 8), generator=numbers, dtype=torch.uint8)
    return Tensors(x, torch.randint(0, 3, (40,), generator=numbers), ("a", "b", "c"))


def recipe(case: dict[str, Any]) -> Recipe:
    usual = {"steps": STEPS, "batch_size": 8, "precision": "fp32", "device": "cpu", "clip": 0.05}
    run = Run(**{**usual, "save_every": 5, **AVERAGES, **case.get("run", {})})
    optimizer = Muon(lr=2e-3) if case.get("muon") else AdamW(lr=2e-3)
    return Recipe(
        model=MODELS[case["model"]], optimizer=optimizer, schedule=Schedule(warmup=3), run=run,
        out=case["out"],
    )  # fmt: skip


def run(case: dict[str, Any]) -> list[str]:
    """The hashes of weights, averages and optimizer where the run ends; its last loss and parts."""
    with pytest.MonkeyPatch.context() as patch:
        if "free" in case:  # each rank believes to have memory of its own
            free = case["free"][int(os.environ.get("RANK", "0"))]
            patch.setattr(memory.devices, "free_bytes", lambda where: free)
        return train(case)


def train(case: dict[str, Any]) -> list[str]:
    resume = case["out"] if case.get("resume") else None
    loss = clipped = 0.0
    parts: dict[str, float] = {}
    steps = 0

    def stop() -> bool:  # of the second rank alone
        return steps == case.get("stop") and os.environ.get("RANK", "1") == "1"

    for report in loop.train(recipe(case), resume, case.get("until"), dataset(), stop=stop):
        steps = report.step
        loss, clipped, parts = report.loss, clipped + (report.norm > 0.05), report.parts
        if case.get("kill") == report.step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
    assert clipped, "clipping was to be tried"
    if os.environ.get("RANK", "0") != "0":
        return []  # the first rank writes, and may not be done
    newest = max((Path(case["out"]) / loop.CHECKPOINTS).iterdir())
    files = [newest / f"{part}.safetensors" for part in PARTS]
    gap = parts.pop("ema gap", 0.0)  # summed over pieces, so in another order
    said = [repr(loss), repr(parts), f"{gap:.4g}"]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] + said


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    device = torch.device("cpu")
    with parallel.joined(device) as world:
        for name, case in cases.items():
            found = run(case)
            if world.rank == 0:
                print(json.dumps({"name": name, "found": found}), flush=True)


if __name__ == "__main__":
    main()
