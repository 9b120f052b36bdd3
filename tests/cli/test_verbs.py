"""Every verb, the way a person types it, on runs of a few steps."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from minidiffusion.checkpoints.reader import read_safetensors
from minidiffusion.cli import figures, logs, runfolder
from minidiffusion.cli.main import VERBS, main, parser
from minidiffusion.data.pictures import load_pixels, read_metadata
from minidiffusion.pipelines.load import load


def train(*words: object) -> None:
    assert main(["train", *map(str, words)]) == 0


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in logged(run)]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "usage: minidiffusion" in text and verb in text
    teaches = {
        "train": [
            "examples:",
            "--model.channels",
            "--optimizer.lr",
            "a number above 0",
            "--resume",
        ],
        "sample": ["examples:", "dpmpp_2m", "karras", "picture i has seed + i"],
        "evaluate": ["examples:", "--guidance SCALE", "default 2000"],
        "demo": ["--model", "emoji", "--seed"],
        "shard": ["examples:", "--per-shard", "--max-bytes"],
        "demo-train": ["configs/demo.yaml", "--minutes", "--force"],
        "download": ["examples:", "sd1.5", "--list", "HF_TOKEN"],
        "generate": ["examples:", "--from-file", "picture i has seed + i", "--lora", "--offload"],
        "regenerate": ["examples:", "where the model lies now"],
        "inspect": ["--keys", "--hash"],
        "map": ["examples:", "generate", "encode", "docs/cluster.md"],
        "average": ["examples:", "--sigma-rel", "sweep"],
        "convert": ["--to", "diffusers", "single-file"],
        "finetune": ["examples:", "--lora RANK", "--text-encoders", "--no-t5", "--resume"],
        "plan": ["examples:", "--width", "--offload", "--memory", "--json"],
    }
    assert not [word for word in teaches[verb] if word not in text]


def test_the_command_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and not [verb for verb in VERBS if verb not in text]


def test_a_reader_who_leaves_is_no_error() -> None:
    script = (
        "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1)\n"
        "from minidiffusion.cli.main import main; sys.exit(main(['--help']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_train_leaves_all_there_is_to_look_at(shelf: Path) -> None:
    toy = names(shelf / "toy")
    assert {"recipe.yaml", "log.jsonl", "model.safetensors", "checkpoints"} <= toy
    assert {"loss.png", "dashboard.png"} <= toy
    assert not [name for name in toy if name not in runfolder.LEFT]
    assert [row["step"] for row in logged(shelf / "toy")] == [1, 2, 3, 4, 5, 6]
    fields = {"step", "loss", "lr", "grad_norm", "seconds", "samples", "skipped"}
    fields |= {"pictures_per_second", "eta", "parts"}
    assert set(logged(shelf / "toy")[0]) == fields
    assert names(shelf / "pictures" / "samples") == {"step_000002.png"}
    recipe = yaml.safe_load((shelf / "toy" / "recipe.yaml").read_text())
    assert recipe["run"]["steps"] == 6 and recipe["out"] == str(shelf / "toy")


def test_a_resumed_run_is_the_uninterrupted_one(shelf: Path, tmp_path: Path) -> None:
    """The loss of every step once, and the same weights to the bit."""
    run = tmp_path / "run"
    train(shelf / "toy.yaml", "--out", run, "--until", 3)
    assert losses(run) == losses(shelf / "toy")[:3] and not (run / "model.safetensors").exists()
    with (run / "log.jsonl").open("a") as log:  # steps whose checkpoint was never written
        log.write('{"step": 4, "loss": 9.0}\n{"step": 5, "loss": 9.0}\n{"step": 6, "lo')
    train("--resume", run, "--until", 5)
    train("--resume", run)
    assert losses(run) == losses(shelf / "toy")
    mine, other = (read_safetensors(p / "model.safetensors") for p in (run, shelf / "toy"))
    assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


def test_a_finished_run_has_nothing_to_do(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(shelf / "toy", tmp_path / "toy")
    train("--resume", run)
    assert "nothing to do" in capsys.readouterr().out
    assert losses(run) == losses(shelf / "toy")


def test_the_command_line_wins_over_the_recipe(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--epochs", "0.25", "--lr", "1e-4", "--model.depth", 2, "--optimizer.betas", "[0,0.5]")
    train(shelf / "toy.yaml", *words)
    recipe = yaml.safe_load((tmp_path / "runs" / "toy" / "recipe.yaml").read_text())
    assert recipe["run"]["steps"] is None and recipe["run"]["epochs"] == 0.25
    assert recipe["optimizer"]["lr"] == 1e-4 and recipe["optimizer"]["betas"] == [0, 0.5]
    assert recipe["model"]["depth"] == 2 and len(logged(tmp_path / "runs" / "toy")) == 2


def test_a_folder_may_have_any_name(shelf: Path, tmp_path: Path) -> None:
    for name in ("2024-01-01", "7", "null", "a b", "ä"):
        train(shelf / "toy.yaml", "--out", tmp_path / name, "--steps", 1)
        assert len(logged(tmp_path / name)) == 1


def test_force_replaces_a_run_and_nothing_else(shelf: Path, tmp_path: Path) -> None:
    run = shutil.copytree(shelf / "toy", tmp_path / "toy")
    (run / "notes.txt").write_text("mine")
    train(shelf / "toy.yaml", "--out", run, "--steps", 2, "--force")
    assert len(logged(run)) == 2 and (run / "notes.txt").read_text() == "mine"
    assert names(run / "checkpoints") == {"step_00000002"}
    assert not [name for name in names(run) if name.startswith(".")]
    train(shelf / "toy.yaml", "--out", tmp_path / "new", "--steps", 1, "--force")
    assert len(logged(tmp_path / "new")) == 1


def test_sample_formats(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, usual = shelf / "pictures", ["--count", "3", "--seed", "5", "--labels", "bag,0,coat"]

    def sample(*words: object) -> None:
        assert main(["sample", str(run), *usual, *map(str, words)]) == 0

    sample("--format", "npz", "--out", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        x, labels = arrays["arr_0"], arrays["arr_1"]
    assert x.dtype == np.uint8 and x.shape == (3, 28, 28, 1) and labels.tolist() == [8, 0, 4]

    sample("--format", "png", "--out", tmp_path / "many", "--batch-size", 2)
    assert names(tmp_path / "many") == {f"0000{i}.png" for i in range(3)}
    for i, label in enumerate(("bag", "t-shirt", "coat")):
        path = tmp_path / "many" / f"0000{i}.png"
        facts = read_metadata(path)
        assert facts["seed"] == str(5 + i) and facts["label"] == label
        pixels = load_pixels(path, channels=1, size=28)[0].int()
        assert (pixels - torch.from_numpy(x[i, ..., 0]).int()).abs().max() <= 1

    for i in range(2):
        sample("--format", "grid", "--out", tmp_path / f"{i}.png", "--guidance", 3)
        sample("--format", "strip", "--out", tmp_path / f"strip{i}.png", "--sampler", "heun")
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    assert (tmp_path / "strip0.png").read_bytes() == (tmp_path / "strip1.png").read_bytes()
    assert read_metadata(tmp_path / "0.png")["guidance_scale"] == "3.0"
    assert str(tmp_path / "strip1.png") in capsys.readouterr().out


def test_force_leaves_no_picture_of_an_earlier_call(shelf: Path, tmp_path: Path) -> None:
    for words in (["--count", "4"], ["--count", "2", "--force"]):
        (tmp_path / "many").mkdir(exist_ok=True)
        (tmp_path / "many" / "2024.png").touch()
        out = ["--format", "png", "--out", str(tmp_path / "many"), "--force"]
        assert main(["sample", str(shelf / "pictures"), *out, *words]) == 0
    assert names(tmp_path / "many") == {"00000.png", "00001.png", "2024.png"}


def test_samples_lie_in_the_runs_folder_unless_told_otherwise(shelf: Path, tmp_path: Path) -> None:
    run = shutil.copytree(shelf / "toy", tmp_path / "toy")
    assert main(["sample", str(run), "--count", "20"]) == 0
    assert main(["sample", str(run / "model.safetensors"), "--format", "npz", "--seed", "3"]) == 0
    assert {"grid-seed0.png", "npz-seed3.npz"} <= names(run)
    with np.load(run / "npz-seed3.npz") as points:
        assert points["arr_0"].shape == (8, 2) and points["arr_1"].tolist() == [0, 1] * 4


def test_the_command_and_python_draw_the_same(shelf: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    words = ["--labels", "bag,coat", "--count", "2", "--seed", "11", "--guidance", "2.5"]
    words += ["--rescale", "0.7", "--guidance-interval", "100", "1000"]
    words += ["--precision", "fp32", "--format", "png", "--out", str(out)]
    assert main(["sample", str(shelf / "pictures"), *words]) == 0
    pictures = load(shelf / "pictures").generate(
        ["bag", "coat"], seed=11, guidance_scale=2.5, rescale=0.7, guidance_interval=(100.0, 1000.0)
    )
    for i, picture in enumerate(pictures):
        found = load_pixels(out / f"0000{i}.png", channels=1, size=28)[0]
        assert np.array_equal(found, np.asarray(picture))


def test_evaluate(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(shelf / "pictures", tmp_path / "pictures")
    assert main(["evaluate", str(run), "--count", "100", "--guidance", "1", "--guidance", "2"]) == 0
    report = json.loads((run / "report.json").read_text())
    assert set(report) == {"guidance 1", "guidance 2"}
    assert all(scores["count"] == 100 for scores in report.values())
    assert "Frechet distance" in capsys.readouterr().out
    assert (run / "report.md").read_text().count("```") == 4


def test_demo(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "demo"
    words = ["demo-train", str(shelf / "pictures.yaml"), "--out", str(run), "--count", "100"]
    assert main(words) == 0
    leaves = {"samples.png", "strip.png", "loss.png", "log.jsonl", "report.md", "report.json"}
    assert leaves <= names(run) and names(run) <= set(runfolder.LEFT)
    text = capsys.readouterr().out
    assert f"minidiffusion sample {run} " in text and str(run / "strip.png") in text
    before = logged(run)
    assert main(words) == 0
    assert "trained already" in capsys.readouterr().out and logged(run) == before


def test_demo_goes_on_where_it_was_interrupted(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "demo"
    train(shelf / "pictures.yaml", "--out", run, "--until", 2)
    words = ["demo-train", str(shelf / "pictures.yaml"), "--out", str(run), "--count", "100"]
    assert main(words) == 0
    assert "going on" in capsys.readouterr().out
    assert losses(run) == losses(shelf / "pictures")


def test_an_interrupt_is_said_in_a_line(
    shelf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("minidiffusion.cli.sample.load", interrupted)
    assert main(["sample", str(shelf / "toy")]) == 130
    assert capsys.readouterr().err.strip() == "minidiffusion: interrupted"


def test_memory_that_runs_out_is_said_in_a_line(
    shelf: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("minidiffusion.cli.sample.load", full)
    assert refused("sample", shelf / "toy") == "out of memory"


def test_a_bug_of_ours_is_no_mistake_of_yours(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("minidiffusion.cli.sample.load", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["sample", str(shelf / "toy")])


def test_without_plots_and_boards_a_run_still_trains(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matplotlib.figure", "torch.utils.tensorboard.writer"):
        monkeypatch.setitem(sys.modules, name, None)
    train(shelf / "toy.yaml", "--out", tmp_path / "run", "--steps", 1)
    assert "pip install 'minidiffusion[plots]'" in capsys.readouterr().out
    assert not {"loss.png", "dashboard.png", "tensorboard"} & names(tmp_path / "run")


def test_a_loss_curve_leaves_out_what_cannot_be_drawn(tmp_path: Path) -> None:
    rows = [{"step": i, "loss": loss} for i, loss in enumerate((1.0, float("nan"), float("inf")))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures.loss_curve(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("hello\n")
    with (
        pytest.raises(ValueError, match=r"log\.jsonl: 'hello' is no line of a log"),
        logs.opened(tmp_path, 3),
    ):
        pass


def test_a_terminal_sees_a_bar(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    train(shelf / "toy.yaml", "--out", tmp_path / "run", "--steps", 2)
    assert "2/2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "known", "wanted"),
    [
        ("generate", {}, "2000"), ("demo", {}, "2000"), ("train", {}, None),
        ("generate", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("generate", {"OMP_WAIT_POLICY": "active"}, None),
    ],
)  # fmt: skip
def test_threads_of_the_verbs_that_draw_wait_briefly(
    verb: str, known: dict[str, str], wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user has said how; and it is said before torch is there to read it."""
    environment = dict(known)
    monkeypatch.setattr("os.environ", environment)
    parser([verb])
    assert environment.get("GOMP_SPINCOUNT") == wanted
    code = "import sys, minidiffusion.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
