import pytest
import torch
from rounding import assert_near

from minidiffusion.evaluation.nearest import nearest_distances, nearest_training_ratio


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand(900, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_as_all_the_distances(pictures: torch.Tensor) -> None:
    x, y = pictures[:70], pictures[70:200]
    wanted = torch.cdist(x.flatten(1).double(), y.flatten(1).double()).amin(dim=1)
    assert_near(nearest_distances(x, y, chunk=33), wanted, 16)


def test_unseen_pictures_are_at_1_and_copies_at_0(pictures: torch.Tensor) -> None:
    train, held_out, unseen = pictures[:500], pictures[500:700], pictures[700:]
    assert abs(nearest_training_ratio(unseen, train, held_out) - 1) < 0.05
    assert nearest_training_ratio(train[100:200], train, held_out) == 0
    almost = train[100:200] + 0.01 * torch.randn(100, 1, 6, 6)
    assert 0 < nearest_training_ratio(almost, train, held_out) < 0.1


def test_a_leak_is_named(pictures: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="held-out pictures are in the training set"):
        nearest_training_ratio(pictures[:9], pictures, pictures[9:20])
