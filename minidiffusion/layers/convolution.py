"""Residual convolution blocks and the layers that change a feature map's size."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from minidiffusion.shapes import Features, Image

Size = tuple[int, int]
"""Rows and columns."""
PIECE = 2**22
"""Numbers of a kernel in hand at a time: above 32 MB malloc takes fresh pages at every call."""
FEW = 256


def only_drawing(x: Tensor) -> bool:
    """Whether this is a CPU that wants no gradient: some layers have faster ways, not bit-equal."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()


def channels_last(x: Image) -> Image:
    """As a CPU's convolutions like bf16 best, and hand it on.

    Not so their backward passes, nor the norm in float32, which loses a digit on this layout.
    """
    if x.dtype == torch.bfloat16 and only_drawing(x):
        return x.contiguous(memory_format=torch.channels_last)
    return x


def silu(x: Image) -> Image:
    """Of a tensor that nobody else holds: in place where no gradient is wanted."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer that starts as zero, so that the block around it starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the embedding enters between (Ho et al. 2020, appendix B).

    embedding: its width; None for a block that no time enters. scale_shift: the embedding scales
    and shifts the second norm instead of being added before it (Dhariwal & Nichol 2021, section
    3.1).
    """

    def __init__(
        self, enter: int, leave: int, embedding: int | None, groups: int, *,
        scale_shift: bool = False, dropout: float = 0.0, eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scale_shift, self.dropout = scale_shift, dropout
        self.norm1 = nn.GroupNorm(groups, enter, eps)
        self.conv1 = nn.Conv2d(enter, leave, 3, padding=1)
        self.embed = nn.Linear(embedding, leave * (2 if scale_shift else 1)) if embedding else None
        self.norm2 = nn.GroupNorm(groups, leave, eps)
        self.conv2 = zeroed(nn.Conv2d(leave, leave, 3, padding=1))
        self.skip = nn.Conv2d(enter, leave, 1) if enter != leave else nn.Identity()

    def forward(self, x: Image, embedding: Features | None = None) -> Float[Tensor, "b k h w"]:
        """embedding has been through its SiLU already: once a forward, not once a block."""
        h = self.conv1(silu(self.norm1(x)))
        h = F.dropout(silu(self._conditioned(h, embedding)), self.dropout, self.training)
        return self.skip(x) + self.conv2(h)

    def _conditioned(self, h: Image, embedding: Features | None) -> Image:
        if self.embed is None:
            return self.norm2(h)
        side = self.embed(embedding)[:, :, None, None]
        if not self.scale_shift:
            return self.norm2(h + side)
        scale, shift = side.chunk(2, dim=1)
        return torch.addcmul(shift, self.norm2(h), 1 + scale)


class Downsample(nn.Module):
    """Half the size by a strided convolution.

    corner: pad the right and the bottom edge alone, as Stable Diffusion's autoencoder does.
    """

    def __init__(self, channels: int, *, corner: bool = False) -> None:
        super().__init__()
        self.padding = (0, 1, 0, 1) if corner else (0, 0, 0, 0)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if corner else 1)

    def forward(self, x: Image, *_: Tensor | None) -> Float[Tensor, "b c rows columns"]:
        return self.conv(F.pad(x, self.padding) if any(self.padding) else x)


class Upsample(nn.Module):
    """Twice the size, or the size given: nearest neighbours, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Image, size: Size | None = None) -> Float[Tensor, "b c rows columns"]:
        twice = (2 * x.shape[2], 2 * x.shape[3])
        # For fewer pixels than these, making the other kernel costs more than it saves.
        if size in (None, twice) and only_drawing(x) and x[:, 0].numel() >= FEW:
            return doubled(x, self.conv)
        return self.conv(F.interpolate(x, size=size or twice, mode="nearest"))


def doubled(x: Image, layer: nn.Conv2d) -> Float[Tensor, "b k 2*h 2*w"]:
    """Nearest neighbours and a 3x3 convolution as one transposed convolution.

    The copies of a pixel are equal, so the weights that meet them may be added first: a pixel
    needs 4 x 4 products instead of 4 x 9.
    """
    weight, bias = layer.weight, layer.bias
    assert bias is not None
    sums = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    both = torch.kron(sums, sums).mT
    count = max(1, PIECE // (16 * x.shape[1]))
    found = [
        F.conv_transpose2d(
            x, (part.flatten(2) @ both).unflatten(2, (4, 4)).transpose(0, 1), b, stride=2, padding=1
        )
        for part, b in zip(weight.split(count), bias.split(count), strict=True)
    ]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)
