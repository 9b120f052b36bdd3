"""Official files become modules: found by content, checked strictly, read one tensor at a time."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiffusion.checkpoints import beside
from minidiffusion.checkpoints.recognise import (
    EMA,
    Kind,
    Part,
    check_part,
    check_rest,
    parts,
    stranger,
)
from minidiffusion.checkpoints.rename import Renamed, Rule, Shape, Table, rules, their_shapes
from minidiffusion.checkpoints.scaled import unscaled
from minidiffusion.checkpoints.tables import autoencoder, clip, mmdit, t5, unet
from minidiffusion.checkpoints.weights import Weights, is_weights, open_weights
from minidiffusion.layers.quantized import How, divided, quantize_
from minidiffusion.models import (
    Autoencoder,
    AutoencoderConfig,
    CLIPConfig,
    CLIPText,
    MMDiT,
    MMDiTConfig,
    T5Config,
    T5Encoder,
    UNet,
    UNetConfig,
    hollow,
)
from minidiffusion.typed import build

NONE = re.compile("(?!)")
Config = UNetConfig | MMDiTConfig | AutoencoderConfig | CLIPConfig | T5Config
MODULES: dict[type[Config], type[nn.Module]] = {
    UNetConfig: UNet,
    MMDiTConfig: MMDiT,
    AutoencoderConfig: Autoencoder,
    CLIPConfig: CLIPText,
    T5Config: T5Encoder,
}
CONFIGS: dict[str, type[Config]] = {config.name: config for config in MODULES}
TABLES: dict[str, Callable[[Any, str], Table]] = {
    "unet": unet.table,
    "mmdit": mmdit.table,
    "autoencoder": autoencoder.table,
    "clip": clip.table,
    "t5": t5.table,
}
FOLDERS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Where a folder of diffusers' keeps the parts that are known here."""
ARTICLE = {"denoiser": "a denoiser", "autoencoder": "an autoencoder",
           "text encoder": "a text encoder", "T5": "T5"}  # fmt: skip


class Source(NamedTuple):
    """A part, and the weights and the folder that it lies in."""

    weights: Weights
    part: Part
    folder: Path

    @property
    def where(self) -> str:
        return str(self.weights.files[0])


def places(path: Path) -> list[Path]:
    """The files, or folders of one set of weights each, that a path stands for."""
    if not path.is_dir():
        return [path]
    inner = [path / name for name in FOLDERS if (path / name).is_dir()]
    if inner:
        return inner
    files = [file for file in sorted(path.iterdir()) if file.is_file() and file.name[0] != "."]
    usual = any(file.name.startswith(("model.", "diffusion_pytorch_model.")) for file in files)
    found = [file for file in files if not usual and file.suffix != ".json" and is_weights(file)]
    return found or [path]


def opened(path: Path) -> list[Weights]:
    return [unscaled(open_weights(place)) for place in places(path)]


def sources(path: Path, files: list[Weights] | None = None) -> list[Source]:
    """Every network that a file or a folder holds. ValueError, one line, where there is none.

    files: what `opened` gave, if it was called before.
    """
    files = opened(path) if files is None else files
    found = [source for weights in files for source in networks(weights)]
    if not found:
        raise ValueError(f"{path}: {stranger(files[0].shapes)}")
    return found


def networks(weights: Weights) -> list[Source]:
    """Those of one file. ValueError for one whose sizes make no sense, or for unknown keys."""
    shapes, file = weights.shapes, weights.files[0]
    try:
        here = parts(shapes)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if here and all(part.prefix for part in here):
        check_rest(shapes, file)
    return [Source(weights, part, file.parent) for part in here]


def pick(found: list[Source], kind: Kind, path: Path) -> Source:
    """The one part of this kind; a ValueError says what there is instead."""
    fitting = [source for source in found if source.part.kind == kind]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        places = sorted({source.where for source in fitting})
        if len(places) > 1:
            raise ValueError(f"{path}: holds several {kind}s: name one of {', '.join(places)}")
        raise ValueError(f"{path}: holds several {kind}s (Stable Diffusion XL?): not supported yet")
    there = " and ".join(ARTICLE[k] for k in dict.fromkeys(source.part.kind for source in found))
    words = stranger([name for source in found for name in source.weights])
    hint = f" ({words})" if "no network that is known" not in words else ""
    raise ValueError(f"{path}: holds {there}, not {ARTICLE[kind]}{hint}")


def config_of(source: Source, changes: Mapping[str, object], known: Any = None) -> Config:
    """The part's config: the sizes of its weights, then what config.json says, then `changes`.

    Raises ValueError for a change that the config has no field for, or that cannot be.
    """
    part = source.part
    facts: dict[str, object] = dict(part.sizes)
    if part.dialect.startswith(("diffusers", "transformers")):
        found = beside.config_of(source.folder, part.network)
        try:
            facts |= beside.given(found, CONFIGS[part.network], part.sizes)
        except ValueError as error:
            raise ValueError(f"{source.folder / 'config.json'}: {error}") from None
    if "heads" in changes and "head_width" not in changes:
        facts.pop("head_width", None)
    config: Config = build(CONFIGS[part.network], {**facts, **changes}, source.where)
    return config


