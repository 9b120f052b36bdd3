"""The MMDiT's names: Stability's single files (LDM), and diffusers' SD3Transformer2DModel."""

from minidiffusion.checkpoints.rename import Table, repeated, swapped, within
from minidiffusion.models import MMDiTConfig

LDM: Table = {
    "places": "pos_embed",
    "enter": "x_embedder.proj",
    "time.first": "t_embedder.mlp.0",
    "time.second": "t_embedder.mlp.2",
    "pooled.0": "y_embedder.mlp.0",
    "pooled.2": "y_embedder.mlp.2",
    "context": "context_embedder",
    "modulation.linear": "final_layer.adaLN_modulation.1",
    "leave": "final_layer.linear",
}
LDM_STREAM: Table = {
    "modulations.linear": "adaLN_modulation.1",
    "attention.qkv": "attn.qkv",
    "attention.q_norm": "attn.ln_q",
    "attention.k_norm": "attn.ln_k",
    "attention.out": "attn.proj",
    "second.qkv": "attn2.qkv",
    "second.q_norm": "attn2.ln_q",
    "second.k_norm": "attn2.ln_k",
    "second.out": "attn2.proj",
    "enter": "mlp.fc1",
    "leave": "mlp.fc2",
}
LDM_BLOCK = {
    **within("text.", "context_block.", LDM_STREAM),
    **within("picture.", "x_block.", LDM_STREAM),
}
DIFFUSERS: Table = {
    "places": "pos_embed.pos_embed",
    "enter": "pos_embed.proj",
    "time.first": "time_text_embed.timestep_embedder.linear_1",
    "time.second": "time_text_embed.timestep_embedder.linear_2",
    "pooled.0": "time_text_embed.text_embedder.linear_1",
    "pooled.2": "time_text_embed.text_embedder.linear_2",
    "context": "context_embedder",
    "modulation.linear": swapped("norm_out.linear"),
    "leave": "proj_out",
}
DIFFUSERS_BLOCK: Table = {
    "text.modulations.linear": "norm1_context.linear",
    "text.attention.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "text.attention.q_norm": "attn.norm_added_q",
    "text.attention.k_norm": "attn.norm_added_k",
    "text.attention.out": "attn.to_add_out",
    "text.enter": "ff_context.net.0.proj",
    "text.leave": "ff_context.net.2",
    "picture.modulations.linear": "norm1.linear",
    "picture.attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "picture.attention.q_norm": "attn.norm_q",
    "picture.attention.k_norm": "attn.norm_k",
    "picture.attention.out": "attn.to_out.0",
    "picture.second.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "picture.second.q_norm": "attn2.norm_q",
    "picture.second.k_norm": "attn2.norm_k",
    "picture.second.out": "attn2.to_out.0",
    "picture.enter": "ff.net.0.proj",
    "picture.leave": "ff.net.2",
}
DIALECTS = {
    "ldm": (LDM, "joint_blocks.{}.", LDM_BLOCK),
    "diffusers": (DIFFUSERS, "transformer_blocks.{}.", DIFFUSERS_BLOCK),
}
"""The rows around the blocks, where a block lies, and its rows."""


def table(config: MMDiTConfig, dialect: str) -> Table:
    """Every row of an MMDiT of this config."""
    top, place, block = DIALECTS[dialect]
    rows = {**top, **repeated(within("blocks.{}.", place, block), config.depth)}
    if dialect == "diffusers":
        # Where nothing is gated, they scale before they shift.
        last = f"{config.depth - 1}."
        ours, theirs = "text.modulations.linear", swapped("norm1_context.linear")
        rows |= within(f"blocks.{last}", f"transformer_blocks.{last}", {ours: theirs})
    return rows
