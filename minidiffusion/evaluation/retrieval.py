"""Is a picture's own caption the one that fits it best, among those of other concepts?"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minidiffusion.data.emoji import Pair
from minidiffusion.evaluation.agreement import Agreement, wilson
from minidiffusion.shapes import Image

Cosines = Callable[[Image, Sequence[str]], Float[Tensor, "b k"]]
"""Of every picture in [-1, 1] with every caption: what a judge or a CLIP is asked for."""
WAYS, DRAWS = 100, 5


def share(hits: Float[Tensor, " n"] | Bool[Tensor, " n"]) -> Agreement:
    """The mean of figures from 0 to 1, one a picture, with its interval.

    Several draws for one picture are one figure, their mean: the pictures are what is independent.
    """
    if not len(hits):
        raise ValueError("a share of no pictures")
    total = float(hits.double().sum())
    return Agreement(total / len(hits), *wilson(total, len(hits)))


def candidates(
    pairs: Sequence[Pair], rows: Sequence[int], ways: int = WAYS, seed: int = 0
) -> Int[Tensor, "n ways"]:
    """For each of these rows of the pairs its own number, then those of other concepts' pairs.

    No two are of one concept. A row's candidates are a function of the pairs, the row and the
    seed. Raises ValueError where there are fewer concepts than ways.
    """
    places: dict[str, list[int]] = {}
    for place, pair in enumerate(pairs):
        places.setdefault(pair.concept, []).append(place)
    concepts = list(places)
    if not 2 <= ways <= len(concepts):
        raise ValueError(f"{ways} ways: must be 2..{len(concepts)}, as many as there are concepts")
    found = []
    for row in rows:
        draw = np.random.Generator(np.random.Philox(key=np.array([seed, row], dtype=np.uint64)))
        some = (concepts[i] for i in draw.permutation(len(concepts))[:ways])
        others = [places[name] for name in some if name != pairs[row].concept][: ways - 1]
        found.append([row, *(one[draw.integers(len(one))] for one in others)])
    return torch.tensor(found)


def retrieved(cosines: Float[Tensor, "n k"], among: Int[Tensor, "n ways"]) -> Bool[Tensor, " n"]:
    """Whether the first of each row's candidates fits better than all others. A tie is a miss."""
    wanted = cosines.gather(1, among.to(cosines.device))
    return wanted[:, 0] > wanted[:, 1:].max(dim=1).values


def retrieval(
    cosines: Float[Tensor, "n k"], pairs: Sequence[Pair], rows: Sequence[int],
    ways: int = WAYS, seed: int = 0, draws: int = DRAWS,
) -> Agreement:  # fmt: skip
    """The share of pictures whose own caption is found; by chance it is 1 / ways.

    cosines: of the pictures that were drawn for ``rows`` of the pairs, with all pairs' captions.
    draws: of the other candidates, for every picture.
    """
    some = [retrieved(cosines, candidates(pairs, rows, ways, seed + i)) for i in range(draws)]
    return share(torch.stack(some).float().mean(dim=0))
