"""The autoencoder of latent diffusion (Rombach et al. 2022): pictures to latents, and back.

Latents are 8 times smaller, and leave here as the denoiser wants them: scale and shift belong to
the autoencoder and are nobody else's business.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from minidiffusion.layers.attention import SpatialAttention
from minidiffusion.layers.convolution import Downsample, ResBlock, Upsample, channels_last, silu
from minidiffusion.shapes import FeatureMap, Image

EPS = 1e-6
LEAST_TILE = 8


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an autoencoder.

    latent_channels: 4 in Stable Diffusion 1 and 2, 16 in 3. channels, multipliers: width of the
    first level and each level's multiple; every level but the last halves the size. blocks:
    residual blocks a level. scale, shift: latents are (z - shift) * scale, of about unit variance.
    quant: a 1x1 convolution on either side of the latent. patch: squares of so many pixels a side
    come in as channels: small pictures are then worked on at a size that a CPU likes.
    """

    name: ClassVar[str] = "autoencoder"
    channels: int = field(default=128, metadata={"min": 1, "max": 2**16})
    multipliers: tuple[int, ...] = field(default=(1, 2, 4, 4), metadata={"min": 1, "max": 2**6})
    blocks: int = field(default=2, metadata={"min": 1, "max": 2**6})
    latent_channels: int = field(default=4, metadata={"min": 1, "max": 2**16})
    picture_channels: int = field(default=3, metadata={"min": 1, "max": 2**16})
    scale: float = field(default=0.18215, metadata={"above": 0})
    shift: float = 0.0
    quant: bool = True
    groups: int = field(default=32, metadata={"min": 1, "max": 2**16})
    patch: int = field(default=1, metadata={"min": 1, "max": 2**8})

    def __post_init__(self) -> None:
        if not self.multipliers:
            raise ValueError("multipliers: at least one level")
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"channels: {width} is no multiple of groups = {self.groups}")

    @property
    def widths(self) -> list[int]:
        return [self.channels * multiplier for multiplier in self.multipliers]

    @property
    def factor(self) -> int:
        """Pixels of a picture to one of its latent, along each side."""
        return int(self.patch * 2 ** (len(self.multipliers) - 1))


def _middle(width: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        ResBlock(width, width, None, groups, eps=EPS),
        SpatialAttention(width, 1, groups, EPS),
        ResBlock(width, width, None, groups, eps=EPS),
    )


class Encoder(nn.Module):
    """Picture -> feature map of twice the latent's channels: mean and log variance."""

    def __init__(self, c: AutoencoderConfig) -> None:
        super().__init__()
        self.patch = c.patch
        self.enter = nn.Conv2d(c.picture_channels * c.patch**2, c.channels, 3, padding=1)
        self.down, width = nn.ModuleList(), c.channels
        for level, leave in enumerate(c.widths):
            for _ in range(c.blocks):
                self.down.append(ResBlock(width, leave, None, c.groups, eps=EPS))
                width = leave
            if level < len(c.widths) - 1:
                self.down.append(Downsample(width, corner=True))
        self.middle = _middle(width, c.groups)
        self.norm = nn.GroupNorm(c.groups, width, EPS)
        self.leave = nn.Conv2d(width, 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Image) -> FeatureMap:
        if self.patch > 1:
            x = F.pixel_unshuffle(x, self.patch)
        x = self.enter(channels_last(x))
        for stage in self.down:
            x = stage(x)
        return self.leave(silu(self.norm(self.middle(x))))


class Decoder(nn.Module):
    """Latent -> picture."""

    def __init__(self, c: AutoencoderConfig) -> None:
        super().__init__()
        self.patch, width = c.patch, c.widths[-1]
        self.enter = nn.Conv2d(c.latent_channels, width, 3, padding=1)
        self.middle = _middle(width, c.groups)
        self.up = nn.ModuleList()
        for level in reversed(range(len(c.widths))):
            for _ in range(c.blocks + 1):
                self.up.append(ResBlock(width, c.widths[level], None, c.groups, eps=EPS))
                width = c.widths[level]
            if level > 0:
                self.up.append(Upsample(width))
        self.norm = nn.GroupNorm(c.groups, width, EPS)
        self.leave = nn.Conv2d(width, c.picture_channels * c.patch**2, 3, padding=1)

    def forward(self, x: Image) -> FeatureMap:
        x = self.middle(self.enter(channels_last(x)))
        for stage in self.up:
            x = stage(x)
        x = self.leave(silu(self.norm(x)))
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x


