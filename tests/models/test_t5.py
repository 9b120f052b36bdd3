"""T5's text encoder against transformers: distances, numbers at every length, fewer bits."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import assert_faults_are_found
from rounding import assert_near, assert_parity
from torch import Tensor
from transformers import T5Config as TheirConfig
from transformers import T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

import minidiffusion
from minidiffusion.checkpoints.rename import Renamed, rules, their_shapes
from minidiffusion.checkpoints.tables import t5 as tables
from minidiffusion.models import T5Config, T5Encoder, hollow
from minidiffusion.models import t5 as module
from minidiffusion.models.t5 import attend, bucket

WORDS = 99
LENGTHS = (1, 77, 256, 512)
"""A single token; the least and the usual of Stable Diffusion 3; beyond the furthest distance."""


def theirs(**changes: Any) -> T5EncoderModel:
    """Random weights that keep numbers near 1 and the scores wide, without their scale."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": WORDS, "d_model": 48, "d_kv": 16, "d_ff": 80, "num_layers": 3,
        "num_heads": 6, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.1,
    }  # fmt: skip
    network = T5EncoderModel(TheirConfig(**{**sizes, **changes})).eval().requires_grad_(False)
    for name, p in network.named_parameters():
        if p.ndim == 1:
            p.copy_(1 + 0.3 * torch.randn(p.shape))
        elif "relative" in name or "shared" in name:
            p.copy_(torch.randn(p.shape))
        else:
            p.copy_(torch.randn(p.shape) * p.shape[1] ** -0.5 * (0.5 if ".q." in name else 1))
    return network


def ours(reference: T5EncoderModel, dialect: str = "transformers") -> T5Encoder:
    c = reference.config
    config = T5Config(
        vocabulary=c.vocab_size, width=c.d_model, layers=c.num_layers, heads=c.num_heads,
        head_width=c.d_kv, feed_forward=c.d_ff, buckets=c.relative_attention_num_buckets,
        distance=c.relative_attention_max_distance,
    )  # fmt: skip
    network = hollow(T5Encoder, config)
    shapes = {name: tuple(w.shape) for name, w in network.state_dict().items()}
    made = rules(tables.table(config, dialect), shapes)
    state = reference.state_dict()
    named = Renamed(
        made, {name: state[name] for name in their_shapes(made, shapes)}, shapes, "ours"
    )
    network.load_state_dict({name: named[name].clone() for name in named}, assign=True)
    return network.eval().requires_grad_(False)


