"""The IDX format of MNIST and its relatives: a magic number, the sizes, then plain bytes."""

import gzip
import lzma
import math
import struct
import zlib
from io import BufferedReader
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

UBYTE = 8
LARGEST = 2**30  # a damaged header must not ask for all of the memory


def read_idx(path: str | Path, dims: int) -> UInt8[Tensor, "n ..."]:
    """Read an array of bytes with ``dims`` axes; gzip and xz are recognised by content."""
    path = Path(path)
    try:
        with _opened(path) as file:
            zeros, dtype, axes = struct.unpack(">HBB", file.read(4))
            if zeros or dtype != UBYTE or axes != dims:
                raise ValueError(f"not an IDX file of unsigned bytes with {dims} axes")
            shape = struct.unpack(f">{axes}I", file.read(4 * axes))
            size = math.prod(shape)
            if not 0 < size <= LARGEST:
                raise ValueError(f"sizes {shape} are empty or above {LARGEST} bytes")
            data = file.read(size + 1)  # the one byte more shows what should not be there
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path}: {error}") from error
    except struct.error as error:
        raise ValueError(f"{path}: cut short in its header") from error
    if len(data) != size:
        found = "more" if len(data) > size else str(len(data))
        raise ValueError(f"{path}: sizes {shape} need {size} bytes, found {found}")
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy().reshape(shape))


def _opened(path: Path) -> gzip.GzipFile | lzma.LZMAFile | BufferedReader:
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(path)
    if magic.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMAFile(path)
    return path.open("rb")