class Posterior(NamedTuple):
    """The Gaussian that a picture is encoded to, before scale and shift (Kingma & Welling 2014)."""

    mean: Image
    log_variance: Image

    def kl(self) -> Float[Tensor, " b"]:
        """Divergence from the standard normal, summed over each latent."""
        terms = self.mean**2 + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * terms.flatten(1).sum(dim=1)


class Autoencoder(nn.Module):
    """Pictures in [-1, 1] (b, 3, h, w) <-> latents (b, c, h/8, w/8) as a denoiser wants them.

    tile, where it is given: side of the tiles in the latent's pixels, for pictures too large to be
    worked on whole. Attention and the norms then see one tile at a time: close, not equal.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        c = self.config = config
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        z = c.latent_channels
        self.quant = nn.Conv2d(2 * z, 2 * z, 1) if c.quant else nn.Identity()
        self.post_quant = nn.Conv2d(z, z, 1) if c.quant else nn.Identity()

    def posterior(self, image: Image, tile: int | None = None) -> Posterior:
        """Raises ValueError unless the sides are multiples of the config's factor."""
        factor = self.config.factor
        if image.shape[2] % factor or image.shape[3] % factor:
            raise ValueError(
                f"picture: rows and columns must be multiples of {factor}, got {image.shape[2:]}"
            )
        moments = in_tiles(
            lambda part: self.quant(self.encoder(part)),
            image.to(self.encoder.enter.weight.dtype), tile and tile * factor, Fraction(1, factor),
        )  # fmt: skip
        mean, log_variance = moments.float().chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(-30, 20))

    def forward(self, image: Image, noise: FeatureMap) -> tuple[Image, Posterior]:
        """As it is trained: the picture of a latent drawn with this noise, and its posterior."""
        found = self.posterior(image)
        z = found.mean + torch.exp(0.5 * found.log_variance) * noise
        return self.decoder(self.post_quant(z)).float(), found

    def encode(
        self, image: Image, noise: FeatureMap | None = None, tile: int | None = None
    ) -> FeatureMap:
        """The latent of a picture: the posterior's mean, or its sample with this noise."""
        z, log_variance = self.posterior(image, tile)
        if noise is not None:
            z = z + torch.exp(0.5 * log_variance) * noise
        return (z - self.config.shift) * self.config.scale

    def decode(self, latent: Image, tile: int | None = None) -> FeatureMap:
        """The picture of a latent, in float32, about [-1, 1]."""
        z = latent.float() / self.config.scale + self.config.shift
        return in_tiles(
            lambda part: self.decoder(self.post_quant(part)),
            z.to(self.decoder.enter.weight.dtype), tile, Fraction(self.config.factor),
        ).float()  # fmt: skip


def in_tiles(
    run: Callable[[Image], FeatureMap], x: Image, tile: int | None, scale: Fraction
) -> FeatureMap:
    """run(x), tile by tile where x is larger than one; run makes sides ``scale`` times as long.

    Neighbours overlap by a quarter or more and are blended linearly; a tile's edge that is the
    picture's own counts in full.
    """
    if tile is None or max(x.shape[2:]) <= tile:
        return run(x)
    if tile < LEAST_TILE * max(1.0, float(1 / scale)):
        raise ValueError(f"tile: must be at least {LEAST_TILE} latent pixels")
    rows, columns = (list(_spans(length, tile, scale)) for length in x.shape[2:])
    total, weight = torch.zeros(1), torch.zeros(1)
    for y, down, out_y in rows:
        for x_, across, out_x in columns:
            part = run(x[:, :, y, x_])
            share = (down[:, None] * across).to(part)
            if total.ndim != 4:
                total = part.new_zeros(*part.shape[:2], *(int(n * scale) for n in x.shape[2:]))
                weight = part.new_zeros(total.shape[2:])
            total[:, :, out_y, out_x] += part * share
            weight[out_y, out_x] += share
    return total / weight


def _spans(length: int, tile: int, scale: Fraction) -> Iterator[tuple[slice, Tensor, slice]]:
    """A side's tiles: where they lie, their weights along the side, where their results lie."""
    least = max(1, int(1 / scale))  # a tile may begin where its result can
    tile = min(tile, length)
    starts = [*range(0, length - tile, tile * 3 // 4 // least * least), length - tile]
    for start in starts:
        begin, end = int(start * scale), int((start + tile) * scale)
        ramp = (torch.arange(end - begin) + 0.5) / max(1, (end - begin) // 4)
        up = torch.ones_like(ramp) if start == 0 else ramp.clamp(max=1)
        fall = torch.ones_like(ramp) if start + tile == length else ramp.flip(0).clamp(max=1)
        yield slice(start, start + tile), up * fall, slice(begin, end)
