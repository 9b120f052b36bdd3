"""T5's names: transformers' T5EncoderModel, whose table of tokens goes by two names."""

from minidiffusion.checkpoints.rename import Table, repeated
from minidiffusion.models import T5Config

DIALECTS = {"transformers": "encoder.embed_tokens", "transformers-shared": "shared"}
"""Where the table of tokens lies: Stability's own files, and what transformers writes."""
TOP: Table = {
    "places": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "norm": "encoder.final_layer_norm",
}
BLOCK: Table = {
    "blocks.{}.norm1": "encoder.block.{}.layer.0.layer_norm",
    "blocks.{}.qkv": (
        "encoder.block.{}.layer.0.SelfAttention.q",
        "encoder.block.{}.layer.0.SelfAttention.k",
        "encoder.block.{}.layer.0.SelfAttention.v",
    ),
    "blocks.{}.out": "encoder.block.{}.layer.0.SelfAttention.o",
    "blocks.{}.norm2": "encoder.block.{}.layer.1.layer_norm",
    "blocks.{}.enter": (
        "encoder.block.{}.layer.1.DenseReluDense.wi_0",
        "encoder.block.{}.layer.1.DenseReluDense.wi_1",
    ),
    "blocks.{}.leave": "encoder.block.{}.layer.1.DenseReluDense.wo",
}


def table(config: T5Config, dialect: str) -> Table:
    """Every row of a text encoder of this config."""
    return {"tokens": DIALECTS[dialect], **TOP, **repeated(BLOCK, config.layers)}
