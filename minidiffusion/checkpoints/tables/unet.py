"""The UNet's names: Stability's single files (LDM), and diffusers' UNet2DConditionModel."""

from collections.abc import Iterator
from typing import NamedTuple

from minidiffusion.checkpoints.rename import Table, repeated, within
from minidiffusion.models import UNetConfig


class Names(NamedTuple):
    """One dialect. Places hold {row}, {level}, {k}, {last}: see `places`."""

    top: Table
    block: Table
    places: dict[str, str]


TRANSFORMER: Table = {"norm": "norm", "enter": "proj_in", "leave": "proj_out"}
WITHIN: Table = {
    "blocks.{}.norm1": "transformer_blocks.{}.norm1",
    "blocks.{}.self_attention.q": "transformer_blocks.{}.attn1.to_q",
    "blocks.{}.self_attention.kv": (
        "transformer_blocks.{}.attn1.to_k",
        "transformer_blocks.{}.attn1.to_v",
    ),
    "blocks.{}.self_attention.out": "transformer_blocks.{}.attn1.to_out.0",
    "blocks.{}.norm2": "transformer_blocks.{}.norm2",
    "blocks.{}.cross_attention.q": "transformer_blocks.{}.attn2.to_q",
    "blocks.{}.cross_attention.kv": (
        "transformer_blocks.{}.attn2.to_k",
        "transformer_blocks.{}.attn2.to_v",
    ),
    "blocks.{}.cross_attention.out": "transformer_blocks.{}.attn2.to_out.0",
    "blocks.{}.norm3": "transformer_blocks.{}.norm3",
    "blocks.{}.feed_forward.enter": "transformer_blocks.{}.ff.net.0.proj",
    "blocks.{}.feed_forward.leave": "transformer_blocks.{}.ff.net.2",
}
"""Both dialects name the transformer alike."""

LDM = Names(
    top={
        "time.first": "time_embed.0",
        "time.second": "time_embed.2",
        "pooled.0": "label_emb.0.0",
        "pooled.2": "label_emb.0.2",
        "enter": "input_blocks.0.0",
        "norm": "out.0",
        "leave": "out.2",
    },
    block={
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "embed": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
    },
    places={
        "down.block": "input_blocks.{row}.0",
        "down.attention": "input_blocks.{row}.1",
        "down.resize": "input_blocks.{row}.0.op",
        "middle.first": "middle_block.0",
        "middle.attention": "middle_block.1",
        "middle.second": "middle_block.2",
        "up.block": "output_blocks.{row}.0",
        "up.attention": "output_blocks.{row}.1",
        "up.resize": "output_blocks.{row}.{last}.conv",
    },
)
DIFFUSERS = Names(
    top={
        "time.first": "time_embedding.linear_1",
        "time.second": "time_embedding.linear_2",
        "pooled.0": "add_embedding.linear_1",
        "pooled.2": "add_embedding.linear_2",
        "enter": "conv_in",
        "norm": "conv_norm_out",
        "leave": "conv_out",
    },
    block={
        "norm1": "norm1",
        "conv1": "conv1",
        "embed": "time_emb_proj",
        "norm2": "norm2",
        "conv2": "conv2",
        "skip": "conv_shortcut",
    },
    places={
        "down.block": "down_blocks.{level}.resnets.{k}",
        "down.attention": "down_blocks.{level}.attentions.{k}",
        "down.resize": "down_blocks.{level}.downsamplers.0.conv",
        "middle.first": "mid_block.resnets.0",
        "middle.attention": "mid_block.attentions.0",
        "middle.second": "mid_block.resnets.1",
        "up.block": "up_blocks.{level}.resnets.{k}",
        "up.attention": "up_blocks.{level}.attentions.{k}",
        "up.resize": "up_blocks.{level}.upsamplers.0.conv",
    },
)
DIALECTS = {"ldm": LDM, "diffusers": DIFFUSERS}


def table(config: UNetConfig, dialect: str) -> Table:
    """Every row of a UNet of this config; the structure is the config's, the names the dialect's.

    Ours are flat: down.{row} counts blocks and changes of size alike, as LDM does from 1 on.
    """
    names = DIALECTS[dialect]
    rows = dict(names.top)
    for ours, what, depth, numbers in places(config):
        theirs = names.places[what].format(**numbers)
        if what.endswith("resize"):
            rows[ours] = theirs
        elif what.endswith("attention"):
            rows |= within(f"{ours}.", f"{theirs}.", {**TRANSFORMER, **repeated(WITHIN, depth)})
        else:
            rows |= within(f"{ours}.", f"{theirs}.", names.block)
    return rows


def places(c: UNetConfig) -> Iterator[tuple[str, str, int, dict[str, int]]]:
    """(our name, what stands there, attention depth, numbers) of every stage.

    row counts the stages of a way, level its resolutions in its own order, k the blocks of a level;
    last is the place of what follows a block and its attention.
    """
    row = 0
    for level, depth in enumerate(c.attention):
        for k in range(c.blocks):
            numbers = {"row": row + 1, "level": level, "k": k}
            yield f"down.{row}.block", "down.block", 0, numbers
            if depth:
                yield f"down.{row}.attention", "down.attention", depth, numbers
            row += 1
        if level < len(c.attention) - 1:
            yield f"down.{row}.conv", "down.resize", 0, {"row": row + 1, "level": level}
            row += 1
    yield "middle.0.block", "middle.first", 0, {}
    if c.middle_attention:
        yield "middle.0.attention", "middle.attention", c.middle_attention, {}
    yield "middle.1.block", "middle.second", 0, {}
    row = 0
    for level, depth in enumerate(reversed(c.attention)):
        for k in range(c.blocks + 1):
            numbers = {"row": row, "level": level, "k": k, "last": 2 if depth else 1}
            yield f"up.{row}.block", "up.block", 0, numbers
            if depth:
                yield f"up.{row}.attention", "up.attention", depth, numbers
            if k == c.blocks and level < len(c.attention) - 1:
                yield f"up.{row}.upsample.conv", "up.resize", 0, numbers
            row += 1
