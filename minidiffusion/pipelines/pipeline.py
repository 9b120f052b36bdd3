"""The user's verbs: a network, its path and its defaults, ready to draw pictures.

txt2img, img2img and inpainting are one function: where x starts on the ladder, and a wrapper
around the denoiser. A model of latents has two parts more, which stand alone as well: the text
encoder (words -> Cond) and the autoencoder (pictures <-> latents).
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minidiffusion import device as devices
from minidiffusion.checkpoints.catalog import Row, Sampling
from minidiffusion.data.pictures import to_pil
from minidiffusion.diffusion import Step
from minidiffusion.models import Autoencoder, Model
from minidiffusion.pipelines.inputs import Given, Inputs, as_latents, as_they_are, check
from minidiffusion.pipelines.memory import at_work, decoded
from minidiffusion.pipelines.walk import Start, rows, settled, walk
from minidiffusion.shapes import Cond, Image, Latent, Times
from minidiffusion.text.conditioning import Text
from minidiffusion.typed import unknown

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Prompt = str | int | Sequence[int | str] | Tensor | None


@dataclass(frozen=True)
class Pipeline:
    """A trained network with everything that sampling from it needs.

    text: words to Cond; autoencoder: pictures to latents and back; None for models of pixels and
    classes. offload: each part lies on the device only while it works. tile: side of the
    autoencoder's tiles in the latent's pixels.
    """

    network: Model
    row: Row
    device: torch.device
    text: Text | None = None
    autoencoder: Autoencoder | None = None
    offload: bool = False
    tile: int | None = None

    def condition(self, prompt: Prompt = None, count: int = 1) -> Cond:
        """Prompts, or class numbers or names, as a Cond; None gives ``count`` rows of nothing."""
        if self.text is not None:
            with at_work(self.text.encoder, self.device, self.offload):
                return self.text.encode(worded(prompt, count))
        classes = self.row.classes
        if prompt is None:
            numbers = [len(classes)] * count
        elif not classes:
            raise ValueError("labels: this network was trained without classes")
        else:
            numbers = [self._number(label) for label in listed(prompt)]
        if not classes:
            return Cond()
        return Cond(labels=torch.tensor(numbers, dtype=torch.int64, device=self.device))

    def _number(self, label: int | str) -> int:
        classes = self.row.classes
        if isinstance(label, str) and not label.isdecimal():
            if label not in classes:
                raise unknown("label", f"unknown {label!r}", label, classes)
            return classes.index(label)
        if not 0 <= int(label) < len(classes):
            raise ValueError(f"label: must be 0..{len(classes) - 1}, got {int(label)}")
        return int(label)

    def sample(self, cond: Cond, count: int = 1, **options: Any) -> Latent:
        """The last step of `steps`: pictures in [-1, 1], latents, or points of the plane."""
        x = None
        for step in self.steps(cond, count, **options):
            x = step.x
        assert x is not None
        return x

    def sampling(
        self, num_steps: int | None = None, guidance_scale: float | None = None,
        sampler: str | None = None, spacing: str | None = None,
        guidance_interval: Sequence[float] | None = None,
    ) -> Sampling:  # fmt: skip
        """How `steps` samples; what is not given is the model's own."""
        return settled(
            self.row.sampling, steps=num_steps, guidance=guidance_scale, sampler=sampler,
            spacing=spacing, guidance_interval=guidance_interval,
        )  # fmt: skip

    @torch.no_grad()
    def _ask(self, x: Latent, t: Times, cond: Cond) -> Latent:
        return self.network(x, t, cond)

    def steps(
        self,
        cond: Cond,
        count: int = 1,
        *,
        negative: Cond | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        init: Tensor | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
        rescale: float = 0.0,
        guidance_interval: Sequence[float] | None = None,
    ) -> Iterator[Step]:
        """Walk the ladder; each Step's x0 is the preview. To cancel, stop iterating.

        count: samples (as many as cond has rows). Sample i has seed + i. negative: what guidance
        leads away from (default: no class, no words). size: rows and columns of the samples. init:
        clean samples to start from, noised to ``strength`` of the ladder. mask: 1 where init is to
        be painted over. rescale, guidance_interval: see `minidiffusion.diffusion.rescaled` and
        `interval`.
        """
        how = self.sampling(num_steps, guidance_scale, sampler, spacing, guidance_interval)
        start = Start(range(seed, seed + rows(cond, count)), size, init, strength, mask)
        against = self._nothing(cond) if negative is None else negative
        with at_work(self.network, self.device, self.offload):
            yield from walk(self._ask, self.row, how, start, (cond, against), rescale, self.device)

    def _nothing(self, cond: Cond) -> Cond | None:
        """No class, or no words; None where cond says nothing already."""
        if cond.labels is not None:
            blank = torch.full_like(cond.labels, len(self.row.classes))
            return None if torch.equal(blank, cond.labels) else cond._replace(labels=blank)
        if cond.tokens is None or self.text is None:
            return None
        count, length = cond.tokens.shape[:2]
        windows = max(1, length // self.text.encoder.config.positions)
        with at_work(self.text.encoder, self.device, self.offload):
            return self.text.encode([""] * count, windows=windows)

    def prepare(self, **pictures: Any) -> Inputs:
        """init_image, mask, depth (files or PIL pictures), width, height, fit: see `Given`."""
        given = Given(**pictures)
        wanted = getattr(self.network.config, "in_channels", self.row.shape[0])
        extra = wanted - self.row.shape[0]
        check(given, extra)
        if self.autoencoder is None:
            return as_they_are(given, self.row.shape, self.device)
        with at_work(self.autoencoder, self.device, self.offload):
            return as_latents(
                given, self.row.shape, self.autoencoder, extra, self.device, self.tile
            )

    def stream(
        self, prompt: Prompt = None, negative_prompt: str = "", *, labels: Prompt = None,
        num_images: int = 1, inputs: Inputs | None = None, width: int | None = None,
        height: int | None = None, **options: Any,
    ) -> Iterator[Step]:  # fmt: skip
        """The steps on the way to `generate`'s pictures, in one batch; options: of `steps`.

        prompt: text or texts, or class names or numbers (labels is another word for it); each is
        drawn num_images times. inputs: what `prepare` gave.
        """
        if inputs is None:
            inputs = self.prepare(width=width, height=height)
        prompts, count = repeated(prompt if labels is None else labels, num_images)
        negative = None
        if self.text is not None:
            with at_work(self.text.encoder, self.device, self.offload):
                cond, negative = self.text.encode_pair(worded(prompts, count), negative_prompt)
        elif negative_prompt:
            raise ValueError("negative prompt: this model knows classes, not words")
        else:
            cond = self.condition(prompts, count)
        init = inputs.init
        if inputs.mask is not None and inputs.hole is None and options.get("strength", 1) == 1:
            init = None  # a network that was trained to paint sees the picture beside its input
        yield from self.steps(
            cond._replace(concat=inputs.concat), num_images, negative=negative,
            size=inputs.latent_size, init=init, mask=inputs.hole, **options,
        )  # fmt: skip

    def picture_size(self, inputs: Inputs) -> tuple[int, int]:
        """Rows and columns of the pictures that `stream` makes of these inputs."""
        rows, columns = inputs.latent_size or self.row.shape[-2:]
        factor = 1 if self.autoencoder is None else self.autoencoder.config.factor
        return factor * rows, factor * columns

    def decode(self, x: Latent) -> Image:
        """Latents become pictures in [-1, 1]; a model of pixels has them already."""
        if x.ndim != 4:
            raise ValueError("generate: this network makes points, not pictures; use sample()")
        if not x.isfinite().all():
            raise ValueError("generate: samples that are not finite: is the guidance too high?")
        if self.autoencoder is None:
            return x
        with at_work(self.autoencoder, self.device, self.offload):
            return decoded(self.autoencoder, x, self.tile)

    def pictures(self, x: Latent, inputs: Inputs | None = None) -> list["Picture"]:
        """Finished samples as pictures; what the mask keeps is the given picture to the pixel."""
        image = self.decode(x)
        if inputs is not None and inputs.mask is not None and inputs.image is not None:
            image = torch.lerp(inputs.image, image.clamp(-1, 1), inputs.mask)
        return to_pil(image)

    def generate(
        self, prompt: Prompt = None, negative_prompt: str = "", *, labels: Prompt = None,
        num_images: int = 1, batch_size: int | None = None, seed: int = 0,
        init_image: Any = None, mask: Any = None, depth: Any = None, width: int | None = None,
        height: int | None = None, fit: str = "crop", **options: Any,
    ) -> list["Picture"]:  # fmt: skip
        """Pictures of the prompts; see `stream`. Picture i has seed + i, whatever the batch size.

        init_image, mask, depth: files or PIL pictures, see `prepare`. Where memory runs out the
        parts take turns on the device.
        """
        inputs = self.prepare(
            init_image=init_image, mask=mask, depth=depth, width=width, height=height, fit=fit
        )
        prompts, count = repeated(prompt if labels is None else labels, num_images)
        total = count if prompts is None else len(prompts)
        size = max(1, total) if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"batch size: must be at least 1, got {size}")
        made: list[Picture] = []
        pipe = self
        for start in range(0, max(1, total), size):
            some = None if prompts is None else prompts[start : start + size]
            left = min(size, total - start)
            given = {"num_images": 1 if some is not None else left, "inputs": inputs, **options}
            call = partial(_drawn, negative=negative_prompt, seed=seed + start, given=given)
            try:
                made += call(pipe, some)
            except (RuntimeError, MemoryError) as error:
                if pipe.offload or not devices.out_of_memory(error):
                    raise
                warnings.warn("memory ran out: the parts take turns on the device", stacklevel=2)
                pipe = replace(pipe, offload=True)
                made += call(pipe, some)
        return made

    def img2img(
        self, init_image: Any, prompt: Prompt = None, *, strength: float = 0.75, **options: Any
    ) -> list["Picture"]:
        """`generate` from a picture: at strength 0 it comes back, at 1 little of it is left."""
        return self.generate(prompt, init_image=init_image, strength=strength, **options)

    def inpaint(
        self, image: Any, mask: Any, prompt: Prompt = None, **options: Any
    ) -> list["Picture"]:
        """`generate` where the mask is white; the rest of the picture stays as it is."""
        return self.generate(prompt, init_image=image, mask=mask, **options)


def _drawn(
    pipe: Pipeline, prompts: Prompt, negative: str, seed: int, given: dict[str, Any]
) -> list["Picture"]:
    x = None
    for step in pipe.stream(prompts, negative, seed=seed, **given):
        x = step.x
    assert x is not None
    return pipe.pictures(x, given["inputs"])


def repeated(prompt: Prompt, count: int) -> tuple[list[int | str] | None, int]:
    """Each prompt ``count`` times in turn, and how many rows of nothing stand for no prompt."""
    if count < 1:
        raise ValueError(f"count: must be at least 1, got {count}")
    if prompt is None:
        return None, count
    return [one for one in listed(prompt) for _ in range(count)], count


def worded(prompt: Prompt, count: int) -> list[str]:
    """Texts; ``count`` empty ones stand for no prompt."""
    prompts = [""] * count if prompt is None else listed(prompt)
    for one in prompts:
        if not isinstance(one, str):
            raise ValueError(f"prompt: expected text, got {one!r}")
    return [str(one) for one in prompts]


def listed(prompt: Prompt) -> list[int | str]:
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    return [prompt] if isinstance(prompt, int | str) else list(prompt or [])
