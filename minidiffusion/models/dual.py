"""CLIP whole (Radford et al. 2021): a text encoder and a picture encoder that meet in one space."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from minidiffusion.models.clip import CLIPConfig, CLIPPicture, CLIPText, Ids, PictureConfig
from minidiffusion.shapes import Features, Image

SHARPEST = 100.0
"""What the products of unit vectors are multiplied by, at most (section 2.5)."""


@dataclass(frozen=True)
class DualEncoderConfig:
    """Both encoders; their projections are of one width."""

    name: ClassVar[str] = "dual_encoder"
    text: CLIPConfig = field(default_factory=lambda: CLIPConfig(projection=256))
    picture: PictureConfig = field(default_factory=PictureConfig)

    def __post_init__(self) -> None:
        if self.text.projection != self.picture.projection:
            raise ValueError(
                f"projection: text has {self.text.projection}, picture {self.picture.projection}; "
                "they must be equal"
            )


class DualEncoder(nn.Module):
    """Texts and pictures to unit vectors, alike where they belong together."""

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.text, self.picture = CLIPText(config.text), CLIPPicture(config.picture)
        for table in (self.text.tokens, self.text.places, self.picture.places):
            nn.init.normal_(table.weight, std=0.02)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(
        self, ids: Ids, image: Image
    ) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b e"], Float[Tensor, ""]]:
        """The texts' vectors, the pictures', and what their products are to be multiplied by."""
        scale = self.log_scale.exp().clamp(max=SHARPEST)
        return self.encode_text(ids), self.encode_picture(image), scale

    def encode_text(self, ids: Ids) -> Features:
        return F.normalize(self.text(ids).pooled.float(), dim=1)

    def encode_picture(self, image: Image) -> Features:
        return F.normalize(self.picture(image).float(), dim=1)
