"""`minidiffusion plan`: a table, one line of JSON, and one line for a mistake."""

import json
from collections.abc import Callable
from pathlib import Path

import official
import pytest

from minidiffusion.cli.main import main

Words = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("planned")
    return official.make(place / "sd3.5_medium.safetensors", "sd3.5-medium", alone=True)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("beside") / "encoders"
    return official.make(place, "sd3.5-medium", dialect="parts")


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main(["plan", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_the_table(model: Path, encoders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(
        capsys, "--model", model, "--text-encoders", encoders, "--width", 256, "--height", 128,
        "--device", "cuda", "--memory", "2GiB", "--dtype", "fp32",
    )  # fmt: skip
    assert text.startswith("Stable Diffusion 3.5 medium: 256 x 128, batch of 1, guidance 5, fp32")
    for part in ("T5", "CLIP-bigG", "CLIP-L", "denoiser", "autoencoder", "fits in 2.15 GB"):
        assert part in text
    line = next(line for line in text.splitlines() if "recommended" in line)
    assert line.split("recommended")[1].strip() == (
        f'minidiffusion generate "..." --model {model} --text-encoders {encoders} '
        "--width 256 --height 128 --precision fp32 --device cuda"
    )


def test_the_recommended_line_is_one_that_generate_takes(
    model: Path, encoders: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = json.loads(said(
        capsys, "--model", model, "--text-encoders", encoders, "--no-t5", "--width", 128,
        "--height", 128, "--dtype", "fp32", "--device", "cpu", "--json",
    ))  # fmt: skip
    words = found["command"].replace('"..."', "panda").split()
    assert words[:2] == ["minidiffusion", "generate"] and words[-1] == "--no-t5"
    assert main([*words[1:], "--steps", "1", "--out", str(tmp_path)]) == 0


def test_a_slow_type_is_said(model: Path, slow: None, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--model", model, "--width", 128, "--height", 128, "--dtype"
    note = "bf16: slow on this cpu; weights stay so, each layer computes in fp32"
    assert note in said(capsys, *words, "bf16", "--device", "cpu")
    assert "slow" not in said(capsys, *words, "fp32", "--device", "cpu")
    assert "slow" not in said(capsys, *words, "bf16", "--device", "cuda", "--memory", "8GB")
    assert ", fp32, on cpu" in said(capsys, *words, "auto", "--device", "cpu")
    found = json.loads(said(capsys, *words, "bf16", "--device", "cpu", "--json"))
    assert (found["dtype"], found["computed"]) == ("bfloat16", "float32")


def test_json(model: Path, encoders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--model", model, "--width", 256, "--height", 256, "--json", "--device", "cuda"
    text = said(capsys, *words, "--text-encoders", encoders, "--memory", "480MB")
    found = json.loads(text)
    assert text.count("\n") == 1 and found["memory"] == 480_000_000
    assert all(part["peak"] == part["weights"] + part["activations"] for part in found["parts"])
    assert [way["fits"] for way in found["ways"]] == [w["peak"] <= 480e6 for w in found["ways"]]
    first = next(way for way in found["ways"] if way["fits"])
    assert found["ways"][0]["options"] == "" and not found["ways"][0]["fits"]
    assert found["command"].endswith(first["options"])
    none = json.loads(said(capsys, *words, "--memory", "1MB"))
    assert none["command"] is None and not any(way["fits"] for way in none["ways"])


def test_what_is_missing_is_said(
    model: Path, encoders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--width", 128, "--height", 128
    assert "no text encoders here" in said(capsys, "--model", model, *small)
    assert "none fits" in said(capsys, "--model", model, *small, "--memory", "1MB")
    text = said(capsys, "--model", encoders / "t5xxl_fp16.safetensors")
    assert "  T5 " in text and "no denoiser" in text and "recommended" not in text


def test_mistakes(model: Path, encoders: Path, refused: Words, tmp_path: Path) -> None:
    for words, answer in [
        (("--memory", "much"), "--memory: expected a size such as 8GB"),
        (("--memory", "8GB", "--device", "tpu"), "--device: 'tpu'"),
        (("--dtype", "fp16"), "--dtype: must be auto, fp32 or bf16"),
        (("--quantize", "int3"), "--quantize: must be int8"),
        (("--tile", "4"), "--tile: must be at least 8"),
        (("--guidance", "nan"), "--guidance: must be 0 or more"),
        (("--batch-size", "0"), "batch size: must be"),
        (("--width", "264", "--height", "256"), "width: must be a multiple of 16"),
        (("--width", "100000"), "width: must be a multiple of 8"),
        (("--text-encoders", tmp_path / "none"), "no such file"),
        (("--text-encoders", encoders / "clip_l.safetensors"), "1 CLIP text encoders"),
        (("--step", "4"), "unknown argument"),
    ]:
        assert answer in refused("plan", "--model", model, *words)
    assert "no such file" in refused("plan", "--model", tmp_path / "none.safetensors")
    assert "--model" in refused("plan")
