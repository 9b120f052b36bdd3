"""Key tables against every key and shape of the official files, both ways."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minidiffusion.checkpoints.official import CONFIGS, blueprint, shapes_of, table_rules
from minidiffusion.checkpoints.recognise import Part, parts, passed_over
from minidiffusion.checkpoints.rename import Renamed, check, conv, cut, rules, their_shapes
from minidiffusion.typed import build

LAYOUTS = {
    path.stem: {name: tuple(shape) for name, shape in json.loads(path.read_text()).items()}
    for path in sorted((Path(__file__).parent / "data" / "layouts").glob("*.json"))
}
HELD = {
    "clip_g": ["text encoder"],
    "clip_l": ["text encoder"],
    "sd15": ["denoiser", "autoencoder", "text encoder"],
    "sd21_unet_vae": ["denoiser", "autoencoder"],
    "sd3_vae": ["autoencoder"],
    "sdxl_base_unet_vae": ["denoiser", "autoencoder"],
}
FOREIGN = {
    "denoiser": ["ldm", "diffusers"],
    "autoencoder": ["ldm", "diffusers", "diffusers-former"],
    "text encoder": ["transformers", "transformers-bare", "openclip"],
}
PARTS = [(name, part) for name, layout in LAYOUTS.items() for part in parts(layout)]


@pytest.fixture(params=PARTS, ids=[f"{name}, {part.kind}" for name, part in PARTS])
def case(request: pytest.FixtureRequest) -> tuple[dict[str, tuple[int, ...]], Part]:
    name, part = request.param
    return LAYOUTS[name], part


def test_all_layouts_are_recognised_and_nothing_else_in_them() -> None:
    assert {name: [part.kind for part in parts(LAYOUTS[name])] for name in LAYOUTS} == HELD


def test_every_key_has_its_place(case) -> None:
    """Each key of the file once, with its shape; each of ours once; nothing left on either side."""
    layout, part = case
    config = build(CONFIGS[part.network], part.sizes)
    ours = shapes_of(blueprint(config))
    made = table_rules(config, part.dialect, ours, part.prefix)
    wanted = {n: s for n, s in layout.items() if n.startswith(part.prefix)}
    assert sorted(name for rule in made for name in rule.theirs) == sorted(wanted)
    assert sorted(name for rule in made for name in rule.ours) == sorted(ours)
    assert their_shapes(made, ours) == wanted
    empty = {name: torch.empty(shape, device="meta") for name, shape in wanted.items()}
    named = Renamed(made, empty, ours, "ours")
    assert {name: tuple(named[name].shape) for name in named} == ours


def test_every_dialect_is_one_to_one_at_full_size(case) -> None:
    _, part = case
    config = build(CONFIGS[part.network], part.sizes)
    ours = shapes_of(blueprint(config))
    for dialect in FOREIGN[part.kind]:
        made = table_rules(config, dialect, ours, "x.")
        theirs = [name for rule in made for name in rule.theirs]
        assert len(set(theirs)) == len(theirs)
        again = {**part.sizes, **sizes_again(their_shapes(made, ours), part, dialect)}
        assert build(CONFIGS[part.network], again) == config


def sizes_again(shapes, part: Part, dialect: str) -> dict[str, object]:
    """A config is read again from its network's shapes in any dialect, but for what is guessed."""
    found = parts({name.removeprefix("x."): shape for name, shape in shapes.items()})
    assert [(one.kind, one.dialect) for one in found] == [(part.kind, dialect)]
    guessed = {"activation", "layers", "projection"} if dialect == "openclip" else set()
    return {name: value for name, value in found[0].sizes.items() if name not in guessed}


