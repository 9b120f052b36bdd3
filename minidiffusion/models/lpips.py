"""LPIPS (Zhang et al. 2018, arXiv:1801.03924): how different two pictures look.

Features of a classifier, made unit vectors at every position, are subtracted; the squares are
weighted by channel as people's judgements of such pairs taught, averaged over the positions and
summed over five depths (equation 1). This is version 0.1 with its learned heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from minidiffusion.shapes import FeatureMap, Image


class Layer(NamedTuple):
    """A convolution and its ReLU.

    pool: the size of a maximum over every second position, taken before. tap: whether what
    leaves here is compared.
    """

    width: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0
    tap: bool = True


LAYERS: dict[str, tuple[Layer, ...]] = {
    "alex": (
        Layer(64, 11, stride=4, padding=2),
        Layer(192, 5, padding=2, pool=3),
        Layer(384, pool=3),
        Layer(256),
        Layer(256),
    ),
    "vgg": tuple(
        Layer(width, pool=2 if place == 0 and block else 0, tap=place == last)
        for block, (width, last) in enumerate(((64, 1), (128, 1), (256, 2), (512, 2), (512, 2)))
        for place in range(last + 1)
    ),
}
"""AlexNet as Krizhevsky 2014 (arXiv:1404.5997) has it, and VGG16, without their linear layers."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and deviation of red, green and blue, for pictures in [-1, 1]."""
EPS = 1e-10


@dataclass(frozen=True)
class LPIPSConfig:
    """network: "alex" judges best and is the faster by far; "vgg" is the smoother loss."""

    network: Literal["alex", "vgg"] = "alex"

    def __post_init__(self) -> None:
        if self.network not in LAYERS:
            raise ValueError(f"network: {self.network!r}; choose one of {', '.join(LAYERS)}")

    @property
    def layers(self) -> tuple[Layer, ...]:
        return LAYERS[self.network]


def unit(features: FeatureMap) -> FeatureMap:
    """Of length one at every position, or zero where nothing fires.

    In float32: under autocast, bfloat16 would double the error of a small distance.
    """
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPS)


class LPIPS(nn.Module):
    """Two batches of pictures in [-1, 1] to a distance each; 0 for equal pictures.

    Grey pictures count as colour ones with three equal channels. Sides are 31 pixels or more for
    AlexNet, 16 for VGG16. Fresh weights are random: `checkpoints.lpips.load_lpips` has the
    published ones.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, config: LPIPSConfig = LPIPSConfig()) -> None:
        super().__init__()
        self.config = config
        self.convs, self.heads = nn.ModuleList(), nn.ParameterList()
        enter = 3
        for layer in config.layers:
            self.convs.append(
                nn.Conv2d(enter, layer.width, layer.kernel, layer.stride, layer.padding)
            )
            if layer.tap:
                self.heads.append(nn.Parameter(torch.rand(layer.width)))
            enter = layer.width
        for name, numbers in (("shift", SHIFT), ("scale", SCALE)):
            column = torch.tensor(numbers)[:, None, None]
            self.register_buffer(name, column, persistent=False)

    def features(self, x: Image) -> Iterator[FeatureMap]:
        """The unit vectors of the five depths, shallow ones first."""
        x = (x - self.shift) / self.scale
        for layer, conv in zip(self.config.layers, self.convs, strict=True):
            if layer.pool:
                x = F.max_pool2d(x, layer.pool, stride=2)
            x = F.relu(conv(x))
            if layer.tap:
                yield unit(x)

    def forward(self, x: Image, y: Image) -> Float[Tensor, " b"]:
        """The gradient reaches ``x`` alone: ``y`` is what x should have been."""
        with torch.no_grad():
            targets = list(self.features(y))
        distance = torch.zeros(len(x), device=x.device)
        for head, mine, target in zip(self.heads, self.features(x), targets, strict=True):
            squares = (mine - target).square()
            distance = distance + torch.einsum("bkij,k->b", squares, head) / squares[0, 0].numel()
        return distance
