"""LoRA files: kohya's names and peft's (diffusers'), merged into the weights, or written.

Where a file's adapters belong, the key tables say: a LoRA names the same modules as a checkpoint,
kohya's with "_" for every ".".
"""

import json
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from minidiffusion.checkpoints.official import table
from minidiffusion.checkpoints.parts import Encoders
from minidiffusion.checkpoints.reader import write_safetensors
from minidiffusion.checkpoints.rename import BACK, Form, Table, listed, named, stored
from minidiffusion.checkpoints.weights import Weights, open_weights
from minidiffusion.files import read_bounded
from minidiffusion.layers.lora import Adapter, product
from minidiffusion.models import CLIPText, MMDiT, UNet

DENOISER = "denoiser"
TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Networks that a file's adapters belong to; encoders as diffusers numbers them."""
PREFIX = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?:lora_unet_|unet\.|lora_transformer_|transformer\.|diffusion_model\."
    r"|(?:lora_te|text_encoder_?)(|[123])[._])?(.*)"
)
KEY = re.compile(
    r"(.*?)\.(?:processor\.)?(?:(to_\w+)_lora\.|lora\.|lora_|lora_linear_layer\.)"
    r"(down|up|A|B)(?:\.default)?\.weight|(.*)\.(alpha)"
)
"""A module and the part of its adapter; the oldest diffusers files name processors."""
ROLES = {"down": "down", "A": "down", "up": "up", "B": "up", "alpha": "alpha"}
OTHERS = {
    r"hada_\w+": "LoHa", r"lokr_\w+": "LoKr", r"dora_scale|lora_magnitude_vector": "DoRA",
    r"lora_mid": "LoCon in Tucker's form", r"oft_\w+": "OFT", r"diff(_b)?": "whole differences",
}  # fmt: skip
"""Relatives of LoRA that are not read, by a word of their keys."""
METADATA, CONFIG, LARGEST = "lora_adapter_metadata", "adapter_config.json", 1e15
NAMES = {"unet": "unet", "mmdit": "transformer"}
"""What diffusers calls a denoiser."""


class Place(NamedTuple):
    """Where an adapter of a file belongs: a layer of ours, and which of its equal parts.

    form: in which they store the layer's weight, and so what is added to it.
    """

    network: str
    layer: str
    part: int
    parts: int
    form: Form


class Pair(NamedTuple):
    """One adapter of a file: weight += scale * up @ down."""

    up: Tensor
    down: Tensor
    scale: float
    source: str


def parse(text: str) -> tuple[Path, float]:
    """FILE or FILE:WEIGHT, as the command line takes it; without a weight it counts 1."""
    file, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not file or not abs(weight) <= LARGEST:
        raise ValueError(f"lora: {text!r}: expected FILE or FILE:WEIGHT, such as style.st:0.8")
    return Path(file), weight


def apply(
    loras: Iterable[tuple[str | Path, float]], network: nn.Module,
    text: CLIPText | Encoders | None = None,
) -> int:  # fmt: skip
    """Merge LoRA files, each with its weight, into these networks; the number of layers changed.

    All that a file says of a layer is summed in float32 and rounded once. Nothing is changed unless
    everything fits. Raises ValueError with one line: what is no LoRA, of another kind, or fits
    nothing here; a file's part for a text encoder that is left out is passed over with a warning.
    """
    if not isinstance(network, UNet | MMDiT):
        raise ValueError(
            f"lora: LoRA files are read for a UNet or an MMDiT, this is a {type(network).__name__}"
        )
    encoders = text if isinstance(text, Encoders) else () if text is None else (text,)
    there = {owner: one for owner, one in zip(TEXT, encoders, strict=False) if one is not None}
    networks: dict[str, nn.Module] = {DENOISER: network, **there}
    known: dict[tuple[str, str], Place] = {}
    for dialect in ("diffusers", "ldm"):
        known |= places(network, table(network.config, dialect), DENOISER)
    for owner, one in there.items():
        known |= places(one, table(one.config, "transformers"), owner)
    absent = set(TEXT) if text is None else set(TEXT[: len(encoders)]) - there.keys()
    found: dict[tuple[str, str], list[tuple[Place, Pair]]] = defaultdict(list)
    for path, weight in loras:
        for place, pair in fitting(read(path), known, str(path), absent):
            checked(pair, place, networks[place.network])
            scaled = pair._replace(scale=pair.scale * weight)
            found[place.network, place.layer].append((place, scaled))
    for (owner, layer), pairs in found.items():
        add(networks[owner].get_submodule(layer), pairs)
    return len(found)


