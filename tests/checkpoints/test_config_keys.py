"""Every key of diffusers' and transformers' configs: honoured as they do, harmless, or refused."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from official import FLOW, TEXT
from rounding import all_in_float64, assert_near, assert_parity, several
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from minidiffusion.checkpoints import beside
from minidiffusion.checkpoints.catalog import load_denoiser
from minidiffusion.checkpoints.config_keys import (
    FLOW_SCHEDULER,
    FLOW_SCHEDULERS,
    KEYS,
    SAMPLING,
    SCHEDULER,
    SCHEDULERS,
)
from minidiffusion.checkpoints.official import CONFIGS, config_of, sources
from minidiffusion.checkpoints.parts import load_autoencoder
from minidiffusion.checkpoints.recognise import parts
from minidiffusion.checkpoints.text_encoders import load_text_encoder
from minidiffusion.diffusion import VariancePreserving
from minidiffusion.models import T5Config
from minidiffusion.shapes import Cond
from minidiffusion.typed import build, plain

LAYOUTS = {
    path.stem: {name: tuple(shape) for name, shape in json.loads(path.read_text()).items()}
    for path in (Path(__file__).parent / "data" / "layouts").glob("*.json")
}

# --- every key is in one of the three sets --------------------------------------------------------

CLASSES: dict[str, Any] = {
    "unet": UNet2DConditionModel, "mmdit": SD3Transformer2DModel, "autoencoder": AutoencoderKL,
    "clip": transformers.CLIPTextConfig, "t5": transformers.T5Config,
}  # fmt: skip


def parameters(cls: Any) -> dict[str, object]:
    """What a class is made with, and the defaults, as JSON holds them."""
    found = list(inspect.signature(cls.__init__).parameters.values())[1:]
    named = {p.name: p.default for p in found if p.kind is not inspect.Parameter.VAR_KEYWORD}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in named.items()}


@pytest.mark.parametrize("network", CLASSES)
def test_each_key_of_the_class_is_honoured_harmless_or_fixed(network: str) -> None:
    keys, theirs = KEYS[network], parameters(CLASSES[network])
    if network in ("clip", "t5"):
        theirs |= parameters(transformers.PretrainedConfig)
        written = CLASSES[network]().to_dict().keys()
        assert not {k for k in written if k[0] != "_"} - keys.harmless - keys.defaults.keys()
    assert not theirs.keys() - keys.harmless - keys.defaults.keys()
    assert not keys.harmless & keys.defaults.keys() and keys.fields.keys() <= keys.defaults.keys()
    own = parameters(CLASSES[network])
    assert {k: v for k, v in keys.defaults.items() if k in own} == {
        k: v for k, v in own.items() if k in keys.defaults
    }
    assert set(keys.fields.values()) <= plain(CONFIGS[network]()).keys()


@pytest.mark.parametrize("name", [*SCHEDULERS, *FLOW_SCHEDULERS])
def test_each_key_of_a_scheduler_has_its_place(name: str) -> None:
    keys = SCHEDULER if name in SCHEDULERS else FLOW_SCHEDULER
    theirs = {k: v for k, v in parameters(getattr(diffusers, name)).items() if k != "kwargs"}
    assert not theirs.keys() - keys.harmless - keys.defaults.keys() - set(SAMPLING)
    ours = {**keys.defaults, **{**SCHEDULERS, **FLOW_SCHEDULERS}[name]}
    assert {k: theirs[k] for k in ours if k in theirs} == {k: ours[k] for k in ours if k in theirs}


# --- the released files ---------------------------------------------------------------------------

FOUR = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
SD1_UNET = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
    "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False, "cross_attention_dim": 768, "down_block_types": FOUR,
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32,
    "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}  # fmt: skip
SD2_UNET = {
    **SD1_UNET, "_diffusers_version": "0.10.0.dev0", "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024, "dual_cross_attention": False, "num_class_embeds": None,
    "only_cross_attention": False, "sample_size": 96, "upcast_attention": True,
    "use_linear_projection": True,
}  # fmt: skip
LATER = {
    "addition_embed_type": None, "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None, "attention_type": "default", "class_embed_type": None,
    "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "cross_attention_norm": None, "dropout": 0.0, "encoder_hid_dim": None,
    "encoder_hid_dim_type": None, "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "num_attention_heads": None,
    "projection_class_embeddings_input_dim": None, "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False, "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None, "time_cond_proj_dim": None,
    "time_embedding_act_fn": None, "time_embedding_dim": None, "time_embedding_type": "positional",
    "timestep_post_act": None, "transformer_layers_per_block": 1,
}  # fmt: skip
"""What later versions of diffusers add when they save such a UNet."""
XL_UNET = {
    **SD2_UNET, **LATER, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048, "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2], "sample_size": 128,
    "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"], "upcast_attention": None,
    "transformer_layers_per_block": [1, 2, 10],
}  # fmt: skip
SD1_VAE = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
    "out_channels": 3, "sample_size": 512, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
XL_VAE = {**SD1_VAE, "force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}
SD3_VAE = {
    **XL_VAE, "latent_channels": 16, "latents_mean": None, "latents_std": None,
    "mid_block_add_attention": True, "scaling_factor": 1.5305, "shift_factor": 0.0609,
    "use_post_quant_conv": False, "use_quant_conv": False,
}  # fmt: skip
SD3 = {
    "_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.29.0.dev0",
    "attention_head_dim": 64, "caption_projection_dim": 1536, "in_channels": 16,
    "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24, "out_channels": 16,
    "patch_size": 2, "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "sample_size": 128,
}  # fmt: skip
SD35 = {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": []}
LARGE = {"caption_projection_dim": 2432, "num_attention_heads": 38, "num_layers": 38}
CLIP_L = {
    "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
    "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
    "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768, "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0", "vocab_size": 49408,
}  # fmt: skip
GENERATION = {
    "add_cross_attention": False, "bad_words_ids": None, "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None,
    "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False,
    "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None, "finetuning_task": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "id2label": {"0": "LABEL_0"},
    "is_decoder": False, "is_encoder_decoder": False, "label2id": {"LABEL_0": 0},
    "length_penalty": 1.0, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0,
    "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1, "output_attentions": False,
    "output_hidden_states": False, "output_scores": False, "prefix": None, "problem_type": None,
    "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0,
    "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None,
    "suppress_tokens": None, "task_specific_params": None, "temperature": 1.0,
    "tf_legacy_loss": False, "tie_encoder_decoder": False, "tie_word_embeddings": True,
    "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torchscript": False, "typical_p": 1.0,
    "use_bfloat16": False,
}  # fmt: skip
"""What transformers before version 5 wrote into the text half of a whole CLIP."""
CLIP_H = {
    **CLIP_L, "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096,
    "num_attention_heads": 16, "num_hidden_layers": 23, "projection_dim": 512,
}  # fmt: skip
CLIP_G = {
    **CLIP_L, "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu",
    "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20,
    "num_hidden_layers": 32, "projection_dim": 1280,
}  # fmt: skip
T5_XXL = {
    "_name_or_path": "google/t5-v1_1-xxl", "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0, "d_ff": 10240, "d_kv": 64, "d_model": 4096,
    "decoder_start_token_id": 0, "dense_act_fn": "gelu_new", "dropout_rate": 0.1,
    "eos_token_id": 1, "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0,
    "is_encoder_decoder": True, "is_gated_act": True, "layer_norm_epsilon": 1e-06,
    "model_type": "t5", "num_decoder_layers": 24, "num_heads": 64, "num_layers": 24,
    "output_past": True, "pad_token_id": 0, "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.41.2", "use_cache": True,
    "vocab_size": 32128,
}  # fmt: skip
RELEASED: dict[str, tuple[str, str, dict[str, object], dict[str, object]]] = {
    "1.5": ("sd15", "unet", {}, SD1_UNET),
    "1.5, saved again": ("sd15", "unet", {}, {**SD1_UNET, **LATER}),
    "1.5 inpainting": ("sd15", "unet", {"in_channels": 9}, {**SD1_UNET, "in_channels": 9}),
    "2.1": ("sd21_unet_vae", "unet", {}, SD2_UNET),
    "2 inpainting": ("sd21_unet_vae", "unet", {"in_channels": 9}, {**SD2_UNET, "in_channels": 9}),
    "2 depth": ("sd21_unet_vae", "unet", {"in_channels": 5}, {**SD2_UNET, "in_channels": 5}),
    "XL": ("sdxl_base_unet_vae", "unet", {}, XL_UNET),
    "1.5's autoencoder": ("sd15", "autoencoder", {}, SD1_VAE),
    "XL's autoencoder": ("sdxl_base_unet_vae", "autoencoder", {"scale": 0.13025}, XL_VAE),
    "3's autoencoder": ("sd3_vae", "autoencoder", {}, SD3_VAE),
    "3 medium": ("", "mmdit", plain(FLOW["sd3", "full"]), SD3),
    "3.5 medium": ("", "mmdit", plain(FLOW["sd3.5-medium", "full"]), {
        **SD35, "dual_attention_layers": [*range(13)], "pos_embed_max_size": 384}),
    "3.5 large": ("", "mmdit", plain(FLOW["sd3.5-large", "full"]), {**SD35, **LARGE}),
    "CLIP-L": ("clip_l", "clip", {}, CLIP_L),
    "CLIP-L of a whole CLIP": ("clip_l", "clip", {}, {**CLIP_L, **GENERATION}),
    "CLIP-G": ("clip_g", "clip", {}, CLIP_G),
    "CLIP-H": ("", "clip", plain(TEXT["sd2", "full"]), CLIP_H),
    "T5": ("", "t5", plain(T5Config()), T5_XXL),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_says_what_its_weights_do(name: str) -> None:
    layout, network, changes, config = RELEASED[name]
    held = [part.sizes for part in parts(LAYOUTS.get(layout, {})) if part.network == network]
    sizes = {**(held[0] if held else {}), **changes}
    sizes.pop("name", None)
    said = beside.given(json.loads(json.dumps(config)), CONFIGS[network], sizes)
    usual, found = build(CONFIGS[network], sizes), build(CONFIGS[network], {**sizes, **said})
    if network == "unet":  # so many heads, or heads so wide
        assert head_widths(found) == head_widths(usual)
        same = {"heads": 8, "head_width": None}
        found, usual = (build(CONFIGS["unet"], {**plain(one), **same}) for one in (found, usual))
    assert found == usual


def head_widths(c: Any) -> list[int]:
    return [c.head_width or width // c.heads for width in c.widths]


# --- tiny models of theirs ------------------------------------------------------------------------

TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1,
        "norm_num_groups": 16, "cross_attention_dim": 24, "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "autoencoder": {
        "block_out_channels": (16, 32), "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "mmdit": {
        "sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
        "caption_projection_dim": 32, "pooled_projection_dim": 20, "pos_embed_max_size": 12,
    },
    "clip": {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 20, "projection_dim": 24,
        "bos_token_id": 97, "eos_token_id": 98,
    },
    "t5": {
        "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    },
}  # fmt: skip


@torch.no_grad()
def made(network: str, changes: Mapping[str, Any], projected: bool = False) -> nn.Module:
    """A model of theirs whose every weight is random."""
    values = {**TINY[network], **changes}
    if network in ("clip", "t5"):
        kind = T5EncoderModel if network == "t5" else CLIPTextModel
        kind = CLIPTextModelWithProjection if projected else kind
        model = kind(CLASSES[network](**values))
    else:
        model = CLASSES[network](**values)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        fan = p[0].numel() if p.ndim > 1 else 4
        p.copy_(torch.randn(p.shape) / fan**0.5 + (p.ndim == 1 and name.endswith("weight")))
    return model.eval()


def run_theirs(theirs: Any, ours: Any, *given: Any) -> tuple[Tensor, ...]:
    """What they make of an input."""
    c = theirs.config
    if isinstance(theirs, AutoencoderKL):
        (image,) = given
        z = theirs.encode(image).latent_dist.mean
        return (z - (c.shift_factor or 0.0)) * c.scaling_factor, theirs.decode(z).sample
    if isinstance(theirs, T5EncoderModel):
        return (theirs(*given).last_hidden_state,)
    if isinstance(theirs, CLIPTextModel | CLIPTextModelWithProjection):
        wanted = theirs(*given)
        pooled = wanted.text_embeds if "text_embeds" in wanted else wanted.pooler_output
        return wanted.last_hidden_state, pooled
    x, t, cond = given
    if isinstance(theirs, SD3Transformer2DModel):
        return (theirs(x, cond.tokens, cond.pooled, t).sample,)
    return (theirs(x, t, cond.tokens).sample,)


def run_ours(theirs: Any, ours: Any, *given: Any) -> tuple[Tensor, ...]:
    """What we make of it."""
    if not isinstance(theirs, AutoencoderKL):
        found = ours(*given)
        return tuple(found)[:2] if isinstance(found, tuple) else (found,)
    latent = ours.encode(*given)
    return latent, ours.decode(latent)


def assert_same(network: str, theirs: Any, folder: Path) -> tuple[Tensor, ...]:
    c = theirs.config
    if network == "autoencoder":
        given = (load_autoencoder(folder), torch.rand(1, c.in_channels, 16, 16) * 2 - 1)
    elif network in ("clip", "t5"):
        ids = torch.randint(2, 90, (2, 19))
        if network == "clip":
            ids[0, 5:], ids[1, 18] = c.vocab_size - 1, c.vocab_size - 1
        given = (load_text_encoder(folder), ids)
    else:
        x, t = torch.randn(2, c.in_channels, 8, 12), torch.tensor([7.0, 981.0])
        width = c.joint_attention_dim if network == "mmdit" else c.cross_attention_dim
        tokens = torch.randn(2, 5, width[0] if isinstance(width, list | tuple) else width)
        pooled = torch.randn(2, c.pooled_projection_dim) if network == "mmdit" else None
        given = (load_denoiser(folder).network, x, t, Cond(tokens=tokens, pooled=pooled))
    return several(assert_parity(run_ours, run_theirs, theirs, *given))


EQUAL: dict[str, list[dict[str, Any]]] = {
    "unet": [
        {"norm_num_groups": 8}, {"norm_eps": 0.1}, {"norm_eps": 1e-6}, {"attention_head_dim": 8},
        {"attention_head_dim": (2, 4)}, {"attention_head_dim": (4, 4)}, {"in_channels": 9},
        {"sample_size": None}, {"sample_size": (8, 6)}, {"dropout": 0.3}, {"act_fn": "swish"},
        {"upcast_attention": True}, {"use_linear_projection": True, "layers_per_block": 2},
        {"only_cross_attention": (False, False)}, {"cross_attention_dim": (24, 24)},
        {"mid_block_only_cross_attention": False}, {"layers_per_block": (2, 2)},
        {"transformer_layers_per_block": (2, 1)}, {"transformer_layers_per_block": 2},
        {"addition_embed_type_num_heads": 32}, {"block_out_channels": (32, 96)},
    ],
    "autoencoder": [
        {"norm_num_groups": 4}, {"scaling_factor": 0.5}, {"shift_factor": -0.5},
        {"latent_channels": 16}, {"latent_channels": 16, "scaling_factor": 1.5305},
        {"sample_size": 64}, {"force_upcast": False}, {"act_fn": "swish"}, {"layers_per_block": 2},
        {"use_quant_conv": False, "use_post_quant_conv": False}, {"block_out_channels": (16, 48)},
        {"in_channels": 1, "out_channels": 1},
    ],
    "mmdit": [
        {"qk_norm": "rms_norm"}, {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
        {"dual_attention_layers": (0, 1, 2)}, {"patch_size": 1, "sample_size": 12},
        {"attention_head_dim": 8, "num_attention_heads": 4}, {"out_channels": None},
        {"sample_size": 24}, {"num_layers": 1},
    ],
    "clip": [
        {"num_attention_heads": 8}, {"hidden_act": "gelu"}, {"layer_norm_eps": 0.1},
        {"layer_norm_eps": 1e-12}, {"eos_token_id": 2, "bos_token_id": 0}, {"projection_dim": 8},
        {"pad_token_id": 0, "attention_dropout": 0.5, "initializer_range": 0.5},
    ],
    "t5": [
        {"relative_attention_max_distance": 12}, {"layer_norm_epsilon": 0.1},
        {"layer_norm_epsilon": 1e-12}, {"feed_forward_proj": "gated-gelu_new"},
        {"num_decoder_layers": 5, "dropout_rate": 0.5, "is_encoder_decoder": False},
        {"relative_attention_num_buckets": 8, "d_kv": 4, "num_heads": 2},
    ],
}  # fmt: skip
"""What theirs accept and ours follow, or need not follow."""
CASES = [(network, changes) for network, rows in EQUAL.items() for changes in [{}, *rows]]


@pytest.mark.parametrize(("network", "changes"), CASES, ids=[f"{n}-{c}" for n, c in CASES])
@torch.no_grad()
def test_parity_with_what_a_config_asks_for(
    network: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    theirs = made(network, changes)
    theirs.save_pretrained(tmp_path)
    assert all(found.std() > 0.05 for found in assert_same(network, theirs, tmp_path))


def test_every_honoured_key_is_among_those_cases() -> None:
    for network, rows in EQUAL.items():
        tried = {key for row in rows for key in row}
        assert KEYS[network].fields.keys() <= tried


OTHER: dict[str, dict[str, Any]] = {
    "unet": {
        "in_channels": 5, "out_channels": 3, "center_input_sample": True, "flip_sin_to_cos": False,
        "freq_shift": 1, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "mid_block_type": None, "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "only_cross_attention": [True, False], "block_out_channels": [32, 64, 64],
        "layers_per_block": [1, 2], "downsample_padding": 0, "mid_block_scale_factor": 2,
        "act_fn": "gelu", "norm_num_groups": None, "norm_eps": "x", "cross_attention_dim": 16,
        "transformer_layers_per_block": [[1], [1]],
        "reverse_transformer_layers_per_block": [[1], [1]], "encoder_hid_dim": 8,
        "encoder_hid_dim_type": "text_proj", "attention_head_dim": None, "num_attention_heads": 4,
        "dual_cross_attention": True, "use_linear_projection": True, "class_embed_type": "timestep",
        "addition_embed_type": "text", "addition_time_embed_dim": 256, "num_class_embeds": 10,
        "resnet_time_scale_shift": "scale_shift", "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 2.0, "time_embedding_type": "fourier", "time_embedding_dim": 64,
        "time_embedding_act_fn": "silu", "timestep_post_act": "silu", "time_cond_proj_dim": 256,
        "conv_in_kernel": 1, "conv_out_kernel": 5, "projection_class_embeddings_input_dim": 8,
        "attention_type": "gated", "class_embeddings_concat": True,
        "mid_block_only_cross_attention": True, "cross_attention_norm": "layer_norm",
    },
    "autoencoder": {
        "in_channels": 4, "out_channels": 1,
        "down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"], "block_out_channels": [16, 16],
        "layers_per_block": 2, "act_fn": "relu", "latent_channels": 16, "norm_num_groups": None,
        "scaling_factor": None, "shift_factor": "x", "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4, "use_quant_conv": False, "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
    "mmdit": {
        "patch_size": 1, "in_channels": 8, "num_layers": 4, "attention_head_dim": 8,
        "num_attention_heads": None, "joint_attention_dim": 8, "caption_projection_dim": 16,
        "pooled_projection_dim": 8, "out_channels": 8, "pos_embed_max_size": None,
        "dual_attention_layers": [1], "qk_norm": "layer_norm",
    },
    "clip": {
        "vocab_size": 98, "hidden_size": 64, "intermediate_size": 8, "projection_dim": 8,
        "num_hidden_layers": 1, "num_attention_heads": 0, "max_position_embeddings": 77,
        "hidden_act": "relu", "layer_norm_eps": -1, "eos_token_id": 50,
        "add_cross_attention": True, "pruned_heads": {"0": [1]},
    },
    "t5": {
        "vocab_size": 98, "d_model": 64, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 0,
        "layer_norm_epsilon": None, "feed_forward_proj": "gated-silu", "dense_act_fn": "silu",
        "is_gated_act": False, "pruned_heads": {"0": [1]},
    },
}  # fmt: skip
"""A value of every key that matters, which the weights, or we, do not go with."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {network: tmp_path_factory.mktemp(network) for network in TINY}
    for network, folder in folders.items():
        made(network, {}, projected=network == "clip").save_pretrained(folder)
    return folders


