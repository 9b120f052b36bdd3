"""Plain data into dataclasses and back; each mistake has its line."""

import json
from dataclasses import dataclass, field
from math import inf, nan
from typing import Any, ClassVar, Literal

import pytest
import yaml

from minidiffusion.typed import ConfigError, build, fields_help, plain


@dataclass(frozen=True)
class UNet:
    name: ClassVar[str] = "unet"
    channels: int = field(default=32, metadata={"min": 1})
    widths: tuple[int, ...] = field(default=(1, 2), metadata={"min": 1})
    depth: int = 2

    def __post_init__(self) -> None:
        if self.channels % 2:
            raise ValueError("channels must be even")


@dataclass(frozen=True)
class DiT:
    name: ClassVar[str] = "dit"
    depth: int = 12


@dataclass(frozen=True)
class Optimizer:
    lr: float = field(default=1e-3, metadata={"above": 0, "below": 1})
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = inf
    kind: Literal["adamw", "sgd"] = "adamw"


@dataclass(frozen=True)
class Recipe:
    name: str
    steps: int = field(metadata={"min": 1, "max": 1000})
    model: UNet | DiT = field(default_factory=UNet)
    optimizer: Optimizer = Optimizer(lr=0.5)
    flip: bool = False
    seed: int | None = None
    teacher: UNet | DiT | None = None
    average: Optimizer | None = None
    stages: tuple[Optimizer, ...] = ()
    rounds: Literal[1, 2] = 1


LEAST: dict[str, object] = {"name": "x", "steps": 3}
FULL = Recipe(
    name="full",
    steps=7,
    model=DiT(depth=3),
    optimizer=Optimizer(lr=1e-4, betas=(0.0, 0.5), clip=1.0, kind="sgd"),
    flip=True,
    seed=0,
    teacher=UNet(channels=2, widths=()),
    average=Optimizer(),
    stages=(Optimizer(), Optimizer(lr=0.25)),
    rounds=2,
)


@pytest.mark.parametrize("recipe", [Recipe("x", 3), FULL])
def test_round_trips(recipe: Recipe) -> None:
    values = plain(recipe)
    assert build(Recipe, values) == recipe
    assert build(Recipe, json.loads(json.dumps(values, allow_nan=False))) == recipe
    assert build(Recipe, yaml.safe_load(yaml.safe_dump(values))) == recipe


def test_plain_values() -> None:
    values: Any = plain(Recipe("x", 3))
    assert list(values["model"].items())[:2] == [("name", "unet"), ("channels", 32)]
    assert values["model"]["widths"] == [1, 2] and values["name"] == "x"
    assert values["optimizer"]["clip"] == "inf" and "name" not in values["optimizer"]
    with pytest.raises(TypeError, match="not a dataclass"):
        plain(3)


def test_a_recipe_as_people_write_it() -> None:
    text = """
    name: shoes
    steps: 10
    model: dit
    teacher: {name: unet, widths: [4, 5, 6]}
    optimizer: {lr: 1e-4, betas: [0, 1], clip: .inf}
    seed: null
    """
    made = build(Recipe, yaml.safe_load(text))
    assert made.model == DiT() and made.teacher == UNet(widths=(4, 5, 6))
    assert made.optimizer == Optimizer(lr=1e-4, betas=(0.0, 1.0))
    assert type(made.optimizer.betas[0]) is float and made.seed is None
    assert build(DiT, {"name": "dit", "depth": 4}) == DiT(4) == build(DiT, {"depth": 4})


MISTAKES: list[tuple[dict[str, object], str]] = [
    (
        {"model": {"name": "unet", "chanels": 2}},
        "model.chanels: unknown key (did you mean channels?); allowed: channels, widths, depth",
    ),
    ({"zzz": 1}, "zzz: unknown key; allowed: name, steps, model, optimizer, flip, seed, teacher"),
    ({3: 1}, "3: unknown key; allowed: name"),  # type: ignore[dict-item]
    ({"steps": -1}, "steps: must be at least 1, got -1"),
    ({"steps": 1001}, "steps: must be at most 1000, got 1001"),
    ({"steps": 2.0}, "steps: expected a whole number, got 2.0"),
    ({"steps": "2"}, "steps: expected a whole number, got '2'"),
    ({"steps": True}, "steps: expected a whole number, got True"),
    ({"name": 3}, "name: expected text, got 3"),
    ({"flip": 1}, "flip: expected true or false, got 1"),
    ({"flip": None}, "flip: expected true or false, got None"),
    ({"seed": "a"}, "seed: expected a whole number, got 'a'"),
    ({"optimizer": {"lr": "fast"}}, "optimizer.lr: expected a number, got 'fast'"),
    ({"optimizer": {"lr": True}}, "optimizer.lr: expected a number, got True"),
    ({"optimizer": {"lr": nan}}, "optimizer.lr: expected a number, got nan"),
    ({"optimizer": {"lr": "nan"}}, "optimizer.lr: expected a number, got 'nan'"),
    ({"optimizer": {"lr": 10**400}}, "optimizer.lr: expected a number, got 1000"),
    ({"optimizer": {"lr": inf}}, "optimizer.lr: must be finite, got inf"),
    ({"optimizer": {"clip": -inf}}, "optimizer.clip: must be finite, got -inf"),
    ({"optimizer": {"clip": nan}}, "optimizer.clip: expected a number, got nan"),
    ({"optimizer": {"lr": 0}}, "optimizer.lr: must be above 0, got 0"),
    ({"optimizer": {"lr": 1}}, "optimizer.lr: must be below 1, got 1"),
    ({"optimizer": {"betas": [0.1]}}, "optimizer.betas: expected 2 values, got 1"),
    ({"optimizer": {"betas": "ab"}}, "optimizer.betas: expected a list, got 'ab'"),
    ({"optimizer": {"betas": [0, "b"]}}, "optimizer.betas[1]: expected a number, got 'b'"),
    (
        {"optimizer": {"kind": "adam"}},
        "optimizer.kind: unknown 'adam' (did you mean adamw?); allowed: adamw, sgd",
    ),
    ({"optimizer": 3}, "optimizer: expected a block of keys, got 3"),
    ({"optimizer": None}, "optimizer: expected a block of keys, got None"),
    ({"optimizer": "sgd"}, "optimizer: expected a block of keys, got 'sgd'"),
    ({"rounds": True}, "rounds: unknown True; allowed: 1, 2"),
    ({"rounds": [1]}, "rounds: unknown [1]; allowed: 1, 2"),
    ({"model": "unett"}, "model.name: unknown 'unett' (did you mean unet?); allowed: dit, unet"),
    ({"model": {"name": ["unet"]}}, "model.name: unknown ['unet']"),
    ({"model": {"depth": 3}}, "model.name: missing; allowed: dit, unet"),
    ({"model": None}, "model: expected a block of keys, got None"),
    ({"model": {"name": "dit", "channels": 2}}, "model.channels: unknown key; allowed: depth"),
    ({"model": {"name": "unet", "widths": [1, 0]}}, "model.widths[1]: must be at least 1, got 0"),
    ({"teacher": {"name": "unet", "channels": 3}}, "teacher: channels must be even"),
    ({"stages": [{}, {"lr": 2}]}, "stages[1].lr: must be below 1, got 2"),
]