def places(network: nn.Module, rows: Table, owner: str) -> dict[tuple[str, str], Place]:
    """Every layer that an adapter may belong to, by its name in a file, flat as kohya writes it."""
    ours = {name for name, module in network.named_modules() if isinstance(module, LAYERS)}
    found = {}
    for mine, row in rows.items():
        layer = listed(mine)[0]
        names, form = stored(row)
        for part, name in enumerate(names if layer in ours else ()):
            found[owner, flat(name)] = Place(owner, layer, part, len(names), form)
    return found


LAYERS = (nn.Linear, nn.Conv2d)


def flat(name: str) -> str:
    return name.replace(".", "_")


def read(path: str | Path) -> dict[tuple[str, str], Pair]:
    """A file's adapters by (network, flat module name)."""
    weights = open_weights(path)
    parts: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    strangers = []
    for key in weights:
        for word, kind in OTHERS.items():
            if re.search(rf"\.({word})(\.|$)", key):
                raise ValueError(f"{path}: this is {kind} ({key}); only LoRA and LoCon are read")
        if (found := split(key)) is None:
            strangers.append(key)
        else:
            parts[found[:2]][found[2]] = key
    if not any("down" in roles for roles in parts.values()):
        raise ValueError(f"{path}: not a LoRA: none of its {len(weights)} keys is of an adapter")
    if strangers:
        raise ValueError(f"{path}: {len(strangers)} unknown keys: {named(sorted(strangers))}")
    said = config(weights)
    return {place: paired(weights, roles, said(*place)) for place, roles in parts.items()}


def split(key: str) -> tuple[str, str, str] | None:
    """(network, flat module name, down, up or alpha) of a key of an adapter."""
    if (found := KEY.fullmatch(key)) is None:
        return None
    module, projection, role, of_alpha, alpha = found.groups()
    prefix = PREFIX.fullmatch(module or of_alpha)
    assert prefix is not None
    name = prefix[2] if projection is None else f"{prefix[2]}.{projection}"
    name = f"{name}.0" if projection == "to_out" else name
    owner = DENOISER if prefix[1] is None else TEXT[int(prefix[1] or 1) - 1]
    return (owner, flat(name), ROLES[role or alpha])


def paired(weights: Weights, roles: Mapping[str, str], alpha: object) -> Pair:
    """The two matrices or kernels of a module, and alpha / rank; alpha is the rank unless said."""
    where = weights.files[0]
    source = next(iter(roles.values()))
    for role in ("down", "up"):
        if role not in roles:
            raise ValueError(f"{where}: {source} has no {role} beside it")
    up, down = weights[roles["up"]], weights[roles["down"]]
    rank = len(down) if down.ndim else 0
    if up.ndim not in (2, 4) or down.ndim != up.ndim or rank < 1 or up.shape[1] != rank:
        shapes = f"{list(up.shape)} and {list(down.shape)}"
        raise ValueError(f"{where}: {roles['up']} and its down do not fit together: {shapes}")
    if up.shape[2:].numel() != 1 or not (up.is_floating_point() and down.is_floating_point()):
        raise ValueError(f"{where}: {roles['up']}: expected numbers and a 1x1 kernel")
    if "alpha" in roles:
        tensor = weights[roles["alpha"]]
        alpha = float(tensor) if tensor.numel() == 1 else math.nan
    alpha = rank if alpha is None else alpha
    if not isinstance(alpha, int | float) or not abs(alpha) <= LARGEST:
        raise ValueError(f"{where}: the alpha of {source}: expected a number, got {alpha!r}")
    return Pair(up, down, alpha / rank, f"{where}: {roles['up']}")


def config(weights: Weights) -> Callable[[str, str], object]:
    """(network, flat module name) -> the alpha that metadata or peft's own config file says."""
    where, text = weights.files[0], weights.metadata.get(METADATA, "{}")
    file = where.with_name(CONFIG)
    if text == "{}" and file.is_file() and any(key.startswith("base_model.") for key in weights):
        text = read_bounded(file, 2**20).decode()
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise ValueError(f"{where}: its adapter's settings are no JSON object")
    for key, kind in (("use_dora", "DoRA"), ("use_rslora", "rank-stabilised LoRA")):
        if any(name.split(".")[-1] == key and value for name, value in facts.items()):
            raise ValueError(f"{where}: this is {kind}; only LoRA and LoCon are read")

    def alpha(network: str, module: str) -> object:
        blocks = NAMES.values() if network == DENOISER else [network]
        usual, special = (
            next((facts[f"{one}.{key}"] for one in blocks if f"{one}.{key}" in facts),
                 facts.get(key))
            for key in ("lora_alpha", "alpha_pattern")
        )  # fmt: skip
        rows = special.items() if isinstance(special, dict) else ()
        return next((value for name, value in rows if module.endswith(flat(name))), usual)

    return alpha


