"""The user's verbs: a network, its path and its defaults, ready to draw pictures.

txt2img, img2img and inpainting are one function: where x starts on the ladder, and a wrapper
around the denoiser. A model of latents has two parts more, which stand alone as well: the text
encoder (words -> Cond) and the autoencoder (pictures <-> latents).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from minidiffusion.checkpoints.catalog import Row, Sampling
from minidiffusion.checkpoints.official import Shelf
from minidiffusion.data.pictures import to_pil
from minidiffusion.diffusion import Step
from minidiffusion.models import Autoencoder, Model
from minidiffusion.pipelines.finite import FiniteGuard, is_finite
from minidiffusion.pipelines.generation import ImageLoop
from minidiffusion.pipelines.inputs import (
    Given,
    Inputs,
    as_latents,
    as_they_are,
    check,
    whole_patches,
)
from minidiffusion.pipelines.memory import at_work, decoded, freeze, guarded
from minidiffusion.pipelines.prompts import Prompt, class_number, listed, repeated, worded
from minidiffusion.pipelines.walk import Guiding, Start, rows, settled, shifted, start_noise, walk
from minidiffusion.shapes import Cond, FeatureMap, Image, Latent, Times
from minidiffusion.text import HashedText, Text, TripleText

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Encoder = Text | TripleText | HashedText
T = TypeVar("T")


@dataclass(frozen=True)
class Pipeline:
    """A trained network with everything that sampling from it needs.

    text: words, or the names of class numbers, to Cond; autoencoder: pictures to latents and back;
    None for models of pixels and classes. offload: each part lies on the device only while it
    works. tile: side of the autoencoder's tiles in the latent's pixels. weights: where an MMDiT's
    adaptive norms are read for each prompt, see `MMDiT.freeze`. shelf: parts that lie in their
    files while they do not work.
    """

    network: Model
    row: Row
    device: torch.device
    text: Encoder | None = None
    autoencoder: Autoencoder | None = None
    offload: bool = False
    tile: int | None = None
    weights: Mapping[str, Tensor] | None = None
    shelf: Shelf = field(default_factory=dict)

    def condition(self, prompt: Prompt = None, count: int = 1) -> Cond:
        """Prompts, or class numbers or names, as a Cond; None gives ``count`` rows of nothing."""
        if self.text is not None:
            texts = self._texts(prompt, count)
            return self._encoded(lambda text: text.encode(texts, **self._place))
        classes = self.row.classes
        numbers = [len(classes)] * count if prompt is None else self.numbers(prompt)
        if not classes:
            return Cond()
        return Cond(labels=torch.tensor(numbers, dtype=torch.int64, device=self.device))

    def numbers(self, labels: Prompt) -> list[int]:
        """The numbers of classes by number or name. ValueError for what is none, or without any."""
        if not self.row.classes:
            raise ValueError("labels: this network was trained without classes")
        return [class_number(label, self.row.classes) for label in listed(labels)]

    def _texts(self, prompt: Prompt, count: int) -> list[str]:
        """Texts; numbers stand for the names of classes, ``count`` empty ones for no prompt."""
        prompts = [""] * count if prompt is None else listed(prompt)
        classes = self.row.classes
        return worded(
            classes[class_number(x, classes)] if classes and isinstance(x, int) else x
            for x in prompts
        )

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
    def _ask(
        self, guard: FiniteGuard, x: Latent, t: Times, cond: Cond, **less: tuple[int, ...]
    ) -> Latent:
        return guard(lambda: self.network(x, t, cond, **less))

    def _encoded(self, encode: Callable[[Encoder], T]) -> T:
        """What encode(text) makes of prompts, in float32 where 16 bits overflow."""
        text = self.text
        assert text is not None
        found = encode(text)
        if is_finite(found):
            return found
        with FiniteGuard(text.encoder, "text_encoder") as guard:
            # A copy remembers no prompt: one that is not encoded anew shows no module at fault.
            return guard(lambda: encode(replace(text)))

    @property
    def parts(self) -> list[nn.Module]:
        """All that has weights."""
        text = None if self.text is None else self.text.encoder
        return [part for part in (self.network, text, self.autoencoder) if part is not None]

    @property
    def _place(self) -> dict[str, Any]:
        """Where text encoders work: each in its turn, where they take turns."""
        return {"place": self._at_work, "device": self.device}

    def _at_work(self, part: nn.Module) -> AbstractContextManager[None]:
        return at_work(part, self.device, self.offload, self.shelf.get(part))

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
        latents: Tensor | None = None,
        guidance_interval: Sequence[float] | None = None,
        shift: float | None = None,
        dynamic_shift: bool = False,
        **guiding: Any,
    ) -> Iterator[Step]:
        """Walk the ladder; each Step's x0 is the preview. To cancel, stop iterating.

        count: samples (as many as cond has rows). Sample i has seed + i. negative: what guidance
        leads away from (default: no class, no words). size: rows and columns of the samples. init:
        clean samples to start from, noised to ``strength`` of the ladder. mask: 1 where init is to
        be painted over. latents: noise of unit variance, one a sample, instead of the seed's to
        start from or to lay on init. guidance_interval: see `minidiffusion.diffusion.interval`.
        shift: of a rectified flow; dynamic_shift: grown with the size, see `RectifiedFlow.resized`.
        guiding: the fields of `Guiding`: rescale, cfg_zero, slg, slg_layers.
        """
        how = self.sampling(num_steps, guidance_scale, sampler, spacing, guidance_interval)
        seeds = range(seed, seed + rows(cond, count))
        start = Start(seeds, size, init, strength, mask, latents)
        conds = cond, self._nothing(cond) if negative is None else negative
        row = shifted(self.row, size, shift, dynamic_shift)
        if self.weights is not None:
            freeze(self.network, self.weights, how, row, conds, self.shelf.get(self.network))
        with self._at_work(self.network), FiniteGuard(self.network, "network") as guard:
            ask = partial(self._ask, guard)
            yield from walk(ask, row, how, start, conds, Guiding(**guiding), self.device)

    def _nothing(self, cond: Cond) -> Cond | None:
        """No class, or no words; None where cond says nothing already."""
        if cond.labels is not None:
            blank = torch.full_like(cond.labels, len(self.row.classes))
            return None if torch.equal(blank, cond.labels) else cond._replace(labels=blank)
        if cond.tokens is None or self.text is None:
            return None
        count, length = cond.tokens.shape[:2]
        return self._encoded(
            lambda text: text.encode([""] * count, text.windows(length), **self._place)
        )

    def prepare(self, **pictures: Any) -> Inputs:
        """init_image, mask, depth (files or PIL pictures), width, height, fit: see `Given`."""
        given = Given(**pictures)
        wanted = getattr(self.network.config, "in_channels", self.row.shape[0])
        extra = wanted - self.row.shape[0]
        check(given, extra)
        if self.autoencoder is None:
            return as_they_are(given, self.row.shape, self.device)
        given = whole_patches(given, self.row, self.autoencoder.config.factor)
        with self._at_work(self.autoencoder):
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
            texts = self._texts(prompts, count)
            cond, negative = self._encoded(
                lambda text: text.encode_pair(texts, negative_prompt, **self._place)
            )
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

    def latent_shape(self, inputs: Inputs) -> tuple[int, ...]:
        """Of one sample that `stream` makes of these inputs."""
        return (self.row.shape[0], *(inputs.latent_size or self.row.shape[1:]))

    def picture_size(self, inputs: Inputs) -> tuple[int, int]:
        """Rows and columns of the pictures that `stream` makes of these inputs."""
        rows, columns = inputs.latent_size or self.row.shape[-2:]
        factor = 1 if self.autoencoder is None else self.autoencoder.config.factor
        return factor * rows, factor * columns

    def decode(self, x: Latent) -> Image:
        """Latents become pictures in [-1, 1]; a model of pixels has them already."""
        if x.ndim != 4:
            raise ValueError("generate: this network makes points, not pictures; use sample()")
        if not is_finite(x):
            raise ValueError("generate: samples that are not finite: is the guidance too high?")
        if self.autoencoder is None:
            return x
        with self._at_work(self.autoencoder):
            return decoded(self.autoencoder, x, self.tile)

    @torch.no_grad()
    def moments(self, image: Image) -> tuple[FeatureMap, FeatureMap]:
        """Means and deviations of pictures' latents, as the denoiser wants them."""
        assert self.autoencoder is not None
        c = self.autoencoder.config
        with self._at_work(self.autoencoder):
            posterior = self.autoencoder.posterior
            found = guarded(self.autoencoder, lambda tile: posterior(image, tile), self.tile)
        return (found.mean - c.shift) * c.scale, torch.exp(0.5 * found.log_variance) * c.scale

    def pictures(self, x: Latent, inputs: Inputs | None = None) -> list["Picture"]:
        """Finished samples as pictures; what the mask keeps is the given picture to the pixel."""
        image = self.decode(x)
        if inputs is not None and inputs.mask is not None and inputs.image is not None:
            image = torch.lerp(inputs.image, image.clamp(-1, 1), inputs.mask)
        return to_pil(image)

    def generate(
        self, prompt: Prompt = None, negative_prompt: str = "", *, labels: Prompt = None,
        num_images: int = 1, batch_size: int | None = None, exact: bool = False, seed: int = 0,
        init_image: Any = None, mask: Any = None, depth: Any = None, width: int | None = None,
        height: int | None = None, fit: str = "crop", latents: Tensor | None = None,
        **options: Any,
    ) -> list["Picture"]:  # fmt: skip
        """Pictures of the prompts; see `stream`. Picture i has seed + i, whatever the batch size.

        exact: one at a time, whatever the batch size: each is to the bit what it is alone, where
        the sums of a larger batch may be rounded otherwise. init_image, mask, depth: files or PIL
        pictures, see `prepare`. latents: see `steps`; one a picture. Where memory runs out the
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
        if latents is not None:
            latents = start_noise(latents, (total, *self.latent_shape(inputs)), self.device)
        loop = ImageLoop(self, inputs)
        return loop.all(
            prompts, total, 1 if exact else size, negative_prompt=negative_prompt, seed=seed,
            latents=latents, **options,
        )  # fmt: skip

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
