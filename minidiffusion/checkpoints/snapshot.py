"""Snapshots of a run: folders that are whole or not there, and that know if a bit was changed.

A snapshot is written aside, synced to the disk, and appears by one rename; ``manifest.json``
holds the size and the SHA-256 of every file, and the SHA-256 of that list itself. So a crash at
any moment leaves the previous snapshot, and a damaged one is named instead of being loaded.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from minidiffusion.checkpoints.reader import parse_tensors, pieces, write_durably
from minidiffusion.files import is_endless, locked, read_bounded, sync_folder

FOLDER = re.compile(r"step_(\d{8,})(\.again)?")
SUFFIX = ".safetensors"
LARGEST_MANIFEST = 2**20


class Snapshot(NamedTuple):
    path: Path
    step: int
    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, object],
    keep: int = 2,
) -> Path:
    """Write ``folder/step_00001234``, then remove snapshots of earlier steps beyond ``keep``.

    ``tensors`` becomes one safetensors file a key, ``facts`` (whatever JSON can hold) facts.json.
    """
    if keep < 1 or step < 0:
        raise ValueError(f"{folder}: cannot keep {keep} snapshots of step {step}")
    strange = [name for name in tensors if not re.fullmatch(r"\w+", name)]
    if strange:
        raise ValueError(f"{folder}: {strange[0]!r} cannot be the name of a file")
    contents: dict[str, Iterable[bytes | memoryview]] = {
        "facts.json": [json.dumps(dict(facts), indent=1).encode()],
        **{name + SUFFIX: pieces(part, {}) for name, part in tensors.items()},
    }
    if not folder.is_dir():
        folder.mkdir(parents=True)
        sync_folder(folder.parent)
    # One writer at a time, so that every draft found here is of a writer that died.
    with locked(folder):
        settle(folder)
        draft = folder / f".tmp-{secrets.token_hex(4)}"
        try:
            write_folder(draft, step, contents)
            path = folder / f"step_{step:08d}"
            draft.rename(path.with_suffix(".again") if path.exists() else path)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        sync_folder(folder)
        settle(folder)
        prune(folder, step, keep)
    return path


def write_folder(
    draft: Path, step: int, contents: Mapping[str, Iterable[bytes | memoryview]]
) -> None:
    draft.mkdir()
    files = {name: write_durably(draft / name, parts) for name, parts in contents.items()}
    write_durably(draft / "manifest.json", [manifest(step, files)])
    sync_folder(draft)


def manifest(step: int, files: Mapping[str, tuple[str, int]]) -> bytes:
    listed = {name: {"sha256": files[name][0], "size": files[name][1]} for name in sorted(files)}
    content = {"step": step, "files": listed}
    digest = sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1).encode()


def settle(folder: Path) -> None:
    """Remove dead drafts, and let a step that was saved again take the place of the first one.

    A whole snapshot of the step is there at every moment: first both, then one, under either name.
    """
    for draft in folder.glob(".tmp-*/"):
        shutil.rmtree(draft)
    for _, again, path in listing(folder):
        if again:
            final = path.with_suffix("")
            if final.exists():
                discard(final)
            path.rename(final)
            sync_folder(folder)


def prune(folder: Path, step: int, keep: int) -> None:
    """Keep the newest up to ``step``; a later one is of another attempt: let it be, uncounted."""
    for _, _, path in [row for row in listing(folder) if row[0] <= step][keep:]:
        discard(path)


def discard(path: Path) -> None:
    """Remove a snapshot that is never seen half removed."""
    draft = path.with_name(f".tmp-{path.name}")
    path.rename(draft)
    shutil.rmtree(draft)


def listing(folder: Path) -> list[tuple[int, bool, Path]]:
    """Snapshots by their names, the newest first: (step, saved again, path)."""
    entries = folder.iterdir() if folder.is_dir() else ()
    found = [(FOLDER.fullmatch(path.name), path) for path in entries]
    rows = [(int(match[1]), match[2] is not None, path) for match, path in found if match]
    return sorted(rows, reverse=True)


def load(path: Path) -> Snapshot:
    """Read a snapshot; a ValueError names the file that is not as it was written.

    Each file is read once and its bytes are both hashed and parsed, all hashes before any tensor.
    """
    step, files = read_manifest(path)
    present = {entry.name for entry in path.iterdir()} - {"manifest.json"}
    for name in sorted(present ^ set(files)):
        wrong = "is missing" if name in files else "does not belong to this snapshot"
        raise ValueError(f"{path / name}: {wrong}")
    match = FOLDER.fullmatch(path.name)
    if match and int(match[1]) != step:
        raise ValueError(f"{path}: this is a snapshot of step {step} under another name")
    contents = {name: read_verified(path / name, *files[name]) for name in files}
    facts = json.loads(bytes(contents.pop("facts.json")))
    tensors = {
        name.removesuffix(SUFFIX): parse_tensors(data, path / name)
        for name, data in contents.items()
    }
    return Snapshot(path, step, facts, tensors)


def read_manifest(path: Path) -> tuple[int, dict[str, tuple[str, int]]]:
    """The step and the files of a snapshot, if the manifest is byte for byte what was written."""
    try:
        raw = read_bounded(path / "manifest.json", LARGEST_MANIFEST)
    except OSError as error:
        raise ValueError(f"{path / 'manifest.json'}: {error.strerror}") from error
    try:
        found = json.loads(raw)
        step = found["step"]
        files = {name: (row["sha256"], row["size"]) for name, row in found["files"].items()}
        whole = raw == manifest(step, files)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path / 'manifest.json'}: damaged: not what was written")
    return step, files


def read_verified(path: Path, digest: str, size: int) -> memoryview:
    if is_endless(path):
        raise ValueError(f"{path}: a device or a pipe, not a file")
    if path.exists() and path.stat().st_size != size:
        raise ValueError(f"{path}: damaged: {path.stat().st_size} bytes, {size} were written")
    try:
        with path.open("rb") as file:
            # A bytearray would be filled with zeros first, which takes longer than reading.
            data = np.empty(os.fstat(file.fileno()).st_size, np.uint8).data
            if file.readinto(data) != size or len(data) != size:
                raise ValueError(f"{path}: damaged: {len(data)} bytes, {size} were written")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if sha256(data).hexdigest() != digest:
        raise ValueError(f"{path}: damaged: the SHA-256 is not that of what was written")
    return data


def newest(folder: Path) -> tuple[Snapshot | None, list[str]]:
    """The newest whole snapshot of a folder, and a line on each newer one that is not."""
    complaints: list[str] = []
    for _, _, path in listing(folder):
        try:
            return load(path), complaints
        except (ValueError, OSError) as error:
            complaints.append(str(error))
    return None, complaints
