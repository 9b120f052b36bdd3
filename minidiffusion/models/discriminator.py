"""The patch discriminator (Isola et al. 2017), and the game that makes an autoencoder crisp.

Each of its logits says whether one patch of a picture, its receptive field, looks real.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from minidiffusion.shapes import Image

Logits = Float[Tensor, "b 1 rows columns"]
Loss = Float[Tensor, ""]
SLOPE = 0.2
WIDEST = 8


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of a discriminator.

    channels: width of the first layer; each further one is twice as wide, up to eight times.
    layers: how many of them halve the picture; two more keep its size, so that a patch is 16
    pixels a side with one, 34 with two, 70 with three. groups: of the norms, which see one
    picture each and not the batch as the paper's do: a batch may then be cut or joined at will.
    """

    name: ClassVar[str] = "discriminator"
    channels: int = field(default=64, metadata={"min": 1, "max": 2**16})
    layers: int = field(default=2, metadata={"min": 1, "max": 2**6})
    picture_channels: int = field(default=3, metadata={"min": 1, "max": 2**16})
    groups: int = field(default=8, metadata={"min": 1, "max": 2**16})

    def __post_init__(self) -> None:
        if self.channels % self.groups:
            raise ValueError(f"channels: {self.channels} is no multiple of groups = {self.groups}")

    @property
    def widths(self) -> list[int]:
        """Of every layer but the last, which has one channel."""
        return [self.channels * min(2**layer, WIDEST) for layer in range(self.layers + 1)]

    @property
    def patch(self) -> int:
        """The receptive field of a logit, in pixels a side: 7, then 2r + 2 for each halving."""
        return int(9 * 2**self.layers - 2)

    @property
    def least(self) -> int:
        """The smallest side of a picture, in pixels."""
        return int(3 * 2**self.layers)


class Discriminator(nn.Module):
    """Pictures (b, 3, h, w) in [-1, 1] to a map of logits, high where a patch looks real.

    A side of h pixels becomes h / 2^layers - 2 logits.
    """

    def __init__(self, config: DiscriminatorConfig = DiscriminatorConfig()) -> None:
        super().__init__()
        c = self.config = config
        first, *further = c.widths
        stages: list[nn.Module] = [
            nn.Conv2d(c.picture_channels, first, 4, stride=2, padding=1),
            nn.LeakyReLU(SLOPE),
        ]
        for number, width in enumerate(further, start=1):
            stride = 2 if number < c.layers else 1
            stages += [
                nn.Conv2d(c.widths[number - 1], width, 4, stride, padding=1, bias=False),
                nn.GroupNorm(c.groups, width),
                nn.LeakyReLU(SLOPE),
            ]
        self.stages = nn.Sequential(*stages, nn.Conv2d(c.widths[-1], 1, 4, padding=1))
        for module in self.stages:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)  # appendix 6.2

    def forward(self, image: Image) -> Logits:
        """Raises ValueError for a picture with fewer pixels a side than the config's ``least``."""
        if min(image.shape[2:]) < self.config.least:
            raise ValueError(
                f"picture: at least {self.config.least} pixels a side for a discriminator of "
                f"{self.config.layers} layers, got {tuple(image.shape[2:])}"
            )
        logits: Tensor = self.stages(image)
        return logits


def hinge_discriminator(real: Logits, fake: Logits) -> Loss:
    """Real patches should reach 1 and fake ones -1 (Lim & Ye 2017, arXiv:1705.02894).

    Half the sum over both, so that a discriminator that answers 0 has the loss 1.
    """
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def hinge_generator(fake: Logits) -> Loss:
    """Fake patches should look real, without end."""
    return -fake.float().mean()


def adversarial(discriminator: Discriminator, real: Image, fake: Image) -> tuple[Loss, Loss]:
    """Both sides' losses, the generator's first, from one backward pass over any sum of them.

    The generator's reaches ``fake`` alone, through weights that are held fixed; the
    discriminator's reaches its weights alone. So a factor before one leaves the other's
    gradient as it is.
    """
    fixed = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    generator = hinge_generator(functional_call(discriminator, fixed, (fake,)))
    logits = discriminator(torch.cat([real.detach(), fake.detach()]))
    return generator, hinge_discriminator(*logits.split([len(real), len(fake)]))
