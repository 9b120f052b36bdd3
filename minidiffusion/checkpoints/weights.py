"""One door for every file of weights: named tensors, whatever the container, mapped from the disk.

What a file is, its first bytes say, never its name: safetensors, or torch.save's zip and stream.
Names count only where there is a choice, in a folder of several files. Nothing is executed.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from minidiffusion.checkpoints.archives import ZIP, Lazy, mapped, open_archive
from minidiffusion.checkpoints.reader import (
    LARGEST_HEADER,
    Entry,
    checked_metadata,
    map_file,
    parse_header,
    without_duplicates,
)

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
LARGEST_INDEX = 2**26
SHARD = re.compile(r"(.*)-\d{5}(-of-\d{5}\.\w+)")
"""What the shards of one set have in common are the two groups."""
MOST_FILES = 1000


@dataclass(frozen=True, eq=False)
class Weights(Mapping[str, Tensor]):
    """Tensors by name, read-only; a tensor is read, or mapped, when it is asked for.

    files: where they lie, the shards of a set in the order of their names. metadata: of
    safetensors its own, of torch.save the texts and numbers beside the tensors, as text.
    What is written into a tensor reaches no file. A file that is overwritten in place or cut
    while it is used ends the process (SIGBUS), as with every mapped file; renaming is safe.
    """

    files: tuple[Path, ...]
    metadata: dict[str, str]
    tensors: Mapping[str, Lazy]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    def hash(self) -> str:
        """The short model hash: the first 10 hexadecimal digits of the SHA-256 of the whole file,
        as AUTOMATIC1111's page shows it; of a set, of its shards one after the other.

        Reads every byte: 2 to 10 s for 4 GB that the memory holds, else at the disk's rate. It is
        remembered while the process lives and the file's size and time stay as they are.
        """
        stats = [(str(file), file.stat()) for file in self.files]
        return digest(tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))[:10]


@lru_cache(maxsize=64)
def digest(stamps: tuple[tuple[str, int, int], ...]) -> str:
    total, buffer = sha256(), memoryview(bytearray(2**20))
    for name, _, _ in stamps:
        with Path(name).open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                total.update(buffer[:size])
    return total.hexdigest()


def open_weights(path: Path | str, variant: str | None = None) -> Weights:
    """The tensors of a file of weights, of a sharded set by its index, or of a folder with either.

    A folder gives its plain safetensors, else its variant "fp16", else its `.bin`; with `variant`
    that one or nothing. Where the names are others, it must hold exactly one file of weights.
    A tensor is checked to lie in its file before any is read. Raises ValueError with one line
    (path, what is wrong), OSError where the system refuses.
    """
    path = Path(path)
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r}: no such file: the name holds a NUL")
    file = chosen(path, variant) if path.is_dir() else path
    weights = open_index(file) if begins_like_json(file) else open_file(file)
    if not weights.tensors:
        raise ValueError(f"{file}: holds no tensors")
    return weights


def begins_like_json(path: Path) -> bool:
    with map_file(path) as data:
        return data[8:9] != b"{" and data[:64].lstrip()[:1] == b"{"


def open_file(path: Path) -> Weights:
    """One file, by its content."""
    data = map_file(path)
    if data[:4] == ZIP or is_pickle(data[:9]):
        try:
            rows, facts = open_archive(path, data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return Weights((path,), facts, rows)
    header = parse_header(data, path)
    rows = {
        name: Lazy(entry.dtype, entry.shape, partial(mapped, data, *contiguous(entry)))
        for name, entry in header.entries.items()
    }
    return Weights((path,), header.metadata, rows)


def is_pickle(start: bytes) -> bool:
    """A header of safetensors may have the length that a pickle begins with; its brace decides."""
    return start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5" and start[8:9] != b"{"


def contiguous(entry: Entry) -> tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]:
    strides = [1]
    for axis in entry.shape[:0:-1]:
        strides.insert(0, strides[0] * axis)
    return entry.begin, entry.dtype, entry.shape, tuple(strides[: len(entry.shape)])


def open_index(path: Path) -> Weights:
    """A sharded set: the index and the shards beside it must name the same tensors."""
    metadata, table = read_index(path)
    sets = {found.groups() for name in table.values() if (found := SHARD.fullmatch(name))}
    for other in path.parent.iterdir():
        found = SHARD.fullmatch(other.name)
        if found and found.groups() in sets and other.name not in table.values():
            raise ValueError(f"{path}: does not list the shard {other.name} beside it")
    shards = {}
    for name in sorted(set(table.values())):
        if not (path.parent / name).exists():
            raise ValueError(f"{path}: the shard {name} is missing")
        shards[name] = open_file(path.parent / name)
    tensors: dict[str, Lazy] = {}
    for shard, weights in shards.items():
        for name, tensor in weights.tensors.items():
            if name in tensors:
                raise ValueError(f"{path}: tensor {name!r} is in {shard} and another shard")
            if name not in table:
                raise ValueError(f"{path}: does not list the tensor {name!r} of {shard}")
            tensors[name] = tensor
    for name, shard in table.items():
        if name not in shards[shard]:
            raise ValueError(f"{path}: tensor {name!r} is not in {shard}")
    return Weights(tuple(path.parent / shard for shard in shards), metadata, tensors)


def read_index(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The metadata of an index as text, and each tensor's shard, a file right beside it."""
    try:
        if path.stat().st_size > LARGEST_INDEX:
            raise ValueError("larger than 64 MB")
        content = json.loads(path.read_bytes(), object_pairs_hook=without_duplicates)
    except RecursionError:
        raise ValueError(f"{path}: a JSON file that is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: an index of shards that is damaged: {error}") from None
    if not isinstance(content, dict) or "weight_map" not in content:
        raise ValueError(f"{path}: a JSON file, but no index of shards: it has no weight_map")
    try:
        table = checked_metadata(content["weight_map"])
    except ValueError:
        raise ValueError(f"{path}: weight_map must map names of tensors to files") from None
    for name in table.values():
        if name != Path(name).name or "\\" in name or "\0" in name:
            raise ValueError(f"{path}: the shard {name[:200]!r} is not a file beside the index")
    facts = content.get("metadata")
    facts = facts if isinstance(facts, dict) else {}
    return {k: str(v) for k, v in facts.items() if isinstance(v, str | int | float)}, table


