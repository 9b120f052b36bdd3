"""What holds of every task: the run is the same to the bit after a cut, and on two ranks."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import encoders
import pytest
import torch
import torchrun

from minidiffusion.checkpoints.own import load_autoencoder, load_clip
from minidiffusion.checkpoints.reader import read_metadata
from minidiffusion.checkpoints.weights import open_weights
from minidiffusion.cli.main import main
from minidiffusion.models import AutoencoderConfig, UNetConfig
from minidiffusion.training import memory
from minidiffusion.training.loop import train
from minidiffusion.training.objectives import Contrastive, Objective, Reconstruction
from minidiffusion.training.recipe import Recipe
from minidiffusion.training.task import Task, begun
from minidiffusion.typed import ConfigError, build

SCRIPT = Path(__file__).with_name("rank_own.py")
spec = importlib.util.spec_from_file_location("rank_own", SCRIPT)
assert spec is not None and spec.loader is not None
rank = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rank)
CPU = torch.device("cpu")
KINDS = ("autoencoder", "clip")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_same_to_the_bit(kind, precision, digest, tmp_path) -> None:
    data, run = encoders.captioned(20, times=2), {"precision": precision, "save_every": 6}
    whole = encoders.recipe(kind, tmp_path / "whole", averages=(0.1,), average_every=5, **run)
    states = [digest(report) for report in train(whole, dataset=data)]
    assert len(set(states)) == 13
    for step in (6, 12):
        place = tmp_path / f"cut_{step}"
        for part in (f"checkpoints/step_{step:08d}", *(["averages"] if step > 6 else [])):
            shutil.copytree(tmp_path / "whole" / part, place / part)
        again = replace(whole, out=str(place))
        found = [digest(report) for report in train(again, place, dataset=data)]
        assert found == states[step:]
        for file in ("model.safetensors", "averages/sigma_0.1_step_00000013.safetensors"):
            assert (place / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_two_ranks_are_one_process(one_thread: None, tmp_path) -> None:
    """Halves of each batch, accumulated, are DDP's ranks and FSDP2's; all in one launch."""
    place = tmp_path / "place"
    place.mkdir()
    encoders.written(place)
    alone: dict[str, Any] = {}
    cases: dict[str, Any] = {}
    for what in ("autoencoder", "game", "clip", "through"):
        runs = {"alone": {"micro_batch": 4}, "ddp": {}, "fsdp": {"strategy": "fsdp"}}
        for how, run in runs.items():
            name = f"{what}_{how}"
            case = {"what": what, "out": str(tmp_path / name), "place": str(place), "run": run}
            if how == "alone":
                alone[what] = rank.run(case)
            else:
                cases[name] = case
    code, found, error = torchrun.launch(SCRIPT, tmp_path, cases)
    assert code == 0, error
    for name, hashes in found.items():
        assert hashes == alone[name.split("_")[0]], name
    assert found.keys() == cases.keys()


def test_the_parts_of_the_game_are_in_the_log(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(rank.reconstruction, "DiscriminatorConfig", rank.small)
    recipe = rank.recipe({"what": "game", "out": str(tmp_path), "run": {"steps": 3}})
    parts = [report.parts for report in train(recipe, dataset=encoders.captioned())]
    assert [list(said) for said in parts] == [
        ["l1", "kl"], ["l1", "kl"], ["l1", "kl", "adversarial", "discriminator"]
    ]  # fmt: skip
    json.dumps(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_of_a_width_chosen_afterwards_opens(kind, tmp_path) -> None:
    """And at the end of a tracked width it is close to the weights that this width averages."""
    recipe = encoders.recipe(kind, tmp_path / "run", averages=(0.05, 0.1), average_every=1)
    list(train(recipe, dataset=encoders.captioned()))
    out = tmp_path / "made.safetensors"
    assert main(["average", str(tmp_path / "run"), "--sigma-rel", "0.08", "--out", str(out)]) == 0
    model = tmp_path / "run" / "model.safetensors"
    weights = open_weights(out)
    made = load_autoencoder(weights) if kind == "autoencoder" else load_clip(weights)
    assert weights.shapes == open_weights(model).shapes
    if kind == "clip":
        assert read_metadata(out) == read_metadata(model)
    else:  # the scale of the last snapshot's latents is theirs to a percent
        x = encoders.captioned().batch(range(24)).x
        assert abs(float(made.encode(x).std()) - 1) < 0.01
        assert abs(float(made.encode(x).mean())) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_as_the_loop_knows_it(kind) -> None:
    recipe = encoders.recipe(kind, batch_size="auto")
    network, task = begun(recipe, encoders.captioned(), CPU, "fp32")
    assert isinstance(task, Task) and task.facts == {}
    two, three = (memory.kept_bytes(task, network, count) for count in (2, 3))
    assert three > two > 0
    again, _ = begun(recipe, encoders.captioned(), CPU, "fp32")
    for mine, theirs in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)  # of the seed


def test_a_model_has_the_objective_that_fits_it() -> None:
    wrong = [
        (AutoencoderConfig(), Objective()), (AutoencoderConfig(), Contrastive()),
        (encoders.CLIP, Reconstruction()), (encoders.CLIP, Objective()),
        (UNetConfig(), Reconstruction()), (UNetConfig(), Contrastive()),
    ]  # fmt: skip
    for model, objective in wrong:
        with pytest.raises(ValueError, match=f"^objective: {model.name} has .*, got ") as error:
            Recipe(model=model, objective=objective)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="objective: autoencoder has reconstruction, got that of"):
        build(Recipe, {"model": "autoencoder"})
    made = build(Recipe, {"model": "autoencoder", "objective": "reconstruction"})
    assert made.objective == Reconstruction()
