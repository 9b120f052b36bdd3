"""The diffusion transformer against a plain one, the reference implementation and the paper."""

from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from rounding import assert_near, assert_parity
from torch import Tensor, nn

from minidiffusion.models import DiT, DiTConfig
from minidiffusion.models.dit import Block
from minidiffusion.shapes import Cond


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def shaken(network: nn.Module, seed: int = 0) -> Any:
    """Every weight random, none of the zeros that a fresh network starts with."""
    draw = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.copy_(torch.randn(p.shape, generator=draw) / (p[0].numel() if p.ndim > 1 else 4) ** 0.5)
    return network.eval()


def micro(**sizes: Any) -> DiT:
    usual = {"rows": 8, "columns": 8, "width": 16, "depth": 2, "heads": 2}
    return shaken(DiT(DiTConfig(**{**usual, **sizes})))


@pytest.mark.parametrize("classes", [0, 3])
def test_a_fresh_network_is_exactly_zero_and_its_blocks_do_nothing(classes: int) -> None:
    network = DiT(DiTConfig(rows=8, columns=8, classes=classes))
    x, t = randn(2, 1, 8, 8), torch.tensor([1.0, 900.0])
    assert not network(x, t, Cond()).any()
    tokens, cond = randn(2, 5, 192), randn(2, 192, seed=2)
    for block in network.blocks:
        assert torch.equal(block(tokens, cond), tokens)


OFFICIAL = {"S": 32_963_360, "B": 130_512_416, "L": 458_102_816, "XL": 675_129_632}
"""Of the authors' code with patch 2 at 32 x 32 x 4 (the paper's table 1 rounds to millions)."""


@pytest.mark.parametrize(("size", "official"), OFFICIAL.items())
def test_parameter_counts_of_the_paper(size: Any, official: int) -> None:
    with torch.device("meta"):
        config = DiTConfig(in_channels=4, rows=32, columns=32, size=size, classes=1000)
        network = DiT(config)
    width, depth, heads = config.sizes
    count = sum(p.numel() for p in network.parameters())
    # Theirs also predicts a variance (4 more channels) and counts the fixed places;
    count += 2 * 2 * 4 * (width + 1) + 16 * 16 * width
    # ours has norms of queries and keys, and a gate, which nothing asks for, in the last adaLN.
    count -= 2 * depth * width // heads + width * width + width
    assert count == official


