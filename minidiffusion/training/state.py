"""The state of a run: what must be saved so that going on is the same as never having stopped.

There is no random state and no place in the data to save: both are functions of the step. Every
tensor is saved whole and under its parameter's name, so a run may go on with other ranks.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minidiffusion.checkpoints import snapshot
from minidiffusion.training import average
from minidiffusion.training.parallel import World, cut, local, mean, piece, whole
from minidiffusion.training.recipe import FREE, Recipe, merged
from minidiffusion.typed import ConfigError, build, plain

CHECKPOINTS = "checkpoints"
ALLOWED = ("data", "precision")
"""What may have changed since a run was saved, if the user says so by name."""
GAP_EVERY = 10
"""Steps after which the distance of the weights to their average is measured again."""


def learned(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name; frozen ones are no part of the state."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


@dataclass
class State:
    """Weights, their averages, the optimizers, and the counts.

    widths: sigma_rel of the power-function averages, and powers: these averages, one of each width.
    """

    network: nn.Module
    optimizers: list[Optimizer]
    step: int = 0
    total: int | None = None
    skipped: int = 0
    widths: tuple[float, ...] = ()
    average: list[Tensor] = field(default_factory=list)
    powers: list[list[Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.average, *self.powers = (
            [weight.clone() for weight in self.weights()] for _ in range(1 + len(self.widths))
        )

    @property
    def updates(self) -> int:
        return self.step - self.skipped

    def follow(self, decay: float) -> None:
        """Let every average take in the weights, after the update that follows ``updates``."""
        average.update(self.average, self.weights(), decay)
        for width, power in zip(self.widths, self.powers, strict=True):
            kept = average.power_decay(self.updates + 1, average.exponent(width))
            average.update(power, self.weights(), kept)

    def weights(self) -> list[Tensor]:
        return [local(p).detach() for p in learned(self.network).values()]

    @torch.no_grad()
    def gap(self, world: World) -> float:
        """The distance of the weights to the average that ships, relative to its length."""
        pairs = zip(self.weights(), self.average, strict=True)
        # One tensor at a time: a list of differences would be the weights once more.
        apart = torch.stack([torch.linalg.vector_norm(w - a) for w, a in pairs])
        squares = torch.stack([apart, torch.stack(torch._foreach_norm(self.average))]).square()
        # Whole tensors on every rank change both sums alike.
        gap, length = mean(squares.sum(dim=1), world).sqrt().tolist()
        return float(gap / length) if length else 0.0

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
            **{f"power_{i}": self.named(power) for i, power in enumerate(self.powers)},
        }

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights by name and whole; under FSDP every rank must call this."""
        return self.named(self.average)

    def named(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        """One tensor a weight by its name and whole; under FSDP every rank must call this."""
        weights = learned(self.network).items()
        return {name: whole(a, p) for (name, p), a in zip(weights, tensors, strict=True)}

    @torch.no_grad()
    def restore(self, saved: snapshot.Snapshot) -> None:
        """Take over a snapshot's tensors and counts."""
        named = learned(self.network)
        owners = {id(p): o for o in self.optimizers for g in o.param_groups for p in g["params"]}
        for name, p in named.items():
            local(p).copy_(piece(saved.tensors["weights"][name], p))
        parts = {"average": self.average, **{f"power_{i}": p for i, p in enumerate(self.powers)}}
        for part, tensors in parts.items():
            for (name, p), tensor in zip(named.items(), tensors, strict=True):
                tensor.copy_(piece(saved.tensors[part][name], p))
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
    return build(Recipe, merged(plain(recipe), {"run.batch_size": size}), str(saved.path))


def begun(recipe: Recipe, resume: str | Path | None) -> snapshot.Snapshot | None:
    """The newest good checkpoint of the run to go on with; no other run may be in the way."""
    out = None if recipe.out is None else Path(recipe.out)
    another = out is not None and (resume is None or out.resolve() != Path(resume).resolve())
    if out is not None and another and snapshot.listing(out / CHECKPOINTS):
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


def check_same(
    recipe: Recipe, facts: dict[str, Any], saved: snapshot.Snapshot, allow: Sequence[str] = ()
) -> None:
    """Raises ConfigError unless the snapshot is of this very run, naming what differs.

    allow: blocks of the recipe, with the fact of that name, that may be others by now.
    """
    old, new, usual = flat(saved.facts["recipe"]), flat(plain(recipe)), flat(plain(Recipe()))
    for key in sorted(old.keys() | new.keys()):
        block = key.split(".")[0]
        # A key that is younger than the run, and at its default: nothing has changed.
        younger = key not in old and key in usual and new[key] == usual[key]
        free = key in FREE or block in allow or younger
        if not free and old.get(key) != new.get(key):
            raise ConfigError(
                f"{saved.path}: {key} is {old.get(key)!r} there and {new.get(key)!r} here: "
                "a run goes on only with its own recipe; take another folder to change it"
                + hint(block)
            )
    for key, value in facts.items():
        if key not in allow and saved.facts.get(key) != value:
            raise ConfigError(
                f"{saved.path}: {key} was {saved.facts.get(key)!r}, now it is {value!r}: "
                f"not the same run{hint(key)}"
            )


def hint(name: str) -> str:
    return f"; --allow {name} goes on all the same" if name in ALLOWED else ""


def flat(values: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(values, dict):
        return {prefix: values}
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else key)
    return found
