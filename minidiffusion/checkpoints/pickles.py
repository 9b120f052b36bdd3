"""What a pickle writes down, read as data: nothing in it is imported, called or built.

A pickle is a program for a small stack machine. Here its instructions act on dicts, lists, tuples
and numbers alone. A global stays a mere name; a call of one that is not among the few that write
down tensors gives a `Thing`, which has no behaviour, so training state of any library may lie
beside the weights. The limits below keep a small hostile file from becoming a large object.
"""

import io
import math
import pickletools
from collections.abc import Iterator
from itertools import count
from typing import Any, NamedTuple

import torch

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
DTYPES = {str(dtype).replace(".", " "): dtype for dtype in STORAGES.values()} | {
    "torch uint16": torch.uint16,
    "torch uint32": torch.uint32,
    "torch uint64": torch.uint64,
    "torch float8_e4m3fn": torch.float8_e4m3fn,
    "torch float8_e5m2": torch.float8_e5m2,
}
DICTS = {"collections OrderedDict", "collections defaultdict", "builtins dict", "__builtin__ dict"}
MODULE = "__torch__"
"""How the class names of TorchScript's modules begin; their attributes are tensors by name."""
MOST_INSTRUCTIONS = 2**20
"""Ten times those of 2,500 tensors with their optimizer's; each can cost about 100 bytes."""
MOST_ENTRIES = 2**17
LONGEST_NAME = 4096
DEEPEST = 64
HIGHEST_RANK = 8


class Name(NamedTuple):
    """A global that the pickle mentions, "module name"; it is never looked up."""

    text: str


class Thing:
    """An object of a class that is no business of ours: its name, and what lies below it."""

    __slots__ = ("below", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.below: dict[str | int, Any] | None = None


class Stored(NamedTuple):
    """``length`` numbers of a storage of ``total`` numbers, from its ``first`` on."""

    dtype: torch.dtype
    key: str
    total: int
    first: int
    length: int


class View(NamedTuple):
    """A tensor before its bytes are read; offset and strides count numbers, not bytes."""

    dtype: torch.dtype
    stored: Stored
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


DAMAGE = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, Warning)
"""What damaged instructions raise; an odd escape in a name is a warning, or an error if asked."""
MARK = Name("where the parts of a tuple, list or dict begin on the stack")


def interpret(stream: io.BytesIO, kinds: dict[str, torch.dtype] | None = None) -> Any:
    """What the next pickle of a stream describes; the stream is left behind its last byte.

    ``kinds`` receives the dtype of every storage that the pickle mentions, by its key.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    try:
        for spent, (code, argument, _) in enumerate(pickletools.genops(stream)):
            match code.name:
                case _ if spent == MOST_INSTRUCTIONS:
                    raise ValueError(f"more than {MOST_INSTRUCTIONS} instructions")
                case "BINPUT" | "LONG_BINPUT" | "PUT":
                    memo[argument % 2**32] = stack[-1]  # large ones could all have one hash
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET" | "GET":
                    stack.append(memo[argument])
                case "BINPERSID":
                    stack.append(stored := storage_of(stack.pop()))
                    if kinds is not None and isinstance(stored, Stored):
                        kinds.setdefault(stored.key, stored.dtype)
                case "STOP":
                    return stack.pop()
                case "PROTO" | "FRAME":
                    pass
                case name:
                    step(name, argument, stack)
    except DAMAGE as error:
        raise ValueError(f"the pickle is damaged or foreign: {one_line(error)}") from error
    except RecursionError:
        raise ValueError("the pickle is nested too deeply") from None


def one_line(error: Exception) -> str:
    return " ".join(str(error)[:200].split()) or type(error).__name__


def step(name: str, argument: Any, stack: list[Any]) -> None:
    """One instruction that takes its operands from the stack, or else a literal."""
    match name:
        case "TUPLE" | "LIST" | "FROZENSET":
            items = since_mark(stack)
            stack.append(tuple(items) if name == "TUPLE" else items)
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            stack[-int(name[-1]) :] = [tuple(top(stack, int(name[-1])))]
        case "APPEND" | "APPENDS" | "ADDITEMS":
            items = [stack.pop()] if name == "APPEND" else since_mark(stack)
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
            elif not isinstance(stack[-1], Thing):
                raise ValueError(f"{name} to what is no list")
        case "SETITEM" | "SETITEMS" | "DICT":
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else since_mark(stack)
            if name == "DICT":
                stack.append({})
            fill(stack[-1], items)
        case "STACK_GLOBAL":
            word, module = stack.pop(), stack.pop()
            stack.append(literal("GLOBAL", " ".join((module[:LONGEST_NAME], word[:LONGEST_NAME]))))
        case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
            operands = [stack.pop() for _ in range(3 if name == "NEWOBJ_EX" else 2)]
            stack.append(call(operands[-1], operands[-2]))
        case "INST" | "OBJ":  # protocols 0 and 1
            items = since_mark(stack)
            kind = Name(argument) if name == "INST" else items.pop(0)
            stack.append(call(kind, tuple(items)))
        case "BUILD":
            build(stack[-2], stack.pop())
        case "DUP":
            stack.append(stack[-1])
        case "POP":
            stack.pop()
        case "POP_MARK":
            since_mark(stack)
        case _:
            stack.append(literal(name, argument))


def literal(name: str, argument: Any) -> object:
    match name:
        case "MARK":
            return MARK
        case "GLOBAL":
            if len(argument) > LONGEST_NAME:
                raise ValueError(f"the name of a class is {len(argument)} letters long")
            return Name(argument)
        case "NONE" | "NEWTRUE" | "NEWFALSE":
            return {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name]
        case "EMPTY_TUPLE":
            return ()
        case "EMPTY_LIST" | "EMPTY_SET":
            return []
        case "EMPTY_DICT":
            return {}
        case "EXT1" | "EXT2" | "EXT4":
            return Thing("an extension")
        case "PERSID" | "NEXT_BUFFER" | "READONLY_BUFFER":
            raise ValueError(f"the instruction {name} is not one that torch.save writes")
    return argument  # a number, text or bytes


def top(stack: list[Any], size: int) -> list[Any]:
    if len(stack) < size:
        raise ValueError("the stack is too short")
    return stack[-size:]


def since_mark(stack: list[Any]) -> list[Any]:
    items = []
    while (item := stack.pop()) is not MARK:
        items.append(item)
    return items[::-1]


def fill(target: Any, items: list[Any]) -> None:
    """Rows of a dict. Names and small numbers are its only keys: a tuple deep enough would end
    Python itself when hashed, and large numbers can be chosen to have one hash."""
    if isinstance(target, Thing):
        target.below = target.below if target.below is not None else {}
        target = target.below
    if not isinstance(target, dict):
        raise ValueError("a row for what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is str or (type(key) is int and abs(key) < 2**31):
            target[key] = value


def build(target: Any, state: Any) -> None:
    """A class of its own would now get its attributes; only TorchScript's modules do."""
    if isinstance(target, Thing) and target.name.startswith(MODULE) and isinstance(state, dict):
        target.below = state


