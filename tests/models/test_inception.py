import pytest
import torch
from rounding import assert_near
from torch.nn import functional as F

from minidiffusion.models.inception import FEATURES, Conv, Fork, Inception


@pytest.fixture(scope="module")
def network() -> Inception:
    torch.manual_seed(0)
    return Inception().eval().requires_grad_(False)


def test_the_features_and_the_resize(network: Inception) -> None:
    seen = []
    hook = network.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(1, 3, 64, 48) * 2 - 1
    features = network(x)
    hook.remove()
    assert features.shape == (1, FEATURES) and network.width == FEATURES
    assert (features >= 0).all()
    large = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    assert torch.equal(seen[0], large)


def test_the_grid_shrinks_as_in_the_paper() -> None:
    found = []
    x = torch.zeros(1, 3, 299, 299, device="meta")
    with torch.device("meta"):
        shapes = Inception()
    for module in (shapes.stem, *shapes.blocks):
        x = module(x)
        found.append(tuple(x.shape[1:3]))
    assert found == [
        (192, 35), (256, 35), (288, 35), (288, 35), (768, 17), (768, 17), (768, 17), (768, 17),
        (768, 17), (1280, 8), (2048, 8), (2048, 8),
    ]  # fmt: skip


def test_94_convolutions_with_21_8_million_numbers(network: Inception) -> None:
    assert sum(isinstance(module, Conv) for module in network.modules()) == 94
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == 21_802_784


def test_pools_of_the_published_graph(network: Inception) -> None:
    """Ones stay ones at the border: the padding is not counted. The last block's is a maximum."""
    ones = torch.ones(1, 1, 8, 8)
    ramp = torch.arange(64.0).view(1, 1, 8, 8)
    pools = [pooling(network, block) for block in (0, 1, 2, 4, 5, 6, 7, 9, 10)]
    assert all(torch.equal(pool(ones), ones) for pool in pools)
    assert [pool(ramp)[0, 0, 0, 0].item() for pool in pools] == [4.5] * 8 + [9.0]


def pooling(network: Inception, block: int) -> torch.nn.Module:
    fork = network.blocks[block]
    assert isinstance(fork, Fork) and isinstance(fork[3], torch.nn.Sequential)
    return fork[3][0]


def test_a_convolution_is_normalised_without_gain() -> None:
    conv = Conv(2, "3 1x3")
    conv.mean.fill_(0.5)
    conv.variance.fill_(4.0)
    conv.shift.data.fill_(0.25)
    x = torch.randn(2, 2, 5, 5)
    plain = F.conv2d(x, conv.weight, padding=(0, 1))
    assert_near(conv(x), F.relu((plain - 0.5) / 4.001**0.5 + 0.25), 16)
