"""A network's config as the shapes of its weights tell it; for what they cannot tell, the usual."""

import math
from collections.abc import Callable, Iterator, Mapping

from minidiffusion.checkpoints.rename import Shape, Theirs
from minidiffusion.checkpoints.tables import autoencoder, clip, mmdit, t5, unet

Shapes = Mapping[str, Shape]
SCALES = {16: (1.5305, 0.0609)}
"""Scale and shift of the latents of Stable Diffusion 3; else 0.18215 and 0."""
SDXL_SCALE = 0.13025
SD2_LAYERS = 24


def axis(shapes: Shapes, module: Theirs, number: int, leaf: str = "weight") -> int:
    """The length of one axis of a module's weight."""
    name = f"{module}.{leaf}" if leaf else str(module)
    if number >= len(shapes.get(name, ())):
        raise ValueError(f"{name}: missing, or not of the shape that such a weight has")
    return shapes[name][number]


def unet_sizes(shapes: Shapes, dialect: str, _: bool = False) -> dict[str, object]:
    """Heads: 8 where projections are convolutions (Stable Diffusion 1), else 64 wide (2, XL)."""
    names = unet.DIALECTS[dialect]
    channels = axis(shapes, names.top["enter"], 0)
    levels = list(walk(shapes, names.places, f"{names.block['conv1']}"))
    width, depths = axis(shapes, names.top["enter"], 0), [depth for _, depth, _ in levels]
    middle = depth_of(shapes, names.places["middle.attention"])
    inner = next((n for n in shapes if n.endswith(".attn2.to_k.weight")), None)
    outer = next((n for n in shapes if n.endswith(".proj_in.weight")), None)
    if inner is None or outer is None:
        raise ValueError("a UNet that attends to no text: not one of Stable Diffusion's")
    linear = len(shapes[outer]) == 2
    pooled = f"{names.top['pooled.0']}.weight"
    return {
        "in_channels": axis(shapes, names.top["enter"], 1),
        "out_channels": axis(shapes, names.top["leave"], 0),
        "channels": channels,
        "multipliers": multiples(width, [level[0] for level in levels]),
        "blocks": even([count for _, _, count in levels]),
        "attention": tuple(depths),
        "middle_attention": middle,
        "context_width": axis(shapes, inner, 1, ""),
        "linear_projections": linear,
        "pooled_width": axis(shapes, pooled, 1, "") if pooled in shapes else None,
        **({"head_width": 64} if linear else {"heads": 8}),
    }


def walk(
    shapes: Shapes, places: Mapping[str, str], conv: str, row: int = 1
) -> Iterator[tuple[int, int, int]]:
    """(width, attention depth, blocks) of each level on the way down."""
    for level in range(len(shapes)):
        found, k = set(), 0
        while True:
            place = {"row": row, "level": level, "k": k}
            name = f"{places['down.block'].format(**place)}.{conv}.weight"
            if name not in shapes:
                break
            attention = places.get("down.attention", "").format(**place)
            found.add((axis(shapes, name, 0, ""), depth_of(shapes, attention)))
            row, k = row + 1, k + 1
        if len(found) != 1:
            raise ValueError(f"level {level}: its blocks are missing, or differ in size")
        yield (*found.pop(), k)
        if f"{places['down.resize'].format(row=row, level=level)}.weight" not in shapes:
            return
        row += 1


def depth_of(shapes: Shapes, place: str) -> int:
    depth = 0
    while f"{place}.transformer_blocks.{depth}.norm1.weight" in shapes:
        depth += 1
    return depth


