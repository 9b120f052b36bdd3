"""A run that was interrupted and resumed is, to the bit, the run that was not."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minidiffusion import device
from minidiffusion.checkpoints import snapshot
from minidiffusion.data import Toy
from minidiffusion.diffusion import VariancePreserving
from minidiffusion.training import loop, state
from minidiffusion.training.loop import train
from minidiffusion.training.objectives import Objective
from minidiffusion.training.optimizers import AdamW, Muon, Schedule
from minidiffusion.training.recipe import Recipe
from minidiffusion.typed import ConfigError

CUTS = range(1, 13)


def cut(whole: Path, step: int) -> Path:
    """A run's folder as it was when it stood at this step."""
    place = whole.parent / f"cut_{step}"
    name = f"step_{step:08d}"
    shutil.copytree(whole / "checkpoints" / name, place / "checkpoints" / name)
    return place


def check_cuts(recipe: Recipe, dataset: Any, digest: Callable, cuts=CUTS, **changed: Any) -> None:
    """One run that saves every step; then go on from its snapshots, for a step or to the end.

    Where the state after the next step is the same, so is all that follows from it.
    """
    assert recipe.out is not None
    whole = Path(recipe.out)
    often = replace(recipe, run=replace(recipe.run, save_every=1))
    states = [digest(report) for report in train(often, dataset=dataset)]
    assert len(states) == len(set(states)) == 13
    model = (whole / "model.safetensors").read_bytes()
    for step in cuts:
        place = cut(whole, step)
        again = replace(recipe, out=str(place), run=replace(recipe.run, **changed))
        end = 13 if step in (1, 6, 12) else step + 1
        found = [digest(r) for r in train(again, place, until=end, dataset=dataset)]
        assert found == states[step:end], step
        assert end < 13 or (place / "model.safetensors").read_bytes() == model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["unet", "dit"])
def test_twelve_cuts(name, precision, models, pictures, tiny, digest, tmp_path) -> None:
    recipe = tiny(models[name], tmp_path / "whole", precision=precision)
    check_cuts(recipe, pictures(), digest)


VARIANTS: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": Muon()},
    "dropout": {},
    "vp": {
        "path": VariancePreserving(),
        "objective": Objective("v", weighting="min_snr"),
        "schedule": Schedule(warmup=3, decay="linear"),
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, models, pictures, tiny, digest, tmp_path) -> None:
    recipe = replace(tiny(models["unet"], tmp_path / "whole"), **VARIANTS[name])
    if name == "dropout":
        recipe = replace(recipe, model=replace(models["unet"], dropout=0.3))
    check_cuts(recipe, pictures(), digest, cuts=(2, 6))


def test_points(models, points, tiny, digest, tmp_path) -> None:
    check_cuts(tiny(models["mlp"], tmp_path / "whole"), points(), digest)


def test_odd_micro_batches(models, pictures, tiny, digest, tmp_path) -> None:
    """8 pictures as 3 + 3 + 2."""
    recipe = tiny(models["dit"], tmp_path / "whole", micro_batch=3)
    check_cuts(recipe, pictures(), digest, cuts=(2, 6))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers(workers, models, pictures, tiny, digest, tmp_path) -> None:
    """The run begins with one number of workers and goes on with another."""
    recipe = tiny(models["dit"], tmp_path / "whole", workers=(workers + 1) % 3)
    check_cuts(recipe, pictures(), digest, cuts=(2, 6), workers=workers)


def test_what_is_free_to_change(models, pictures, tiny, digest, tmp_path) -> None:
    recipe = tiny(models["dit"], tmp_path / "whole")
    free = {"workers": 1, "keep": 1, "save_every": 3, "sample_every": 5, "strategy": "fsdp"}
    check_cuts(recipe, pictures(), digest, cuts=(6,), device="auto", **free)
    assert len(list((tmp_path / "cut_6" / "checkpoints").iterdir())) == 1


def test_a_run_from_before_a_key_was_there_goes_on(models, points, tiny, tmp_path) -> None:
    """As long as the key stands at its default; else it is another run."""
    recipe = tiny(models["mlp"], tmp_path)
    list(train(recipe, until=1, dataset=points()))
    saved, _ = snapshot.newest(tmp_path / "checkpoints")
    assert saved is not None
    for key in ("averages", "average_every"):
        del saved.facts["recipe"]["run"][key]
    state.check_same(recipe, {}, saved)
    changed = replace(recipe, run=replace(recipe.run, averages=(0.1,)))
    with pytest.raises(ConfigError, match=r"run\.averages is None there and \[0\.1\] here"):
        state.check_same(changed, {}, saved)


