"""Tiny networks of random weights, saved as a run would save them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from minidiffusion.checkpoints.catalog import MODEL_FILE, Row, Sampling, save_denoiser
from minidiffusion.diffusion import RectifiedFlow, VarianceExploding, VariancePreserving
from minidiffusion.models import MLPConfig, UNetConfig, create
from minidiffusion.pipelines.load import load
from minidiffusion.pipelines.pipeline import Pipeline

UNET = UNetConfig(
    channels=8, groups=4, multipliers=(1, 2), attention=(0, 1), blocks=1, heads=2, classes=3
)
PATHS: dict[str, tuple[Any, Any]] = {
    "flow": (RectifiedFlow(), "flow"),
    "vp": (VariancePreserving(), "eps"),
    "ve": (VarianceExploding(), "x0"),
}


def saved(folder: Path, name: str, model: Any = UNET, **facts: Any) -> Path:
    """A run's folder. No layer is left at zero: time, class and every layer must have a say."""
    torch.manual_seed(0)
    network = create(model)
    for key, p in network.named_parameters():
        if "table" in key or not p.any():
            torch.nn.init.normal_(p, std=1.0 if "table" in key else 0.1)
    path, target = PATHS[name]
    usual = {"shape": (1, 8, 8), "classes": ("shoe", "bag", "coat"), "data": "fashion_mnist"}
    row = Row(model, path, target, sampling=Sampling(steps=4), **{**usual, **facts})
    folder.mkdir(exist_ok=True)
    save_denoiser(network.state_dict(), row, folder / MODEL_FILE)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    found = {name: saved(root / name, name) for name in PATHS}
    found["points"] = saved(root / "points", "flow", MLPConfig(width=8), shape=(2,), classes=())
    return found


@pytest.fixture(scope="session")
def pipe(runs: dict[str, Path]) -> Pipeline:
    return load(runs["flow"])


@pytest.fixture(scope="session", params=PATHS)
def any_pipe(runs: dict[str, Path], request: pytest.FixtureRequest) -> Pipeline:
    return load(runs[request.param])
