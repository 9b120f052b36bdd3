from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from rounding import assert_near
from torch import Tensor

from minidiffusion.evaluation.frechet import (
    Gaussian,
    floor,
    floor_of,
    frechet_distance,
    read_statistics,
    real_floor,
)


def samples(n: int, dim: int, seed: int) -> Tensor:
    """Correlated, with a mean of their own."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=draw, dtype=torch.float64)
    mean = torch.randn(dim, generator=draw, dtype=torch.float64)
    return torch.randn(n, dim, generator=draw, dtype=torch.float64) @ mix + mean


def stored(x: Tensor) -> Gaussian:
    return Gaussian.from_covariance(x.mean(dim=0), torch.cov(x.T), len(x))


def test_diagonal_gaussians_in_closed_form() -> None:
    draw = torch.Generator().manual_seed(0)
    m, s = torch.randn(2, 2, 12, generator=draw, dtype=torch.float64)
    a, b = (Gaussian.from_covariance(m[i], s[i].square().diag()) for i in range(2))
    wanted = (m[0] - m[1]).square().sum() + (s[0].abs() - s[1].abs()).square().sum()
    assert_near(frechet_distance(a, b), float(wanted), 64)


@pytest.mark.parametrize("dim", [3, 24])
def test_as_the_matrix_square_root_of_scipy(dim: int) -> None:
    x, y = samples(200, dim, 1), samples(150, dim, 2)
    a, b = stored(x), stored(y)
    cross = scipy.linalg.sqrtm(a.cov.numpy() @ b.cov.numpy()).real
    wanted = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace())
    wanted -= 2 * float(np.trace(cross))
    assert_near(frechet_distance(a, b), wanted, 1024)  # of the root of an unsymmetric matrix


def test_samples_and_stored_statistics_agree() -> None:
    x, y = samples(90, 16, 3), samples(120, 16, 4)
    both = [frechet_distance(a, b) for a in (x, stored(x)) for b in (y, stored(y))]
    assert_near(both, [both[0]] * 4, 1024)


def test_the_nuclear_norm_of_the_centred_samples() -> None:
    x, y = samples(90, 16, 3), samples(120, 16, 4)
    a, b = x - x.mean(dim=0), y - y.mean(dim=0)
    cross = torch.linalg.matrix_norm(a @ b.T, "nuc") / (89 * 119) ** 0.5
    wanted = (x.mean(dim=0) - y.mean(dim=0)).square().sum() + a.square().sum() / 89
    wanted += b.square().sum() / 119 - 2 * cross
    assert_near(frechet_distance(x, y), float(wanted), 64)


def test_the_symmetric_form_agrees_and_the_classic_mistake_does_not() -> None:
    """trace (C_a C_b)^(1/2) from C_a^(1/2) C_b C_a^(1/2), which is symmetric; C_a C_b is not."""
    a, b = stored(samples(200, 8, 5)), stored(samples(200, 8, 6))
    values, vectors = torch.linalg.eigh(a.cov)
    half = vectors @ values.sqrt().diag() @ vectors.T
    apart = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()
    right = apart - 2 * torch.linalg.eigvalsh(half @ b.cov @ half).sqrt().sum()
    wrong = apart - 2 * torch.linalg.eigvalsh(a.cov @ b.cov).clamp(min=0).sqrt().sum()
    assert_near(frechet_distance(a, b), float(right), 1024)
    assert abs(frechet_distance(a, b) - float(wrong)) > 0.01 * float(right)


def test_a_set_is_at_no_distance_from_itself_and_the_distance_is_symmetric() -> None:
    x, y = samples(60, 10, 7), samples(70, 10, 8)
    assert_near(frechet_distance(x, x), 0, 64, scale=float(x.square().sum()) / len(x))
    assert_near(frechet_distance(x, y), frechet_distance(y, x), 64)
    shifted = frechet_distance(x, x + torch.full((10,), 2.0, dtype=torch.float64))
    assert_near(shifted, 40, 64, scale=40 + float(x.square().sum()) / len(x))


@pytest.mark.parametrize(("n", "m"), [(1000, 1000), (800, 2000)])
def test_the_bias_law_on_whitened_gaussians(n: int, m: int) -> None:
    draw = torch.Generator().manual_seed(9)
    found = torch.tensor(
        [
            frechet_distance(*(torch.randn(size, 8, generator=draw) for size in (n, m)))
            for _ in range(80)
        ]
    )
    assert abs(found.mean() - floor(8, n, m)) < 3 * found.std() / 80**0.5


def test_the_law_for_any_covariance() -> None:
    scale = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.1, 0.0])
    draw = torch.Generator().manual_seed(10)
    found = torch.tensor(
        [
            frechet_distance(*(torch.randn(1000, 6, generator=draw) * scale for _ in range(2)))
            for _ in range(80)
        ]
    )
    true = Gaussian.from_covariance(torch.zeros(6), scale.square().diag())
    assert abs(found.mean() - floor_of(true, 1000)) < 3 * found.std() / 80**0.5
    white = Gaussian.from_covariance(torch.zeros(9), torch.eye(9))
    assert_near(floor_of(white, 50, 70), floor(9, 50, 70), 16)
    assert_near(floor(9, 50), 9 * 10 / 100 + 18 / 50, 4)


def test_the_measured_floor_takes_disjoint_halves() -> None:
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(11))
    assert abs(real_floor(x, 200) / floor(5, 200) - 1) < 0.9
    assert real_floor(x, 200) == real_floor(x, 200) != real_floor(x, 200, seed=1)
    with pytest.raises(ValueError, match="402 real pictures"):
        real_floor(x, 201)


def test_too_few_samples_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"has rank 7 at most.*at least 9 are needed"):
        frechet_distance(torch.randn(8, 8), torch.randn(100, 8))
    assert frechet_distance(torch.randn(9, 8), torch.randn(100, 8)) > 0


def test_what_cannot_be_a_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="not all finite"):
        Gaussian.of(torch.full((10, 2), torch.nan))
    with pytest.raises(ValueError, match="not the same space"):
        frechet_distance(torch.randn(10, 2), torch.randn(10, 3))
    with pytest.raises(ValueError, match="not symmetric"):
        Gaussian.from_covariance(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="negative eigenvalue"):
        Gaussian.from_covariance(torch.zeros(2), torch.diag(torch.tensor([1.0, -1.0])))


def test_published_statistics(tmp_path: Path) -> None:
    x, y = samples(90, 6, 12), samples(90, 6, 13)
    file = tmp_path / "reference.npz"
    np.savez(file, mu=x.mean(dim=0).numpy(), sigma=torch.cov(x.T).numpy())
    assert_near(frechet_distance(read_statistics(file), y), frechet_distance(x, y), 1024)


@pytest.mark.parametrize(
    "content",
    [
        {"mu": np.zeros(3)},
        {"mu": np.zeros(3), "sigma": np.eye(4)},
        {"mu": np.array([{}], dtype=object), "sigma": np.eye(1)},
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "other.npz", **content)
    with pytest.raises(ValueError, match=r"other\.npz"):
        read_statistics(tmp_path / "other.npz")
