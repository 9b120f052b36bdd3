"""`minidiffusion shard`: a folder of captioned pictures becomes tar shards with their indexes."""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

from minidiffusion.cli.train import list_quarantined
from minidiffusion.data import Folder, Parts, Pictures, Shards, order, write_shards
from minidiffusion.files import claimed, sweep

EXAMPLES = """examples:
  minidiffusion shard my_pictures --out my_shards
  minidiffusion shard my_pictures --out my_shards --per-shard 2000 --prefix cats
  minidiffusion train configs/folder_64.yaml --data shards --data.path my_shards
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.epilog = EXAMPLES
    verb.add_argument("folder", metavar="FOLDER", help="pictures, as `data: folder` reads them")
    verb.add_argument("--out", required=True, metavar="OUT", help="the folder of the shards")
    verb.add_argument("--prefix", default="part", help="shards are PREFIX-000000.tar (%(default)s)")
    verb.add_argument(
        "--per-shard", type=int, default=10_000, metavar="N", help="pictures at most (%(default)s)"
    )
    verb.add_argument(
        "--max-bytes", type=int, default=2**30, metavar="N", help="bytes at most (%(default)s)"
    )
    verb.add_argument(
        "--captions", choices=("auto", "none", "txt", "jsonl"), default="auto",
        help="where they are (%(default)s)",
    )  # fmt: skip
    verb.add_argument("--strict", action="store_true", help="refuse the folder for a bad picture")


def run(arguments: argparse.Namespace) -> None:
    with claimed(Path(arguments.out)):
        sweep(Path(arguments.out))
        pack(arguments, Path(arguments.out))


def pack(arguments: argparse.Namespace, out: Path) -> None:
    began = time.monotonic()
    folder = Folder(arguments.folder, size=8, captions=arguments.captions, strict=arguments.strict)
    pictures = folder.open()
    shards = write_shards(
        samples(pictures), out, arguments.prefix, arguments.per_shard, arguments.max_bytes
    )
    list_quarantined(pictures, out / "quarantined.txt")
    # Opened once, every shard is read as it lies on the disk, and has its index.
    count = sum(len(Shards(str(path), strict=True).open()) for path in shards)
    size = sum(path.stat().st_size for path in shards)
    seconds = time.monotonic() - began
    print(f"{out}  {len(shards)} shards, {count:,} pictures, {size:,} bytes ({seconds:.1f} s)")
    print(f"Next: minidiffusion train RECIPE --data shards --data.path {out}")


def samples(pictures: Pictures) -> Iterator[Parts]:
    """The files as they are, shuffled once: a shard of one class alone would train badly."""
    total = len(pictures)
    for number, row in enumerate(order(0, 0, total, total)):
        suffix = Path(pictures.names[row]).suffix.lower()
        parts = {suffix.removeprefix("."): pictures.file(row)}
        if pictures.captions:
            parts["txt"] = pictures.captions[row].encode()
        if pictures.classes:
            label = pictures.classes[int(pictures.labels[row])]
            parts["json"] = json.dumps({"label": label}).encode()
        yield Parts(f"{number:09d}", parts)
