"""Configs beside the weights, in diffusers' and transformers' folders: they win over guesses."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from minidiffusion.checkpoints.config_keys import (
    FLOW_SCHEDULER,
    FLOW_SCHEDULERS,
    SAMPLING,
    SCHEDULER,
    SCHEDULERS,
    USUAL,
    ConfigKeys,
    check_fixed,
    check_known,
    honoured,
)
from minidiffusion.checkpoints.foreign import Config
from minidiffusion.checkpoints.reader import without_duplicates
from minidiffusion.models import UNetConfig
from minidiffusion.typed import build, unknown

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
    if not any(name in known for name in CLASSES[network]):
        if found and not any(name in known for names in CLASSES.values() for name in names):
            warnings.warn(
                f"{folder / 'config.json'}: not used: of no class that is known here, "
                f"{short(known)}", stacklevel=2,
            )  # fmt: skip
        return {}
    text = found.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise ValueError(f"{folder / 'config.json'}: text_config: expected a block of keys")
    # Of a whole CLIP: how wide the vectors are that both halves make is said outside of them.
    return {**text, "projection_dim": found.get("projection_dim", 512)} if text else found


def given(
    found: Mapping[str, Any], kind: type[Config], sizes: Mapping[str, Any]
) -> dict[str, object]:
    """What such a config says of ours, beyond the sizes, which must be the same in both.

    Raises ValueError, in one line, for a key that asks for what we lack.
    """
    if not found:
        return {}
    facts = honoured(found, kind)
    if kind is UNetConfig:
        facts |= heads_of(found.get("attention_head_dim", 8), sizes)
    check_fixed(found, build(kind, {**sizes, **facts}))
    return facts


def heads_of(heads: object, sizes: Mapping[str, Any]) -> dict[str, object]:
    """One number of heads for all levels, or one each that makes all heads equally wide.

    The config calls it attention_head_dim, and means the number.
    """
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


def scheduler(folder: Path, keys: ConfigKeys, classes: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's config beside a denoiser's folder, with its class's defaults; {} if none is.

    Of a class that is not known here it must say all that is read, and a warning says so. Raises
    ValueError where it does not, and for an unknown key or value.
    """
    file = folder.parent / "scheduler" / "scheduler_config.json"
    if not (found := read_json(file)):
        return {}
    name = found.get("_class_name", next(iter(classes)))
    try:
        if str(name) in classes:
            check_known({k: v for k, v in found.items() if k not in SAMPLING}, keys)
        elif keys.fields.keys() - {"rescale_betas_zero_snr"} <= found.keys():
            warnings.warn(f"{file}: {name}: only its noise schedule is read", stacklevel=3)
        else:  # what it does not say would be its defaults, which are not known here
            raise unknown("_class_name", f"{name!r} is not supported", name, classes)
        for key in keys.defaults.keys() - keys.fields:
            if (value := found.get(key, keys.defaults[key])) != keys.defaults[key]:
                raise ValueError(f"{key}: {value!r} is not supported, only {keys.defaults[key]!r}")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return {**keys.defaults, **classes.get(str(name), {}), **found}


def warn_of_sampling(found: Mapping[str, Any], folder: Path) -> None:
    """Say what else a scheduler's config asks for."""
    if more := [key for key in SAMPLING if found.get(key)]:
        warnings.warn(
            f"{folder.parent / 'scheduler' / 'scheduler_config.json'}: {', '.join(more)}: not "
            "followed; shift and spacing are options", stacklevel=3,
        )  # fmt: skip


def prediction(folder: Path) -> str | None:
    """What the scheduler's config beside a UNet's folder says that the network predicts."""
    if not (found := scheduler(folder, SCHEDULER, SCHEDULERS)):
        return None
    word = found["prediction_type"]
    if str(word) not in PREDICTIONS:
        raise ValueError(f"prediction_type: {word!r}; allowed: {', '.join(PREDICTIONS)}")
    return PREDICTIONS[word]


def shift(folder: Path) -> dict[str, object]:
    """The shift that a flow's scheduler config gives; a warning names what else it asks for."""
    found = scheduler(folder, FLOW_SCHEDULER, FLOW_SCHEDULERS)
    warn_of_sampling(found, folder)
    return {"shift": found["shift"]} if found else {}


def schedule(folder: Path) -> dict[str, object]:
    """The betas that the scheduler's config gives, as VariancePreserving takes them."""
    if not (found := scheduler(folder, SCHEDULER, SCHEDULERS)):
        return {}
    warn_of_sampling(found, folder)
    word = found["beta_schedule"]
    if str(word) not in SCHEDULES:
        raise ValueError(f"beta_schedule: {word!r}; allowed: {', '.join(SCHEDULES)}")
    zero = found["rescale_betas_zero_snr"]
    said = {"schedule": SCHEDULES[word], **({"zero_terminal_snr": zero} if zero else {})}
    ends = {key: found[key] for key in USUAL}
    usual = SCHEDULES[word] == "cosine" or (word == "scaled_linear" and ends == USUAL)
    return said if usual else {**said, **ends}
