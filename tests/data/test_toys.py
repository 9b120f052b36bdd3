"""The clouds have the size, the centre and the modes that they promise."""

import pytest
import torch

from minidiffusion.data import Tensors, Toy
from minidiffusion.data.toys import TOYS


def opened(kind: str, **options: int) -> Tensors:
    return Toy(kind=kind, **options).open()


@pytest.mark.parametrize("kind", TOYS)
def test_unit_scale_and_determinism(kind: str) -> None:
    data = opened(kind)
    assert len(data) == 10_000 and data.shape == (2,)
    assert (data.x.mean(0).abs() < 0.1).all()
    assert ((data.x.std(0) - 1).abs() < 0.06).all()
    assert data.x.equal(opened(kind).x) and not data.x.equal(opened(kind, seed=1).x)
    assert data.fingerprint() == opened(kind).fingerprint()
    batch = data.batch([5, 7])
    assert batch.x.dtype == torch.float32 and batch.x.equal(data.x[[5, 7]])


def test_eight_modes() -> None:
    data = opened("eight_gaussians")
    assert data.labels is not None and len(data.classes) == 8
    for mode in range(8):
        points = data.x[data.labels == mode]
        angle = torch.tensor(mode * torch.pi / 4)
        centre = 2**0.5 * torch.stack([angle.cos(), angle.sin()])
        assert 1100 < len(points) < 1400
        assert torch.dist(points.mean(0), centre) < 0.02
        assert (points.std(0) - 0.1).abs().max() < 0.01


def test_the_moons_are_one_another_turned() -> None:
    data = opened("two_moons")
    assert data.labels is not None and data.classes == ("upper", "lower")
    upper, lower = data.x[data.labels == 0], data.x[data.labels == 1]
    assert 4800 < len(upper) < 5200
    assert (upper.mean(0) + lower.mean(0)).abs().max() < 0.06
    assert upper[:, 1].mean() > 0.6
    near = torch.cdist(lower[:500], upper).min()
    assert near > 0.05  # they interlock and do not touch


def test_the_board_has_eight_dark_fields() -> None:
    data = opened("checkerboard")
    fields = ((data.x / 3**0.5 + 1) * 2).floor().long()
    assert fields.min() == 0 and fields.max() == 3
    assert (fields.sum(1) % 2 == 0).all()
    counts = (fields[:, 0] * 4 + fields[:, 1]).bincount()
    assert (counts[counts > 0] > 1100).all() and (counts > 0).sum() == 8


def test_the_spiral_has_two_thin_arms() -> None:
    data = opened("spiral")
    assert data.labels is not None and data.classes == ("first", "second")
    side = (1 - 2 * data.labels)[:, None]
    x = data.x * side  # a half turn lays the second arm on the first
    radius, angle = x.norm(dim=1), torch.atan2(x[:, 1], x[:, 0])
    turns = (radius * 1.5 * torch.pi - angle) / (2 * torch.pi)
    off = (turns - turns.round()) * 4 / 3  # how far from the arm, along the radius
    outer = radius > 0.5
    assert 0.04 < off[outer].std() < 0.06 and off[outer].abs().max() < 1 / 3
    assert (radius < 2.25).all() and (radius < 0.5).sum() > 300


def test_mistakes() -> None:
    for wrong in ({"count": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match="at least 1 and 0"):
            Toy(**wrong).open()
