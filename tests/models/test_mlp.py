"""The perceptron for points of the plane, and the table of models."""

import pytest
import torch
from torch.nn import functional as F

from minidiffusion.models import MLP, MODELS, DiTConfig, MLPConfig, ModelConfig, UNetConfig, create
from minidiffusion.shapes import Cond


@torch.no_grad()
@pytest.mark.parametrize("width", [2, 7, 32])
def test_the_forward_in_plain_steps(width: int) -> None:
    network = MLP(MLPConfig(in_channels=3, width=width, depth=2, classes=2))
    x, t, labels = torch.randn(4, 3), torch.rand(4) * 999, torch.tensor([0, 1, 2, 0])
    embedding = network.time(t) + network.labels.table.weight[labels]
    h = network.enter(x)
    for block in network.blocks:
        h = h + F.silu(block(h + embedding))
    assert torch.equal(network(x, t, Cond(labels=labels)), network.leave(h))


@torch.no_grad()
def test_no_labels_mean_no_class() -> None:
    network, x, t = MLP(MLPConfig(classes=3)), torch.randn(2, 2), torch.ones(2)
    assert torch.equal(network(x, t, Cond()), network(x, t, Cond(labels=torch.tensor([3, 3]))))


def test_sizes_that_fit() -> None:
    MLPConfig(in_channels=3).check((3,))
    for shape in [(2,), (3, 1), ()]:
        with pytest.raises(ValueError, match=r"^this mlp takes \(3,\), got \("):
            MLPConfig(in_channels=3).check(shape)


@pytest.mark.parametrize("config", [UNetConfig(), DiTConfig(), MLPConfig()])
def test_a_config_makes_its_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        network = create(config)
    assert type(network) is MODELS[type(config)] and network.config is config