def fitting(
    pairs: Mapping[tuple[str, str], Pair], known: Mapping[tuple[str, str], Place], path: str,
    absent: Collection[str],
) -> Iterator[tuple[Place, Pair]]:  # fmt: skip
    """Each adapter and its place; those without one are named. absent: networks not in use."""
    unused = sorted(pair.source for place, pair in pairs.items() if place not in known)
    of_text = sum(place not in known and place[0] in absent for place in pairs)
    names = named([source.removeprefix(f"{path}: ") for source in unused])
    if unused and len(unused) == of_text:
        warnings.warn(f"{path}: {of_text} adapters of a text encoder are not used", stacklevel=3)
    elif unused:
        raise ValueError(f"{path}: {len(unused)} adapters fit nothing in this model: {names}")
    for place, pair in pairs.items():
        if place in known:
            yield known[place], pair


def checked(pair: Pair, place: Place, network: nn.Module) -> None:
    weight = network.get_submodule(place.layer).weight
    assert isinstance(weight, Tensor)
    wanted = (len(weight) // place.parts, *weight.shape[1:])
    given = (len(pair.up), *pair.down.shape[1:])
    if trimmed(given) != trimmed(wanted):
        raise ValueError(
            f"{pair.source} makes {list(given)}, the layer is {list(wanted)}: "
            "a LoRA for another model"
        )


def trimmed(shape: Iterable[int]) -> tuple[int, ...]:
    """A 1x1 convolution is a matrix."""
    sizes = tuple(shape)
    return sizes[:2] if set(sizes[2:]) <= {1} else sizes


@torch.no_grad()
def add(layer: nn.Module, pairs: Iterable[tuple[Place, Pair]]) -> None:
    """The sum of all adapters of a layer, into its weight."""
    weight = dict(layer.named_parameters(recurse=False))["weight"]  # itself: see `layers.storage`
    total = weight.float() if weight.dtype != torch.float32 else weight.clone()
    for place, (up, down, scale, _) in pairs:
        rows = total.chunk(place.parts)[place.part]
        change = BACK[place.form](product(up.to(weight.device), down.to(weight.device)))
        rows.add_(change.view_as(rows), alpha=scale)
    weight.copy_(total)


def save(
    adapters: Mapping[str, Adapter], network: UNet | MMDiT, path: str | Path,
    metadata: Mapping[str, str] | None = None, names: Literal["peft", "kohya"] = "peft",
) -> None:  # fmt: skip
    """Adapters of a denoiser's layers as a LoRA file, under peft's names as diffusers reads them.

    kohya: for a UNet diffusers' modules, for an MMDiT Stability's, whose matrices are whole.
    """
    packed = names == "kohya" and isinstance(network, MMDiT)
    rows = table(network.config, "ldm" if packed else "diffusers")
    theirs = {listed(mine)[0]: row for mine, row in rows.items()}
    prefix = NAMES[network.config.name]
    tensors: dict[str, Tensor] = {}
    modules: list[str] = []
    for layer, adapter in adapters.items():
        these = stored(theirs[layer]).names
        modules += these
        pairs = [together(adapter)] if packed else adapter.pairs()
        for module, (down, up) in zip(these, pairs, strict=True):
            if names == "peft":
                tensors[f"{prefix}.{module}.lora_A.weight"] = down
                tensors[f"{prefix}.{module}.lora_B.weight"] = up
            else:
                tensors[f"lora_unet_{flat(module)}.lora_down.weight"] = down
                tensors[f"lora_unet_{flat(module)}.lora_up.weight"] = up
                tensors[f"lora_unet_{flat(module)}.alpha"] = torch.tensor(adapter.scale * len(down))
    one = next(iter(adapters.values()))
    said = {"r": one.rank, "lora_alpha": one.alpha, "target_modules": sorted(modules)}
    text = json.dumps({f"{prefix}.{key}": value for key, value in said.items()})
    of_peft = {"format": "pt", METADATA: text}
    of_kohya = {"ss_network_dim": str(one.rank), "ss_network_alpha": str(one.alpha)}
    facts = of_peft if names == "peft" else of_kohya
    write_safetensors(tensors, path, {**facts, **(metadata or {})})


def together(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """(down, up) of a whole layer: its projections' as one adapter of as many times the rank."""
    return adapter.down, torch.block_diag(*(up for _, up in adapter.pairs()))
