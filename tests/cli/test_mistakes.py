"""Bad input of every kind: one line, exit code 2, no traceback, and nothing is overwritten."""

import hashlib
import io
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

from minidiffusion.checkpoints.reader import read_metadata, read_safetensors, write_safetensors
from minidiffusion.cli import evaluate
from minidiffusion.cli import train as verb
from minidiffusion.cli.main import main

MODEL = "model.safetensors"


@pytest.fixture(scope="session")
def world(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a person could point the command at by mistake."""
    root = tmp_path_factory.mktemp("world")
    toy = yaml.safe_load((shelf / "toy.yaml").read_text())
    texts = {
        "toy.yaml": yaml.safe_dump(toy),
        "list.yaml": "- 1\n- 2\n",
        "word.yaml": "hello",
        "broken.yaml": "run: {steps: 3",
        "tag.yaml": "seed: !!python/object/apply:os.getcwd []",
        "unknown.yaml": yaml.safe_dump({**toy, "modle": {}}),
        "pictures_of_points.yaml": yaml.safe_dump({**toy, "model": "unet"}),
        "points_of_pictures.yaml": yaml.safe_dump({"data": "fashion_mnist", "model": "mlp"}),
        "odd.yaml": yaml.safe_dump({"model": {"name": "unet", "patch": 3}}),
        "no_folder.yaml": yaml.safe_dump({"data": {"name": "folder", "path": str(root / "none")}}),
        "empty_folder.yaml": yaml.safe_dump(
            {"data": {"name": "folder", "path": str(root / "empty")}}
        ),
        "mnist.yaml": yaml.safe_dump({"data": "mnist"}),
        "page.safetensors": "<!DOCTYPE html><html>Not found</html>",
        "file": "mine",
        "there.png": "mine",
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    (root / "binary.yaml").write_bytes(bytes(range(256)))
    (root / "nul.yaml").write_bytes(b"seed: 1\0")
    (root / "empty").mkdir()
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, buffer)
    (root / "pickle.ckpt").write_bytes(buffer.getvalue())
    write_safetensors({"a": torch.zeros(2)}, root / "others.safetensors")
    for name in ("toy", "pictures"):
        shutil.copytree(shelf / name, root / name)
    (root / "foreign").mkdir()
    for name in ("recipe.yaml", "thesis.txt"):
        (root / "foreign" / name).write_text("mine")
    assert main(["train", str(root / "toy.yaml"), "--out", str(root / "half"), "--until", "2"]) == 0
    shutil.copytree(root / "half", root / "damaged")
    for file in (root / "damaged" / "checkpoints").glob("*/weights.safetensors"):
        file.write_bytes(file.read_bytes()[:-9])
    shutil.copytree(root / "toy", root / "cut")
    (root / "cut" / MODEL).write_bytes((root / "toy" / MODEL).read_bytes()[:-9])
    shutil.copytree(root / "half", root / "bad_log")
    (root / "bad_log" / "log.jsonl").write_text("hello\n")
    shutil.copytree(root / "half", root / "bad_recipe")
    (root / "bad_recipe" / "recipe.yaml").write_text("[")
    stretch(root / "pictures", root / "stretched")
    return root


def stretch(run: Path, place: Path) -> None:
    """A run whose pictures are not those of the data set that it names."""
    place.mkdir()
    metadata = read_metadata(run / MODEL)
    row = {**json.loads(metadata["row"]), "shape": [1, 32, 32]}
    weights = read_safetensors(run / MODEL)
    write_safetensors(weights, place / MODEL, {**metadata, "row": json.dumps(row)})


def contents(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


MISTAKES: list[tuple[str, str]] = [
    # The command itself.
    ("", "the following arguments are required: VERB"),
    ("frain", "invalid choice: 'frain' (choose from"),
    ("--version2", "the following arguments are required: VERB"),
    ("sample", "the following arguments are required: RUN"),
    ("sample {w}/toy extra", "unknown argument: extra"),
    ("train {w}/toy.yaml --stepz 3", "unknown argument: --stepz (did you mean --steps?)"),
    ("train {w}/toy.yaml --model.widht=3", "--model.widht=3 (did you mean --model.width?)"),
    ("train {w}/toy.yaml --step 3", "unknown argument: --step (did you mean --steps?)"),
    ("train {w}/toy.yaml --lr", "argument --lr: expected one argument"),
    # Recipes.
    ("train", "train: give a recipe, such as configs/fashion_unet.yaml, or --resume RUN"),
    ("train {w}/none.yaml", "none.yaml: no such recipe"),
    ("train {w}/empty", "empty: Is a directory"),
    ("train {w}/binary.yaml", "binary.yaml: cannot be read as YAML: "),
    ("train {w}/nul.yaml", "nul.yaml: cannot be read as YAML: "),
    ("train {w}/broken.yaml", "broken.yaml: cannot be read as YAML: "),
    ("train {w}/tag.yaml", "tag.yaml: cannot be read as YAML: "),
    ("train {w}/list.yaml", "list.yaml: a recipe is a mapping of keys, got list"),
    ("train {w}/word.yaml", "word.yaml: a recipe is a mapping of keys, got str"),
    ("train {w}/unknown.yaml", "unknown.yaml: modle: unknown key (did you mean model?)"),
    ("train {w}/pictures_of_points.yaml", "this unet takes ("),
    ("train {w}/points_of_pictures.yaml", "this mlp takes (1,), got (1, 28, 28)"),
    ("train {w}/odd.yaml", "multiples of 3, got (1, 28, 28)"),
    ("train {w}/no_folder.yaml", "none: no such folder"),
    ("train {w}/empty_folder.yaml", "empty: no pictures here"),
    ("train {w}/mnist.yaml", "MNIST needs a folder of its IDX files"),
    # Values.
    ("train {w}/toy.yaml --steps 0", "run.steps: must be at least 1, got 0"),
    ("train {w}/toy.yaml --steps -1", "run.steps: must be at least 1, got -1"),
    ("train {w}/toy.yaml --steps nan", "run.steps: expected a whole number, got 'nan'"),
    ("train {w}/toy.yaml --steps 1e9", "run.steps: expected a whole number, got '1e9'"),
    ("train {w}/toy.yaml --steps 2.5", "run.steps: expected a whole number, got 2.5"),
    ("train {w}/toy.yaml --steps many", "run.steps: expected a whole number, got 'many'"),
    ("train {w}/toy.yaml --steps true", "run.steps: expected a whole number, got True"),
    ("train {w}/toy.yaml --steps 2 --epochs 1", "a length is steps, epochs or minutes"),
    ("train {w}/toy.yaml --epochs 0", "run.epochs: must be above 0, got 0"),
    ("train {w}/toy.yaml --minutes nan", "run.minutes: expected a number, got 'nan'"),
    ("train {w}/toy.yaml --minutes .inf", "run.minutes: must be finite, got inf"),
    ("train {w}/toy.yaml --lr nan", "optimizer.lr: expected a number, got 'nan'"),
    ("train {w}/toy.yaml --lr .inf", "optimizer.lr: must be finite, got inf"),
    ("train {w}/toy.yaml --lr -1", "optimizer.lr: must be above 0, got -1"),
    ("train {w}/toy.yaml --lr [", "optimizer.lr: cannot be read as YAML: '['"),
    ("train {w}/toy.yaml --lr {{}}", "optimizer.lr: expected a number, got"),
    ("train {w}/toy.yaml --batch-size 0", "run.batch_size: must be at least 1, got 0"),
    ("train {w}/toy.yaml --batch-size most", "run.batch_size: expected a whole number"),
    ("train {w}/toy.yaml --optimizer.betas [1]", "optimizer.betas: expected 2 values, got 1"),
    ("train {w}/toy.yaml --optimizer sgd", "optimizer.name: unknown 'sgd'; allowed: adamw, muon"),
    ("train {w}/toy.yaml --model dot", "model.name: unknown 'dot' (did you mean dit?)"),
    ("train {w}/toy.yaml --model.width 0", "model.width: must be at least 2, got 0"),
    ("train {w}/toy.yaml --target epz", "objective.target: unknown 'epz' (did you mean eps?)"),
    ("train {w}/toy.yaml --seed -1", "seed: must be at least 0, got -1"),
    ("train {w}/toy.yaml --device cuda:99", "device: 'cuda:99' is not on this machine; "),
    ("train {w}/toy.yaml --device tpu", "device: 'tpu' is not on this machine; allowed: auto"),
    ("train {w}/toy.yaml --precision fp8", "run.precision: unknown 'fp8'"),
    ("train {w}/toy.yaml --until 0", "until: must be at least 1, got 0"),
    ("train {w}/toy.yaml --until x", "argument --until: invalid int value: 'x'"),
    ("train {w}/toy.yaml --run.preprocess {w}/none.py:f", "none.py: no such Python file"),
    ("train {w}/toy.yaml --seed \0", "seed: cannot be read as YAML"),
    ("train {w}/toy.yaml --out \0", "null byte"),
    ("train \0", "null byte"),
    # Places.
    ("train {w}/toy.yaml --out {w}/file", "file: a file is in the way of the run's folder"),
    ("train {w}/toy.yaml --out {w}/file --force", "file: a file is in the way"),
    ("train {w}/toy.yaml --out {w}/toy", "toy: holds a run already (recipe.yaml); --resume"),
    ("train {w}/toy.yaml --out {w}/foreign", "foreign: holds a run already (recipe.yaml)"),
    ("train {w}/toy.yaml --out {w}/foreign --force", "foreign: --force replaces runs only"),
    ("train {w}/toy.yaml --out {w} --force", "--force replaces runs only, and this folder"),
    ("train {w}/toy.yaml --out {w}/toy --force --device tpu", "device: 'tpu' is not on"),
    ("train {w}/mnist.yaml --out {w}/toy --force", "MNIST needs a folder"),
    ("train {w}/toy.yaml --out /proc/none/run", "No such file or directory"),
    # Going on.
    ("train --resume {w}/none", "none: no run to resume: it holds no recipe.yaml"),
    ("train --resume {w}/file", "file: no run to resume: it holds no recipe.yaml"),
    ("train --resume {w}/damaged", "weights.safetensors: damaged: "),
    ("train --resume {w}/half --lr 0.5", "optimizer.lr is 0.001 there and 0.5 here"),
    ("train --resume {w}/half --steps 99", "run.steps is 6 there and 99 here"),
    ("train --resume {w}/half --model.depth 2", "model.depth is 1 there and 2 here"),
    ("train {w}/toy.yaml --resume {w}/half", "--resume goes on with a run and its own recipe"),
    ("train --resume {w}/half --force", "--resume goes on with a run and its own recipe"),
    ("train --resume {w}/bad_log", "log.jsonl: 'hello' is no line of a log; mend or remove it"),
    ("train --resume {w}/bad_recipe", "recipe.yaml: cannot be read as YAML"),
    # Models.
    ("sample {w}/none", "none: no such file"),
    ("sample {w}/half", "half: holds no model.safetensors: not a finished run"),
    ("sample {w}/cut", "model.safetensors: cut short"),
    ("sample {w}/page.safetensors", "page.safetensors: this is a web page, not a model"),
    ("sample {w}/pickle.ckpt", "pickle.ckpt: no network that is known here: 1 tensor, weight"),
    (
        "sample {w}/others.safetensors",
        "others.safetensors: no network that is known here: 1 tensor, a",
    ),
    ("sample {w}/toy.yaml", "toy.yaml: not safetensors"),
    ("sample /dev/null", "/dev/null: a device, not a file"),
    ("sample \0", "no such file"),
    # Drawing.
    ("sample {w}/pictures --labels shoe", "label: unknown 'shoe'"),
    ("sample {w}/pictures --labels sneeker", "unknown 'sneeker' (did you mean sneaker?)"),
    ("sample {w}/pictures --labels 10", "label: must be 0..9, got 10"),
    ("sample {w}/pictures --labels=-1", "label: unknown '-1'"),
    ("sample {w}/pictures --labels bag,,bag", "label: unknown ''"),
    ("sample {w}/pictures --labels bag\0", "label: unknown"),
    ("sample {w}/pictures --count 0", "--count: must be at least 1, got 0"),
    ("sample {w}/pictures --count -5", "--count: must be at least 1, got -5"),
    ("sample {w}/pictures --count 1e3", "argument --count: invalid int value: '1e3'"),
    ("sample {w}/pictures --batch-size 0", "--batch-size: must be at least 1, got 0"),
    ("sample {w}/pictures --steps 0", "steps: must be 1..1000, got 0"),
    ("sample {w}/pictures --steps 1000000", "steps: must be 1..1000, got 1000000"),
    ("sample {w}/pictures --sampler huen", "sampler: unknown 'huen' (did you mean heun?)"),
    ("sample {w}/pictures --spacing tailing", "spacing: unknown 'tailing'"),
    ("sample {w}/pictures --guidance nan", "guidance: must be 0 or more, got nan"),
    ("sample {w}/pictures --guidance inf", "guidance: must be 0 or more, got inf"),
    ("sample {w}/pictures --guidance=-1", "guidance: must be 0 or more, got -1.0"),
    ("sample {w}/pictures --guidance much", "argument --guidance: invalid float value: 'much'"),
    ("sample {w}/pictures --rescale 1.5", "rescale: must be in [0, 1], got 1.5"),
    ("sample {w}/pictures --rescale nan", "rescale: must be in [0, 1], got nan"),
    ("sample {w}/pictures --guidance-interval 9 8", "guidance_interval: must not fall, got 9.0"),
    ("sample {w}/pictures --guidance-interval 9", "argument --guidance-interval: expected 2"),
    ("sample {w}/pictures --seed x", "argument --seed: invalid int value: 'x'"),
    ("sample {w}/pictures --device tpu", "device: 'tpu' is not on this machine"),
    ("sample {w}/pictures --format jpg", "argument --format: invalid choice: 'jpg'"),
    ("sample {w}/pictures --out {w}/there.png", "there.png: exists already; --force replaces it"),
    ("sample {w}/pictures --out {w}/empty", "empty: exists already; --force replaces it"),
    ("sample {w}/pictures --out {w}/file/x.png", "file: "),
    ("sample {w}/pictures --format png --out {w}/file --force", "file: "),
    ("sample {w}/pictures --count 1 --out {w}/empty --force", "empty"),
    ("sample {w}/pictures --out /proc/x.png", "/proc"),
    ("sample {w}/pictures --out \0", "null byte"),
    ("sample {w}/toy --format png", "--format png: this run makes points; take grid or npz"),
    ("sample {w}/toy --format strip", "--format strip: this run makes points"),
    # Judging.
    ("evaluate {w}/toy --count 5", "evaluate: no judge for data 'toy'; allowed: fashion_mnist"),
    ("evaluate {w}/none", "none: no such file"),
    ("evaluate {w}/pictures --count 0", "--count and --batch-size: must be at least 1"),
    ("evaluate {w}/pictures --count 96", "has 96 features and needs more pictures, not 96"),
    ("evaluate {w}/pictures --guidance nan --count 100", "guidance: must be 0 or more, got nan"),
    ("evaluate {w}/pictures --data-folder {w}/empty", "empty: no file train-images-idx3-ubyte"),
    ("evaluate {w}/pictures --count 5 --fid-weights {w}/none", "none"),
    ("evaluate {w}/pictures --count 5 --fid-weights {w}/page.safetensors", "page.safetensors"),
    ("evaluate {w}/stretched --count 5", "the run's pictures or classes are not those of"),
    ("demo-train {w}/none.yaml", "none.yaml: no such recipe"),
    ("demo-train {w}/toy.yaml --out {w}/new", "evaluate: no judge for data 'toy'"),
    ("demo-train {w}/odd.yaml --count 0", "features and needs more pictures, not 0"),
    ("demo-train {w}/toy.yaml --minutes 0", "run.minutes: must be above 0, got 0"),
    ("demo-train {w}/odd.yaml --out {w}/foreign", "foreign: holds a run already"),
    ("demo-train {w}/odd.yaml --out {w}/foreign --force", "foreign: --force replaces runs only"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_gets_one_line(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
    words: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(world)
    assert message in refused(*words.format(w=world).split(" "))[:2000] if words else refused()
    assert contents(world) == before
    assert not list(tmp_path.rglob("*.*"))


def test_a_megabyte_is_not_said_back(world: Path, refused: Callable[..., str]) -> None:
    line = refused("sample", world / "pictures", "--labels", "x" * 2**20)
    assert line.startswith("label: unknown 'xxx") and line.endswith(" ...")
    assert refused("x" * 2**20).endswith(" ...")


def test_letters_that_move_the_cursor_are_spelt_out(
    world: Path, refused: Callable[..., str]
) -> None:
    line = refused("train", world / "toy.yaml", "--target", "\x1b[2Jeps\nv\u202e\ud800")
    assert "\x1b" not in line and "[2J" in line
    assert r"\x1b" in refused("\x1b[2J") and r"\ud800" in refused("sample", "x", "\ud800")


def test_deep_nesting_on_the_command_line(world: Path, refused: Callable[..., str]) -> None:
    line = refused("train", world / "toy.yaml", "--lr", "[" * 3000)
    assert line.startswith("optimizer.lr: cannot be read as YAML")


def test_a_folder_that_cannot_be_written_to(
    world: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # whom the system asks is not root
    line = refused("sample", world / "toy", "--out", world / "empty" / "x.npz")
    assert line.endswith("empty: cannot be written to; --out names another place")


def test_what_was_encoded_before_a_run_could_begin_is_not_in_its_way(
    world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "cache").mkdir(parents=True)
    assert main(["train", str(world / "toy.yaml"), "--out", str(out), "--steps", "1"]) == 0
    assert (out / "cache").exists() and (out / "recipe.yaml").exists()


def test_an_old_run_comes_back_when_the_new_one_cannot_start(
    world: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(world / "toy", tmp_path / "toy")
    before = contents(run)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device", str(run))
        yield

    monkeypatch.setattr(verb, "train", full)
    line = refused("train", world / "toy.yaml", "--out", run, "--force")
    assert line == f"{run}: No space left on device"
    assert contents(run) == before and sorted(run.glob(".*")) == []


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes, as if the disk were full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_names_the_file(
    shelf: Path, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = shelf / "toy.yaml", tmp_path / "out"
    with room(100):
        assert "recipe.yaml: File too large" in refused("train", recipe, "--out", out)
    assert not out.exists()  # so the next try finds no run in its way
    with room(2500), pytest.raises(SystemExit):
        main(["train", str(recipe), "--out", str(out), "--steps", "60", "--run.save_every", "99"])
    *before, last = capsys.readouterr().err.splitlines()
    assert last == f"minidiffusion: error: {out / 'log.jsonl'}: File too large"
    warning = f"minidiffusion: warning: {out / 'tensorboard'}: File too large: no more events"
    assert before in ([], [warning])  # and no traceback of TensorBoard's thread


def test_a_full_disk_leaves_the_log_as_it_was(
    shelf: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(shelf / "toy", out)
    before = (out / "log.jsonl").read_bytes()
    (out / "model.safetensors").unlink()
    shutil.rmtree(out / "checkpoints" / "step_00000006")
    with room(100):
        assert "log.jsonl: File too large" in refused("train", "--resume", out)
    assert (out / "log.jsonl").read_bytes() == before


def test_a_full_disk_leaves_the_report_as_it_was(tmp_path: Path) -> None:
    score = Mock(table=lambda: "x" * 200, as_dict=lambda: {"x": "x" * 200})
    path = evaluate.save({"a": score}, tmp_path)
    before = path.read_bytes()
    with room(100), pytest.raises(OSError, match="File too large: .*report.json"):
        evaluate.save({"b": score}, tmp_path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
