"""Captioned pictures as a latent denoiser is trained on them: every one is encoded only once.

What a frozen autoencoder and a frozen text encoder make of a picture and of a caption is kept in
the run's folder, a file each, named by the hash of everything that it came from.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minidiffusion.checkpoints.reader import read_metadata, read_safetensors, write_safetensors
from minidiffusion.data.dataset import Batch, Dataset
from minidiffusion.diffusion import stacked
from minidiffusion.models import Autoencoder, AutoencoderConfig, MMDiTConfig, ModelConfig
from minidiffusion.shapes import Cond, FeatureMap, Image
from minidiffusion.training.prompts import Named
from minidiffusion.typed import ConfigError

FOLDER = "cache"
Encode = Callable[[str], Cond]
"""A caption becomes what a denoiser is conditioned on, one row."""
Words = dict[str, Cond]
"""What became of each caption, one row."""


@dataclass(frozen=True, eq=False)
class Latents:
    """A data set of encoded pictures: a batch's x holds means, then deviations, in its channels.

    All of it lies in memory: 0.4 MB for a picture of 512 pixels and its caption; of Stable
    Diffusion 3 2 MB for one of 1024, and 2.7 for a caption in bf16. words: of every caption, and of
    the empty one. rows: which of the moments each sample has, where pictures come several times.
    """

    moments: Float[Tensor, "n c2 h w"]
    captions: tuple[str, ...]
    words: Words
    source: str
    rows: Int[Tensor, " m"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        channels, *sides = self.moments.shape[1:]
        return (channels // 2, *sides)

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, indices: Sequence[int]) -> Batch:
        rows = torch.tensor(indices, dtype=torch.int64)
        if self.rows is not None:
            rows = self.rows[rows]
        captions = tuple(self.captions[i] for i in indices)
        return Batch(self.moments[rows], torch.zeros(len(rows), dtype=torch.int64), captions)

    def fingerprint(self) -> str:
        """The pictures' and captions' own, and that of the networks that encoded them."""
        return self.source


def sampled(moments: Image, noise: Image) -> tuple[FeatureMap, FeatureMap]:
    """Latents drawn from their Gaussians with one half of the noise; the other half.

    Drawn, as Rombach et al. 2022 train, not the means: what the denoiser learns is then right for
    an autoencoder of any deviation, and costs no more than the noise.
    """
    (mean, deviation), (eps, own) = moments.chunk(2, dim=1), noise.chunk(2, dim=1)
    return mean + deviation * own, eps


def condition(
    dataset: Dataset, batch: Batch, kept: Bool[Tensor, " b"], device: torch.device
) -> Cond:
    """Captions or classes, or classes' names; where not kept, nothing in their place."""
    if isinstance(dataset, Latents):
        pairs = zip(batch.captions, kept.tolist(), strict=True)
        cond = stacked([dataset.words[caption if keep else ""] for caption, keep in pairs])
        return Cond(*(part if part is None else wide(part.to(device)) for part in cond))
    labels = torch.where(kept, batch.labels, len(dataset.classes))
    if isinstance(dataset, Named):
        return dataset.condition(labels.to(device))
    return Cond(labels=labels.to(device)) if dataset.classes else Cond()


def wide(part: Tensor) -> Tensor:
    """What was kept in float16 to save room; bf16 is what its encoder works in."""
    return part.float() if part.dtype == torch.float16 else part


@torch.no_grad()
def read(dataset: Dataset, encode: Encode, known: str, folder: Path | None) -> Words:
    """Every caption of a data set and the empty one, through the encoder or from the run's folder.

    known: the hash of all that decides what the encoder makes of a caption.
    """
    rows = (dataset.batch([index]).captions[0] for index in range(len(dataset)))
    words: Words = {}

    def parts(caption: str) -> dict[str, Tensor]:
        cond = encode(caption)._asdict()
        return {name: tensor[0] for name, tensor in cond.items() if tensor is not None}

    for caption in sorted({"", *rows}):
        key = digest(known.encode(), caption.encode(errors="surrogatepass"))
        found = kept(place(folder), key, partial(parts, caption))
        words[caption] = Cond(**{name: tensor[None] for name, tensor in found.items()})
    return words


