"""The limits themselves: what is within them, what is not, and what float64 reaches."""

import numpy as np
import pytest
import torch
from rounding import EPS, all_in_float64, assert_near, assert_parity
from torch import Tensor, nn

from minidiffusion.diffusion.noise import keyed


def test_all_that_names_float32_is_float64_and_draws_the_same_noise() -> None:
    noise, usual = keyed([3], (4,)), np.float32
    short = noise(0)
    with all_in_float64():
        assert torch.empty(1).dtype == torch.empty(1, dtype=torch.float32).dtype == torch.float64
        assert short.float().dtype == torch.float64 and np.float32 is np.float64
        assert torch.equal(noise(0), short.double())
    assert torch.empty(1).dtype == short.float().dtype == torch.float32 and np.float32 is usual


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_so_many_roundings_and_no_more(scale: float) -> None:
    assert_near(scale * (1 + 4 * EPS), scale, 4)
    assert_near([scale * (1 + 4 * EPS), 0], [scale, 0], 4)
    assert_near([], [], 4)
    with pytest.raises(AssertionError, match="allowed"):
        assert_near(scale * (1 + 5 * EPS), scale, 4)
    with pytest.raises(AssertionError, match="allowed"):
        assert_near(float("nan"), scale, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda it, x: it(x) * (1 + 1e-9), "apart in float64"),
        (lambda it, x: it(x.bfloat16().to(x.dtype)), "what ours rounds away"),
        (lambda it, x: it(x)[:, :1].expand(-1, 4), "what ours rounds away"),
    ],
    ids=["too small for float32", "fewer bits", "another number"],
)
def test_parity_sees_what_is_wrong(wrong, message) -> None:
    layer, x = nn.Linear(64, 4).requires_grad_(False), torch.randn(8, 64)

    def right(it: nn.Module, x: Tensor) -> Tensor:
        return it(x)

    assert assert_parity(right, lambda it, x: x @ it.weight.T + it.bias, layer, x).shape == (8, 4)
    with pytest.raises(AssertionError, match=message):
        assert_parity(wrong, right, layer, x)