def test_stopping_anywhere(models, points, tiny, digest, tmp_path) -> None:
    """`until`, a caller who walks away, and a run resumed many times."""
    data = points()
    whole = [digest(r) for r in train(tiny(models["mlp"]), dataset=data)]
    recipe = tiny(models["mlp"], tmp_path, save_every=5)
    states = [digest(r) for r in train(recipe, until=3, dataset=data)]
    reports = train(recipe, tmp_path, dataset=data)
    states += [digest(next(reports)) for _ in range(4)]  # to step 7; the last snapshot: step 5
    reports.close()
    states = states[:5] + [digest(r) for r in train(recipe, tmp_path, 6, data)]
    assert not (tmp_path / "model.safetensors").exists()
    states += [digest(r) for r in train(recipe, tmp_path, 99, data)]
    assert states == whole
    assert (tmp_path / "model.safetensors").exists()


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(
    models, points, tiny, digest, tmp_path
) -> None:
    """After the step at hand, on a step that is saved anyhow, and at the end."""
    data = points()
    whole = [digest(r) for r in train(tiny(models["mlp"]), dataset=data)]
    recipe = tiny(models["mlp"], tmp_path, save_every=5)
    states: list[str] = []
    for last in (2, 5, 13):
        resume = tmp_path if states else None
        for report in train(recipe, resume, dataset=data, stop=lambda: len(states) == last):  # noqa: B023
            states.append(digest(report))
        saved, _ = snapshot.newest(tmp_path / "checkpoints")
        assert saved is not None and saved.step == len(states) == last
    assert states == whole and (tmp_path / "model.safetensors").exists()


def test_until_that_has_passed_does_nothing(models, points, tiny, tmp_path) -> None:
    recipe = tiny(models["mlp"], tmp_path, minutes=1.0)
    assert len(list(train(recipe, until=4, dataset=points()))) == 4
    assert list(train(recipe, tmp_path, until=4, dataset=points())) == []
    assert list(train(recipe, tmp_path, until=2, dataset=points())) == []
    with pytest.raises(ConfigError, match="until: must be at least 1, got 0"):
        next(train(recipe, tmp_path, until=0, dataset=points()))


def test_a_finished_run_mends_its_model(models, points, tiny, tmp_path) -> None:
    recipe = tiny(models["mlp"], tmp_path)
    list(train(recipe, dataset=points()))
    before = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    assert list(train(recipe, tmp_path, dataset=points())) == []
    assert (tmp_path / "model.safetensors").read_bytes() == before


