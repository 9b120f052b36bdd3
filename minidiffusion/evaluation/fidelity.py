"""What an autoencoder keeps of a picture, what its latents cost, and what plain resizing keeps."""

import math
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from minidiffusion.data.pictures import to_pixels
from minidiffusion.models.autoencoder import Autoencoder
from minidiffusion.models.lpips import LPIPS
from minidiffusion.shapes import Image

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
Exact = Float[Tensor, " b"]
"""One figure a picture, in float64."""


@dataclass(frozen=True)
class Quality:
    """Means over the pictures of what is measured for each.

    psnr: in dB, of pictures rounded to 8 bits, as a file holds them; psnr_float: of the unrounded
    ones, clamped to [-1, 1]; both infinite where a picture is equal. ssim: at most 1. lpips: 0 is
    best; None where no network was given. All but psnr compare unrounded pictures.
    """

    psnr: float
    psnr_float: float
    ssim: float
    lpips: float | None = None


@dataclass(frozen=True)
class Fidelity:
    """What was measured.

    numbers: of a latent, for each number of its picture. nats: the divergence of a picture's
    latent from the standard normal; bits: the same for each pixel, which is a position and not a
    channel. resized: the picture shrunk to ``size`` (rows, columns), which holds as many numbers
    as the latent or a few more, and enlarged again.
    """

    count: int
    latent: tuple[int, ...]
    numbers: float
    nats: float
    bits: float
    reconstruction: Quality
    size: tuple[int, int]
    resized: Quality

    def as_dict(self) -> dict[str, object]:
        """For JSON: plain numbers, the baseline's under names that begin with resized."""
        plain = {key: value for key, value in asdict(self).items() if not isinstance(value, dict)}
        for prefix, quality in (("", self.reconstruction), ("resized_", self.resized)):
            figures = {f"{prefix}{key}": value for key, value in asdict(quality).items()}
            plain |= {key: value for key, value in figures.items() if value is not None}
        return plain

    def table(self) -> str:
        ours, theirs = self.reconstruction, self.resized
        latent, size = (" x ".join(map(str, sides)) for sides in (self.latent, self.size))
        rows = [
            ("", "autoencoder", "resized"),
            ("PSNR, 8 bits", f"{ours.psnr:.2f} dB", f"{theirs.psnr:.2f} dB"),
            ("PSNR, unrounded", f"{ours.psnr_float:.2f} dB", f"{theirs.psnr_float:.2f} dB"),
            ("SSIM", f"{ours.ssim:.4f}", f"{theirs.ssim:.4f}"),
        ]
        if ours.lpips is not None and theirs.lpips is not None:
            rows.append(("LPIPS", f"{ours.lpips:.4f}", f"{theirs.lpips:.4f}"))
        rows.append(("through", latent, size))
        lines = [f"{name:<15}  {one:>14}  {other:>12}" for name, one, other in rows]
        return "\n".join([
            *lines,
            f"{self.numbers:.4f} numbers of a latent for each of the picture",
            f"KL divergence {self.nats:.1f} nats a picture, {self.bits:.4f} bits a pixel",
            f"measured on {self.count} pictures",
        ])  # fmt: skip


