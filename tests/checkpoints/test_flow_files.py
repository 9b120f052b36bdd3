"""Stable Diffusion 3's files in every dialect: the same modules, and the same files again."""

import json
import warnings
from pathlib import Path
from shutil import copytree

import diffusers
import official
import pytest
import torch
import transformers
from rounding import assert_near, assert_parity
from torch import Tensor

from minidiffusion.checkpoints import beside
from minidiffusion.checkpoints.parts import load_parts
from minidiffusion.checkpoints.reader import read_safetensors, write_safetensors
from minidiffusion.checkpoints.text_encoders import Encoders, load_text_encoders
from minidiffusion.cli.main import main
from minidiffusion.diffusion import RectifiedFlow
from minidiffusion.text.unigram import t5_tokenizer

FAMILIES = ("sd3", "sd3.5-medium", "sd3.5-large")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flows")
    for family in FAMILIES:
        official.make(root / family, family)
        official.make(root / f"{family}-folder", family, dialect="diffusers")
    official.make(root / "alone", "sd3", alone=True)
    official.make(root / "encoders", "sd3", dialect="parts")
    return root


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def modules(text: Encoders) -> list[torch.nn.Module]:
    return [module for module in text if module is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dialect_is_the_same_model(family: str, shelf: Path) -> None:
    one, two = load_parts(shelf / family), load_parts(shelf / f"{family}-folder")
    assert one.denoiser.row == two.denoiser.row
    row = one.denoiser.row
    assert (row.family, row.path, row.target) == (family, RectifiedFlow(3.0), "flow")
    assert (row.sampling.sampler, row.sampling.steps, row.sampling.guidance) == (
        ("dpmpp_2m", 40, 4.5) if family == "sd3.5-large" else ("dpmpp_2m", 50, 5.0)
    )
    assert same(one.denoiser.network.state_dict(), two.denoiser.network.state_dict())
    assert one.autoencoder is not None and two.autoencoder is not None
    assert one.autoencoder.config == two.autoencoder.config
    assert same(one.autoencoder.state_dict(), two.autoencoder.state_dict())
    assert isinstance(one.text, Encoders) and isinstance(two.text, Encoders)
    for mine, other in zip(modules(one.text), modules(two.text), strict=True):
        assert mine.config == other.config and same(mine.state_dict(), other.state_dict())


def test_encoders_alone_are_those_of_the_file(shelf: Path) -> None:
    one, two = load_text_encoders(shelf / "sd3"), load_text_encoders(shelf / "encoders")
    for mine, other in zip(modules(one), modules(two), strict=True):
        assert same(mine.state_dict(), other.state_dict())
    parts = load_parts(shelf / "alone", text_encoders=shelf / "encoders", t5=False)
    assert isinstance(parts.text, Encoders) and parts.text.t5 is None


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same_file(
    family: str, shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    for call in ([shelf / family, "--to", "diffusers", "--out", folder],
                 [folder, "--to", "single-file", "--out", back]):  # fmt: skip
        assert main(["convert", *map(str, call)]) == 0
    assert back.read_bytes() == (shelf / family).read_bytes()
    assert not capsys.readouterr().err


def test_diffusers_and_transformers_open_the_folder(shelf: Path, tmp_path: Path) -> None:
    folder = shelf / "sd3.5-medium-folder"
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True)
    parts = load_parts(folder)
    assert isinstance(parts.text, Encoders) and parts.text.t5 is not None
    ids = torch.tensor([[7, 8, 9, 1]])
    assert_parity(
        lambda ours, _: ours(ids), lambda _, theirs: theirs(ids).last_hidden_state,
        parts.text.t5, pipe.text_encoder_3,
    )  # fmt: skip
    assert isinstance(pipe.text_encoder_2, transformers.CLIPTextModelWithProjection)
    # What a single file lacks, diffusers would draw at random: CLIP-L's projection changes nothing.
    weight = pipe.text_encoder.text_projection.weight
    assert torch.equal(weight, torch.eye(len(weight)).to(weight))
    write_safetensors(
        {**read_safetensors(folder / "text_encoder" / "model.safetensors"),
         "text_projection.weight": 2 * torch.eye(len(weight))}, tmp_path / "clip_l.safetensors"
    )  # fmt: skip
    (tmp_path / "clip_g.safetensors").write_bytes(
        (shelf / "encoders" / "clip_g.safetensors").read_bytes()
    )
    assert parts.text.clip_l.projection is None
    assert load_text_encoders(tmp_path, t5=False).clip_l.projection is not None
    assert pipe.scheduler.config.shift == 3.0
    words = "a red panda, reading"
    assert pipe.tokenizer_2(words).input_ids == pipe.tokenizer(words).input_ids
    assert pipe.tokenizer_3(words).input_ids == [*t5_tokenizer().encode(words), 1]


@torch.no_grad()
def test_the_pooled_text_is_that_of_each_dialect_s_own_pipeline(
    shelf: Path, tmp_path: Path
) -> None:
    """CLIP-L's is projected in a folder with a projection, as the last layer's in a single file."""
    copytree(shelf / "sd3-folder", tmp_path / "folder")
    file = tmp_path / "folder" / "text_encoder" / "model.safetensors"
    tensors = read_safetensors(file)
    width = len(tensors["text_projection.weight"])
    tensors["text_projection.weight"] = torch.randn(width, width)
    write_safetensors(tensors, file)
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "folder")
    words = "a red panda"
    wanted = pipe.encode_prompt(words, words, words, do_classifier_free_guidance=False)[2]
    wanted = wanted[:, :width]
    ids = pipe.tokenizer(words, padding="max_length", return_tensors="pt").input_ids
    encoders = load_text_encoders(tmp_path / "folder")
    assert encoders.clip_l.projection is not None
    found = assert_parity(
        lambda ours, _: ours(ids).pooled, lambda _, theirs: theirs(ids).text_embeds,
        encoders.clip_l, pipe.text_encoder,
    )  # fmt: skip
    assert_near(found, wanted, 64)  # the pipeline's own
    single = assert_parity(
        lambda ours, _: ours(ids).pooled,
        lambda _, theirs: theirs.text_model(ids).pooler_output,
        load_text_encoders(shelf / "sd3").clip_l, pipe.text_encoder,
    )  # fmt: skip
    assert (single - found).abs().max() > 0.1


