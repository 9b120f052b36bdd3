"""Snapshots of averages: what a run stores, the same after a resume, and what is made of them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rounding import HALF, assert_near

import minidiffusion
from minidiffusion.checkpoints.reader import read_metadata, read_safetensors, write_safetensors
from minidiffusion.training import posthoc
from minidiffusion.training.average import exponent, power_decay
from minidiffusion.training.loop import train
from minidiffusion.training.optimizers import AdamW
from minidiffusion.typed import ConfigError

WIDTHS = (0.05, 0.1)


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "averages").iterdir()}


@pytest.mark.parametrize("name", ["dit", "mlp"])
def test_the_stored_average_is_the_average(
    name, models, pictures, points, tiny, trainer_of, tmp_path
) -> None:
    """Recomputed from the weights of every step in float64; stored in fp16, buffers untouched."""
    recipe = tiny(models[name], tmp_path, averages=WIDTHS, average_every=5)
    data, seen = points() if name == "mlp" else pictures(), []
    for report in train(recipe, dataset=data):
        network = trainer_of(report).network
        seen.append({n: p.detach().double() for n, p in network.named_parameters()})
    found = posthoc.stored(tmp_path)
    assert [(s.step, s.sigma_rel, s.updates) for s in found] == [
        (step, width, step) for step in (5, 10, 13) for width in WIDTHS
    ]
    for one in found:
        g, wanted = exponent(one.sigma_rel), seen[0]
        for i, weights in enumerate(seen[1 : one.step], 2):
            keep = power_decay(i, g)
            wanted = {n: keep * wanted[n] + (1 - keep) * w for n, w in weights.items()}
        for n, w in wanted.items():
            assert one.weights.dtypes[n] == torch.float16
            # kept in float16, whose steps are even below 2^-14
            assert_near(one.weights[n].double(), w, 1, scale=w.abs() + 2.0**-14, eps=HALF)
        for n, b in network.named_buffers():
            assert torch.equal(one.weights[n], b), n


def test_a_resumed_run_is_the_same_to_the_bit(models, pictures, tiny, digest, tmp_path) -> None:
    """The digest covers every tensor that a checkpoint holds, the tracked averages too."""
    recipe = tiny(models["unet"], tmp_path / "whole", averages=WIDTHS, average_every=2)
    states = [digest(report) for report in train(recipe, dataset=pictures())]
    again = replace(recipe, out=str(tmp_path / "cut"))
    list(train(again, until=7, dataset=pictures()))
    found = [digest(r) for r in train(again, tmp_path / "cut", dataset=pictures())]
    assert found == states[7:]
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert len(files(tmp_path / "whole")) == 2 * 7  # steps 2, 4, ..., 12 and 13
    model = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == model


def test_tracking_changes_nothing_else(models, points, tiny, tmp_path) -> None:
    """The same losses, and the same model file, as without."""
    plain = tiny(models["mlp"], tmp_path / "plain")
    tracked = tiny(models["mlp"], tmp_path / "tracked", averages=WIDTHS, average_every=3)
    curves = [[r.loss for r in train(one, dataset=points())] for one in (plain, tracked)]
    assert curves[0] == curves[1]
    model = (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert (tmp_path / "tracked" / "model.safetensors").read_bytes() == model
    assert not (tmp_path / "plain" / "averages").exists()


def test_a_skipped_step_is_no_update(
    models, points, tiny, trainer_of, monkeypatch, tmp_path
) -> None:
    """Profiles count updates: with steps 1 and 5 skipped, step 5 has seen 3 of them."""
    from minidiffusion.training import loop

    whole, calls = loop.Trainer.gradients, []

    def broken(self, first, batch):
        calls.append(first)
        return (float("nan"), {}) if len(calls) in (1, 5) else whole(self, first, batch)

    monkeypatch.setattr(loop.Trainer, "gradients", broken)
    monkeypatch.setattr(loop.parallel, "norm", lambda gradients: torch.ones(()))
    recipe = tiny(models["mlp"], tmp_path, averages=(0.1,), average_every=1)
    reports = train(recipe, until=8, dataset=points())
    network = trainer_of([next(reports), next(reports)][1]).network
    first = {n: p.detach().half() for n, p in network.named_parameters()}
    list(reports)
    found = posthoc.stored(tmp_path)
    # The first update that is one leaves nothing of the start.
    assert all(torch.equal(found[0].weights[n], w) for n, w in first.items())
    assert [(s.step, s.updates) for s in found] == [
        (2, 1), (3, 2), (4, 3), (5, 3), (6, 4), (7, 5), (8, 6)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(models, pictures, tiny, tmp_path_factory) -> Path:
    """A finished run that also tracked what is to be reconstructed."""
    folder = tmp_path_factory.mktemp("kept")
    for name, widths in (("all", (0.05, 0.1, 0.15)), ("run", WIDTHS)):
        recipe = tiny(models["dit"], folder / name, averages=widths, average_every=1)
        # At a high rate averages are further apart than fp16's rounding.
        list(train(replace(recipe, optimizer=AdamW(lr=0.03)), dataset=pictures()))
    return folder


def test_a_width_that_was_not_tracked(run) -> None:
    """From snapshots of 0.05 and 0.1 the average of 0.15, which another run has kept beside."""
    wanted = {s.sigma_rel: s.weights for s in posthoc.stored(run / "all") if s.step == 13}
    made = posthoc.combined(posthoc.choose(posthoc.stored(run / "run"), 0.15))
    assert made.keys() == wanted[0.15].keys()
    apart = sum(float((wanted[0.1][n].double() - made[n]).square().sum()) for n in made)
    gap = sum(float((wanted[0.15][n].double() - made[n]).square().sum()) for n in made)
    assert gap**0.5 < 0.05 * apart**0.5
    assert all(made[n].dtype == torch.float32 for n in made)


def test_what_was_stored_comes_back_and_buffers_to_the_bit(run) -> None:
    found = posthoc.stored(run / "run")
    for step, width in ((5, 0.05), (13, 0.1)):
        chosen = posthoc.choose(found, width, step)
        (one,) = [s for s in found if (s.step, s.sigma_rel) == (step, width)]
        assert [(s, w) for s, w in posthoc.shares(chosen)] == [(one, 1.0)]
        made = posthoc.combined(chosen)
        assert all(torch.equal(made[n], one.weights[n].float()) for n in made)
    mixed = posthoc.combined(posthoc.choose(found, 0.07))
    assert torch.equal(mixed["places"], found[0].weights["places"])


def test_a_step_between_two_snapshots(models, points, tiny, tmp_path) -> None:
    recipe = tiny(models["mlp"], tmp_path, averages=WIDTHS, average_every=4)
    list(train(recipe, dataset=points()))
    found = posthoc.stored(tmp_path)
    chosen = posthoc.choose(found, 0.1, 6)
    assert {one.step for one in chosen.parts} == {4, 8}  # up to the first that lies beyond
    assert posthoc.updates_at(chosen.parts, 6) == 6
    assert chosen.fit.error > 0.5  # two snapshots say little of what lies between them


def test_refused(run, models, points, pictures, tiny, tmp_path) -> None:
    found = posthoc.stored(run / "run")
    for step in (0, 14):
        with pytest.raises(ValueError, match=f"step: must be from 1 to 13, .*, got {step}"):
            posthoc.choose(found, 0.1, step)
    with pytest.raises(ValueError, match="sigma_rel: must be above 0 and below"):
        posthoc.choose(found, 0.3)
    list(train(tiny(models["mlp"], tmp_path / "none"), dataset=points()))
    with pytest.raises(ValueError, match=r"holds no snapshots of averages; .*run\.averages"):
        posthoc.stored(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"run\.averages is \[0\.05, 0\.1\] there and \[0\.2\]"):
        again = tiny(models["dit"], run / "run", averages=(0.2,), average_every=1)
        again = replace(again, optimizer=AdamW(lr=0.03))
        list(train(again, run / "run", dataset=pictures()))


@pytest.mark.parametrize(
    "changed",
    [{"format": "other"}, {"sigma_rel": "2"}, {"updates": "0"}, {"updates": "99"}, {"step": "x"},
     {"model": "[1]"}, {"model": "{"}, {"model": '{"row": 1}'}],
)  # fmt: skip
def test_a_damaged_snapshot_is_named(changed, run, tmp_path) -> None:
    path = next((run / "run" / "averages").iterdir())
    (tmp_path / "averages").mkdir()
    copy = tmp_path / "averages" / path.name
    write_safetensors(read_safetensors(path), copy, {**read_metadata(path), **changed})
    with pytest.raises(ValueError, match=f"{path.name}: no snapshot of an average, or a damaged"):
        posthoc.stored(tmp_path)


def test_snapshots_of_two_networks_are_not_mixed(run, models, points, tiny, tmp_path) -> None:
    list(train(tiny(models["mlp"], tmp_path, averages=(0.1,), average_every=6), dataset=points()))
    path = run / "run" / "averages" / "sigma_0.05_step_00000009.safetensors"
    (tmp_path / "averages" / path.name).write_bytes(path.read_bytes())
    found = posthoc.stored(tmp_path)
    with pytest.raises(ValueError, match="not of the same network as"):
        posthoc.combined(posthoc.choose(found, 0.15))


def test_what_fp16_cannot_hold_stays_whole() -> None:
    assert posthoc.halved(torch.tensor([1e5, 0.0])).dtype == torch.float32
    assert posthoc.halved(torch.tensor([float("nan")])).dtype == torch.float32
    assert posthoc.halved(torch.tensor([-65504.0])).dtype == torch.float16


def test_a_run_in_memory_stores_nothing(models, points, tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tiny(models["mlp"], averages=WIDTHS, average_every=1)
    *_, report = train(recipe, dataset=points())
    assert report.average() and not list(tmp_path.iterdir())


def test_the_made_file_is_a_runs_file(run, tmp_path) -> None:
    chosen = posthoc.choose(posthoc.stored(run / "run"), 0.08)
    out = tmp_path / "made.safetensors"
    write_safetensors(posthoc.combined(chosen), out, posthoc.model_facts(chosen.parts[-1]))
    whole = minidiffusion.load_denoiser(run / "run")
    assert minidiffusion.load_denoiser(out).row == whole.row
    assert read_metadata(out) == read_metadata(run / "run" / "model.safetensors")
