"""Plain data and frozen dataclasses, one into the other, strictly: recipes, metadata in files.

A mistake is one line: where (the dotted key), what, and what is allowed. A field annotated with
several dataclasses (``UNetConfig | DiTConfig``) is told apart by the key ``name``, which each of
them carries as ``name: ClassVar[str]``; the one without is meant where no name is given.
"""

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
BOUNDS = {
    "min": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "max": ("at most", operator.le),
    "below": ("below", operator.lt),
}
"""What ``field(metadata={"min": 1})`` may ask of a number, or of each number in a tuple."""
FILLED = {"filled": True}
"""Metadata of a text that must not be empty: an empty path would be the folder at hand."""
SEED = {"min": 0, "max": 2**64 - 1}
"""Metadata of a seed: the keys of the random numbers have 64 bits."""
SORTS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class ConfigError(ValueError):
    """A mistake of the person who wrote the values, said in one line."""


def build(cls: type[T], values: Mapping[str, object], where: str = "") -> T:
    """The dataclass that plain values describe; ``where`` names their source, such as a file."""
    made: T = read_block([cls], values, f"{where}: " if where else "")
    return made


def plain(obj: object) -> dict[str, object]:
    """The plain values, all of which JSON can hold, that ``build`` makes an equal object of."""
    if not is_dataclass(obj) or isinstance(obj, type):
        raise TypeError(f"{obj!r} is not a dataclass")
    name = name_of(type(obj))
    values = {field.name: simple(getattr(obj, field.name)) for field in fields(obj) if field.init}
    return {"name": name, **values} if name else values


def simple(value: object) -> object:
    if is_dataclass(value):
        return plain(value)
    if isinstance(value, tuple | list):
        return [simple(one) for one in value]
    # JSON knows no infinity; build reads the word.
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def fields_help(cls: Any, prefix: str = "", usual: object = None) -> list[tuple[str, str, str]]:
    """(dotted key, what it takes, its default) of every field, for a page of help.

    ``usual`` is an instance whose values are the defaults, where they are not the class's own.
    """
    rows = []
    for name, (field, hint) in typed_fields(cls).items():
        key, blocks = join(prefix, name), [one for one in members(hint) if is_dataclass(one)]
        default = getattr(usual, name) if isinstance(usual, cls) else default_of(field)
        shown = "required" if default is MISSING else simple(default)
        if members(hint) != blocks or len(blocks) > 1:
            text = shown.get("name", "") if isinstance(shown, dict) else shown
            rows.append((key, expected(hint, field), str(text)))
        for block in blocks:
            of = f" (of {name_of(block)})" if len(blocks) > 1 and name_of(block) else ""
            inner = fields_help(block, key, default)
            rows += [(part, takes + of, value) for part, takes, value in inner]
    return rows


def typed_fields(cls: Any) -> dict[str, tuple[Field[Any], Any]]:
    hints = get_type_hints(cls)
    return {field.name: (field, hints[field.name]) for field in fields(cls) if field.init}


def default_of(field: Field[Any]) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()


def name_of(cls: Any) -> str | None:
    """What a dataclass is called in plain values, where it is called anything."""
    name = None if "name" in (field.name for field in fields(cls)) else getattr(cls, "name", None)
    return name if isinstance(name, str) else None


def members(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]


def join(place: str, key: object, dot: str = ".") -> str:
    """A key inside a place; right after the name of a source it needs no dot."""
    return f"{place}{key}" if not place or place.endswith(": ") else f"{place}{dot}{key}"


def fault(place: str, text: object) -> ConfigError:
    return ConfigError(join(place, text, dot=": "))


