"""Configs beside the weights, in diffusers' and transformers' folders: they win over guesses."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minidiffusion.checkpoints.reader import without_duplicates

LARGEST = 2**20
CLASSES = {
    "unet": {"UNet2DConditionModel"},
    "mmdit": {"SD3Transformer2DModel"},
    "autoencoder": {"AutoencoderKL"},
    "clip": {"CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"},
    "t5": {"T5EncoderModel", "T5ForConditionalGeneration"},
}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
USUAL = {"beta_start": 0.00085, "beta_end": 0.012}
PLAIN = {
    "flip_sin_to_cos": True, "freq_shift": 0, "only_cross_attention": False,
    "resnet_time_scale_shift": "default", "class_embed_type": None, "dual_cross_attention": False,
    "center_input_sample": False, "mid_block_scale_factor": 1, "act_fn": "silu",
    "time_embedding_type": "positional", "resnet_skip_time_act": False,
}  # fmt: skip
"""What the UNet here does; a config that asks for another thing is refused."""

OTHER_LADDERS = (
    "use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
    "shift_terminal", "invert_sigmas", "stochastic_sampling",
)  # fmt: skip
"""Of diffusers' scheduler of flows; Stable Diffusion 3's own ladder does without them."""


def read_json(path: Path) -> dict[str, Any]:
    """A small file of plain values; nothing where there is none. ValueError where it is damaged."""
    if not path.is_file():
        return {}
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: larger than 1 MB, which no config is")
    try:
        found = json.loads(path.read_bytes(), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a block of keys")
    return found


def config_of(folder: Path, network: str) -> dict[str, Any]:
    """The config.json beside a file of weights, if it is of such a network."""
    found = read_json(folder / "config.json")
    names = found.get("architectures")
    known = [found.get("_class_name"), *(names if isinstance(names, list) else [])]
    return found if any(name in known for name in CLASSES[network]) else {}


def given(found: Mapping[str, Any], network: str, sizes: Mapping[str, Any]) -> dict[str, object]:
    """What such a config says of ours, beyond the sizes. Raises ValueError for what we lack."""
    if not found:
        return {}
    keys = {
        "unet": {"norm_num_groups": "groups"},
        "mmdit": {"num_attention_heads": "heads"},
        "autoencoder": {
            "norm_num_groups": "groups", "scaling_factor": "scale", "shift_factor": "shift",
        },
        "clip": {"hidden_act": "activation", "num_attention_heads": "heads"},
        "t5": {"relative_attention_max_distance": "distance"},
    }[network]  # fmt: skip
    facts = {ours: found[key] for key, ours in keys.items() if found.get(key) is not None}
    if network == "unet":
        for key, value in PLAIN.items():
            if found.get(key, value) != value:
                raise ValueError(f"{key}: {found[key]!r} is not supported, only {value!r}")
        heads = found.get("num_attention_heads") or found.get("attention_head_dim")
        facts |= heads_of(heads, sizes)
    return facts


def heads_of(heads: object, sizes: Mapping[str, Any]) -> dict[str, object]:
    """One number of heads for all levels, or one each that makes all heads equally wide.

    The config calls it attention_head_dim, and means the number.
    """
    if heads is None:
        return {}
    if type(heads) is int and heads > 0:
        return {"heads": heads, "head_width": None}
    widths = [sizes["channels"] * multiplier for multiplier in sizes["multipliers"]]
    depths = list(sizes["attention"])
    depths[-1] = max(depths[-1], sizes["middle_attention"])
    counts = heads if isinstance(heads, list) else []
    if len(counts) != len(widths) or not all(type(n) is int and n > 0 for n in counts):
        raise ValueError(f"attention_head_dim: expected a number or one a level, got {heads!r}")
    levels = [(w, n) for w, n, d in zip(widths, counts, depths, strict=True) if d]
    if len({n for _, n in levels}) == 1:
        return {"heads": levels[0][1], "head_width": None}
    if len({w / n for w, n in levels}) == 1:
        return {"head_width": levels[0][0] // levels[0][1]}
    raise ValueError(f"attention_head_dim: {heads} makes heads of different widths")


def prediction(folder: Path) -> str | None:
    """What the scheduler's config beside a UNet's folder says that the network predicts."""
    found = read_json(folder.parent / "scheduler" / "scheduler_config.json")
    word = found.get("prediction_type")
    if word is not None and str(word) not in PREDICTIONS:
        raise ValueError(f"prediction_type: {word!r}; allowed: {', '.join(PREDICTIONS)}")
    return PREDICTIONS[word] if word else None


def shift(folder: Path) -> dict[str, object]:
    """The shift that a flow's scheduler config gives; a warning names what else it asks for."""
    file = folder.parent / "scheduler" / "scheduler_config.json"
    found = read_json(file)
    if more := [key for key in OTHER_LADDERS if found.get(key)]:
        warnings.warn(
            f"{file}: {', '.join(more)}: not followed; shift and spacing are options", stacklevel=2
        )
    return {} if found.get("shift") is None else {"shift": found["shift"]}


def schedule(folder: Path) -> dict[str, object]:
    """The betas that the scheduler's config gives, as VariancePreserving takes them."""
    found = read_json(folder.parent / "scheduler" / "scheduler_config.json")
    word = found.get("beta_schedule")
    if word is None:
        return {}
    if str(word) not in SCHEDULES or found.get("num_train_timesteps", 1000) != 1000:
        raise ValueError(
            f"beta_schedule: {word!r}; allowed: {', '.join(SCHEDULES)}, of 1000 training times"
        )
    zero = {"zero_terminal_snr": True} if found.get("rescale_betas_zero_snr") is True else {}
    if SCHEDULES[word] == "cosine":
        return {"schedule": "cosine", **zero}
    ends = {key: found[key] for key in USUAL if found.get(key) is not None}
    if word == "scaled_linear" and ends == USUAL:
        ends = {}
    return {"schedule": SCHEDULES[word], **ends, **zero}
