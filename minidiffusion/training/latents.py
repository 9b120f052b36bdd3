"""Captioned pictures as a latent denoiser is trained on them: every one is encoded only once.

What a frozen autoencoder and a frozen text encoder make of a picture and of a caption is kept in
the run's folder, a file each, named by the hash of everything that it came from.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from minidiffusion.checkpoints.reader import read_metadata, read_safetensors, write_safetensors
from minidiffusion.data.dataset import Batch, Dataset
from minidiffusion.models import Autoencoder
from minidiffusion.shapes import Cond, FeatureMap, Image, Tokens
from minidiffusion.typed import ConfigError

FOLDER = "cache"
Encode = Callable[[str], Tokens]
"""A caption becomes the tokens that a denoiser attends to, one row."""


@dataclass(frozen=True, eq=False)
class Latents:
    """A data set of encoded pictures: a batch's x holds means, then deviations, in its channels.

    All of it lies in memory: 0.4 MB for a picture of 512 pixels and its caption. words: the tokens
    of every caption, and of the empty one.
    """

    moments: Float[Tensor, "n c2 h w"]
    captions: tuple[str, ...]
    words: dict[str, Float[Tensor, "m e"]]
    source: str

    @property
    def shape(self) -> tuple[int, ...]:
        channels, *sides = self.moments.shape[1:]
        return (channels // 2, *sides)

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def __len__(self) -> int:
        return len(self.moments)

    def batch(self, indices: Sequence[int]) -> Batch:
        rows = torch.tensor(indices, dtype=torch.int64)
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
    """Captions or classes; where not kept, the empty caption or no class."""
    if isinstance(dataset, Latents):
        pairs = zip(batch.captions, kept.tolist(), strict=True)
        words = [dataset.words[caption if keep else ""] for caption, keep in pairs]
        return Cond(tokens=torch.stack(words).to(device))
    if not dataset.classes:
        return Cond()
    labels = torch.where(kept, batch.labels, len(dataset.classes))
    return Cond(labels=labels.to(device))


@torch.no_grad()
def encoded(
    dataset: Dataset, autoencoder: Autoencoder, encode: Encode, hashes: tuple[str, str],
    folder: Path | None, device: torch.device,
) -> Latents:  # fmt: skip
    """Every picture and caption of a data set, through the encoders or from the run's folder.

    hashes: of the autoencoder's and the text encoder's weights. Raises ConfigError for pictures
    without captions, or of channels and sizes that the autoencoder does not take.
    """
    check(dataset, autoencoder)
    place = None if folder is None else folder / FOLDER

    def latent(picture: Image) -> Tensor:
        key = digest(hashes[0].encode(), data_of(picture))
        return kept(place, key, lambda: moments(autoencoder, picture.to(device))[0])

    def tokens(caption: str) -> Tensor:
        key = digest(hashes[1].encode(), caption.encode(errors="surrogatepass"))
        return kept(place, key, lambda: encode(caption)[0])

    one_by_one = (dataset.batch([index]) for index in range(len(dataset)))
    rows, captions = zip(*((latent(x), texts[0]) for x, _, texts in one_by_one), strict=True)
    words = {caption: tokens(caption) for caption in sorted({"", *captions})}
    source = digest(dataset.fingerprint().encode(), *(part.encode() for part in hashes))
    return Latents(torch.stack(rows), captions, words, source)


def check(dataset: Dataset, autoencoder: Autoencoder) -> None:
    wanted, factor = autoencoder.config.picture_channels, autoencoder.config.factor
    channels, *sides = dataset.shape
    if channels != wanted:
        raise ConfigError(f"data.channels: the autoencoder takes {wanted}, got {channels}")
    if any(side % factor for side in sides):
        raise ConfigError(f"data.size: must be a multiple of {factor}, got {sides[0]}")
    if not dataset.batch([0]).captions:
        raise ConfigError(
            "data: no captions: finetuning wants NAME.txt beside NAME.png, or metadata.jsonl"
        )


def moments(autoencoder: Autoencoder, picture: Image) -> FeatureMap:
    """Mean and deviation of a picture's latent, scaled and shifted as the denoiser wants it."""
    c, posterior = autoencoder.config, autoencoder.posterior(picture)
    deviation = torch.exp(0.5 * posterior.log_variance)
    return torch.cat([(posterior.mean - c.shift) * c.scale, deviation * c.scale], dim=1)


def kept(folder: Path | None, key: str, make: Callable[[], Tensor]) -> Tensor:
    """The tensor of this key from the folder, if it is there as it was written; else made anew."""
    if folder is None:
        return make().cpu()
    path = folder / f"{key}.safetensors"
    try:
        found = read_safetensors(path)["x"].clone()
        if read_metadata(path)["sha256"] == digest(data_of(found)):
            return found
    except (ValueError, KeyError):
        pass  # not there, or damaged
    made = make().cpu()
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors({"x": made}, path, {"sha256": digest(data_of(made))})
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
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode() + data_of(tensor))
    return found.hexdigest()
