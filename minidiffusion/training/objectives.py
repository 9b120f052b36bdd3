"""What training minimises: where on the path, how far off, what each level counts; its draws."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from minidiffusion.diffusion import Level, LogitNormal, Mode, Target, Uniform, aim, stream
from minidiffusion.diffusion.levels import row
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


@dataclass(frozen=True)
class Reconstruction:
    """What an autoencoder minimises: a sum of these, each with its factor.

    l1: the mean distance of the pixels, in [-1, 1]. lpips: how different the pictures look, by the
    file ``perceptual`` or by the one in the user's cache. kl: the divergence of the latent from the
    standard normal, in nats for each of its numbers. adversarial: of a patch discriminator, which
    is trained along; from step ``adversarial_from`` on.
    """

    name: ClassVar[str] = "reconstruction"
    l1: float = field(default=1.0, metadata={"min": 0})
    lpips: float = field(default=0.1, metadata={"min": 0})
    kl: float = field(default=5e-4, metadata={"min": 0})
    adversarial: float = field(default=0.0, metadata={"min": 0})
    adversarial_from: int = field(default=0, metadata={"min": 0})
    perceptual: str | None = None


@dataclass(frozen=True)
class Contrastive:
    """What a text encoder and a picture encoder minimise together (Radford et al. 2021, figure 3).

    group: so many pairs are told apart from one another, however the batch is cut.
    """

    name: ClassVar[str] = "contrastive"
    group: int = field(default=128, metadata={"min": 2})


def weight(objective: Objective, level: Level) -> float | Float[Tensor, "*b"]:
    """What the squared error of an output counts at a level.

    min_snr: an error of x0 counts min(SNR, gamma) (Hang et al. 2023, section 3.4). p2: an error
    of eps counts 1 / (1 + SNR)^gamma (Choi et al. 2022, eq. 8). From x0 or eps to the output it
    is the 2x2 solve of `read` again: dx0 = sigma/det dout, deps = alpha/det dout.
    """
    if objective.weighting == "uniform":
        return 1.0
    alpha, sigma = torch.as_tensor(level.alpha), torch.as_tensor(level.sigma)
    a, b = row(objective.target, level)
    det = alpha * b - sigma * a
    # 0/0 is an eps-network's at alpha = 0 and an x0-network's at sigma = 0; the limit is 1 there.
    of_eps, of_x0 = ((part / det).nan_to_num(nan=1.0) ** 2 for part in (alpha, sigma))
    if objective.weighting == "p2":
        noise_share = sigma**2 / (sigma**2 + alpha**2)  # 1 / (1 + SNR)
        return noise_share**objective.gamma * of_eps
    return torch.minimum(of_eps, objective.gamma * of_x0)  # SNR * of_x0 is of_eps


def losses(objective: Objective, level: Level, out: Latent, x0: Latent, eps: Latent) -> PerPicture:
    """The loss of each picture: the weighted mean distance of the output to what it is aimed at."""
    aimed = aim(objective.target, level, x0, eps)
    distance = DISTANCES[objective.distance](out.to(x0.dtype), aimed)
    return distance.flatten(1).mean(dim=1) * weight(objective, level)


def drawn(
    seed: int, step: int, first: int, shape: Sequence[int]
) -> tuple[Float[Tensor, "b 2"], Latent]:
    """Two uniform numbers (for the time, for the label drop) and the noise of each picture."""
    uniform = np.empty((shape[0], 2), dtype=np.float32)
    noise = np.empty(tuple(shape), dtype=np.float32)
    for i in range(shape[0]):
        bits = stream(seed, first + i, step)
        bits.random(2, dtype=np.float32, out=uniform[i])
        bits.standard_normal(dtype=np.float32, out=noise[i])
    # One uniform number in 2^24 is 0, an end of the path, where a loss may be 0/0.
    return torch.from_numpy(uniform.clip(min=2.0**-25)), torch.from_numpy(noise)


def dice(seed: int, step: int, picture: int) -> int:
    """A seed for what a network draws by itself, from the first picture of its batch."""
    return int(stream(seed, picture, step).integers(2**63))
