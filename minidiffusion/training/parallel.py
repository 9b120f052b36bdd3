"""Several processes, one run: torchrun's ranks, DDP and FSDP2, and tensors that are in pieces."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


class World(NamedTuple):
    """This process among those of the run."""

    rank: int = 0
    size: int = 1


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The world that torchrun made, or this process alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if device.type in ("cuda", "xpu"):
        torch.accelerator.set_device_index(device.index or 0)
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group({"cuda": "nccl", "xpu": "xccl"}.get(device.type, "gloo"))
    try:
        yield World(dist.get_rank(), size)
    finally:
        if mine:
            dist.destroy_process_group()


def gathered(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A block's inputs, each through one node, where all that the block sends back is summed.

    FSDP2 does so to find a block's end. Done everywhere, it makes the sums' order, and so the
    rounding, the same: where a skip connection leaves, gradients of three uses meet.
    """
    return tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in inputs)


def distribute(network: nn.Module, world: World, strategy: str, device: torch.device) -> nn.Module:
    """The network as this rank calls it: itself, wrapped for DDP, or cut up in place for FSDP2.

    A network whose ``idle`` is true has parameters that some steps leave out.
    """
    stacks = [m for m in network.modules() if isinstance(m, nn.ModuleList)]
    blocks = [block for stack in reversed(stacks) for block in stack]  # the innermost first
    for block in blocks:
        block.register_forward_pre_hook(gathered)
    if world.size == 1:
        return network
    if strategy == "ddp":
        idle = bool(getattr(network, "idle", False))
        return DistributedDataParallel(network, find_unused_parameters=idle)
    mesh = init_device_mesh(device.type, (world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    single = {p for p in network.parameters() if not p.ndim}  # FSDP2 cuts none and takes none
    for p in single:
        p.register_post_accumulate_grad_hook(lambda p: averaged(p, world))
    # In place: the module becomes an FSDPModule as well.
    fully_shard(network, mesh=mesh, ignored_params=single)
    return network


def averaged(p: Tensor, world: World) -> None:
    """A gradient's mean over ranks in its place; of what is averaged already it is the same."""
    assert p.grad is not None
    mean(p.grad, world)


def collect(world: World) -> None:
    """What wrapped the network is gone before the group of processes is.

    DDP's reducer may hold the group's last reference. If that goes later, with Python's lock in
    hand, it waits for a thread which waits for the lock.
    """
    if world.size > 1:
        gc.collect()


@contextmanager
def waiting(network: nn.Module, wait: bool) -> Iterator[None]:
    """Hold the exchange of gradients back while more micro-batches are to come."""
    if wait and isinstance(network, DistributedDataParallel):
        with network.no_sync():
            yield
        return
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(not wait)
    yield


def mean(value: Tensor, world: World) -> Tensor:
    """The mean over ranks."""
    if world.size > 1:
        dist.all_reduce(value)
        value /= world.size
    return value


def first(value: float, world: World, device: torch.device) -> float:
    """What the first rank says."""
    said = torch.tensor(value, device=device)
    if world.size > 1:
        dist.broadcast(said, src=0)
    return said.item()


def anywhere(value: bool, world: World, device: torch.device) -> bool:
    """Whether any rank says so."""
    if world.size == 1:
        return value
    return bool(mean(torch.tensor(float(value), device=device), world))


def local(tensor: Tensor) -> Tensor:
    """This rank's piece."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """All pieces together; ``like`` is the parameter whose cut a plain piece follows."""
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor) and tensor.ndim:
        tensor = DTensor.from_local(
            tensor, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank holds, cut as ``like`` is; a single number stays whole."""
    full = full.to(like.device)
    if not isinstance(like, DTensor) or not full.ndim:
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def piece(full: Tensor, like: Tensor) -> Tensor:
    """This rank's piece of a whole tensor."""
    return local(cut(full, like))


def norm(gradients: list[Tensor]) -> Tensor:
    """The length of all gradients together, in float64 and in one order whatever the cut.

    Whole gradients are summed, not pieces: then clipping is the same to the bit on any number of
    ranks.
    """
    wide = torch.float32 if gradients[0].device.type == "mps" else torch.float64  # mps has no more
    squares = [torch.linalg.vector_norm(whole(g), dtype=wide) ** 2 for g in gradients]
    return torch.stack(squares).sum().sqrt()