GONE = object()


def read(folder: Path, **changes: object) -> object:
    """Our config of a folder whose config.json is changed; GONE takes a key out."""
    (source,) = sources(folder)
    file = folder / "config.json"
    text = file.read_text()
    whole = {**json.loads(text), **changes}
    try:
        file.write_text(json.dumps({k: v for k, v in whole.items() if v is not GONE}))
        return config_of(source, {})
    finally:
        file.write_text(text)


@pytest.mark.parametrize("network", OTHER)
def test_every_other_value_is_refused_by_name(network: str, tiny: dict[str, Path]) -> None:
    assert OTHER[network].keys() == KEYS[network].defaults.keys()
    for key, value in {**OTHER[network], "quantization_config": {"bits": 4}}.items():
        with pytest.raises(ValueError, match=rf"config\.json: {key}: ") as caught:
            read(tiny[network], **{key: value})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert read(tiny[network], a_key_of_tomorrow=None) == read(tiny[network])


@pytest.mark.parametrize("network", TINY)
def test_a_missing_key_means_the_default_of_its_class(network: str, tiny: dict[str, Path]) -> None:
    """As it does to their own loaders; of a size that is seldom what the weights have."""
    folder, keys, refused = tiny[network], KEYS[network], 0
    whole = json.loads((folder / "config.json").read_text())
    for key in (keys.defaults.keys() & whole.keys()) - keys.fields.keys():
        if whole[key] == keys.defaults[key]:
            assert read(folder, **{key: GONE}) == read(folder)
            continue
        with pytest.raises(ValueError, match=f"{key}: missing, which means"):
            read(folder, **{key: GONE})
        refused += 1
    assert refused > 2


