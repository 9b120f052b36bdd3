"""What a file or a word may ask for: every read and every number has a bound, none is empty."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from minidiffusion.cli import regenerate
from minidiffusion.cli.main import main
from minidiffusion.data.pictures import read_metadata, save_png

MOST_SEED = 2**64 - 1
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """A read that does not end fails the test instead of holding it up."""
    before = signal.signal(signal.SIGALRM, Mock(side_effect=TimeoutError("still reading")))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """10 GB that take no room on the disk."""
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 10 * 2**30)
    return path


def test_recipes_that_never_end(pipe: Path, huge: Path, refused: Refused) -> None:
    for path in ("/dev/zero", "/dev/full", "/dev/null", pipe):
        assert refused("train", path) == f"{path}: a device or a pipe, not a file"
        assert "a device or a pipe" in refused("demo-train", path)
    assert refused("train", huge) == f"{huge}: larger than 1,048,576 bytes"


def test_empty_recipes(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "recipe.yaml"
    for text in ("", "\n", "# data: toy\n", "---\n", "null", "{}"):
        path.write_text(text)
        assert "recipe.yaml: an empty recipe" in refused("train", path, "--data", "toy")


def test_a_recipe_that_grows(tmp_path: Path, refused: Refused) -> None:
    """A billion laughs: ten lines of aliases that would be 10^9 values."""
    lines = ["a: &a [x]"] + [
        f"{new}: &{new} [{', '.join(['*' + old] * 10)}]"
        for old, new in zip("abcdefghi", "bcdefghij", strict=True)
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(lines))
    assert "a recipe has no aliases" in refused("train", path)
    path.write_text("data: toy")
    assert "cannot be read as YAML" in refused("train", path, "--data", "[&a 1, *a]")


def test_files_of_every_verb_that_never_end(
    shelf: Path, pipe: Path, tmp_path: Path, refused: Refused
) -> None:
    out = tmp_path / "out"
    for file in (pipe, "/dev/zero"):
        for words in (
            ["sample", file], ["evaluate", file], ["inspect", file], ["plan", file],
            ["convert", file, "--to", "single-file", "--out", out], ["demo", "--model", file],
            ["generate", "x", "--model", file], ["generate", "x", "--vae", file],
            ["generate", "x", "--init-image", file], ["generate", "x", "--lora", file],
            ["regenerate", file, "--out", out], ["shard", file, "--out", out],
            ["map", "generate", "--prompts", file, "--out", out],
            ["map", "encode", "--data", file, "--out", out],
            ["finetune", "--data", file], ["finetune", "--model", file, "--data", shelf],
            ["average", file, "--sigma-rel", 0.1, "--out", out],
        ):  # fmt: skip
            assert refused(*words)
    run = tmp_path / "run"
    assert main(["train", str(shelf / "toy.yaml"), "--out", str(run), "--until", "2"]) == 0
    last = run / "checkpoints" / "step_00000002"
    for path, reason in (
        (last / "manifest.json", "a device or a pipe"),
        (last / "average.safetensors", "a device or a pipe"),
        (run / "log.jsonl", "a device or a pipe"),
        (run / "recipe.yaml", "a device or a pipe"),
    ):
        aside = path.rename(tmp_path / "aside")
        os.mkfifo(path)
        assert reason in refused("train", "--resume", run)
        path.unlink()
        aside.rename(path)
    assert main(["train", "--resume", str(run)]) == 0


def test_a_listing_of_captions_has_a_bound(
    huge: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (8, 8)).save(data / "a.png")
    huge.rename(data / "metadata.jsonl")
    call = ["train", "configs/folder_64.yaml", "--data.path", data, "--out", tmp_path / "run"]
    assert "metadata.jsonl: larger than" in refused(*call)
    (data / "metadata.jsonl").write_text("bad\n" * 100_010)
    assert "metadata.jsonl: more than 100,000 lines are bad" in refused(*call)


TOO_MUCH = {
    "run.workers": 99999999999, "run.workers ": 257, "run.steps": 10**12, "run.epochs": "1e308",
    "run.minutes": "1e300", "run.save_every": 10**15, "run.sample_every": 10**15,
    "run.average_every": 10**15, "run.keep": 10**15, "run.micro_batch": 10**15,
    "run.batch_size": 10**15, "seed": 2**64, "data.count": 10**15, "data.seed": 2**64,
    "schedule.warmup": 10**15,
}  # fmt: skip


@pytest.mark.parametrize("key", TOO_MUCH)
def test_numbers_of_a_recipe_are_bounded(
    key: str, shelf: Path, tmp_path: Path, refused: Refused
) -> None:
    words = ["train", shelf / "toy.yaml", "--out", tmp_path / "run"]
    words += [f"--{key.strip()}", TOO_MUCH[key]]
    words += ["--run.steps", "null"] if key in ("run.epochs", "run.minutes") else []
    assert f"{key.strip()}: must be at most" in refused(*words)
    assert not list(tmp_path.iterdir())


def test_each_average_is_the_weights_once_more(
    shelf: Path, tmp_path: Path, refused: Refused
) -> None:
    widths = str([round(0.01 * i, 2) for i in range(1, 18)])
    words = ["train", shelf / "toy.yaml", "--out", tmp_path, "--run.averages", widths]
    assert "averages: 16 at most, got 17" in refused(*words)


def test_seeds(shelf: Path, tmp_path: Path, refused: Refused) -> None:
    """2^64 was 0, and -1 was 2^64 - 1, without a word."""
    toy, out = shelf / "toy", tmp_path / "out"
    model = ["generate", "bag", "--model", shelf / "pictures", "--out", out]
    for words in (["sample", toy, "--out", out], ["evaluate", toy], ["demo", "--out", out], model):
        for seed in (2**64, -1):
            assert f"--seed: must be 0..{MOST_SEED}, got" in refused(*words, f"--seed={seed}")
    assert "--seed: 18446744073709551615 and" in refused(
        "sample", toy, "--out", out, "--seed", MOST_SEED
    )
    more = refused(*model, "--seed", MOST_SEED, "--num-images", 2)
    assert f"--seed: {MOST_SEED} and 1 more go beyond {MOST_SEED}" in more
    assert not out.exists()
    assert main([str(word) for word in (*model, "--seed", MOST_SEED, "--steps", 1)]) == 0


def test_empty_words(shelf: Path, tmp_path: Path, refused: Refused) -> None:
    """`--data ""`, as of a variable that is not set, took the folder at hand."""
    toy = shelf / "toy.yaml"
    for words, name in (
        (["finetune", "--data", ""], "data.path"), (["finetune", "--data", " "], "data.path"),
        (["finetune", "--data", tmp_path, "--model", ""], "finetune.model"),
        (["train", toy, "--out", ""], "out"), (["train", ""], "recipe"),
        (["train", "--resume", ""], "resume"), (["sample", ""], "run-folder"),
        (["sample", shelf / "toy", "--out", ""], "out"),
        (["generate", "x", "--model", ""], "model"), (["shard", "", "--out", "x"], "folder"),
        (["generate", "x", "--out", ""], "out"), (["generate", "x", "--lora", ""], "loras"),
        (["generate", "x", "--init-image", ""], "init-image"),
        (["shard", tmp_path, "--out", ""], "out"), (["download", "sd1.5", "--out", ""], "out"),
        (["convert", "", "--to", "diffusers", "--out", "x"], "file"),
        (["average", "", "--sigma-rel", "0.1", "--out", "x"], "folder"),
        (["map", "encode", "--data", "", "--out", "x"], "data"), (["inspect", ""], "file"),
    ):  # fmt: skip
        assert refused(*words).endswith(f"{name}: must not be empty"), words


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        ("data: {name: folder, path: ''}", "data.path"),
        ("data: {name: shards, path: ' '}", "data.path"),
        ("data: {name: mnist, folder: ''}", "data.folder"),
        ("out: ''", "out"),
        ("finetune: {model: ''}", "finetune.model"),
        ("finetune: {model: x, vae: ''}", "finetune.vae"),
        ("through: {autoencoder: x, clip: ''}", "through.clip"),
    ],
)
def test_empty_paths_of_a_recipe(recipe: str, key: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    found = refused("train", tmp_path / "recipe.yaml")
    assert found == f"{tmp_path / 'recipe.yaml'}: {key}: must not be empty"


@pytest.fixture
def tampered(shelf: Path, tmp_path: Path) -> Callable[..., Path]:
    """A picture that says something else of how it was drawn."""
    model = str(shelf / "pictures")
    assert main(["generate", "bag", "--model", model, "--steps", "1", "--out", str(tmp_path)]) == 0
    source = tmp_path / "0001.png"

    def change(**changes: Any) -> Path:
        texts = read_metadata(source)
        texts["minidiffusion"] = json.dumps({**json.loads(texts["minidiffusion"]), **changes})
        save_png(Image.open(source), tmp_path / "other.png", texts)
        return tmp_path / "other.png"

    return change


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rows": 1000000000}, "rows: must be at most 100000, got 1000000000"),
        ({"rows": 100000}, "rows: a batch of 100000 pictures takes 39.5 GB at least, 5.0 GB are"),
        ({"seed": 2**64}, "seed: must be at most 18446744073709551615"),
        ({"seed": 10**400}, "seed: must be at most 18446744073709551615"),
        ({"seed": 1, "row": 2, "rows": 3}, "seed: those of a batch go from 0"),
        ({"threads": 10**9}, "threads: must be at most 4096"),
        ({"tile": 10**9}, "tile: must be at most 4096"),
        ({"slg_layers": [10**9]}, "slg_layers[0]: must be at most 1024"),
        ({"steps": 10**9}, "steps: must be at most 1000"),
        ({"width": 10**9}, "width: must be at most 4096"),
        ({"model": ""}, "model: must not be empty"),
    ],
    ids=str,
)
def test_a_picture_does_not_decide_how_much_is_done(
    tampered: Callable[..., Path], refused: Refused, monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any], line: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(regenerate, "available_bytes", lambda device: 5 * 10**9)
    assert line in refused("regenerate", tampered(**changes))


def test_a_picture_does_not_choose_the_threads(
    tampered: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(regenerate, "usable_cores", lambda: 3)
    assert main(["regenerate", str(tampered(threads=4096))]) == 0
    assert chosen == [3] and "this machine has 3 cores: the last bits" in capsys.readouterr().err
    chosen.clear()
    assert main(["regenerate", str(tampered(threads=2)), "--force"]) == 0
    assert chosen == [2] and "cores" not in capsys.readouterr().err


def test_samples_and_processes_are_bounded(shelf: Path, tmp_path: Path, refused: Refused) -> None:
    assert "--count: must be at most 100000" in refused("sample", shelf / "toy", "--count", 10**12)
    call = ["map", "encode", "--data", tmp_path, "--out", tmp_path / "o"]
    assert "threads at most on this machine" in refused(*call, "--workers", 10**9)
    assert "threads at most on this machine" in refused(*call, "--threads", 4000)