def ids(length: int, rows: int = 2) -> Tensor:
    """Words, an end, padding: the padding counts."""
    found = torch.randint(2, WORDS, (rows, length), generator=torch.Generator().manual_seed(1))
    found[0, length // 3 :] = 0
    found[0, length // 3] = 1
    return found


@pytest.mark.parametrize("sizes", [(32, 128), (16, 20), (8, 5), (64, 512), (4, 2)])
def test_the_kinds_of_distances_are_the_reference_s(sizes: tuple[int, int]) -> None:
    distances = torch.arange(-1100, 1101)
    wanted = T5Attention._relative_position_bucket(distances, True, *sizes)
    found = bucket(distances, *sizes)
    assert torch.equal(found, wanted)
    assert found.min() == 0 and found.max() == sizes[0] - 1


def test_the_bias_goes_from_place_to_place() -> None:
    reference = theirs()
    layer = reference.encoder.block[0].layer[0].SelfAttention
    for length in (1, 2, 300):
        found = ours(reference).bias(length)
        assert torch.equal(found, layer.compute_bias(length, length)[0])
        assert found.is_contiguous()


def same(
    encoder: T5Encoder, reference: T5EncoderModel, ids: Tensor, check: Any = assert_parity
) -> Any:
    return check(
        lambda encoder, _: encoder(ids),
        lambda _, reference: reference(ids).last_hidden_state,
        encoder, reference,
    )  # fmt: skip


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_parity_with_transformers(length: int) -> None:
    reference = theirs()
    for dialect in tables.DIALECTS:
        wanted = same(ours(reference, dialect), reference, ids(length))
    assert 0.5 < wanted.std() < 2
    if length > 1:  # a mask over the padding would be seen
        masked = reference(ids(length), attention_mask=(ids(length) > 0).long()).last_hidden_state
        assert (masked - wanted).abs().max() > 0.01


def test_a_fault_of_one_part_in_10000_is_found() -> None:
    reference = theirs()
    same(ours(reference), reference, ids(40), assert_faults_are_found)


@torch.no_grad()
def test_heads_that_do_not_fill_the_width_and_other_buckets() -> None:
    reference = theirs(
        d_kv=10, relative_attention_num_buckets=16, relative_attention_max_distance=9
    )
    same(ours(reference), reference, ids(40))


@pytest.mark.parametrize("file", ["folder", "file alone"])
@torch.no_grad()
def test_t5_alone_is_a_text_encoder(file: str, tmp_path: Path) -> None:
    """By content: the loader of CLIP's takes it; without a config.json, options say the rest."""
    reference = theirs(relative_attention_max_distance=20)
    reference.save_pretrained(tmp_path)
    path = tmp_path
    if file == "folder":
        encoder = minidiffusion.load_text_encoder(path)
    else:
        path = tmp_path / "model.safetensors"
        (tmp_path / "config.json").unlink()
        assert minidiffusion.load_text_encoder(path).config.distance == 128
        encoder = minidiffusion.load_text_encoder(path, distance=20)
    assert isinstance(encoder, T5Encoder)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    same(encoder, reference, ids(77))
    half = minidiffusion.load_text_encoder(path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="skip: unknown key"):
        minidiffusion.load_text_encoder(path, skip=1)


@torch.no_grad()
def test_a_text_does_not_depend_on_its_company() -> None:
    together = ids(77, rows=3)
    assert_parity(
        lambda encoder: encoder(together)[1:2],
        lambda encoder: encoder(together[1:2]),
        ours(theirs()),
    )


@pytest.mark.parametrize("length", LENGTHS[1:])
@torch.no_grad()
def test_in_bf16_it_is_as_exact_as_the_reference(length: int) -> None:
    reference = theirs().bfloat16()
    wanted = deepcopy(reference).float()(ids(length)).last_hidden_state
    usual = (reference(ids(length)).last_hidden_state.float() - wanted).abs()
    found = ours(reference)(ids(length))
    assert found.dtype == torch.bfloat16
    error = (found.float() - wanted).abs()
    assert error.mean() < 1.5 * usual.mean() and error.max() < 2 * usual.max()


@pytest.mark.parametrize("room", [1, 3 * 33**2, 2**21])
def test_a_few_heads_at_a_time_are_all_of_them(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside float64, from the same numbers; with gradients the fused kernel does it."""
    monkeypatch.setattr(module, "ROOM", room)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 33, 5, 8, generator=draw).transpose(1, 2) for _ in range(3))
    bias = torch.randn(5, 33, 33, generator=draw)
    rough = [x.bfloat16() for x in (q, k, v, bias)]
    exact = [x.double() for x in rough]
    wanted = torch.softmax(exact[0] @ exact[1].mT + exact[3], dim=-1) @ exact[2]
    calls = []
    monkeypatch.setattr(torch, "baddbmm", counting(torch.baddbmm, calls))
    with torch.no_grad():
        found = attend(*rough)
    assert_near(found, wanted, 2)
    assert len(calls) == {1: 10, 3 * 33**2: 4, 2**21: 2}[room]
    rough[2].requires_grad_()
    attend(*rough).sum().backward()
    assert rough[2].grad is not None and len(calls) == {1: 10, 3 * 33**2: 4, 2**21: 2}[room]
    assert_near(attend(*exact), wanted, 64)


def counting(function: Any, calls: list[int]) -> Any:
    return lambda *args: calls.append(1) or function(*args)


@torch.no_grad()
def test_float16_survives_what_leaves_its_range() -> None:
    """Perceptrons' results are beyond 65,504, beside tokens large enough to be seen there."""
    reference = theirs()
    reference.shared.weight.mul_(10_000)
    for block in reference.encoder.block:
        block.layer[1].DenseReluDense.wo.weight.mul_(30_000)
    reference = reference.half().float()
    inner: list[Tensor] = []
    encoder = ours(reference)
    for block in encoder.blocks:
        block.register_forward_hook(lambda *args: inner.append(args[-1]))
    wanted = same(encoder, reference, ids(40))
    assert all(x.abs().max() > torch.finfo(torch.float16).max for x in inner)
    found = encoder.half()(ids(40))
    assert found.dtype == torch.float16 and found.isfinite().all()
    assert_near(found, wanted, 8)


def test_gradients_flow() -> None:
    encoder = ours(theirs()).requires_grad_(True)
    encoder(ids(20)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="buckets: must be even, got 5"):
        T5Config(buckets=5)
    with pytest.raises(ValueError, match="distance: must be above 8, a quarter of buckets"):
        T5Config(distance=8)
