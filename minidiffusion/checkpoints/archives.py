"""The two containers that torch.save has written: a zip of members, and before 2020 one stream.

Both hold a pickle that says which tensors there are (`pickles`), and the numbers of their
storages as plain bytes. Those stay in the file, which is mapped, until a tensor is asked for.
"""

import io
import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiffusion.checkpoints.pickles import Thing, View, interpret, named_views, one_line

ZIP = b"PK\x03\x04"
MAGIC = 0x1950A86A20F9469CFC6C
"""The number that a stream of torch.save begins with, itself a pickle."""
DAMAGED_ZIP = (
    zipfile.BadZipFile,
    NotImplementedError,
    struct.error,
    OverflowError,
    UnicodeDecodeError,
)
LARGEST_PICKLE = 2**25
LARGEST_LISTING = 2**23
LARGEST_EXPANSION = 2**20
SPARE = 2**26
Bytes = mmap.mmap | bytearray


class Lazy(NamedTuple):
    """A tensor that is read when it is asked for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class Piece(NamedTuple):
    """The bytes of a storage in the file: begin..end, and how many they are once inflated."""

    begin: int
    end: int
    size: int
    packed: bool = False


class Archive(NamedTuple):
    root: Any
    pieces: dict[str, Piece]
    swapped: bool = False


class Careful(io.FileIO):
    """A file that gives no more at once than a list of members may take."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LARGEST_LISTING:
            raise ValueError("its list of members is larger than 8 MB")
        return super().read(-1 if size is None else size)


def open_archive(path: Path, data: mmap.mmap) -> tuple[dict[str, Lazy], dict[str, str]]:
    """The tensors of a file of torch.save (`data` is its map), and the numbers and texts beside.

    The dict under "state_dict", where there is one, is taken for the whole: that is how
    PyTorch Lightning nests it. A tensor is a view of the mapped file; one that is compressed,
    big-endian or not aligned to its numbers is copied at each access. Sums of members are not
    checked. Raises ValueError, in one line, for whatever is damaged, foreign or impossible.
    """
    archive = from_zip(path, data) if data[:4] == ZIP else from_stream(data)
    root = archive.root
    if not isinstance(root, dict | Thing):
        what = "tensor" if isinstance(root, View) else type(root).__name__
        raise ValueError(f"holds a single {what}, not tensors by name")
    inner = root.get("state_dict") if isinstance(root, dict) else None
    views = named_views(inner if isinstance(inner, dict | Thing) else root)
    if not views:
        refused = f" (refused to call {root.name})" if isinstance(root, Thing) else ""
        raise ValueError(f"holds no tensors by name{refused}")
    # Many names for the same numbers, or zeros that were compressed, are few bytes in the file.
    claimed = sum(math.prod(view.shape) * view.dtype.itemsize for view in views.values())
    if claimed > 4 * len(data) + SPARE:
        raise ValueError(f"its tensors claim {claimed} bytes in a file of {len(data)}")
    rows = {name: lazy(path, data, archive, view, name) for name, view in views.items()}
    return rows, facts_of(root) if isinstance(root, dict) else {}


def facts_of(root: dict[Any, Any]) -> dict[str, str]:
    """The texts and numbers of a dict, as text that can be shown."""

    def shown(value: object) -> str:
        return str(value)[:1000].encode(errors="replace").decode()

    return {
        shown(key): shown(value)
        for key, value in root.items()
        if type(value) in (str, bool, float) or (type(value) is int and abs(value) < 2**63)
    }


def lazy(path: Path, data: mmap.mmap, archive: Archive, view: View, name: str) -> Lazy:
    """Check that a view lies within its storage, and say how to read it."""
    stored, wide = view.stored, view.dtype.itemsize
    piece = archive.pieces.get(stored.key)
    if piece is None:
        raise ValueError(f"the archive is incomplete: no data/{stored.key}")
    if piece.size != stored.total * stored.dtype.itemsize:
        expected = stored.total * stored.dtype.itemsize
        raise ValueError(f"data/{stored.key}: {piece.size} bytes, expected {expected}")
    numbers = stored.length * stored.dtype.itemsize // wide
    # With a stride of 0 a few bytes could claim to be any number of values.
    if math.prod(view.shape) > max(numbers, LARGEST_EXPANSION) or reach(view) > numbers:
        raise ValueError(f"tensor {name!r}: reaches beyond its {numbers} stored numbers")
    begin = stored.first * stored.dtype.itemsize + view.offset * wide
    layout = (view.dtype, view.shape, view.strides, archive.swapped)
    if piece.packed:
        where = f"{path}: data/{stored.key}"
        return Lazy(view.dtype, view.shape, partial(inflated, where, data, piece, begin, *layout))
    return Lazy(view.dtype, view.shape, partial(mapped, data, piece.begin + begin, *layout))


def reach(view: View) -> int:
    """One beyond the last number of its storage that a view touches."""
    steps = zip(view.shape, view.strides, strict=True)
    return 0 if 0 in view.shape else view.offset + 1 + sum((n - 1) * step for n, step in steps)


