"""A byte a weight: near the layer that was, exactly it on the grid, and every token for itself."""

import copy
import weakref
from inspect import unwrap

import pytest
import torch
from rounding import assert_near
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F

from minidiffusion.layers import quantized
from minidiffusion.layers.lora import Adapter
from minidiffusion.layers.quantized import FP8, QuantizedLinear, quantize_, restored, rounded
from minidiffusion.models import MMDiTConfig, create, hollow
from minidiffusion.shapes import Cond

OUT, ENTER = 96, 160
HOWS = ("int8", "int8-dynamic", "fp8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.usefixtures("drawing")


@pytest.fixture
def drawing(monkeypatch):
    """As on a machine with int8 products, where no gradient is wanted."""
    monkeypatch.setattr(quantized, "_multiplies_int8", lambda x, weight: True)
    most = torch.full((32, 32), 127, dtype=torch.int8)
    if torch._int_mm(most, most)[0, 0] != 32 * 127**2:  # which is why it is not used here
        monkeypatch.setattr(torch, "_int_mm", lambda a, b: a.int() @ b.int())
    with torch.no_grad():
        yield


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(weight: torch.Tensor, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias).to(weight)
    layer.weight.copy_(weight)
    return layer.requires_grad_(False)


def outliers(x: torch.Tensor) -> torch.Tensor:
    """A few features of every token 30 times as large: the scale is theirs."""
    x = x.clone()
    x[..., ::40] *= 30
    return x


def off(found: torch.Tensor, wanted: torch.Tensor, dim: int | None = None) -> float:
    """The relative distance, of the worst row or column if there is a dimension."""
    norms = [torch.linalg.vector_norm(t.double(), dim=dim) for t in (found - wanted, wanted)]
    return float((norms[0] / norms[1]).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("how", "mosts"),
    [("int8", (0.011, 0.011)), ("int8-dynamic", (0.014, 0.026)), ("fp8", (0.029, 0.029))],
)
def test_near_the_layer(how, mosts, dtype) -> None:
    layer = linear(normal(OUT, ENTER).to(dtype))
    small = QuantizedLinear.of(layer, how)
    inputs = normal(50, ENTER, seed=1), outliers(normal(50, ENTER, seed=2))
    for x, most in zip(inputs, mosts, strict=True):
        found = small(x.to(dtype))
        assert found.dtype == dtype
        wanted = F.linear(x.to(dtype).double(), layer.weight.double(), layer.bias.double())
        assert most / 2 < off(found.double(), wanted) < most


@pytest.mark.parametrize("how", HOWS)
def test_one_scale_for_each_row_of_weights(how) -> None:
    """A row a thousand times larger costs the others nothing."""
    weight = normal(OUT, ENTER)
    weight[7] *= 1000
    x = normal(200, ENTER, seed=1)
    assert off(QuantizedLinear.of(linear(weight, False), how)(x), x @ weight.T, dim=0) < 0.04


def test_one_scale_for_each_token() -> None:
    """A token a thousand times larger costs the others nothing, not a bit."""
    small = QuantizedLinear.of(linear(normal(OUT, ENTER)), "int8-dynamic")
    x = normal(5, 40, ENTER, seed=1)
    alone = torch.stack([small(token) for token in x.flatten(0, 1)])
    assert torch.equal(small(x), alone.view(5, 40, OUT))
    x[2, 3] *= 1000
    kept = torch.ones(200, dtype=torch.bool)
    kept[83] = False
    assert torch.equal(small(x).flatten(0, 1)[kept], alone[kept])


def on_the_grid(*shape: int, most: int, seed: int = 0) -> torch.Tensor:
    """Whole numbers, among each row's the largest that there is."""
    found = torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed))
    found[..., 3] = most
    return found.float()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("how", ["int8", "int8-dynamic"])
