"""jaxtyping's run-time checks, but not of functions without an array: half of the tests' time."""

import inspect
import os
from functools import partial
from typing import Any, get_args

import jaxtyping
from jaxtyping import AbstractArray

with_shapes = jaxtyping.jaxtyped


def install() -> None:
    """Check the package's types and shapes from here on, unless JAXTYPING_DISABLE is set.

    A function whose annotations name no array has no shapes to compare: its types are checked by
    beartype alone, or not at all where it is defined within another function.
    """
    if "JAXTYPING_DISABLE" not in os.environ:
        jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]
        jaxtyping.install_import_hook("minidiffusion", "beartype.beartype")


def jaxtyped(fn: Any = None, *, typechecker: Any) -> Any:
    if fn is None:
        return partial(jaxtyped, typechecker=typechecker)
    if inspect.isfunction(fn) and not any(map(names_array, fn.__annotations__.values())):
        # A function within a function would be compiled anew at each call of the outer one.
        return fn if "<locals>" in fn.__qualname__ else typechecker(fn)
    return with_shapes(fn, typechecker=typechecker)


def names_array(annotation: Any) -> bool:
    """Whether an array's shape is somewhere in it; a name in quotes, not resolved here, may be."""
    if isinstance(annotation, str | list):
        return isinstance(annotation, str) or any(map(names_array, annotation))
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    return any(map(names_array, get_args(annotation)))
