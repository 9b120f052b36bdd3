"""The training loop, a generator: callers show, log, draw, judge, and stop by not going on.

Every random number is a function of (seed, step, global sample number), and so is the order of
the data; see `minidiffusion.diffusion.noise` and `minidiffusion.data.loader`.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiffusion import device as devices
from minidiffusion.checkpoints import snapshot
from minidiffusion.data import load_function, mapped
from minidiffusion.data.dataset import Batch, Dataset
from minidiffusion.data.loader import batches
from minidiffusion.files import claimed
from minidiffusion.training import average, memory, parallel, posthoc, state
from minidiffusion.training.objectives import dice
from minidiffusion.training.optimizers import set_rate
from minidiffusion.training.parallel import whole
from minidiffusion.training.parts import Parts, added, read
from minidiffusion.training.recipe import Recipe
from minidiffusion.training.task import Result, begun
from minidiffusion.typed import ConfigError

CHECKPOINTS = state.CHECKPOINTS
MEASURED = 10
"""Steps after which a length in minutes becomes a number of steps."""
SLOW = 3
"""Steps of a fresh process that do not count for that: kernels are chosen, memory is taken."""


class Report(NamedTuple):
    """One step. total is None until a length in minutes is measured. samples: seen by the whole
    run; fresh: by this process, in ``seconds``. average() gives the averaged network (under
    torchrun every rank must call it). parts: named figures beside the loss, such as what
    `minidiffusion.training.parts` makes of it, and now and then "ema gap".
    """

    step: int
    total: int | None
    loss: float
    rate: float
    norm: float
    seconds: float
    skipped: int
    samples: int
    fresh: int
    average: Callable[[], Result]
    parts: dict[str, float]


class DivergedError(RuntimeError):
    """Three steps in a row had no finite loss or gradient."""


def train(
    recipe: Recipe,
    resume: str | Path | None = None,
    until: int | None = None,
    dataset: Dataset | None = None,
    allow: Sequence[str] = (),
    stop: Callable[[], bool] | None = None,
) -> Iterator[Report]:
    """Train, one Report a step; the last one's average() is the result, saved in recipe.out.

    resume: the folder of a run to go on with, bit for bit. until: stop after so many steps of the
    whole run, with a checkpoint. dataset: pictures of your own instead of recipe.data.
    allow: ("data",) goes on though the data have changed since, ("precision",) though this machine
    computes in another one. stop: asked after every step; once it is true, on any rank, the run
    ends there with a checkpoint. Closing the generator saves no checkpoint. Raises ConfigError for
    a recipe that cannot be run, ValueError where another process writes in recipe.out,
    DivergedError when the loss stays non-finite.
    """
    if until is not None and until < 1:
        raise ConfigError(f"until: must be at least 1, got {until}")
    where = devices.pick(recipe.run.device)
    with parallel.joined(where) as world, claim(recipe.out, world):
        saved = state.begun(recipe, resume)
        if saved is not None:
            recipe = state.adopted(recipe, saved)
        trainer = Trainer(recipe, opened(recipe) if dataset is None else dataset, where, world)
        if saved is not None:
            trainer.resume(saved, allow)
        del saved  # a second copy of the whole state
        try:
            yield from trainer.steps(until, stop)
        finally:
            trainer.called = trainer.network
            parallel.collect(world)


def claim(out: str | None, world: parallel.World) -> AbstractContextManager[None]:
    """The run's folder, for the rank that writes there."""
    return nullcontext() if out is None or world.rank else claimed(Path(out))


def opened(recipe: Recipe) -> Dataset:
    """The recipe's data, through the user's own function if it names one."""
    dataset: Dataset = recipe.data.open()
    if recipe.run.preprocess is None:
        return dataset
    return mapped(dataset, load_function(recipe.run.preprocess))


