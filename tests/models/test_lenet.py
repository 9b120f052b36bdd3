import pytest
import torch
from rounding import assert_parity

from minidiffusion.models.lenet import LeNet, LeNetConfig


@pytest.mark.parametrize("config", [LeNetConfig(), LeNetConfig(in_channels=3, classes=7)])
def test_logits_and_features_have_their_sizes(config: LeNetConfig) -> None:
    network = LeNet(config).eval()
    x = torch.zeros(5, config.in_channels, 28, 28)
    assert network(x).shape == (5, config.classes)
    assert network.features(x).shape == (5, config.features)


def test_the_head_reads_the_features() -> None:
    network = LeNet().eval()
    x = torch.randn(4, 1, 28, 28)
    assert torch.equal(network.head(network.features(x)), network(x))


def test_it_is_small() -> None:
    assert sum(weight.numel() for weight in LeNet().parameters()) < 100_000


def test_a_picture_is_judged_alone_as_in_a_batch() -> None:
    x = torch.randn(6, 1, 28, 28)
    assert_parity(
        lambda network, x: network(x)[2:3], lambda network, x: network(x[2:3]), LeNet().eval(), x
    )