def test_the_encoders_take_what_no_shape_says(shelf: Path) -> None:
    given = {"clip_l": {"heads": 2}, "clip_g": {"heads": 4, "skip": 0}, "t5": {"distance": 64}}
    for place in ("sd3", "encoders"):
        found = load_text_encoders(shelf / place, **given)
        assert found.t5 is not None and found.t5.config.distance == 64
        assert (found.clip_l.config.heads, found.clip_l.config.skip) == (2, 1)
        assert (found.clip_g.config.heads, found.clip_g.config.skip) == (4, 0)
    with pytest.raises(ValueError, match="head: unknown key \\(did you mean heads"):
        load_text_encoders(shelf / "sd3", clip_g={"head": 1})


def test_a_schedulers_shift_is_read_and_its_other_wishes_are_named(tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"shift": 2.5, "use_dynamic_shifting": False}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert beside.shift(tmp_path / "transformer") == {"shift": 2.5}
    file.write_text(json.dumps({"shift": 2.5, "use_dynamic_shifting": True}))
    with pytest.warns(UserWarning, match=r"config.json: use_dynamic_shifting: not followed; shift"):
        assert beside.shift(tmp_path / "transformer") == {"shift": 2.5}


def test_t5_under_both_names_and_with_a_decoder(shelf: Path, tmp_path: Path) -> None:
    tensors = read_safetensors(shelf / "encoders" / "t5xxl_fp16.safetensors")
    table = tensors["encoder.embed_tokens.weight"]
    more = {"shared.weight": table, "decoder.final_layer_norm.weight": table[0]}
    for name in ("clip_l", "clip_g"):
        file = f"{name}.safetensors"
        (tmp_path / file).write_bytes((shelf / "encoders" / file).read_bytes())
    write_safetensors({**tensors, **more}, tmp_path / "t5.safetensors")
    wanted = load_text_encoders(shelf / "encoders").t5
    found = load_text_encoders(tmp_path).t5
    assert wanted is not None and found is not None
    assert same(found.state_dict(), wanted.state_dict())