# --- what no key of config.json says, and what stands beside it -----------------------------------


def test_second_attentions_elsewhere_than_in_the_first_layers_are_named(tmp_path: Path) -> None:
    made("mmdit", {"dual_attention_layers": (0, 2)}).save_pretrained(tmp_path)
    words = r"dual_attention_layers: \[0, 2\] attend twice; only the first layers may.* \[0, 1\]"
    with pytest.raises(ValueError, match=words):
        load_denoiser(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=words):
        load_denoiser(tmp_path)


@pytest.mark.parametrize(
    ("network", "changes", "words"),
    [
        ("t5", {"feed_forward_proj": "relu"}, "feed_forward_proj: of T5 1.0"),
        ("unet", {"block_out_channels": (32, 48)}, "block_out_channels: levels of"),
        ("unet", {"layers_per_block": (1, 2)}, "layers_per_block: levels of"),
        ("autoencoder", {"mid_block_add_attention": False}, "mid_block_add_attention: False"),
    ],
)
def test_weights_of_another_kind_are_named_by_their_key(
    network: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    made(network, changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        sources_and_config(tmp_path)


def sources_and_config(folder: Path) -> object:
    (source,) = sources(folder)
    return config_of(source, {})


@torch.no_grad()
def test_the_text_half_of_a_whole_clip(tmp_path: Path) -> None:
    """Its config lies within another, and the width of what both halves make outside of it."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
              "num_attention_heads": 4, "image_size": 16, "patch_size": 8}  # fmt: skip
    text = {**TINY["clip"], "num_attention_heads": 8, "layer_norm_eps": 0.01, "projection_dim": 7}
    both = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    theirs = transformers.CLIPModel(both).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_text_encoder(tmp_path)
    assert (ours.config.heads, ours.config.norm_eps, ours.config.projection) == (8, 0.01, 24)
    ids = torch.randint(2, 90, (2, 19))
    ids[:, 7] = 98

    def run(_: Any, theirs: Any) -> tuple[Tensor, Tensor]:
        wanted = theirs.text_model(ids)
        return wanted.last_hidden_state, theirs.text_projection(wanted.pooler_output)

    assert_parity(lambda ours, _: tuple(ours(ids))[:2], run, ours, theirs)


def scheduled(folder: Path, network: str, **config: object) -> Any:
    """The row of a tiny model with such a scheduler beside it."""
    if not (folder / network).exists():
        made(network, {}).save_pretrained(folder / network)
        (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return load_denoiser(folder / network).row


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # their arrays, numpy's new rules
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_s_betas_are_its_own_defaults(name: str, tmp_path: Path) -> None:
    path = scheduled(tmp_path, "unet", _class_name=name).path
    assert isinstance(path, VariancePreserving)
    with all_in_float64():
        theirs = getattr(diffusers, name)()
    assert_near(path.betas(), theirs.betas, 8)


def test_what_a_scheduler_says_of_training_is_honoured(tmp_path: Path) -> None:
    said = {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.01}
    row = scheduled(tmp_path, "unet", _class_name="DDIMScheduler", **said,
                    prediction_type="v_prediction", rescale_betas_zero_snr=True)  # fmt: skip
    assert row.target == "v" and row.path == VariancePreserving("linear", 0.001, 0.01, True)
    with all_in_float64():
        theirs = diffusers.DDIMScheduler(**said, rescale_betas_zero_snr=True)
    assert_near([row.path.at(float(t)).alpha ** 2 for t in range(1000)], theirs.alphas_cumprod, 64)
    assert scheduled(tmp_path, "unet", _class_name="LCMScheduler").target == "eps"


def test_of_an_unknown_scheduler_what_it_says_of_training_is_enough(tmp_path: Path) -> None:
    """What it does not say would be its own defaults."""
    said = {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.01}
    with pytest.warns(UserWarning, match="DPMSolverSDEScheduler: only its noise schedule is read"):
        row = scheduled(tmp_path, "unet", _class_name="DPMSolverSDEScheduler", **said,
                        prediction_type="v_prediction", noise_sampler_seed=3)  # fmt: skip
    assert row.target == "v" and row.path == VariancePreserving("linear", 0.001, 0.01)


def test_a_config_of_no_known_class_is_not_used_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLX"}))
    with pytest.warns(UserWarning, match=r"config\.json: not used: of no class .*AutoencoderKLX"):
        assert beside.config_of(tmp_path, "autoencoder") == {}


def test_a_text_config_that_is_no_block(tmp_path: Path) -> None:
    config = {"architectures": ["CLIPModel"], "text_config": "x"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: text_config: expected a block of keys"):
        beside.config_of(tmp_path, "clip")


@pytest.mark.parametrize(
    ("network", "config", "words"),
    [
        ("unet", {"_class_name": "EDMEulerScheduler"}, "_class_name: 'EDMEulerScheduler' is not"),
        ("unet", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name: 'FlowMatch"),
        ("mmdit", {"_class_name": "DDIMScheduler"}, "_class_name: 'DDIMScheduler' is not"),
        ("unet", {"trained_betas": [0.1]}, "trained_betas: "),
        ("unet", {"num_train_timesteps": 100}, "num_train_timesteps: 100 is not"),
        ("mmdit", {"num_train_timesteps": 100}, "num_train_timesteps: 100 is not"),
        ("unet", {"timestep_type": "continuous"}, "timestep_type: 'continuous' is not"),
        ("unet", {"use_flow_sigmas": True}, "use_flow_sigmas: True is not"),
        ("unet", {"beta_schedule": "sigmoid"}, "beta_schedule: 'sigmoid'"),
        ("unet", {"prediction_type": "flow_prediction"}, "prediction_type: 'flow_prediction'"),
        ("unet", {"a_key_of_tomorrow": 3}, "a_key_of_tomorrow: unknown key, of value 3"),
        ("mmdit", {"shift": None}, "shift: "),
    ],
)
def test_a_scheduler_for_another_kind_of_training_is_refused(
    network: str, config: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        scheduled(tmp_path, network, **config)
    assert "\n" not in str(caught.value)


def test_what_a_scheduler_says_of_sampling_is_no_error(tmp_path: Path) -> None:
    row = scheduled(
        tmp_path, "unet", _class_name="PNDMScheduler", _diffusers_version="0.6.0",
        beta_end=0.012, beta_schedule="scaled_linear", beta_start=0.00085, clip_sample=False,
        num_train_timesteps=1000, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1,
        trained_betas=None,
    )  # fmt: skip
    assert row.path == VariancePreserving() and row.target == "eps"
    with pytest.warns(UserWarning, match="use_karras_sigmas: not followed"):
        scheduled(tmp_path, "unet", _class_name="EulerDiscreteScheduler", use_karras_sigmas=True)


@pytest.mark.parametrize("network", ["unet", "mmdit"])
def test_the_usual_size_is_that_of_the_config(network: str, tmp_path: Path) -> None:
    made(network, {"sample_size": 12}).save_pretrained(tmp_path)
    assert load_denoiser(tmp_path).row.shape == (4, 12, 12)
    file = tmp_path / "config.json"
    text = json.loads(file.read_text())
    for size, shape in (([8, 6], (4, 8, 6)), (None, None), (0, None), ("x", None), (10**9, None)):
        file.write_text(json.dumps({**text, "sample_size": size}))
        if size is None:
            assert load_denoiser(tmp_path).row.shape[1] in (24, 64)
        elif shape is None:
            with pytest.raises(ValueError, match="config.json: sample_size: expected rows"):
                load_denoiser(tmp_path)
        else:
            assert load_denoiser(tmp_path).row.shape == shape
