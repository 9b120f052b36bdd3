"""Stable Diffusion 3's text encoders: every key and shape of their stand-alone files, both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minidiffusion.checkpoints.rename import Renamed, Table, rules, their_shapes
from minidiffusion.checkpoints.tables import clip, t5
from minidiffusion.models import CLIPConfig, CLIPText, T5Config, T5Encoder, hollow

DATA = Path(__file__).parent / "data"
CLIP_L = CLIPConfig(skip=1, final_norm=False)
CLIP_G = CLIPConfig(
    width=1280, layers=32, heads=20, feed_forward=5120, activation="gelu", projection=1280, skip=1,
    final_norm=False,
)  # fmt: skip
FILES: dict[str, tuple[Any, Any, Table]] = {
    "t5xxl_encoder.json": (T5Encoder, T5Config(), t5.table(T5Config(), "transformers")),
    "layouts/clip_l.json": (CLIPText, CLIP_L, clip.table(CLIP_L, "transformers")),
    "layouts/clip_g.json": (CLIPText, CLIP_G, clip.table(CLIP_G, "transformers")),
}
Shapes = dict[str, tuple[int, ...]]


def layout(file: str) -> Shapes:
    return {name: tuple(shape) for name, shape in json.loads((DATA / file).read_text()).items()}


def shapes_of(network: nn.Module) -> Shapes:
    return {name: tuple(w.shape) for name, w in network.state_dict().items()}


def empty(shapes: Shapes) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("prefix", ["", "text_encoders.some.transformer."])
@pytest.mark.parametrize("file", FILES)
def test_every_key_has_its_place(file: str, prefix: str) -> None:
    """Each key of the file once, each of ours once, with their shapes, there and back."""
    make, config, table = FILES[file]
    network = hollow(make, config)
    ours = shapes_of(network)
    wanted = {prefix + name: shape for name, shape in layout(file).items()}
    made = rules(table, ours, prefix)
    assert sorted(name for rule in made for name in rule.theirs) == sorted(wanted)
    assert sorted(name for rule in made for name in rule.ours) == sorted(ours)
    assert their_shapes(made, ours) == wanted
    named = Renamed(made, empty(wanted), ours, "ours")
    assert {name: tuple(named[name].shape) for name in named} == ours
    network.load_state_dict(dict(named), assign=True)
    back = Renamed(made, empty(ours), wanted, "theirs")
    assert {name: tuple(back[name].shape) for name in back} == wanted


def test_the_table_of_tokens_by_its_other_name() -> None:
    ours = shapes_of(hollow(T5Encoder, T5Config()))
    made = rules(t5.table(T5Config(), "transformers-shared"), ours)
    wanted = layout("t5xxl_encoder.json")
    wanted["shared.weight"] = wanted.pop("encoder.embed_tokens.weight")
    assert their_shapes(made, ours) == wanted


@pytest.mark.parametrize("dialect", t5.DIALECTS)
def test_there_and_back_is_bit_equal(dialect: str) -> None:
    config = T5Config(
        vocabulary=9, width=8, layers=2, heads=2, head_width=6, feed_forward=5, buckets=8
    )
    ours = shapes_of(hollow(T5Encoder, config))
    made = rules(t5.table(config, dialect), ours, "a.")
    theirs = their_shapes(made, ours)
    file = {name: torch.randn(shape) for name, shape in theirs.items()}
    named = Renamed(made, file, ours, "ours")
    back = Renamed(made, dict(named), theirs, "theirs")
    assert back.keys() == file.keys()
    assert all(torch.equal(back[name], file[name]) for name in file)
    q, k, v = named["blocks.1.qkv.weight"].chunk(3)
    place = "a.encoder.block.1.layer.0.SelfAttention"
    assert torch.equal(q, file[f"{place}.q.weight"])
    assert torch.equal(k, file[f"{place}.k.weight"])
    assert torch.equal(v, file[f"{place}.v.weight"])
    gate, value = named["blocks.0.enter.weight"].chunk(2)
    place = "a.encoder.block.0.layer.1.DenseReluDense"
    assert torch.equal(gate, file[f"{place}.wi_0.weight"])
    assert torch.equal(value, file[f"{place}.wi_1.weight"])
