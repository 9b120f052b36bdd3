"""Pictures and captions as directions of one space: the judge of models that draw from words.

Trained as CLIP is (Radford et al. 2021), and otherwise made, so that it shares no blind spot with
a CLIP that a model was trained on: convolutions look, and a caption is a bag of words, whose
order says nothing. Features are taken before the directions, normalised as in `LeNet`.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from minidiffusion.shapes import FeatureMap, Features, Image

PADDING = -1
"""Fills up the rows of shorter captions; no token's id."""


@dataclass(frozen=True)
class MatcherConfig:
    """side: in pixels; larger pictures are shrunk to it, so that it judges what is shown and not
    how sharply. words: how many tokens it knows. token: their width. width: of the directions.
    """

    side: int = 32
    widths: tuple[int, int, int] = (48, 96, 128)
    features: int = 128
    width: int = 128
    words: int = 4425
    token: int = 48
    hidden: int = 256


class Convolved(nn.Sequential):
    """Three by three, normalised, activated; a stride of two halves the sides."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.GELU(),
        )


class Matcher(nn.Module):
    """vocabulary: the known tokens' ids, rising; all others are passed over.

    temperature: what cosines are multiplied by, as its logarithm; in training alone.
    """

    vocabulary: Tensor

    def __init__(self, config: MatcherConfig = MatcherConfig()) -> None:
        super().__init__()
        self.config = config
        first, second, third = config.widths
        self.halves = nn.ModuleList([
            Convolved(3, first, 2), Convolved(first, second, 2), Convolved(second, third, 2),
        ])  # fmt: skip
        self.extra = nn.ModuleList([Convolved(second, second, 1), Convolved(third, third, 1)])
        self.hidden = nn.Linear(third * (config.side // 8) ** 2, config.features, bias=False)
        self.norm = nn.BatchNorm1d(config.features)
        self.look = nn.Linear(config.features, config.width)
        self.register_buffer("vocabulary", torch.arange(config.words))
        self.table = nn.Embedding(config.words, config.token)
        self.read = nn.Sequential(
            nn.Linear(config.token, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.width),
        )
        self.temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def features(self, x: Image) -> Features:
        """Of pictures in [-1, 1] whose side is a multiple of the config's: the space of this
        judge's Frechet distance."""
        first, second, third = self.halves
        x = second(first(self._shrunk(x)))
        x = third(x + self.extra[0](x))
        x = x + self.extra[1](x)
        features: Tensor = F.gelu(self.norm(self.hidden(x.flatten(1))))
        return features

    def _shrunk(self, x: Image) -> FeatureMap:
        return F.avg_pool2d(x, x.shape[-1] // self.config.side)

    def pictures(self, x: Image) -> Float[Tensor, "b width"]:
        """Directions of length 1."""
        return F.normalize(self.look(self.features(x)).float(), dim=1)

    def captions(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b width"]:
        """Directions of length 1, each of the mean of its known tokens; zeros where none is."""
        place = torch.searchsorted(self.vocabulary, ids).clamp(max=self.config.words - 1)
        known = (self.vocabulary[place] == ids)[:, :, None]
        mean = (self.table(place) * known).sum(dim=1) / known.sum(dim=1).clamp(min=1)
        return F.normalize(self.read(mean).float(), dim=1)

    def forward(self, x: Image, ids: Int[Tensor, "k n"]) -> Float[Tensor, "b k"]:
        """The cosine of every picture with every caption."""
        return self.pictures(x) @ self.captions(ids).T
