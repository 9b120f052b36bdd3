"""Inception-v3 as the Frechet inception distance wants it: the network of 2015-12-05, up to pool3.

Szegedy et al. 2015 (arXiv:1512.00567), with the habits of the TensorFlow graph behind every
published FID, which later ports of the network do not share: averages leave the padding out of
their count, the last block takes a maximum instead, and the normalisation has no gain.
"""

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from minidiffusion.shapes import Features, Image

Map = Float[Tensor, "b e i j"]
SIZE = 299
FEATURES = 2048

POOLS: dict[str, Callable[[], nn.Module]] = {
    "average": lambda: nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
    "maximum": lambda: nn.MaxPool2d(3, stride=1, padding=1),
    "halve": lambda: nn.MaxPool2d(3, stride=2),
}
Step = str | list["Way"]
Way = list[Step]
"""A way through a block, step by step: a pooling by its name, a convolution as
"channels rowsxcolumns" ("/2": every second position, no padding; "valid": no padding), or a list
of ways where it splits."""


def block_a(pooled: int) -> list[Way]:
    return [
        ["64 1x1"],
        ["48 1x1", "64 5x5"],
        ["64 1x1", "96 3x3", "96 3x3"],
        ["average", f"{pooled} 1x1"],
    ]


def block_c(c: int) -> list[Way]:
    return [
        ["192 1x1"],
        [f"{c} 1x1", f"{c} 1x7", "192 7x1"],
        [f"{c} 1x1", f"{c} 7x1", f"{c} 1x7", f"{c} 7x1", "192 1x7"],
        ["average", "192 1x1"],
    ]


def block_e(pool: str) -> list[Way]:
    fork: list[Way] = [["384 1x3"], ["384 3x1"]]
    return [["320 1x1"], ["384 1x1", fork], ["448 1x1", "384 3x3", fork], [pool, "192 1x1"]]


STEM: Way = ["32 3x3/2", "32 3x3 valid", "64 3x3", "halve", "80 1x1", "192 3x3 valid", "halve"]
BLOCKS: list[list[Way]] = [
    block_a(32),
    block_a(64),
    block_a(64),
    [["384 3x3/2"], ["64 1x1", "96 3x3", "96 3x3/2"], ["halve"]],
    block_c(128),
    block_c(160),
    block_c(160),
    block_c(192),
    [["192 1x1", "320 3x3/2"], ["192 1x1", "192 1x7", "192 7x1", "192 3x3/2"], ["halve"]],
    block_e("average"),
    block_e("maximum"),
]


class Conv(nn.Module):
    """Convolution, normalisation by stored statistics, ReLU."""

    mean: Tensor
    variance: Tensor

    def __init__(self, inputs: int, step: str) -> None:
        super().__init__()
        width, kernel, *valid = step.replace("/2", " valid /2").split()
        rows, columns = (int(side) for side in kernel.split("x"))
        self.width = int(width)
        self.stride = 2 if "/2" in valid else 1
        self.padding = (0, 0) if valid else (rows // 2, columns // 2)
        self.weight = nn.Parameter(torch.empty(self.width, inputs, rows, columns))
        self.shift = nn.Parameter(torch.zeros(self.width))
        self.register_buffer("mean", torch.zeros(self.width))
        self.register_buffer("variance", torch.ones(self.width))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x: Image) -> Map:
        x = F.conv2d(x, self.weight, None, self.stride, self.padding)
        return F.relu(F.batch_norm(x, self.mean, self.variance, None, self.shift, eps=1e-3))


class Fork(nn.ModuleList):
    """Ways that all see one input; their outputs are laid side by side as channels."""

    def forward(self, x: Image) -> Map:
        return torch.cat([way(x) for way in self], dim=1)


def build_way(width: int, way: Way) -> tuple[nn.Sequential, int]:
    """The modules of a way, and how many channels leave it."""
    modules: list[nn.Module] = []
    for step in way:
        if isinstance(step, list):
            module, width = build_fork(width, step)
            modules.append(module)
        elif step in POOLS:
            modules.append(POOLS[step]())
        else:
            modules.append(conv := Conv(width, step))
            width = conv.width
    return nn.Sequential(*modules), width


def build_fork(width: int, ways: list[Way]) -> tuple[Fork, int]:
    built = [build_way(width, way) for way in ways]
    return Fork(module for module, _ in built), sum(width for _, width in built)


class Inception(nn.Module):
    """Colour pictures in [-1, 1], of any size, to the 2048 pool3 features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, width = build_way(3, STEM)
        blocks: list[Step] = list(BLOCKS)
        self.blocks, self.width = build_way(width, blocks)

    def forward(self, x: Image) -> Features:
        if x.shape[-2:] != (SIZE, SIZE):
            # The usual convention of PyTorch: plain bilinear, not antialiased, corners apart.
            x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False)
        return cast(Tensor, self.blocks(self.stem(x))).mean(dim=(2, 3))
