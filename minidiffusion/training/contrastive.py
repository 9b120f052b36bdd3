"""What CLIP learns from: pictures and captions, and which of them belong together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from minidiffusion import device as devices
from minidiffusion.checkpoints.catalog import MODEL_FILE
from minidiffusion.checkpoints.own import Packed, alone, save_part
from minidiffusion.data.dataset import Batch, Dataset
from minidiffusion.models import DualEncoder, DualEncoderConfig, hollow
from minidiffusion.text.bpe import BPE, shortened
from minidiffusion.training.objectives import Contrastive
from minidiffusion.training.parts import Parts, overall
from minidiffusion.training.recipe import Recipe
from minidiffusion.typed import ConfigError


def fitted(recipe: Recipe, dataset: Dataset) -> Recipe:
    """The recipe with the size that only the data knows."""
    assert isinstance(recipe.model, DualEncoderConfig)
    channels, *sides = dataset.shape
    if channels != 3 or len(set(sides)) != 1 or not dataset.batch([0]).captions:
        raise ConfigError(
            f"data: CLIP wants square colour pictures with captions, got {dataset.shape}"
        )
    model = recipe.model
    try:
        shortened(model.text.vocabulary)
        return replace(recipe, model=replace(model, picture=replace(model.picture, size=sides[0])))
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def contrast(
    texts: Float[Tensor, "b e"], pictures: Float[Tensor, "b e"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """How badly the pairs are told apart, from either side (Radford et al. 2021, figure 3)."""
    products = scale * texts @ pictures.T
    own = torch.arange(len(products), device=products.device)
    return (F.cross_entropy(products, own) + F.cross_entropy(products.T, own)) / 2


def found(texts: Float[Tensor, "b e"], pictures: Float[Tensor, "b e"]) -> Bool[Tensor, " b"]:
    """Whether a text's own picture is the likest to it of all."""
    return (texts @ pictures.T).argmax(dim=1) == torch.arange(len(texts), device=texts.device)


@dataclass(frozen=True, eq=False)
class Contrasting:
    """A `Task`: two encoders learn to bring a picture and its caption together."""

    recipe: Recipe
    dataset: Dataset
    where: torch.device
    precision: str

    @property
    def facts(self) -> dict[str, str]:
        return {}

    @property
    def config(self) -> DualEncoderConfig:
        assert isinstance(self.recipe.model, DualEncoderConfig)
        return self.recipe.model

    @cached_property
    def tokenizer(self) -> BPE:
        return shortened(self.config.text.vocabulary)

    def network(self) -> DualEncoder:
        return DualEncoder(self.config)

    def ids(self, captions: Sequence[str]) -> Int[Tensor, "b n"]:
        """Without a warning for those that are cut: it would be one a step."""
        return self.tokenizer.tokenize(captions, length=self.config.text.positions, warn=False)

    def loss(
        self, called: nn.Module, step: int, first: int, batch: Batch
    ) -> tuple[Float[Tensor, ""], Parts]:
        """With the share of the captions whose own picture is the likest in its group."""
        assert isinstance(self.recipe.objective, Contrastive)
        group = self.recipe.objective.group
        if len(batch.x) % min(group, len(batch.x)):
            raise ConfigError(
                f"objective.group: the micro-batch of {len(batch.x)} is no multiple of {group}"
            )
        ids, image = self.ids(batch.captions).to(self.where), batch.x.to(self.where)
        with devices.autocast(self.precision, self.where):
            texts, pictures, scale = called(ids, image)
        pairs = list(zip(texts.split(group), pictures.split(group), strict=True))
        loss = torch.stack([contrast(*pair, scale) for pair in pairs]).mean()
        return loss, {"accuracy": overall(torch.cat([found(*pair) for pair in pairs]).float())}

    def trial(self, called: nn.Module, count: int) -> object:
        image = torch.zeros(count, *self.dataset.shape, device=self.where)
        with devices.autocast(self.precision, self.where):
            return called(self.ids(("",) * count).to(self.where), image)

    def result(self, weights: Mapping[str, Tensor]) -> DualEncoder:
        network = hollow(DualEncoder, self.config)
        network.load_state_dict(weights, assign=True)
        return network.eval().requires_grad_(False)

    def packed(self, weights: Mapping[str, Tensor]) -> Packed:
        return alone("clip", self.config, weights)

    def leave(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        save_part("clip", self.config, weights, folder / MODEL_FILE)
