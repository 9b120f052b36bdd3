"""What a part's forward pass adds to its weights: run on the meta device, without computing.

A ledger counts the bytes of the tensors that live. The passes are our own, as they would be on a
CPU or an accelerator (attention in pieces or fused, layers rewritten for drawing). What a library
takes within an operation is not seen: workspaces of convolutions on a GPU, and blocks that malloc
or torch's cache keep for later.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from minidiffusion import device as devices
from minidiffusion.checkpoints import official
from minidiffusion.checkpoints.catalog import Row
from minidiffusion.layers.quantized import How, quantize_
from minidiffusion.layers.storage import compute_in_float32_
from minidiffusion.models import (
    Autoencoder,
    CLIPConfig,
    CLIPText,
    MMDiTConfig,
    T5Config,
    T5Encoder,
    UNetConfig,
)
from minidiffusion.pipelines.memory import decoded
from minidiffusion.shapes import Cond
from minidiffusion.text.triple import T5_LENGTH

META = torch.device("meta")
FACTOR = 8
"""Pixels of a picture to one of its latent, along each side."""
LARGEST = 128
"""Side, in the latent's pixels, of what is run; more is reckoned from this and a smaller one."""


@dataclass(frozen=True)
class Job:
    """What is drawn: pictures of so many pixels, how many at once, with weights of which dtype, on
    what.

    guidance: 1 runs the denoiser once a step, all else twice in one batch.
    """

    width: int
    height: int
    batch: int
    dtype: torch.dtype
    guidance: float
    device: torch.device

    @property
    def size(self) -> int:
        return self.width * self.height * self.batch

    @property
    def computed(self) -> torch.dtype:
        """What layers compute in: not in their weights' dtype where that is slow."""
        fast = devices.multiplies_fast(self.dtype, self.device)
        return self.dtype if fast else torch.float32

    @property
    def rows(self) -> int:
        """Of the denoiser's batch."""
        return self.batch * (1 if self.guidance == 1 else 2)

    def shrunk(self, side: int) -> "Job":
        """At most two pictures, each side at most so many of the latent's pixels, and even."""
        unit = 2 * FACTOR
        share = min(1.0, side * FACTOR / max(self.width, self.height))
        if share == 1:
            return replace(self, batch=min(2, self.batch))
        sides = (max(1, int(length * share) // unit) * unit for length in (self.width, self.height))
        width, height = sides
        return replace(self, width=width, height=height, batch=min(2, self.batch))


def nbytes(network: nn.Module) -> int:
    return sum(x.nbytes for x in (*network.parameters(), *network.buffers()))


def rebuilt(config: Any, job: Job, quantize: How | None) -> nn.Module:
    """A network without weights as it is once it is loaded."""
    network = official.blueprint(config).to(job.dtype).requires_grad_(False)
    if quantize is not None:
        quantize_(network, quantize)
    if job.computed != job.dtype:
        compute_in_float32_(network)
    return network


def working(
    network: nn.Module, row: Row | None, job: Job, quantize: How | None, tile: int | None
) -> int:
    """The most bytes that live during a part's forward pass, beside its weights.

    They grow with the number of pixels, since attention is never held whole: of many pixels the
    number is reckoned from two smaller jobs, of many pictures from two.
    """
    # Of tiles two things compete, the work on one and the whole that they add up to: no line.
    near = replace(job, batch=min(2, job.batch)) if tile else job.shrunk(LARGEST)
    most = measured(network, row, near, quantize, tile)
    if near == job or isinstance(network, CLIPText | T5Encoder):
        return most
    if (near.width, near.height) == (job.width, job.height):
        return most * job.batch // near.batch
    less = near.shrunk(max(near.width, near.height) // FACTOR * 3 // 4)
    slope = (most - measured(network, row, less, quantize, tile)) / (near.size - less.size)
    size = job.width * job.height * near.batch
    return int((most + slope * (size - near.size)) * job.batch / near.batch)


def measured(
    network: nn.Module, row: Row | None, job: Job, quantize: How | None, tile: int | None
) -> int:
    config = shortened(cast(Any, network.config))
    if config != network.config or quantize is not None or job.computed != job.dtype:
        network = rebuilt(config, job, quantize)
    ledger = Ledger([*network.parameters(), *network.buffers()], job.device)
    with torch.no_grad(), Posing(job.device), ledger:
        task(network, row, job, tile)()
    return ledger.peak


def shortened(config: Any) -> Any:
    """With few of many equal blocks, where each leaves nothing behind but its result."""
    if isinstance(config, CLIPConfig):
        return replace(config, layers=config.skip + 2)
    if isinstance(config, T5Config):
        return replace(config, layers=2)
    if isinstance(config, MMDiTConfig):
        depth = min(3, config.depth)
        return replace(config, depth=depth, second_attention=min(1, config.second_attention))
    return config


def task(network: nn.Module, row: Row | None, job: Job, tile: int | None) -> Callable[[], object]:
    """A part's work for one batch; texts are encoded one at a time."""
    empty = partial(torch.empty, device=META)
    rows, columns = job.height // FACTOR, job.width // FACTOR
    if isinstance(network, CLIPText | T5Encoder):
        length = T5_LENGTH if isinstance(network, T5Encoder) else network.config.positions
        return lambda: network(empty(1, length, dtype=torch.int64))
    if isinstance(network, Autoencoder):
        channels = network.config.latent_channels
        return lambda: decoded(network, empty(job.batch, channels, rows, columns), tile)
    assert row is not None and isinstance(row.model, MMDiTConfig | UNetConfig)
    count, flow = job.rows, isinstance(row.model, MMDiTConfig)
    length, pooled = (77 + T5_LENGTH if flow else 77), row.model.pooled_width
    x, extra = empty(count, row.shape[0], rows, columns), row.model.in_channels - row.shape[0]
    cond = Cond(
        tokens=empty(count, length, row.model.context_width or 1, dtype=job.computed),
        pooled=empty(count, pooled, dtype=job.computed) if pooled else None,
        concat=empty(count, extra, rows, columns) if extra else None,
    )
    return lambda: network(x, empty(count), cond)


class Posing(TorchFunctionMode):
    """Tensors of the meta device say that they lie on another one, and attention is fused there."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.device.__get__:
            return self.device
        if func is F.scaled_dot_product_attention:
            q, v = args[0], args[2]
            return q.new_empty(*q.shape[:1], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
        return func(*args, **(kwargs or {}))


class Ledger(TorchDispatchMode):
    """The bytes of all tensors that live but those known before, now and at most."""

    def __init__(self, known: Iterable[Tensor], device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.known = {x.untyped_storage()._cdata for x in known}
        self.live: dict[int, weakref.ref[Any]] = {}
        self.now = self.peak = 0
        self.on_cpu = device.type == "cpu"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1  # what is asked of numbers while drawing is whether all of them are finite
        if given.get("device") is not None:
            given["device"] = META
        out = func(*args, **given)
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.note(x)
        if self.on_cpu and func is torch.ops.aten.convolution.default and out.itemsize == 4:
            # oneDNN's result in float32 has an order of its own, and is copied out of it.
            self.peak = max(self.peak, self.now + out.nbytes)
        return out

    def note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.live:
            return

        def gone(_: object) -> None:
            del self.live[key]
            self.now -= size

        self.live[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
