"""The tensor vocabulary: names for shapes, and what every network is conditioned on.

The axes' names are checked at run time in the tests (jaxtyping + beartype): ``b`` pictures of a
batch, ``c`` channels, ``h`` and ``w`` rows and columns, ``n`` tokens, ``d`` features.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int, UInt8
from torch import Tensor

Image = Float[Tensor, "b c h w"]
"""Pictures in [-1, 1]."""
Pixels = UInt8[Tensor, "b h w c"]
"""Pictures as files hold them, 0..255."""
FeatureMap = Float[Tensor, "b k rows columns"]
"""What a convolution leaves, of another width or size than it got."""
Latent = Float[Tensor, "b *d"]
"""Whatever is noised and denoised: pictures, latents of an autoencoder, points of the plane."""
Tokens = Float[Tensor, "b n d"]
Context = Float[Tensor, "b m e"]
"""Tokens of another length and width, to attend to."""
Features = Float[Tensor, "b d"]
Labels = Int[Tensor, " b"]
Times = Float[Tensor, " b"]
"""One network time per picture."""


class Cond(NamedTuple):
    """What a network is conditioned on; a network takes the fields that it knows.

    labels: class numbers; the number of classes itself stands for "no class".
    tokens: a sequence of embeddings to attend to. pooled: one embedding per picture.
    concat: channels laid beside the noised input (masks, masked latents, depth).
    """

    tokens: Context | None = None
    pooled: Features | None = None
    labels: Labels | None = None
    concat: Image | None = None


@runtime_checkable
class Network(Protocol):
    """Any callable that predicts from a noised input; the mathematics knows no more of a model."""

    def __call__(self, x: Latent, t: Times, cond: Cond) -> Latent: ...
