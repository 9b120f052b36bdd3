"""AdamW, and Muon for the matrices; the learning rate over a run."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from minidiffusion.training.parallel import local, piece, whole


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    name: ClassVar[str] = "adamw"
    lr: float = field(default=1e-3, metadata={"above": 0})
    betas: tuple[float, float] = field(default=(0.9, 0.95), metadata={"min": 0, "below": 1})
    eps: float = field(default=1e-8, metadata={"above": 0})
    weight_decay: float = field(default=0.01, metadata={"min": 0})

    def build(self, network: nn.Module) -> list[Optimizer]:
        return [_adamw(network.parameters(), self)]


@dataclass(frozen=True)
class Muon:
    """Momentum, orthogonalised, for hidden matrices and kernels; AdamW for all else (Jordan 2024).

    Updates are scaled to AdamW's size (Liu et al. 2025, eq. 4), so one learning rate fits both.
    """

    name: ClassVar[str] = "muon"
    lr: float = field(default=1e-3, metadata={"above": 0})
    momentum: float = field(default=0.95, metadata={"min": 0, "below": 1})
    betas: tuple[float, float] = field(default=(0.9, 0.95), metadata={"min": 0, "below": 1})
    eps: float = field(default=1e-8, metadata={"above": 0})
    weight_decay: float = field(default=0.01, metadata={"min": 0})

    def build(self, network: nn.Module) -> list[Optimizer]:
        edges = {id(p) for name, p in network.named_parameters() if _is_edge(name, p)}
        hidden = [p for p in network.parameters() if id(p) not in edges]
        others = [p for p in network.parameters() if id(p) in edges]
        return [MuonOptimizer(hidden, self), _adamw(others, self)]


def _is_edge(name: str, p: Tensor) -> bool:
    """Vectors, embedding tables, and the layers at both ends of the network."""
    ends = name.split(".")[0] in ("enter", "leave") or "table" in name
    return p.ndim < 2 or ends


def _adamw(parameters: Iterable[nn.Parameter], config: "AdamW | Muon") -> Optimizer:
    # On a CPU the fused kernel rounds the last few numbers of a tensor otherwise than the rest, so
    # a tensor cut up among ranks would not be trained as the whole one is.
    parameters = list(parameters)
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps,
        weight_decay=config.weight_decay, fused=parameters[0].device.type != "cpu",
    )  # fmt: skip


class MuonOptimizer(Optimizer):
    """The matrix part of Muon. A convolution's kernel is the matrix (out, everything else)."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: Muon) -> None:
        super().__init__(list(parameters), {"lr": config.lr})
        self.config = config

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for parameters in alike.values():
                self._move(parameters, group["lr"])

    def _move(self, parameters: list[Tensor], lr: float) -> None:
        """Matrices of one shape together: one product of many matrices keeps all cores at work."""
        # An orthogonal matrix depends on the whole of it, not on this rank's piece.
        directions = torch.stack([whole(self._direction(p)).flatten(1) for p in parameters])
        rate = lr * 0.2 * math.sqrt(max(directions.shape[1:]))
        for p, update in zip(parameters, orthogonal(directions), strict=True):
            p.mul_(1 - lr * self.config.weight_decay)
            local(p).add_(piece(update.view(p.shape), p), alpha=-rate)

    def _direction(self, p: Tensor) -> Tensor:
        """The gradient, smoothed by Nesterov's momentum."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum = state["momentum"]
        momentum.lerp_(p.grad, 1 - self.config.momentum)
        return p.grad.lerp(momentum, self.config.momentum)


def orthogonal(matrices: Float[Tensor, "k m n"], steps: int = 5) -> Float[Tensor, "k m n"]:
    """Each matrix with its singular values moved to about 1, by Newton-Schulz iteration.

    The quintic's coefficients (Jordan 2024) trade an exact limit for a steep start: after five
    steps singular values lie in about [0.7, 1.2]. That is rough enough for bf16, which autocast
    turns these products into.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@dataclass(frozen=True)
class Schedule:
    """The learning rate: up from 0 over ``warmup`` steps, then constant or down to ``end``."""

    warmup: int = field(default=100, metadata={"min": 0, "max": 10**9})
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    end: float = field(default=0.0, metadata={"min": 0, "max": 1})

    def factor(self, step: int, total: int) -> float:
        """The share of the learning rate for step ``step`` (from 0) of ``total``."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup) / max(1, total - self.warmup))
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.end + (1 - self.end) * left


def set_rate(optimizers: Iterable[Optimizer], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
