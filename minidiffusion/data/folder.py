"""A folder of your own pictures: sub-folders are classes, and captions lie beside the pictures.

Every picture is decoded once when the folder is opened. What is bad is put into quarantine, a list
of (file, reason), and the rest is a data set; with ``strict`` one bad picture refuses the folder.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from minidiffusion.data.dataset import Batch, as_floats
from minidiffusion.data.pictures import LARGEST_SIDE, BadPicture, Fit, load_pixels, open_plain
from minidiffusion.files import read_bounded
from minidiffusion.shapes import Labels
from minidiffusion.typed import FILLED

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
LISTING = "metadata.jsonl"
PICTURE_MOST = 2**28  # bytes of a picture's file
IN_MEMORY = 2**30  # bytes of pixels; a larger folder is decoded batch by batch
CAPTION_MOST = 2**16
"""Bytes of a caption: the longest that encoders read are of a few thousand."""
LISTING_MOST, BAD_MOST = 2**30, 100_000
"""Bytes of a listing, and lines of it that may be bad."""
LABEL_MOST = 255
"""Bytes of a label, which may be the name of a folder."""
Quarantine = list[tuple[str, str]]


class Entry(NamedTuple):
    """One picture before it is looked at; ``label`` is the name of its class or empty."""

    name: str
    label: str = ""
    caption: str | None = None


@dataclass(frozen=True)
class Folder:
    """``captions``: NAME.txt beside NAME.png; or metadata.jsonl, a line {"file_name", "text"} and
    perhaps "label" a picture; auto takes the listing, else the texts, else none."""

    name: ClassVar[str] = "folder"
    path: str = field(metadata=FILLED)
    size: int = field(default=64, metadata={"min": 1, "max": LARGEST_SIDE})
    channels: Literal[1, 3] = 3
    fit: Fit = "crop"
    captions: Literal["auto", "none", "txt", "jsonl"] = "auto"
    strict: bool = False

    def open(self) -> "Pictures":
        return _verified(self, *self.listed())

    def listed(self) -> tuple[list[Entry], Quarantine]:
        """What lies there, sorted by name, before a picture is looked at; what is bad already."""
        root = Path(self.path)
        if not root.is_dir():
            raise ValueError(f"{self.path}: no such folder")
        quarantined: Quarantine = []
        names = _names(root)
        kind = self.captions if self.captions != "auto" else _kind(root, names)
        if kind not in CAPTIONS:
            raise ValueError(f"captions {kind!r}: choose auto, {', '.join(CAPTIONS)}")
        entries = CAPTIONS[kind](root, names, quarantined)
        if not entries and not quarantined:
            raise ValueError(f"{self.path}: no pictures here ({', '.join(sorted(SUFFIXES))})")
        return entries, quarantined


@dataclass(frozen=True, eq=False)
class Pictures:
    """The good pictures of a folder. ``digests`` are of the files' bytes, when they were opened."""

    folder: Folder
    names: tuple[str, ...]
    labels: Labels
    classes: tuple[str, ...]
    captions: tuple[str, ...]
    digests: tuple[str, ...]
    quarantined: Quarantine
    pixels: UInt8[Tensor, "n c h w"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.folder.channels, self.folder.size, self.folder.size)

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, indices: Sequence[int]) -> Batch:
        rows = torch.tensor(indices, dtype=torch.int64)
        if self.pixels is not None:
            pixels = self.pixels[rows]
        else:
            pixels = torch.stack([_decoded(self.folder, self.file(i)) for i in indices])
        captions = tuple(self.captions[i] for i in indices) if self.captions else ()
        return Batch(as_floats(pixels), self.labels[rows], captions)

    def file(self, index: int) -> bytes:
        """The file of a picture. Raises ValueError where it is not what it was when opened."""
        path = Path(self.folder.path) / self.names[index]
        data = _read(path)
        if hashlib.sha256(data).hexdigest() != self.digests[index]:
            raise ValueError(f"{path}: has changed since it was opened")
        return data

    def fingerprint(self) -> str:
        how = (self.folder.size, self.folder.channels, self.folder.fit)
        what = (self.names, self.labels.tolist(), self.classes, self.captions, self.digests)
        return hashlib.sha256(repr((how, what)).encode()).hexdigest()


def _names(root: Path) -> list[str]:
    """The pictures' paths below the folder, sorted; hidden files and folders are left alone."""
    found = []
    for place, folders, files in os.walk(root):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        found += [
            (Path(place) / file).relative_to(root).as_posix()
            for file in files
            if not file.startswith(".") and Path(file).suffix.lower() in SUFFIXES
        ]
    return sorted(found)


def _kind(root: Path, names: list[str]) -> str:
    if (root / LISTING).is_file():
        return "jsonl"
    return "txt" if any((root / name).with_suffix(".txt").is_file() for name in names) else "none"


def _bare(root: Path, names: list[str], quarantined: Quarantine) -> list[Entry]:
    """Sub-folders are classes if every picture lies in one."""
    labelled = all("/" in name for name in names)
    return [Entry(name, name.split("/")[0] if labelled else "") for name in names]