@torch.no_grad()
def encoded(
    dataset: Dataset, autoencoder: Autoencoder, words: Words, known: str,
    folder: Path | None, device: torch.device,
) -> Latents:  # fmt: skip
    """Every picture of a data set, through the encoder or from the run's folder, and its caption.

    words, known: what `read` made of the captions, and by what.
    """
    own = hash_of(autoencoder)

    def latent(picture: Image) -> dict[str, Tensor]:
        return {"x": moments(autoencoder, picture.to(device))[0]}

    rows, captions = [], []
    for index in range(len(dataset)):
        picture, _, (caption, *_) = dataset.batch([index])
        key = digest(own.encode(), data_of(picture))
        rows.append(kept(place(folder), key, partial(latent, picture))["x"])
        captions.append(caption)
    source = digest(dataset.fingerprint().encode(), own.encode(), known.encode())
    return Latents(torch.stack(rows), tuple(captions), words, source)


def check(dataset: Dataset, autoencoder: AutoencoderConfig, model: ModelConfig) -> None:
    """Raises ConfigError for pictures without captions, or of channels and sizes that do not fit.

    autoencoder, model: those that the pictures are to go through.
    """
    wanted, factor = autoencoder.picture_channels, autoencoder.factor
    channels, *sides = dataset.shape
    if channels != wanted:
        raise ConfigError(f"data.channels: the autoencoder takes {wanted}, got {channels}")
    least = factor * model.patch if isinstance(model, MMDiTConfig) else factor
    if any(side % least for side in sides):
        raise ConfigError(f"data.size: must be a multiple of {least}, got {sides[0]}")
    if isinstance(model, MMDiTConfig) and max(sides) > (most := least * model.grid):
        raise ConfigError(f"data.size: the model draws at most {most} pixels, got {max(sides)}")
    if not dataset.batch([0]).captions:
        raise ConfigError(
            "data: no captions: finetuning wants NAME.txt beside NAME.png, or metadata.jsonl"
        )


def place(folder: Path | None) -> Path | None:
    return None if folder is None else folder / FOLDER


def moments(autoencoder: Autoencoder, picture: Image) -> FeatureMap:
    """Mean and deviation of a picture's latent, scaled and shifted as the denoiser wants it."""
    c, posterior = autoencoder.config, autoencoder.posterior(picture)
    deviation = torch.exp(0.5 * posterior.log_variance)
    return torch.cat([(posterior.mean - c.shift) * c.scale, deviation * c.scale], dim=1)


def kept(
    folder: Path | None, key: str, make: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of this key from the folder, if all is there as written; else made anew."""
    if folder is not None:
        path = folder / f"{key}.safetensors"
        try:
            found = {name: tensor.clone() for name, tensor in read_safetensors(path).items()}
            if read_metadata(path)["sha256"] == hash_all(found):
                return found
        except (ValueError, KeyError):
            pass  # not there, or damaged
    made = {name: tensor.cpu() for name, tensor in make().items()}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(made, path, {"sha256": hash_all(made)})
    return made


def data_of(tensor: Tensor) -> bytes:
    """A tensor's shape, dtype and bytes."""
    flat = tensor.detach().cpu().contiguous()
    head = f"{tuple(flat.shape)}{flat.dtype}".encode()
    return head + flat.reshape(-1).view(torch.uint8).numpy().tobytes()


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def hash_of(module: nn.Module) -> str:
    """SHA-256 of a module's weights by name: the same for the same weights in any kind of file."""
    return hash_all(module.state_dict())


def hash_all(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + data_of(tensor))
    return found.hexdigest()
