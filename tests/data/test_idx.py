"""The IDX reader takes whole files and names broken ones."""

import gzip
import lzma
import struct
from pathlib import Path

import pytest
import torch

from minidiffusion.data.idx import read_idx

BODY = bytes(range(24))
GOOD = struct.pack(">HBB3I", 0, 8, 3, 2, 3, 4) + BODY


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("packed", [bytes, gzip.compress, lzma.compress])
def test_packing_is_recognised_by_content(tmp_path: Path, packed) -> None:
    path = written(tmp_path / "no-suffix", packed(GOOD))
    expected = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
    assert read_idx(path, 3).equal(expected)


BROKEN = {
    "empty": (b"", "cut short in its header"),
    "header": (GOOD[:9], "cut short in its header"),
    "magic": (b"\x01" + GOOD[1:], "not an IDX file of unsigned bytes with 3 axes"),
    "floats": (GOOD[:2] + b"\x0d" + GOOD[3:], "not an IDX file"),
    "axes": (struct.pack(">HBBI", 0, 8, 1, 24) + BODY, "with 3 axes"),
    "short": (GOOD[:-1], r"sizes \(2, 3, 4\) need 24 bytes, found 23"),
    "long": (GOOD + b"\0", "need 24 bytes, found more"),
    "nothing": (struct.pack(">HBB3I", 0, 8, 3, 0, 3, 4), "empty or above"),
    "absurd": (struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 9), "empty or above"),
}


@pytest.mark.parametrize("packed", [bytes, gzip.compress, lzma.compress])
@pytest.mark.parametrize("broken", BROKEN)
def test_broken_content(tmp_path: Path, broken: str, packed) -> None:
    data, reason = BROKEN[broken]
    with pytest.raises(ValueError, match=reason) as caught:
        read_idx(written(tmp_path / "x-ubyte", packed(data)), 3)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'x-ubyte'}: ") and "\n" not in message


@pytest.mark.parametrize("packed", [gzip.compress, lzma.compress])
def test_broken_packing(tmp_path: Path, packed) -> None:
    data = packed(GOOD)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    checksum = bytearray(data)
    checksum[-6] ^= 1
    for broken in (data[:-9], data[: len(data) // 2], bytes(flipped), bytes(checksum)):
        with pytest.raises(ValueError, match="x-ubyte: "):
            read_idx(written(tmp_path / "x-ubyte", broken), 3)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        read_idx(tmp_path / "gone", 3)
