"""What an autoencoder learns from: pictures, and how far those that it gives back are from them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiffusion import device as devices
from minidiffusion.checkpoints.catalog import MODEL_FILE
from minidiffusion.checkpoints.lpips import load_lpips
from minidiffusion.checkpoints.own import Packed, alone, save_part
from minidiffusion.data.dataset import Batch, Dataset
from minidiffusion.models import (
    Autoencoder,
    AutoencoderConfig,
    Discriminator,
    DiscriminatorConfig,
    hollow,
)
from minidiffusion.models.autoencoder import Posterior
from minidiffusion.models.discriminator import adversarial
from minidiffusion.models.lpips import LPIPS
from minidiffusion.shapes import FeatureMap, Image
from minidiffusion.training.objectives import Reconstruction, drawn
from minidiffusion.training.parts import Parts, shared
from minidiffusion.training.recipe import Recipe
from minidiffusion.typed import ConfigError

MEASURED = 1024
"""Pictures that the latents' mean and deviation are taken from."""


class Outcome(NamedTuple):
    """What became of a batch. game: the losses of both sides, the autoencoder's first."""

    image: FeatureMap
    posterior: Posterior
    game: tuple[Float[Tensor, ""], Float[Tensor, ""]] | None


class Players(nn.Module):
    """The autoencoder, and the discriminator that is trained along with it, if any.

    idle: in the first steps the discriminator stands by.
    """

    def __init__(self, config: AutoencoderConfig, *, contested: bool, idle: bool = False) -> None:
        super().__init__()
        self.idle = idle
        self.autoencoder = Autoencoder(config)
        rival = DiscriminatorConfig(picture_channels=config.picture_channels)
        self.discriminator = Discriminator(rival) if contested else None

    def forward(self, image: Image, noise: FeatureMap, contest: bool) -> Outcome:
        made, posterior = self.autoencoder(image, noise)
        game = None
        if contest and self.discriminator is not None:
            game = adversarial(self.discriminator, image, made)
        return Outcome(made, posterior, game)


def fitted(recipe: Recipe, dataset: Dataset) -> Recipe:
    """The recipe with the channels that only the data knows."""
    assert isinstance(recipe.model, AutoencoderConfig)
    shape, factor = dataset.shape, recipe.model.factor
    if len(shape) != 3 or any(side % factor for side in shape[1:]):
        raise ConfigError(
            f"data: the autoencoder wants sides of multiples of {factor}, got {shape}"
        )
    return replace(recipe, model=replace(recipe.model, picture_channels=shape[0]))


def own(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's weights of the players'."""
    prefix = "autoencoder."
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


@dataclass(frozen=True, eq=False)
class Reconstructing:
    """A `Task`: an autoencoder learns to give pictures back."""

    recipe: Recipe
    dataset: Dataset
    where: torch.device
    precision: str

    @property
    def facts(self) -> dict[str, str]:
        return {}

    @property
    def config(self) -> AutoencoderConfig:
        assert isinstance(self.recipe.model, AutoencoderConfig)
        return self.recipe.model

    @property
    def objective(self) -> Reconstruction:
        assert isinstance(self.recipe.objective, Reconstruction)
        return self.recipe.objective

    @cached_property
    def lpips(self) -> LPIPS | None:
        if not self.objective.lpips:
            return None
        try:
            return load_lpips(self.objective.perceptual).to(self.where)
        except (OSError, ValueError) as error:
            raise ConfigError(f"objective.perceptual: {error}; or objective.lpips: 0") from None

    def network(self) -> Players:
        o, contested = self.objective, self.objective.adversarial > 0
        return Players(self.config, contested=contested, idle=contested and o.adversarial_from > 0)

    def latent_shape(self, count: int) -> tuple[int, ...]:
        sides = (side // self.config.factor for side in self.dataset.shape[1:])
        return (count, self.config.latent_channels, *sides)

    def loss(
        self, called: nn.Module, step: int, first: int, batch: Batch
    ) -> tuple[Float[Tensor, ""], Parts]:
        o = self.objective
        _, noise = drawn(self.recipe.seed, step, first, self.latent_shape(len(batch.x)))
        image, noise = (part.to(self.where, non_blocking=True) for part in (batch.x, noise))
        with devices.autocast(self.precision, self.where):
            made, posterior, game = called(image, noise, step >= o.adversarial_from)
            said = {"l1": (made - image).abs().mean()}
            loss = o.l1 * said["l1"]
            if self.lpips is not None:
                said["lpips"] = self.lpips(made, image).mean()
                loss = loss + o.lpips * said["lpips"]
        kl = posterior.kl().mean()
        said["kl"] = kl / noise[0].numel()
        loss = loss + o.kl * kl / noise[0].numel()
        if game is not None:
            said["adversarial"], said["discriminator"] = game
            loss = loss + o.adversarial * game[0] + game[1]
        return loss, {name: shared(figure, len(image)) for name, figure in said.items()}

    def trial(self, called: nn.Module, count: int) -> object:
        batch = Batch(torch.zeros(count, *self.dataset.shape), torch.zeros(count).long())
        return self.loss(called, self.objective.adversarial_from, 0, batch)

    def result(self, weights: Mapping[str, Tensor]) -> Autoencoder:
        """With the scale and the shift that give its latents unit variance and no mean."""
        network = hollow(Autoencoder, self.config)
        network.load_state_dict(own(weights), assign=True)
        network = network.to(self.where).eval().requires_grad_(False)
        count = min(MEASURED, len(self.dataset))
        spread = [i * len(self.dataset) // count for i in range(count)]
        parts = [self.dataset.batch(spread[i : i + 64]).x for i in range(0, count, 64)]
        with torch.no_grad():
            latents = torch.cat([network.posterior(x.to(self.where)).mean for x in parts])
        scale, shift = 1 / float(latents.std()), float(latents.mean())
        network.config = replace(self.config, scale=scale, shift=shift)
        return network

    def packed(self, weights: Mapping[str, Tensor]) -> Packed:
        made = self.result({name: weight.float() for name, weight in weights.items()})
        return alone("autoencoder", made.config, own(weights))

    def leave(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        save_part("autoencoder", self.result(weights).config, own(weights), folder / MODEL_FILE)
