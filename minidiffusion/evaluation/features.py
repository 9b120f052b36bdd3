"""What looks at the pictures: the shipped judges, and Inception for those who bring its weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from minidiffusion.checkpoints.inception import load_inception
from minidiffusion.checkpoints.reader import read_metadata, read_safetensors
from minidiffusion.models import inception as fid
from minidiffusion.models.lenet import LeNet, LeNetConfig
from minidiffusion.shapes import Features, Image, Labels
from minidiffusion.typed import build

Classified = Literal["fashion_mnist", "mnist"]
JUDGES = Path(__file__).parents[1] / "assets" / "judges"


class Extractor(NamedTuple):
    """Pictures to features. Distances in two feature spaces do not compare, so it has a name."""

    name: str
    dim: int
    network: Callable[[Tensor], Tensor]
    batch: int = 256

    @torch.no_grad()
    def __call__(self, pictures: Image) -> Features:
        return torch.cat([self.network(part) for part in pictures.split(self.batch)])


@dataclass(frozen=True, eq=False)
class Judge:
    """A classifier with a known accuracy, and with the features behind its verdicts."""

    name: str
    accuracy: float
    classes: tuple[str, ...]
    network: LeNet
    extractor: Extractor

    @torch.no_grad()
    def __call__(self, pictures: Image) -> Labels:
        parts = pictures.split(self.extractor.batch)
        return torch.cat([self.network(part).argmax(dim=1) for part in parts])


def judge(name: Classified, device: torch.device | str = "cpu") -> Judge:
    """A shipped classifier of 28x28 pictures; its accuracy is of all 10,000 test pictures."""
    if name not in get_args(Classified):
        raise ValueError(f"judge {name!r}: choose one of {', '.join(get_args(Classified))}")
    path = JUDGES / f"{name}.safetensors"
    facts = read_metadata(path)
    config = build(LeNetConfig, json.loads(facts["config"]), str(path))
    network = LeNet(config)
    network.load_state_dict(read_safetensors(path))  # stored in half precision, used in single
    network = network.to(device).eval().requires_grad_(False)
    extractor = Extractor(facts["features"], config.features, network.features)
    classes = tuple(json.loads(facts["classes"]))
    return Judge(name, float(facts["accuracy"]), classes, network, extractor)


def inception(path: Path | str, device: torch.device | str = "cpu") -> Extractor:
    """The features of the Frechet inception distance, from the weights as TorchScript keeps them.

    Grey pictures are shown as colour ones with three equal channels.
    """
    network = load_inception(path).to(device)

    def colour(pictures: Tensor) -> Tensor:
        features: Tensor = network(pictures.expand(-1, 3, -1, -1))
        return features

    return Extractor("inception-2015-12-05-pool3", fid.FEATURES, colour, batch=32)
