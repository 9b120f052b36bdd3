"""A small convolutional classifier of 28x28 pictures: the judge that evaluation asks.

LeNet's plan (LeCun et al. 1998: convolve and pool, then two linear layers) with today's parts. Its
penultimate activations are normalised, so a Frechet distance in this feature space has a scale
that does not depend on how far the weights happened to grow.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from minidiffusion.shapes import Features, Image


@dataclass(frozen=True)
class LeNetConfig:
    in_channels: int = 1
    classes: int = 10
    widths: tuple[int, int, int] = (24, 48, 64)
    features: int = 96


class LeNet(nn.Module):
    """28x28 pictures in [-1, 1] to class logits."""

    def __init__(self, config: LeNetConfig = LeNetConfig()) -> None:
        super().__init__()
        self.config = config
        first, second, third = config.widths
        self.conv1 = nn.Conv2d(config.in_channels, first, 5, padding=2, bias=False)
        self.norm1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(second)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(third)
        self.hidden = nn.Linear(third * 3 * 3, config.features, bias=False)
        self.norm4 = nn.BatchNorm1d(config.features)
        self.head = nn.Linear(config.features, config.classes)

    def features(self, x: Image) -> Features:
        """The penultimate activations: the space of this judge's Frechet distance."""
        for conv, norm in (
            (self.conv1, self.norm1),
            (self.conv2, self.norm2),
            (self.conv3, self.norm3),
        ):
            x = F.max_pool2d(F.gelu(norm(conv(x))), 2)
        # GELU and not ReLU: a unit that never fires would make the covariance singular.
        features: Tensor = F.gelu(self.norm4(self.hidden(x.flatten(1))))
        return features

    def forward(self, x: Image) -> Features:
        logits: Tensor = self.head(self.features(x))
        return logits
