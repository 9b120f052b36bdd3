"""Tiny pictures and shards of them, for the tests of everything that reads tars."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_iterator

from minidiffusion.data import Parts, write_shards


def picture(grey: int, kind: str = "PNG", side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), grey, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def numbered(count: int, first: int = 0, classes: int = 3) -> list[Parts]:
    """Sample n is a picture of grey n with the caption "grey n"."""
    return [
        Parts(
            f"{n:06d}",
            {"png": picture(n % 256), "txt": f"grey {n}".encode(), "cls": b"%d" % (n % classes)},
        )
        for n in range(first, first + count)
    ]


def shards(folder: Path, count: int = 25, per_shard: int = 7) -> list[Path]:
    return write_shards(numbered(count), folder, per_shard=per_shard)


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **more: object) -> bytes:
    """One block, or several with the extended headers that a long name takes."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for key, value in more.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(data), kind) + padded(data)


def tar(path: Path, files: Mapping[str, bytes] | bytes) -> Path:
    """An archive of these files, or of these very blocks, with its end mark."""
    if not isinstance(files, bytes):
        files = b"".join(member(name, data) for name, data in files.items())
    path.write_bytes(files + bytes(1024))
    return path


GOOD = {"a.png": picture(1), "a.txt": b"first"}
LAST = {"z.png": picture(9), "z.txt": b"last"}


def by_webdataset(path: Path) -> list[dict[str, bytes]]:
    """The samples of a shard, read by that library's own code."""
    with path.open("rb") as file:
        members = ({"__url__": "", **one} for one in tar_file_iterator(file))
        return [
            {key: data for key, data in one.items() if key != "__url__"}
            for one in group_by_keys(members)
        ]
