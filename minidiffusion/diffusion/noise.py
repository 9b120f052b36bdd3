"""Random numbers as a function of (seed, picture, step): there is no state to save or to lose.

A counter-based generator (Philox, Salmon et al. 2011) is keyed by the seed and the picture and
starts at the step's own counter, so the same picture gets the same bits alone or in a batch, now
or after a resume, on any device: bits are drawn on the CPU and then moved.
"""

from collections.abc import Sequence

import numpy as np
import torch

from minidiffusion.diffusion.levels import Noise
from minidiffusion.shapes import Latent

START = -1
"""The step of the noise that sampling starts from; a sampler's own draws are steps 0, 1, ..."""


def stream(seed: int, picture: int, step: int) -> np.random.Generator:
    """The random numbers that belong to one picture at one step."""
    key = [seed & 0xFFFFFFFFFFFFFFFF, picture & 0xFFFFFFFFFFFFFFFF]
    # The draws count up in the lowest word; the step has the highest to itself.
    counter = [0, 0, 0, step & 0xFFFFFFFFFFFFFFFF]
    bits = np.random.Philox(
        key=np.array(key, dtype=np.uint64), counter=np.array(counter, dtype=np.uint64)
    )
    return np.random.Generator(bits)


def keyed(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Noise:
    """The draws of a batch: picture i has noise of its own seed, whatever its neighbours are."""

    def noise(step: int) -> Latent:
        rows = [
            stream(seed, 0, step).standard_normal(tuple(shape), dtype=np.float32) for seed in seeds
        ]
        return torch.from_numpy(np.stack(rows)).to(device)

    return noise