class Clock:
    """Each look takes this long."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds

    def monotonic(self) -> float:
        self.now += self.seconds
        return self.now


def test_minutes_are_measured_once(models, points, tiny, digest, tmp_path, monkeypatch) -> None:
    """0.1 s a step, 0.025 minutes: 15 steps, also for a slower machine that goes on."""
    recipe = tiny(models["mlp"], tmp_path / "whole", minutes=0.025)
    monkeypatch.setattr(loop, "time", Clock(0.1))
    reports = [
        (r.total, digest(r))
        for r in train(replace(recipe, run=replace(recipe.run, save_every=1)), dataset=points())
    ]
    assert [total for total, _ in reports] == [None] * 9 + [15] * 6
    for step in (10, 12):
        place = cut(tmp_path / "whole", step)
        monkeypatch.setattr(loop, "time", Clock(7.0))
        again = [
            (r.total, digest(r))
            for r in train(replace(recipe, out=str(place)), place, dataset=points())
        ]
        assert again == reports[step:]
    place = cut(tmp_path / "whole", 4)  # not measured yet: this machine's pace decides
    monkeypatch.setattr(loop, "time", Clock(0.05))
    last = list(train(replace(recipe, out=str(place)), place, dataset=points()))[-1]
    assert last.step == last.total == 30


def test_epochs_count_samples(models, points, tiny) -> None:
    """Two and a half epochs of 24 points, 8 a step: 7.5, so 8 steps."""
    reports = list(train(tiny(models["mlp"], epochs=2.5), dataset=points()))
    assert [r.total for r in reports] == [8] * 8
    assert reports[-1].samples == reports[-1].fresh == 64


def test_auto_batch_size_is_kept(models, points, tiny, digest, tmp_path, monkeypatch) -> None:
    """Memory is not as free the second time; the run must go on all the same."""
    recipe = tiny(models["mlp"], tmp_path, batch_size="auto")
    data = points(64)
    reports = list(train(recipe, until=5, dataset=data))
    assert reports[-1].samples == 5 * 64
    monkeypatch.setattr(loop.devices, "free_bytes", lambda where: 0)
    again = list(train(recipe, tmp_path, dataset=data))
    assert again[0].samples == 6 * 64 and again[-1].step == 13


OTHERS: dict[str, Callable[[Recipe], Recipe]] = {
    "seed": lambda r: replace(r, seed=1),
    "optimizer.lr": lambda r: replace(r, optimizer=AdamW(lr=0.5)),
    "optimizer.name": lambda r: replace(r, optimizer=Muon()),
    "model.width": lambda r: replace(r, model=replace(r.model, width=20)),
    "objective.target": lambda r: replace(r, objective=Objective("v")),
    "path.name": lambda r: replace(r, path=VariancePreserving()),
    "run.steps": lambda r: replace(r, run=replace(r.run, steps=14)),
    "run.batch_size": lambda r: replace(r, run=replace(r.run, batch_size=4)),
    "run.ema": lambda r: replace(r, run=replace(r.run, ema=0.5)),
    "schedule.warmup": lambda r: replace(r, schedule=Schedule(warmup=1)),
    "data.name": lambda r: replace(r, data=Toy()),
}


@pytest.mark.parametrize("key", OTHERS)
def test_another_recipe_is_refused(key, models, points, tiny, tmp_path) -> None:
    recipe = tiny(models["mlp"], tmp_path)
    list(train(recipe, until=1, dataset=points()))
    with pytest.raises(ConfigError) as caught:
        next(train(OTHERS[key](recipe), tmp_path, dataset=points()))
    text = str(caught.value)
    section = key.split(".")[0]
    # another kind of block differs in its first key by name; any of them names the block
    assert (f" {section}." if key.endswith(".name") else f" {key} is ") in text, text
    assert "\n" not in text and "step_00000001" in text


def test_another_data_set_or_precision_is_refused(models, points, tiny, tmp_path) -> None:
    recipe = tiny(models["mlp"], tmp_path)
    list(train(recipe, until=1, dataset=points()))
    with pytest.raises(ConfigError, match=r"data was '\w+', now it is '\w+': not the same run"):
        next(train(recipe, tmp_path, dataset=points(25)))
    other = replace(recipe, run=replace(recipe.run, precision="bf16"))
    with pytest.raises(ConfigError, match=r"run.precision is 'fp32' there and 'bf16' here"):
        next(train(other, tmp_path, dataset=points()))


def test_a_slow_precision_is_computed_in_float32(models, points, tiny, slow, digest) -> None:
    exact = tiny(models["mlp"])
    asked = replace(exact, run=replace(exact.run, precision="bf16"))
    with pytest.warns(UserWarning, match="^precision: bf16: slow on this cpu; computing in fp32"):
        found = [digest(r) for r in train(asked, until=2, dataset=points())]
    assert found == [digest(r) for r in train(exact, until=2, dataset=points())]


def test_a_run_that_moves_to_a_slow_machine_says_so(
    models, points, tiny, tmp_path, monkeypatch, trainer_of
) -> None:
    """What it was computed in is a fact of a run: it does not change without a word."""
    recipe = tiny(models["mlp"], tmp_path, precision="bf16", save_every=1)
    monkeypatch.setattr(device, "multiplies_fast", lambda dtype, where: True)
    list(train(recipe, until=2, dataset=points()))
    monkeypatch.setattr(device, "multiplies_fast", lambda dtype, where: dtype == torch.float32)
    words = r"precision was 'bf16', now it is 'fp32': not the same run; --allow precision goes on"
    with pytest.raises(ConfigError, match=words):
        next(train(recipe, tmp_path, dataset=points()))
    report = next(train(recipe, tmp_path, dataset=points(), allow=("precision",)))
    assert report.step == 3 and trainer_of(report).facts["precision"] == "fp32"


def test_nothing_to_resume_and_a_run_in_the_way(models, points, tiny, tmp_path) -> None:
    recipe = tiny(models["mlp"], tmp_path / "run")
    with pytest.raises(ConfigError, match="no checkpoint to resume from"):
        next(train(recipe, tmp_path / "none", dataset=points()))
    list(train(recipe, until=1, dataset=points()))
    with pytest.raises(ConfigError, match="holds a run already"):
        next(train(recipe, dataset=points()))
    list(train(tiny(models["mlp"], tmp_path / "other"), until=1, dataset=points()))
    with pytest.raises(ConfigError, match="holds a run already"):
        next(train(recipe, tmp_path / "other", dataset=points()))
    branch = tiny(models["mlp"], tmp_path / "branch")  # an empty place for the rest is fine
    assert len(list(train(branch, tmp_path / "other", dataset=points()))) == 12


def test_a_damaged_snapshot_is_named_and_left_behind(
    models, points, tiny, digest, tmp_path
) -> None:
    data = points()
    whole = [digest(r) for r in train(tiny(models["mlp"]), dataset=data)]
    recipe = tiny(models["mlp"], tmp_path, save_every=1)
    list(train(recipe, until=6, dataset=data))
    file = tmp_path / "checkpoints" / "step_00000006" / "average.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"average.safetensors: damaged.*from step_00000005"):
        states = [digest(r) for r in train(recipe, tmp_path, dataset=data)]
    assert states == whole[5:]
    assert snapshot.load(file.parent).step == 6  # written anew on the way
    for path in (tmp_path / "checkpoints").iterdir():
        (path / "facts.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no checkpoint to resume from; .*step_00000013"):
        next(train(recipe, tmp_path, dataset=data))


def test_dropout_is_keyed(models, pictures, tiny) -> None:
    """Its draws differ from step to step and from picture to picture, and depend on no state."""

    def curve(dropout: float = 0.5) -> list[float]:
        torch.rand(7)  # whatever else was drawn
        recipe = replace(
            tiny(replace(models["unet"], dropout=dropout)),
            optimizer=AdamW(lr=0.02), schedule=Schedule(warmup=0),
        )  # fmt: skip
        return [r.loss for r in train(recipe, until=6, dataset=pictures())]

    assert curve() == curve()
    plain = curve(0.0)
    assert plain[0] == curve()[0] and plain[5] != curve()[5]  # fresh blocks are the identity