def test_exact_on_the_grid(how, fast, monkeypatch) -> None:
    """The fast path and the other are then the same, too."""
    monkeypatch.setattr(quantized, "_multiplies_int8", lambda x, weight: fast)
    weight = on_the_grid(OUT, ENTER, most=127) * 2.0 ** torch.arange(OUT)[:, None].remainder(9)
    x = on_the_grid(20, ENTER, most=127, seed=1) * 2.0 ** -torch.arange(20)[:, None].remainder(5)
    layer = linear(weight)
    layer.bias.copy_(torch.arange(OUT))
    small = QuantizedLinear.of(layer, how)
    assert torch.equal(small.weight * small.scale[:, None], weight)
    assert torch.equal(small(x), layer(x))


def test_the_other_path_is_near_the_fast_one(monkeypatch) -> None:
    layer, x = linear(normal(OUT, ENTER)), normal(50, ENTER, seed=1)
    fast = QuantizedLinear.of(layer, "int8-dynamic")(x)
    monkeypatch.setattr(quantized, "_multiplies_int8", lambda x, weight: False)
    slow = QuantizedLinear.of(layer, "int8-dynamic")(x)
    assert torch.equal(slow, QuantizedLinear.of(layer, "int8")(x))
    assert 0.002 < off(fast, slow) < 0.012


