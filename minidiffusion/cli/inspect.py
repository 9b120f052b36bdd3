"""`minidiffusion inspect`: what a file or a folder of weights is, without loading it."""

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import get_args

import torch

from minidiffusion.checkpoints import own
from minidiffusion.checkpoints.catalog import BESIDE, is_run, opened, row_of
from minidiffusion.checkpoints.families import trained_for
from minidiffusion.checkpoints.official import Config, Source, config_of, in_our_names, networks
from minidiffusion.checkpoints.recognise import EMA, stranger
from minidiffusion.checkpoints.rename import Shape
from minidiffusion.checkpoints.weights import Weights
from minidiffusion.models import AutoencoderConfig, MMDiTConfig, T5Config, UNetConfig
from minidiffusion.typed import plain

EXAMPLES = """examples:
  minidiffusion inspect v1-5-pruned-emaonly.safetensors --hash
  minidiffusion inspect stable-diffusion-2-1/ --keys
  minidiffusion inspect my_style_lora.safetensors
"""
NAMES = {
    "sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL",
    "-inpaint": ", for inpainting", "-depth": ", with depth maps",
    "sd3": "Stable Diffusion 3 medium", "sd3.5-medium": "Stable Diffusion 3.5 medium",
    "sd3.5-large": "Stable Diffusion 3.5 large",
}  # fmt: skip
DIALECTS = {
    "ldm": "Stability's names", "diffusers": "diffusers' names",
    "diffusers-former": "diffusers' names of before 0.18", "openclip": "OpenCLIP's names",
    "transformers": "transformers' names", "transformers-bare": "transformers' names",
    "transformers-shared": "transformers' names",
}  # fmt: skip
SHORT = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
}  # fmt: skip
ADAPTER = (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight")
LONGEST = 200
"""Letters of a metadata value that are shown; whole training logs are kept there."""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.epilog = EXAMPLES
    verb.add_argument("file", metavar="FILE", help="a file of weights, a model's or a run's folder")
    verb.add_argument("--keys", action="store_true", help="list every tensor: name, shape, dtype")
    verb.add_argument("--hash", action="store_true", help="the model hash; reads the whole file")


def run(arguments: argparse.Namespace) -> None:
    path = Path(arguments.file)
    for weights in opened(path):
        print("\n".join(page(weights, arguments.hash)))
        if arguments.keys:
            print("\n".join(keys(weights)))


def page(weights: Weights, digest: bool) -> Iterator[str]:
    """All that is said of one file, or of one sharded set."""
    file, size = weights.files[0], sum(one.stat().st_size for one in weights.files)
    shards = f" in {len(weights.files)} shards" if len(weights.files) > 1 else ""
    yield f"{shown(file)}: {amount(size)}{shards}, {len(weights)} tensors, {dtypes(weights)}"
    ours = list(of_own(weights))
    if is_run([weights]):
        yield from rows([*of_run(weights), *ours])
    else:
        yield from rows(ours or of_networks(weights))
    if digest:
        yield from rows([("hash", weights.hash())])
    facts = [f"{shown(k)}: {shown(v)}" for k, v in weights.metadata.items() if k != "row"]
    yield from rows([("metadata", fact) for fact in facts])


def rows(facts: Iterable[tuple[str, str]]) -> Iterator[str]:
    last = ""
    for name, text in facts:
        yield f"  {name if name != last else '':<14}{text}".rstrip()
        last = name


def of_networks(weights: Weights) -> Iterator[tuple[str, str]]:
    try:
        found = networks(weights)
    except ValueError as error:
        yield "holds", f"what cannot be loaded: {shown(error)}"
        return
    for source in found:
        yield from of_part(source)
    if not found:
        yield "holds", shown(stranger(weights.shapes))
        yield from of_adapter(weights.shapes)
    if any(name.startswith(EMA) for name in weights.shapes):
        yield "averages", "EMA weights of the denoiser as well: --ema takes them"


def of_part(source: Source) -> Iterator[tuple[str, str]]:
    """A network of an official file; a problem with it is said instead of its facts."""
    part, kind = source.part, source.part.kind
    place = f" at {part.prefix}" if part.prefix else ""
    try:
        config = config_of(source, {})
        named = in_our_names(source, config)
        facts = list(told(source, config))
    except ValueError as error:
        yield kind, f"{DIALECTS[part.dialect]}{place}"
        yield kind, f"cannot be loaded: {shown(error)}"
        return
    there = {name: source.weights.dtypes[name] for rule in named.rules.values()
             for name in rule.theirs}  # fmt: skip
    count = sum(math.prod(shape) for shape in named.shapes.values())
    nbytes = sum(math.prod(source.weights.shapes[n]) * d.itemsize for n, d in there.items())
    yield kind, f"{count:,} parameters, {kinds(there.values())}, {amount(nbytes)}"
    yield kind, f"{DIALECTS[part.dialect]}{place}"
    for fact in facts:
        yield kind, fact


def called(family: str) -> str:
    """A family of Stable Diffusion in words."""
    name, dash, extra = family.partition("-")
    return NAMES.get(family) or NAMES[name] + NAMES.get(dash + extra, "")


def told(source: Source, config: Config) -> Iterator[str]:
    """What the weights' sizes, their neighbours and the usual values say of a network."""
    if isinstance(config, UNetConfig | MMDiTConfig):
        trained = trained_for(source, config)
        yield f"{called(trained.family)}; predicts {trained.target}"
    if isinstance(config, UNetConfig):
        heads = f"heads {config.head_width} wide" if config.head_width else f"{config.heads} heads"
        yield (
            f"{config.in_channels} channels in, {config.out_channels} out; levels of "
            f"{'/'.join(map(str, config.widths))}; {heads}; attends to {config.context_width}"
        )
    elif isinstance(config, AutoencoderConfig):
        yield f"{config.latent_channels} latent channels, scale {config.scale:g}" + (
            f", shift {config.shift:g}" if config.shift else ""
        )
    elif isinstance(config, T5Config):
        yield f"T5: {config.layers} layers of {config.width}, {config.heads} heads"
    elif isinstance(config, MMDiTConfig):
        yield (
            f"{config.in_channels} channels; {config.depth} blocks of {config.width}, "
            f"{config.heads} heads; attends to {config.context_width}"
        )
    else:
        yield (
            f"CLIP: {config.layers} layers of {config.width}, {config.heads} heads, "
            f"{config.activation}, {config.vocabulary} tokens"
        )


def of_run(weights: Weights) -> Iterator[tuple[str, str]]:
    try:
        row = row_of(weights)
    except ValueError as error:
        yield "run", f"cannot be loaded: {shown(error)}"
        return
    own_names = [name for name in weights.shapes if not name.startswith(BESIDE)]
    count = sum(math.prod(weights.shapes[name]) for name in own_names)
    config = plain(row.model)
    yield "run", f"minidiffusion's {config.pop('name')}, {count:,} parameters"
    yield "run", f"predicts {row.target} on {row.path.name}; samples of {list(row.shape)}"
    if row.data or row.classes:
        yield "run", f"trained on {shown(row.data)}, {len(row.classes)} classes"
    yield "config", ", ".join(f"{name} {value}" for name, value in config.items())


def of_own(weights: Weights) -> Iterator[tuple[str, str]]:
    """The parts of our own models that a file holds, alone or beside their denoiser."""
    for name in get_args(own.Name):
        if own.holds(weights, name):
            shapes = [shape for key, shape in weights.shapes.items() if key.startswith(f"{name}.")]
            count = sum(map(math.prod, shapes))
            yield name, f"minidiffusion's own, {count:,} parameters"


def of_adapter(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, str]]:
    """How many modules a LoRA changes, and its ranks."""
    ranks = Counter(s[0] for name, s in shapes.items() if name.endswith(ADAPTER) and s)
    if ranks:
        yield "modules", f"{sum(ranks.values())}"
        yield "rank", ", ".join(str(rank) for rank in sorted(ranks))


def keys(weights: Weights) -> Iterator[str]:
    width = max(map(len, weights.shapes))
    for name, shape in sorted(weights.shapes.items()):
        kind = str(weights.dtypes[name]).removeprefix("torch.")
        yield f"{shown(name, None):<{width}}  {kind:<9}{list(shape)}"


def dtypes(weights: Weights) -> str:
    return kinds(weights.dtypes.values())


def kinds(found: Iterable[torch.dtype]) -> str:
    """The dtypes, the most frequent first."""
    words = [SHORT.get(one, str(one).removeprefix("torch.")) for one, _ in
             Counter(found).most_common()]  # fmt: skip
    return " and ".join(words)


def amount(size: int) -> str:
    power = min(3, (len(str(size)) - 1) // 3)
    return f"{size / 1000**power:.3g} {('bytes', 'KB', 'MB', 'GB')[power]}"


def shown(text: object, longest: int | None = LONGEST) -> str:
    """Foreign text, cut, and with nothing in it that moves the cursor."""
    line = " ".join(str(text).split())
    line = line if longest is None or len(line) <= longest else f"{line[:longest]} ..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
