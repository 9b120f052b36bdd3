"""`minidiffusion finetune` the way a person types it, on tiny models in the official layouts."""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import official
import pytest
from PIL import Image

from minidiffusion.checkpoints.catalog import load_denoiser
from minidiffusion.checkpoints.weights import open_weights
from minidiffusion.cli import finetune as verb
from minidiffusion.cli.main import main
from minidiffusion.data import Folder
from minidiffusion.pipelines.load import SHIPPED
from minidiffusion.training.recipe import Finetune, Recipe, load_recipe

COLOURS = ("red", "green", "blue", "white")
QUICK = ("--steps", "2", "--batch-size", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("place")
    official.make(root / "sd1.safetensors", "sd1")
    official.make(root / "sd3.5_medium.safetensors", "sd3.5-medium", alone=True)
    official.make(root / "encoders", "sd3.5-medium", dialect="parts")
    for folder in ("pictures", "bare", "empty"):
        (root / folder).mkdir()
    for colour in COLOURS:
        for folder in ("pictures", "bare"):
            Image.new("RGB", (40, 32), colour).save(root / folder / f"{colour}.png")
        (root / "pictures" / f"{colour}.txt").write_text(f"a {colour} wall")
    (root / "page.safetensors").write_text("<!DOCTYPE html><html>404</html>")
    return root


@pytest.fixture
def sd3(place: Path) -> list[object]:
    return ["finetune", "--model", place / "sd3.5_medium.safetensors", "--data",
            place / "pictures", "--text-encoders", place / "encoders", "--size", 32]  # fmt: skip


@pytest.fixture
def sd1(place: Path) -> list[object]:
    return ["finetune", "--model", place / "sd1.safetensors", "--data", place / "pictures",
            "--size", 16]  # fmt: skip


def did(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def asked(*words: object) -> Recipe:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.asked(parser.parse_args([str(word) for word in words]))


# --- the same recipe as in configs/ ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "config", "lora"),
    [
        ("sd1", "sd_lora", True), ("sd1", "sd_finetune", False),
        ("sd3.5_medium", "sd3_lora", True), ("sd3.5_medium", "sd3_finetune", False),
    ],
)  # fmt: skip
def test_it_is_a_recipe_of_configs(model: str, config: str, lora: bool, place: Path) -> None:
    file, data = str(place / f"{model}.safetensors"), str(place / "pictures")
    found = asked("--model", file, "--data", data, *(("--lora", 16) if lora else ()))
    said = {"finetune.model": file, "data.path": data}
    out = f"runs/{model}_{'lora' if lora else 'finetuned'}"
    assert found == load_recipe(f"configs/{config}.yaml", {**said, "out": out})


def test_every_option_is_a_value_of_the_recipe(place: Path) -> None:
    file = place / "sd3.5_medium.safetensors"
    found = asked(
        "--model", file, "--data", "a", "--lora", 8, "--steps", 7, "--batch-size", "auto", "--lr",
        "3e-4", "--size", 48, "--text-encoders", "b", "--no-t5", "--vae", "c", "--out", "1",
        "--seed", 5, "--device", "cpu", "--precision", "bf16", "--micro-batch", 3,
    )  # fmt: skip
    tuned, run = found.finetune, found.run
    assert tuned is not None
    assert (tuned.lora, tuned.alpha, tuned.text_encoders, tuned.no_t5) == (8, 8.0, "b", True)
    assert (tuned.model, tuned.vae, found.data.path, found.data.size) == (str(file), "c", "a", 48)
    assert (run.steps, run.batch_size, run.micro_batch, run.precision) == (7, "auto", 3, "bf16")
    assert (found.optimizer.lr, found.seed, found.out, run.device) == (3e-4, 5, "1", "cpu")


# --- what it leaves -------------------------------------------------------------------------------


def test_a_lora_of_stable_diffusion_3_draws(
    sd3: list[object], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, named by the last line, taken by `generate --lora FILE:WEIGHT`, and it counts."""
    out, model = tmp_path / "run", place / "sd3.5_medium.safetensors"
    did(*sd3, "--lora", 2, "--lr", "0.1", "--out", out, *QUICK)
    said = capsys.readouterr().out
    assert f"--lora {out / 'lora.safetensors'}" in said and "generate" in said
    assert len(open_weights(out / "lora.safetensors")) == 2 * (2 * 4 + 4 + 4 + 3)
    draw = ["generate", "a red wall", "--model", model, "--text-encoders", place / "encoders",
            "--steps", "2", "--width", 64, "--height", 64, "--out", tmp_path / "out"]  # fmt: skip
    file = out / "lora.safetensors"
    for more in ((), ("--lora", f"{file}:0"), ("--lora", file)):
        did(*draw, *more)
    none, zero, one = (Image.open(path) for path in sorted((tmp_path / "out").glob("*.png")))
    assert none.tobytes() == zero.tobytes() != one.tobytes()
    assert str(file) in str(one.info)


def test_whole_and_in_pieces(sd1: list[object], place: Path, tmp_path: Path) -> None:
    """--until and --resume end where a run in one go ends; a moved model is the same."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    did(*sd1, "--out", whole, *QUICK, "--steps", 3, "--seed", 4)
    did(*sd1, "--out", pieces, *QUICK, "--steps", 3, "--seed", 4, "--until", 1)
    moved = tmp_path / "moved.safetensors"
    shutil.copy(place / "sd1.safetensors", moved)
    did("finetune", "--resume", pieces, "--model", moved)
    files = [folder / "model.safetensors" for folder in (whole, pieces)]
    assert files[0].read_bytes() == files[1].read_bytes()


# --- mistakes -------------------------------------------------------------------------------------


def test_mistakes_of_the_call(
    refused: Callable[..., str], sd1: list[object], place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert "give --data FOLDER" in refused("finetune")
    assert "give --data FOLDER" in refused(*sd1[:3])
    assert "no such file" in refused("finetune", "--model", "none.st", "--data", "x")
    page = place / "page.safetensors"
    assert "page.safetensors: " in refused("finetune", "--model", page, "--data", "x")
    assert "finetune.lora: must be at least 1" in refused(*sd1, "--lora", 0)
    assert "finetune.lora: must be at most 1024" in refused(*sd1, "--lora", 99999)
    assert "finetune.lora: expected a whole number" in refused(*sd1, "--lora", "much")
    assert "optimizer.lr: must be above 0" in refused(*sd1, "--lr", -1)
    assert "--batchsize (did you mean --batch-size?)" in refused(*sd1, "--batchsize", 2)
    assert "holds no recipe.yaml" in refused("finetune", "--resume", tmp_path / "none")
    assert "give it no --force" in refused("finetune", "--resume", out, "--force")
    assert "no such folder" in refused(*sd1[:3], "--data", tmp_path / "none", "--out", out)
    assert "no pictures here" in refused(*sd1[:3], "--data", place / "empty", "--out", out)
    assert not out.exists()
    out.mkdir()
    (out / "lora.safetensors").touch()
    assert "holds a run already (lora.safetensors)" in refused(*sd1, "--out", out)


def test_mistakes_of_the_parts(
    refused: Callable[..., str], sd1: list[object], sd3: list[object], place: Path, tmp_path: Path
) -> None:
    """Said before anything large is read, and nothing is left."""
    more = ["--out", tmp_path / "run", *QUICK]
    alone = [*sd3[:5], *sd3[7:]]
    assert "finetune.text_encoders: " in refused(*alone, *more)
    assert "holds no T5" in refused(*alone, *more, "--text-encoders", without_t5(place, tmp_path))
    assert "multiple of 16" in refused(*sd3[:-1], 40, *more)
    assert "no captions" in refused(*sd3[:3], "--data", place / "bare", *sd3[5:], *more)
    assert "only for Stable Diffusion 3" in refused(*sd1, "--no-t5", *more)
    assert "only for Stable Diffusion 3" in refused(*sd1, "--text-encoders", place, *more)
    assert not (tmp_path / "run").exists()


def without_t5(place: Path, tmp_path: Path) -> Path:
    """Encoders without T5."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("clip_l", "clip_g"):
        shutil.copy(place / "encoders" / f"{name}.safetensors", folder)
    return folder


# --- models of our own ----------------------------------------------------------------------------


def test_a_run_that_reads_no_captions_is_named(refused: Callable[..., str], shelf: Path) -> None:
    run = shelf / "toy" / "model.safetensors"
    assert "reads no captions" in refused("finetune", "--model", run, "--data", "x")


def test_the_model_that_ships_is_the_usual_one(place: Path) -> None:
    recipe = asked("--data", place / "pictures", "--steps", "7")
    assert (
        recipe.finetune == Finetune(str(SHIPPED["emoji"])) and recipe.out == "runs/emoji_finetuned"
    )
    assert recipe.run.steps == 7 and isinstance(recipe.data, Folder)
    assert (recipe.data.size, recipe.data.channels, recipe.data.fit) == (64, 3, "pad")


def test_the_model_that_ships_learns_a_folder(place: Path, tmp_path: Path) -> None:
    """A byte a weight goes in, whole weights come out, and they draw."""
    out = tmp_path / "run"
    did("finetune", "--data", place / "pictures", "--out", out, *QUICK)
    assert load_denoiser(out).row.data == "folder"  # so no judge of emoji is asked about it
    did("generate", "a red wall", "--model", out, "--steps", "1", "--out", tmp_path / "drawn")
    with Image.open(tmp_path / "drawn" / "0001.png") as picture:
        assert picture.size == (64, 64)


def test_mistakes_with_the_model_that_ships(
    refused: Callable[..., str], place: Path, tmp_path: Path
) -> None:
    ask = ["finetune", "--data", place / "pictures", "--out", tmp_path / "run", *QUICK]
    assert "train it whole" in refused(*ask, "--lora", 4)
    assert "multiples of 8 pixels" in refused(*ask, "--size", 36)
    assert "no captions" in refused("finetune", "--data", place / "bare", *ask[3:])
    assert not (tmp_path / "run").exists()
