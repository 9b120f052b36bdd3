"""Where a run starts: random weights, or a trained network; and the file that it leaves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from minidiffusion import device as devices
from minidiffusion.checkpoints import lora
from minidiffusion.checkpoints.catalog import MODEL_FILE, Row, load_denoiser, save_denoiser
from minidiffusion.checkpoints.convert import Content, content, contents_of, single_file
from minidiffusion.checkpoints.official import sources
from minidiffusion.checkpoints.own import Packed
from minidiffusion.checkpoints.parts import (
    Parts,
    load_autoencoder,
    load_parts,
    load_text_encoder,
    load_text_encoders,
)
from minidiffusion.checkpoints.recognise import Kind
from minidiffusion.data.dataset import Dataset
from minidiffusion.layers.lora import adapt, adapters
from minidiffusion.models import (
    CLIPConfig,
    CLIPText,
    MMDiT,
    MMDiTConfig,
    Model,
    UNet,
    UNetConfig,
    create,
)
from minidiffusion.shapes import Cond
from minidiffusion.text import Text, TripleText
from minidiffusion.text.triple import T5_LENGTH
from minidiffusion.training.latents import Encode, Latents, check, encoded, hash_of, read
from minidiffusion.training.prompts import prompted, room
from minidiffusion.training.recipe import FREE, Finetune, Recipe, Through, fitted
from minidiffusion.training.state import flat
from minidiffusion.training.through import encoders, through
from minidiffusion.typed import ConfigError, plain

LORA_FILE = "lora.safetensors"
TRAINED = ("sd1", "sd2", "sd3", "sd3.5-medium", "sd3.5-large")
"""Families whose networks want nothing beside a noised latent and a caption."""


class Start(NamedTuple):
    """The network that a run begins with, its recipe and data as they fit it, its row.

    base: the hash of the weights that finetuning began with. beside: parts of our own that go into
    the file that the run leaves.
    """

    recipe: Recipe
    network: Model
    dataset: Dataset
    row: Row
    base: str = ""
    beside: tuple[Packed, ...] = ()


def begin(recipe: Recipe, dataset: Dataset, device: torch.device) -> Start:
    """Raises ConfigError where recipe, data and the network to start from do not fit."""
    if recipe.finetune is not None:
        return tuned(recipe, recipe.finetune, dataset, device)
    text: CLIPConfig | None = None
    beside: tuple[Packed, ...] = ()
    if recipe.through is not None:
        found = encoders(recipe.through, device)
        dataset = through(dataset, found, folder(recipe), device)
        text, beside = found.config, found.packed
    recipe = fitted(recipe, dataset, text)
    torch.manual_seed(recipe.seed)
    hashed = isinstance(recipe.model, MMDiTConfig) and text is None
    words = room(dataset.classes) if hashed else 0
    row = Row(
        recipe.denoiser, recipe.path, recipe.aims.target, dataset.shape, dataset.classes,
        recipe.data.name, recipe.sampling, words=words,
    )  # fmt: skip
    network = create(recipe.denoiser).to(device)
    return Start(recipe, network, prompted(dataset, row, device), row, beside=beside)


def folder(recipe: Recipe) -> Path | None:
    """Of the run, where what was encoded is kept."""
    return None if recipe.out is None else Path(recipe.out)


def tuned(recipe: Recipe, how: Finetune, dataset: Dataset, device: torch.device) -> Start:
    """The network of a file, in float32; what the recipe leaves at its default follows the file."""
    if recipe.run.sample_every:
        raise ConfigError("run.sample_every: finetuning draws no sheets; generate does, afterwards")
    # Without a single weight: encoders, of which T5 is large, make room before the network comes.
    parts = load_parts(
        how.model, vae=how.vae, text_encoder=how.text_encoder, text_encoders=how.text_encoders,
        t5=not how.no_t5, optional=True, device="meta",
    )  # fmt: skip
    row = parts.denoiser.row
    if recipe.model not in (UNetConfig(), row.model):
        raise ConfigError("model: is that of finetune.model; leave it out")
    if row.family and recipe.run.averages:
        raise ConfigError("run.averages: only where a run leaves a file of our own layout")
    beside: tuple[Packed, ...] = ()
    if row.family:
        dataset = latents(parts, recipe, how, dataset, device)
    elif how.lora is not None:
        raise ConfigError(f"finetune.lora: {how.model} is a run of our own; train it whole")
    elif parts.autoencoder is not None and parts.text is not None:
        places = Through(how.vae or how.model, how.text_encoder or how.model)
        found = encoders(places, device)
        dataset, beside = through(dataset, found, folder(recipe), device), found.packed
    elif (dataset.shape, dataset.classes) != (row.shape, row.classes):
        raise ConfigError(
            f"data: {how.model} was trained on shape {row.shape} and {len(row.classes)} classes, "
            f"these pictures have {dataset.shape} and {len(dataset.classes)}"
        )
    recipe = following(recipe, row, dataset)
    row = replace(
        row, path=recipe.path, target=recipe.aims.target, sampling=recipe.sampling,
        shape=dataset.shape, data=recipe.data.name,
    )  # fmt: skip
    network = load_denoiser(how.model).network
    base = hash_of(network)
    torch.manual_seed(recipe.seed)
    network = network.to(device).train().requires_grad_(True)
    network = adapted(network, how)
    return Start(recipe, network, prompted(dataset, row, device), row, base, beside)


Reader = tuple[Encode, str]
"""What makes a Cond of a caption, and the hash of all that decides what it makes."""


def latents(
    parts: Parts, recipe: Recipe, how: Finetune, dataset: Dataset, device: torch.device
) -> Latents:
    """The data as the model's own autoencoder and text encoders see it.

    parts: what the model has, without weights.
    """
    row = parts.denoiser.row
    if row.family not in TRAINED:
        raise ConfigError(
            f"finetune.model: {row.family} is not trained here; {' and '.join(TRAINED)} are"
        )
    option = "text_encoders" if row.family.startswith("sd3") else "text_encoder"
    if parts.autoencoder is None:
        raise ConfigError(f"finetune.vae: {how.model} holds none; name a file that does")
    if parts.text is None:
        raise ConfigError(f"finetune.{option}: {how.model} holds none; name a place that does")
    if how.t5_length != T5_LENGTH and not row.family.startswith("sd3"):
        raise ConfigError("finetune.t5_length: only for Stable Diffusion 3")
    check(dataset, parts.autoencoder.config, row.model)
    encode, known = reader(parts, recipe, how, device)
    words = read(dataset, encode, known, folder(recipe))
    del encode
    autoencoder = load_autoencoder(how.vae or how.model, device)
    return encoded(dataset, autoencoder, words, known, folder(recipe), device)


def reader(parts: Parts, recipe: Recipe, how: Finetune, device: torch.device) -> Reader:
    """The text encoders with their weights; Stable Diffusion 3's in the run's precision.

    In bf16 T5 is half of 19 GB.
    """
    model = parts.denoiser.row.model
    if not isinstance(model, MMDiTConfig):
        clip = load_text_encoder(how.text_encoder or how.model, device)
        assert isinstance(clip, CLIPText)  # as `load_parts` has found it
        text = Text(clip, pad=parts.text_pad)
        known = f"{hash_of(clip)} {text.tokenizer.padding(text.pad)}"
        return lambda caption: Cond(text.encode(caption).tokens), known
    place, dtype = how.text_encoders or how.model, devices.dtype(recipe.run.precision, device)
    encoders = load_text_encoders(place, device, dtype=dtype, t5=not how.no_t5)
    triple = TripleText(*encoders, t5_length=how.t5_length, width=model.context_width)
    return triple.encode, f"{hash_of(triple.encoder)} {how.t5_length}"


def following(recipe: Recipe, row: Row, dataset: Dataset) -> Recipe:
    """The recipe with the file's model, path, target and sampling where it names no others."""
    usual = Recipe()
    try:
        row.model.check(dataset.shape)
    except ValueError as error:
        raise ConfigError(f"data.size: {error}") from None
    aims = recipe.aims
    if aims.target == usual.aims.target:
        aims = replace(aims, target=row.target)
    return replace(
        recipe, model=row.model, objective=aims,
        path=row.path if recipe.path == usual.path else recipe.path,
        sampling=row.sampling if recipe.sampling == usual.sampling else recipe.sampling,
    )  # fmt: skip


