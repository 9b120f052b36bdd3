import pytest
import torch
from rounding import assert_near

from minidiffusion.evaluation.kid import kid, mmd


def brute_force(x: torch.Tensor, y: torch.Tensor) -> float:
    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return (float(a.double() @ b.double()) / len(a) + 1) ** 3

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return (
        mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
        + mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
        - 2 * mean([kernel(a, b) for a in x for b in y])
    )


def test_as_the_double_loop() -> None:
    x, y = torch.randn(13, 5), torch.randn(17, 5) + 0.5
    assert_near(mmd(x, y), brute_force(x, y), 64, scale=10)  # differences of means of kernels


def test_unbiased_where_the_distributions_are_one() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2000, 16, generator=draw)
    found = kid(x, y, blocks=40)
    assert abs(found.mean) < 3 * found.error
    values = torch.tensor([mmd(*torch.randn(2, 10, 4, generator=draw)) for _ in range(2000)])
    assert abs(values.mean()) < 3 * values.std() / 2000**0.5


def test_it_sees_a_difference() -> None:
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 500, 16, generator=draw)
    found = kid(x, y + 0.5)
    assert found.mean > 10 * found.error > 0


def test_one_block_has_no_spread() -> None:
    with pytest.raises(ValueError, match="1 blocks"):
        kid(torch.randn(10, 2), torch.randn(10, 2), blocks=1)
    with pytest.raises(ValueError, match="10 blocks of 19"):
        kid(torch.randn(19, 2), torch.randn(100, 2))
