"""Training on tar shards: stopped anywhere, the run goes on to the bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tars
import torchrun
import yaml

from minidiffusion.cli.main import main
from minidiffusion.data import Parts, Shards, write_shards
from minidiffusion.shapes import Cond
from minidiffusion.training.loop import train
from minidiffusion.training.prompts import Named
from minidiffusion.training.recipe import Recipe, load_recipe
from minidiffusion.typed import ConfigError

SCRIPT = Path(__file__).with_name("rank_command.py")
CUTS = (1, 3, 4, 11)
"""Steps of 8: an epoch of 29 samples ends within steps 4, 8 and 11."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    tars.shards(folder, 29, per_shard=6)
    return folder


@pytest.fixture
def recipe(place: Path, models: dict[str, Any], tiny: Callable, tmp_path: Path) -> Recipe:
    data = Shards(str(place), size=8, window=10)
    return replace(tiny(models["dit"], tmp_path / "whole", save_every=1), data=data)


def snapshot_of(recipe: Recipe, step: int, place: Path) -> Path:
    name = f"step_{step:08d}"
    (place / "checkpoints").mkdir(parents=True)
    (place / "checkpoints" / name).symlink_to(Path(str(recipe.out)) / "checkpoints" / name)
    return place


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_resumed_in_the_middle_of_an_epoch(
    workers: int, recipe: Recipe, digest: Callable, tmp_path: Path
) -> None:
    states = [digest(report) for report in train(recipe)]
    assert len(set(states)) == 13
    for step in CUTS:
        folder = snapshot_of(recipe, step, tmp_path / f"cut_{step}")
        run = replace(recipe.run, workers=workers, save_every=100)
        again = replace(recipe, out=str(folder), run=run)
        end = 13 if step == CUTS[-1] else step + 1
        assert [digest(r) for r in train(again, folder, until=end)] == states[step:end], step


def test_two_ranks_train_as_one(place: Path, tmp_path: Path) -> None:
    """Each reads its own half of every batch; the order is one."""
    path = written(tmp_path / "recipe.yaml", place)
    words = {name: ["train", str(path), "--out", str(tmp_path / name)] for name in ("one", "two")}
    assert main(words["one"]) == 0
    code, _, error = torchrun.launch(SCRIPT, tmp_path, {"two": words["two"]})
    assert code == 0, error
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def written(path: Path, shards: Path, **data: object) -> Path:
    values = {
        "data": {"name": "shards", "path": str(shards), "size": 8, "window": 10, **data},
        "model": {"name": "dit", "width": 16, "depth": 1, "heads": 2},
        "run": {
            "steps": 6, "batch_size": 8, "micro_batch": 4, "device": "cpu", "precision": "fp32",
        },
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_command(place: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "recipe.yaml", place)
    assert load_recipe(path).data == Shards(str(place), size=8, window=10)
    assert main(["train", str(path), "--out", str(tmp_path / "whole")]) == 0
    part = str(tmp_path / "part")
    assert main(["train", str(path), "--out", part, "--until", "2"]) == 0
    assert main(["train", "--resume", part, "--run.workers", "3"]) == 0
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "part")]
    assert models[0] == models[1]


def test_data_that_have_changed(
    recipe: Recipe, place: Path, tmp_path: Path, models: dict[str, Any]
) -> None:
    """Refused, unless allowed by name; then all else must still be the same."""
    shards = tmp_path / "shards"
    tars.shards(shards, 29, per_shard=6)
    recipe = replace(recipe, data=replace(recipe.data, path=str(shards)))
    list(train(recipe, until=2))
    out = str(recipe.out)
    changed = [*tars.numbered(11, first=18), Parts("new", tars.numbered(1)[0].parts)]
    for path in sorted(shards.glob("*"))[6:]:
        path.unlink()
    write_shards(changed, shards, "later", per_shard=6)
    with pytest.raises(ConfigError, match="data was .*, now it is .*: not the same run; --all"):
        next(train(recipe, out))
    moved = replace(recipe, data=replace(recipe.data, path=str(place)))
    with pytest.raises(
        ConfigError, match=r"data\.path is .* take another folder .*; --allow data goes on"
    ):
        next(train(moved, out))
    other = replace(recipe, seed=5)
    with pytest.raises(ConfigError, match="seed is 0 there and 5 here"):
        next(train(other, out, allow=("data",)))
    assert [r.step for r in train(recipe, out, until=3, allow=("data",))] == [3]
    assert [r.step for r in train(recipe, out, until=4)] == [4]  # from now on they are the run's


def test_names_as_prompts_keep_the_order(recipe: Recipe) -> None:
    data = recipe.data.open()
    assert Named(data, Cond()).order(1, 20, 40) == data.order(1, 20, 40)


def test_allowing_is_for_going_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "recipe.yaml", place)
    for words in (["--allow", "data"], ["--allow", "model", "--resume", "x"]):
        with pytest.raises(SystemExit):
            main(["train", str(path), *words])
        assert "--allow" in capsys.readouterr().err


def test_a_changed_sample_stops_the_run_with_one_line(recipe: Recipe, tmp_path: Path) -> None:
    (path,) = tars.shards(tmp_path / "one", 16, per_shard=16)
    changing = replace(recipe, data=replace(recipe.data, path=str(path)))
    reports = train(changing)
    next(reports)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"grey", b"gray"))
    with pytest.raises(ValueError, match=r"part-000000\.tar: sample \d+: not what its index says"):
        list(reports)