def every_float8() -> torch.Tensor:
    """All of them but the two that are no number."""
    found = torch.arange(256, dtype=torch.uint8)
    return found[(found & 127) != 127].view(FP8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_as_torch_reads_it(dtype) -> None:
    stored = every_float8()[None]
    for scale in (torch.ones(1), torch.tensor([2.0**-7]), torch.tensor([1024.0])):
        wanted = (stored.float() * scale).to(dtype)
        assert torch.equal(restored(stored, scale, dtype), wanted)


def test_a_layer_of_weights_that_came_as_float8() -> None:
    """One scale for all rows, as files have it, or one for each."""
    stored, x = normal(OUT, ENTER).to(FP8), normal(4, ENTER, seed=1)
    bias = normal(OUT, seed=2)
    small = QuantizedLinear(stored, torch.tensor(0.03).expand(OUT), bias)
    assert_near(small(x), x @ (stored.float() * 0.03).T + bias, 16)  # sums over 160 products
    assert small.weight.dtype == FP8 and set(small.state_dict()) == {"weight", "scale", "bias"}


@pytest.mark.parametrize("how", HOWS)
def test_saved_and_read(how) -> None:
    def bare(bias: bool) -> nn.Module:
        found = nn.Sequential(nn.Linear(32, 64, bias), nn.GELU(), nn.Linear(64, 8, bias=False))
        return found.requires_grad_(False)

    def small(network: nn.Module) -> nn.Module:
        quantize_(network, how, skip=lambda name, layer: False)
        return network

    one, other, x = small(bare(True)), small(bare(True)), normal(3, 32, seed=1)
    assert not torch.equal(one(x), other(x))
    state = load(save(one.state_dict()))
    other.load_state_dict(state)
    assert torch.equal(one(x), other(x))
    empty = small(hollow(bare, True))
    empty.load_state_dict(state, assign=True)
    assert torch.equal(one(x), empty(x))
    names = {"0.weight", "0.scale", "0.bias", "2.weight", "2.scale"}
    assert set(state) == names and state["0.scale"].shape == (64,)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", HOWS)
def test_any_batch(how, bias) -> None:
    layer = linear(normal(OUT, ENTER), bias)
    small = QuantizedLinear.of(layer, how)
    x = normal(2, 3, 4, ENTER, seed=1)
    wanted = layer(x)
    for shape in ((2, 3, 4), (6, 4), (24,)):
        found = small(x.view(*shape, ENTER))
        assert found.shape == (*shape, OUT)
        assert off(found.view_as(wanted), wanted) < 0.03
    assert small(x[0, 0, 0]).shape == (OUT,)
    assert small(x[:0]).shape == (0, 3, 4, OUT)
    folded = x.transpose(0, 2)  # not contiguous
    assert off(small(folded), wanted.transpose(0, 2)) < 0.03


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", HOWS)
def test_nothing_in_gives_the_bias(how, dtype) -> None:
    weight = normal(OUT, ENTER).to(dtype)
    weight[5] = 0
    layer = linear(weight)
    x = normal(6, ENTER, seed=1).to(dtype)
    x[2] = 0
    kept = x.clone()
    out = QuantizedLinear.of(layer, how)(x)
    assert torch.equal(out[2], layer.bias) and torch.equal(out[:, 5], layer.bias[5].expand(6))
    assert bool(out.isfinite().all())
    assert torch.equal(x, kept)  # what came in is left alone
    whole, scale = rounded(x)
    assert bool((scale > 0).all()) and not bool(whole[2].any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("how", HOWS)
def test_what_is_not_finite_comes_out_so(how, bad, dtype) -> None:
    small = QuantizedLinear.of(linear(normal(OUT, ENTER).to(dtype)), how)
    x = normal(6, ENTER, seed=1).to(dtype)
    clean = small(x)
    x[3, 9] = bad
    out = small(x)
    rows = torch.arange(6) != 3
    assert not bool(out[3].isfinite().any()) and torch.equal(out[rows], clean[rows])


def test_sums_above_float16s_range() -> None:
    weight = torch.full((8, ENTER), 0.01, dtype=torch.float16)
    small = QuantizedLinear.of(linear(weight, False), "int8-dynamic")
    out = small(torch.ones(3, ENTER, dtype=torch.float16))
    # 0.01 is rounded, the row's scale, the sum: each to 11 bits
    assert_near(out, torch.full_like(out, 0.01 * ENTER), 2)


@pytest.mark.parametrize("how", HOWS)
def test_in_pieces(how, monkeypatch) -> None:
    small, x = QuantizedLinear.of(linear(normal(OUT, ENTER)), how), normal(50, ENTER, seed=1)
    whole = small(x)
    for piece in (1, 7 * ENTER, 10 * ENTER):
        monkeypatch.setattr(quantized, "PIECE", piece)
        monkeypatch.setattr(quantized, "CACHED", piece // 2)
        assert_near(small(x), whole, 16)


@pytest.mark.parametrize("how", HOWS)
def test_gradients_pass_through(how) -> None:
    """To what comes in, and from there to adapters of layers before: as of the rounded weight."""
    small = QuantizedLinear.of(linear(normal(OUT, ENTER)), how)
    x, pull = normal(5, ENTER, seed=1), normal(5, OUT, seed=2)
    with torch.enable_grad():
        x.requires_grad_()
        (small(x) * pull).sum().backward()
    wanted = pull @ restored(small.weight, small.scale, torch.float32)
    assert x.grad is not None
    assert_near(x.grad, wanted, 16)  # sums over 96 products
    assert not any(p.requires_grad for p in small.parameters())


@pytest.mark.parametrize("how", HOWS)
def test_a_byte_a_weight(how) -> None:
    layer = linear(normal(OUT, ENTER).bfloat16(), bias=False)
    small = QuantizedLinear.of(layer, how)
    assert small.weight.nbytes == OUT * ENTER == layer.weight.nbytes // 2
    assert sum(t.nbytes for t in small.state_dict().values()) == OUT * ENTER + 4 * OUT
    largest = small.weight.float().abs().amax(dim=1)  # the whole range is used
    assert bool((largest == (448 if how == "fp8" else 127)).all())


@pytest.mark.parametrize("how", HOWS)
def test_casts_leave_the_stored_alone(how) -> None:
    small = QuantizedLinear.of(linear(normal(OUT, ENTER)), how)
    stored, scale = small.weight, small.scale
    cast = copy.deepcopy(small).to(torch.bfloat16)
    assert cast.bias is not None and cast.bias.dtype == torch.bfloat16
    assert cast.weight.dtype == stored.dtype and torch.equal(cast.scale, scale)
    assert torch.equal(cast.weight.view(torch.int8), stored.view(torch.int8))
    moved = small.to("meta", torch.bfloat16)
    assert moved.weight.is_meta and moved.scale.is_meta and moved.weight.dtype == stored.dtype


@pytest.mark.parametrize("how", HOWS)
def test_shapes_without_numbers(how) -> None:
    config = MMDiTConfig(width=320, depth=2, heads=5, grid=4, context_width=320, pooled_width=320)
    network = create(config).to("meta")
    quantize_(network, how)
    found = {n for n, m in network.named_modules() if isinstance(m, QuantizedLinear)}
    layers = [f"{part}.{leaf}" for part in ("blocks.0.text", "blocks.0.picture", "blocks.1.picture")
              for leaf in ("attention.qkv", "attention.out", "enter", "leave")]  # fmt: skip
    assert found == {"context", "blocks.1.text.attention.qkv", *layers}
    assert all(t.is_meta for t in network.state_dict().values())
    assert network.state_dict()["context.weight"].dtype == (FP8 if how == "fp8" else torch.int8)


CONFIG = MMDiTConfig(
    in_channels=4, width=64, depth=4, heads=4, grid=8, context_width=24, pooled_width=20,
    qk_norm=True, second_attention=2,
)  # fmt: skip


@pytest.mark.parametrize("how", HOWS)
def test_a_whole_transformer(how) -> None:
    torch.manual_seed(0)
    network = create(CONFIG)
    for p in network.parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    x, t = normal(2, 4, 16, 16, seed=1), torch.tensor([900.0, 20.0])
    cond = Cond(tokens=normal(2, 7, 24, seed=2), pooled=normal(2, 20, seed=3))
    wanted = network(x, t, cond)
    kept = {"time", "pooled", "modulation", "modulations"}
    quantize_(network, how, skip=lambda name, layer: not kept.isdisjoint(name.split(".")))
    assert sum(isinstance(m, QuantizedLinear) for m in network.modules()) == 35
    assert 0.001 < off(network(x, t, cond), wanted) < 0.05


def test_weights_are_let_go_one_by_one(monkeypatch) -> None:
    """What a machine must hold is the network and one layer, not the network twice."""
    network = nn.Sequential(*[linear(normal(8, 8)) for _ in range(5)])
    old = [weakref.ref(layer.weight) for layer in network]
    left = []

    def counted(layer: nn.Linear, how: str) -> QuantizedLinear:
        left.append(sum(weight() is not None for weight in old))
        return of(layer, how)

    of = QuantizedLinear.of
    monkeypatch.setattr(QuantizedLinear, "of", counted)
    quantize_(network, "int8", skip=lambda name, layer: False)
    assert left == [5, 4, 3, 2, 1]


def test_refusals() -> None:
    network = nn.Sequential(linear(normal(8, 8)), linear(normal(8, 8)))

    def never(name: str, layer: nn.Linear) -> bool:
        return False

    with pytest.raises(ValueError, match="unknown kind 'int4'; allowed: int8, int8-dynamic, fp8"):
        unwrap(quantize_)(network, "int4", never)
    first, second = network
    second.add_module("lora", Adapter(second, 2, 1.0))
    with pytest.raises(ValueError, match="1 has an adapter; merge it first"):
        quantize_(network, "int8", never)
    assert network[0] is first
    del second.lora
    for bad in (NAN, INF):
        second.weight[2, 3] = bad
        for how in HOWS:
            with pytest.raises(ValueError, match="^quantize: 1: a weight is not a finite number$"):
                quantize_(copy.deepcopy(network), how, never)
    with pytest.raises(ValueError, match="must be int8 or float8_e4m3fn, got torch.float32"):
        QuantizedLinear(normal(2, 2), torch.ones(2))
    with pytest.raises(ValueError, match="must be int8, got torch.float8_e4m3fn"):
        QuantizedLinear(normal(2, 2).to(FP8), torch.ones(2), dynamic=True)
    for bits in (127, 255):
        stored = torch.tensor([[0, bits]], dtype=torch.uint8).view(FP8)
        with pytest.raises(ValueError, match="one is not a number"):
            QuantizedLinear(stored, torch.ones(1))
