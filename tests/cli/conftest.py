"""Runs of a few steps, trained by the command itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from minidiffusion.cli.main import main

TOY = {
    "data": {"name": "toy", "count": 64},
    "model": {"name": "mlp", "width": 8, "depth": 1},
    "optimizer": "adamw",
    "run": {"steps": 6, "batch_size": 8, "save_every": 2, "device": "cpu", "precision": "fp32"},
    "sampling": {"steps": 2},
}
PICTURES = {
    "data": {"name": "fashion_mnist", "limit": 32},
    "model": {
        "name": "unet", "channels": 8, "groups": 4, "blocks": 1, "patch": 2,
        "multipliers": [1], "attention": [0], "middle_attention": 0,
    },
    "run": {"steps": 3, "batch_size": 4, "sample_every": 2, "device": "cpu", "precision": "fp32"},
    "sampling": {"steps": 2, "sampler": "ddim"},
}  # fmt: skip


def written(path: Path, recipe: object) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two recipes and a finished run of each, which nobody changes."""
    root = tmp_path_factory.mktemp("shelf")
    for name, recipe in (("toy", TOY), ("pictures", PICTURES)):
        path = written(root / f"{name}.yaml", recipe)
        assert main(["train", str(path), "--out", str(root / name)]) == 0
    return root


Words = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Words:
    """Runs a command that must end with one line and exit code 2; returns the line."""

    def run(*words: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        err = capsys.readouterr().err
        assert end.value.code == 2
        assert err.startswith("minidiffusion: error: ") and err.endswith("\n")
        assert err.count("\n") == 1 and "Traceback" not in err and len(err) < 2100
        assert err.rstrip("\n").isprintable()
        return err.removeprefix("minidiffusion: error: ").rstrip("\n")

    return run
