"""How many pictures fit: counted from what the backward pass keeps, without running out first."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from minidiffusion import device as devices
from minidiffusion.data.dataset import Batch, Dataset
from minidiffusion.training import parallel
from minidiffusion.training.latents import condition
from minidiffusion.training.parallel import World
from minidiffusion.training.recipe import Recipe
from minidiffusion.training.state import learned

USABLE = 0.7
"""Share of the free memory to plan with; gradients in flight and caches need the rest."""
LARGEST = 1024


def settled(
    recipe: Recipe, network: nn.Module, dataset: Dataset, precision: str, where: torch.device,
    world: World,
) -> Recipe:  # fmt: skip
    """The recipe with batch_size "auto" replaced by the largest power of two that fits."""
    if recipe.run.batch_size != "auto":
        return recipe
    # From two on: of a single sample some copies are views.
    two, three = (kept_bytes(network, dataset, n, precision, where) for n in (2, 3))
    each = three - two
    # Gradients, the average and two moments for every weight that is trained.
    fixed = 4 * sum(p.numel() * p.element_size() for p in learned(network).values())
    room = USABLE * devices.free_bytes(where) - fixed - (two - 2 * each)
    size = largest(room, each, min(LARGEST, len(dataset) // world.size))
    size = world.size * int(parallel.first(float(size), world, where))
    return replace(recipe, run=replace(recipe.run, batch_size=size))


def largest(room: float, each: int, most: int) -> int:
    """The largest power of two, at least 1 and at most ``most``, of things that fit the room."""
    size = 1
    while 2 * size <= most and 2 * size * each <= room:
        size *= 2
    return size


def kept_bytes(
    network: nn.Module, dataset: Dataset, count: int, precision: str, where: torch.device
) -> int:
    """Bytes that a forward pass of ``count`` samples keeps for its backward pass."""
    storages: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.zeros(count, *dataset.shape, device=where)
    batch = Batch(x, torch.zeros(count, dtype=torch.int64), ("",) * count)
    conds = condition(dataset, batch, torch.ones(count, dtype=torch.bool), where)
    with saved_tensors_hooks(note, lambda t: t), devices.autocast(precision, where):
        out = network(x, torch.zeros(count, device=where), conds)
    del out
    return sum(storages.values())