@pytest.mark.parametrize(
    ("values", "message"), MISTAKES, ids=[m.split(";")[0] for _, m in MISTAKES]
)
@pytest.mark.parametrize("where", ["", "configs/x.yaml"])
def test_a_mistake_gets_one_line(values: dict[str, object], message: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Recipe, {**LEAST, **values}, where)
    assert str(caught.value).startswith(f"{where}: {message}" if where else message)
    assert "\n" not in str(caught.value)


def test_missing_and_top_level_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"^f: steps: missing; expected a whole number at least"):
        build(Recipe, {"name": "x"}, "f")
    with pytest.raises(ConfigError, match=r"^f: channels must be even$"):
        build(UNet, {"channels": 3}, "f")
    with pytest.raises(ConfigError, match=r"^channels must be even$"):
        build(UNet, {"channels": 3})
    with pytest.raises(ConfigError, match=r"^name: unknown 'dit'; allowed: unet$"):
        build(UNet, {"name": "dit"})


@dataclass(frozen=True)
class Vague:
    size: int | str = 3


def test_an_annotation_that_plain_values_cannot_tell_apart() -> None:
    with pytest.raises(TypeError, match=r"size: .* cannot be told apart"):
        build(Vague, {"size": 3})


def test_help() -> None:
    rows = {key: (takes, usual) for key, takes, usual in fields_help(Recipe, "run")}
    assert rows["run.name"] == ("text", "required")
    assert rows["run.steps"] == ("a whole number at least 1, at most 1000", "required")
    assert rows["run.model"] == ("unet | dit", "unet")
    assert rows["run.model.widths"] == ("[a whole number at least 1, ...] (of unet)", "[1, 2]")
    assert rows["run.optimizer.lr"] == ("a number above 0, below 1", "0.5")
    assert rows["run.optimizer.betas"] == ("[a number, a number]", "[0.9, 0.999]")
    assert rows["run.optimizer.kind"] == ("adamw | sgd", "adamw")
    assert rows["run.seed"] == ("a whole number | null", "None")
    assert rows["run.average"] == ("a block of keys | null", "None")
    assert rows["run.average.lr"] == ("a number above 0, below 1", "0.001")
    assert "run.optimizer" not in rows
    assert fields_help(DiT) == [("depth", "a whole number", "12")]


@dataclass(frozen=True)
class Nameless:
    size: int = 3


@dataclass(frozen=True)
class Named:
    name: ClassVar[str] = "named"
    size: int = 4
    colour: str = "red"


@dataclass(frozen=True)
class Either:
    one: Nameless | Named = field(default_factory=Nameless)


def test_the_block_without_a_name_is_meant_where_none_is_given() -> None:
    assert build(Either, {}) == Either(Nameless())
    assert build(Either, {"one": {"size": 5}}) == Either(Nameless(5))
    assert build(Either, {"one": "named"}) == Either(Named())
    assert build(Either, {"one": {"name": "named", "size": 5}}) == Either(Named(5))
    for value in (Either(), Either(Nameless(7)), Either(Named(7, "blue"))):
        assert build(Either, plain(value)) == value
    assert plain(Either()) == {"one": {"size": 3}}
    for values, said in (
        ({"one": {"colour": "red"}}, "one.colour: unknown key; allowed: size"),
        ({"one": {"name": "nam"}}, r"one.name: unknown 'nam' \(did you mean named\?\)"),
        ({"one": "other"}, "one.name: unknown 'other'"),
        ({"one": 3}, "one: expected a block of keys, got 3"),
    ):
        with pytest.raises(ConfigError, match=said) as error:
            build(Either, values)
        assert "\n" not in str(error.value)
    assert fields_help(Either) == [
        ("one", "a block of keys | named", ""),
        ("one.size", "a whole number", "3"),
        ("one.size", "a whole number (of named)", "4"),
        ("one.colour", "text (of named)", "red"),
    ]
