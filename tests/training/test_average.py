"""The moving average against its closed form, and its warm-up."""

import pytest
import torch

from minidiffusion.training.average import decay_at, update


def test_closed_form() -> None:
    """The average of 1, 2, ..., n from 0: n - d (1 - d^n) / (1 - d)."""
    average = [torch.zeros((), dtype=torch.float64)]
    for value in range(1, 1001):
        update(average, [torch.tensor(float(value), dtype=torch.float64)], 0.99)
    assert abs(float(average[0]) - 901.0042739534938) < 1e-9
    closed = 1000 - 0.99 * (1 - 0.99**1000) / (1 - 0.99)
    assert abs(closed - 901.0042739534938) < 1e-9


def test_in_place_and_for_every_tensor() -> None:
    average = [torch.zeros(3), torch.ones(2, 2)]
    kept = [a.data_ptr() for a in average]
    update(average, [torch.ones(3), torch.zeros(2, 2)], 0.75)
    assert [a.data_ptr() for a in average] == kept
    assert torch.equal(average[0], torch.full((3,), 0.25))
    assert torch.equal(average[1], torch.full((2, 2), 0.75))
    update(average, [torch.full((3,), 0.25), torch.full((2, 2), 0.75)], 0.3)
    assert torch.equal(average[0], torch.full((3,), 0.25))  # a constant stays itself


def test_no_gradient_is_recorded() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    average = [torch.zeros(2)]
    update(average, [weight], 0.5)
    assert not average[0].requires_grad


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.9999])
def test_warm_up(decay: float) -> None:
    """min(d, (1 + k) / (10 + k)): a tenth first, never falling, d in the end."""
    law = [decay_at(k, decay, warmup=True) for k in range(2000)]
    assert law[0] == 0.1 and law[1] == 2 / 11 and law[90] == min(decay, 0.91)
    assert law == sorted(law) and max(law) <= decay
    turn = (10 * decay - 1) / (1 - decay)  # where (1 + k) / (10 + k) = d
    assert decay_at(round(turn) + 2, decay, warmup=True) == decay
    assert decay_at(max(0, round(turn) - 2), decay, warmup=True) < decay
    assert decay_at(0, decay, warmup=False) == decay


def test_the_start_is_forgotten() -> None:
    """After 10 updates with warm-up the start weighs 0.1 * 2/11 * ... * 10/19."""
    average, share = [torch.ones((), dtype=torch.float64)], 1.0
    for k in range(10):
        decay = decay_at(k, 0.9999, warmup=True)
        update(average, [torch.zeros((), dtype=torch.float64)], decay)
        share *= (1 + k) / (10 + k)
    assert abs(float(average[0]) - share) < 1e-15 and share < 1.1e-5
