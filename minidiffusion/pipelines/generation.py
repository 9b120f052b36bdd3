"""The one loop that makes images: a batch's steps, its images, and what if memory runs out."""

import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minidiffusion import device as devices
from minidiffusion.diffusion import Step
from minidiffusion.pipelines.inputs import Inputs
from minidiffusion.pipelines.prompts import Prompt
from minidiffusion.shapes import Latent

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from minidiffusion.pipelines.pipeline import Pipeline


class ImageLoop:
    """Batches of one pipeline with the same inputs, as `Pipeline.prepare` makes them.

    Where memory runs out a batch begins again and the parts take turns on the device, then and
    for all batches that follow; where it runs out all the same, the error is raised.
    """

    def __init__(self, pipe: "Pipeline", inputs: Inputs) -> None:
        self.pipe, self.inputs = pipe, inputs

    def steps(self, prompt: Prompt, negative_prompt: str = "", **options: Any) -> Iterator[Step]:
        """Those of `Pipeline.stream`; the first ones come again where memory ran out."""
        try:
            yield from self.pipe.stream(prompt, negative_prompt, inputs=self.inputs, **options)
            return
        except (RuntimeError, MemoryError) as error:
            self._offload(error)
        yield from self.pipe.stream(prompt, negative_prompt, inputs=self.inputs, **options)

    def images(self, x: Latent) -> list["Picture"]:
        """The finished images of a batch's last step."""
        try:
            return self.pipe.pictures(x, self.inputs)
        except (RuntimeError, MemoryError) as error:
            self._offload(error)
        return self.pipe.pictures(x, self.inputs)

    def batch(self, prompt: Prompt, negative_prompt: str = "", **options: Any) -> list["Picture"]:
        """A batch from prompts to images."""
        x = None
        for step in self.steps(prompt, negative_prompt, **options):
            x = step.x
        assert x is not None
        return self.images(x)

    def all(
        self, prompts: list[int | str] | None, count: int, size: int, *, seed: int,
        latents: Tensor | None = None, **options: Any,
    ) -> list["Picture"]:  # fmt: skip
        """So many images in batches of at most ``size``; image i has seed + i and latents[i]."""
        made: list[Picture] = []
        for start in range(0, max(1, count), size):
            here = slice(start, start + size)
            some = None if prompts is None else prompts[here]
            made += self.batch(
                some, seed=seed + start, latents=None if latents is None else latents[here],
                num_images=1 if some is not None else min(size, count - start), **options,
            )  # fmt: skip
        return made

    def _offload(self, error: BaseException) -> None:
        """Frees the device; raises the error that is being handled where that is no help."""
        if self.pipe.offload or not devices.out_of_memory(error):
            raise
        warnings.warn("memory ran out: the parts take turns on the device", stacklevel=3)
        self.pipe = replace(self.pipe, offload=True)
        for part in self.pipe.parts:
            with suppress(NotImplementedError):  # torch's, of a part that lies in its file
                part.to("cpu")
