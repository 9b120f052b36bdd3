"""Recipes from YAML and the command line; each mistake is one line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from minidiffusion.data import FashionMNIST, Tensors, Toy
from minidiffusion.models import DiTConfig, MLPConfig, MMDiTConfig, UNetConfig
from minidiffusion.training.optimizers import AdamW, Muon
from minidiffusion.training.recipe import (
    FREE,
    Finetune,
    Recipe,
    Run,
    Through,
    fitted,
    load_recipe,
    merged,
)
from minidiffusion.training.state import flat
from minidiffusion.typed import ConfigError, build, plain

TEXT = """
data: {name: toy, kind: spiral}
model: {name: mlp, width: 32}
optimizer: {name: adamw, lr: 1e-3, betas: [0.9, 0.99]}
run: {minutes: 3, batch_size: auto, clip: null}
seed: 7
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


def test_a_file(file) -> None:
    recipe = load_recipe(file)
    assert recipe.data == Toy("spiral") and recipe.model == MLPConfig(width=32)
    assert recipe.optimizer == AdamW(lr=0.001, betas=(0.9, 0.99))  # 1e-3 is text to YAML 1.1
    assert recipe.run == Run(minutes=3.0, batch_size="auto", clip=None)
    assert recipe.seed == 7 and recipe.out is None
    assert load_recipe(str(file)) == recipe


def test_overrides(file) -> None:
    recipe = load_recipe(file, {"model.depth": 9, "optimizer.lr": "2e-4", "seed": 1, "out": "x"})
    assert recipe.model == MLPConfig(width=32, depth=9)
    assert recipe.optimizer == AdamW(lr=2e-4, betas=(0.9, 0.99))
    assert (recipe.seed, recipe.out) == (1, "x")
    other = load_recipe(file, {"model.depth": 3, "model": "dit", "optimizer": "muon"})
    assert other.model == DiTConfig(depth=3) and other.optimizer == Muon()
    assert load_recipe(file, {"model": "mlp"}).model == MLPConfig(width=32)  # what it was
    longer = load_recipe(file, {"run.steps": 10, "run.minutes": None})
    assert longer.run.steps == 10 and longer.run.minutes is None


MERGES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"a": 1}, {}, {"a": 1}),
    ({"a": 1}, {"b.c.d": 2}, {"a": 1, "b": {"c": {"d": 2}}}),
    ({"a": {"x": 1, "y": 2}}, {"a.x": 3}, {"a": {"x": 3, "y": 2}}),
    ({"a": "unet"}, {"a.x": 3}, {"a": {"name": "unet", "x": 3}}),
    ({"a": {"name": "unet", "x": 1}}, {"a": "unet"}, {"a": {"name": "unet", "x": 1}}),
    ({"a": {"name": "unet", "x": 1}}, {"a": "dit"}, {"a": "dit"}),
    ({"a": {"name": "unet", "x": 1}}, {"a.y": 2, "a": "dit"}, {"a": {"name": "dit", "y": 2}}),
    ({"a": {"x": 1}}, {"a": {"y": 2}}, {"a": {"y": 2}}),
    ({"a": None}, {"a.x": 1}, {"a": {"x": 1}}),
    ({"a": 1}, {"a": None}, {"a": None}),
]


@pytest.mark.parametrize(("values", "overrides", "result"), MERGES)
def test_merged(values, overrides, result) -> None:
    before = repr(values)
    assert merged(values, overrides) == result
    assert repr(values) == before  # nothing is changed in place


