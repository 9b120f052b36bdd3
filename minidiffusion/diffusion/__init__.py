"""The mathematics of diffusion: levels, paths, ladders, samplers, guidance, keyed noise."""

from minidiffusion.diffusion.densities import Density, LogitNormal, Mode, Uniform
from minidiffusion.diffusion.guidance import (
    SkipLayers,
    cfg,
    cfg_zero,
    guided,
    inpainted,
    interval,
    rescaled,
    stacked,
)
from minidiffusion.diffusion.ladders import SPACINGS, Path
from minidiffusion.diffusion.levels import (
    TARGETS,
    Denoise,
    Estimate,
    Level,
    Noise,
    Step,
    Target,
    aim,
    denoiser,
    read,
)
from minidiffusion.diffusion.noise import START, keyed, stream
from minidiffusion.diffusion.paths import (
    PATHS,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
)
from minidiffusion.diffusion.samplers import SAMPLERS, Sampler

__all__ = [
    "PATHS",
    "SAMPLERS",
    "SPACINGS",
    "START",
    "TARGETS",
    "Denoise",
    "Density",
    "Estimate",
    "Level",
    "LogitNormal",
    "Mode",
    "Noise",
    "Path",
    "RectifiedFlow",
    "Sampler",
    "SkipLayers",
    "Step",
    "Target",
    "Uniform",
    "VarianceExploding",
    "VariancePreserving",
    "aim",
    "cfg",
    "cfg_zero",
    "denoiser",
    "guided",
    "inpainted",
    "interval",
    "keyed",
    "read",
    "rescaled",
    "stacked",
    "stream",
]
