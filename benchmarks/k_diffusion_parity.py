"""Our samplers and ladders beside k-diffusion's: the same network, ladder and noise.

    pip install -c constraints.txt --no-deps k-diffusion torchdiffeq torchsde trampoline
    python benchmarks/k_diffusion_parity.py

Nothing of k-diffusion but sampling.py and external.py runs.
"""

import importlib
import importlib.util
import sys
from itertools import count
from types import ModuleType
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from sampler_parity import SD, STEPS, apart, finished, network, noise

from minidiffusion.diffusion import SAMPLERS, denoiser
from minidiffusion.shapes import Cond


def rooms() -> tuple[ModuleType, ModuleType]:
    """k-diffusion's samplers and wrappers; exits where they are not installed.

    The package's own front door imports torchvision, clip and more, so its room is entered by the
    side: a bare package of that name, and stand-ins for what these two files never call.
    """
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        raise SystemExit("k-diffusion is not installed; see the top of this file")
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations or ())
    vision, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    transforms.functional = ModuleType("torchvision.transforms.functional")
    standing = {
        "k_diffusion": package,
        "torchvision": vision,
        "torchvision.transforms": transforms,
        "torchvision.transforms.functional": transforms.functional,
    }
    with mock.patch.dict(sys.modules, standing):
        return (
            importlib.import_module("k_diffusion.sampling"),
            importlib.import_module("k_diffusion.external"),
        )


NAMES = ("euler", "euler_ancestral", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde")


def difference(
    sampling: ModuleType, external: ModuleType, name: str, target: str, spacing: str
) -> float:
    """Beside sample_<name>, both sides in float64: the largest, over the largest value."""
    levels = SD.ladder(STEPS, spacing)
    ratios = torch.tensor([v.sigma / v.alpha for v in levels], dtype=torch.float64)
    wrapper = {"eps": "DiscreteEpsDDPMDenoiser", "v": "DiscreteVDDPMDenoiser"}[target]
    model = getattr(external, wrapper)(network, torch.from_numpy(SD.alphas_cumprod), quantize=False)
    draws = count()
    extra = (
        {"noise_sampler": lambda here, there: noise(next(draws))}
        if name in ("euler_ancestral", "dpmpp_2m_sde")
        else {}
    )
    x = levels[0].sigma * noise(-1)
    sample = getattr(sampling, f"sample_{name}")
    theirs = sample(model, x / levels[0].alpha, ratios, disable=True, **extra)
    ours = finished(SAMPLERS[name](denoiser(network, target, Cond()), x, levels, noise))
    return apart(ours, theirs)


def ladder_difference(sampling: ModuleType, spacing: str) -> float:
    """Relative, as theirs is a float32 table of noises from 14.6 down to 0.03."""
    high, low = SD.noises()
    theirs = getattr(sampling, f"get_sigmas_{spacing}")(STEPS, low, high).double()[:-1]
    levels = SD.ladder(STEPS, spacing)[:-1]
    ours = torch.tensor([v.sigma / v.alpha for v in levels], dtype=torch.float64)
    return float((ours / theirs - 1).abs().max())


def main() -> None:
    sampling, external = rooms()
    table = Table("ours", "theirs", "largest difference")
    for spacing in ("karras", "exponential"):
        for name in NAMES:
            found = max(
                difference(sampling, external, name, target, spacing) for target in ("eps", "v")
            )
            table.add_row(name, f"sample_{name}, {spacing}", f"{found:.1e}")
        found = ladder_difference(sampling, spacing)
        table.add_row(spacing, f"get_sigmas_{spacing}, a float32 table", f"{found:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
