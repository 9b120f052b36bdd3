"""What a denoiser learns from: noised samples, their levels, and what it is told of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiffusion import device as devices
from minidiffusion.checkpoints.catalog import Denoiser, whole
from minidiffusion.checkpoints.own import Packed
from minidiffusion.data.dataset import Batch, Dataset
from minidiffusion.diffusion import Level
from minidiffusion.diffusion.levels import spread
from minidiffusion.layers.lora import merge
from minidiffusion.models import Model, create, hollow
from minidiffusion.shapes import Cond, Latent
from minidiffusion.training.latents import Latents, condition, sampled
from minidiffusion.training.objectives import drawn, losses
from minidiffusion.training.parts import Parts, by_time
from minidiffusion.training.recipe import Recipe
from minidiffusion.training.start import Start, adapted, leave


@dataclass(frozen=True, eq=False)
class Denoising:
    """A `Task`: a network learns to tell samples from the noise that was mixed into them."""

    begun: Start
    where: torch.device
    precision: str

    @property
    def recipe(self) -> Recipe:
        return self.begun.recipe

    @property
    def dataset(self) -> Dataset:
        return self.begun.dataset

    @property
    def facts(self) -> dict[str, str]:
        return {"base": self.begun.base} if self.begun.base else {}

    def loss(
        self, called: nn.Module, step: int, first: int, batch: Batch
    ) -> tuple[Float[Tensor, ""], Parts]:
        x0, level, eps, conds = self.inputs(step, first, batch)
        x = level.mix(x0, eps) * spread(level.input_scale(), x0)
        with devices.autocast(self.precision, self.where):
            out = called(x, level.t, conds)
        each = losses(self.recipe.aims, level, out, x0, eps)
        return each.mean(), by_time(torch.as_tensor(level.t), each)

    def inputs(self, step: int, first: int, batch: Batch) -> tuple[Latent, Level, Latent, Cond]:
        """The clean samples, their levels, their noise and their conditions."""
        x0 = batch.x
        uniform, noise = drawn(self.recipe.seed, step, first, x0.shape)
        if isinstance(self.dataset, Latents):
            x0, noise = sampled(x0, noise)
        # On the CPU: in float64, which not every device has, and with the same bits everywhere.
        level = self.recipe.path.draw(len(x0), uniform[:, 0], self.recipe.aims.density)
        kept = uniform[:, 1] >= self.recipe.aims.label_drop
        conds = condition(self.dataset, batch, kept, self.where)
        x0, noise, t, alpha, sigma = (
            torch.as_tensor(part).to(self.where, non_blocking=True)
            for part in (x0, noise, *level[:3])
        )
        return x0, Level(t, alpha, sigma), noise, conds

    def trial(self, called: nn.Module, count: int) -> Latent:
        x = torch.zeros(count, *self.dataset.shape, device=self.where)
        batch = Batch(x, torch.zeros(count, dtype=torch.int64), ("",) * count)
        everyone = torch.ones(count, dtype=torch.bool)
        conds = condition(self.dataset, batch, everyone, self.where)
        with devices.autocast(self.precision, self.where):
            out: Latent = called(x, torch.zeros(count, device=self.where), conds)
        return out

    def rebuilt(self, weights: Mapping[str, Tensor]) -> Model:
        """The network with these weights; a finetuning run's adapters beside their layers."""
        network = adapted(hollow(create, self.recipe.denoiser), self.recipe.finetune)
        network.load_state_dict(weights, assign=True)
        return network.eval().requires_grad_(False)

    def result(self, weights: Mapping[str, Tensor]) -> Denoiser:
        """The network for drawing samples, adapters merged into its weights."""
        network = self.rebuilt(weights)
        merge(network)
        return Denoiser(network, self.begun.row)

    def packed(self, weights: Mapping[str, Tensor]) -> Packed:
        return Packed(*whole(weights, self.begun.row, self.begun.beside))

    def leave(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        leave(self.rebuilt(weights), self.begun, folder)
