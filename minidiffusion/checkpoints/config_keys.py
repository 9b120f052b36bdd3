"""Every key of diffusers' and transformers' config files: what is done about each.

A key is honoured (a field of ours takes it), harmless (it changes no result here), or fixed: its
value must be the one that `foreign` writes for the network that the weights make.
"""

from collections.abc import Mapping
from reprlib import repr as short
from typing import Any, NamedTuple

from minidiffusion.checkpoints.foreign import Config, config_file
from minidiffusion.models import UNetConfig
from minidiffusion.typed import read_value, typed_fields


class ConfigKeys(NamedTuple):
    """The keys of a config class of theirs.

    defaults: the keys that matter, and what the class takes where one is missing. fields: those
    that a field of ours takes, and the field. harmless: all others. also: further values of fixed
    keys that mean what is done here.
    """

    defaults: Mapping[str, object]
    fields: Mapping[str, str]
    harmless: frozenset[str]
    also: Mapping[str, tuple[object, ...]] = {}


UNET = ConfigKeys(
    {
        "in_channels": 4, "out_channels": 4, "center_input_sample": False, "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "only_cross_attention": False, "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2, "downsample_padding": 1, "mid_block_scale_factor": 1,
        "act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-5, "cross_attention_dim": 1280,
        "transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": None,
        "encoder_hid_dim": None, "encoder_hid_dim_type": None, "attention_head_dim": 8,
        "num_attention_heads": None, "dual_cross_attention": False, "use_linear_projection": False,
        "class_embed_type": None, "addition_embed_type": None, "addition_time_embed_dim": None,
        "num_class_embeds": None, "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional", "time_embedding_dim": None,
        "time_embedding_act_fn": None, "timestep_post_act": None, "time_cond_proj_dim": None,
        "conv_in_kernel": 3, "conv_out_kernel": 3, "projection_class_embeddings_input_dim": None,
        "attention_type": "default", "class_embeddings_concat": False,
        "mid_block_only_cross_attention": None, "cross_attention_norm": None,
    },
    {"norm_num_groups": "groups", "norm_eps": "norm_eps", "attention_head_dim": "heads"},
    # The size is a default of the pipeline's, see families.trained_for. Attention is exact in every
    # precision here. The average's own keys stand in configs that diffusers' trainers write.
    frozenset({
    "sample_size", "dropout", "upcast_attention", "addition_embed_type_num_heads", "decay",
    "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step",
    "use_ema_warmup",
}),
    {"act_fn": ("swish",), "mid_block_only_cross_attention": (False,)},
)  # fmt: skip
MMDIT = ConfigKeys(
    {
        "patch_size": 2, "in_channels": 16, "num_layers": 18, "attention_head_dim": 64,
        "num_attention_heads": 18, "joint_attention_dim": 4096, "caption_projection_dim": 1152,
        "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 96,
        "dual_attention_layers": [], "qk_norm": None,
    },
    {"num_attention_heads": "heads"},
    frozenset({"sample_size"}),
    {"out_channels": (None,)},
)  # fmt: skip
AUTOENCODER = ConfigKeys(
    {
        "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"], "block_out_channels": [64], "layers_per_block": 1,
        "act_fn": "silu", "latent_channels": 4, "norm_num_groups": 32, "scaling_factor": 0.18215,
        "shift_factor": None, "latents_mean": None, "latents_std": None, "use_quant_conv": True,
        "use_post_quant_conv": True, "mid_block_add_attention": True,
    },
    {"norm_num_groups": "groups", "scaling_factor": "scale", "shift_factor": "shift"},
    # The side of their tiles; in which precision it works, an option says.
    frozenset({"sample_size", "force_upcast"}),
    {"act_fn": ("swish",)},
)  # fmt: skip
PRETRAINED = frozenset({
    "architectures", "attn_implementation", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing",
    "id2label", "initializer_factor", "initializer_range", "is_decoder", "is_encoder_decoder",
    "label2id", "length_penalty", "max_length", "min_length", "model_type", "n_positions",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_past", "output_scores", "pad_token_id",
    "prefix", "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
    "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version",
    "typical_p", "use_bfloat16", "use_cache",
})  # fmt: skip
"""What transformers writes into every config, now or in former versions: training, generation."""
CLIP = ConfigKeys(
    {
        "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "projection_dim": 512,
        "num_hidden_layers": 12, "num_attention_heads": 8, "max_position_embeddings": 77,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407,
        "add_cross_attention": False, "pruned_heads": {},
    },
    {
        "num_attention_heads": "heads", "hidden_act": "activation", "layer_norm_eps": "norm_eps",
    },
    (PRETRAINED - {"eos_token_id"}) | {"attention_dropout", "dropout"},
    {"eos_token_id": (2,)},  # to transformers this means the token of the highest number, as here
)  # fmt: skip
T5 = ConfigKeys(
    {
        "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6,
        "num_heads": 8, "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu", "dense_act_fn": "gelu_new", "is_gated_act": True,
        "pruned_heads": {},
    },
    {"relative_attention_max_distance": "distance", "layer_norm_epsilon": "norm_eps"},
    PRETRAINED | {"classifier_dropout", "dropout_rate", "num_decoder_layers",
                  "scale_decoder_outputs"},
    {"feed_forward_proj": ("gated-gelu_new",)},
)  # fmt: skip
SCHEDULER = ConfigKeys(
    {
        "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001,
        "beta_end": 0.02, "trained_betas": None, "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False, "timestep_type": "discrete", "use_flow_sigmas": False,
    },
    dict.fromkeys(("beta_schedule", "beta_start", "beta_end", "prediction_type",
                   "rescale_betas_zero_snr"), "path"),
    frozenset({
        "algorithm_type", "clip_sample", "clip_sample_range", "corrector_order",
        "disable_corrector", "dynamic_thresholding_ratio", "euler_at_final", "final_sigmas_type",
        "flow_shift", "interpolation_type", "lambda_min_clipped", "lower_order_final",
        "original_inference_steps", "predict_x0", "predictor_order", "sample_max_value",
        "set_alpha_to_one", "sigma_max", "sigma_min", "skip_prk_steps", "solver_order", "solver_p",
        "solver_type", "steps_offset", "tau_func", "time_shift_type", "timestep_scaling",
        "timestep_spacing", "variance_type",
    }),
)  # fmt: skip
"""How a network was trained is honoured. How to sample is an option of each call."""
FLOW_SCHEDULER = ConfigKeys(
    {"num_train_timesteps": 1000, "shift": 1.0},
    {"shift": "shift"},
    frozenset({"base_image_seq_len", "base_shift", "max_image_seq_len", "max_shift",
               "time_shift_type"}),
)  # fmt: skip
SAMPLING = (
    "use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
    "use_lu_lambdas", "shift_terminal", "invert_sigmas", "stochastic_sampling", "thresholding",
)  # fmt: skip
"""What a scheduler may ask for that changes its pictures, and is not followed: a warning."""
USUAL: dict[str, object] = {"beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS: dict[str, dict[str, object]] = {
    "DDIMScheduler": {}, "DDPMScheduler": {}, "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {}, "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {}, "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": USUAL, "KDPM2AncestralDiscreteScheduler": USUAL,
    "KDPM2DiscreteScheduler": USUAL, "LCMScheduler": {"beta_schedule": "scaled_linear", **USUAL},
    "LMSDiscreteScheduler": {}, "PNDMScheduler": {}, "SASolverScheduler": {},
    "TCDScheduler": {"beta_schedule": "scaled_linear", **USUAL}, "UniPCMultistepScheduler": {},
}  # fmt: skip
"""Whose betas are read; and their defaults that are not those above."""
FLOW_SCHEDULERS: dict[str, dict[str, object]] = {
    "FlowMatchEulerDiscreteScheduler": {}, "FlowMatchHeunDiscreteScheduler": {},
}  # fmt: skip
KEYS = {"unet": UNET, "mmdit": MMDIT, "autoencoder": AUTOENCODER, "clip": CLIP, "t5": T5}
A_LEVEL = ("layers_per_block", "cross_attention_dim", "transformer_layers_per_block",
           "only_cross_attention")  # fmt: skip