def adapted(network: Model, how: Finetune | None) -> Model:
    """The network with the adapters of a run, if it trains any."""
    if how is not None and how.lora is not None:
        adapt(network, how.lora, how.alpha or how.lora, how.targets)
    return network


def leave(network: Model, begun: Start, folder: Path) -> None:
    """What a run ends with, of its averaged network: a model that draws, or its adapters alone."""
    how = begun.recipe.finetune
    if how is None or not begun.row.family:
        save_denoiser(network.state_dict(), begun.row, folder / MODEL_FILE, begun.beside)
        return
    assert isinstance(network, UNet | MMDiT)
    if how.lora is not None:
        # Without the names of folders: the file is made to be given away.
        recipe = flat(plain(begun.recipe))
        said = {key: recipe[key] for key in recipe.keys() - FREE - {"data.path"}}
        facts = {"base": begun.base, "recipe": json.dumps(said, sort_keys=True)}
        lora.save(adapters(network), network, folder / LORA_FILE, facts)
        return
    contents = {"denoiser": Content(network.config, network.state_dict()), **beside(network, how)}
    single_file(contents, begun.row.family, folder / MODEL_FILE)


def beside(network: UNet | MMDiT, how: Finetune) -> dict[str, Content]:
    """The parts that were not trained: of Stable Diffusion 3 no encoders that lie elsewhere."""
    kinds: dict[Kind, str | None] = {"autoencoder": how.vae, "text encoder": how.text_encoder}
    found: dict[str, Content] = {}
    if isinstance(network, MMDiT):
        there = contents_of(sources(Path(how.model)), Path(how.model))
        found = {kind: one for kind, one in there.items() if kind != "denoiser"}
        kinds = {"autoencoder": how.vae} if how.vae else {}
    for kind, file in kinds.items():
        place = Path(file or how.model)
        found[kind] = content(sources(place), kind, place)
    return found