@pytest.mark.parametrize(("rows", "columns", "patch"), [(8, 8, 2), (6, 12, 3), (12, 8, 4)])
def test_patches_make_the_picture_again(rows: int, columns: int, patch: int) -> None:
    network = micro(in_channels=3, rows=rows, columns=columns, patch=patch)
    x = randn(2, 3, rows, columns)
    tokens = network._patches(x)
    assert tokens.shape == (2, rows * columns // patch**2, 3 * patch**2)
    assert torch.equal(tokens[0, 1], x[0, :, :patch, patch : 2 * patch].flatten())
    assert torch.equal(network._picture(tokens), x)


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_a_block_is_the_papers_arithmetic(qk_norm: bool) -> None:
    """Figure 3 of the paper in plain steps, one head and one picture at a time, in float64."""
    width, heads, n = 12, 3, 5
    block = shaken(Block(width, heads, qk_norm)).double()
    x, cond = randn(2, n, width).double(), randn(2, width, seed=2).double()
    w = dict(block.named_parameters())

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def normed(value: Tensor) -> Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def rms(name: str, value: Tensor) -> Tensor:
        if not qk_norm:
            return value
        scale = (value.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return value / scale * w[f"attention.{name}.weight"]

    for one in range(2):
        h, c = x[one], cond[one]
        parts = linear("modulations.linear", c * torch.sigmoid(c)).view(6, width)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        y = normed(h) * (1 + scale1) + shift1
        q, kv = linear("attention.q", y), linear("attention.kv", y)
        merged = torch.empty_like(h)
        for head in range(heads):
            own = slice(head * width // heads, (head + 1) * width // heads)
            k, v = kv[:, :width][:, own], kv[:, width:][:, own]
            scores = rms("q_norm", q[:, own]) @ rms("k_norm", k).T / (width // heads) ** 0.5
            merged[:, own] = torch.exp(scores) / torch.exp(scores).sum(1, keepdim=True) @ v
        h = h + gate1 * linear("attention.out", merged)
        y = linear("enter", normed(h) * (1 + scale2) + shift2)
        y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
        h = h + gate2 * linear("leave", y)
        assert_near(block(x, cond)[one], h, 64)


def reference(ours: DiT) -> DiTTransformer2DModel:
    """The reference implementation with our weights.

    Each of its blocks embeds time and class anew, with a frequency ladder that ends one step early
    (the authors' does not), its places run in another order, and its last layer sorts a patch's
    numbers by place, then channel; ours by channel, then place.
    """
    c = ours.config
    width, depth, heads = c.sizes
    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=c.in_channels,
        out_channels=c.in_channels, num_layers=depth, sample_size=c.rows, patch_size=c.patch,
        num_embeds_ada_norm=c.classes, norm_eps=1e-6,
    )  # fmt: skip
    s = ours.state_dict()
    pixels = (c.in_channels, c.patch, c.patch)
    weights = {
        "pos_embed.proj.weight": s["enter.weight"].unflatten(1, pixels),
        "pos_embed.proj.bias": s["enter.bias"],
        "proj_out_1.weight": s["modulation.linear.weight"][: 2 * width],
        "proj_out_1.bias": s["modulation.linear.bias"][: 2 * width],
        "proj_out_2.weight": s["leave.weight"].unflatten(0, pixels).movedim(0, 2).flatten(0, 2),
        "proj_out_2.bias": s["leave.bias"].unflatten(0, pixels).movedim(0, 2).flatten(),
    }
    names = {
        "modulations.linear": "norm1.linear", "attention.q": "attn1.to_q",
        "attention.out": "attn1.to_out.0", "enter": "ff.net.0.proj", "leave": "ff.net.2",
    }  # fmt: skip
    for i in range(depth):
        block, embed = f"transformer_blocks.{i}", f"transformer_blocks.{i}.norm1.emb"
        weights[f"{embed}.class_embedder.embedding_table.weight"] = s["labels.table.weight"]
        for kind in ("weight", "bias"):
            for mine, other in names.items():
                weights[f"{block}.{other}.{kind}"] = s[f"blocks.{i}.{mine}.{kind}"]
            k, v = s[f"blocks.{i}.attention.kv.{kind}"].chunk(2)
            weights |= {f"{block}.attn1.to_k.{kind}": k, f"{block}.attn1.to_v.{kind}": v}
            for mine, other in (("first", "linear_1"), ("second", "linear_2")):
                weights[f"{embed}.timestep_embedder.{other}.{kind}"] = s[f"time.{mine}.{kind}"]
        model.transformer_blocks[i].norm1.emb.time_proj.downscale_freq_shift = 0
    model.load_state_dict(weights)
    model.pos_embed.pos_embed.copy_(s["places"])
    return model.eval()


@torch.no_grad()
def test_parity_with_the_reference_implementation() -> None:
    ours = micro(in_channels=3, classes=5, qk_norm=False, width=32, heads=4)
    x, t, labels = randn(2, 3, 8, 8), torch.tensor([3.0, 741.0]), torch.tensor([5, 1])
    wanted = assert_parity(
        lambda ours, _, x, t: ours(x, t, Cond(labels=labels)),
        lambda _, model, x, t: model(x, timestep=t, class_labels=labels).sample,
        ours, reference(ours), x, t,
    )  # fmt: skip
    assert wanted.std() > 0.1


@pytest.mark.parametrize("classes", [0, 3])
def test_checkpointing_changes_no_bit(classes: int) -> None:
    network = micro(classes=classes).train()
    x, t, cond = randn(2, 1, 8, 8), torch.tensor([10.0, 900.0]), Cond(labels=torch.tensor([0, 3]))
    found = []
    for network.checkpointing in (False, True):
        network.zero_grad()
        loss = network(x, t, cond).square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@torch.no_grad()
def test_no_labels_mean_no_class() -> None:
    network, x, t = micro(classes=3), randn(2, 1, 8, 8), torch.tensor([5.0, 5.0])
    none = network(x, t, Cond())
    assert torch.equal(none, network(x, t, Cond(labels=torch.tensor([3, 3]))))
    assert not torch.equal(none, network(x, t, Cond(labels=torch.tensor([0, 3]))))


def test_sizes_that_fit() -> None:
    config = DiTConfig(in_channels=4, rows=8, columns=16)
    config.check((4, 8, 16))
    for shape in [(4, 16, 8), (3, 8, 16), (4, 8), ()]:
        with pytest.raises(ValueError, match=r"^this dit takes \(4, 8, 16\), got \("):
            config.check(shape)
    assert DiTConfig(size="B", depth=3).sizes == (768, 3, 12)


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "width: 192 is no multiple of heads = 5": {"heads": 5},
    "width: 36 is no multiple of heads = 8": {"width": 36, "heads": 8},
    "width: must be a multiple of 4, got 30": {"width": 30, "heads": 3},
    "patch: 3 does not divide rows = 28, columns = 28": {"patch": 3},
    "patch: 4 does not divide rows = 28, columns = 30": {"patch": 4, "columns": 30},
}


@pytest.mark.parametrize(("message", "sizes"), IMPOSSIBLE.items(), ids=list(IMPOSSIBLE))
def test_an_impossible_config_gets_one_line(message: str, sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        DiTConfig(**sizes)
    assert str(caught.value) == message
