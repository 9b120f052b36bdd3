"""Parts of our own: they come back to the bit, and a file that is damaged is named in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoders
import pytest
import torch
from torch import Tensor

from minidiffusion.checkpoints import own
from minidiffusion.checkpoints.reader import read_metadata, read_safetensors, write_safetensors
from minidiffusion.checkpoints.weights import open_weights
from minidiffusion.models import Autoencoder, DualEncoder

NAMES: tuple[own.Name, ...] = ("autoencoder", "clip")
LOAD: dict[str, Callable[..., Autoencoder | DualEncoder]] = {
    "autoencoder": own.load_autoencoder, "clip": own.load_clip
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    encoders.written(folder)
    return folder


def changed(place: Path, out: Path, name: str, facts: dict[str, str], **more: Any) -> Path:
    """A file of a part with other metadata; ``without``, ``also``: keys taken away, or added."""
    file = place / f"{name}.safetensors"
    tensors = {k: t.clone() for k, t in read_safetensors(file).items() if k != more.get("without")}
    tensors |= more.get("also", {})
    write_safetensors(tensors, out / "x.safetensors", {**read_metadata(file), **facts})
    return out / "x.safetensors"


@pytest.mark.parametrize("name", NAMES)
def test_a_part_comes_back(name: own.Name, place: Path, tmp_path: Path) -> None:
    wanted = dict(zip(NAMES, encoders.written(tmp_path), strict=True))[name]
    weights = open_weights(place / f"{name}.safetensors")
    found = LOAD[name](weights)
    assert found.config == wanted.config and not found.training
    assert not any(p.requires_grad for p in found.parameters())
    mine, theirs = found.state_dict(), wanted.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    other = NAMES[1 - NAMES.index(name)]
    assert own.holds(weights, name) and not own.holds(weights, other)


def test_both_in_one_file(place: Path, tmp_path: Path) -> None:
    """Each is read by its name; what else lies there is not looked at."""
    packed = [own.repacked(open_weights(place / f"{name}.safetensors"), name) for name in NAMES]
    tensors: dict[str, Tensor] = {"enter.weight": torch.zeros(3)}
    facts = {"format": "minidiffusion"}
    for part in packed:
        tensors, facts = tensors | part.weights, facts | part.metadata
    write_safetensors(tensors, tmp_path / "x.safetensors", facts)
    weights = open_weights(tmp_path / "x.safetensors")
    for name in NAMES:
        alone = LOAD[name](open_weights(place / f"{name}.safetensors")).state_dict()
        beside = LOAD[name](weights).state_dict()
        assert all(torch.equal(alone[key], beside[key]) for key in alone)
        again = own.repacked(weights, name)
        assert again.metadata == packed[NAMES.index(name)].metadata
        assert again.weights.keys() == packed[NAMES.index(name)].weights.keys()


def test_half_precision_is_read_in_full(place: Path, tmp_path: Path) -> None:
    tensors = read_safetensors(place / "clip.safetensors")
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    facts = read_metadata(place / "clip.safetensors")
    write_safetensors(halves, tmp_path / "x.safetensors", facts)
    found = own.load_clip(open_weights(tmp_path / "x.safetensors"))
    assert all(p.dtype == torch.float32 for p in found.parameters())
    assert torch.equal(found.text.tokens.weight, halves["clip.text.tokens.weight"].float())


DAMAGED = {
    "no JSON": ("{", "is no JSON"),
    "deep": ("[" * 100_000, "is no JSON"),
    "unknown key": ('{"colour": 3}', "colour: unknown key"),
    "number": ("3", "is no block of keys"),
    "list": ("[]", "is no block of keys"),
    "another part": ('{"name": "unet"}', "name: unknown 'unet'"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_metadata(name: own.Name, kind: str, place: Path, tmp_path: Path) -> None:
    text, pattern = DAMAGED[kind]
    file = changed(place, tmp_path, name, {name: text})
    with pytest.raises(ValueError, match=pattern) as error:
        LOAD[name](open_weights(file))
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_keys_that_are_missing_or_unknown(place: Path, tmp_path: Path) -> None:
    gone, more = "clip.log_scale", {"clip.other": torch.zeros(2)}
    file = changed(place, tmp_path, "clip", {}, without=gone, also=more)
    with pytest.raises(ValueError) as error:
        own.load_clip(open_weights(file))
    said = str(error.value)
    assert said == f"{file}: missing keys: ['log_scale']; unknown keys: ['other']"
    wrong = {"autoencoder.quant.bias": torch.zeros(9)}
    file = changed(place, tmp_path, "autoencoder", {}, also=wrong)
    with pytest.raises(ValueError, match="quant.bias") as error:
        own.load_autoencoder(open_weights(file))
    assert "\n" not in str(error.value)


def test_only_our_own_hold_it(place: Path, tmp_path: Path) -> None:
    file = changed(place, tmp_path, "clip", {"format": "pt"})
    assert not own.holds(open_weights(file), "clip")