def unknown(place: str, what: str, value: object, allowed: Iterable[object]) -> ConfigError:
    words = [str(one) for one in allowed]
    close = get_close_matches(str(value), words, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return fault(place, f"{what}{hint}; allowed: {', '.join(words)}")


def expected(hint: Any, field: Field[Any]) -> str:
    """What a field takes, in a few words."""
    inner = get_args(hint)
    if get_origin(hint) is tuple:
        return f"[{', '.join('...' if one is ... else expected(one, field) for one in inner)}]"
    if get_origin(hint) is Literal:
        return " | ".join(map(str, inner))
    if len(members(hint)) > 1:
        return " | ".join(expected(one, field) for one in members(hint))
    if is_dataclass(hint):
        return name_of(hint) or "a block of keys"
    if hint not in (int, float):
        return "null" if hint is NoneType else SORTS[hint]
    bounds = [f" {BOUNDS[rule][0]} {limit}" for rule, limit in ranges(field)]
    return SORTS[hint] + ",".join(bounds)


def ranges(field: Field[Any]) -> list[tuple[str, Any]]:
    return [(rule, field.metadata[rule]) for rule in BOUNDS if rule in field.metadata]


def read_block(blocks: list[Any], values: object, place: str) -> Any:
    """One of these dataclasses: the one that ``name`` names, where there is a choice."""
    named = {str(name_of(block)): block for block in blocks if name_of(block)}
    if named and isinstance(values, str):
        values = {"name": values}
    if not isinstance(values, Mapping):
        raise fault(place, f"expected a block of keys, got {values!r}")
    cls, values = blocks[0], dict(values)
    if named and ("name" in values or len(named) == len(blocks) > 1):
        if "name" not in values:
            raise fault(join(place, "name"), f"missing; allowed: {', '.join(sorted(named))}")
        name = values.pop("name")
        if not isinstance(name, str) or name not in named:
            raise unknown(join(place, "name"), f"unknown {name!r}", name, sorted(named))
        cls = named[name]
    known = typed_fields(cls)
    for key in values:
        if key not in known:
            raise unknown(join(place, key), "unknown key", key, known)
    given = {}
    for key, (field, hint) in known.items():
        if key in values:
            given[key] = read_value(hint, values[key], join(place, key), field)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise fault(join(place, key), f"missing; expected {expected(hint, field)}")
    try:
        return cls(**given)
    except ValueError as error:  # what __post_init__ found
        raise fault(place, error) from error


def read_value(hint: Any, value: object, place: str, field: Field[Any]) -> Any:
    choices = [one for one in members(hint) if one is not NoneType]
    if value is None and NoneType in members(hint):
        return None
    if all(is_dataclass(one) for one in choices):
        return read_block(choices, value, place)
    for one in choices[1:]:  # a number, or a word that stands for one
        if get_origin(one) is not Literal:
            raise TypeError(f"{place}: {hint} cannot be told apart in plain values")
        if isinstance(value, str) and value in get_args(one):
            return value
        if isinstance(value, str):
            raise fault(place, f"expected {expected(hint, field)}, got {value!r}")
    if get_origin(choices[0]) is tuple:
        return read_tuple(choices[0], value, place, field)
    if get_origin(choices[0]) is Literal:
        allowed = get_args(choices[0])
        if not any(type(one) is type(value) and one == value for one in allowed):
            raise unknown(place, f"unknown {value!r}", value, allowed)
        return value
    return read_scalar(choices[0], value, place, field)


def read_tuple(hint: Any, value: object, place: str, field: Field[Any]) -> tuple[Any, ...]:
    inner = get_args(hint)
    if not isinstance(value, list | tuple):
        raise fault(place, f"expected a list, got {value!r}")
    if inner[-1] is ...:
        inner = inner[:1] * len(value)
    if len(inner) != len(value):
        raise fault(place, f"expected {len(inner)} values, got {len(value)}")
    pairs = zip(inner, value, strict=True)
    return tuple(read_value(one, v, f"{place}[{i}]", field) for i, (one, v) in enumerate(pairs))


def read_scalar(hint: Any, value: object, place: str, field: Field[Any]) -> Any:
    found: Any = value
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            found = float(value)  # YAML 1.1 takes 1e-4 for text
        except (ValueError, OverflowError):
            found = None
    if type(found) is not hint or found != found:
        raise fault(place, f"expected {SORTS[hint]}, got {value!r}")
    if hint is float and math.isinf(found) and found != field.default:
        raise fault(place, f"must be finite, got {value!r}")
    if field.metadata.get("filled") and not str(found).strip():
        raise fault(place, "must not be empty")
    if hint in (int, float):
        for rule, limit in ranges(field):
            words, holds = BOUNDS[rule]
            if not holds(found, limit):
                raise fault(place, f"must be {words} {limit}, got {value}")
    return found