def scaled(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """As ComfyUI writes them: matrices in 8 bits, the scale that brings their largest to 448."""
    found = {f"{prefix}scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "SelfAttention" in name and "bias" not in name:
            scale = tensor.abs().max() / 448
            found[prefix + name] = (tensor / scale).to(torch.float8_e4m3fn)
            found[prefix + name.replace(".weight", ".scale_weight")] = scale
            found[prefix + name.replace(".weight", ".scale_input")] = torch.ones(())
        else:
            found[prefix + name] = tensor
    return found


def test_encoders_in_eight_bits_with_a_scale(shelf: Path, tmp_path: Path) -> None:
    place = shelf / "encoders"
    for name in ("clip_l", "clip_g"):
        (tmp_path / name).write_bytes((place / f"{name}.safetensors").read_bytes())
    tensors = read_safetensors(place / "t5xxl_fp16.safetensors")
    packed = scaled(tensors)
    write_safetensors(packed, tmp_path / "t5xxl_fp8_e4m3fn_scaled.safetensors")
    wanted, found = load_text_encoders(place).t5, load_text_encoders(tmp_path).t5
    assert wanted is not None and found is not None
    qkv = "blocks.1.qkv.weight"
    exact = wanted.state_dict()[qkv]
    error = (found.state_dict()[qkv] - exact).abs().max() / exact.abs().max()
    assert 0 < error < 2**-4  # e4m3 has three bits behind its first
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    scale = packed[name.replace(".weight", ".scale_weight")]
    first = found.state_dict()[qkv][: len(packed[name])]
    assert torch.equal(first, packed[name].float() * scale)
    name = "encoder.block.0.layer.0.SelfAttention.q.scale_weight"
    write_safetensors(
        {**packed, name: torch.zeros(())}, tmp_path / "t5xxl_fp8_e4m3fn_scaled.safetensors"
    )
    with pytest.raises(ValueError, match="q.scale_weight: a scale must be positive and finite"):
        load_text_encoders(tmp_path)
    del packed["encoder.block.0.layer.0.SelfAttention.q.weight"]
    write_safetensors(packed, tmp_path / "t5xxl_fp8_e4m3fn_scaled.safetensors")
    with pytest.raises(ValueError, match="q.scale_weight: expected a number, or one a row, beside"):
        load_text_encoders(tmp_path)


def test_encoders_lie_beside_their_model(shelf: Path, tmp_path: Path) -> None:
    """As in Stability's repositories, and so as `minidiffusion download` leaves them."""
    file = official.make(tmp_path / "sd3.5_medium.safetensors", "sd3.5-medium", alone=True)
    with pytest.raises(ValueError, match="holds no CLIP text encoders"):
        load_parts(file)
    copytree(shelf / "encoders", tmp_path / "text_encoders")
    wanted = load_text_encoders(shelf / "encoders")
    for place in (file, tmp_path):
        for optional in (False, True):
            text = load_parts(place, optional=optional).text
            assert isinstance(text, Encoders)
            for one, other in zip(text, wanted, strict=True):
                assert one is not None and other is not None
                assert same(one.state_dict(), other.state_dict())
        assert load_text_encoders(place, t5=False).t5 is None


def test_one_t5_of_several_is_named(shelf: Path, tmp_path: Path) -> None:
    """Folders that are passed around hold it twice, in 16 bits and in 8."""
    for file in (shelf / "encoders").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    twin = tmp_path / "t5xxl_fp8.safetensors"
    twin.write_bytes((tmp_path / "t5xxl_fp16.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds several T5s: name one of .*, .*fp8.safetensors"):
        load_text_encoders(tmp_path)
    files = ",".join(str(tmp_path / f"{n}.safetensors") for n in ("clip_g", "t5xxl_fp8", "clip_l"))
    named, whole = load_text_encoders(files), load_text_encoders(shelf / "encoders")
    for one, other in zip(named, whole, strict=True):
        assert one is not None and other is not None
        assert same(one.state_dict(), other.state_dict())