MISTAKES: list[tuple[str, str]] = [
    ("model: {name: mlp, widht: 3}", "model.widht: unknown key (did you mean width?)"),
    ("modle: mlp", "modle: unknown key (did you mean model?)"),
    (
        "model: gan",
        "model.name: unknown 'gan'; allowed: autoencoder, dit, dual_encoder, mlp, mmdit, unet",
    ),
    ("model: 3", "model: expected a block of keys, got 3"),
    (
        "model: {width: 3}",
        "model.name: missing; allowed: autoencoder, dit, dual_encoder, mlp, mmdit, unet",
    ),
    ("run: {steps: nan}", "run.steps: expected a whole number, got 'nan'"),
    ("run: {steps: .nan}", "run.steps: expected a whole number, got nan"),
    ("run: {steps: -1}", "run.steps: must be at least 1, got -1"),
    ("run: {steps: 0}", "run.steps: must be at least 1, got 0"),
    ("run: {steps: 1.5}", "run.steps: expected a whole number, got 1.5"),
    ("run: {minutes: 0}", "run.minutes: must be above 0, got 0"),
    ("run: {epochs: -2}", "run.epochs: must be above 0, got -2"),
    ("run: {epochs: .inf}", "run.epochs: must be finite, got inf"),
    (
        "run: {batch_size: all}",
        "run.batch_size: expected a whole number at least 1, at most 1048576 | auto",
    ),
    ("run: {batch_size: 0}", "run.batch_size: must be at least 1, got 0"),
    ("run: {micro_batch: 0}", "run.micro_batch: must be at least 1, got 0"),
    ("run: {ema: 1}", "run.ema: must be below 1, got 1"),
    ("run: {clip: 0}", "run.clip: must be above 0, got 0"),
    ("run: {workers: -1}", "run.workers: must be at least 0, got -1"),
    ("run: {strategy: tp}", "run.strategy: unknown 'tp'; allowed: ddp, fsdp"),
    ("run: {precision: fp16}", "run.precision: unknown 'fp16'"),
    ("run: {compile: 1}", "run.compile: expected true or false, got 1"),
    ("run: {steps: 3, epochs: 2}", "run: a length is steps, epochs or minutes; got steps and"),
    ("run: {epochs: 3, minutes: 2}", "run: a length is steps, epochs or minutes; got epochs and"),
    ("optimizer: {name: adamw, lr: fast}", "optimizer.lr: expected a number, got 'fast'"),
    ("optimizer: {name: adamw, betas: [0.9]}", "optimizer.betas: expected 2 values, got 1"),
    ("optimizer: {name: muon, momentum: 1}", "optimizer.momentum: must be below 1, got 1"),
    ("objective: {target: noise}", "objective.target: unknown 'noise'"),
    ("objective: {label_drop: 2}", "objective.label_drop: must be at most 1, got 2"),
    ("schedule: {end: -0.1}", "schedule.end: must be at least 0, got -0.1"),
    ("path: {name: rectified_flow, shift: 0}", "path.shift: must be above 0, got 0"),
    (
        "sampling: {guidance_interval: [7, 3]}",
        "sampling: guidance_interval: must not fall, got 7.0 to 3.0",
    ),
    (
        "through: {autoencoder: a, clip: b}\nmodel: dit",
        "through: dit reads no words; allowed: unet, mmdit",
    ),
    (
        "through: {autoencoder: a, clip: b}\nfinetune: {model: c}",
        "through: not with finetune, whose model has encoders of its own",
    ),
    ("model: autoencoder", "objective: autoencoder has reconstruction, got that of denoisers"),
    ("objective: contrastive", "objective: unet has that of denoisers, got contrastive"),
    ("seed: -1", "seed: must be at least 0, got -1"),
    ("seed: true", "seed: expected a whole number, got True"),
    ("[1, 2]", "a recipe is a mapping of keys, got list"),
    ("just words", "a recipe is a mapping of keys, got str"),
    ("a: [1", "cannot be read as YAML: while parsing"),
    ("a: !!python/object/apply:os.getcwd []", "cannot be read as YAML: could not determine"),
    ("\x00", "cannot be read as YAML: "),
    ("seed: 1\nseed: 2", "cannot be read as YAML: key 'seed' stands twice in"),
    ("run: {steps: 1, steps: 2}", "cannot be read as YAML: key 'steps' stands twice in"),
    ("? [1, 2]\n: 3", "cannot be read as YAML: while constructing a mapping"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[text for text, _ in MISTAKES])
def test_a_mistake_gets_one_line(text, message, tmp_path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: no such recipe$"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory$"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ConfigError, match=r"binary.yaml: cannot be read as YAML") as caught:
        load_recipe(tmp_path / "binary.yaml")
    assert "\n" not in str(caught.value)
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.yaml: an empty recipe"):
        load_recipe(tmp_path / "empty.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(ConfigError, match=r"empty\.yaml: an empty recipe"):
        load_recipe(tmp_path / "empty.yaml", {"seed": 3})


def test_an_override_inside_no_block() -> None:
    with pytest.raises(ConfigError, match=r"^run: expected a block of keys, got 3$"):
        merged({"run": 3}, {"run.steps": 5})


def test_wrong_overrides(file) -> None:
    for overrides, message in [
        ({"model.widht": 3}, "model.widht: unknown key"),
        ({"run.steps.more": 3}, "run.steps: expected a whole number"),
        ({"seed.x": 3}, "seed: expected a block of keys, got 7"),
        ({"run.steps": 5}, "run: a length is"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_recipe(file, overrides)


def test_round_trip(file) -> None:
    for recipe in (Recipe(), load_recipe(file), Recipe(run=Run(epochs=2.5), out="x")):
        assert build(Recipe, plain(recipe)) == recipe
        assert build(Recipe, yaml.safe_load(yaml.safe_dump(plain(recipe)))) == recipe
    assert isinstance(Recipe().data, FashionMNIST)


def test_what_is_free_exists() -> None:
    """A key that is spelled wrongly there would be free of nothing."""
    keys = set(flat(plain(Recipe(finetune=Finetune("model")))))
    assert keys | set(flat(plain(Recipe(model=MMDiTConfig(), through=Through("a", "b"))))) >= FREE


def pictures(*shape: int, classes: tuple[str, ...] = ()) -> Tensors:
    return Tensors(torch.zeros(2, *shape), torch.zeros(2, dtype=torch.int64), classes)


def test_fitted_follows_the_data() -> None:
    dit = fitted(Recipe(model=DiTConfig()), pictures(3, 32, 16, classes=("a", "b"))).model
    assert (dit.in_channels, dit.rows, dit.columns, dit.classes) == (3, 32, 16, 2)
    unet = fitted(Recipe(model=UNetConfig()), pictures(3, 32, 32)).model
    assert (unet.in_channels, unet.classes) == (3, 0)
    mlp = fitted(Recipe(model=MLPConfig()), pictures(5, classes=("a",))).model
    assert (mlp.in_channels, mlp.classes) == (5, 1)
    same = Recipe(model=DiTConfig(rows=32, columns=32))
    assert fitted(same, pictures(1, 32, 32)).model == same.model


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (DiTConfig(rows=32), (1, 16, 16), r"model.rows: is 32, but the data has 16"),
        (DiTConfig(classes=5), (1, 16, 16), r"model.classes: is 5, but the data has 1"),
        (UNetConfig(in_channels=3), (1, 16, 16), r"model.in_channels: is 3, but the data has 1"),
        (UNetConfig(patch=2), (1, 15, 15), r"model: this unet takes \(1, rows, columns\)"),
        (DiTConfig(), (1, 15, 15), r"model: patch: 2 does not divide rows = 15"),
        (MLPConfig(), (1, 16, 16), r"model: this mlp takes \(1,\), got \(1, 16, 16\)"),
        (UNetConfig(), (2,), r"model: this unet takes \(2, rows, columns\)"),
        (UNetConfig(out_channels=2), (1, 16, 16), r"model.out_channels: follows the data"),
        (UNetConfig(context_width=8), (1, 16, 16), r"model.context_width: follows the data"),
        (UNetConfig(pooled_width=8), (1, 16, 16), r"model.pooled_width: follows the data"),
    ],
)
def test_what_cannot_fit(model, shape, message) -> None:
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        fitted(Recipe(model=model), pictures(*shape, classes=("a",)))
    assert "\n" not in str(caught.value)


def test_lengths_exclude_one_another() -> None:
    given: dict[str, Any] = {"steps": 2, "epochs": 3.0, "minutes": 4.0}
    for first, second in (("steps", "epochs"), ("steps", "minutes"), ("epochs", "minutes")):
        with pytest.raises(ValueError, match=f"got {first} and {second}"):
            replace(Run(), **{name: given[name] for name in (first, second)})