def psnr(x: Image, y: Image) -> Exact:
    """The peak signal-to-noise ratio of pictures in [-1, 1], in dB; infinite where they are equal.

    The squared error is averaged over rows, columns and channels of each picture.
    """
    error = (x.double() - y.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(2**2 / error)


def ssim(x: Image, y: Image) -> Exact:
    """The structural similarity of pictures in [-1, 1] (Wang et al. 2004, equation 13).

    On [0, 1], with a Gaussian window of 11 x 11 and sigma 1.5 at the places where it lies wholly
    inside; the mean over places and channels. Nothing is made smaller before. Raises ValueError
    for pictures with a side under 11 pixels.
    """
    if min(x.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM wants {WINDOW} pixels a side or more, got {tuple(x.shape[2:])}")
    x, y = (x.double() + 1) / 2, (y.double() + 1) / 2
    down, across = (_windows(side).to(x.device) for side in x.shape[2:])
    mean_x, mean_y, xx, yy, xy = (down @ each @ across.T for each in (x, y, x * x, y * y, x * y))
    c1, c2 = K1**2, K2**2
    light = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    covariance, variances = xy - mean_x * mean_y, xx + yy - mean_x**2 - mean_y**2
    return (light * (2 * covariance + c2) / (variances + c2)).flatten(1).mean(dim=1)


def _windows(side: int) -> Float[Tensor, "places side"]:
    """The Gaussian at each of its places along a side: it is a product of two such."""
    away = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    gaussian = torch.exp(-0.5 * (away / SIGMA) ** 2)
    rows = torch.zeros(side - WINDOW + 1, side, dtype=torch.float64)
    for place, row in enumerate(rows):
        row[place : place + WINDOW] = gaussian / gaussian.sum()
    return rows


def shrunk(picture: tuple[int, int, int], numbers: int) -> tuple[int, int]:
    """Rows and columns at which a picture (c, h, w) holds ``numbers`` numbers or a few more."""
    channels, height, width = picture
    side = math.sqrt(numbers / (channels * height * width))
    rows = min(height, max(1, round(height * side)))
    return rows, min(width, math.ceil(numbers / (channels * rows)))


def resized(x: Image, size: tuple[int, int]) -> Image:
    """Shrunk by antialiased bicubic interpolation, enlarged by bicubic, clamped to [-1, 1]."""
    small = F.interpolate(x, size, mode="bicubic", antialias=True)
    return F.interpolate(small, tuple(x.shape[2:]), mode="bicubic").clamp(-1, 1)


@torch.no_grad()
def fidelity(
    autoencoder: Autoencoder, pictures: Image, lpips: LPIPS | None = None, batch: int = 64
) -> Fidelity:
    """Send pictures in [-1, 1] through the autoencoder, each by its posterior's mean.

    Runs on the autoencoder's device, where ``lpips`` must be too. Raises ValueError where there
    are no pictures, or their sides are no multiples of the autoencoder's factor.
    """
    if not len(pictures):
        raise ValueError("no pictures to measure an autoencoder on")
    device = next(autoencoder.parameters()).device
    latent, size = torch.Size(), (0, 0)
    nats, ours, theirs = [], [], []
    for x in pictures.split(batch):
        x = x.to(device)
        z = autoencoder.encode(x)
        latent = z.shape[1:]
        size = shrunk((x.shape[1], x.shape[2], x.shape[3]), latent.numel())
        nats.append(autoencoder.posterior(x).kl().cpu().double())
        ours.append(_figures(autoencoder.decode(z).clamp(-1, 1), x, lpips))
        theirs.append(_figures(resized(x, size), x, lpips))
    mean_nats = float(torch.cat(nats).mean())
    return Fidelity(
        count=len(pictures),
        latent=tuple(latent),
        numbers=latent.numel() / pictures[0].numel(),
        nats=mean_nats,
        bits=mean_nats / math.log(2) / pictures[0, 0].numel(),
        reconstruction=Quality(*torch.cat(ours).mean(dim=0).tolist()),
        size=size,
        resized=Quality(*torch.cat(theirs).mean(dim=0).tolist()),
    )


def _figures(y: Image, x: Image, lpips: LPIPS | None) -> Float[Tensor, "b figures"]:
    """In the order of `Quality`'s fields."""
    columns = [] if lpips is None else [lpips(y, x).cpu().double()]
    y, x = y.cpu(), x.cpu()  # not every device has float64
    whole_y, whole_x = (to_pixels(each).permute(0, 3, 1, 2) / 127.5 - 1 for each in (y, x))
    return torch.stack([psnr(whole_y, whole_x), psnr(y, x), ssim(y, x), *columns], dim=1)
