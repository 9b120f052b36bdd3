"""How many pictures fit: counted from what the backward pass keeps, without running out first."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from minidiffusion import device as devices
from minidiffusion.training import parallel
from minidiffusion.training.parallel import World
from minidiffusion.training.recipe import Recipe
from minidiffusion.training.state import learned
from minidiffusion.training.task import Task

USABLE = 0.7
"""Share of the free memory to plan with; gradients in flight and caches need the rest."""
LARGEST = 1024


def settled(task: Task, network: nn.Module, where: torch.device, world: World) -> Recipe:
    """The recipe with batch_size "auto" replaced by the largest power of two that fits."""
    recipe = task.recipe
    if recipe.run.batch_size != "auto":
        return recipe
    # From two on: of a single sample some copies are views.
    two, three = (kept_bytes(task, network, n) for n in (2, 3))
    each = three - two
    # Gradients, the averages and two moments for every weight that is trained.
    fixed = (4 + len(recipe.run.averages)) * sum(
        p.numel() * p.element_size() for p in learned(network).values()
    )
    room = USABLE * devices.free_bytes(where) - fixed - (two - 2 * each)
    size = largest(room, each, min(LARGEST, len(task.dataset) // world.size))
    size = world.size * int(parallel.first(float(size), world, where))
    return replace(recipe, run=replace(recipe.run, batch_size=size))


def largest(room: float, each: int, most: int) -> int:
    """The largest power of two, at least 1 and at most ``most``, of things that fit the room."""
    size = 1
    while 2 * size <= most and 2 * size * each <= room:
        size *= 2
    return size


def kept_bytes(task: Task, network: nn.Module, count: int) -> int:
    """Bytes that a forward pass of ``count`` samples keeps for its backward pass."""
    storages: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda t: t):
        out = task.trial(network, count)
    del out
    return sum(storages.values())
