"""PSNR and SSIM beside closed forms and scipy, the resize baseline, and the whole table."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from rounding import SHORT, assert_near
from scipy.ndimage import correlate1d
from torch import Tensor

from minidiffusion.evaluation.fidelity import fidelity, psnr, resized, shrunk, ssim
from minidiffusion.models.autoencoder import Autoencoder, AutoencoderConfig
from minidiffusion.models.lpips import LPIPS
from minidiffusion.shapes import Image


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Soft shapes, in colour, and of unequal sides."""
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(5, 3, 8, 10, generator=draw) * 2 - 1
    return torch.nn.functional.interpolate(x, (32, 40), mode="bicubic").clamp(-1, 1)


def noisy(x: Image, amount: float) -> Image:
    draw = torch.Generator().manual_seed(1)
    return (x + amount * torch.randn(x.shape, generator=draw)).clamp(-1, 1)


def scipy_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Of one channel in 0..255, its window laid by filters over the whole and then cropped."""
    away = np.arange(-5, 6)
    window = np.exp(-(away**2) / 4.5)

    def blurred(channel: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            channel = correlate1d(channel, window / window.sum(), axis)
        return channel[5:-5, 5:-5]

    mean_x, mean_y = blurred(x), blurred(y)
    spread_x = blurred(x**2) - mean_x**2
    spread_y = blurred(y**2) - mean_y**2
    shared = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * shared + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (spread_x + spread_y + c2)
    return float((above / below).mean())


def test_psnr_of_a_known_error(pictures: Tensor) -> None:
    x = pictures * 0.5
    signs = torch.sign(torch.randn(x.shape, generator=torch.Generator().manual_seed(2)))
    steps = torch.tensor([1, 2, 4, 8, 16.0])[:, None, None, None]  # of 255, over a range of 2
    found = psnr(x + signs * steps * 2 / 255, x)
    wanted = 20 * torch.log10(255 / steps.flatten().double())
    # A difference of 2 / 255 in float32 has 16 bits: its relative error is 8.7 times that in dB.
    assert_near(found, wanted, 8.7 * 255 / 2, scale=1, eps=SHORT)


def test_ssim_is_scipys(pictures: Tensor) -> None:
    other = noisy(pictures, 0.3)
    x, y = ((each.double().numpy() + 1) * 127.5 for each in (pictures, other))
    wanted = [np.mean(list(map(scipy_ssim, *one))) for one in zip(x, y, strict=True)]
    assert 0.1 < min(wanted) < max(wanted) < 0.95
    # variances are differences of numbers up to 255^2, beside constants of 58
    assert_near(ssim(pictures, other), wanted, 4, scale=255**2 / 58)


def test_ssim_of_two_flat_pictures_is_their_light_alone() -> None:
    x, y = (torch.full((1, 1, 16, 16), 2 * level - 1) for level in (0.25, 0.75))
    wanted = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert_near(ssim(x, y).item(), wanted, 4, eps=SHORT)


def test_equal_pictures_are_perfect(pictures: Tensor) -> None:
    assert (psnr(pictures, pictures) == math.inf).all()
    assert_near(ssim(pictures, pictures), torch.ones(5), 4)


def test_more_noise_is_worse(pictures: Tensor) -> None:
    for measure in (psnr, ssim):
        figures = [measure(noisy(pictures, amount), pictures) for amount in (0.02, 0.1, 0.3, 1)]
        assert all((a > b).all() for a, b in pairwise(figures))


def test_ssim_refuses_what_its_window_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"11 pixels a side or more, got \(16, 10\)"):
        ssim(torch.zeros(1, 1, 16, 10), torch.zeros(1, 1, 16, 10))


@pytest.mark.parametrize("picture", [(3, 64, 64), (1, 28, 28), (3, 32, 40), (3, 8, 256)])
@pytest.mark.parametrize("numbers", [1, 64, 255, 256, 784, 1024])
def test_the_baseline_spends_as_many_numbers(picture: tuple[int, int, int], numbers: int) -> None:
    rows, columns = shrunk(picture, numbers)
    spent = picture[0] * rows * columns
    assert 1 <= rows <= picture[1] and 1 <= columns <= picture[2]
    if numbers <= math.prod(picture):
        assert numbers <= spent < numbers + picture[0] * rows


def test_all_numbers_make_the_picture_itself(pictures: Tensor) -> None:
    assert shrunk((3, 32, 40), 3 * 32 * 40) == (32, 40)
    assert_near(resized(pictures, (32, 40)), pictures, 8)
    better, worse = (psnr(resized(pictures, size), pictures) for size in ((16, 20), (8, 10)))
    assert (better > worse).all()


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig(channels=8, multipliers=(1, 1), blocks=1, groups=4))


def test_the_figures_of_an_autoencoder(pictures: Tensor, autoencoder: Autoencoder) -> None:
    network = LPIPS()
    small = fidelity(autoencoder, pictures, network, batch=2)
    assert small.count == 5 and small.latent == (4, 16, 20) and small.numbers == 1 / 3
    with torch.no_grad():
        answer = autoencoder.decode(autoencoder.encode(pictures)).clamp(-1, 1)
        nats = autoencoder.posterior(pictures).kl().mean().item()
    ours = small.reconstruction

    def assert_mean(found: float | None, figures: Tensor) -> None:
        assert_near(found, figures.mean().item(), 32, eps=SHORT)  # batches round otherwise

    assert_mean(ours.psnr_float, psnr(answer, pictures))
    assert_mean(ours.ssim, ssim(answer, pictures))
    assert_mean(ours.lpips, network(answer, pictures))
    levels = [((each + 1) * 127.5).round() / 127.5 - 1 for each in (answer, pictures)]
    assert_mean(ours.psnr, psnr(*levels))
    assert ours.psnr != ours.psnr_float
    theirs = resized(pictures, small.size)
    assert_mean(small.resized.psnr_float, psnr(theirs, pictures))
    assert_mean(small.resized.lpips, network(theirs, pictures))
    assert_near(small.nats, nats, 32, eps=SHORT)
    assert_near(small.bits, nats * math.log2(math.e) / (32 * 40), 32, eps=SHORT)


def test_the_table_and_the_dict(pictures: Tensor, autoencoder: Autoencoder) -> None:
    found = fidelity(autoencoder, pictures)
    table, plain = found.table(), found.as_dict()
    assert f"{found.reconstruction.psnr:.2f} dB" in table and "4 x 16 x 20" in table
    assert "LPIPS" not in table and "lpips" not in plain and "resized_lpips" not in plain
    assert plain["psnr"] == found.reconstruction.psnr and plain["ssim"] == found.reconstruction.ssim
    assert plain["resized_psnr"] == found.resized.psnr and plain["bits"] == found.bits
    assert json.loads(json.dumps(plain)) == plain | {"latent": [4, 16, 20], "size": [18, 24]}
    assert "LPIPS" in fidelity(autoencoder, pictures, LPIPS()).table()


def test_no_pictures_are_refused(pictures: Tensor, autoencoder: Autoencoder) -> None:
    with pytest.raises(ValueError, match="no pictures"):
        fidelity(autoencoder, pictures[:0])
