"""Weights of a byte each: how far they come back, and what is left as it was."""

from pathlib import Path

import pytest
import torch
from rounding import assert_near
from torch import Tensor

from minidiffusion.checkpoints.reader import read_safetensors, write_safetensors
from minidiffusion.checkpoints.scaled import LEAST, _multiplied, scaled, unscaled
from minidiffusion.checkpoints.weights import open_weights

FLOAT8 = torch.float8_e4m3fn


def weights() -> dict[str, Tensor]:
    """Rows of very different sizes, one of zeros; tensors too small, or of no matrix."""
    torch.manual_seed(0)
    large = torch.randn(64, 128) * torch.logspace(-6, 4, 64)[:, None]
    large[5] = 0
    return {
        "a.weight": large,
        "b.weight": torch.randn(32, 32, 3, 3),
        "small.weight": torch.randn(8, 8),
        "norm.weight": torch.randn(LEAST),
        "a.bias": torch.randn(64),
        "table": torch.randn(128, 128),
    }


def back(packed: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    write_safetensors(packed, path)
    found = unscaled(open_weights(path))
    assert not any("scale" in name for name in found)
    return {name: found[name] for name in found}


def test_a_byte_each_within_half_a_step_of_the_row(tmp_path: Path) -> None:
    given = weights()
    packed = scaled(given)
    assert {n for n, t in packed.items() if t.dtype == torch.int8} == {"a.weight", "b.weight"}
    assert packed["a.scale_weight"].shape == (64,) and packed["b.scale_weight"].shape == (32,)
    found = back(packed, tmp_path / "x.safetensors")
    assert found.keys() == given.keys()
    for name in ("a.weight", "b.weight"):
        rows, wanted = found[name].flatten(1), given[name].flatten(1)
        assert found[name].shape == given[name].shape and found[name].dtype == torch.float32
        largest = wanted.abs().amax(dim=1)
        error = (rows - wanted).abs().amax(dim=1)
        assert (
            error <= largest / 254 * (1 + 256 * torch.finfo(torch.float32).eps)
        ).all()  # half of a step, rounded
        assert (error > largest / 1000)[largest > 0].all()  # a byte is a byte
        hit = rows.gather(1, wanted.abs().argmax(dim=1, keepdim=True)).squeeze(1)
        assert_near(hit.abs(), largest, 4)
    assert not found["a.weight"][5].any()


def test_the_rest_is_bf16(tmp_path: Path) -> None:
    given = weights()
    found = back(scaled(given), tmp_path / "x.safetensors")
    for name in ("small.weight", "norm.weight", "a.bias", "table"):
        assert torch.equal(found[name], given[name].bfloat16()), name


def test_it_saves_room(tmp_path: Path) -> None:
    write_safetensors(scaled({"a.weight": torch.randn(256, 256)}), tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_size < 256 * 256 + 256 * 4 + 500


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_for_all_as_official_files_have_it(shape: tuple[int, ...], tmp_path) -> None:
    weight = torch.randn(6, 4).to(FLOAT8)
    packed = {
        "scaled_fp8": torch.empty(0, dtype=FLOAT8), "a.weight": weight,
        "a.scale_weight": torch.full(shape, 0.3), "a.scale_input": torch.ones(()),
        "a.bias": torch.ones(6),
    }  # fmt: skip
    found = back(packed, tmp_path / "x.safetensors")
    assert found.keys() == {"a.weight", "a.bias"}
    assert torch.equal(found["a.weight"], weight.float() * torch.tensor(0.3))


def test_a_scale_a_row_of_any_rank(tmp_path: Path) -> None:
    weight, scale = torch.randint(-127, 128, (5, 4, 3, 3), dtype=torch.int8), torch.arange(1.0, 6)
    found = back({"a.weight": weight, "a.scale_weight": scale}, tmp_path / "x.safetensors")
    for row in range(5):
        assert torch.equal(found["a.weight"][row], weight[row].float() * scale[row])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_none(bad: float, tmp_path: Path) -> None:
    packed = {"a.weight": torch.ones(3, 2), "a.scale_weight": torch.tensor([1.0, bad, 1.0])}
    write_safetensors(packed, tmp_path / "x.safetensors")
    tensors = open_weights(tmp_path / "x.safetensors").tensors
    with pytest.raises(ValueError, match="^x: a scale must be positive and finite"):
        _multiplied(tensors["a.weight"], tensors["a.scale_weight"], "x")


@pytest.mark.parametrize(
    "packed",
    [
        {"a.scale_weight": torch.ones(3)},
        {"a.weight": torch.ones(3, 2), "a.scale_weight": torch.ones(2)},
        {"a.weight": torch.ones(3, 2), "a.scale_weight": torch.ones(3, 1)},
    ],
    ids=["no weight", "as many as columns", "a matrix"],
)
def test_scales_beside_nothing(packed: dict[str, Tensor], tmp_path: Path) -> None:
    write_safetensors(packed, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="a.scale_weight: expected a number, or one a row, beside"):
        unscaled(open_weights(tmp_path / "x.safetensors"))


def test_a_file_without_scales_is_left_alone(tmp_path: Path) -> None:
    write_safetensors({"a.weight": torch.ones(3, 2)}, tmp_path / "x.safetensors")
    given = open_weights(tmp_path / "x.safetensors")
    assert unscaled(given) is given
    assert read_safetensors(tmp_path / "x.safetensors").keys() == {"a.weight"}
