"""A part of the shipped emoji, for tests that judge pictures by their captions.

Judging takes all pictures and captions that there are: of the whole pack, four times as long.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from minidiffusion.data import emoji
from minidiffusion.evaluation.colours import named

EVERY = 8


@contextmanager
def thinned_pack() -> Iterator[None]:
    """Both held-out splits whole; training pictures of their concepts, of every eighth other one,
    and all that name a colour."""
    pairs, pixels = emoji._pairs(), emoji._pixels(False)
    concepts = list(dict.fromkeys(pair.concept for pair in pairs))
    chosen = {*concepts[::EVERY], *(pair.concept for pair in pairs if pair.split != "train")}
    kept = [
        row for row, pair in enumerate(pairs)
        if not pair.tone and (pair.concept in chosen or named(pair.captions()[0]) is not None)
    ]  # fmt: skip
    some, shown = tuple(pairs[row] for row in kept), pixels[torch.tensor(kept)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "_pairs", lambda: some)
        patch.setattr(emoji, "_pixels", lambda tones: shown)
        yield