def chosen(folder: Path, variant: str | None) -> Path:
    """The file, or the index, that stands for a folder."""
    files = {file.name: file for file in folder.iterdir() if file.is_file()}
    kinds = ("safetensors", "bin")
    for kind, word in [(k, w) for k in kinds for w in ([variant] if variant else ["", "fp16"])]:
        dot = f".{word}" if word else ""
        for stem in STEMS:
            for name in (f"{stem}{dot}.{kind}", f"{stem}.{kind}.index{dot}.json"):
                if name in files:
                    return files[name]
    if len(files) > MOST_FILES:
        raise ValueError(f"{folder}: {len(files)} files, none with a name that weights have")
    visible = [file for name, file in sorted(files.items()) if not name.startswith(".")]
    found = [file for file in visible if file.name.endswith(".index.json") or is_weights(file)]
    if variant:
        found = [file for file in found if f".{variant}." in file.name]
    indexed = [file for file in found if file.name.endswith(".index.json")]
    found = indexed or found
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found[:5])
        raise ValueError(f"{folder}: {len(found)} files of weights ({names}): name one of them")
    parts = [part.name for part in islice(folder.glob("*/"), MOST_FILES) if holds(part)]
    hint = f"; its folders {', '.join(sorted(parts))} do: name one of them" if parts else ""
    raise ValueError(f"{folder}: holds no weights{f' {variant!r}' if variant else ''}{hint}")


def holds(folder: Path) -> bool:
    names = {f"{stem}{end}" for stem in STEMS for end in (".safetensors", ".bin")}
    return any((folder / name).is_file() for name in names)


def is_weights(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    header = int.from_bytes(start[:8], "little") <= LARGEST_HEADER and start[8:] == b"{"
    return start[:4] == ZIP or is_pickle(start) or header
