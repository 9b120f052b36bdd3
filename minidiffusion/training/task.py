"""What a run trains, as the loop knows it: a network, a loss, and what becomes of the weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiffusion.checkpoints.catalog import Denoiser
from minidiffusion.checkpoints.own import Packed
from minidiffusion.data.dataset import Batch, Dataset
from minidiffusion.models import Autoencoder, DualEncoder
from minidiffusion.training import contrastive, reconstruction
from minidiffusion.training.contrastive import Contrasting
from minidiffusion.training.denoising import Denoising
from minidiffusion.training.objectives import Contrastive, Reconstruction
from minidiffusion.training.parts import Parts
from minidiffusion.training.recipe import Recipe
from minidiffusion.training.reconstruction import Reconstructing
from minidiffusion.training.start import begin

Result = Denoiser | Autoencoder | DualEncoder


@runtime_checkable
class Task(Protocol):
    """``called`` is the network as it must be called: under torchrun something wraps it."""

    @property
    def recipe(self) -> Recipe: ...  # with the sizes that only the data knows

    @property
    def dataset(self) -> Dataset: ...

    @property
    def facts(self) -> dict[str, str]: ...  # which a resumed run must share, beside its recipe

    def loss(
        self, called: nn.Module, step: int, first: int, batch: Batch
    ) -> tuple[Float[Tensor, ""], Parts]:
        """The mean loss of the samples from global number ``first`` on, and figures beside it."""
        ...

    def trial(self, called: nn.Module, count: int) -> object:
        """A forward pass of so many empty samples, for the memory that it takes."""
        ...

    def result(self, weights: Mapping[str, Tensor]) -> Result:
        """What the network is good for, with these weights."""
        ...

    def packed(self, weights: Mapping[str, Tensor]) -> Packed:
        """What a model file of these weights holds."""
        ...

    def leave(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Write what a run ends with."""
        ...


def begun(
    recipe: Recipe, dataset: Dataset, where: torch.device, precision: str
) -> tuple[nn.Module, Task]:
    """The network as a run begins with it, and its task.

    Raises ConfigError where recipe, data and the network to start from do not fit.
    """
    torch.manual_seed(recipe.seed)
    if isinstance(recipe.objective, Reconstruction):
        made = Reconstructing(reconstruction.fitted(recipe, dataset), dataset, where, precision)
        return made.network().to(where), made
    if isinstance(recipe.objective, Contrastive):
        paired = Contrasting(contrastive.fitted(recipe, dataset), dataset, where, precision)
        return paired.network().to(where), paired
    start = begin(recipe, dataset, where)
    start.network.checkpointing = recipe.run.checkpointing
    return start.network, Denoising(start, where, precision)
