"""The user's verbs: a network, its path and its defaults, ready to draw pictures.

txt2img, img2img and inpainting are one function: where x starts on the ladder, and a wrapper
around the denoiser.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minidiffusion import device as devices
from minidiffusion.checkpoints.catalog import Denoiser, Row, load_denoiser
from minidiffusion.data.pictures import to_pil
from minidiffusion.diffusion import (
    SAMPLERS,
    START,
    Denoise,
    Step,
    cfg,
    denoiser,
    guided,
    inpainted,
    interval,
    keyed,
    rescaled,
)
from minidiffusion.models import Model
from minidiffusion.shapes import Cond, Latent, Times
from minidiffusion.typed import unknown

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


@dataclass(frozen=True)
class Pipeline:
    """A trained network with everything that sampling from it needs."""

    network: Model
    row: Row
    device: torch.device

    def condition(self, labels: Sequence[int | str] | Tensor | None = None, count: int = 1) -> Cond:
        """Class numbers or names as a Cond; None gives ``count`` unconditional rows."""
        classes = self.row.classes
        if labels is None:
            numbers = [len(classes)] * count
        elif not classes:
            raise ValueError("labels: this network was trained without classes")
        else:
            numbers = [self._number(label) for label in labels]
        if not classes:
            return Cond()
        return Cond(labels=torch.tensor(numbers, dtype=torch.int64, device=self.device))

    def _number(self, label: int | str | Tensor) -> int:
        classes = self.row.classes
        if isinstance(label, str) and not label.isdecimal():
            if label not in classes:
                raise unknown("label", f"unknown {label!r}", label, classes)
            return classes.index(label)
        if not 0 <= int(label) < len(classes):
            raise ValueError(f"label: must be 0..{len(classes) - 1}, got {int(label)}")
        return int(label)

    def sample(self, cond: Cond, count: int = 1, **options: Any) -> Latent:
        """The last step of `steps`: samples in [-1, 1] (pictures) or on the plane (points)."""
        x = None
        for step in self.steps(cond, count, **options):
            x = step.x
        assert x is not None
        return x

    @torch.no_grad()
    def _ask(self, x: Latent, t: Times, cond: Cond) -> Latent:
        return self.network(x, t, cond)

    def steps(
        self,
        cond: Cond,
        count: int = 1,
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        seed: int = 0,
        init: Tensor | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
        rescale: float = 0.0,
        guidance_interval: Sequence[float] | None = None,
    ) -> Iterator[Step]:
        """Walk the ladder; each Step's x0 is the preview. To cancel, stop iterating.

        count: samples (as many as cond has rows). Sample i has seed + i. init: clean samples to
        start from, noised to ``strength`` of the ladder. mask: 1 where init is to be painted over.
        rescale, guidance_interval: see `minidiffusion.diffusion.rescaled` and `interval`.
        """
        usual = self.row.sampling
        name = sampler or usual.sampler
        if name not in SAMPLERS:
            raise unknown("sampler", f"unknown {name!r}", name, SAMPLERS)
        count = len(cond.labels) if cond.labels is not None else count
        if count < 1:
            raise ValueError(f"count: must be at least 1, got {count}")
        if init is None and (mask is not None or strength != 1):
            raise ValueError("mask and strength: only with init, the picture to start from")
        noise = keyed(range(seed, seed + count), self.row.shape, self.device)
        steps = usual.steps if num_steps is None else num_steps
        levels = self.row.path.ladder(steps, spacing or usual.spacing, strength=strength)
        scale = usual.guidance if guidance_scale is None else guidance_scale
        span = usual.guidance_interval if guidance_interval is None else guidance_interval
        denoise = self._denoise(cond, scale, rescale, span)
        x0 = self._fitted("init", torch.zeros(1) if init is None else init, count)
        x = levels[0].mix(x0, noise(START))
        if mask is not None:
            denoise = inpainted(denoise, x0, self._fitted("mask", mask, count))
        if len(levels) > 1:
            yield from SAMPLERS[name](denoise, x, levels, noise)
        else:
            yield Step(0, x, x, levels[0])

    def _fitted(self, name: str, given: Tensor, count: int) -> Latent:
        """One for each sample; what has an axis of length 1, or too few, serves all along it."""
        shape = (count, *self.row.shape)
        try:
            return given.to(self.device, torch.float32).expand(shape)
        except RuntimeError:
            raise ValueError(
                f"{name}: expected the shape {shape}, got {tuple(given.shape)}"
            ) from None

    def _denoise(
        self, cond: Cond, scale: float, rescale: float, span: Sequence[float] | None
    ) -> Denoise:
        """One pass where nothing guides, both conditions in one batch where something does."""
        if not scale >= 0 or scale == float("inf"):
            raise ValueError(f"guidance: must be 0 or more, got {scale}")
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale: must be in [0, 1], got {rescale}")
        if span is not None and not span[0] <= span[1]:
            raise ValueError(f"guidance interval: must not fall, got {span[0]} to {span[1]}")
        alone = denoiser(self._ask, self.row.target, cond)
        if scale == 1 or cond.labels is None or bool((cond.labels == len(self.row.classes)).all()):
            return alone
        combine = rescaled(cfg(scale), rescale) if rescale else cfg(scale)
        nothing = cond._replace(labels=torch.full_like(cond.labels, len(self.row.classes)))
        both = guided(self._ask, self.row.target, [cond, nothing], combine)
        return both if span is None else interval(both, alone, low=span[0], high=span[1])

    def generate(
        self, labels: Sequence[int | str] | None = None, count: int = 1, **options: Any
    ) -> list["Picture"]:
        """Pictures of these classes (names or numbers), or ``count`` of no class in particular."""
        x = self.sample(self.condition(labels, count), count, **options)
        if x.ndim != 4:
            raise ValueError("generate: this network makes points, not pictures; use sample()")
        return to_pil(x)

    def stream(
        self, labels: Sequence[int | str] | None = None, count: int = 1, **options: Any
    ) -> Iterator[Step]:
        """The steps on the way to `generate`'s pictures."""
        return self.steps(self.condition(labels, count), count, **options)


def load(
    path: str | Path,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    precision: devices.Precision = "fp32",
) -> Pipeline:
    """The pipeline of a run's folder or of its model file.

    The network runs in dtype; without one, in precision (auto: bf16 where that is faster).
    """
    where = devices.pick(device)
    return pipeline(load_denoiser(path), where, dtype or devices.dtype(precision, where))


def pipeline(
    trained: Denoiser, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Pipeline:
    """The pipeline of a network in memory, such as a training report's average()."""
    where = device or next(trained.network.parameters()).device
    return Pipeline(trained.network.to(where, dtype), trained.row, where)