KNOWN = {
    "sd15": {"heads": 8, "context_width": 768, "attention": (1, 1, 1, 0), "channels": 320,
             "multipliers": (1, 2, 4, 4), "linear_projections": False, "in_channels": 4},
    "sd21_unet_vae": {"head_width": 64, "context_width": 1024, "linear_projections": True},
    "sdxl_base_unet_vae": {"head_width": 64, "context_width": 2048, "pooled_width": 2816,
                           "attention": (0, 2, 10), "multipliers": (1, 2, 4)},
    "sd3_vae": {"latent_channels": 16, "quant": False, "scale": 1.5305, "shift": 0.0609},
    "clip_l": {"width": 768, "layers": 12, "heads": 12, "activation": "quick_gelu",
               "projection": None, "feed_forward": 3072},
    "clip_g": {"width": 1280, "layers": 32, "heads": 20, "activation": "gelu", "projection": 1280},
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_sizes_are_those_of_the_model(name: str) -> None:
    sizes = parts(LAYOUTS[name])[0].sizes
    assert {key: sizes[key] for key in KNOWN[name]} == KNOWN[name]


def random(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def small(kind: str) -> object:
    return {
        "denoiser": build(CONFIGS["unet"], {
            "in_channels": 4, "channels": 32, "multipliers": [1, 2], "attention": [0, 2],
            "context_width": 8, "heads": 2, "blocks": 1, "pooled_width": 6,
            "linear_projections": True,
        }),
        "autoencoder": build(CONFIGS["autoencoder"], {
            "channels": 8, "multipliers": [1, 2], "groups": 4, "blocks": 1,
        }),
        "text encoder": build(CONFIGS["clip"], {
            "width": 8, "layers": 2, "heads": 2, "vocabulary": 9, "feed_forward": 6,
            "projection": 4,
        }),
    }[kind]  # fmt: skip


@pytest.mark.parametrize(("kind", "dialect"), [(k, d) for k, row in FOREIGN.items() for d in row])
def test_there_and_back_is_bit_equal(kind: str, dialect: str) -> None:
    config = small(kind)
    ours = shapes_of(blueprint(config))
    made = table_rules(config, dialect, ours, "a.b.")
    theirs = their_shapes(made, ours)
    file = random(theirs)
    named = Renamed(made, file, ours, "ours")
    back = Renamed(made, dict(named), theirs, "theirs")
    assert back.keys() == file.keys()
    assert all(torch.equal(back[name], file[name]) for name in file)
    assert sum(t.numel() for t in named.values()) == sum(t.numel() for t in file.values())


def test_rows_of_several_tensors_lie_in_their_order() -> None:
    made = rules(
        {("q.weight", "kv.weight"): "in", "out": conv("o")}, ["q.weight", "kv.weight", "out.weight"]
    )
    file = {"in": torch.arange(12.0).reshape(6, 2), "o.weight": torch.ones(2, 2, 1, 1)}
    shapes = {"q.weight": (2, 2), "kv.weight": (4, 2), "out.weight": (2, 2)}
    named = Renamed(made, file, shapes, "ours")
    assert torch.equal(named["q.weight"], file["in"][:2])
    assert torch.equal(named["kv.weight"], file["in"][2:])
    assert named["out.weight"].shape == (2, 2)
    assert their_shapes(made, shapes) == {"in": (6, 2), "o.weight": (2, 2, 1, 1)}


def test_cut_across_the_pieces() -> None:
    pieces = [torch.arange(3), torch.arange(3, 8)]
    assert [torch.cat(p).tolist() for p in cut(pieces, [2, 4, 2])] == [[0, 1], [2, 3, 4, 5], [6, 7]]


def test_a_table_without_a_row_is_a_mistake_of_ours() -> None:
    with pytest.raises(LookupError, match="no row for \\['strange.weight'\\]"):
        rules({"a": "b"}, ["a.weight", "strange.weight"])


def test_complaints_are_one_line_and_short() -> None:
    found = {f"stranger.{n}": (1,) for n in range(9)} | {"here": (2, 3)}
    with pytest.raises(ValueError) as caught:
        check(found, {"here": (3, 2), "gone": (1,)}, "file")
    text = str(caught.value)
    assert text == (
        "file: 9 unknown keys: stranger.0, stranger.1, stranger.2, stranger.3, stranger.4 and 4 "
        "more; 1 missing keys: gone; 1 wrong shapes: here is [2, 3], expected [3, 2]"
    )


@pytest.mark.parametrize(
    ("name", "passes"),
    [("model_ema.decay", True), ("betas", True), ("sqrt_alphas_cumprod", True), ("logvar", True),
     ("embeddings.position_ids", True), ("denoiser.sigmas", True), ("alphas_cumprod_prev", True),
     ("my_betas", False), ("encoder.betas.weight", False), ("logvariance", False)],
)  # fmt: skip
def test_what_is_ignored_is_ignored_by_its_whole_name(name: str, passes: bool) -> None:
    part = Part("denoiser", "unet", "ldm", "", {})
    assert bool(passed_over(part).fullmatch(name)) == passes
