"""Cut the shipped part of Fashion-MNIST (10,000 + 2,000 pictures) from a folder of the full files.

python scripts/build_fashion.py /usr/share/datasets/fashion-mnist
"""

import gzip
import struct
import sys
from pathlib import Path

from minidiffusion.data.fashion import SHIPPED
from minidiffusion.data.idx import read_idx

PARTS = {"train": 10_000, "t10k": 2_000}
KINDS = {"images-idx3": 3, "labels-idx1": 1}


def main(source: Path) -> None:
    SHIPPED.mkdir(parents=True, exist_ok=True)
    for prefix, count in PARTS.items():
        for kind, dims in KINDS.items():
            name = f"{prefix}-{kind}-ubyte.gz"
            part = read_idx(source / name, dims)[:count]
            header = struct.pack(f">HBB{dims}I", 0, 8, dims, *part.shape)
            packed = gzip.compress(header + part.numpy().tobytes(), 9, mtime=0)
            (SHIPPED / name).write_bytes(packed)
            print(f"{name}: {count} of {len(read_idx(source / name, dims))}, {len(packed)} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/build_fashion.py FOLDER_OF_THE_FULL_IDX_FILES")
    main(Path(sys.argv[1]))