"""A UNet's keys that hold one value for all levels, or a list of one a level."""


def check_known(found: Mapping[str, Any], keys: ConfigKeys) -> None:
    """Raises ValueError for a key that this version knows nothing of."""
    for key, value in found.items():
        known = key.startswith("_") or key in keys.harmless or key in keys.defaults
        # Where a newer version writes null, its network does without.
        if not known and value is not None:
            raise ValueError(
                f"{key}: unknown key, of value {short(value)}; take it out of the file if nothing "
                "depends on it"
            )


def honoured(found: Mapping[str, Any], kind: type[Config]) -> dict[str, object]:
    """What such a config says for fields of ours, defaults included; the heads of a UNet are left
    to `beside.heads_of`. Raises ValueError for a value that cannot be, and for an unknown key."""
    keys = KEYS[kind.name]
    check_known(found, keys)
    fields = typed_fields(kind)
    said: dict[str, object] = {}
    for key, ours in keys.fields.items():
        if key == "attention_head_dim":
            continue
        value = found.get(key, keys.defaults[key])
        if key == "shift_factor" and value is None:
            value = 0.0
        field, hint = fields[ours]
        said[ours] = read_value(hint, value, key, field)
    return said


def check_fixed(found: Mapping[str, Any], config: Config) -> None:
    """Raises ValueError, one line, for a key that asks for another network than this config's."""
    keys = KEYS[config.name]
    written = config_file(config)
    wanted = {**keys.defaults, **written}
    # What no network here has is named before what follows from it.
    for key in sorted(keys.defaults, key=lambda key: key in written):
        if key in keys.fields:
            continue
        value = found.get(key, keys.defaults[key])
        expected = wanted[key]
        if key == "projection_dim" and getattr(config, "projection", 0) is None:
            continue  # of the half that is not there
        if isinstance(config, UNetConfig) and key in A_LEVEL:
            value, expected = a_level(key, value, config), a_level(key, expected, config)
        also = keys.also.get(key, ())
        if value != expected and value not in also:
            missing = "" if key in found else "missing, which means "
            raise ValueError(
                f"{key}: {missing}{short(found.get(key, keys.defaults[key]))} is not supported "
                f"with these weights, only {' or '.join(map(short, (wanted[key], *also)))}"
            )


def a_level(key: str, value: object, config: UNetConfig) -> object:
    """A list of one value a level; of levels without attention its depth says nothing."""
    count = len(config.widths)
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    if key != "transformer_layers_per_block" or len(values) != count:
        return values
    # The last level's is also the middle's.
    used = [*map(bool, config.attention[:-1]), True]
    return [one if here else None for one, here in zip(values, used, strict=True)]
