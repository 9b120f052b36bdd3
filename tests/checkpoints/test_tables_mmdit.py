"""The MMDiT's key tables against every key and shape of the official files, both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

from minidiffusion.checkpoints.rename import Renamed, Rule, Shape, rules, swapped, their_shapes
from minidiffusion.checkpoints.tables import mmdit
from minidiffusion.models import MMDiT, MMDiTConfig, hollow

LAYOUTS = {
    path.stem: {name: tuple(shape) for name, shape in json.loads(path.read_text()).items()}
    for path in (Path(__file__).parent / "data").rglob("*.json")
}
PREFIX = "model.diffusion_model."
LARGE = {"width": 2432, "depth": 38, "heads": 38, "qk_norm": True}
CONFIGS = {
    "sd3_medium": MMDiTConfig(),
    "sd3.5_medium": MMDiTConfig(grid=384, qk_norm=True, second_attention=13),
    "sd3.5_large": MMDiTConfig(**LARGE),  # type: ignore[arg-type]
}
SMALL: dict[str, Any] = {
    "width": 8, "depth": 3, "heads": 2, "grid": 3, "in_channels": 2, "context_width": 6,
    "pooled_width": 5,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "medium": {}, "3.5 medium": {"qk_norm": True, "second_attention": 2}, "large": {"qk_norm": True}
}  # fmt: skip


def made(
    config: MMDiTConfig, dialect: str, prefix: str = ""
) -> tuple[list[Rule], dict[str, Shape]]:
    """The rules of a dialect, and our shapes."""
    state = hollow(MMDiT, config).state_dict()
    ours = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return rules(mmdit.table(config, dialect), ours, prefix), ours


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_of_the_official_file_has_its_place(name: str) -> None:
    wanted = {key: shape for key, shape in LAYOUTS[name].items() if key.startswith(PREFIX)}
    found, ours = made(CONFIGS[name], "ldm", PREFIX)
    assert sorted(key for rule in found for key in rule.theirs) == sorted(wanted)
    assert sorted(key for rule in found for key in rule.ours) == sorted(ours)
    assert their_shapes(found, ours) == wanted
    empty = {key: torch.empty(shape, device="meta") for key, shape in wanted.items()}
    named = Renamed(found, empty, ours, "ours")
    assert {key: tuple(named[key].shape) for key in named} == ours


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_of_diffusers_has_its_place(name: str) -> None:
    c = CONFIGS[name]
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            sample_size=2, num_layers=c.depth, num_attention_heads=c.heads,
            caption_projection_dim=c.width, pos_embed_max_size=1,
            qk_norm="rms_norm" if c.qk_norm else None, joint_attention_dim=c.context_width,
            pooled_projection_dim=c.pooled_width,
            dual_attention_layers=tuple(range(c.second_attention)),
        )  # fmt: skip
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    wanted["pos_embed.pos_embed"] = (1, c.grid**2, c.width)
    found, ours = made(c, "diffusers")
    names = [key for rule in found for key in rule.theirs]
    assert len(set(names)) == len(names)
    assert their_shapes(found, ours) == wanted
    # The other dialect names the same tensors of ours.
    assert {key for rule in found for key in rule.ours} == ours.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_from_one_dialect_to_the_other_as_diffusers_does_and_back(kind: str) -> None:
    config = MMDiTConfig(**SMALL, **KINDS[kind])
    ldm, ours = made(config, "ldm", PREFIX)
    diffusers, _ = made(config, "diffusers")
    file = {name: torch.randn(shape) for name, shape in their_shapes(ldm, ours).items()}
    mine = dict(Renamed(ldm, file, ours, "ours"))
    folder = dict(Renamed(diffusers, mine, their_shapes(diffusers, ours), "theirs"))
    again = dict(Renamed(diffusers, folder, ours, "ours"))
    back = dict(Renamed(ldm, again, their_shapes(ldm, ours), "theirs"))
    assert back.keys() == file.keys()
    assert all(torch.equal(back[name], file[name]) for name in file)
    wanted = convert_sd3_transformer_checkpoint_to_diffusers(dict(file))
    assert folder.keys() == wanted.keys()
    assert all(torch.equal(folder[name], wanted[name]) for name in wanted)


def test_rows_of_whole_tensors_and_swapped_halves() -> None:
    """A name stands for a module or, where nothing lies below it, for a tensor."""
    names = ["places", "norm.weight", "norm.bias"]
    found = rules({"places": "grid", "norm": swapped("last")}, names, "p.")
    assert found == [
        Rule(("places",), ("p.grid",)),
        Rule(("norm.weight",), ("p.last.weight",), "swapped"),
        Rule(("norm.bias",), ("p.last.bias",), "swapped"),
    ]
    file = {"p.grid": torch.ones(1, 2), "p.last.bias": torch.arange(4)}
    named = Renamed(found, file, {"places": (1, 2), "norm.bias": (4,)}, "ours")
    assert named["norm.bias"].tolist() == [2, 3, 0, 1]
    assert torch.equal(named["places"], file["p.grid"])
