"""The UNet against the reference implementation, weight for weight, and against SD 1.5's layout."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from faults import assert_faults_are_found
from rounding import assert_parity
from torch import Tensor, nn

from minidiffusion.models import UNet, UNetConfig
from minidiffusion.shapes import Cond

RES = {"embed": "time_emb_proj", "skip": "conv_shortcut"}
PLAIN = {"norm": "group_norm", "attention.q": "to_q", "attention.out": "to_out.0"}
SPATIAL = {"enter": "proj_in", "leave": "proj_out"}
WITHIN = {
    "self_attention.q": "attn1.to_q",
    "self_attention.out": "attn1.to_out.0",
    "cross_attention.q": "attn2.to_q",
    "cross_attention.out": "attn2.to_out.0",
    "feed_forward.enter": "ff.net.0.proj",
    "feed_forward.leave": "ff.net.2",
}
TOP = {
    "time.first": "time_embedding.linear_1",
    "time.second": "time_embedding.linear_2",
    "labels.table": "class_embedding",
    "enter": "conv_in",
    "norm": "conv_norm_out",
    "leave": "conv_out",
}


def places(c: UNetConfig) -> Iterator[tuple[str, str, int]]:
    """(our stage, the reference's block, number within the block)."""
    levels, row = len(c.multipliers), 0
    for level in range(levels):
        for k in range(c.blocks):
            yield f"down.{row}", f"down_blocks.{level}", k
            row += 1
        if level < levels - 1:
            yield f"down.{row}.conv", f"down_blocks.{level}.downsamplers.0.conv", -1
            row += 1
    yield from (("middle.0", "mid_block", 0), ("middle.1", "mid_block", 1))
    for level in range(levels):
        for k in range(c.blocks + 1):
            yield f"up.{level * (c.blocks + 1) + k}", f"up_blocks.{level}", k


def theirs(c: UNetConfig, key: str) -> str:
    """The reference's name of one of our modules."""
    if key in TOP:
        return TOP[key]
    ours, block, k = next(p for p in places(c) if key == p[0] or key.startswith(p[0] + "."))
    rest = key.removeprefix(ours + ".")
    if k < 0:
        return block
    if rest == "upsample.conv":
        return f"{block}.upsamplers.0.conv"
    part, _, rest = rest.partition(".")
    if part == "block":
        return f"{block}.resnets.{k}.{RES.get(rest, rest)}"
    place = f"{block}.attentions.{k}."
    if c.context_width is None:
        return place + PLAIN.get(rest, rest)
    if rest.startswith("blocks."):
        _, number, rest = rest.split(".", 2)
        return f"{place}transformer_blocks.{number}.{WITHIN.get(rest, rest)}"
    return place + SPATIAL.get(rest, rest)


def copied(reference: nn.Module, ours: UNet) -> UNet:
    """Ours with the reference's weights; every one of them is used exactly once."""
    left = dict(reference.state_dict())
    weights = {}
    for name in ours.state_dict():
        key, kind = name.rsplit(".", 1)
        if key.endswith(".kv"):
            place = theirs(ours.config, key.removesuffix("kv") + "q").removesuffix("q")
            weights[name] = torch.cat([left.pop(f"{place}{part}.{kind}") for part in "kv"])
        else:
            weights[name] = left.pop(f"{theirs(ours.config, key)}.{kind}")
    assert not left
    ours.load_state_dict(weights)
    return ours.eval()


@torch.no_grad()
def shaken(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight random, none of the zeros that a fresh network starts with."""
    draw = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        fan = p[0].numel() if p.ndim > 1 else 4
        p.copy_(torch.randn(p.shape, generator=draw) / fan**0.5)
        if p.ndim == 1 and name.endswith("weight"):
            p.add_(1)
    return network.eval()


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SMALL: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_num_groups": 8,
    "norm_eps": 1e-5,
}
UNCONDITIONAL = {
    "plain": ({}, {}),
    "classes": ({"num_class_embeds": 5}, {"classes": 4}),
    "scale and shift": (
        {
            "num_class_embeds": 5,
            "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 8,
        },
        {"classes": 4, "scale_shift": True},
    ),
    "attention everywhere, two blocks": (
        {
            "down_block_types": ("AttnDownBlock2D",) * 2,
            "up_block_types": ("AttnUpBlock2D",) * 2,
            "layers_per_block": 2,
        },
        {"attention": (1, 1), "blocks": 2},
    ),
}


@pytest.mark.parametrize(
    ("theirs_too", "ours_too"), UNCONDITIONAL.values(), ids=list(UNCONDITIONAL)
)
@torch.no_grad()
def test_parity_of_the_unconditional_unet(
    theirs_too: dict[str, Any], ours_too: dict[str, Any]
) -> None:
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    kwargs = {**SMALL, **blocks, "attention_head_dim": 8, **theirs_too}
    reference = shaken(UNet2DModel(**kwargs))
    sizes: dict[str, Any] = {"in_channels": 3, "channels": 32, "groups": 8, "blocks": 1}
    ours = copied(reference, UNet(UNetConfig(**{**sizes, "head_width": 8, **ours_too})))
    x, t = randn(2, 3, 16, 16), torch.tensor([3.25, 741.125])
    labels = torch.tensor([4, 1]) if ours.labels else None
    wanted = assert_parity(
        lambda ours, _, x, t: ours(x, t, Cond(labels=labels)),
        lambda _, reference, x, t: reference(x, t, class_labels=labels).sample,
        ours, reference, x, t,
    )  # fmt: skip
    assert wanted.std() > 0.1


def conditional(
    head: int | tuple[int, int], ours_too: dict[str, Any], linear: bool
) -> tuple[UNet, nn.Module]:
    """Ours and the reference with one set of weights."""
    reference = shaken(
        UNet2DConditionModel(
            **SMALL,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=head,
            cross_attention_dim=24,
            use_linear_projection=linear,
        )
    )
    config = UNetConfig(
        in_channels=3, channels=32, groups=8, blocks=1, attention=(1, 0), context_width=24,
        linear_projections=linear, **ours_too,
    )  # fmt: skip
    return copied(reference, UNet(config)), reference


def assert_same(ours: nn.Module, reference: nn.Module, check: Any = assert_parity) -> Any:
    return check(
        lambda ours, _, x, t, tokens: ours(x, t, Cond(tokens=tokens)),
        lambda _, reference, x, t, tokens: reference(x, t, tokens).sample,
        ours, reference, randn(2, 3, 16, 16), torch.tensor([3.25, 741.125]), randn(2, 7, 24),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("head", "ours_too", "linear"),
    [(2, {"heads": 2}, False), ((4, 8), {"head_width": 8}, True)],
    ids=["SD 1: so many heads, convolutions", "SD 2: heads so wide, linear layers"],
)
@torch.no_grad()
def test_parity_of_the_conditional_unet(
    head: int | tuple[int, int], ours_too: dict[str, Any], linear: bool
) -> None:
    """The reference calls the number of heads attention_head_dim, and has to keep doing so."""
    ours, reference = conditional(head, ours_too, linear)
    assert assert_same(ours, reference).std() > 0.1


def test_a_fault_of_one_part_in_10000_is_found() -> None:
    assert_same(*conditional(2, {"heads": 2}, False), assert_faults_are_found)


@pytest.fixture(scope="module")
def sd15() -> UNet:
    with torch.device("meta"):
        return UNet(
            UNetConfig(
                in_channels=4, channels=320, multipliers=(1, 2, 4, 4), blocks=2,
                attention=(1, 1, 1, 0), heads=8, context_width=768,
            )
        )  # fmt: skip


def test_every_shape_of_stable_diffusion(sd15: UNet) -> None:
    """The official 686 tensors and ours are the same but for the 32 pairs of k and v that we fuse:
    16 transformers attend twice each, and none of the four has a bias."""
    file = Path(__file__).parent / "data" / "sd15_unet.json"
    official = Counter(tuple(shape) for shape in json.loads(file.read_text()).values())
    assert official.total() == 686
    ours: Counter[tuple[int, ...]] = Counter()
    fused = 0
    for name, p in sd15.state_dict().items():
        parts = p.chunk(2) if name.endswith(".kv.weight") else (p,)
        fused += len(parts) - 1
        ours.update(tuple(part.shape) for part in parts)
    assert fused == 32
    assert ours == official
    assert sum(p.numel() for p in sd15.parameters()) == 859_520_964


def micro(**sizes: Any) -> UNet:
    usual: dict[str, Any] = {"channels": 8, "groups": 4, "blocks": 1, "heads": 2}
    return shaken(UNet(UNetConfig(**{**usual, **sizes})))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "sizes",
    [{"classes": 3}, {"classes": 3, "dropout": 0.5}, {"context_width": 6}],
    ids=["classes", "dropout", "tokens"],
)
def test_checkpointing_changes_no_bit(sizes: dict[str, Any]) -> None:
    network = micro(**sizes).train()
    x, t = randn(2, 1, 8, 8), torch.tensor([10.0, 900.0])
    tokens = randn(2, 5, 6) if "context_width" in sizes else None
    cond = Cond(labels=torch.tensor([0, 3]), tokens=tokens)
    found = []
    for network.checkpointing in (False, True):
        network.zero_grad()
        torch.manual_seed(0)  # of the dropout, which the recomputation has to draw again
        loss = network(x, t, cond).square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@torch.no_grad()
def test_a_fresh_network_says_nothing() -> None:
    network = UNet(UNetConfig(channels=8, groups=4, patch=2, classes=3))
    assert not network(randn(2, 1, 8, 8), torch.ones(2), Cond()).any()


@torch.no_grad()
def test_no_labels_mean_no_class() -> None:
    network, x, t = micro(classes=3), randn(2, 1, 8, 8), torch.tensor([5.0, 5.0])
    none = network(x, t, Cond())
    assert torch.equal(none, network(x, t, Cond(labels=torch.tensor([3, 3]))))
    assert not torch.equal(none, network(x, t, Cond(labels=torch.tensor([0, 3]))))


@torch.no_grad()
def test_channels_laid_beside_the_input() -> None:
    """Inpainting's nine channels: four noised, a mask, four of the masked picture."""
    network = micro(in_channels=9, out_channels=4)
    x, extra, t = randn(2, 4, 8, 8), randn(2, 5, 8, 8, seed=2), torch.ones(2)
    found = network(x, t, Cond(concat=extra))
    assert found.shape == (2, 4, 8, 8)
    assert torch.equal(found, network(torch.cat([x, extra], 1), t, Cond()))
    assert not torch.equal(found, network(x, t, Cond(concat=-extra)))


@torch.no_grad()
def test_a_pooled_vector_is_added_where_it_is_given() -> None:
    network, x, t = micro(pooled_width=5), randn(2, 1, 8, 8), torch.ones(2)
    pooled = randn(2, 5)
    assert not torch.equal(network(x, t, Cond(pooled=pooled)), network(x, t, Cond()))


@torch.no_grad()
def test_patches_are_channels_of_a_smaller_picture() -> None:
    folded, inside = micro(in_channels=2, patch=2), micro(in_channels=8)
    inside.load_state_dict(folded.state_dict())
    x, t = randn(2, 2, 8, 12), torch.ones(2)
    wanted = inside(nn.functional.pixel_unshuffle(x, 2), t, Cond())
    found = folded(x, t, Cond())
    assert found.shape == x.shape
    assert torch.equal(found, nn.functional.pixel_shuffle(wanted, 2))


@pytest.mark.parametrize("multipliers", [(2,), (2, 1), (1, 1, 3), (3, 2, 1)])
@torch.no_grad()
def test_any_widths_fit_together(multipliers: tuple[int, ...]) -> None:
    network = micro(multipliers=multipliers, attention=(1,) * len(multipliers))
    x = randn(1, 1, 8, 8)
    assert network(x, torch.ones(1), Cond()).shape == x.shape


def test_sizes_that_fit() -> None:
    config = UNetConfig(channels=32, multipliers=(1, 2, 2), attention=(0, 0, 1), patch=2)
    for shape in [(1, 8, 16), (1, 28, 30)]:
        config.check(shape)
    for shape in [(1, 8, 9), (3, 8, 8), (8, 8), (1, 8, 8, 1), (1, 0, 8)]:
        with pytest.raises(ValueError, match=r"^this unet takes \(1, rows, .* multiples of 2, got"):
            config.check(shape)


@pytest.mark.parametrize("size", [(9, 5), (7, 8), (1, 3)])
@torch.no_grad()
def test_halves_of_odd_sizes_come_back_whole(size: tuple[int, int]) -> None:
    network, x = micro(multipliers=(1, 1, 1), attention=(0, 1, 1)), randn(1, 1, *size)
    assert network(x, torch.ones(1), Cond()).shape == x.shape
    network.checkpointing = True
    with torch.enable_grad():
        assert torch.equal(network(x, torch.ones(1), Cond()), micro_again(network, x))


def micro_again(network: UNet, x: torch.Tensor) -> torch.Tensor:
    network.checkpointing = False
    return network(x, torch.ones(1), Cond())


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "one depth a level": {"multipliers": (1, 2, 4)},
    "multiple of groups": {"channels": 24},
    "1 to 16 levels": {"multipliers": (), "attention": ()},
    "0 is no multiple of groups": {"multipliers": (1, 0)},
    "-32 is no multiple of groups": {"channels": 32, "multipliers": (1, -1)},
    "cannot be split into 5 equal heads": {"heads": 5},
    "128 channels cannot be split into heads of 256": {"head_width": 256},
    "192 channels cannot be split into heads of 40": {"head_width": 40, "channels": 96},
    "must be even": {"channels": 3, "groups": 1, "heads": 1},
}


@pytest.mark.parametrize(("message", "sizes"), IMPOSSIBLE.items(), ids=list(IMPOSSIBLE))
def test_an_impossible_config_gets_one_line(message: str, sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught, torch.device("meta"):
        UNetConfig(**sizes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
