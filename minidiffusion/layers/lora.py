"""Low-rank adapters (Hu et al. 2021): a weight stays as it is, a thin product beside it learns.

An adapter is a sub-module ``lora`` of its layer and a hook that adds to the layer's output; the
layer keeps its class, and its weight its name.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from minidiffusion.layers.attention import Attention, GatedFeedForward, Projections
from minidiffusion.layers.convolution import ResBlock

Layer = nn.Linear | nn.Conv2d
Kernel = Float[Tensor, "out *enter"]
Inputs = Float[Tensor, "*b"]
Outputs = Float[Tensor, "*k"]


def of(kind: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda block: isinstance(block, kind)


def is_stream(block: nn.Module) -> bool:
    """A stream of the MMDiT, whose feed-forward is two layers of its own."""
    return isinstance(getattr(block, "attention", None), Projections)


TARGETS: dict[str, list[tuple[Callable[[nn.Module], bool], dict[str, int]]]] = {
    "attention": [
        (of(Attention), {"q": 1, "kv": 2, "out": 1}),
        (of(Projections), {"qkv": 3, "out": 1}),
    ],
    "feed_forward": [
        (of(GatedFeedForward), {"enter": 1, "leave": 1}),
        (is_stream, {"enter": 1, "leave": 1}),
    ],
    "convolution": [(of(ResBlock), {"conv1": 1, "conv2": 1})],
}
"""What may be adapted: the blocks, their layers, and how many projections a layer holds."""
LORA = "lora"


def product(up: Float[Tensor, "out r *ones"], down: Float[Tensor, " r *enter"]) -> Kernel:
    """up after down as one matrix or kernel, in float32."""
    return (up.float().flatten(1) @ down.float().flatten(1)).unflatten(1, down.shape[1:])


class Adapter(nn.Module):
    """alpha / rank * up(down(x)) for one layer; up starts as zero, so nothing changes at first.

    parts: projections that the layer holds side by side; each has a pair of its own.
    """

    hook: RemovableHandle

    def __init__(self, layer: Layer, rank: int, alpha: float, parts: int = 1) -> None:
        super().__init__()
        out, enter, *kernel = layer.weight.shape
        self.rank, self.alpha, self.parts = rank, alpha, parts
        self.down = nn.Parameter(layer.weight.new_empty(parts * rank, enter, *kernel))
        self.up = nn.Parameter(layer.weight.new_zeros(out, rank, *[1] * len(kernel)))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, layer: Layer, x: Inputs) -> Outputs:
        if isinstance(layer, nn.Conv2d):
            low = F.conv2d(x, self.down, None, layer.stride, layer.padding)
            return self.scale * F.conv2d(low, self.up)
        lows = F.linear(x, self.down).chunk(self.parts, dim=-1)
        ups = self.up.chunk(self.parts)
        outs = [F.linear(low, up) for low, up in zip(lows, ups, strict=True)]
        return self.scale * torch.cat(outs, dim=-1)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(down, up) of each projection."""
        return list(zip(self.down.chunk(self.parts), self.up.chunk(self.parts), strict=True))

    def delta(self) -> Kernel:
        """What it adds to the layer's weight, in float32."""
        return self.scale * torch.cat([product(up, down) for down, up in self.pairs()])


def adapt(
    network: nn.Module, rank: int, alpha: float, targets: Iterable[str] = ("attention",)
) -> dict[str, Adapter]:
    """Freeze a network and give each layer of these kinds an adapter; they, by their layers' names.

    Raises ValueError for a rank below 1, an unknown target, or a network without such layers.
    """
    chosen = list(targets)
    if rank < 1:
        raise ValueError(f"lora: the rank must be at least 1, got {rank}")
    for target in chosen:
        if target not in TARGETS:
            raise ValueError(f"lora: unknown target {target!r}; allowed: {', '.join(TARGETS)}")
    if adapters(network):
        raise ValueError("lora: the network has adapters already; merge them first")
    network.requires_grad_(False)
    for block in list(network.modules()):
        rows = [layers for target in chosen for fits, layers in TARGETS[target] if fits(block)]
        for name, parts in (layer for layers in rows for layer in layers.items()):
            layer = getattr(block, name)
            if layer is not None:  # as in the last block's text, which is only read
                assert isinstance(layer, Layer)
                adapter = Adapter(layer, rank, alpha, parts)
                adapter.hook = layer.register_forward_hook(_added)
                layer.add_module(LORA, adapter)
    found = adapters(network)
    if not found:
        raise ValueError(f"lora: the network has no layers of the kind {', '.join(chosen)}")
    return found


def _added(layer: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
    return out + layer.get_submodule(LORA)(layer, inputs[0])


def adapters(network: nn.Module) -> dict[str, Adapter]:
    """The adapters in a network, by the names of their layers."""
    return {
        name.removesuffix(f".{LORA}"): module
        for name, module in network.named_modules()
        if isinstance(module, Adapter)
    }


@torch.no_grad()
def merge(network: nn.Module) -> None:
    """Add every adapter to its layer's weight, in float32, and take it away."""
    for name, adapter in adapters(network).items():
        layer = network.get_submodule(name)
        assert isinstance(layer, Layer)
        weight = dict(layer.named_parameters(recurse=False))["weight"]  # itself: see `storage`
        weight.copy_(weight.float() + adapter.delta().view_as(weight))
        adapter.hook.remove()
        delattr(layer, LORA)
