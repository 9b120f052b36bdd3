"""The state of a run: what must be saved so that going on is the same as never having stopped.

There is no random state and no place in the data to save: both are functions of the step. Every
tensor is saved whole and under its parameter's name, so a run may go on with other ranks.
"""

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minidiffusion.checkpoints import snapshot
from minidiffusion.training.parallel import World, cut, local, piece, whole
from minidiffusion.training.recipe import FREE, Recipe
from minidiffusion.typed import ConfigError, plain

CHECKPOINTS = "checkpoints"


def learned(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name; frozen ones are no part of the state."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


@dataclass
class State:
    """Weights, their average, the optimizers, and the counts."""

    network: nn.Module
    optimizers: list[Optimizer]
    step: int = 0
    total: int | None = None
    skipped: int = 0
    average: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.average = [local(p).detach().clone() for p in learned(self.network).values()]

    def weights(self) -> list[Tensor]:
        return [local(p).detach() for p in learned(self.network).values()]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything by name and whole; under FSDP every rank must call this."""
        named = learned(self.network)
        names = {id(p): name for name, p in named.items()}
        optimizer = {
            f"{names[id(p)]}:{key}": whole(value.detach(), p)
            for optimizer in self.optimizers
            for p, slots in optimizer.state.items()
            for key, value in slots.items()
        }
        return {
            "weights": {name: whole(p.detach()) for name, p in named.items()},
            "average": self.averaged(),
            "optimizer": optimizer,
        }

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights by name and whole; under FSDP every rank must call this."""
        named = learned(self.network).items()
        return {name: whole(a, p) for (name, p), a in zip(named, self.average, strict=True)}

    @torch.no_grad()
    def restore(self, saved: snapshot.Snapshot) -> None:
        """Take over a snapshot's tensors and counts."""
        named = learned(self.network)
        owners = {id(p): o for o in self.optimizers for g in o.param_groups for p in g["params"]}
        for (name, p), average in zip(named.items(), self.average, strict=True):
            local(p).copy_(piece(saved.tensors["weights"][name], p))
            average.copy_(piece(saved.tensors["average"][name], p))
        for key, value in saved.tensors["optimizer"].items():
            name, slot = key.rsplit(":", 1)
            p = named[name]
            owners[id(p)].state[p][slot] = cut(value, p).clone()
        self.step, self.total = saved.facts["step"], saved.facts["total"]
        self.skipped = saved.facts["skipped"]


def save(state: State, recipe: Recipe, facts: dict[str, Any], folder: Path, world: World) -> None:
    """One snapshot; every rank takes part in gathering, the first writes."""
    tensors = state.tensors()
    if world.rank == 0:
        counts = {"step": state.step, "total": state.total, "skipped": state.skipped}
        snapshot.save(
            folder, state.step, tensors, {"recipe": plain(recipe), **counts, **facts},
            keep=recipe.run.keep,
        )  # fmt: skip


def adopted(recipe: Recipe, saved: snapshot.Snapshot) -> Recipe:
    """The recipe with the batch size that "auto" came to: memory is not as free a second time."""
    if recipe.run.batch_size != "auto":
        return recipe
    size = saved.facts["recipe"]["run"]["batch_size"]
    return replace(recipe, run=replace(recipe.run, batch_size=size))


def begun(recipe: Recipe, resume: str | Path | None) -> snapshot.Snapshot | None:
    """The newest good checkpoint of the run to go on with; no other run may be in the way."""
    out = None if recipe.out is None else Path(recipe.out)
    another = out is not None and (resume is None or out.resolve() != Path(resume).resolve())
    if out is not None and another and (out / CHECKPOINTS).exists():
        raise ConfigError(
            f"{out}: holds a run already; --resume goes on with it, --force replaces it"
        )
    if resume is None:
        return None
    saved, complaints = snapshot.newest(Path(resume) / CHECKPOINTS)
    if saved is None:
        raise ConfigError("; ".join([f"{resume}: no checkpoint to resume from", *complaints]))
    for line in complaints:
        warnings.warn(f"{line}; going on from {saved.path.name}", stacklevel=2)
    return saved


def check_same(recipe: Recipe, facts: dict[str, Any], saved: snapshot.Snapshot) -> None:
    """Raises ConfigError unless the snapshot is of this very run, naming what differs."""
    old, new = flat(saved.facts["recipe"]), flat(plain(recipe))
    for key in sorted(old.keys() | new.keys()):
        if key not in FREE and old.get(key) != new.get(key):
            raise ConfigError(
                f"{saved.path}: {key} is {old.get(key)!r} there and {new.get(key)!r} here: "
                "a run goes on only with its own recipe; take another folder to change it"
            )
    for key, value in facts.items():
        if saved.facts.get(key) != value:
            raise ConfigError(
                f"{saved.path}: {key} was {saved.facts.get(key)!r}, now it is {value!r}: "
                "not the same run"
            )


def flat(values: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(values, dict):
        return {prefix: values}
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else key)
    return found
