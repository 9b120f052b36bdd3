"""A recipe: everything that decides a run, typed, from YAML and the command line."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from minidiffusion.checkpoints.catalog import Sampling
from minidiffusion.data import MNIST, Emoji, FashionMNIST, Folder, Shards, Toy
from minidiffusion.data.dataset import Dataset
from minidiffusion.device import Precision
from minidiffusion.diffusion import RectifiedFlow, VarianceExploding, VariancePreserving
from minidiffusion.files import read_bounded
from minidiffusion.models import (
    AutoencoderConfig,
    CLIPConfig,
    DiTConfig,
    DualEncoderConfig,
    MLPConfig,
    MMDiTConfig,
    ModelConfig,
    UNetConfig,
)
from minidiffusion.text.triple import T5_LEAST, T5_LENGTH, T5_MOST
from minidiffusion.training.objectives import Contrastive, Objective, Reconstruction
from minidiffusion.training.optimizers import AdamW, Muon, Schedule
from minidiffusion.typed import FILLED, SEED, ConfigError, build, plain

MOST_STEPS = 10**9
MOST_AVERAGES = 16


@dataclass(frozen=True)
class Run:
    """How long and how.

    Length: steps, else epochs, else minutes (turned into steps once the speed is known, and
    recorded, so that a resume keeps them). batch_size: pictures a step, over all ranks; "auto"
    takes the largest that fits. micro_batch: pictures at once on one device; the rest accumulates.
    strategy: what torchrun's processes do, ddp or fsdp. ema: decay of the averaged weights.
    prompts: of the sheets that sample_every asks for; else some of the captions.
    averages: relative widths (EDM2's sigma_rel) of power-function averages to keep beside it;
    average_every: steps between their snapshots, of which `minidiffusion average` makes any width.
    """

    steps: int | None = field(default=None, metadata={"min": 1, "max": MOST_STEPS})
    epochs: float | None = field(default=None, metadata={"above": 0, "max": 1e6})
    minutes: float | None = field(default=None, metadata={"above": 0, "max": 1e7})
    batch_size: int | Literal["auto"] = field(default=128, metadata={"min": 1, "max": 2**20})
    micro_batch: int | None = field(default=None, metadata={"min": 1, "max": 2**20})
    clip: float | None = field(default=1.0, metadata={"above": 0})
    ema: float = field(default=0.999, metadata={"min": 0, "below": 1})
    ema_warmup: bool = True
    averages: tuple[float, ...] = field(default=(), metadata={"above": 0, "below": 0.288})
    average_every: int = field(default=200, metadata={"min": 1, "max": MOST_STEPS})
    device: str = "auto"
    precision: Precision = "auto"
    compile: bool = False
    checkpointing: bool = False
    strategy: Literal["ddp", "fsdp"] = "ddp"
    workers: int = field(default=0, metadata={"min": 0, "max": 256})
    save_every: int = field(default=500, metadata={"min": 1, "max": MOST_STEPS})
    keep: int = field(default=2, metadata={"min": 1, "max": MOST_STEPS})
    sample_every: int = field(default=0, metadata={"min": 0, "max": MOST_STEPS})
    prompts: tuple[str, ...] = ()
    preprocess: str | None = field(default=None, metadata=FILLED)

    def __post_init__(self) -> None:
        given = [n for n in ("steps", "epochs", "minutes") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"a length is steps, epochs or minutes; got {' and '.join(given)}")
        if len(self.averages) > MOST_AVERAGES:  # each is the weights once more
            raise ValueError(f"averages: {MOST_AVERAGES} at most, got {len(self.averages)}")
        if len(set(self.averages)) < len(self.averages):
            raise ValueError(f"averages: a width stands twice in {list(self.averages)}")


FREE = {
    "out",
    "finetune.model",
    "finetune.vae",
    "finetune.text_encoder",
    "finetune.text_encoders",
    "through.autoencoder",
    "through.clip",
    "run.device",
    "run.workers",
    "run.save_every",
    "run.average_every",
    "run.keep",
    "run.sample_every",
    "run.prompts",
    "run.strategy",
    "run.micro_batch",
}
"""What a resumed run may change without ceasing to be the same run. A model may move: its weights'
hash is a fact of the run.
"""


@dataclass(frozen=True)
class Finetune:
    """Start from a trained network; model, path, target and sampling, left alone, are its own.

    model: an official file or folder, or a run. vae, text_encoder: files of parts that it lacks.
    text_encoders: the place of Stable Diffusion 3's three, where its file has none; no_t5: without
    the largest of them; t5_length: of its tokens.
    lora: train adapters of this rank instead of the weights; they count alpha / rank (alpha: the
    rank, unless given) in the layers of targets.
    """

    model: str = field(metadata=FILLED)
    vae: str | None = field(default=None, metadata=FILLED)
    text_encoder: str | None = field(default=None, metadata=FILLED)
    text_encoders: str | None = field(default=None, metadata=FILLED)
    no_t5: bool = False
    t5_length: int = field(default=T5_LENGTH, metadata={"min": T5_LEAST, "max": T5_MOST})
    lora: int | None = field(default=None, metadata={"min": 1, "max": 1024})
    alpha: float | None = field(default=None, metadata={"above": 0})
    targets: tuple[Literal["attention", "feed_forward", "convolution"], ...] = ("attention",)

    def __post_init__(self) -> None:
        if self.lora is None and self.alpha is not None:
            raise ValueError("alpha: only with lora, the rank that it is divided by")
        if not self.targets:
            raise ValueError("targets: name at least one kind of layer")


@dataclass(frozen=True)
class Through:
    """A denoiser of latents, conditioned on words: what encodes its pictures, and its captions.

    autoencoder, clip: runs of our own, or their files.
    """

    autoencoder: str = field(metadata=FILLED)
    clip: str = field(metadata=FILLED)


AIMS: dict[type, type] = {AutoencoderConfig: Reconstruction, DualEncoderConfig: Contrastive}
"""What the models minimise that are no denoisers."""


@dataclass(frozen=True)
class Recipe:
    """data, model, path, objective, optimizer, schedule, run: see each. out: the run's folder.

    through: see `Through`; None for pictures as they are, and their classes.
    """

    data: FashionMNIST | MNIST | Emoji | Folder | Shards | Toy = field(default_factory=FashionMNIST)
    model: (
        UNetConfig | DiTConfig | MMDiTConfig | MLPConfig | AutoencoderConfig | DualEncoderConfig
    ) = field(default_factory=UNetConfig)
    through: Through | None = None
    path: RectifiedFlow | VariancePreserving | VarianceExploding = field(
        default_factory=RectifiedFlow
    )
    objective: Objective | Reconstruction | Contrastive = field(default_factory=Objective)
    optimizer: AdamW | Muon = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Schedule)
    run: Run = field(default_factory=Run)
    sampling: Sampling = field(default_factory=Sampling)
    finetune: Finetune | None = None
    seed: int = field(default=0, metadata=SEED)
    out: str | None = field(default=None, metadata=FILLED)

    def __post_init__(self) -> None:
        """An eps-network says nothing at alpha = 0, where these paths begin."""
        wanted = AIMS.get(type(self.model), Objective)
        if not isinstance(self.objective, wanted):
            named, given = (
                getattr(one, "name", "that of denoisers") for one in (wanted, self.objective)
            )
            raise ValueError(f"objective: {self.model.name} has {named}, got {given}")
        if self.through is not None and self.finetune is not None:
            raise ValueError("through: not with finetune, whose model has encoders of its own")
        if self.through is not None and not isinstance(self.model, UNetConfig | MMDiTConfig):
            raise ValueError(f"through: {self.model.name} reads no words; allowed: unet, mmdit")
        if self.finetune is not None:  # its path is yet to be read
            return
        pure_noise = isinstance(self.path, RectifiedFlow) or (
            isinstance(self.path, VariancePreserving) and self.path.zero_terminal_snr
        )
        if isinstance(self.objective, Objective) and self.objective.target == "eps" and pure_noise:
            raise ValueError(
                f"objective.target: eps cannot be read at alpha = 0, where path {self.path.name} "
                "begins; allowed: x0, v, flow"
            )

    @property
    def denoiser(self) -> ModelConfig:
        assert not isinstance(self.model, AutoencoderConfig | DualEncoderConfig)
        return self.model

    @property
    def aims(self) -> Objective:
        """Of a denoiser."""
        assert isinstance(self.objective, Objective)
        return self.objective


WORDS = 64
"""Width of the vectors that stand for a prompt's tokens where no text encoder makes them."""


def fitted(recipe: Recipe, dataset: Dataset, text: CLIPConfig | None = None) -> Recipe:
    """The recipe with the sizes that only the data knows: channels, rows, columns, classes.

    A size that was left at its default follows the data; an mmdit's grid does, too. text: of what
    reads the captions; without one the widths of an mmdit's prompts become WORDS. Raises
    ConfigError where they cannot fit.
    """
    shape, model = dataset.shape, recipe.denoiser
    names = ("in_channels", "rows", "columns") if len(shape) == 3 else ("in_channels",)
    sizes: dict[str, Any] = dict(zip(names, shape, strict=False))
    sizes["classes"] = len(dataset.classes)
    known = {f.name: f.default for f in fields(model)}
    for key in sizes.keys() & known:
        if getattr(model, key) not in (known[key], sizes[key]):
            raise ConfigError(
                f"model.{key}: is {getattr(model, key)}, but the data has {sizes[key]}; "
                "leave it out to follow the data"
            )
    if text is not None:
        widths = {"context_width": text.width, "pooled_width": text.projection or text.width}
    else:
        widths = {"context_width": WORDS, "pooled_width": WORDS}
    if isinstance(model, MMDiTConfig):
        side = math.ceil(max(shape[1:], default=1) / model.patch)
        small = {"grid": side, **widths}
        sizes |= {key: size for key, size in small.items() if getattr(model, key) == known[key]}
    unused = ("out_channels", "context_width", "pooled_width")
    for key in unused if isinstance(model, UNetConfig) else ():
        if getattr(model, key) is not None:
            raise ConfigError(f"model.{key}: follows the data and what reads it; leave it out")
    if isinstance(model, UNetConfig) and text is not None:
        sizes |= widths
    try:
        model = replace(model, **{k: v for k, v in sizes.items() if k in known})
        model.check(shape)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    return replace(recipe, model=model)


LARGEST = 2**20
"""Bytes of a recipe."""


class _OnceLoader(yaml.SafeLoader):
    """YAML in which no key stands twice, as the second would silently win, and without aliases, of
    which a few lines make a value that fills all memory."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(problem="a recipe has no aliases, such as *name")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        names = [key.value for key in keys]
        for place, key in enumerate(keys):
            if key.value in names[:place]:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """Plain values. Raises yaml.YAMLError, or RecursionError for what is nested too deeply."""
    return _OnceLoader(text).get_single_data()


def load_recipe(path: str | Path, overrides: Mapping[str, object] | None = None) -> Recipe:
    """The recipe of a YAML file; overrides have dotted keys: {"model.channels": 96}.

    Raises ConfigError (a ValueError) with one line that names the key and what is allowed.
    """
    path = Path(path)
    try:
        values = read_yaml(read_bounded(path, LARGEST).decode())
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise ConfigError(f"{path}: {'no such recipe' if missing else error.strerror}") from None
    except (UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path}: cannot be read as YAML: {' '.join(str(error).split())}"
        ) from None
    if values is None or values == {}:
        raise ConfigError(f"{path}: an empty recipe: name at least one key, such as data")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, got {type(values).__name__}")
    return build(Recipe, merged(values, overrides or {}), str(path))


def merged(values: Mapping[str, object], overrides: Mapping[str, object]) -> dict[str, object]:
    """The values with dotted keys laid over them; a new name drops what belonged to the old one."""
    result: dict[str, Any] = dict(values)
    # Shorter keys first: "model" (a name) must not undo "model.depth".
    for dotted in sorted(overrides, key=lambda key: key.count(".")):
        *parents, last = dotted.split(".")
        place, usual = result, plain(Recipe())
        for parent in parents:
            default = usual.get(parent)
            usual = default if isinstance(default, dict) else {}
            inner = place.get(parent) or {key: usual[key] for key in ("name",) if key in usual}
            if not isinstance(inner, str | dict):
                raise ConfigError(f"{parent}: expected a block of keys, got {inner!r}")
            place[parent] = {"name": inner} if isinstance(inner, str) else dict(inner)
            place = place[parent]
        value, old = overrides[dotted], place.get(last)
        same = isinstance(old, dict) and isinstance(value, str) and old.get("name") == value
        if not same:
            place[last] = value
    return result
