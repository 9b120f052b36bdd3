"""What a data set is: it has a length, a fingerprint, and gives batches by index."""

import hashlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from minidiffusion.data.order import order_of
from minidiffusion.shapes import Labels, Latent


class Batch(NamedTuple):
    """Samples in [-1, 1]; labels are zeros, and captions empty, where the set has none."""

    x: Latent
    labels: Labels
    captions: tuple[str, ...] = ()


@runtime_checkable
class Dataset(Protocol):
    """What the loader and the trainer ask of data; any object with these five will do.

    One that is read in another order than any has order(seed, start, count) as well, see order.py.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...  # of one sample

    @property
    def classes(self) -> tuple[str, ...]: ...  # names; empty = unlabelled

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Batch: ...

    def fingerprint(self) -> str: ...


def as_floats(pixels: UInt8[Tensor, "*d"]) -> Float[Tensor, "*d"]:
    """0..255 becomes [-1, 1]; rounding (x + 1) * 127.5 gives every byte back."""
    return pixels.float() / 127.5 - 1


@dataclass(frozen=True, eq=False)
class Tensors:
    """A data set in memory; bytes become floats only for the rows that are asked for.

    captions: of every sample one, or several: then the set goes through the samples once with
    everyone's first caption, once with everyone's second, and so on.
    """

    x: UInt8[Tensor, "n ..."] | Float[Tensor, "n ..."]
    labels: Labels | None = None
    classes: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.x):
            raise ValueError(f"{len(self.x)} samples need as many labels, not {len(self.labels)}")
        if self.captions and len(self.captions) % max(1, len(self.x)):
            raise ValueError(
                f"{len(self.x)} samples need as many captions each, not {len(self.captions)}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    def __len__(self) -> int:
        return len(self.captions) or len(self.x)

    def batch(self, indices: Sequence[int]) -> Batch:
        rows = torch.tensor(indices, dtype=torch.int64) % len(self.x)
        x = self.x[rows]
        return Batch(
            as_floats(x) if x.dtype == torch.uint8 else x.float(),
            torch.zeros(len(rows), dtype=torch.int64) if self.labels is None else self.labels[rows],
            tuple(self.captions[i] for i in indices) if self.captions else (),
        )

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.x.dtype, self.x.shape, self.classes)).encode())
        for column in (self.x, self.labels):
            if column is not None:
                digest.update(column.contiguous().numpy().data)
        digest.update(repr(self.captions).encode())
        return digest.hexdigest()


Mapping = Callable[[Batch], Batch]


@dataclass(frozen=True, eq=False)
class Mapped:
    """A data set seen through a function. A run resumes exactly if the function is pure."""

    dataset: Dataset
    function: Mapping

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.batch([0]).x.shape[1:])

    @property
    def classes(self) -> tuple[str, ...]:
        return self.dataset.classes

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int]) -> Batch:
        batch = self.function(self.dataset.batch(indices))
        if not isinstance(batch, Batch) or len(batch.x) != len(indices):
            name = getattr(self.function, "__name__", "function")
            raise ValueError(f"{name}: must return a Batch of as many samples as it was given")
        return batch

    def order(self, seed: int, start: int, count: int) -> list[int]:
        return order_of(self.dataset, seed, start, count)

    def fingerprint(self) -> str:
        """Editing the function changes it."""
        try:
            source = inspect.getsource(self.function)
        except (OSError, TypeError):
            source = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        return hashlib.sha256((self.dataset.fingerprint() + source).encode()).hexdigest()


def mapped(dataset: Dataset, function: Mapping) -> Mapped:
    """The data set with ``function`` applied to every batch: your own preprocessing."""
    return Mapped(dataset, function)


def load_function(address: str) -> Mapping:
    """Import a function of your own from a file: ``"my_file.py:my_function"``."""
    place, colon, name = address.rpartition(":")
    if not colon:
        raise ValueError(f"{address!r}: write it as my_file.py:my_function")
    path = Path(place)
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"{place}: no such Python file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{place}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{place}: does not import: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        has = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"{place}: no function {name!r}; it has {', '.join(has) or 'none'}")
    return function
