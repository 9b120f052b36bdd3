"""The text encoder's names: transformers' CLIPTextModel, and OpenCLIP's."""

from minidiffusion.checkpoints.rename import Table, repeated, transposed, within
from minidiffusion.models import CLIPConfig

TRANSFORMERS: Table = {
    "tokens": "embeddings.token_embedding",
    "places": "embeddings.position_embedding",
    "norm": "final_layer_norm",
}
TRANSFORMERS_BLOCK: Table = {
    "blocks.{}.norm1": "encoder.layers.{}.layer_norm1",
    "blocks.{}.attention.q": "encoder.layers.{}.self_attn.q_proj",
    "blocks.{}.attention.kv": (
        "encoder.layers.{}.self_attn.k_proj",
        "encoder.layers.{}.self_attn.v_proj",
    ),
    "blocks.{}.attention.out": "encoder.layers.{}.self_attn.out_proj",
    "blocks.{}.norm2": "encoder.layers.{}.layer_norm2",
    "blocks.{}.enter": "encoder.layers.{}.mlp.fc1",
    "blocks.{}.leave": "encoder.layers.{}.mlp.fc2",
}
OPENCLIP: Table = {
    "tokens": "token_embedding",
    "places.weight": "positional_embedding",
    "norm": "ln_final",
    "projection.weight": transposed("text_projection"),
}
OPENCLIP_BLOCK: Table = {
    "blocks.{}.norm1": "transformer.resblocks.{}.ln_1",
    ("blocks.{}.attention.q.weight", "blocks.{}.attention.kv.weight"): (
        "transformer.resblocks.{}.attn.in_proj_weight"
    ),
    ("blocks.{}.attention.q.bias", "blocks.{}.attention.kv.bias"): (
        "transformer.resblocks.{}.attn.in_proj_bias"
    ),
    "blocks.{}.attention.out": "transformer.resblocks.{}.attn.out_proj",
    "blocks.{}.norm2": "transformer.resblocks.{}.ln_2",
    "blocks.{}.enter": "transformer.resblocks.{}.mlp.c_fc",
    "blocks.{}.leave": "transformer.resblocks.{}.mlp.c_proj",
}
INNER = {"transformers": "text_model.", "transformers-bare": ""}
"""What stands before all names but the projection's."""


def table(config: CLIPConfig, dialect: str) -> Table:
    """Every row of a text encoder of this config."""
    if dialect == "openclip":
        return {**OPENCLIP, **repeated(OPENCLIP_BLOCK, config.layers)}
    inner = {**TRANSFORMERS, **repeated(TRANSFORMERS_BLOCK, config.layers)}
    return {**within("", INNER[dialect], inner), "projection": "text_projection"}
