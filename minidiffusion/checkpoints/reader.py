"""Safetensors files: strictly checked before they are read, never half written.

A file is recognised by its content, never by its extension, and nothing in it is ever executed.
The header is checked here more strictly than the library does it, because two readers that
understand one file differently are how a bad file gets past a check.
"""

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minidiffusion.files import whole_file

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""In the library's order: files are laid out from the last row to the first, so all is aligned."""
LARGEST_HEADER = 100_000_000
HIGHEST_RANK = 8
FIELDS = {"dtype", "shape", "data_offsets"}
STRANGERS = [
    (b"<!doctype", "this is a web page, not a model"),
    (b"<html", "this is a web page, not a model"),
    (b"<?xml", "this is a web page, not a model"),
    (b"pk\x03\x04", "a PyTorch pickle/zip archive, not safetensors"),
    (b"\x80\x02", "a PyTorch pickle/zip archive, not safetensors"),
    (b"\x80\x03", "a PyTorch pickle/zip archive, not safetensors"),
    (b"\x80\x04", "a PyTorch pickle/zip archive, not safetensors"),
    (b"\x80\x05", "a PyTorch pickle/zip archive, not safetensors"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it points to"),
    (b"gguf", "a GGUF file, not safetensors"),
    (b"\x89png", "a picture, not a model"),
    (b"\xff\xd8\xff", "a picture, not a model"),
    (b"\x89hdf", "an HDF5 file, not safetensors"),
    (b"\x93numpy", "a NumPy array, not safetensors"),
    (b"\x1f\x8b", "a gzip archive, not safetensors: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive, not safetensors: unpack it first"),
    (b"rar!", "a RAR archive, not safetensors: unpack it first"),
]
"""What people save as a model by mistake, by its first letters in lower case."""
Bytes = bytes | memoryview | mmap.mmap


class Entry(NamedTuple):
    """One tensor of a file; its bytes are begin..end, counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    metadata: dict[str, str]
    entries: dict[str, Entry]


def read_safetensors(path: Path | str, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Every tensor of a file, mapped from the disk, not copied, where the device is the CPU."""
    entries = read_header(path).entries
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in entries}
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error


def read_metadata(path: Path | str) -> dict[str, str]:
    return read_header(path).metadata


def read_header(path: Path | str) -> Header:
    """The checked header of a file; a ValueError names the file and what is wrong with it."""
    with map_file(path) as data:
        return parse_header(data, path)