def _beside(root: Path, names: list[str], quarantined: Quarantine) -> list[Entry]:
    entries = []
    for entry in _bare(root, names, quarantined):
        text = (root / entry.name).with_suffix(".txt")
        try:
            with open_plain(text) as file:  # a pipe waits for ever, a device never ends
                caption = file.read(CAPTION_MOST + 1).decode("utf-8-sig").strip()
            entries.append(entry._replace(caption=checked(caption)))
        except BadPicture as error:
            quarantined.append((entry.name, f"its caption {text.name} is {error.reason}"))
        except UnicodeDecodeError:
            quarantined.append((entry.name, f"its caption {text.name} is not UTF-8"))
        except ValueError as error:
            quarantined.append((entry.name, str(error)))
        except OSError:
            quarantined.append((entry.name, f"has no caption {text.name}"))
    return entries


def _listed(root: Path, names: list[str], quarantined: Quarantine) -> list[Entry]:
    if not (root / LISTING).is_file():
        raise ValueError(f"{root}: captions jsonl need a file {LISTING}")
    entries = []
    lines = read_bounded(root / LISTING, LISTING_MOST).splitlines()
    for number, line in enumerate(lines, start=1):
        if len(quarantined) > BAD_MOST:
            raise ValueError(f"{root / LISTING}: more than {BAD_MOST:,} lines are bad")
        if line.strip():
            try:
                entries.append(_row(root, line))
            except (ValueError, RecursionError) as error:
                quarantined.append((f"{LISTING} line {number}", str(error)))
            except OSError as error:  # a name that no file can have
                quarantined.append((f"{LISTING} line {number}", error.strerror or "no such file"))
    if any(entry.label for entry in entries):
        quarantined += [(entry.name, "has no label") for entry in entries if not entry.label]
        entries = [entry for entry in entries if entry.label]
    known = {entry.name for entry in entries} | {name for name, _ in quarantined}
    quarantined += [(name, f"no good line in {LISTING}") for name in names if name not in known]
    return entries


CAPTIONS = {"none": _bare, "txt": _beside, "jsonl": _listed}


def _row(root: Path, line: bytes) -> Entry:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from error
    if not isinstance(row, dict):
        raise ValueError('not an object {"file_name": ..., "text": ...}')
    name, text, label = row.get("file_name"), row.get("text"), row.get("label", "")
    if not (isinstance(name, str) and isinstance(text, str) and isinstance(label, str)):
        raise ValueError("file_name, text or label is missing or no string")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{path}: outside the folder")
    if not (root / path).is_file():
        raise ValueError(f"{path}: no such file")
    return Entry(path.as_posix(), checked(label, "label", LABEL_MOST), checked(text))


def checked(text: str, what: str = "caption", most: int = CAPTION_MOST) -> str:
    """The text, of so many bytes at most. Raises ValueError: what no encoder could read.

    Half of a surrogate pair comes from a JSON escape, and is in no UTF-8.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"its {what} holds half of a character, which is no text") from None
    if size > most:
        raise ValueError(f"a {what} of more than {most:,} bytes")
    return text


def _decoded(folder: Folder, data: bytes) -> UInt8[Tensor, "c h w"]:
    return load_pixels(BytesIO(data), channels=folder.channels, size=folder.size, fit=folder.fit)


def _read(path: Path) -> bytes:
    """A picture's file, once: what is decoded is what its digest is of."""
    with open_plain(path) as file:
        data = file.read(PICTURE_MOST + 1)
    if not data or len(data) > PICTURE_MOST:
        raise BadPicture(path, "a file of more than 256 MB" if data else "empty file")
    return data


def _verified(folder: Folder, entries: list[Entry], quarantined: Quarantine) -> Pictures:
    """Decode everything once, in threads: PIL releases Python's lock while it decodes."""
    total = len(entries) * folder.channels * folder.size**2
    pixels = None
    if total <= IN_MEMORY:
        shape = (len(entries), folder.channels, folder.size, folder.size)
        pixels = torch.empty(shape, dtype=torch.uint8)

    def verify(row: int) -> tuple[str, str]:
        try:
            data = _read(Path(folder.path) / entries[row].name)
            decoded, digest = _decoded(folder, data), hashlib.sha256(data).hexdigest()
        except BadPicture as error:
            return "", error.reason
        except OSError as error:
            return "", error.strerror or "cannot be opened"
        if pixels is not None:
            pixels[row] = decoded
        return digest, ""

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(verify, range(len(entries))))
    good = [row for row, (digest, _) in enumerate(results) if digest]
    quarantined += [(entries[i].name, why) for i, (_, why) in enumerate(results) if why]
    judge(folder.path, len(good), quarantined, strict=folder.strict)
    # of the bad ones too: that a class has lost its pictures must not renumber the others
    classes = sorted({entry.label for entry in entries} - {""})
    numbers = {"": 0} | {name: number for number, name in enumerate(classes)}
    captions = [entries[row].caption for row in good]
    return Pictures(
        folder,
        tuple(entries[row].name for row in good),
        torch.tensor([numbers[entries[row].label] for row in good]),
        tuple(classes),
        tuple(caption for caption in captions if caption is not None),
        tuple(results[row][0] for row in good),
        quarantined,
        pixels if pixels is None or len(good) == len(entries) else pixels[good],
    )


def judge(path: str, good: int, quarantined: Quarantine, *, strict: bool) -> None:
    """Raises ValueError where nothing good is left, and with ``strict`` for anything bad."""
    if quarantined and (strict or not good):
        name, reason = quarantined[0]
        which = f"{len(quarantined)} bad, {good} good; the first: {name}: {reason}"
        advice = "; without strict they are left out" if good else ""
        raise ValueError(f"{path}: {which}{advice}")
