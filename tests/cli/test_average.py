"""`minidiffusion average`, the way a person types it."""

from pathlib import Path

import pytest
import torch

from minidiffusion.checkpoints.reader import read_metadata, read_safetensors
from minidiffusion.cli.main import main
from minidiffusion.pipelines.load import load


@pytest.fixture(scope="module")
def kept(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("kept") / "run"
    words = ["--run.averages", "[0.05, 0.1]", "--run.average_every", "1", "--out", str(run)]
    assert main(["train", str(shelf / "toy.yaml"), *words]) == 0
    return run


def test_one_width(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "wide.safetensors"
    capsys.readouterr()
    assert main(["average", str(kept), "--sigma-rel", "0.08", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}  sigma_rel 0.08 of 12 snapshots; its profile is ")
    assert read_metadata(out) == read_metadata(kept / "model.safetensors")
    pipe = load(out)
    assert pipe.row == load(kept).row
    assert pipe.sample(pipe.condition([0, 1], 2), 2).isfinite().all()
    assert main(["sample", str(out), "--out", str(tmp_path / "drawn.png"), "--count", "4"]) == 0


def test_a_tracked_width_at_a_step_is_its_snapshot(kept: Path, tmp_path: Path) -> None:
    out = tmp_path / "one.safetensors"
    words = ["--sigma-rel", "0.1", "--step", "4", "--out", str(out)]
    assert main(["average", str(kept), *words]) == 0
    wanted = read_safetensors(kept / "averages" / "sigma_0.1_step_00000004.safetensors")
    found = read_safetensors(out)
    assert all(torch.equal(found[name], w.float()) for name, w in wanted.items())


def test_a_sweep(kept: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep.safetensors"
    assert main(["average", str(kept), "--sigma-rel", "0.05,0.1,0.15", "--out", str(out)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"sweep_{w}.safetensors" for w in ("0.05", "0.1", "0.15")}
    whole = [read_safetensors(path) for path in sorted(tmp_path.iterdir())]
    assert any(not torch.equal(whole[0][name], whole[2][name]) for name in whole[0])


def test_a_rough_one_is_warned_of(kept: Path, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "x.safetensors")
    assert main(["average", str(kept), "--sigma-rel", "0.01", "--out", out]) == 0
    assert "the snapshots come no closer than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sigma-rel", "0.3"], "sigma_rel: must be above 0 and below 0.2887, got 0.3"),
        (["--sigma-rel", "0"], "sigma_rel: must be above 0 and below 0.2887, got 0"),
        (["--sigma-rel", "nan"], "must be finite"),
        (["--sigma-rel", "0.1,wide"], "expected numbers with commas between them"),
        (["--sigma-rel", "0.1,0.10"], "a width stands twice"),
        (["--sigma-rel", "0.1", "--step", "0"], "step: must be from 1 to 6"),
        (["--sigma-rel", "0.1", "--step", "7"], "step: must be from 1 to 6"),
    ],
)
def test_bad_words(words, said, kept: Path, tmp_path: Path, refused) -> None:
    assert said in refused("average", kept, *words, "--out", tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_bad_places(shelf: Path, kept: Path, tmp_path: Path, refused) -> None:
    out = tmp_path / "x.safetensors"
    said = refused("average", shelf / "toy", "--sigma-rel", "0.1", "--out", out)
    assert "holds no snapshots of averages" in said
    assert "holds no snapshots" in refused("average", "none", "--sigma-rel", "0.1", "--out", out)
    out.write_text("mine")
    assert "exists already" in refused("average", kept, "--sigma-rel", "0.1", "--out", out)
    assert out.read_text() == "mine"
    assert main(["average", str(kept), "--sigma-rel", "0.1", "--out", str(out), "--force"]) == 0
    snapshot = next((kept / "averages").iterdir())
    before = snapshot.read_bytes()
    words = ["--sigma-rel", "0.08", "--out", snapshot, "--force"]
    assert "is one of the snapshots" in refused("average", kept, *words)
    assert snapshot.read_bytes() == before
    words = ["--sigma-rel", "0.08", "--out", tmp_path / "no" / "x.safetensors"]
    assert str(tmp_path / "no") in refused("average", kept, *words)


def test_widths_of_a_recipe_are_checked(shelf: Path, tmp_path: Path, refused) -> None:
    out = tmp_path / "run"
    for given, said in (
        ("0.05", "run.averages: expected a list, got 0.05"),
        ("[0.5]", "run.averages[0]: must be below 0.288, got 0.5"),
        ("[0]", "run.averages[0]: must be above 0, got 0"),
        ("[0.1, 0.1]", "run: averages: a width stands twice"),
    ):
        words = ["--run.averages", given, "--out", out]
        assert said in refused("train", shelf / "toy.yaml", *words)
    assert not out.exists()


def test_force_replaces_the_snapshots_too(shelf: Path, kept: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(kept, run)
    assert main(["train", str(shelf / "toy.yaml"), "--out", str(run), "--force"]) == 0
    assert not (run / "averages").exists()
