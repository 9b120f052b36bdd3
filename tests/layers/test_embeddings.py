"""Times, classes and places as vectors; the modulation of a block; convolution blocks."""

import math

import pytest
import torch
from rounding import all_in_float64, assert_near
from torch.nn import functional as F

from minidiffusion.layers.convolution import Downsample, ResBlock, Upsample
from minidiffusion.layers.embeddings import (
    LabelEmbedding,
    TimeEmbedding,
    sinusoidal,
    sinusoidal_grid,
)
from minidiffusion.layers.modulation import AdaLN


def test_sinusoids_are_cosines_then_sines() -> None:
    times = [0.0, 1.0, 999.5]
    with all_in_float64():
        exact = sinusoidal(torch.tensor(times), 8)
    for time, *found in zip(times, exact, sinusoidal(torch.tensor(times), 8), strict=True):
        angles = [time * 10_000 ** (-k / 4) for k in range(4)]
        wanted = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        for row in found:  # an angle is rounded, too, and its frequency: 4 times at its own size
            assert_near(row, wanted, 4, scale=max(1.0, time))


def test_times_of_any_dtype_are_embedded_in_fp32() -> None:
    """bf16 would round 999 to 1000."""
    layer = TimeEmbedding(16, 8).bfloat16()
    assert layer(torch.tensor([999.0])).dtype == torch.bfloat16
    assert not torch.equal(layer(torch.tensor([999.0])), layer(torch.tensor([1000.0])))


def test_places_are_rows_then_columns() -> None:
    grid = sinusoidal_grid(3, 5, 16).view(3, 5, 16)
    assert torch.equal(grid[:, 0, :8], sinusoidal(torch.arange(3).float(), 8))
    assert torch.equal(grid[0, :, 8:], sinusoidal(torch.arange(5).float(), 8))
    assert len(grid.view(15, 16).unique(dim=0)) == 15


def test_labels_and_no_class() -> None:
    layer = LabelEmbedding(3, 4)
    assert torch.equal(layer(None, 2), layer(torch.tensor([3, 3]), 2))
    assert torch.equal(layer(torch.tensor([1]), 1)[0], layer.table.weight[1])


def test_modulations_start_at_nothing_and_then_shift_scale_and_gate() -> None:
    layer, cond, x = AdaLN(4, branches=2), torch.randn(2, 4), torch.randn(2, 3, 4)
    for fresh in layer(cond):
        assert not any(part.any() for part in fresh)
        assert torch.equal(fresh.enter(x), F.layer_norm(x, (4,), eps=1e-6))
        assert not fresh.leave(x).any()
    torch.nn.init.normal_(layer.linear.weight)
    second = layer(cond)[1]
    numbers = (F.silu(cond) @ layer.linear.weight.T).view(2, 6, 4)[:, 3:]
    for found, wanted in zip(second, numbers.unbind(1), strict=True):
        assert_near(found, wanted, 8)
    assert_near(second.leave(x)[1, 2], x[1, 2] * second.gate[1], 1)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_fresh_residual_block_is_its_skip(scale_shift: bool) -> None:
    x, embedding = torch.randn(2, 4, 6, 6), torch.randn(2, 8)
    block = ResBlock(4, 4, 8, groups=2, scale_shift=scale_shift, dropout=0.0)
    assert torch.equal(block(x, embedding), x)
    wider = ResBlock(4, 6, 8, groups=2, scale_shift=scale_shift, dropout=0.0)
    assert torch.equal(wider(x, embedding), wider.skip(x))


def test_sizes() -> None:
    x = torch.randn(1, 4, 6, 8)
    assert Downsample(4)(x).shape == (1, 4, 3, 4)
    assert Upsample(4)(x).shape == (1, 4, 12, 16)