def multiples(channels: int, widths: list[int]) -> tuple[int, ...]:
    if channels < 1 or any(width % channels or not width for width in widths):
        raise ValueError(
            f"block_out_channels: levels of {widths} channels: not multiples of {channels}"
        )
    return tuple(width // channels for width in widths)


def even(counts: list[int]) -> int:
    if len(set(counts)) != 1:
        raise ValueError(f"layers_per_block: levels of {counts} blocks: they must be equal")
    return counts[0]


def autoencoder_sizes(shapes: Shapes, dialect: str, _: bool = False) -> dict[str, object]:
    names = autoencoder.DIALECTS[dialect]
    channels = axis(shapes, names.top["encoder.enter"], 0)
    levels = list(walk(shapes, names.places, f"{names.block['conv1']}"))
    latent = axis(shapes, names.top["decoder.enter"], 1)
    scale, shift = SCALES.get(latent, (0.18215, 0.0))
    return {
        "channels": channels,
        "multipliers": multiples(channels, [width for width, _, _ in levels]),
        "blocks": even([count for _, _, count in levels]),
        "latent_channels": latent,
        "picture_channels": axis(shapes, names.top["encoder.enter"], 1),
        "scale": scale,
        "shift": shift,
        "quant": f"{names.top['quant']}.weight" in shapes,
    }


def clip_sizes(shapes: Shapes, dialect: str, sdxl: bool = False) -> dict[str, object]:
    """Heads are 64 wide. Up to 768 features transformers' names mean OpenAI's activation.

    A whole OpenCLIP encoder is taken for Stable Diffusion 2's, which does without its last layer
    and its projection, unless it lies where Stable Diffusion XL keeps it.
    """
    if dialect == "openclip":
        return openclip_sizes(shapes, sdxl)
    inner = clip.INNER[dialect]
    width = axis(shapes, f"{inner}embeddings.token_embedding", 1)
    layers = count(shapes, f"{inner}encoder.layers.{{}}.layer_norm1.weight")
    projected = "text_projection.weight" in shapes
    return {
        "vocabulary": axis(shapes, f"{inner}embeddings.token_embedding", 0),
        "positions": axis(shapes, f"{inner}embeddings.position_embedding", 0),
        "width": width,
        "layers": layers,
        "heads": max(1, width // 64),
        "feed_forward": axis(shapes, f"{inner}encoder.layers.0.mlp.fc1", 0),
        "activation": "quick_gelu" if width <= 768 else "gelu",
        "projection": axis(shapes, "text_projection", 0) if projected else None,
    }


def openclip_sizes(shapes: Shapes, sdxl: bool) -> dict[str, object]:
    width = axis(shapes, "token_embedding", 1)
    layers = count(shapes, "transformer.resblocks.{}.ln_1.weight")
    whole = "text_projection" in shapes or layers == SD2_LAYERS
    return {
        "vocabulary": axis(shapes, "token_embedding", 0),
        "positions": axis(shapes, "positional_embedding", 0, ""),
        "width": width,
        "layers": layers - 1 if whole and not sdxl and layers > 1 else layers,
        "heads": max(1, width // 64),
        "feed_forward": axis(shapes, "transformer.resblocks.0.mlp.c_fc", 0),
        "activation": "gelu",
        "projection": axis(shapes, "text_projection", 1, "") if sdxl else None,
        "skip": 1 if sdxl and layers > 1 else 0,
        "final_norm": not sdxl,
    }


def count(shapes: Shapes, pattern: str) -> int:
    found = 0
    while pattern.format(found) in shapes:
        found += 1
    return found


QUERIES = {
    "ldm": ("x_block.attn.qkv", "x_block.attn2.qkv", "x_block.attn.ln_q"),
    "diffusers": ("attn.to_q", "attn2.to_q", "attn.norm_q"),
}
"""Of the picture, in a block: the attention's, the second attention's, and their norm."""


def mmdit_sizes(shapes: Shapes, dialect: str, _: bool = False) -> dict[str, object]:
    """Heads are 64 wide, unless the norms of queries say how wide."""
    top, place = mmdit.DIALECTS[dialect][:2]
    first, second, norm = (f"{place}{name}.weight" for name in QUERIES[dialect])
    width, norm = axis(shapes, top["enter"], 0), norm.format(0)
    head = axis(shapes, norm, 0, "") if norm in shapes else 64
    depth = count(shapes, first)
    twice = [k for k in range(depth) if second.format(k) in shapes]
    if twice != list(range(len(twice))):
        raise ValueError(
            f"dual_attention_layers: {twice} attend twice; only the first layers may, such as "
            f"{list(range(len(twice)))}"
        )
    return {
        "in_channels": axis(shapes, top["enter"], 1),
        "width": width,
        "depth": depth,
        "heads": max(1, width // max(1, head)),
        "patch": axis(shapes, top["enter"], 2),
        "grid": math.isqrt(axis(shapes, top["places"], 1, "")),
        "context_width": axis(shapes, top["context"], 1),
        "pooled_width": axis(shapes, top["pooled.0"], 1),
        "qk_norm": norm in shapes,
        "second_attention": len(twice),
    }


def t5_sizes(shapes: Shapes, dialect: str, _: bool = False) -> dict[str, object]:
    first = "encoder.block.0.layer"
    bias = f"{first}.0.SelfAttention.relative_attention_bias"
    heads = axis(shapes, bias, 1)
    if f"{first}.1.DenseReluDense.wi.weight" in shapes:
        raise ValueError("feed_forward_proj: of T5 1.0, without gates: not supported, 1.1 is")
    return {
        "vocabulary": axis(shapes, t5.DIALECTS[dialect], 0),
        "width": axis(shapes, t5.DIALECTS[dialect], 1),
        "layers": count(shapes, "encoder.block.{}.layer.0.SelfAttention.q.weight"),
        "heads": heads,
        "head_width": axis(shapes, f"{first}.0.SelfAttention.q", 0) // max(1, heads),
        "feed_forward": axis(shapes, f"{first}.1.DenseReluDense.wi_0", 0),
        "buckets": axis(shapes, bias, 0),
    }


SIZES: dict[str, Callable[[Shapes, str, bool], dict[str, object]]] = {
    "unet": unet_sizes,
    "mmdit": mmdit_sizes,
    "autoencoder": autoencoder_sizes,
    "clip": clip_sizes,
    "t5": t5_sizes,
}