def map_file(path: Path | str) -> mmap.mmap:
    """A file's bytes, read as they are touched; what is written to them stays in memory."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder' if path.is_dir() else 'a device'}, not a file")
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError(f"{path}: the file is empty")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def parse_header(data: Bytes, where: Path | str) -> Header:
    """The header of a whole file that lies in memory; ``where`` names it in complaints."""
    try:
        found = json.loads(header_text(data), object_pairs_hook=without_duplicates)
        metadata = checked_metadata(found.pop("__metadata__", {}))
        start = 8 + int.from_bytes(data[:8], "little")
        entries = {name: checked_entry(name, value, start) for name, value in found.items()}
        check_layout(entries, start, len(data))
    except RecursionError:
        raise ValueError(f"{where}: the header is nested too deeply") from None
    except ValueError as error:  # of ours, of the JSON and of UTF-8
        raise ValueError(f"{where}: {error}") from error
    return Header(metadata, entries)


def header_text(data: Bytes) -> str:
    size = len(data)
    if size < 8:
        raise ValueError(f"{size} bytes are too few for a safetensors file")
    length = int.from_bytes(data[:8], "little")
    # A pickle may begin like a header's length, so the brace that must follow it decides first.
    if data[8:9] != b"{" or length > min(size - 8, LARGEST_HEADER):
        start = bytes(data[:512]).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        for letters, meaning in STRANGERS:
            if start.startswith(letters):
                raise ValueError(meaning)
        if length > LARGEST_HEADER:
            raise ValueError(f"not safetensors: a header of {length} bytes is beyond 100 MB")
        if length > size - 8:
            raise ValueError(f"cut short: a header of {length} bytes in a file of {size}")
        raise ValueError("not safetensors: the header does not start with '{'")
    try:
        return bytes(data[8 : 8 + length]).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the header is not UTF-8: {error.reason}") from error


def without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the header names {name!r} twice")
        found[name] = value
    return found


def checked_metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("the metadata must map text to text")
    for text in (*value, *value.values()):
        text.encode()  # half a letter, which JSON lets pass, cannot be shown or written
    return value


def checked_entry(name: str, value: object, start: int) -> Entry:
    """One row of the header; the library lets extra fields pass, and True for 1."""
    name.encode()
    if not isinstance(value, dict) or set(value) != FIELDS:
        fields = sorted(value) if isinstance(value, dict) else value
        raise ValueError(f"tensor {name!r}: expected dtype, shape, data_offsets, got {fields!r}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r}: unknown dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    if not is_whole_numbers(shape) or len(shape) > HIGHEST_RANK:
        raise ValueError(f"tensor {name!r}: impossible shape {shape!r}")
    # An axis of length 0 must not hide another one that overflows a stride.
    if math.prod(max(axis, 1) for axis in shape) >= 2**60:
        raise ValueError(f"tensor {name!r}: impossible shape {shape!r}")
    if not is_whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name!r}: impossible data_offsets {offsets!r}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise ValueError(f"tensor {name!r}: {dtype} {shape} takes {size} bytes, not {offsets!r}")
    return Entry(DTYPES[dtype], tuple(shape), start + offsets[0], start + offsets[1])


def is_whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def check_layout(entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != end:
            wrong = "overlaps another" if entry.begin < end else "leaves a hole before it"
            raise ValueError(f"tensor {name!r} {wrong} (at byte {entry.begin}, expected {end})")
        end = entry.end
    if end != size:
        wrong = "cut short" if end > size else "bytes after the last tensor"
        raise ValueError(f"{wrong}: the tensors end at byte {end}, the file at {size}")


def parse_tensors(data: memoryview, where: Path | str) -> dict[str, Tensor]:
    """The tensors of a whole file that lies in memory; they live in those bytes."""
    return {
        name: torch.empty(entry.shape, dtype=entry.dtype)
        if entry.begin == entry.end  # frombuffer refuses to read nothing
        else torch.frombuffer(
            data, dtype=entry.dtype, count=math.prod(entry.shape), offset=entry.begin
        ).reshape(entry.shape)
        for name, entry in parse_header(data, where).entries.items()
    }


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path | str, metadata: Mapping[str, str] | None = None,
    *, fresh: bool = False,
) -> None:  # fmt: skip
    """Write a file as a whole or not at all: what was there stays until the new one is safe.

    fresh: FileExistsError where a file is there.
    """
    write_whole(Path(path), pieces(tensors, metadata or {}), fresh=fresh)


def pieces(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """A file's bytes, tensor by tensor: a large state is never in memory a second time.

    Tensors that share memory are written one by one, in full.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    rank = list(names).index
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, tensor in tensors.items():
        if tensor.dtype not in names or name == "__metadata__":
            raise ValueError(f"tensor {name!r} of {tensor.dtype} cannot be stored as safetensors")
    order = sorted(tensors, key=lambda name: (-rank(tensors[name].dtype), name))
    end = 0
    for name in order:
        dtype, shape = names[tensors[name].dtype], list(tensors[name].shape)
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def write_whole(path: Path, parts: Iterable[bytes | memoryview], *, fresh: bool = False) -> None:
    """The same of any bytes. Raises OSError with the file's name."""
    with whole_file(path, fresh=fresh) as file:
        file.writelines(parts)


def write_durably(path: Path, parts: Iterable[bytes | memoryview]) -> tuple[str, int]:
    """Write a new file down to the disk; its SHA-256 and its size, as they were sent."""
    digest, size = sha256(), 0
    try:
        with path.open("xb") as file:
            for part in parts:
                digest.update(part)
                size += file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk does not say which file it was
        raise OSError(error.errno, error.strerror, str(path)) from error
    return digest.hexdigest(), size