def mapped(
    data: Bytes,
    begin: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    swapped: bool = False,
) -> Tensor:
    """The tensor whose first number is at byte ``begin``; it lives in those bytes if it can."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    length = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if begin % dtype.itemsize or swapped:
        with memoryview(data) as whole:
            data, begin = bytearray(whole[begin : begin + length * dtype.itemsize]), 0
    if swapped and dtype.itemsize > 1:  # a complex number is two, each with its bytes reversed
        wide = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
        turned = torch.frombuffer(data, dtype=torch.uint8).reshape(-1, wide).flip(1)
        flat = turned.reshape(-1).view(dtype)
    else:
        flat = torch.frombuffer(data, dtype=dtype, count=length, offset=begin)
    return flat.as_strided(shape, strides)


def inflated(where: str, data: mmap.mmap, piece: Piece, begin: int, *layout: Any) -> Tensor:
    return mapped(bytearray(inflate(data, piece, where)), begin, *layout)


def inflate(data: mmap.mmap, piece: Piece, where: str) -> bytes:
    """A member's bytes, as many as the archive says."""
    with memoryview(data) as whole, whole[piece.begin : piece.end] as packed:
        if not piece.packed:
            return bytes(packed)
        machine = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = machine.decompress(packed, piece.size + 1)
        except zlib.error as error:
            raise ValueError(f"{where} is damaged: {error}") from error
    if len(content) != piece.size:
        raise ValueError(f"{where} is not of the {piece.size} bytes that it claims")
    return content


def from_zip(path: Path, data: mmap.mmap) -> Archive:
    """The member data.pkl of the one folder in the zip, and where its data/0, data/1, ... lie."""
    infos = members(path)
    folders = [name[:-9] for name in infos if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(folders) != 1:
        problem = "several" if folders else "no data.pkl in a"
        raise ValueError(f"a zip archive, but not one of torch.save: {problem} folder")
    prefix = f"{folders[0]}/"
    pieces = {
        name.removeprefix(prefix): piece_of(data, info)
        for name, info in infos.items()
        if name.startswith((f"{prefix}data/", f"{prefix}data.pkl", f"{prefix}byteorder"))
    }
    if pieces["data.pkl"].size > LARGEST_PICKLE:
        raise ValueError("data.pkl is larger than 32 MB")
    order = pieces.get("byteorder")
    word = inflate(data, order, "byteorder") if order and order.size <= 6 else b"little"
    if word not in (b"little", b"big"):
        raise ValueError(f"unknown byte order {word!r}")
    root = interpret(io.BytesIO(inflate(data, pieces["data.pkl"], "data.pkl")))
    storages = {k.removeprefix("data/"): p for k, p in pieces.items() if k.startswith("data/")}
    return Archive(root, storages, word == b"big")


def members(path: Path) -> dict[str, zipfile.ZipInfo]:
    try:
        with Careful(path) as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except DAMAGED_ZIP as error:
        raise ValueError(f"a zip archive cut short or damaged: {one_line(error)}") from error
    found: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        if info.filename in found:
            raise ValueError(f"the zip archive has two members named {info.filename!r}")
        found[info.filename] = info
    return found


def piece_of(data: mmap.mmap, info: zipfile.ZipInfo) -> Piece:
    """Where a member's bytes begin: behind its own header, which must agree with the list."""
    at = info.header_offset
    head = data[at : at + 30] if 0 <= at < len(data) else b""
    if len(head) < 30 or head[:4] != ZIP:
        raise ValueError(f"member {info.filename!r}: not where the list of members says")
    flags, letters, extra = *struct.unpack("<6xH", head[:8]), *struct.unpack("<HH", head[26:])
    coding = "utf-8" if flags & 0x800 else "cp437"
    name = data[at + 30 : at + 30 + letters].decode(coding, "replace")
    if name != info.orig_filename or (flags | info.flag_bits) & 1:
        raise ValueError(f"member {info.filename!r}: encrypted, or of two names")
    begin = at + 30 + letters + extra
    end = begin + info.compress_size
    packed = info.compress_type == zipfile.ZIP_DEFLATED
    if end > len(data) or not (packed or info.compress_type == zipfile.ZIP_STORED):
        raise ValueError(f"member {info.filename!r}: reaches beyond the file, or oddly compressed")
    if not packed and info.compress_size != info.file_size:
        raise ValueError(f"member {info.filename!r}: {info.file_size} bytes in {end - begin}")
    return Piece(begin, end, info.file_size, packed)


def from_stream(data: mmap.mmap) -> Archive:
    """Five pickles (magic, protocol, system, content, keys), then each storage: count, numbers."""
    stream = io.BytesIO(data[:LARGEST_PICKLE])
    if interpret(stream) != MAGIC:
        raise ValueError("a pickle, but not one of torch.save")
    kinds: dict[str, torch.dtype] = {}
    _, _, root, keys = (interpret(stream, kinds) for _ in range(4))
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("the keys of the storages are no list of texts")
    at, pieces = stream.tell(), dict[str, Piece]()
    for key in keys:
        if key in pieces:
            raise ValueError(f"two storages have the key {key!r}")
        begin = at + 8
        if key not in kinds:
            raise ValueError(f"storage {key!r} is of no known dtype")
        at = begin + int.from_bytes(data[at:begin], "little") * kinds[key].itemsize
        if max(begin, at) > len(data):
            raise ValueError(f"cut short: storage {key!r} ends beyond the file")
        pieces[key] = Piece(begin, at, at - begin)
    return Archive(root, pieces)
