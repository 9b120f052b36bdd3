"""Attention: one formula, however it is computed and however its weights are stored."""

import pytest
import torch
from rounding import assert_near, assert_parity
from torch import Tensor
from torch.nn import functional as F

from minidiffusion.layers.attention import (
    Attention,
    GatedFeedForward,
    RMSNorm,
    SpatialAttention,
    SpatialTransformer,
    attend,
    merge_heads,
    pick_heads,
    split_heads,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("bhnm,bhmd->bhnd", weights, v)


def test_attend_is_the_formula() -> None:
    q, k, v = (randn(2, 3, n, 8, seed=n).double() for n in (5, 6, 6))
    assert_near(attend(q, k, v), by_hand(q, k, v), 32)


@pytest.mark.parametrize(("n", "m", "each"), [(4, 4, 8), (196, 196, 32), (64, 77, 40), (1, 1, 3)])
def test_bf16_on_a_cpu_is_attention_within_its_rounding(n: int, m: int, each: int) -> None:
    """bf16 has 8 bits: 2^-8 of a value is one rounding; queries, weights and sums take a few."""
    heads = [randn(2, 4, rows, each, seed=rows + i) for i, rows in enumerate((n, m, m))]
    rough = [part.bfloat16().requires_grad_() for part in heads]
    exact = [part.detach().float().requires_grad_() for part in rough]
    found, wanted = attend(*rough), F.scaled_dot_product_attention(*exact)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).abs().max() < 4 * 2**-8 * wanted.abs().max()
    found.float().square().sum().backward()
    wanted.square().sum().backward()
    for a, b in zip(rough, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        largest = max(float(b.grad.abs().max()), 1e-3)
        assert (a.grad.float() - b.grad).abs().max() < 8 * 2**-8 * largest


def test_bf16_weights_sum_to_one_for_scores_of_any_size() -> None:
    q = 300 * torch.ones(1, 1, 2, 16, dtype=torch.bfloat16)
    out = attend(q, q, torch.ones_like(q))
    assert torch.equal(out, torch.ones_like(q))


def test_heads_split_and_merge() -> None:
    x = randn(2, 5, 12)
    assert split_heads(x, 3).shape == (2, 3, 5, 4)
    assert torch.equal(split_heads(x, 3)[:, 1], x[..., 4:8])
    assert torch.equal(merge_heads(split_heads(x, 3)), x)


@pytest.mark.parametrize("context", [None, 6])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_projects_attends_projects(context: int | None, qk_norm: bool) -> None:
    layer = Attention(12, 3, context, bias=True, qk_norm=qk_norm).double()
    x, other = randn(2, 5, 12).double(), None if context is None else randn(2, 7, 6).double()
    k, v = F.linear(x if other is None else other, layer.kv.weight, layer.kv.bias).chunk(2, -1)
    q, k, v = (split_heads(part, 3) for part in (layer.q(x), k, v))
    if qk_norm:
        q, k = (part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    wanted = layer.out(merge_heads(by_hand(q, k, v)))
    assert_near(layer(x, other), wanted, 32)


def test_widths_that_heads_cannot_share() -> None:
    with pytest.raises(ValueError, match=r"^attention: width 10 is no multiple of 4 heads$"):
        Attention(10, 4)
    assert (pick_heads(64, 4, None), pick_heads(64, 4, 8)) == (4, 8)
    with pytest.raises(ValueError, match=r"64 channels cannot be split into 5 equal heads$"):
        pick_heads(64, 5, None)
    for each in (5, 40, 65, 1000):
        with pytest.raises(ValueError, match=rf"64 channels cannot be split into heads of {each}$"):
            pick_heads(64, 4, each)


def test_a_convolution_of_one_pixel_is_a_linear_layer() -> None:
    stored = {linear: SpatialTransformer(8, 2, 6, 1, 4, linear) for linear in (False, True)}
    weights = stored[False].state_dict()
    for name in ("enter.weight", "leave.weight"):
        weights[name] = weights[name].flatten(1)
    stored[True].load_state_dict(weights)
    x, tokens = randn(2, 8, 3, 5), randn(2, 7, 6)
    assert torch.equal(stored[True](x, tokens), stored[False](x, tokens))
    layer = stored[False].enter
    with torch.no_grad():
        inside = stored[False].norm(x)
    found = F.linear(inside.permute(0, 2, 3, 1), weights["enter.weight"], layer.bias)
    assert_near(layer(inside), found.permute(0, 3, 1, 2), 8)  # sums over 8 channels


def test_attention_over_places_does_not_care_for_their_order() -> None:
    layer = SpatialAttention(8, 2, 4)
    torch.nn.init.normal_(layer.attention.out.weight)
    x = randn(2, 8, 3, 5)
    assert_parity(lambda layer, x: layer(x.mT).mT, lambda layer, x: layer(x), layer, x)
    assert torch.equal(SpatialAttention(8, 2, 4)(x), x)  # a fresh one does nothing


def test_gate_and_norm() -> None:
    layer = GatedFeedForward(4, ratio=2).double()
    x = randn(1, 3, 4).double()
    value, gate = layer.enter(x)[..., :8], layer.enter(x)[..., 8:]
    wanted = layer.leave(value * gate * (1 + torch.erf(gate / 2**0.5)) / 2)
    assert_near(layer(x), wanted, 32)
    norm = RMSNorm(4)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert_near(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), 8)
