"""The autoencoder's names: Stability's (LDM), and diffusers' AutoencoderKL, then and now."""

from collections.abc import Iterator
from typing import NamedTuple

from minidiffusion.checkpoints.rename import Table, conv, within
from minidiffusion.models import AutoencoderConfig


class Names(NamedTuple):
    """One dialect. Places hold {level}, {depth}, {k}: see `places`."""

    top: Table
    block: Table
    attention: Table
    places: dict[str, str]


LDM = Names(
    top={
        "encoder.enter": "encoder.conv_in",
        "encoder.norm": "encoder.norm_out",
        "encoder.leave": "encoder.conv_out",
        "decoder.enter": "decoder.conv_in",
        "decoder.norm": "decoder.norm_out",
        "decoder.leave": "decoder.conv_out",
        "quant": "quant_conv",
        "post_quant": "post_quant_conv",
    },
    block={
        "norm1": "norm1",
        "conv1": "conv1",
        "norm2": "norm2",
        "conv2": "conv2",
        "skip": "nin_shortcut",
    },
    attention={
        "norm": "norm",
        "attention.q": conv("q"),
        "attention.kv": conv("k", "v"),
        "attention.out": conv("proj_out"),
    },
    places={
        "down.block": "encoder.down.{level}.block.{k}",
        "down.resize": "encoder.down.{level}.downsample.conv",
        "middle.0": "{side}.mid.block_1",
        "middle.1": "{side}.mid.attn_1",
        "middle.2": "{side}.mid.block_2",
        "up.block": "decoder.up.{level}.block.{k}",
        "up.resize": "decoder.up.{level}.upsample.conv",
    },
)
DIFFUSERS = Names(
    top=dict(LDM.top) | {
        "encoder.norm": "encoder.conv_norm_out",
        "decoder.norm": "decoder.conv_norm_out",
    },
    block=dict(LDM.block) | {"skip": "conv_shortcut"},
    attention={
        "norm": "group_norm",
        "attention.q": "to_q",
        "attention.kv": ("to_k", "to_v"),
        "attention.out": "to_out.0",
    },
    places={
        "down.block": "encoder.down_blocks.{level}.resnets.{k}",
        "down.resize": "encoder.down_blocks.{level}.downsamplers.0.conv",
        "middle.0": "{side}.mid_block.resnets.0",
        "middle.1": "{side}.mid_block.attentions.0",
        "middle.2": "{side}.mid_block.resnets.1",
        "up.block": "decoder.up_blocks.{depth}.resnets.{k}",
        "up.resize": "decoder.up_blocks.{depth}.upsamplers.0.conv",
    },
)  # fmt: skip
FORMER = DIFFUSERS._replace(
    attention={
        "norm": "group_norm",
        "attention.q": "query",
        "attention.kv": ("key", "value"),
        "attention.out": "proj_attn",
    }
)
"""diffusers' before 0.18; most published files still have these names."""
DIALECTS = {"ldm": LDM, "diffusers": DIFFUSERS, "diffusers-former": FORMER}


def table(config: AutoencoderConfig, dialect: str) -> Table:
    """Every row of an autoencoder of this config."""
    names = DIALECTS[dialect]
    rows = dict(names.top)
    for ours, what, numbers in places(config):
        theirs = names.places[what].format(**numbers)
        if what.endswith("resize"):
            rows[ours] = theirs
        else:
            leaves = names.attention if what == "middle.1" else names.block
            rows |= within(f"{ours}.", f"{theirs}.", leaves)
    return rows


def places(c: AutoencoderConfig) -> Iterator[tuple[str, str, dict[str, int | str]]]:
    """(our name, what stands there, numbers).

    level counts from the finest resolution, depth from where a way begins, k a level's blocks.
    """
    levels, row = len(c.multipliers), 0
    for level in range(levels):
        for k in range(c.blocks):
            yield f"encoder.down.{row}", "down.block", {"level": level, "k": k}
            row += 1
        if level < levels - 1:
            yield f"encoder.down.{row}.conv", "down.resize", {"level": level}
            row += 1
    for side in ("encoder", "decoder"):
        for place in range(3):
            yield f"{side}.middle.{place}", f"middle.{place}", {"side": side}
    row = 0
    for depth in range(levels):
        numbers: dict[str, int | str] = {"level": levels - 1 - depth, "depth": depth}
        for k in range(c.blocks + 1):
            yield f"decoder.up.{row}", "up.block", {**numbers, "k": k}
            row += 1
        if depth < levels - 1:
            yield f"decoder.up.{row}.conv", "up.resize", numbers
            row += 1