def table(config: Config, dialect: str) -> Table:
    """What a network of this config calls its tensors, and what a dialect does."""
    return TABLES[config.name](config, dialect)


def table_rules(config: Config, dialect: str, ours: Mapping[str, Shape], prefix: str) -> list[Rule]:
    """The rules between a network of this config and its names in a dialect."""
    return rules(table(config, dialect), ours, prefix)


def shapes_of(network: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def blueprint(config: Config) -> nn.Module:
    """The network of a config, without weights."""
    return hollow(MODULES[type(config)], config)


def in_our_names(
    source: Source, config: Config, ours: Mapping[str, Shape] | None = None, *, ema: bool = False
) -> Renamed:
    """The part's tensors under our names, checked to be all there and nothing else.

    ours: names and shapes of the network that the config makes, where they are at hand.
    """
    ours = shapes_of(blueprint(config)) if ours is None else ours
    made = table_rules(config, source.part.dialect, ours, source.part.prefix)
    shapes = source.weights.shapes
    if ema:
        made = [rule._replace(theirs=averages(rule, source.part.prefix)) for rule in made]
        shapes = {name: shape for name, shape in shapes.items() if name.startswith(EMA)}
        if not shapes:
            raise ValueError(f"{source.where}: holds no averaged weights (model_ema.*)")
    part = source.part if not ema else source.part._replace(prefix=EMA)
    check_part(shapes, their_shapes(made, ours), part, source.where)
    return Renamed(made, source.weights, ours, "ours")


def averages(rule: Rule, prefix: str) -> tuple[str, ...]:
    """Latent diffusion's code stores averages under the names of the weights without their dots."""
    return tuple(EMA + name.removeprefix(prefix).replace(".", "") for name in rule.theirs)


class Stored(NamedTuple):
    """Where a network's weights lie, to be read when it works, and what they become on the way.

    empty: the tensors that are read, without their numbers.
    """

    named: Renamed
    empty: Mapping[str, Tensor]
    device: torch.device | str
    dtype: torch.dtype
    where: str

    def read(self) -> dict[str, Tensor]:
        """The network's tensors, one after the other; linear layers in 8 bits where it has them."""
        weights: dict[str, Tensor] = {}
        for name in (name for name in self.named if name in self.empty):
            scale, pieces = scale_of(name), self.named.pieces(name)
            if scale not in self.empty or self.empty[name].ndim != 2:
                weights[name] = joined(pieces, self.device, self.dtype)
                continue
            # Its place comes first: what is on the way then leaves no hole that nothing else fits.
            place = torch.empty_like(self.empty[name], device=self.device)
            try:
                made, weights[scale] = divided(joined(pieces, self.device, self.dtype), place.dtype)
            except ValueError as error:
                raise ValueError(f"{self.where}: {name}: {error}") from None
            weights[name] = place.copy_(made)
        return weights


Shelf = dict[nn.Module, Stored]
"""Networks whose weights are read each time that they work."""


def load(
    source: Source, config: Config, device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None, *, ema: bool = False, later: re.Pattern[str] = NONE,
    quantize: How | None = None, shelf: Shelf | None = None,
) -> nn.Module:  # fmt: skip
    """The network with its weights, cast to dtype (float32 unless given); in eval mode, frozen.

    later: names of weights that stay on the meta device, to be read when they are needed.
    quantize: linear layers in 8 bits, each as soon as it is read. On the meta device none is.
    shelf: where all weights stay on the meta device, what reads them is left here.
    """
    network = blueprint(config)
    named = in_our_names(source, config, shapes_of(network), ema=ema)
    if quantize is not None:
        quantize_(network, quantize)
    dtype = dtype or torch.float32
    tensors = network.to(dtype).state_dict()
    empty = {name: tensor for name, tensor in tensors.items() if not later.search(name)}
    stored = Stored(named, empty, device, dtype, source.where)
    if shelf is not None:
        shelf[network] = stored
    elif torch.device(device).type != "meta":
        network.load_state_dict(stored.read(), strict=False, assign=True)
    return network.eval().requires_grad_(False)


def scale_of(name: str) -> str:
    """Where a layer in 8 bits keeps the scales of its rows."""
    return f"{name.rpartition('.')[0]}.scale"


def joined(pieces: list[Tensor], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """The pieces one below the other, cast on the way, in memory of their own.

    MKL's rounding depends on where in memory a matrix begins: here all begin alike, so that a
    network does not depend on the file that it comes from.
    """
    shape = (sum(map(len, pieces)), *pieces[0].shape[1:])
    whole, row = torch.empty(shape, dtype=dtype, device=device), 0
    for piece in pieces:
        whole[row : row + len(piece)].copy_(piece)
        row += len(piece)
    return whole
