"""Faster ways of computing the same, taken where no gradient is wanted, beside the plain ones."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from rounding import FACTOR, assert_near, assert_parity, check, peak, rms
from torch import Tensor, nn
from torch.nn import functional as F

from minidiffusion.layers import attention, convolution
from minidiffusion.layers.attention import attend
from minidiffusion.layers.convolution import ResBlock, Upsample, channels_last, doubled, silu
from minidiffusion.models import Autoencoder, AutoencoderConfig, UNet, UNetConfig
from minidiffusion.shapes import Cond


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heads(b: int, h: int, n: int, m: int, each: int) -> list[Tensor]:
    """q, k, v as projections leave them: views into wider rows."""
    rows = [randn(b, length, h * each, seed=i) for i, length in enumerate((n, m, m))]
    return [x.unflatten(-1, (h, each)).transpose(1, 2) for x in rows]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v


class Calls:
    """A function that counts how often it was called, and with which keywords."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.keywords = function, list[dict[str, Any]]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.keywords.append(kwargs)
        return self.function(*args, **kwargs)


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> Calls:
    calls = Calls(getattr(module, name))
    monkeypatch.setattr(module, name, calls)
    return calls


SIZES = [
    (2, 3, 7, 7, 5),
    (1, 4, 33, 77, 40),
    (2, 2, 64, 9, 16),
    (1, 1, 1, 1, 1),
    (3, 1, 50, 50, 31),
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("room", "most"), [(1, 10**6), (100, 400), (1000, 40), (2**21, 1)])
def test_pieces_make_the_whole(
    sizes: tuple[int, int, int, int, int], room: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 to the last digits, wherever heads and queries are cut."""
    monkeypatch.setattr(attention, "ROOM", room)
    calls = counted(monkeypatch, attention, "_mean")
    q, k, v = (part.double() for part in heads(*sizes))
    found = attention._in_pieces(q, k, v)
    assert_near(found, plain(q, k, v), 64)
    b, h, n, m, _ = sizes
    assert len(calls.keywords) <= most
    # None is larger than the room, or than 16 queries.
    assert len(calls.keywords) >= b * h * n * m / max(room, 16 * (m + 15))


@pytest.mark.parametrize(
    ("q", "k"), [(400.0, 1.0), (-400.0, 1.0), (1e4, 1.0), (-1e4, -1.0), (0.0, 1.0)]
)
def test_scores_beyond_the_range(q: float, k: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose weights would overflow or vanish are shifted first, and their piece with them."""
    calls = counted(monkeypatch, attention, "_mean")
    queries, keys, values = (part.double() for part in heads(1, 2, 6, 5, 8))
    queries[:, 1, 3] = q
    keys[:, 1] = keys[:, 1].abs() * k
    found = attention._in_pieces(queries, keys, values)
    # the weights' relative error is that of their scores, which are as large as |q|
    rounding = 64 * max(1, abs(q))
    assert_near(found, plain(queries, keys, values), rounding)
    assert (len(calls.keywords) == 2) == (abs(q) > 0)
    assert calls.keywords[1:] == [{"shifted": True}] * (len(calls.keywords) - 1)
    masked = torch.full((1, 2, 6, 8), -1e4, dtype=torch.float64)  # below what fills up the keys
    found = attention._in_pieces(masked, keys.abs(), values)
    assert_near(found, plain(masked, keys.abs(), values), 64 * 1e4)


@pytest.mark.parametrize(
    "sizes", [(2, 8, 300, 77, 40), (1, 2, 700, 700, 80), (1, 1, 257, 257, 512)]
)
@pytest.mark.parametrize("size", [1.0, 30.0], ids=["usual", "shifted"])
@torch.no_grad()
def test_bf16_stays_within_its_rounding(
    sizes: tuple[int, int, int, int, int], size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside float32 from the same numbers: no worse than twice the plain way in bf16."""
    monkeypatch.setattr(attention, "ROOM", 2**16)
    q, k, v = (part.bfloat16() for part in heads(*sizes))
    q = size * q
    wanted = plain(q.float(), k.float(), v.float())
    usual = (plain(q, k, v).float() - wanted).abs()
    error = (attend(q, k, v).float() - wanted).abs()
    assert error.max() < 2 * usual.max() and error.mean() < 2 * usual.mean()


def test_bad_numbers_come_out_as_bad_numbers() -> None:
    q, k, v = (part.bfloat16() for part in heads(1, 1, 4, 4, 8))
    k[0, 0, 2, 1] = float("nan")
    with torch.no_grad():
        assert attend(q, k, v).isnan().all()


def test_pieces_only_in_bf16_on_a_cpu_without_mask_or_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = counted(monkeypatch, attention, "_in_pieces")
    parts = heads(1, 2, 6, 6, 8)
    rough = [part.bfloat16() for part in parts]
    with torch.no_grad():
        attend(parts[0], parts[1], parts[2])
        causal = attend(rough[0], rough[1], rough[2], causal=True)
    attend(rough[0].requires_grad_(), rough[1], rough[2]).sum().backward()
    attend(*(part.to("meta") for part in rough))
    assert not calls.keywords
    wanted = F.scaled_dot_product_attention(rough[0], rough[1], rough[2], is_causal=True)
    assert torch.equal(causal, wanted)
    with torch.no_grad():
        attend(rough[0], rough[1], rough[2])
    assert len(calls.keywords) == 1


def plainly(x: Tensor, layer: nn.Conv2d, size: tuple[int, int] | None = None) -> Tensor:
    return layer(F.interpolate(x, size=size or tuple(2 * n for n in x.shape[2:]), mode="nearest"))


@pytest.mark.parametrize(("enter", "leave", "rows", "columns"), [(3, 5, 4, 7), (8, 8, 1, 1)])
@pytest.mark.parametrize("piece", [1, 16 * 8 * 3, 2**22])
@torch.no_grad()
def test_one_transposed_convolution(
    enter: int, leave: int, rows: int, columns: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "PIECE", piece)
    layer = nn.Conv2d(enter, leave, 3, padding=1).double()
    x = randn(2, enter, rows, columns).double()
    assert_near(doubled(x, layer), plainly(x, layer), 64)


@torch.no_grad()
def test_doubled_in_fewer_bits() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(64, 64, 3, padding=1), randn(1, 64, 16, 16)
    assert_parity(lambda layer, x: doubled(x, layer), lambda layer, x: plainly(x, layer), layer, x)
    exact = deepcopy(layer).bfloat16().float()
    wanted = plainly(x.bfloat16().float(), exact)
    rough = x.bfloat16(), layer.bfloat16()
    usual, found = plainly(*rough).float(), doubled(*rough).float()
    for size in (rms, peak):  # the sums of weights are rounded, too
        check(size(found - wanted), FACTOR * size(usual - wanted), "error in bf16")


def test_where_upsampling_takes_the_faster_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, convolution, "doubled")
    layer, x = Upsample(4), randn(2, 4, 16, 16)
    plain = plainly(x, layer.conv)
    assert torch.equal(layer(x), plain)  # a gradient may be wanted
    with torch.no_grad():
        assert torch.equal(layer(x[:, :, :7]), plainly(x[:, :, :7], layer.conv))  # few pixels
        odd = (31, 32)
        assert torch.equal(layer(x, odd), plainly(x, layer.conv, odd))
        layer.to("meta")(x.to("meta"))
        assert not calls.keywords
        layer = Upsample(4)
        assert_parity(lambda it, x: it(x), lambda it, x: plainly(x, it.conv), layer, x)
        assert torch.equal(layer(x), layer(x, (32, 32)))
    assert len(calls.keywords) == 4


def test_channels_last_for_bf16_without_a_gradient() -> None:
    x = randn(1, 8, 4, 4)
    rough = x.bfloat16()
    assert channels_last(rough) is rough
    with torch.no_grad():
        assert channels_last(x) is x  # in float32 the norm is less exact on that layout
        assert torch.equal(channels_last(rough), rough)
        assert channels_last(rough).is_contiguous(memory_format=torch.channels_last)


def test_silu_in_place() -> None:
    x = randn(3, 4, 5, 5)
    wanted, kept = F.silu(x), x.clone()
    assert torch.equal(silu(x), wanted) and torch.equal(x, kept)
    with torch.no_grad():
        assert silu(x) is x and torch.equal(x, wanted)
        block, x = ResBlock(8, 8, 6, 4), randn(2, 8, 5, 5)
        nn.init.normal_(block.conv2.weight)
        kept, found = x.clone(), block(x, randn(2, 6))
    assert torch.equal(x, kept) and torch.equal(found, block(x, randn(2, 6)))


def shaken(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for seed, (name, p) in enumerate(network.named_parameters()):
            p.copy_(randn(*p.shape, seed=seed) / (p[0].numel() if p.ndim > 1 else 16) ** 0.5)
            if p.ndim == 1 and name.endswith("weight"):
                p.add_(1)
    return network.eval()


def fit(network: nn.Module, x: Tensor) -> Tensor:
    """In float64 as the network is; 16 bits are its own affair."""
    return x.double() if next(network.parameters()).dtype == torch.float64 else x


def unet() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    config = UNetConfig(
        in_channels=4, channels=32, multipliers=(1, 2), attention=(1, 0), blocks=1, heads=2,
        context_width=24,
    )  # fmt: skip
    x, tokens = randn(2, 4, 24, 32), randn(2, 7, 24)
    times = torch.tensor([3.0, 741.0])
    return UNet(config), lambda it: it(fit(it, x), fit(it, times), Cond(tokens=fit(it, tokens)))


def decoder() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    z = randn(1, 4, 16, 24)
    network = Autoencoder(AutoencoderConfig(channels=32, multipliers=(1, 2)))
    return network, lambda it: it.decode(fit(it, z))


def encoder() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    x = randn(1, 3, 32, 48)
    network = Autoencoder(AutoencoderConfig(channels=32, multipliers=(1, 2)))
    return network, lambda it: it.encode(fit(it, x))


@pytest.mark.parametrize("make", [unet, decoder, encoder])
def test_whole_networks(
    make: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]],
) -> None:
    """With gradients allowed every layer takes the plain way, without them the faster one."""
    network, run = make()
    plain = run(shaken(network)).detach()

    def plainly(network: nn.Module) -> Tensor:
        with torch.enable_grad():
            return run(network).detach()

    assert_parity(run, plainly, network)
    with torch.no_grad():
        rough = run(network.bfloat16()).float()
    usual = (run(network.requires_grad_(True)).detach().float() - plain).abs()
    error = (rough - plain).abs()
    assert not torch.equal(error, usual)
    assert error.max() < 2 * usual.max() and error.mean() < 1.5 * usual.mean()
