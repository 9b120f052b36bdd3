"""The Frechet distance between two sets of features, each summed up as a Gaussian.

Dowson and Landau 1982; Heusel et al. 2017 (arXiv:1706.08500) for pictures:

    |mean_a - mean_b|^2 + trace(C_a) + trace(C_b) - 2 trace((C_a C_b)^(1/2))

C_a C_b is not symmetric, so eigenvalues for symmetric matrices (eigh) may not be asked of it. With
roots R_a and R_b, C = R^T R, its eigenvalues are those of M^T M with M = R_a R_b^T, and the last
trace is the sum of M's singular values: no square root of a matrix, no product that squares the
rounding errors.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minidiffusion.shapes import Features

Vector = Float[Tensor, " d"]
Matrix = Float[Tensor, "d d"]


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance in double precision; ``root`` is any R with R^T R the covariance."""

    mean: Vector
    root: Matrix
    count: int | None = None

    @classmethod
    def of(cls, features: Features) -> "Gaussian":
        """From samples. Their centred matrix is itself a root; its triangular factor is smaller."""
        count, dim = features.shape
        if count <= dim:
            raise ValueError(
                f"{count} samples of {dim} features: the covariance has rank {count - 1} at most, "
                f"and a distance to it means nothing; at least {dim + 1} are needed"
            )
        x = features.detach().cpu().double()
        if not x.isfinite().all():
            raise ValueError("the features are not all finite numbers")
        mean = x.mean(dim=0)
        root = torch.linalg.qr(x - mean, mode="r").R / (count - 1) ** 0.5
        return cls(mean, root, count)

    @classmethod
    def from_covariance(cls, mean: Vector, cov: Matrix, count: int | None = None) -> "Gaussian":
        cov = cov.cpu().double()
        if not torch.allclose(cov, cov.T, rtol=1e-6, atol=1e-6 * float(cov.abs().max())):
            raise ValueError("the covariance is not symmetric")
        values, vectors = torch.linalg.eigh(cov)
        if values[0] < -1e-6 * values[-1]:
            raise ValueError(f"the covariance has a negative eigenvalue, {values[0]:.3g}")
        # Rounding leaves tiny negative values where the covariance is singular.
        root = values.clamp(min=0).sqrt()[:, None] * vectors.T
        return cls(mean.cpu().double(), root, count)

    @property
    def cov(self) -> Matrix:
        return self.root.T @ self.root


def frechet_distance(
    a: Gaussian | Float[Tensor, "n d"], b: Gaussian | Float[Tensor, "m e"]
) -> float:
    """Between two sets of samples, two stored statistics, or one of each."""
    a = a if isinstance(a, Gaussian) else Gaussian.of(a)
    b = b if isinstance(b, Gaussian) else Gaussian.of(b)
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"{len(a.mean)} features against {len(b.mean)}: not the same space")
    apart = (a.mean - b.mean).square().sum()
    traces = a.root.square().sum() + b.root.square().sum()
    return float(apart + traces - 2 * torch.linalg.svdvals(a.root @ b.root.T).sum())


def floor(dim: int, n: int, m: int | None = None) -> float:
    """What two sets of n and m samples of *one* whitened Gaussian measure on average.

    d(d + 1)/(2n) + 2d/n for n = m, to first order in 1/n: the first part is the covariances', the
    second the means'. No generator can score below its floor but by copying.
    """
    return (1 / n + 1 / (m or n)) / 2 * (dim * (dim + 1) / 2 + 2 * dim)


def floor_of(gaussian: Gaussian, n: int, m: int | None = None) -> float:
    """The same for any covariance: its eigenvalues l_i stand in for ones.

    To second order the distance of C and C + E is sum E_ij^2 / (l_i + l_j) / 2 in C's eigenbasis,
    and the sampled E_ij has the variance l_i l_j (1 + [i = j]) (1/n + 1/m).
    """
    values = torch.linalg.svdvals(gaussian.root).square()
    values = values[values > values[0] * 1e-15]
    pairs = values[:, None] * values / (values[:, None] + values)
    half = (1 / n + 1 / (m or n)) / 2
    return half * float(pairs.sum() + values.sum() / 2 + 2 * values.sum())


def real_floor(real: Features, n: int, seed: int = 0) -> float:
    """The floor as measured: the distance of two disjoint sets of n real pictures."""
    if 2 * n > len(real):
        raise ValueError(f"two halves of {n} need {2 * n} real pictures, not {len(real)}")
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
    order = order.to(real.device)
    return frechet_distance(real[order[:n]], real[order[n : 2 * n]])


def read_statistics(path: Path | str) -> Gaussian:
    """Statistics of published reference sets: an .npz with ``mu`` and ``sigma``."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, cov = (torch.from_numpy(file[key]).double() for key in ("mu", "sigma"))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not statistics with mu and sigma: {error}") from error
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise ValueError(f"{path}: mu {tuple(mean.shape)} and sigma {tuple(cov.shape)} do not fit")
    return Gaussian.from_covariance(mean, cov)
