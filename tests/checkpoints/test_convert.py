"""From one layout into another and back: the same tensors, and folders that diffusers opens."""

import json
import os
import shutil
from pathlib import Path

import official
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from rounding import assert_near, assert_parity
from torch import Tensor
from transformers import CLIPTextModel

from minidiffusion.checkpoints import convert
from minidiffusion.checkpoints.parts import load_parts
from minidiffusion.checkpoints.reader import read_safetensors, write_safetensors
from minidiffusion.cli.main import main
from minidiffusion.text.bpe import BPE

FAMILIES = ("sd1", "sd2")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Single files, and the folders that the command makes of them."""
    root = tmp_path_factory.mktemp("convert")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        for family in FAMILIES:
            official.make(root / family, family)
            folder = str(root / f"{family}-folder")
            assert main(["convert", str(root / family), "--to", "diffusers", "--out", folder]) == 0
        official.make(root / "sd2.ckpt", "sd2", dialect="ckpt")
    return root


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same_file(family: str, shelf: Path, tmp_path: Path) -> None:
    back = tmp_path / "back.safetensors"
    given = ["convert", str(shelf / f"{family}-folder"), "--to", "single-file", "--out", str(back)]
    assert main(given) == 0
    assert same(read_safetensors(shelf / family), read_safetensors(back))
    assert back.read_bytes() == (shelf / family).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["back.safetensors"]


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_opens_the_folder(family: str, shelf: Path) -> None:
    folder = shelf / f"{family}-folder"
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, local_files_only=True
    )
    parts = load_parts(shelf / family)
    ids = BPE().tokenize(["a photo of an astronaut"], pad=parts.text_pad)
    assert pipe.tokenizer(["A photo of an  astronaut"], padding="max_length").input_ids == (
        ids.tolist()
    )
    assert pipe.tokenizer.model_max_length == 77
    assert_parity(
        lambda ours, _: ours(ids).tokens, lambda _, theirs: theirs(ids).last_hidden_state,
        parts.text, pipe.text_encoder,
    )  # fmt: skip
    assert_parity(
        lambda ours, _, z: ours.decode(z),
        lambda _, vae, z: vae.decode(z / vae.config.scaling_factor).sample,
        parts.autoencoder, pipe.vae, torch.randn(1, 4, 8, 8),
    )  # fmt: skip
    target = {"epsilon": "eps", "v_prediction": "v"}[pipe.scheduler.config.prediction_type]
    assert target == parts.denoiser.row.target
    assert_near(pipe.scheduler.betas, parts.denoiser.row.path.betas(), 4)
    assert pipe.unet.config.sample_size == parts.denoiser.row.shape[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_part_of_the_folder_is_left_random(family: str, shelf: Path) -> None:
    folder = shelf / f"{family}-folder"
    for kind, name in (
        (UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder"),
    ):  # fmt: skip
        _, report = kind.from_pretrained(folder / name, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (folder / "model_index.json").exists()
    again = load_parts(folder).denoiser.row
    assert again.target == load_parts(shelf / family).denoiser.row.target


def test_a_ckpt_keeps_what_others_want(shelf: Path, tmp_path: Path) -> None:
    """OpenCLIP's last layer and projection, which we do not use but other programs look for."""
    out = tmp_path / "plain.safetensors"
    assert main(["convert", str(shelf / "sd2.ckpt"), "--to", "single-file", "--out", str(out)]) == 0
    found = read_safetensors(out)
    state = torch.load(shelf / "sd2.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    text = {name for name in state if name.startswith("cond_stage_model.")}
    assert text - found.keys() == {"cond_stage_model.model.logit_scale"}
    assert not [name for name in found if name.startswith(("model_ema", "betas"))]
    assert load_parts(out).text.config.layers == 2
    args = ["convert", str(shelf / "sd2.ckpt"), "--to", "single-file", "--ema", "--out"]
    assert main([*args, str(tmp_path / "ema.safetensors")]) == 0
    average = read_safetensors(tmp_path / "ema.safetensors")
    name = "model.diffusion_model.out.2.weight"
    assert torch.equal(average[name], 0.5 * found[name])


@pytest.mark.parametrize(("word", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_dtypes(word: str, dtype: torch.dtype, shelf: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    args = ["convert", str(shelf / "sd1-folder"), "--to", "single-file", "--dtype", word, "--out"]
    assert main([*args, str(out)]) == 0
    whole = read_safetensors(shelf / "sd1")
    assert same({k: t.to(dtype) for k, t in whole.items()}, read_safetensors(out))


def test_one_tensor_at_a_time(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than one of the tensors that were made for writing lives at any moment."""
    import weakref

    alive: list[weakref.ref[Tensor]] = []
    joined = convert.joined

    def watched(*args: object) -> Tensor:
        assert sum(one() is not None for one in alive) <= 1
        whole = joined(*args)
        alive.append(weakref.ref(whole))
        return whole

    monkeypatch.setattr(convert, "joined", watched)
    args = ["convert", str(shelf / "sd1"), "--to", "single-file", "--out", str(tmp_path / "a")]
    assert main(args) == 0
    assert len(alive) == len(read_safetensors(tmp_path / "a"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    def run(*words: object) -> str:
        with pytest.raises(SystemExit) as end:
            main(["convert", *map(str, words)])
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count("\n") == 1
        return err

    return run


def test_nothing_is_replaced_unasked(shelf: Path, tmp_path: Path, refused) -> None:
    for to, name in (("single-file", "file"), ("diffusers", "folder")):
        out = tmp_path / name
        args = ["convert", str(shelf / "sd1"), "--to", to, "--out", str(out)]
        assert main(args) == 0
        before = {path: (out / path).stat().st_mtime_ns for path in [*files(out), "."]}
        assert "exists already; --force" in refused(*args[1:])
        assert before == {path: (out / path).stat().st_mtime_ns for path in [*files(out), "."]}
        assert main([*args, "--force"]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for to in ("single-file", "diffusers"):
        line = refused(shelf / "sd1", "--to", to, "--out", tmp_path / "mine", "--force")
        assert "--force replaces" in line
    line = refused(shelf / "sd1", "--to", "diffusers", "--out", tmp_path / "file", "--force")
    assert "--force replaces model folders" in line
    assert files(tmp_path / "mine") == ["thesis.txt"]
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    args = (shelf / "sd1", "--to", "diffusers", "--out", tmp_path / "folder", "--force")
    assert "it holds notes.txt" in refused(*args)
    assert (tmp_path / "folder" / "notes.txt").exists()


def test_the_source_is_never_overwritten(shelf: Path, refused) -> None:
    line = refused(shelf / "sd1", "--to", "single-file", "--out", shelf / "sd1", "--force")
    assert "must name another place" in line
    folder = shelf / "sd1-folder"
    assert "must name another place" in refused(
        folder, "--to", "diffusers", "--out", folder, "--force"
    )


def test_a_failure_leaves_nothing(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused
) -> None:
    count = iter(range(1000))

    def full(*args: object) -> Tensor:
        if next(count) > 50:
            raise OSError(28, "No space left on device", "somewhere")
        return joined(*args)

    joined = convert.joined
    monkeypatch.setattr(convert, "joined", full)
    for to in ("single-file", "diffusers"):
        assert "No space left" in refused(shelf / "sd1", "--to", to, "--out", tmp_path / "out")
        assert os.listdir(tmp_path) == []  # noqa: PTH208


def test_mistakes(shelf: Path, tmp_path: Path, refused) -> None:
    write_safetensors({"a.lora_A.weight": torch.zeros(4, 2)}, tmp_path / "lora")
    out = tmp_path / "out"
    assert "LoRA (peft)" in refused(tmp_path / "lora", "--to", "diffusers", "--out", out)
    assert "no such file" in refused(tmp_path / "none", "--to", "diffusers", "--out", out)
    nowhere = tmp_path / "no" / "where"
    assert "no folder" in refused(shelf / "sd1", "--to", "diffusers", "--out", nowhere)
    damaged = {k: v for k, v in read_safetensors(shelf / "sd1").items() if "quant_conv.b" not in k}
    write_safetensors(damaged, tmp_path / "damaged")
    assert "2 missing keys" in refused(tmp_path / "damaged", "--to", "diffusers", "--out", out)
    assert not out.exists()


def test_a_config_of_another_network_is_one_line(shelf: Path, tmp_path: Path, refused) -> None:
    folder = tmp_path / "model"
    shutil.copytree(shelf / "sd1-folder", folder)
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "downsample_padding": 0}))
    line = refused(folder, "--to", "single-file", "--out", tmp_path / "out")
    assert f"{file}: downsample_padding: 0 is not supported with these weights, only 1" in line


def test_parts_alone(tmp_path: Path) -> None:
    """An autoencoder by itself becomes its folder, and no page of a whole model."""
    official.make(tmp_path / "parts", dialect="parts")
    vae = tmp_path / "parts" / "vae.safetensors"
    assert main(["convert", str(vae), "--to", "diffusers", "--out", str(tmp_path / "out")]) == 0
    assert files(tmp_path / "out") == [
        "vae", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    AutoencoderKL.from_pretrained(tmp_path / "out" / "vae")


def inspected(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main(["inspect", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_inspect_says_what_it_is(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = inspected(capsys, shelf / "sd1", "--hash")
    for words in (
        "424 tensors, fp32", "803,204 parameters", "Stable Diffusion 1; predicts eps", "8 heads",
        "4 latent channels, scale 0.18215", "quick_gelu", "at cond_stage_model.transformer.",
        "hash", "format: pt",
    ):  # fmt: skip
        assert words in text
    text = inspected(capsys, shelf / "sd2.ckpt")
    for words in ("Stable Diffusion 2; predicts v", "heads 64 wide", "OpenCLIP's names",
                  "--ema takes them", "global_step: 470000"):  # fmt: skip
        assert words in text
    text = inspected(capsys, shelf / "sd2-folder")
    assert text.count("diffusers' names") == 2 and "transformers' names" in text
    assert "conv_in.weight" in inspected(capsys, shelf / "sd2-folder" / "unet", "--keys")


def test_inspect_other_things(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = {f"lora_unet_{n}.lora_down.weight": torch.zeros(4 * n, 8) for n in (1, 2)}
    write_safetensors(lora, tmp_path / "lora", {"ss_\x1b[2Jnote": "x" * 9000})
    text = inspected(capsys, tmp_path / "lora")
    assert "this is a LoRA (kohya)" in text and "4, 8" in text and "modules       2" in text
    assert "\x1b" not in text and len(text) < 1000
    write_safetensors({"emb_params": torch.zeros(3, 768)}, tmp_path / "word")
    assert "textual inversion" in inspected(capsys, tmp_path / "word")
    damaged = {k: v for k, v in read_safetensors(shelf / "sd1").items() if "time_embed" not in k}
    write_safetensors(damaged, tmp_path / "damaged")
    text = inspected(capsys, tmp_path / "damaged")
    assert "cannot be loaded" in text and "4 missing keys" in text and "autoencoder" in text
    index = json.loads((shelf / "sd1-folder" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


def test_inspect_a_run_of_our_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from minidiffusion.checkpoints.catalog import Row, save_denoiser
    from minidiffusion.diffusion import RectifiedFlow
    from minidiffusion.models import MLPConfig, create

    row = Row(MLPConfig(width=8, depth=1), RectifiedFlow(), "flow", (2,), data="two_moons")
    save_denoiser(create(row.model).state_dict(), row, tmp_path / "model.safetensors")
    text = inspected(capsys, tmp_path)
    assert "minidiffusion's mlp" in text and "predicts flow on rectified_flow" in text
    assert "width 8" in text and "two_moons" in text


SAID = {
    ("unet/config.json", "attention_head_dim", 4): "that the denoiser has heads 4: it will be",
    ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"): "--prediction v",
    ("scheduler/scheduler_config.json", "beta_end", 0.02): "the denoiser's own noise schedule",
    ("vae/config.json", "scaling_factor", 0.5): "that the autoencoder has scale 0.5",
}


@pytest.mark.parametrize(("change", "words"), SAID.items(), ids=[key for _, key, _ in SAID])
def test_what_a_single_file_cannot_say(
    change: tuple[str, str, object], words: str, shelf: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """No name in it holds heads, targets and scales: whoever loads the file must be told."""
    folder, (name, key, value) = tmp_path / "model", change
    shutil.copytree(shelf / "sd1-folder", folder)
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**config, key: value}))
    given = ["convert", str(folder), "--to", "single-file", "--out", str(tmp_path / "a")]
    assert main(given) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "a single file cannot say" in line and words in line


def test_the_usual_goes_without_saying(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for family in FAMILIES:
        place = str(tmp_path / family)
        call = ["convert", str(shelf / f"{family}-folder"), "--to", "single-file", "--out", place]
        assert main(call) == 0
    assert not capsys.readouterr().err