class Trainer:
    """A run at work: the state and what moves it."""

    def __init__(
        self, recipe: Recipe, dataset: Dataset, where: torch.device, world: parallel.World
    ) -> None:
        self.where, self.world = where, world
        # Each rank times its processor; the first one's answer is that of all.
        fast = float(devices.arithmetic(recipe.run.precision, where) == "bf16")
        self.precision = "bf16" if parallel.first(fast, world, where) else "fp32"
        self.network, self.task = begun(recipe, dataset, where, self.precision)
        self.dataset = self.task.dataset
        self.recipe = memory.settled(self.task, self.network, where, world)
        self.called = parallel.distribute(self.network, world, recipe.run.strategy, where)
        if recipe.run.compile:
            self.called.compile()
        optimizers = recipe.optimizer.build(self.network)
        self.state = state.State(
            self.network, optimizers, total=self.length(), widths=recipe.run.averages
        )
        self.micro = min(self.recipe.run.micro_batch or self.share, self.share)
        self.bad: list[int] = []

    @property
    def batch(self) -> int:
        assert isinstance(self.recipe.run.batch_size, int)
        return self.recipe.run.batch_size

    @property
    def share(self) -> int:
        """This rank's pictures a step."""
        if self.batch % self.world.size:
            raise ConfigError(
                f"run.batch_size: {self.batch} is no multiple of {self.world.size} ranks"
            )
        return self.batch // self.world.size

    @property
    def facts(self) -> dict[str, Any]:
        common = {"precision": self.precision, "data": self.dataset.fingerprint()}
        return {**common, **self.task.facts}

    def length(self) -> int | None:
        """Steps of the whole run; None while a length in minutes is not yet measured."""
        run = self.recipe.run
        if run.epochs is not None:
            return math.ceil(run.epochs * len(self.dataset) / self.batch)
        return None if run.minutes is not None else run.steps or 1000

    def resume(self, saved: snapshot.Snapshot, allow: Sequence[str] = ()) -> None:
        state.check_same(self.recipe, self.facts, saved, allow)
        self.state.restore(saved)

    def steps(self, until: int | None, stop: Callable[[], bool] | None = None) -> Iterator[Report]:
        """From the state's step to the end, to ``until``, or until ``stop()`` is true."""
        s, run = self.state, self.recipe.run
        start, began, slow = s.step, time.monotonic(), 0.0
        source = batches(
            self.dataset, self.recipe.seed, self.batch, start=s.step * self.batch,
            workers=run.workers, rank=self.world.rank, ranks=self.world.size,
        )  # fmt: skip
        with closing(source):
            while s.step < min(s.total or math.inf, until or math.inf):
                loss, norm, parts = self.step(*next(source))
                seconds = time.monotonic() - began
                if s.step - start == SLOW:
                    slow = seconds
                if s.total is None and s.step >= MEASURED and s.step - start > SLOW:
                    s.total = self.measured_length((seconds - slow) / (s.step - start - SLOW))
                if s.widths and (s.step % run.average_every == 0 or s.step == s.total):
                    # Before the checkpoint, from which a resume would not come back here.
                    posthoc.keep(s, self.recipe.out, self.task.packed, self.world)
                if s.step % run.save_every == 0 and s.step not in (s.total, until):
                    self.save()
                yield Report(
                    s.step, s.total, loss, self.rate(s.step - 1), norm, seconds, s.skipped,
                    s.step * self.batch, (s.step - start) * self.batch, self.averaged, parts,
                )  # fmt: skip
                # Every rank takes part in saving, so they stop together.
                if stop is not None and parallel.anywhere(stop(), self.world, self.where):
                    break
        self.save()
        if s.step == s.total:
            self.finish()

    def measured_length(self, seconds: float) -> int:
        """Minutes as steps; every rank takes the first one's clock."""
        assert self.recipe.run.minutes is not None
        pace = parallel.first(seconds, self.world, self.where)
        return max(MEASURED, round(self.recipe.run.minutes * 60 / pace))

    def rate(self, step: int) -> float:
        total = self.state.total or 1_000_000
        return self.recipe.optimizer.lr * self.recipe.schedule.factor(step, total)

    def step(self, first: int, batch: Batch) -> tuple[float, float, dict[str, float]]:
        """One update; a loss or gradient that is not finite leaves everything as it was."""
        s, run = self.state, self.recipe.run
        loss, parts = self.gradients(first, batch)
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        norm = float(parallel.norm(gradients))
        if math.isfinite(loss) and math.isfinite(norm):
            self.bad.clear()
            if run.clip is not None and norm > run.clip:
                torch._foreach_mul_([parallel.local(g) for g in gradients], run.clip / norm)
            set_rate(s.optimizers, self.rate(s.step))
            with devices.autocast(self.precision, self.where):
                for optimizer in s.optimizers:
                    optimizer.step()
            s.follow(average.decay_at(s.updates, run.ema, run.ema_warmup))
        else:
            self.skip()
        self.network.zero_grad(set_to_none=True)
        s.step += 1
        if s.step % state.GAP_EVERY == 0:
            parts["ema gap"] = s.gap(self.world)
        return loss, norm, parts

    def skip(self) -> None:
        self.state.skipped += 1
        self.bad.append(self.state.step * self.batch)
        if len(self.bad) == 3:
            last = (
                snapshot.newest(Path(self.recipe.out) / CHECKPOINTS)[0] if self.recipe.out else None
            )
            where = (
                f"the last good checkpoint is {last.path}" if last else "no checkpoint was saved"
            )
            spans = ", ".join(f"{b}..{b + self.batch - 1}" for b in self.bad)
            raise DivergedError(
                f"stopped at step {self.state.step + 1}: no finite loss and gradient in three "
                f"steps in a row, at global samples {spans}; {where}"
            )

    def gradients(self, first: int, batch: Batch) -> tuple[float, dict[str, float]]:
        """Accumulate over micro-batches; halve them and start over when memory runs out."""
        while True:
            try:
                return self.accumulate(first, batch)
            except RuntimeError as error:
                alone = self.world.size == 1
                if not (devices.out_of_memory(error) and self.micro > 1 and alone):
                    raise
                self.network.zero_grad(set_to_none=True)
                self.micro = math.ceil(self.micro / 2)

    def accumulate(self, first: int, batch: Batch) -> tuple[float, dict[str, float]]:
        total, parts = torch.zeros((), device=self.where), Parts()
        for start in range(0, self.share, self.micro):
            part = slice(start, start + self.micro)
            if getattr(self.recipe.model, "dropout", 0):  # its draws, too, are keyed
                torch.manual_seed(dice(self.recipe.seed, self.state.step, first + start))
            piece = Batch(batch.x[part], batch.labels[part], batch.captions[part])
            last = start + self.micro >= self.share
            with parallel.waiting(self.called, wait=not last):
                loss, said = self.task.loss(self.called, self.state.step, first + start, piece)
                loss = loss * (len(piece.x) / self.share)
                loss.backward()
            total += loss.detach()
            parts = added(parts, said)
        return read(total, parts, self.world)

    def whole(self) -> dict[str, Tensor]:
        """The averaged weights, and what is not trained, whole and each in memory of its own."""
        frozen = {n: whole(p.detach()) for n, p in self.network.named_parameters()
                  if not p.requires_grad}  # fmt: skip
        weights = {**dict(self.network.named_buffers()), **frozen, **self.state.averaged()}
        return {name: weight.clone() for name, weight in weights.items()}

    def averaged(self) -> Result:
        return self.task.result(self.whole())

    def save(self) -> None:
        if self.recipe.out is not None:
            folder = Path(self.recipe.out) / CHECKPOINTS
            state.save(self.state, self.recipe, self.facts, folder, self.world)

    def finish(self) -> None:
        """The averaged weights in one file with everything that sampling needs to know."""
        weights = self.whole()
        if self.recipe.out is not None and self.world.rank == 0:
            self.task.leave(weights, Path(self.recipe.out))
