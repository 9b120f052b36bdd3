"""Numbers that are not finite: found by module, and computed in float32 where 16 bits overflow.

Nothing is watched while all is well: a result is checked once. Only where it is not finite is the
call repeated, with hooks that find the first module that makes such numbers of finite ones.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

HALF = (torch.float16, torch.bfloat16)
WARNED: WeakSet[nn.Module] = WeakSet()
"""Modules whose overflow has been reported: each is reported once."""
T = TypeVar("T")


class NotFiniteError(ValueError):
    """The message names the module, or the weight of it that is not finite itself."""


class Fault(NamedTuple):
    """The first module that makes numbers that are not finite of finite ones.

    name: of the module, or of its weight that holds such numbers: then it is damaged. dtype: of
    its output.
    """

    module: nn.Module
    name: str
    damaged: bool
    dtype: torch.dtype


class FiniteGuard(ExitStack):
    """Calls of one part of a model, whose results are finite or a NotFiniteError.

    A module that overflows 16 bits works in float32 until the context ends, and the whole part
    where its result fits no 16 bits: later calls, of other pictures, do not depend on this one.
    """

    def __init__(self, part: nn.Module, name: str) -> None:
        super().__init__()
        self.part, self.name = part, name

    def __call__(self, call: Callable[[], T]) -> T:
        """call() runs the part, and does the same each time."""
        found = call()
        return found if is_finite(found) else self._retried(call)

    def _retried(self, call: Callable[[], T]) -> T:
        fault, outermost = located(self.part, self.name, call)
        if fault is None:
            raise NotFiniteError(f"{self.name}: numbers that are not finite")
        error = NotFiniteError(f"{fault.name}: numbers that are not finite")
        if fault.damaged or fault.dtype not in HALF:
            raise error
        tries = (fault.name, [fault.module], fault.dtype), (self.name, outermost, None)
        for name, modules, back in tries:
            with ExitStack() as tried:  # whatever ends the call, no module stays changed
                for one in modules:
                    tried.enter_context(in_float32(one, back))
                found = call()
                if is_finite(found):
                    self.push(tried.pop_all())
                    if fault.module not in WARNED:
                        WARNED.add(fault.module)
                        warnings.warn(f"{name} overflowed: it works in float32 now", stacklevel=4)
                    return found
        raise error


def is_finite(value: object) -> bool:
    """Of every number in tensors, tuples and dicts of them."""
    leaves = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return all(bool(leaf.isfinite().all()) for leaf in leaves if leaf.is_floating_point())


def located(
    part: nn.Module, name: str, call: Callable[[], object]
) -> tuple[Fault | None, Sequence[nn.Module]]:
    """The fault in call(), and the outermost modules that it runs: the part, or children of it."""
    faults: list[Fault] = []
    run: set[nn.Module] = set()

    def look(path: str, module: nn.Module, args: Any, given: Any, out: Any) -> None:
        run.add(module)
        if not faults and not is_finite(out) and is_finite((args, given)):
            bad = next((key for key, weight in weights(module) if not is_finite(weight)), "")
            dtype = next(x.dtype for x in tree_leaves(out) if isinstance(x, Tensor))
            place = ".".join(filter(None, (name, path, bad)))
            faults.append(Fault(module, place, bool(bad), dtype))

    with ExitStack() as hooks:
        for path, module in part.named_modules():
            hook = module.register_forward_hook(partial(look, path), with_kwargs=True)
            hooks.callback(hook.remove)
        call()
    outermost = [part] if part in run else [one for one in part.children() if one in run]
    return (faults[0] if faults else None), outermost


def weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers that are there, of a dtype that can be asked whether it is finite."""
    named = (*module.named_parameters(), *module.named_buffers())
    return [(name, x.float() if x.itemsize == 1 else x) for name, x in named if not x.is_meta]


@contextmanager
def in_float32(module: nn.Module, back: torch.dtype | None) -> Iterator[None]:
    """The module computes in float32 from weights that stay in 16 bits.

    They are widened for each of its calls, wherever they lie by then. back: the dtype that its
    results are cast to; None leaves them.
    """
    stored: list[tuple[Tensor, Tensor]] = []

    def widen(_: nn.Module, args: Any, given: Any) -> tuple[Any, Any]:
        for x in (*module.parameters(), *module.buffers()):
            if x.dtype in HALF:
                stored.append((x, x.data))
                x.data = x.data.float()
        return cast((args, given), HALF, torch.float32)

    def restore() -> None:
        for x, data in stored:
            x.data = data
        stored.clear()

    def narrow(_: nn.Module, args: Any, out: Any) -> Any:
        restore()
        return out if back is None else cast(out, (torch.float32,), back)

    hooks = (
        module.register_forward_pre_hook(widen, with_kwargs=True),
        module.register_forward_hook(narrow, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        restore()  # after Ctrl-C, for which no hook is called


def cast(value: Any, known: Sequence[torch.dtype], dtype: torch.dtype) -> Any:
    """Tensors of the known dtypes in another, wherever they lie in tuples and dicts."""
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.dtype in known else x, value)
