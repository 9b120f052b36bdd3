import pytest
import torch

from minidiffusion.evaluation.precision_recall import precision_recall


def brute_force(points: torch.Tensor, centres: torch.Tensor, k: int) -> float:
    hits = 0
    for point in points:
        for i, centre in enumerate(centres):
            others = sorted(float((centre - c).norm()) for j, c in enumerate(centres) if j != i)
            if float((point - centre).norm()) <= others[k - 1]:
                hits += 1
                break
    return hits / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_as_brute_force_in_chunks_of_any_size(k: int) -> None:
    draw = torch.Generator().manual_seed(k)
    real = torch.randn(40, 4, generator=draw, dtype=torch.float64)
    fake = torch.randn(35, 4, generator=draw, dtype=torch.float64) * 1.5
    wanted = (brute_force(fake, real, k), brute_force(real, fake, k))
    assert 0 < wanted[0] < wanted[1] <= 1
    assert precision_recall(real, fake, k, chunk=7) == wanted
    assert precision_recall(real, fake, k) == wanted


def test_one_mode_of_two_is_precise_and_recalls_half() -> None:
    draw = torch.Generator().manual_seed(0)
    modes = torch.randn(2, 100, 3, generator=draw)
    modes[1] += 100
    fake = torch.randn(100, 3, generator=draw) * 0.5
    precision, recall = precision_recall(modes.flatten(0, 1), fake)
    assert precision > 0.95 and 0.1 < recall <= 0.5


def test_too_few_neighbours() -> None:
    with pytest.raises(ValueError, match="no 3 neighbours"):
        precision_recall(torch.randn(3, 2), torch.randn(9, 2))
