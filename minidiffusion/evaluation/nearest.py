"""Are the pictures new? How near the training set they lie, and how near unseen real ones do."""

import torch
from jaxtyping import Float
from torch import Tensor

from minidiffusion.shapes import Image


def nearest_training_ratio(
    generated: Image, train: Float[Tensor, "n c h w"], held_out: Float[Tensor, "m c h w"]
) -> float:
    """median over generated g of d(g, train) / median over held-out h of d(h, train).

    d is the Euclidean distance in pixels to the nearest training picture. 1: as far from the
    training set as real pictures that it does not contain. Well below 1: memorised; copies have 0.
    Smooth pictures lie nearer to everything, so compare at an equal degree of detail. ``train``
    must be all that the model saw, or a copy of what is left out goes unnoticed.
    """
    unseen = nearest_distances(held_out, train).median()
    if unseen == 0:
        raise ValueError("the held-out pictures are in the training set: they cannot be a measure")
    return float(nearest_distances(generated, train).median() / unseen)


def nearest_distances(
    pictures: Image, others: Float[Tensor, "n c h w"], chunk: int = 256
) -> Float[Tensor, " b"]:
    """The distance of each picture to the nearest of the others."""
    x, y = pictures.flatten(1), others.flatten(1)
    norms = y.square().sum(dim=1)
    found = []
    for part in x.split(chunk):
        # |x - y|^2 less |x|^2, which does not matter for which is nearest. As a product of matrices
        # it is fast and rounds, so the distance to the one that was found is taken anew.
        index = torch.addmm(norms, part, y.T, alpha=-2).argmin(dim=1)
        found.append((part - y[index]).norm(dim=1))
    return torch.cat(found)
