"""minidiffusion: diffusion models in one small house.

    import minidiffusion
    pipe = minidiffusion.load("runs/demo")  # or v1-5-pruned-emaonly.safetensors
    pictures = pipe.generate(["sneaker", "bag"], guidance_scale=2.0, seed=0)

Everything public is loaded when it is first used: importing the package costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minidiffusion.checkpoints.catalog import load_denoiser
    from minidiffusion.checkpoints.parts import (
        load_autoencoder,
        load_text_encoder,
        load_text_encoders,
    )
    from minidiffusion.pipelines.load import load, pipeline
    from minidiffusion.pipelines.pipeline import Pipeline
    from minidiffusion.training.loop import train
    from minidiffusion.training.recipe import Recipe, load_recipe

_PLACES = {
    "load": "pipelines.load",
    "pipeline": "pipelines.load",
    "Pipeline": "pipelines.pipeline",
    "load_autoencoder": "checkpoints.parts",
    "load_denoiser": "checkpoints.catalog",
    "load_text_encoder": "checkpoints.parts",
    "load_text_encoders": "checkpoints.parts",
    "train": "training.loop",
    "Recipe": "training.recipe",
    "load_recipe": "training.recipe",
}

__all__ = [
    "Pipeline",
    "Recipe",
    "load",
    "load_autoencoder",
    "load_denoiser",
    "load_recipe",
    "load_text_encoder",
    "load_text_encoders",
    "pipeline",
    "train",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'minidiffusion' has no attribute {name!r}")
    return getattr(import_module(f"minidiffusion.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    """All that is public, and nothing else."""
    return [*__all__, "__version__"]
