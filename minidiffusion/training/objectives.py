"""What training minimises: where on the path, how far off, and how much each level counts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from minidiffusion.diffusion import Level, LogitNormal, Mode, Target, Uniform, aim
from minidiffusion.diffusion.levels import Scalar, row
from minidiffusion.shapes import Latent

PerPicture = Float[Tensor, " b"]

DISTANCES: dict[str, Callable[[Latent, Latent], Latent]] = {
    "l2": lambda out, aimed: (out - aimed).square(),
    "l1": lambda out, aimed: (out - aimed).abs(),
    "huber": lambda out, aimed: F.huber_loss(out, aimed, reduction="none"),
}


@dataclass(frozen=True)
class Objective:
    """target: what the network predicts. density: where on the path. label_drop: how often the
    class is withheld, which classifier-free guidance needs. gamma: of min_snr and p2.
    """

    target: Target = "flow"
    density: Uniform | LogitNormal | Mode = field(default_factory=LogitNormal)
    distance: Literal["l2", "l1", "huber"] = "l2"
    weighting: Literal["uniform", "min_snr", "p2"] = "uniform"
    gamma: float = field(default=5.0, metadata={"above": 0})
    label_drop: float = field(default=0.1, metadata={"min": 0, "max": 1})


def weight(objective: Objective, level: Level) -> Scalar:
    """What the squared error of an output counts at a level.

    min_snr: an error of x0 counts min(SNR, gamma) (Hang et al. 2023, section 3.4). p2: an error
    of eps counts 1 / (1 + SNR)^gamma (Choi et al. 2022, eq. 8). From x0 or eps to the output it
    is the 2x2 solve of `read` again: dx0 = sigma/det dout, deps = alpha/det dout.
    """
    if objective.weighting == "uniform":
        return 1.0
    alpha, sigma = level.alpha, level.sigma
    a, b = row(objective.target, level)
    det = alpha * b - sigma * a
    if objective.weighting == "p2":
        noise_share = sigma**2 / (sigma**2 + alpha**2)  # 1 / (1 + SNR)
        return noise_share**objective.gamma * (alpha / det) ** 2
    # min(SNR, gamma) * sigma^2, written so that sigma = 0 is no division by zero
    return (
        torch.minimum(torch.as_tensor(alpha**2), torch.as_tensor(objective.gamma * sigma**2))
        / det**2
    )


def losses(objective: Objective, level: Level, out: Latent, x0: Latent, eps: Latent) -> PerPicture:
    """The loss of each picture: the weighted mean distance of the output to what it is aimed at."""
    aimed = aim(objective.target, level, x0, eps)
    distance = DISTANCES[objective.distance](out.to(x0.dtype), aimed)
    return distance.flatten(1).mean(dim=1) * weight(objective, level)
