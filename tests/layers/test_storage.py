"""Weights of 16 bits, computed with in float32: equal to the bit to float32 of the same weights."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minidiffusion.checkpoints import lora as files
from minidiffusion.layers import storage
from minidiffusion.layers.lora import adapt, adapters, merge
from minidiffusion.layers.quantized import quantize_
from minidiffusion.layers.storage import StoredLinear, compute_in_float32_, store_slow_weights_
from minidiffusion.models import (
    Autoencoder,
    AutoencoderConfig,
    CLIPConfig,
    CLIPText,
    DiTConfig,
    MMDiT,
    MMDiTConfig,
    T5Config,
    T5Encoder,
    UNet,
    UNetConfig,
    create,
)
from minidiffusion.shapes import Cond

CPU = torch.device("cpu")
UNET = UNetConfig(
    in_channels=4, channels=8, multipliers=(1, 2), blocks=1, attention=(1, 1), groups=4, heads=2,
    context_width=6, classes=3, pooled_width=5,
)  # fmt: skip
FLOW = MMDiTConfig(
    in_channels=4, width=32, depth=2, heads=2, grid=8, context_width=6, pooled_width=5,
    qk_norm=True, second_attention=1,
)  # fmt: skip
COND = Cond(torch.randn(2, 7, 6), torch.randn(2, 5), torch.tensor([0, 2]))
X, T, IDS = torch.randn(2, 4, 16, 16), torch.tensor([3.0, 700.0]), torch.arange(16).view(2, 8)
PICTURE = torch.randn(1, 3, 32, 32)

Call = Callable[[nn.Module], list[Tensor]]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "unet": (lambda: UNet(UNET), lambda net: [net(X, T, COND)]),
    "mmdit": (lambda: MMDiT(FLOW), lambda net: [net(X, T, COND)]),
    "dit": (
        lambda: create(DiTConfig(in_channels=4, rows=16, columns=16, width=16, depth=1, heads=2,
                                 classes=3)),
        lambda net: [net(X, T, Cond()), net(X, T, COND)],
    ),
    "autoencoder": (
        lambda: Autoencoder(AutoencoderConfig(channels=32, multipliers=(1, 2), blocks=1)),
        lambda net: [net.decode(net.encode(PICTURE)), net.decode(X, tile=8)],
    ),
    "clip": (
        lambda: CLIPText(CLIPConfig(64, 9, 32, 2, 2, 48, "gelu", 24, skip=1)),
        lambda net: list(net(IDS)),
    ),
    "t5": (lambda: T5Encoder(T5Config(64, 32, 2, 2, 16, 48)), lambda net: [net(IDS)]),
}  # fmt: skip


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A network with weights of 16 bits, and float32 of the same weights."""
    torch.manual_seed(0)
    network = NETWORKS[name][0]().requires_grad_(False).eval()
    for weight in network.parameters():  # also where a fresh network is zero
        nn.init.normal_(weight, std=0.2)
    network.bfloat16()
    return network, copy.deepcopy(network).float()


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_equal_to_float32_of_the_same_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PIECE", 64 * 32)  # so that many layers are cast in pieces
    stored, wanted = pair(name)
    compute_in_float32_(stored)
    for found, exact in zip(NETWORKS[name][1](stored), NETWORKS[name][1](wanted), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, exact)
    kinds = {x.dtype for x in (*stored.parameters(), *stored.buffers())}
    assert kinds == {torch.bfloat16}
    assert all(torch.equal(stored.state_dict()[name], weight.bfloat16())
               for name, weight in wanted.state_dict().items())  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_large_layer_is_cast_in_pieces(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(96, 320, bias=bias).bfloat16()
    wanted, x = copy.deepcopy(layer).float(), torch.randn(5, 96)
    compute_in_float32_(layer)
    monkeypatch.setattr(storage, "PIECE", 130 * 96)
    with Largest() as seen:
        found = layer(x)
    assert torch.equal(found, wanted(x)) and seen.numel == 128 * 96


class Largest(TorchDispatchMode):
    """The most numbers that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.numel = max(self.numel, out.numel())
        return out


@torch.no_grad()
def test_of_a_table_only_what_is_looked_up_is_cast() -> None:
    table = nn.Embedding(1000, 8).bfloat16()
    wanted = table(IDS).float()
    compute_in_float32_(table)
    with Largest() as seen:
        assert torch.equal(table(IDS), wanted)
    assert seen.numel == wanted.numel()


@torch.no_grad()
def test_weights_come_and_go_without_being_cast() -> None:
    """As with parts that lie in their files while they do not work."""
    layer = nn.Linear(40, 30).bfloat16()
    kept = {name: weight.clone() for name, weight in layer.state_dict().items()}
    compute_in_float32_(layer)
    with Largest() as seen:
        layer.load_state_dict({n: w.to("meta") for n, w in kept.items()}, assign=True)
        assert all(weight.is_meta for weight in layer.parameters())
        layer.load_state_dict(kept, assign=True)
    assert seen.numel == 0 and type(layer) is StoredLinear
    assert layer.to(torch.float32).weight.data_ptr() == next(layer.parameters()).data_ptr()


@torch.no_grad()
def test_adapters_are_merged_into_what_is_stored() -> None:
    """A LoRA added after loading, or trained and merged, is no change of a copy."""
    stored, _ = pair("unet")
    other = copy.deepcopy(stored)
    compute_in_float32_(stored)
    for network in (stored, other):
        adapt(network, 2, 2.0)
        for adapter in adapters(network).values():
            for part in adapter.parameters():
                part.copy_((torch.arange(part.numel()) % 5).view_as(part) / 8)
        merge(network)
    changed = stored.state_dict()
    assert all(torch.equal(changed[key], weight) for key, weight in other.state_dict().items())
    name = "middle.0.attention.blocks.0.self_attention.q"
    before = changed[f"{name}.weight"].clone()
    down, up = torch.ones(1, before.shape[1]), torch.ones(len(before), 1)
    layer = stored.get_submodule(name)
    place = files.Place("", name, 0, 1, "same")
    files.add(layer, [(place, files.Pair(up, down, 1.0, ""))])
    assert torch.equal(stored.state_dict()[f"{name}.weight"], (before.float() + 1).bfloat16())


@pytest.mark.parametrize("how", [None, "fp8", "int8-dynamic"])
def test_one_line_says_what_is_slow(slow: None, how: str | None) -> None:
    """Quantized layers put their weights together in the dtype of x, which is float32 then."""
    network = nn.Sequential(nn.Linear(320, 320), nn.Linear(320, 320)).bfloat16()
    network.requires_grad_(False)
    if how is not None:
        quantize_(network, how, skip=lambda name, _: name == "0")  # type: ignore[arg-type]
    names = "bf16 and int8" if how == "int8-dynamic" else "bf16"
    words = f"^{names}: slow on this cpu; weights stay so, each layer computes in fp32$"
    with pytest.warns(UserWarning, match=words) as said, torch.no_grad():
        store_slow_weights_(network, CPU)
        found = network(torch.ones(1, 320))
    assert found.dtype == torch.float32 and len(said) == 1


def test_nothing_changes_where_it_is_fast(fast: None, recwarn: pytest.WarningsRecorder) -> None:
    network = nn.Sequential(nn.Linear(4, 4)).bfloat16()
    store_slow_weights_(network, CPU)
    assert type(network[0]) is nn.Linear and not recwarn.list


def test_float32_is_left_alone(slow: None, recwarn: pytest.WarningsRecorder) -> None:
    network = nn.Sequential(nn.Linear(4, 4))
    for where in (CPU, torch.device("cuda")):
        store_slow_weights_(network, where)
        network = network if where.type == "cuda" else network.bfloat16()
    assert type(network[0]) is nn.Linear and not recwarn.list
