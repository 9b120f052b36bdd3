"""The tensors of a TorchScript archive, read as data.

An archive is a zip: code, a pickle of the module's attributes, and the tensors' bytes. The code
stays unread, and the pickle is not unpickled: the few instructions that write down tensors are
interpreted here on dicts and tuples, any other is refused, and a global stays a mere name.
"""

import math
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
LARGEST_PICKLE = 2**26


class Name(NamedTuple):
    """A global that the pickle mentions; it is never looked up."""

    text: str


class Mark(NamedTuple):
    """Where the parts of a tuple, list or dict begin on the stack."""


class Stored(NamedTuple):
    dtype: torch.dtype
    key: str
    length: int


class View(NamedTuple):
    """A tensor before its bytes are read."""

    stored: Stored
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torchscript(path: Path | str) -> dict[str, Tensor]:
    """Every tensor of a saved module by its dotted name, parameters and buffers alike."""
    try:
        with zipfile.ZipFile(path) as archive:
            return read_archive(archive)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not a TorchScript archive: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path}: the archive is incomplete: {error.args[0]}") from error
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{path}: {error}") from error
    except RecursionError:
        raise ValueError(f"{path}: the modules are nested too deeply") from None


def read_archive(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    roots = [name for name in archive.namelist() if name.count("/") == 1]
    folder = next((name[:-9] for name in roots if name.endswith("/data.pkl")), None)
    if folder is None:
        raise ValueError("not a TorchScript archive: no data.pkl")
    if f"{folder}/byteorder" in roots and archive.read(f"{folder}/byteorder") != b"little":
        raise ValueError("written by a big-endian machine")
    if archive.getinfo(f"{folder}/data.pkl").file_size > LARGEST_PICKLE:
        raise ValueError("data.pkl is larger than 64 MB")
    content = interpret(archive.read(f"{folder}/data.pkl"))
    views = dict(walk(content, "", set()))
    kept = {view.stored for view in views.values()}
    storages = {stored: read_storage(archive, folder, stored) for stored in kept}
    return {name: placed(storages[view.stored], view, name) for name, view in views.items()}


def read_storage(archive: zipfile.ZipFile, folder: str, stored: Stored) -> Tensor:
    info = archive.getinfo(f"{folder}/data/{stored.key}")
    size = stored.length * stored.dtype.itemsize
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != size:
        raise ValueError(f"data/{stored.key}: {info.file_size} bytes, expected {size} as they are")
    if size == 0:
        return torch.empty(0, dtype=stored.dtype)
    return torch.frombuffer(bytearray(archive.read(info)), dtype=stored.dtype)


def placed(storage: Tensor, view: View, name: str) -> Tensor:
    steps = zip(view.shape, view.strides, strict=True)
    last = view.offset + sum((n - 1) * stride for n, stride in steps)
    # The count too: with a stride of 0 a few bytes could claim to be any number of values.
    if math.prod(view.shape) > len(storage) or (0 not in view.shape and last >= len(storage)):
        raise ValueError(f"tensor {name!r}: reaches beyond its {len(storage)} stored numbers")
    return storage.as_strided(view.shape, view.strides, view.offset).clone()


def walk(content: object, prefix: str, seen: set[int]) -> Iterator[tuple[str, View]]:
    """The tensors below a module; each module once, so that no pickle can make this endless."""
    if not isinstance(content, dict) or id(content) in seen:
        return
    seen.add(id(content))
    for name, value in content.items():
        if isinstance(value, View):
            yield f"{prefix}{name}", value
        yield from walk(value, f"{prefix}{name}.", seen)


def interpret(pickle: bytes) -> object:
    """What the pickle describes: modules as dicts of their attributes, tensors as views."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    try:
        for code, argument, _ in pickletools.genops(pickle):
            if code.name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif code.name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif code.name == "STOP":
                return stack.pop()
            elif code.name != "PROTO":
                step(code.name, argument, stack)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"data.pkl is damaged or foreign: {error}") from error
    raise ValueError("data.pkl is empty")


def step(name: str, argument: Any, stack: list[Any]) -> None:
    """One instruction of the pickle machine."""
    match name:
        case "TUPLE":
            stack.append(tuple(since_mark(stack)))
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        case "APPENDS":
            items = since_mark(stack)
            stack[-1].extend(items)
        case "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        case "SETITEMS":
            items = since_mark(stack)
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        case "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1][key] = value
        case "BINPERSID":
            stack.append(storage_of(stack.pop()))
        case "NEWOBJ":
            stack[-2:] = [{}]  # a module: BUILD brings its attributes
        case "BUILD":
            state = stack.pop()
            stack[-1].update(state)
        case "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(call(function, arguments))
        case _:
            stack.append(literal(name, argument))


def literal(name: str, argument: Any) -> object:
    match name:
        case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
            return argument
        case "NONE" | "NEWTRUE" | "NEWFALSE":
            return {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name]
        case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
            return {"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[name]
        case "GLOBAL":
            return Name(argument)
        case "MARK":
            return Mark()
    raise ValueError(f"the instruction {name} is not one that tensors need")


def since_mark(stack: list[Any]) -> list[Any]:
    items = []
    while not isinstance(item := stack.pop(), Mark):
        items.append(item)
    return items[::-1]


def storage_of(identity: tuple[str, Name, str, str, int]) -> Stored:
    _, kind, key, _, count = identity
    if kind.text not in STORAGES or not isinstance(key, str):
        raise ValueError(f"unknown storage {kind.text}, {key}")
    return Stored(STORAGES[kind.text], key, count)


def call(function: Name, arguments: tuple[Any, ...]) -> object:
    """The few calls that a pickle of tensors contains, carried out by hand."""
    match function.text:
        case "torch._utils _rebuild_tensor_v2":
            return view_of(*arguments[:4])
        case "collections OrderedDict":
            return {}
        case text if text.startswith("torch.jit._pickle build_"):  # typed lists
            return arguments[0]
    raise ValueError(f"refused to call {function.text}")


def view_of(stored: Any, offset: Any, shape: Any, strides: Any) -> View:
    numbers = all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
    if not isinstance(stored, Stored) or not numbers or len(shape) != len(strides):
        raise ValueError(f"impossible tensor {shape}, {strides} of {stored}")
    return View(stored, offset, tuple(shape), tuple(strides))
