"""Where a run starts: random weights, or a trained network; and the file that it leaves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from minidiffusion.checkpoints import lora
from minidiffusion.checkpoints.catalog import (
    MODEL_FILE,
    Parts,
    Row,
    load_parts,
    save_denoiser,
)
from minidiffusion.checkpoints.convert import Content, content, single_file
from minidiffusion.checkpoints.official import sources
from minidiffusion.checkpoints.recognise import Kind
from minidiffusion.data.dataset import Dataset
from minidiffusion.layers.lora import adapt, adapters
from minidiffusion.models import Model, UNet, UNetConfig, create
from minidiffusion.shapes import Tokens
from minidiffusion.text import Text
from minidiffusion.training.latents import Latents, encoded, hash_of
from minidiffusion.training.recipe import FREE, Finetune, Recipe, fitted
from minidiffusion.training.state import flat
from minidiffusion.typed import ConfigError, plain

LORA_FILE = "lora.safetensors"
TRAINED = ("sd1", "sd2")
"""Families whose networks want nothing beside a noised latent and a caption."""


class Start(NamedTuple):
    """The network that a run begins with, its recipe and data as they fit it, its row.

    base: the hash of the weights that finetuning began with.
    """

    recipe: Recipe
    network: Model
    dataset: Dataset
    row: Row
    base: str = ""


def begin(recipe: Recipe, dataset: Dataset, device: torch.device) -> Start:
    """Raises ConfigError where recipe, data and the network to start from do not fit."""
    if recipe.finetune is not None:
        return tuned(recipe, recipe.finetune, dataset, device)
    recipe = fitted(recipe, dataset)
    torch.manual_seed(recipe.seed)
    source = str(plain(recipe.data).get("name", ""))
    row = Row(
        recipe.model, recipe.path, recipe.objective.target, dataset.shape, dataset.classes,
        source, recipe.sampling,
    )  # fmt: skip
    return Start(recipe, create(recipe.model).to(device), dataset, row)


def tuned(recipe: Recipe, how: Finetune, dataset: Dataset, device: torch.device) -> Start:
    """The network of a file, in float32; what the recipe leaves at its default follows the file."""
    if recipe.run.sample_every:
        raise ConfigError("run.sample_every: finetuning draws no sheets; generate does, afterwards")
    parts = load_parts(how.model, vae=how.vae, text_encoder=how.text_encoder, optional=True)
    network, row = parts.denoiser
    base = hash_of(network)
    if recipe.model not in (UNetConfig(), row.model):
        raise ConfigError("model: is that of finetune.model; leave it out")
    if row.family:
        dataset = latents(parts, recipe, how, dataset, device)
    elif how.lora is not None:
        raise ConfigError(f"finetune.lora: {how.model} is a run of our own; train it whole")
    elif (dataset.shape, dataset.classes) != (row.shape, row.classes):
        raise ConfigError(
            f"data: {how.model} was trained on shape {row.shape} and {len(row.classes)} classes, "
            f"these pictures have {dataset.shape} and {len(dataset.classes)}"
        )
    recipe = following(recipe, row, dataset)
    row = replace(
        row, path=recipe.path, target=recipe.objective.target, sampling=recipe.sampling,
        shape=dataset.shape,
    )  # fmt: skip
    torch.manual_seed(recipe.seed)
    network = network.to(device).train().requires_grad_(True)
    return Start(recipe, adapted(network, how), dataset, row, base)


def latents(
    parts: Parts, recipe: Recipe, how: Finetune, dataset: Dataset, device: torch.device
) -> Latents:
    """The data as the model's own autoencoder and text encoder see it."""
    family = parts.denoiser.row.family
    if family not in TRAINED:
        raise ConfigError(
            f"finetune.model: {family} is not trained here; {' and '.join(TRAINED)} are"
        )
    for key, part in (("vae", parts.autoencoder), ("text_encoder", parts.text)):
        if part is None:
            raise ConfigError(f"finetune.{key}: {how.model} holds none; name a file that does")
    assert parts.autoencoder is not None and parts.text is not None
    text = Text(parts.text.to(device), pad=parts.text_pad)

    def encode(caption: str) -> Tokens:
        tokens = text.encode(caption).tokens
        assert tokens is not None
        return tokens

    hashes = hash_of(parts.autoencoder), f"{hash_of(parts.text)} {parts.text_pad}"
    folder = None if recipe.out is None else Path(recipe.out)
    return encoded(dataset, parts.autoencoder.to(device), encode, hashes, folder, device)


def following(recipe: Recipe, row: Row, dataset: Dataset) -> Recipe:
    """The recipe with the file's model, path, target and sampling where it names no others."""
    usual = Recipe()
    try:
        row.model.check(dataset.shape)
    except ValueError as error:
        raise ConfigError(f"data.size: {error}") from None
    aims = recipe.objective
    if aims.target == usual.objective.target:
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
        save_denoiser(network.state_dict(), begun.row, folder / MODEL_FILE)
        return
    assert isinstance(network, UNet)
    if how.lora is not None:
        # Without the names of folders: the file is made to be given away.
        recipe = flat(plain(begun.recipe))
        said = {key: recipe[key] for key in recipe.keys() - FREE - {"data.path"}}
        facts = {"base": begun.base, "recipe": json.dumps(said, sort_keys=True)}
        lora.save(adapters(network), network, folder / LORA_FILE, facts)
        return
    contents: dict[Kind, Content] = {"denoiser": Content(network.config, network.state_dict())}
    kinds: dict[Kind, str | None] = {"autoencoder": how.vae, "text encoder": how.text_encoder}
    for kind, file in kinds.items():
        place = Path(file or how.model)
        contents[kind] = content(sources(place), kind, place)
    single_file(contents, begun.row.family, folder / MODEL_FILE)
