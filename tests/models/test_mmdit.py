"""The MMDiT against diffusers' with the same weights, a plain one, and its own promises."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from faults import assert_faults_are_found
from rounding import all_in_float64, assert_near, assert_parity
from torch import Tensor, nn
from torch.nn import functional as F

from minidiffusion.checkpoints.rename import Renamed, rules, their_shapes
from minidiffusion.checkpoints.tables import mmdit
from minidiffusion.models import MMDiT, MMDiTConfig
from minidiffusion.models.mmdit import Block
from minidiffusion.shapes import Cond

MEDIUM: dict[str, Any] = {}
MEDIUM_X: dict[str, Any] = {"qk_norm": True, "second_attention": 2}
LARGE: dict[str, Any] = {"qk_norm": True}
KINDS = [MEDIUM, MEDIUM_X, LARGE]
NAMES = ["3 medium", "3.5 medium", "3.5 large"]
TIMES = torch.tensor([3.25, 741.125])


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def shaken(network: nn.Module, seed: int = 0) -> Any:
    """Every weight random, none of the zeros that a fresh network starts with; places, too."""
    draw = torch.Generator().manual_seed(seed)
    for name, p in network.state_dict().items():
        norm = name.endswith("_norm.weight")
        fan = p[0].numel() if p.ndim > 1 and name != "places" else 4
        p.copy_(torch.randn(p.shape, generator=draw) / fan**0.5 + norm)
    return network.eval()


def micro(**sizes: Any) -> MMDiT:
    usual = {"width": 32, "depth": 4, "heads": 4, "grid": 12, "context_width": 24}
    return shaken(MMDiT(MMDiTConfig(**{**usual, "pooled_width": 20, **sizes})))


def prompts(network: MMDiT, count: int = 2, tokens: int = 9, seed: int = 5) -> Cond:
    c = network.config
    return Cond(
        tokens=randn(count, tokens, c.context_width, seed=seed),
        pooled=randn(count, c.pooled_width, seed=seed + 1),
    )


def reference(ours: MMDiT) -> SD3Transformer2DModel:
    """The reference implementation with our weights, by way of the key table."""
    c = ours.config
    model = SD3Transformer2DModel(
        sample_size=c.grid * c.patch, patch_size=c.patch, in_channels=c.in_channels,
        out_channels=c.in_channels, num_layers=c.depth, num_attention_heads=c.heads,
        attention_head_dim=c.width // c.heads, caption_projection_dim=c.width,
        joint_attention_dim=c.context_width, pooled_projection_dim=c.pooled_width,
        pos_embed_max_size=c.grid, qk_norm="rms_norm" if c.qk_norm else None,
        dual_attention_layers=tuple(range(c.second_attention)),
    )  # fmt: skip
    state = ours.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = rules(mmdit.table(c, "diffusers"), shapes)
    model.load_state_dict(dict(Renamed(found, state, their_shapes(found, shapes), "theirs")))
    return model.eval()


def theirs(model: SD3Transformer2DModel, x: Tensor, t: Tensor, cond: Cond, **more: Any) -> Tensor:
    found = model(x, cond.tokens, cond.pooled, t, **more)
    sample: Tensor = found.sample
    return sample


def same(
    ours: MMDiT, x: Tensor, t: Tensor, cond: Cond, skip: tuple[int, ...] = (),
    check: Any = assert_parity,
) -> Any:  # fmt: skip
    return check(
        lambda ours, _, *given: ours(*given, skip),
        lambda _, model, *given: theirs(model, *given, skip_layers=list(skip) or None),
        ours, reference(ours), x, t, cond,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize(
    ("side", "tokens", "skip"),
    [((16, 16), 77 + 256, ()), ((10, 22), 154, ()), ((24, 2), 1, (1,)), ((14, 6), 77, (0, 2, 3))],
)
@torch.no_grad()
def test_parity_with_the_reference_implementation(
    kind: dict[str, Any], side: tuple[int, int], tokens: int, skip: tuple[int, ...]
) -> None:
    ours = micro(**kind, width=128, heads=2)
    x, cond = randn(2, 16, *side), prompts(ours, tokens=tokens)
    assert same(ours, x, TIMES, cond, skip).std() > 0.1


def test_a_fault_of_one_part_in_10000_is_found() -> None:
    ours = micro(**MEDIUM_X)
    same(ours, randn(2, 16, 6, 4), TIMES, prompts(ours), check=assert_faults_are_found)


@torch.no_grad()
def test_parity_with_other_patches_and_channels() -> None:
    ours = micro(**MEDIUM_X, patch=3, in_channels=5)
    x, cond = randn(2, 5, 9, 21), prompts(ours)
    same(ours, x, TIMES, cond)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 499.99, 999.125, 1000.0])
@torch.no_grad()
def test_times_between_whole_numbers(t: float) -> None:
    ours = micro()
    x, cond, times = randn(1, 16, 4, 4), prompts(ours, 1), torch.tensor([t])
    same(ours, x, times, cond)


@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (5, 8), (8, 5), (1, 11), (7, 7)])
def test_places_are_cut_from_the_middle_as_the_reference_does(rows: int, columns: int) -> None:
    ours = micro()
    wanted = reference(ours).pos_embed.cropped_pos_embed(2 * rows, 2 * columns)
    assert torch.equal(ours.cropped(rows, columns), wanted)
    # What is cut once to an even number of places less serves all smaller pictures.
    if max(rows, columns) <= 8:
        ours.places, ours.config = ours.cropped(8, 8), replace(ours.config, grid=8)
        assert torch.equal(ours.cropped(rows, columns), wanted)


def test_fresh_places_are_those_of_the_reference() -> None:
    with all_in_float64():
        ours = MMDiT(MMDiTConfig(width=48, depth=1, heads=2, grid=20))
        model = SD3Transformer2DModel(
            sample_size=40, num_layers=1, num_attention_heads=2, attention_head_dim=24,
            caption_projection_dim=48, pos_embed_max_size=20,
        )  # fmt: skip
    # sines of angles up to 20, the largest number that is rounded
    assert_near(ours.places, model.pos_embed.pos_embed, 4, scale=20)
    assert "places" in ours.state_dict()


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_a_fresh_network_is_exactly_zero_and_its_blocks_do_nothing(kind: dict[str, Any]) -> None:
    sizes = {"width": 32, "depth": 3, "heads": 4, "grid": 4, "context_width": 8, "pooled_width": 8}
    network = MMDiT(MMDiTConfig(**sizes, **kind))
    assert not network(randn(2, 16, 8, 4), TIMES, prompts(network)).any()
    text, picture, cond = randn(2, 5, 32), randn(2, 7, 32, seed=2), randn(2, 32, seed=3)
    for block in network.blocks:
        after = block(text, picture, cond)
        assert torch.equal(after[0], text) and torch.equal(after[1], picture)


@torch.no_grad()
def test_a_fresh_network_learns_in_every_weight_but_the_places() -> None:
    """No part hangs loose: after a few steps of gradient descent all weights have moved."""
    sizes = {"width": 16, "depth": 2, "heads": 2, "grid": 4, "context_width": 8, "pooled_width": 8}
    network = MMDiT(MMDiTConfig(**sizes, **LARGE, second_attention=1))
    before = {name: p.clone() for name, p in network.named_parameters()}
    x, cond, optimizer = (
        randn(2, 16, 4, 4),
        prompts(network),
        torch.optim.Adam(network.parameters()),
    )
    with torch.enable_grad():
        for _ in range(4):
            optimizer.zero_grad()
            F.mse_loss(network(x, TIMES, cond), randn(2, 16, 4, 4, seed=7)).backward()
            optimizer.step()
    still = [name for name, p in network.named_parameters() if torch.equal(p, before[name])]
    # What the last text asks for, nobody reads; the official files hold it.
    assert still == ["blocks.1.text.attention.q_norm.weight"]


@torch.no_grad()
def test_with_tied_weights_a_block_is_plain_attention_over_all_tokens() -> None:
    """Two streams of the same weights are one sequence; computed in plain steps, in float64."""
    width, heads = 12, 3
    config = MMDiTConfig(width=width, heads=heads, depth=2, qk_norm=True)
    block = shaken(Block(config, second=False, last=False)).double()
    block.text.load_state_dict(block.picture.state_dict())
    text, picture, cond = (randn(1, n, width, seed=n).double() for n in (5, 7, 1))
    stream = block.picture
    parts = stream.modulations.linear(cond[0])[0].view(6, width)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts
    x = torch.cat([text, picture], dim=1)[0]

    def normed(value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def rms(weight: Tensor, value: Tensor) -> Tensor:
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    qkv = stream.attention.qkv(normed(x) * (1 + scale1) + shift1).view(12, 3, heads, 4)
    merged = torch.empty(12, heads, 4, dtype=torch.float64)
    for head in range(heads):
        q, k, v = qkv[:, :, head].unbind(1)
        q, k = rms(stream.attention.q_norm.weight, q), rms(stream.attention.k_norm.weight, k)
        merged[:, head] = torch.softmax(q @ k.T / 2, dim=1) @ v
    x = x + gate1 * stream.attention.out(merged.flatten(1))
    h = stream.enter(normed(x) * (1 + scale2) + shift2)
    h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    x = x + gate2 * stream.leave(h)
    found = torch.cat(block(text, picture, cond[0]), dim=1)[0]
    assert_near(found, x, 64)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@torch.no_grad()
def test_bf16_is_as_close_to_float32_as_the_references(kind: dict[str, Any]) -> None:
    network = micro(**kind, width=128, heads=2)
    x, cond = randn(2, 16, 16, 16), prompts(network, tokens=77)
    exact, peer = network(x, TIMES, cond), reference(network).bfloat16()
    found = network.bfloat16()(x, TIMES, cond)
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 5 * 2**-8 * exact.norm()
    half = Cond(*(part if part is None else part.bfloat16() for part in cond))
    wanted = theirs(peer, x.bfloat16(), TIMES, half)
    assert (found - exact).norm() < 1.5 * (wanted - exact).norm()


def test_autocast_is_close_to_float32_and_computes_in_bf16() -> None:
    network = micro(**MEDIUM_X, width=128, heads=2)
    x, cond = randn(2, 16, 16, 16), prompts(network, tokens=77)
    exact = network(x, TIMES, cond)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x, TIMES, cond)
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 5 * 2**-8 * exact.norm()


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_checkpointing_changes_no_bit(kind: dict[str, Any]) -> None:
    network = micro(**kind).train()
    x, cond, found = randn(2, 16, 8, 4), prompts(network), []
    for network.checkpointing in (False, True):
        network.zero_grad()
        loss = network(x, TIMES, cond).square().mean()
        loss.backward()
        grads = {name: p.grad for name, p in network.named_parameters()}
        assert all(grad is not None for grad in grads.values())
        found.append([loss.detach(), *grads.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@torch.no_grad()
def test_pictures_of_a_batch_do_not_see_each_other() -> None:
    network = micro(**MEDIUM_X)
    x, cond = randn(3, 16, 6, 6), prompts(network, 3)
    t = torch.tensor([5.0, 500.0, 990.0])
    assert cond.tokens is not None and cond.pooled is not None

    def alone(network: MMDiT, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        rows = [[part[k : k + 1] for part in (x, t, cond.tokens, cond.pooled)] for k in range(3)]
        return torch.cat([network(x, t, Cond(*words)) for x, t, *words in rows])

    assert_parity(lambda network, *given: network(*given), alone, network, x, t, cond)


def frozen(network: MMDiT, times: Tensor, cond: Cond) -> tuple[MMDiT, dict[str, Tensor]]:
    """A copy that holds no projections for its norms, and the weights that it had."""
    again = deepcopy(network)
    weights = network.state_dict()
    assert cond.pooled is not None
    again.freeze(times, cond.pooled, weights)
    return again, weights


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_frozen_ladder_changes_no_bit_and_drops_the_projections(
    kind: dict[str, Any], dtype: torch.dtype
) -> None:
    network = micro(**kind).to(dtype)
    times, cond, x = torch.tensor([1000.0, 750.3, 8.9286]), prompts(network, 4), randn(4, 16, 6, 4)
    again, _ = frozen(network, times, cond)
    for t in times.flip(0):
        found = again(x, t.expand(4), cond, (1,))
        assert torch.equal(found, network(x, t.expand(4), cond, (1,)))
        assert not found.isnan().any()
    left = {name for name, _ in again.named_modules() if name.endswith("modulations.linear")}
    assert left == {name for name, _ in network.named_modules() if name in left} != set()
    for name in left:
        table = again.get_submodule(name)
        assert isinstance(table, nn.Embedding) and len(table.weight) == 3 * 4 + 1


@torch.no_grad()
def test_a_frozen_ladder_in_another_batch_is_equal_within_rounding() -> None:
    network = micro(**MEDIUM_X)
    cond, x = prompts(network, 3), randn(2, 16, 6, 4)
    assert cond.tokens is not None and cond.pooled is not None

    def again(network: MMDiT, x: Tensor, t: Tensor, cond: Cond, some: Cond) -> Tensor:
        return frozen(network, t, cond)[0](x, t.flip(0), some)

    assert_parity(
        again, lambda network, x, t, _, some: network(x, t.flip(0), some),
        network, x, TIMES, cond, Cond(cond.tokens[[2, 0]], cond.pooled[[2, 0]]),
    )  # fmt: skip


@torch.no_grad()
def test_what_a_frozen_ladder_does_not_know_is_nan_until_the_weights_are_streamed_again() -> None:
    network, x = micro(), randn(2, 16, 4, 4)
    cond, other = prompts(network), prompts(network, seed=50)
    again, weights = frozen(network, TIMES[:1], cond)
    t = TIMES[:1].expand(2)
    assert again(x, t, other).isnan().all()
    assert again(x, TIMES, cond)[1].isnan().all() and not again(x, TIMES, cond)[0].isnan().any()
    read: list[str] = []

    class File(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            read.append(name)
            return super().__getitem__(name)

    assert other.pooled is not None
    again.freeze(TIMES, other.pooled, File(weights))
    assert torch.equal(again(x, t, other), network(x, t, other))
    # Each once, and nothing else; "places" is what beartype reads to see that tensors lie there.
    wanted = [name for name in weights if ".linear." in name]
    assert [name for name in read if name != "places"] == wanted


def test_a_cond_without_words_gets_one_line() -> None:
    network = micro()
    for cond in (Cond(), prompts(network)._replace(pooled=None), Cond(pooled=randn(2, 20))):
        with pytest.raises(ValueError, match=r"^mmdit: cond needs tokens and pooled$"):
            network(randn(2, 16, 4, 4), TIMES, cond)


def test_sizes_that_fit() -> None:
    config = MMDiTConfig(grid=8, heads=24)
    for fitting in [(16, 16, 16), (16, 2, 14)]:
        config.check(fitting)
    for shape in [(4, 8, 8), (16, 8, 9), (16, 18, 8), (16, 0, 8), (16, 8), ()]:
        with pytest.raises(ValueError, match=r"rows and columns multiples of 2 up to 16, got \("):
            config.check(shape)


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "width: 1536 is no multiple of heads = 7": {"heads": 7},
    "width: must be a multiple of 4, got 30": {"width": 30, "heads": 3},
    "second_attention: at most depth = 24, got 25": {"second_attention": 25},
}


@pytest.mark.parametrize(("message", "sizes"), IMPOSSIBLE.items(), ids=list(IMPOSSIBLE))
def test_an_impossible_config_gets_one_line(message: str, sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        MMDiTConfig(**sizes)
    assert str(caught.value) == message
