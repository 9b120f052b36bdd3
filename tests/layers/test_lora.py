"""An adapter changes nothing at first, and merged into the weight it is what it was beside it."""

import copy

import pytest
import torch
from rounding import assert_near, assert_parity
from torch import nn

from minidiffusion.layers.lora import Adapter, adapt, adapters, merge
from minidiffusion.models import UNetConfig, create
from minidiffusion.shapes import Cond

CONFIG = UNetConfig(
    in_channels=4, channels=8, multipliers=(1, 2), blocks=1, attention=(1, 1), groups=4, heads=2,
    context_width=6,
)  # fmt: skip
EVERY = ("attention", "feed_forward", "convolution")
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([3.0, 700.0])
COND = Cond(tokens=torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    found = create(CONFIG)
    for p in found.parameters():
        nn.init.normal_(p, std=0.2)  # also where a fresh network is zero
    return found


def stirred(network: nn.Module) -> None:
    """Adapters as if they had learned something."""
    for adapter in adapters(network).values():
        nn.init.normal_(adapter.up, std=0.3)


@torch.no_grad()
@pytest.mark.parametrize("targets", [EVERY[:1], EVERY[1:2], EVERY])
def test_at_first_nothing_changes(network, targets) -> None:
    network.requires_grad_(False)  # torch computes a last bit otherwise where a gradient is wanted
    before = network(X, T, COND)
    adapt(network, 2, 1.0, targets)
    assert torch.equal(network(X, T, COND), before)
    stirred(network)
    assert (network(X, T, COND) - before).abs().max() > 1e-3


@pytest.mark.parametrize("targets", [EVERY[:1], EVERY])
def test_merged_is_unmerged(network, targets) -> None:
    names = set(network.state_dict())
    adapt(network, 3, 1.5, targets)
    stirred(network)

    def merged(network: nn.Module, *given) -> torch.Tensor:
        network = copy.deepcopy(network)
        merge(network)
        assert set(network.state_dict()) == names and not adapters(network)
        return network(*given)

    assert_parity(merged, lambda network, *given: network(*given), network, X, T, COND)


def test_keys_and_values_have_a_pair_each() -> None:
    layer = nn.Linear(6, 10, bias=False)
    adapter = Adapter(layer, 2, 4.0, parts=2)
    nn.init.normal_(adapter.up)
    x = torch.randn(3, 7, 6)
    halves = [2.0 * (x @ down.mT @ up.mT) for down, up in adapter.pairs()]
    assert [tuple(part.shape) for pair in adapter.pairs() for part in pair] == [(2, 6), (5, 2)] * 2
    assert_near(adapter(layer, x), torch.cat(halves, dim=-1), 8)
    assert_near(x @ adapter.delta().mT, adapter(layer, x), 8)


@pytest.mark.parametrize("stride", [1, 2])
def test_kernels(stride) -> None:
    layer = nn.Conv2d(4, 6, 3, stride=stride, padding=1, bias=False)
    adapter = Adapter(layer, 2, 1.0)
    nn.init.normal_(adapter.up)
    x = torch.randn(2, 4, 8, 8)
    merged = nn.functional.conv2d(x, adapter.delta(), stride=stride, padding=1)
    assert_near(adapter(layer, x), merged, 16)  # sums over 36 products


def test_only_the_adapters_learn(network) -> None:
    found = adapt(network, 2, 2.0)
    assert set(found) == {
        f"{place}.attention.blocks.0.{kind}.{layer}"
        for place in ("down.0", "down.2", "middle.0", "up.0", "up.1", "up.2", "up.3")
        for kind in ("self_attention", "cross_attention")
        for layer in ("q", "kv", "out")
    }
    learning = {name for name, p in network.named_parameters() if p.requires_grad}
    assert learning == {f"{name}.lora.{part}" for name in found for part in ("down", "up")}
    network.checkpointing = True
    network(X, T, COND).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in network.parameters())
    assert all(adapter.up.grad.abs().sum() > 0 for adapter in found.values())


def test_low_precision_is_merged_in_high(network) -> None:
    """Near 1 bf16 has steps of 1/128: the sum, 1.005, is rounded once, from float32."""
    network.bfloat16()
    adapt(network, 2, 2.0)
    (layer, adapter) = next(iter(adapters(network).items()))
    weight = network.get_submodule(layer).weight
    weight.data.fill_(1)
    adapter.down.data.fill_(0.05)
    adapter.up.data.fill_(0.05)
    merge(network)
    assert torch.equal(weight, torch.full_like(weight, 1.005))


def test_mistakes(network) -> None:
    with pytest.raises(ValueError, match="the rank must be at least 1, got 0"):
        adapt(network, 0, 1.0)
    with pytest.raises(ValueError, match="unknown target 'atention'; allowed: attention, feed_"):
        adapt(network, 1, 1.0, ["atention"])
    with pytest.raises(ValueError, match="no layers of the kind attention"):
        adapt(nn.Linear(2, 2), 1, 1.0)
    adapt(network, 1, 1.0)
    with pytest.raises(ValueError, match="has adapters already"):
        adapt(network, 1, 1.0)
