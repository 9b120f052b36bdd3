"""A step of drawing on an accelerator beside diffusers: Stable Diffusion 1.5, 3.5 medium, large.

In bf16, both conditions of guidance in one batch, random weights, the same on both sides; as it is
and through torch.compile with CUDA graphs. The floor is the operations over the rate of bf16
products of the same run. Kernels are those that one step as it is starts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerator import seconds
from measure import Work, notes, show
from stable_diffusion_3 import shared
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from minidiffusion.checkpoints.foreign import mmdit_config, unet_config
from minidiffusion.models import MMDiTConfig, UNetConfig, create
from minidiffusion.shapes import Cond

SD15 = UNetConfig(
    in_channels=4, out_channels=4, channels=320, multipliers=(1, 2, 4, 4), attention=(1, 1, 1, 0),
    heads=8, context_width=768,
)  # fmt: skip
MEDIUM = MMDiTConfig(grid=384, qk_norm=True, second_attention=13)
LARGE = MMDiTConfig(width=2432, depth=38, heads=38, qk_norm=True)


class Case(NamedTuple):
    """side: of the latent."""

    config: UNetConfig | MMDiTConfig
    side: int
    tokens: int


CASES = {
    "SD 1.5, 512 px": Case(SD15, 64, 77),
    "SD 3.5 medium, 512 px": Case(MEDIUM, 64, 333),
    "SD 3.5 medium, 1024 px": Case(MEDIUM, 128, 333),
    "SD 3.5 large, 1024 px": Case(LARGE, 128, 333),
}


def inputs(case: Case, where: torch.device | str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noised latents, times, tokens, pooled prompts: two of each."""
    c = case.config
    pooled = c.pooled_width or 1
    shapes = (c.in_channels, case.side, case.side), (case.tokens, c.context_width or 1), (pooled,)
    x, tokens, words = (
        torch.randn(2, *shape, device=where, dtype=torch.bfloat16) for shape in shapes
    )
    return x, torch.full((2,), 500.0, device=where), tokens, words


def network(config: UNetConfig | MMDiTConfig, where: torch.device) -> nn.Module:
    with where:
        made = create(config)
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim > 1:  # some start as zero, and zeros hide mistakes
                p.normal_(0, p[0].numel() ** -0.5)
    return made.to(torch.bfloat16).eval().requires_grad_(False)


def peer_of(ours: nn.Module) -> nn.Module:
    """diffusers' network with the same weights."""
    import diffusers

    c = ours.config
    flow = isinstance(c, MMDiTConfig)
    sizes = mmdit_config(c, side=128) if flow else unet_config(c, side=64)
    kind = diffusers.SD3Transformer2DModel if flow else diffusers.UNet2DConditionModel
    with torch.device("meta"):
        made = kind(**{name: value for name, value in sizes.items() if name[0] != "_"})
    return shared(ours, "diffusers", made)


def operations(case: Case) -> int:
    """Of products and convolutions in one step; attention in its plain form."""
    with torch.device("meta"):
        made = create(case.config).to(torch.bfloat16)
    x, t, tokens, pooled = inputs(case, "meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        made(x, t, Cond(tokens=tokens, pooled=pooled))
    return int(counter.get_total_flops())


def kernels(work: Work) -> int:
    """How many the device runs for one call."""
    work()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
        torch.accelerator.synchronize()
    return sum(one.device_type != torch.autograd.DeviceType.CPU for one in found.events())


def measured(name: str, rate: float, where: torch.device, count: int) -> list[list[object]]:
    case = CASES[name]
    ours = network(case.config, where)
    peer, given = peer_of(ours), inputs(case, where)
    x, t, tokens, pooled = given
    floor = operations(case) / rate
    more: dict[str, Any] = {"pooled_projections": pooled} if pooled.shape[1] > 1 else {}

    def mine(called: Callable[..., Tensor]) -> Work:
        return lambda: called(x, t, Cond(tokens=tokens, pooled=pooled))

    def theirs(called: Callable[..., Any]) -> Work:
        return lambda: called(
            x, timestep=t, encoder_hidden_states=tokens, return_dict=False, **more
        )

    rows: list[list[object]] = []
    for who, net, call in (("ours", ours, mine), ("diffusers", peer, theirs)):
        plain, started = call(net), kernels(call(net))
        for form in ("as it is", "compiled"):
            notes.print(f"{name}, {who}, {form} ...")
            work = plain if form == "as it is" else call(torch.compile(net, mode="reduce-overhead"))
            spent = seconds(work, count)
            cells = [f"{name}, {who}, {form}", f"{1000 * spent:.2f}", f"{1000 * floor:.2f}"]
            count_of = started if form == "as it is" else ""
            rows.append([*cells, f"{spent / floor:.2f}", count_of])
    return rows


@torch.no_grad()
def table(names: list[str], rate: float, where: torch.device, count: int) -> None:
    rows = [row for name in names for row in measured(name, rate, where, count)]
    show("A step of drawing", ["step", "ms", "floor, ms", "over it", "kernels"], rows)
