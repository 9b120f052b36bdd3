"""What `minidiffusion evaluate` does with a part of our own: an autoencoder, or a CLIP."""

from dataclasses import dataclass

from minidiffusion.checkpoints import own
from minidiffusion.checkpoints.lpips import load_lpips
from minidiffusion.checkpoints.weights import Weights
from minidiffusion.cli.main import fail
from minidiffusion.data import Folder
from minidiffusion.data.emoji import SIDE, Emoji
from minidiffusion.evaluation.agreement import Agreement
from minidiffusion.evaluation.fidelity import Fidelity, fidelity
from minidiffusion.evaluation.matching import clip_cosines
from minidiffusion.evaluation.prompted import SPLITS, TITLES, real
from minidiffusion.evaluation.retrieval import WAYS, retrieval
from minidiffusion.models import AutoencoderConfig
from minidiffusion.models.lpips import LPIPS
from minidiffusion.shapes import Image


@dataclass(frozen=True)
class Matched:
    """How often a picture's own caption is found among others."""

    found: Agreement
    count: int

    def table(self) -> str:
        share, low, high = (f"{100 * value:.1f}" for value in self.found)
        return f"found among {WAYS}: {share} % ({low} to {high}) of {self.count} pictures"

    def as_dict(self) -> dict[str, object]:
        share, low, high = self.found
        return {"retrieval": share, "retrieval_low": low, "retrieval_high": high}


def autoencoder(weights: Weights, folder: str | None) -> dict[str, Fidelity]:
    """How near its pictures come, of emoji that it has not seen or of the pictures of a folder."""
    network, lpips = own.load_autoencoder(weights), perceptual()
    every = held_out(network.config, folder)
    return {name: fidelity(network, x, lpips) for name, x in every.items()}


def held_out(config: AutoencoderConfig, folder: str | None) -> dict[str, Image]:
    if folder is not None:
        size = max(SIDE // config.factor, 1) * config.factor
        data = Folder(folder, size=size, channels=3 if config.picture_channels == 3 else 1).open()
        return {folder: data.batch(range(len(data))).x}
    if config.picture_channels != 3 or SIDE % config.factor:
        fail("evaluate: emoji do not fit this autoencoder; --data-folder names other pictures")
    return {TITLES[split]: real(split) for split in ("concept", "combination")}


def perceptual() -> LPIPS | None:
    try:
        return load_lpips()
    except FileNotFoundError as error:
        print(f"without LPIPS: {error}")
        return None


def clip(weights: Weights) -> dict[str, Matched]:
    """How often it finds the caption of a real picture."""
    cosines = clip_cosines(own.load_clip(weights))
    found = {}
    for split in SPLITS:
        pairs = Emoji(split=split).pairs()
        rows = list(range(len(pairs)))
        captions = [pair.captions()[0] for pair in pairs]
        every = cosines(real(split), captions)
        found[TITLES[split]] = Matched(retrieval(every, pairs, rows), len(pairs))
    return found
