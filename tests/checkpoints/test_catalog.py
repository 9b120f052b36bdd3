"""Official files of every dialect become the same modules, and those are the reference's."""

import json
import shutil
from pathlib import Path
from typing import Any

import official
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from rounding import assert_parity
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from minidiffusion.checkpoints.catalog import Row, load_denoiser, save_denoiser
from minidiffusion.checkpoints.convert import single_names, theirs
from minidiffusion.checkpoints.parts import Parts, load_autoencoder, load_parts
from minidiffusion.checkpoints.reader import read_safetensors, write_safetensors
from minidiffusion.checkpoints.text_encoders import load_text_encoder
from minidiffusion.checkpoints.weights import Weights, open_weights
from minidiffusion.cli.main import main
from minidiffusion.diffusion import VariancePreserving
from minidiffusion.models import MLPConfig, UNetConfig, create
from minidiffusion.shapes import Cond
from minidiffusion.typed import build, plain

FAMILIES = ("sd1", "sd2", "sd1-inpaint")
MADE = [
    *(("sd1", dialect) for dialect in official.DIALECTS),
    *(("sd2", dialect) for dialect in ("single", "ckpt", "diffusers", "parts")),
    *(("sd1-inpaint", dialect) for dialect in ("single", "diffusers")),
]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, FAMILY-DIALECT each; nobody changes them."""
    root = tmp_path_factory.mktemp("official")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        for family, dialect in MADE:
            official.make(root / f"{family}-{dialect}", family, dialect=dialect)
    return root


def states(parts: Parts) -> list[dict[str, Tensor]]:
    assert parts.autoencoder is not None and parts.text is not None
    networks: list[nn.Module] = [parts.denoiser.network, parts.autoencoder, parts.text]
    assert not any(p.requires_grad for network in networks[1:] for p in network.parameters())
    assert not any(network.training for network in networks)
    return [network.state_dict() for network in networks]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(("family", "dialect"), MADE)
def test_every_dialect_is_the_same_model(family: str, dialect: str, shelf: Path) -> None:
    parts = load_parts(shelf / f"{family}-{dialect}")
    networks = (parts.denoiser.network, parts.autoencoder, parts.text)
    model, half = official.model(family).values(), dialect == "fp16"
    for network, state, content in zip(networks, states(parts), model, strict=True):
        drawn = content.tensors.items()
        assert same(state, {name: t.half().float() if half else t for name, t in drawn})
        assert network is not None and plainly(content.config) == plainly(network.config)
    row = parts.denoiser.row
    assert (row.family, row.target) == (family, official.usual(family))
    assert row.path == VariancePreserving()
    assert build(Row, plain(row)) == row
    side = 8 if dialect in ("diffusers", "fp16", "sharded") else 96 if family == "sd2" else 64
    assert row.shape == (4, side, side)
    assert not any(p.requires_grad for p in parts.denoiser.network.parameters())
    assert parts.text_pad == (0 if family == "sd2" else None)
    drawing = row.sampling
    assert (drawing.sampler, drawing.steps, drawing.spacing) == ("dpmpp_2m", 30, None)


def plainly(config: Any) -> Any:
    """A config but for heads that are told in another way, or not used where heads are so wide."""
    values = plain(config)
    if isinstance(config, UNetConfig):
        widths = [w for w, d in zip(config.widths, config.attention, strict=True) if d]
        values["heads"] = [w // config.head_width if config.head_width else config.heads
                           for w in widths]  # fmt: skip
        del values["head_width"]
    return values


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_parity_of_the_unet(family: str, shelf: Path) -> None:
    reference = UNet2DConditionModel.from_pretrained(shelf / f"{family}-diffusers" / "unet").eval()
    network = load_denoiser(shelf / f"{family}-single").network
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, reference.config.in_channels, 16, 24, generator=draw)
    tokens = torch.randn(2, 77, 64, generator=draw)
    t = torch.tensor([7.0, 981.0])
    found = assert_parity(
        lambda network, _, x, t, tokens: network(x, t, Cond(tokens=tokens)),
        lambda _, reference, x, t, tokens: reference(x, t, tokens).sample,
        network, reference, x, t, tokens,
    )  # fmt: skip
    assert 0.3 < found.std() < 3
    beside = network(x[:, :4], t, Cond(tokens=tokens, concat=x[:, 4:]))
    assert torch.equal(beside, found)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_parity_of_the_other_parts(family: str, shelf: Path) -> None:
    folder, single = shelf / f"{family}-diffusers", shelf / f"{family}-single"
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    z = torch.randn(1, 4, 8, 8)
    assert_parity(
        lambda network, _, z: network.decode(z),
        lambda _, vae, z: vae.decode(z / vae.config.scaling_factor).sample,
        load_autoencoder(single), vae, z,
    )  # fmt: skip
    text = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    ids = torch.randint(0, 49406, (2, 77))
    ids[:, 30] = 49407
    assert_parity(
        lambda network, _: network(ids).tokens, lambda _, text: text(ids).last_hidden_state,
        load_text_encoder(single), text,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_names_agree_with_another_converter(family: str, shelf: Path) -> None:
    """Our two tables could agree on a mistake; diffusers' own converter is a third opinion."""
    folder = shelf / f"{family}-diffusers"
    single = load_file(shelf / f"{family}-single")
    config = json.loads((folder / "unet" / "config.json").read_text())
    found = single_file_utils.convert_ldm_unet_checkpoint(dict(single), config)
    assert same(found, load_file(folder / UNET))
    config = json.loads((folder / "vae" / "config.json").read_text())
    found = single_file_utils.convert_ldm_vae_checkpoint(dict(single), config)
    assert same(found, load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"))


def test_openclip_agrees_with_another_converter(shelf: Path) -> None:
    folder = shelf / "sd2-diffusers" / "text_encoder"
    state = torch.load(shelf / "sd2-ckpt", weights_only=True)["state_dict"]
    found = single_file_utils.convert_open_clip_checkpoint(
        CLIPTextModel.from_pretrained(folder), state, prefix="cond_stage_model.model."
    )
    expected = load_file(folder / "model.safetensors")
    assert same({name: found[name] for name in expected}, expected)


def test_averages_are_taken_when_asked_for(shelf: Path) -> None:
    plain_, average = (
        load_denoiser(shelf / "sd1-ckpt", ema=ema).network.state_dict() for ema in (False, True)
    )
    assert same({name: 0.5 * t for name, t in plain_.items()}, average)
    with pytest.raises(ValueError, match="holds no averaged weights"):
        load_denoiser(shelf / "sd1-single", ema=True)


def test_nothing_else_is_read(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    get = Weights.__getitem__
    monkeypatch.setattr(Weights, "__getitem__", lambda w, n: read.append(n) or get(w, n))
    for load, name, place in (
        (load_text_encoder, "sd1-single", "cond_stage_model."),
        (load_autoencoder, "sd2-ckpt", "first_stage_model."),
    ):
        sampled = next(iter(open_weights(shelf / name)))  # by the tests' own check of types
        read.clear()
        load(shelf / name)
        assert read and all(one.startswith(place) for one in read if one != sampled)


def test_dtype_and_memory_of_their_own(shelf: Path) -> None:
    weights = load_denoiser(shelf / "sd1-single", dtype=torch.bfloat16).network.state_dict()
    whole = load_denoiser(shelf / "sd1-single").network.state_dict()
    assert same(weights, {name: tensor.bfloat16() for name, tensor in whole.items()})
    assert all(tensor.data_ptr() % 64 == 0 for tensor in weights.values())
    places = [tensor.untyped_storage().data_ptr() for tensor in weights.values()]
    assert len(set(places)) == len(places)


def test_options_win_over_guesses(shelf: Path) -> None:
    single = shelf / "sd1-single"
    assert load_denoiser(single).network.config.heads == 8
    assert load_denoiser(single, heads=4, groups=16).network.config.heads == 4
    config = load_denoiser(single, head_width=16).network.config
    assert config.head_width == 16
    assert load_denoiser(shelf / "sd2-single", heads=2).network.config.head_width is None
    assert load_denoiser(single, prediction="v").row.target == "v"
    assert load_denoiser(shelf / "sd2-diffusers", prediction="eps").row.target == "eps"
    assert load_autoencoder(single, scale=0.13025).config.scale == 0.13025


def test_configs_beside_the_weights_win_over_guesses(shelf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(shelf / "sd2-diffusers", folder)
    edit(folder / "unet" / "config.json", attention_head_dim=2, sample_size=12)
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="epsilon",
         beta_start=0.0001, beta_end=0.02, beta_schedule="linear")  # fmt: skip
    edit(folder / "vae" / "config.json", scaling_factor=0.5, shift_factor=0.25)
    edit(folder / "text_encoder" / "config.json", hidden_act="quick_gelu", num_attention_heads=4)
    parts = load_parts(folder)
    row = parts.denoiser.row
    assert (row.model.heads, row.model.head_width) == (2, None)
    assert row.target == "eps" and row.shape == (4, 12, 12)
    assert row.path == VariancePreserving("linear", 0.0001, 0.02)
    assert (parts.autoencoder.config.scale, parts.autoencoder.config.shift) == (0.5, 0.25)
    assert (parts.text.config.activation, parts.text.config.heads) == ("quick_gelu", 4)
    edit(folder / "unet" / "config.json", attention_head_dim=[2, 4])
    assert load_denoiser(folder).network.config.head_width == 32
    for wrong, words in (
        ([1, 1, 1], "one a level"),
        ([4, 1], "of different widths"),
        ("8", "got '8'"),
    ):
        edit(folder / "unet" / "config.json", attention_head_dim=wrong)
        with pytest.raises(ValueError, match=words):
            load_denoiser(folder)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": ["v"]}, "prediction_type"),
        ("scheduler/scheduler_config.json", {"beta_schedule": {}}, "beta_schedule"),
        ("scheduler/scheduler_config.json", {"beta_start": "x"}, "beta_start"),
        ("unet/config.json", {"norm_num_groups": True}, "groups: expected a whole number"),
        ("unet/config.json", {"resnet_time_scale_shift": "scale_shift"}, "is not supported"),
        ("unet/config.json", {"_class_name": ["a"], "architectures": [{}]}, None),
    ],
)
def test_configs_that_make_no_sense(file, changes, words, shelf: Path, tmp_path: Path) -> None:
    shutil.copytree(shelf / "sd1-diffusers", tmp_path / "model")
    edit(tmp_path / "model" / file, **changes)
    if words is None:
        with pytest.warns(UserWarning, match=r"config\.json: not used: of no class .*'a'"):
            assert load_denoiser(tmp_path / "model").row.family == "sd1"
        return
    with pytest.raises(ValueError, match=words) as caught:
        load_denoiser(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_config_that_is_no_json(shelf: Path, tmp_path: Path) -> None:
    shutil.copytree(shelf / "sd1-diffusers", tmp_path / "model")
    for text in ("{", "[1]", '{"a": 1, "a": 2}', "[" * 100_000):
        (tmp_path / "model" / "unet" / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json: (damaged|expected a block)"):
            load_denoiser(tmp_path / "model")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_xl_decodes_at_its_own_scale(shelf: Path, tmp_path: Path) -> None:
    unet = build(UNetConfig, {
        "in_channels": 4, "out_channels": 4, "channels": 64, "multipliers": [1, 2], "blocks": 1,
        "attention": [0, 2], "middle_attention": 2, "context_width": 128, "head_width": 64,
        "linear_projections": True, "pooled_width": 32,
    })  # fmt: skip
    contents = official.model("sd2") | {"denoiser": official.Content(unet, official.Random(unet))}
    contents = {kind: contents[kind] for kind in ("denoiser", "autoencoder")}
    official.single_file(contents, "sdxl", tmp_path / "xl")
    assert load_denoiser(tmp_path / "xl").row.family == "sdxl"
    assert load_denoiser(tmp_path / "xl").row.shape == (4, 128, 128)
    assert load_autoencoder(tmp_path / "xl").config.scale == 0.13025
    parts = load_parts(tmp_path / "xl", vae=shelf / "sd1-parts" / "vae.safetensors", optional=True)
    assert parts.autoencoder.config.scale == 0.13025 and parts.text is None


def test_missing_parts_name_the_option_that_helps(shelf: Path) -> None:
    unet = shelf / "sd1-parts" / "unet.safetensors"
    vae, clip = (shelf / "sd1-parts" / f"{name}.safetensors" for name in ("vae", "clip"))
    with pytest.raises(ValueError, match="holds no autoencoder: name one with --vae FILE"):
        load_parts(unet)
    with pytest.raises(
        ValueError, match="holds no text encoder: name one with --text-encoder FILE"
    ):
        load_parts(unet, vae=vae)
    assert load_parts(unet, optional=True)[1:] == (None, None)
    whole = load_parts(unet, vae=vae, text_encoder=clip)
    assert same(states(whole)[0], states(load_parts(shelf / "sd1-single"))[0])
    other = load_parts(shelf / "sd1-single", vae=shelf / "sd2-single")
    assert same(other.autoencoder.state_dict(), load_autoencoder(shelf / "sd2-single").state_dict())


def test_parts_that_do_not_fit_are_refused(shelf: Path, tmp_path: Path) -> None:
    wide = official.CLIPConfig(width=128, layers=1, heads=2, feed_forward=8)
    content = official.Content(wide, official.Random(wide))
    official.single_file({"text encoder": content}, "sd1", tmp_path / "wide")
    with pytest.raises(ValueError, match="attends to texts of width 64.*makes 128"):
        load_parts(shelf / "sd1-single", text_encoder=tmp_path / "wide")
    vae = official.replace(official.VAE["tiny"], latent_channels=16)
    content = official.Content(vae, official.Random(vae))
    official.single_file({"autoencoder": content}, "sd1", tmp_path / "deep")
    with pytest.raises(ValueError, match="latents of 4 channels, the autoencoder makes 16"):
        load_parts(shelf / "sd1-single", vae=tmp_path / "deep")


STRANGE = {
    "lora": ({"lora_unet_mid_block.lora_down.weight": 4}, "a LoRA \\(kohya\\): give it as --lora"),
    "peft": ({"base_model.model.x.lora_A.weight": 4}, "this is a LoRA \\(peft\\)"),
    "controlnet": ({"control_model.input_hint_block.0.weight": 4}, "a ControlNet"),
    "embedding": ({"emb_params": 4}, "a textual inversion embedding"),
    "optimizer": ({"optimizer.state.0.exp_avg": 4}, "the state of an optimizer"),
    "unknown": ({f"my.{n}": 1 for n in range(9)}, "9 tensors, my.0, my.1, my.2, .* more"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_model_says_what_it_is(name: str, tmp_path: Path) -> None:
    sizes, words = STRANGE[name]
    write_safetensors({n: torch.zeros(s) for n, s in sizes.items()}, tmp_path / "a.safetensors")
    for load in (load_denoiser, load_autoencoder, load_text_encoder, load_parts):
        with pytest.raises(ValueError, match=words) as caught:
            load(tmp_path / "a.safetensors")
        assert "\n" not in str(caught.value)


def test_the_wrong_part_is_named(shelf: Path) -> None:
    folder = shelf / "sd1-parts"
    with pytest.raises(ValueError, match="holds an autoencoder, not a denoiser"):
        load_denoiser(folder / "vae.safetensors")
    with pytest.raises(ValueError, match="holds a text encoder, not an autoencoder"):
        load_autoencoder(folder / "clip.safetensors")
    with pytest.raises(ValueError, match="holds a denoiser, not a text encoder"):
        load_text_encoder(folder / "unet.safetensors")


@pytest.fixture(scope="session")
def weights(shelf: Path) -> dict[str, Tensor]:
    return read_safetensors(shelf / "sd1-single")


PLACE = "model.diffusion_model."
TIME = f"{PLACE}time_embed.0.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({TIME: None}, f"1 missing keys: {TIME}$"),
        ({f"{PLACE}more": torch.ones(1)}, f"1 unknown keys: {PLACE}more$"),
        ({"strange": torch.ones(1)}, "1 unknown keys: strange$"),
        ({TIME: torch.ones(3, 2)}, "1 wrong shapes: .* is \\[3, 2\\], expected \\[128, 32\\]"),
        ({f"{PLACE}input_blocks.1.0.in_layers.2.weight": None}, "level 0: its blocks"),
        ({f"{PLACE}input_blocks.0.0.weight": torch.ones(7)}, "input_blocks.0.0.weight"),
    ],
)  # fmt: skip
def test_strangers_are_named(change, words: str, weights, tmp_path: Path) -> None:
    changed = {name: t for name, t in (weights | change).items() if t is not None}
    write_safetensors(changed, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=words) as caught:
        load_denoiser(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value) and str(tmp_path / "a.safetensors") in str(caught.value)


def test_what_training_left_behind_is_no_stranger(weights, tmp_path: Path) -> None:
    more = {"betas": torch.ones(3), "model_ema.decay": torch.ones(1), "logvar": torch.ones(1)}
    write_safetensors(weights | more, tmp_path / "a.safetensors")
    assert same(
        load_denoiser(tmp_path / "a.safetensors").network.state_dict(),
        official.model("sd1")["denoiser"].tensors,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [({"head": 4}, "did you mean heads"), ({"heads": 5}, "32 channels cannot be split"),
     ({"heads": "many"}, "heads: expected a whole number"), ({"groups": 7}, "no multiple of gr"),
     ({"prediction": "vv"}, "prediction: unknown 'vv'"), ({"channels": 64}, "wrong shapes")],
)  # fmt: skip
def test_options_that_cannot_be(options, words: str, shelf: Path) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load_denoiser(shelf / "sd1-single", **options)
    assert "\n" not in str(caught.value)


def test_odd_input_channels_are_refused(tmp_path: Path) -> None:
    config = official.replace(official.TINY["sd1"], in_channels=8)
    content = official.Content(config, official.Random(config))
    official.single_file({"denoiser": content}, "sd1", tmp_path / "a")
    with pytest.raises(ValueError, match="8 input channels for 4"):
        load_denoiser(tmp_path / "a")


def test_several_models_in_a_folder(shelf: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copy(shelf / "sd1-parts" / "vae.safetensors", tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="several autoencoders: name one of .*a.safetensors, .*b"):
        load_autoencoder(tmp_path)


def test_runs_of_our_own_stay_as_they_are(tmp_path: Path) -> None:
    row = Row(MLPConfig(width=8, depth=1), VariancePreserving(), "eps", (2,))
    network = create(row.model)
    save_denoiser(network.state_dict(), row, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = load_denoiser(path)
        assert found.row == row and same(found.network.state_dict(), network.state_dict())
        assert all(p.requires_grad for p in found.network.parameters())
    assert load_denoiser(tmp_path, dtype=torch.bfloat16).network.state_dict().popitem()[
        1
    ].dtype == (torch.bfloat16)
    assert load_parts(tmp_path)[1:] == (None, None)
    for wrong in ({"prediction": "v"}, {"ema": True}, {"heads": 3}):
        with pytest.raises(ValueError, match="a run of our own"):
            load_denoiser(tmp_path, **wrong)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="not a finished run"):
        load_denoiser(tmp_path / "empty")


SMALL = {"name": "unet", "channels": 32}
HOSTILE: dict[str, tuple[object, str]] = {
    "wide": ({"name": "unet", "channels": 2**40}, "model.channels: must be at most 65536"),
    "long": ({"name": "unet", "blocks": 2**30}, "model.blocks: must be at most 64"),
    "many": ({**SMALL, "multipliers": [1] * 99, "attention": [0] * 99}, "1 to 16 levels; got 99"),
    "deep": ({"name": "dit", "depth": 2**30}, "model.depth: must be at most 1024"),
    "classes": ({"name": "mlp", "classes": 2**62}, "model.classes: must be at most"),
    "patch": ({**SMALL, "patch": 2**40}, "model.patch: must be at most 256"),
    "list": ([], "model: expected a block"),
}


@pytest.mark.parametrize(("model", "message"), HOSTILE.values(), ids=list(HOSTILE))
def test_a_row_that_would_fill_the_machine(model: object, message: str, tmp_path: Path) -> None:
    row = {"model": model, "path": {"name": "rectified_flow"}, "target": "flow", "shape": [1, 8, 8]}
    file = tmp_path / "model.safetensors"
    write_safetensors({"a": torch.zeros(1)}, file, {"row": json.dumps(row)})
    with pytest.raises(ValueError) as caught:
        load_denoiser(file)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [[], [3], [2, 8, 8], [1, 8, 0]])
def test_a_row_whose_shape_is_not_its_model_s(shape: list[int], tmp_path: Path) -> None:
    model = {"name": "unet", "channels": 8, "groups": 4}
    row = {"model": model, "path": {"name": "rectified_flow"}, "target": "flow", "shape": shape}
    file = tmp_path / "model.safetensors"
    write_safetensors({"a": torch.zeros(1)}, file, {"row": json.dumps(row)})
    with pytest.raises(ValueError, match="its metadata's shape: this unet takes"):
        load_denoiser(file)


def test_a_row_that_is_nested_too_deeply(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_safetensors({"a": torch.zeros(1)}, file, {"row": "[" * 100_000})
    with pytest.raises(ValueError, match="its metadata's row is no JSON"):
        load_denoiser(file)
    assert main(["inspect", str(file)]) == 0


def test_a_finetuned_run_keeps_its_family(shelf: Path, tmp_path: Path) -> None:
    network, row = load_denoiser(shelf / "sd1-single")
    save_denoiser(network.state_dict(), row, tmp_path / "model.safetensors")
    assert load_denoiser(tmp_path).row == row
    with pytest.raises(ValueError, match="--vae FILE"):
        load_parts(tmp_path)
    folder = shelf / "sd1-parts"
    parts = load_parts(
        tmp_path, vae=folder / "vae.safetensors", text_encoder=folder / "clip.safetensors"
    )
    assert same(states(parts)[1], load_autoencoder(shelf / "sd1-single").state_dict())


@pytest.mark.parametrize(("family", "layout"), [("sd1", "sd15"), ("sd2", "sd21_unet_vae")])
def test_full_size_models_have_every_key_of_the_layouts(family: str, layout: str) -> None:
    path = Path(__file__).parent / "data" / "layouts" / f"{layout}.json"
    shapes: dict[str, list[int]] = {}
    for kind, content in official.model(family, "full").items():
        if kind != "text encoder" or family == "sd1":
            found = theirs(content, *single_names(kind, family)).shapes
            shapes |= {key: list(shape) for key, shape in found.items()}
    assert shapes == json.loads(path.read_text())