def storage_of(identity: Any) -> Any:
    match identity:
        case ("storage", Name(kind), str(key), _, int(total), *view):
            word = kind.split(" ")[-1]
            if word not in STORAGES or not kind.startswith("torch"):
                raise ValueError(f"unknown storage {kind[:80]}")
            match view:
                case [] | [None]:
                    return Stored(STORAGES[word], key, total, 0, total)
                case [(_, int(first), int(length))] if 0 <= first <= first + length <= total:
                    return Stored(STORAGES[word], key, total, first, length)
        case ("module", kind, *_):
            return kind
    raise ValueError("unknown kind of storage")


def call(function: Any, arguments: Any) -> Any:
    """The few calls that write down tensors, carried out by hand; of others the name is kept."""
    if not isinstance(arguments, tuple):
        raise ValueError("the arguments of a call are no tuple")
    match function, arguments:
        case (Name("torch._utils _rebuild_tensor" | "torch._utils _rebuild_tensor_v2"), _):
            stored, offset, shape, strides = arguments[:4]
            if isinstance(stored, Stored):
                plain(arguments[6:])
                return view_of(stored.dtype, stored, offset, shape, strides)
        case (Name("torch._utils _rebuild_tensor_v3"), _):
            stored, offset, shape, strides, _, _, dtype = arguments[:7]
            if isinstance(stored, Stored) and dtype.text in DTYPES:
                plain(arguments[7:])
                return view_of(DTYPES[dtype.text], stored, offset, shape, strides)
        case (Name("torch._utils _rebuild_parameter"), (View() as view, *_)):
            return view
        case (Name("torch._utils _rebuild_parameter_with_state"), (View() as view, *_)):
            return view
        case (Name("torch._tensor _rebuild_from_type_v2"), (Name() as inner, _, tuple(rest), _)):
            return call(inner, rest)
        case (Name(text), ()) if text in DICTS:
            return {}
        case (Name("collections defaultdict"), (_,)):
            return {}
        case (Name("torch Size"), (tuple(shape),)):
            return shape
        case (Name(text), (value, *_)) if text.startswith("torch.jit._pickle "):
            return value  # typed lists
    return Thing(function.text if isinstance(function, Name) else "a made-up class")


def plain(remarks: tuple[Any, ...]) -> None:
    if any(remarks):
        raise ValueError("a tensor is the conjugate or the negative of what is stored")


def view_of(dtype: torch.dtype, stored: Stored, offset: Any, shape: Any, strides: Any) -> View:
    for numbers in ((offset,), shape, strides):
        small = isinstance(numbers, list | tuple) and len(numbers) <= HIGHEST_RANK
        if not small or not all(type(n) is int and 0 <= n < 2**60 for n in numbers):
            raise ValueError("impossible shape, strides or offset of a tensor")
    if len(shape) != len(strides) or math.prod(max(axis, 1) for axis in shape) >= 2**60:
        raise ValueError("impossible shape of a tensor")
    return View(dtype, stored, offset, tuple(shape), tuple(strides))


def named_views(root: Any) -> dict[str, View]:
    """The tensors in a dict of dicts, by dotted names."""
    views: dict[str, View] = {}
    for name, view in walk(root, "", 0, count()):
        if name in views:
            raise ValueError(f"two tensors are named {name!r}")
        name.encode()  # half a letter cannot be shown or written
        views[name] = view
    return views


def walk(root: Any, prefix: str, depth: int, visits: Iterator[int]) -> Iterator[tuple[str, View]]:
    below = root.below if isinstance(root, Thing) else root
    for key, value in below.items() if isinstance(below, dict) else ():
        # Dicts that hold one another many times are more names than the file has letters.
        if depth == DEEPEST or next(visits) == MOST_ENTRIES:
            raise ValueError("dicts within dicts without end, or too many")
        if not isinstance(value, View | dict | Thing):
            continue
        name = f"{prefix}{str(key)[: LONGEST_NAME + 1]}"
        if len(name) > LONGEST_NAME:
            raise ValueError(f"the name of a tensor is longer than {LONGEST_NAME} letters")
        if isinstance(value, View):
            yield name, value
        else:
            yield from walk(value, f"{name}.", depth + 1, visits)
