"""Our configs as the JSON files of diffusers' and transformers' folders."""

from typing import Any

from minidiffusion.diffusion import RectifiedFlow, Target, VariancePreserving
from minidiffusion.models import (
    AutoencoderConfig,
    CLIPConfig,
    MMDiTConfig,
    T5Config,
    UNetConfig,
)

Config = UNetConfig | MMDiTConfig | AutoencoderConfig | CLIPConfig | T5Config
WORDS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
PIPELINES = {
    "": "StableDiffusionPipeline",
    "inpaint": "StableDiffusionInpaintPipeline",
    "depth": "StableDiffusionDepth2ImgPipeline",
}
CLASSES: dict[str, list[str | None]] = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
}
FLOW_CLASSES: dict[str, list[str | None]] = {
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
}
"""Of Stable Diffusion 3."""


def unet_config(c: UNetConfig, side: int) -> dict[str, Any]:
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in c.attention]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(c.attention)]
    heads = [w // c.head_width if c.head_width else c.heads for w in c.widths]
    config = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": heads if len(set(heads)) > 1 else heads[0],
        "block_out_channels": c.widths,
        "cross_attention_dim": c.context_width,
        "down_block_types": down,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": c.in_channels,
        "layers_per_block": c.blocks,
        "norm_eps": c.norm_eps,
        "norm_num_groups": c.groups,
        "out_channels": c.out_channels or c.in_channels,
        "sample_size": side,
        "up_block_types": up,
        "use_linear_projection": c.linear_projections,
    }
    depths = [depth or c.middle_attention for depth in c.attention]
    if set(depths) != {1}:
        config["transformer_layers_per_block"] = depths
    if c.pooled_width:
        config["addition_embed_type"] = "text_time"
        config["addition_time_embed_dim"] = 256
        config["projection_class_embeddings_input_dim"] = c.pooled_width
    return config


def mmdit_config(c: MMDiTConfig, side: int) -> dict[str, Any]:
    return {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": c.width // c.heads,
        "caption_projection_dim": c.width,
        "dual_attention_layers": list(range(c.second_attention)),
        "in_channels": c.in_channels,
        "joint_attention_dim": c.context_width,
        "num_attention_heads": c.heads,
        "num_layers": c.depth,
        "out_channels": c.in_channels,
        "patch_size": c.patch,
        "pooled_projection_dim": c.pooled_width,
        "pos_embed_max_size": c.grid,
        "qk_norm": "rms_norm" if c.qk_norm else None,
        "sample_size": side,
    }


def t5_config(c: T5Config) -> dict[str, Any]:
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": c.feed_forward,
        "d_kv": c.head_width,
        "d_model": c.width,
        "dense_act_fn": "gelu_new",
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": c.norm_eps,
        "model_type": "t5",
        "num_heads": c.heads,
        "num_layers": c.layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": c.distance,
        "relative_attention_num_buckets": c.buckets,
        "vocab_size": c.vocabulary,
    }


def autoencoder_config(c: AutoencoderConfig, side: int) -> dict[str, Any]:
    config = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": c.widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(c.widths),
        "in_channels": c.picture_channels,
        "latent_channels": c.latent_channels,
        "layers_per_block": c.blocks,
        "norm_num_groups": c.groups,
        "out_channels": c.picture_channels,
        "sample_size": side * c.factor,
        "scaling_factor": c.scale,
        "up_block_types": ["UpDecoderBlock2D"] * len(c.widths),
    }
    if c.shift:
        config["shift_factor"] = c.shift
    if not c.quant:
        config["use_quant_conv"] = config["use_post_quant_conv"] = False
    return config


def clip_config(c: CLIPConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModelWithProjection" if c.projection else "CLIPTextModel"],
        "bos_token_id": c.vocabulary - 2,
        "eos_token_id": c.vocabulary - 1,
        "hidden_act": c.activation,
        "hidden_size": c.width,
        "intermediate_size": c.feed_forward,
        "layer_norm_eps": c.norm_eps,
        "max_position_embeddings": c.positions,
        "model_type": "clip_text_model",
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "pad_token_id": 1,
        "projection_dim": c.projection or c.width,
        "vocab_size": c.vocabulary,
    }


def config_file(config: Config, side: int = 1) -> dict[str, Any]:
    """The config.json of a network; side: of the latents that it was trained on."""
    if isinstance(config, UNetConfig):
        return unet_config(config, side)
    if isinstance(config, MMDiTConfig):
        return mmdit_config(config, side)
    if isinstance(config, AutoencoderConfig):
        return autoencoder_config(config, side)
    if isinstance(config, T5Config):
        return t5_config(config)
    return clip_config(config)


def scheduler_config(path: VariancePreserving | RectifiedFlow, target: Target) -> dict[str, Any]:
    if not isinstance(path, VariancePreserving):
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": path.shift,
        }
    start, end = path._ends()
    schedule = {"cosine": "squaredcos_cap_v2"}.get(path.schedule, path.schedule)
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": end,
        "beta_schedule": schedule,
        "beta_start": start,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": WORDS[target],
        "rescale_betas_zero_snr": path.zero_terminal_snr,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def model_index(family: str, parts: set[str]) -> dict[str, Any]:
    """The folder's own page: which pipeline, and which class each part is of."""
    if family.startswith("sd3"):
        # A part that is not there must be said to be none.
        rows = {n: row if n in parts else [None, None] for n, row in FLOW_CLASSES.items()}
        none = {"feature_extractor": [None, None], "image_encoder": [None, None]}
        return {"_class_name": "StableDiffusion3Pipeline", **rows, **none}
    found = {name: row for name, row in CLASSES.items() if name in parts or row[0] is None}
    return {
        "_class_name": PIPELINES[family.partition("-")[2]],
        **found,
        "requires_safety_checker": False,
    }


def tokenizer_configs(pad: str, length: int = 77) -> dict[str, dict[str, Any]]:
    """The small files beside a tokenizer's vocabulary and merges; pad: the token's own text."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    facts = {"add_prefix_space": False, "do_lower_case": True, "model_max_length": length}
    return {
        "tokenizer_config.json": {**facts, **special, "tokenizer_class": "CLIPTokenizer"},
        "special_tokens_map.json": special,
    }


def t5_tokenizer_config(length: int = 512) -> dict[str, Any]:
    """The small file beside T5's tokenizer.json."""
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return {**special, "extra_ids": 100, "model_max_length": length,
            "tokenizer_class": "T5Tokenizer"}  # fmt: skip
