"""Averages whose length is chosen after the run: the snapshots that it stores, and what they make.

A snapshot is one file in the run's ``averages``: the weights in fp16 (as EDM2 stores them; a tensor
that leaves its range in fp32), what is not trained as it is; in its metadata the counts that its
profile follows from, and the metadata of the model file that it may become. What these hold of the
weights, as the scale of an autoencoder's latents, is that of the last snapshot.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minidiffusion.checkpoints.own import Packed
from minidiffusion.checkpoints.reader import write_safetensors
from minidiffusion.checkpoints.weights import Weights, open_weights
from minidiffusion.training.average import Fit, Profile, exponent, reconstruction
from minidiffusion.training.parallel import World
from minidiffusion.training.state import State

FOLDER = "averages"
KIND = "minidiffusion average"
HIGHEST = torch.finfo(torch.float16).max


class Stored(NamedTuple):
    """One snapshot: the width and the number of updates that are averaged in it, after ``step``."""

    sigma_rel: float
    step: int
    updates: int
    weights: Weights

    @property
    def profile(self) -> Profile:
        return Profile(exponent(self.sigma_rel), self.updates)


Pack = Callable[[Mapping[str, Tensor]], Packed]
"""The tensors and the metadata of the model file that a network's weights make."""


def keep(state: State, out: str | None, pack: Pack, world: World) -> None:
    """A snapshot of each of the state's averages; every rank takes part in gathering.

    out: the run's folder, without which nothing is written.
    """
    buffers = dict(state.network.named_buffers())
    for width, power in zip(state.widths, state.powers, strict=True):
        weights = state.named(power)
        if out is not None and world.rank == 0 and state.updates:
            packed = pack({**{n: halved(w) for n, w in weights.items()}, **buffers})
            store(Path(out) / FOLDER, width, state.step, state.updates, packed)


def store(folder: Path, sigma_rel: float, step: int, updates: int, packed: Packed) -> Path:
    """Write one snapshot, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"sigma_{sigma_rel:g}_step_{step:08d}.safetensors"
    facts = {
        "format": KIND, "sigma_rel": repr(sigma_rel), "step": str(step), "updates": str(updates),
        "model": json.dumps(packed.metadata),
    }  # fmt: skip
    write_safetensors(packed.weights, path, facts)
    return path


def halved(weight: Tensor) -> Tensor:
    return weight.half() if bool((weight.abs() <= HIGHEST).all()) else weight


def stored(run: Path) -> list[Stored]:
    """A run's snapshots, in the order of their steps, no tensor read yet.

    Raises ValueError, naming the file, for one that is none; and where there are none.
    """
    found = [parsed(path) for path in sorted((run / FOLDER).glob("*.safetensors"))]
    if not found:
        raise ValueError(
            f"{run}: holds no snapshots of averages; a run keeps them with run.averages, "
            "such as [0.05, 0.1]"
        )
    return sorted(found, key=lambda one: (one.step, one.sigma_rel))


def parsed(path: Path) -> Stored:
    weights = open_weights(path)
    facts = weights.metadata
    try:
        if facts["format"] != KIND:
            raise ValueError
        found = Stored(
            float(facts["sigma_rel"]), int(facts["step"]), int(facts["updates"]), weights
        )
        exponent(found.sigma_rel)
        if not 0 < found.updates <= found.step <= 2**53:
            raise ValueError
        model_facts(found)
    except (KeyError, ValueError, RecursionError):
        raise ValueError(f"{path}: no snapshot of an average, or a damaged one") from None
    return found


def model_facts(one: Stored) -> dict[str, str]:
    """The metadata of a model file of the run that this snapshot is of."""
    facts = json.loads(one.weights.metadata["model"])
    if not isinstance(facts, dict) or not all(isinstance(text, str) for text in facts.values()):
        raise ValueError
    return facts


class Chosen(NamedTuple):
    """The snapshots that a reconstruction is made of, and how much each counts."""

    parts: Sequence[Stored]
    fit: Fit


def choose(found: Sequence[Stored], sigma_rel: float, step: int | None = None) -> Chosen:
    """How the average of this width at this step (default: the last snapshot's) is made.

    found: as `stored` gives them. All snapshots up to the step count, and the first after it.
    Raises ValueError for a width or a step that is out of range.
    """
    wanted, steps = exponent(sigma_rel), sorted({one.step for one in found})
    step = steps[-1] if step is None else step
    if not steps[0] <= step <= steps[-1]:
        raise ValueError(
            f"step: must be from {steps[0]} to {steps[-1]}, where snapshots are, got {step}"
        )
    end = next(one for one in steps if one >= step)
    parts = [one for one in found if one.step <= end]
    profile = Profile(wanted, updates_at(parts, step))
    return Chosen(parts, reconstruction([one.profile for one in parts], profile))


def updates_at(parts: Sequence[Stored], step: int) -> float:
    """Updates up to a step between two snapshots: skipped steps are none of them."""
    counts = {one.step: one.updates for one in parts}
    if step in counts:
        return float(counts[step])
    before, after = max(s for s in counts if s < step), max(counts)
    share = (step - before) / (after - before)
    return counts[before] + share * (counts[after] - counts[before])


def combined(chosen: Chosen) -> dict[str, Tensor]:
    """The reconstructed weights in float32, one tensor after the other: files are mapped."""
    used = [(one.weights, share) for one, share in shares(chosen)]
    first = used[0][0]
    for weights, _ in used:
        if weights.shapes != first.shapes:
            raise ValueError(f"{weights.files[0]}: not of the same network as {first.files[0]}")
    return {name: mixed([(w[name], share) for w, share in used]) for name in first}


def shares(chosen: Chosen) -> Iterator[tuple[Stored, float]]:
    """The snapshots that count at all."""
    for one, share in zip(chosen.parts, chosen.fit.weights.tolist(), strict=True):
        if share:
            yield one, share


def mixed(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """A weighted sum; what never changed, as buffers do not, stays as it is to the bit."""
    first = parts[0][0]
    if all(torch.equal(first, tensor) for tensor, _ in parts[1:]):
        total = first.float() if first.is_floating_point() else first
        return total.clone()
    total = torch.zeros(first.shape, dtype=torch.float64)
    for tensor, share in parts:
        total += share * tensor.double()
    return total.float()
