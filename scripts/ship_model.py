"""Make minidiffusion/assets/emoji/model.safetensors: a trained run with a byte for each weight.

python scripts/ship_model.py runs/tiny_mmdit
"""

import sys
from pathlib import Path

from minidiffusion.checkpoints.catalog import MODEL_FILE
from minidiffusion.checkpoints.reader import read_metadata, read_safetensors, write_safetensors
from minidiffusion.checkpoints.scaled import scaled
from minidiffusion.pipelines.load import SHIPPED


def main(run: Path) -> None:
    source, target = run / MODEL_FILE, SHIPPED["emoji"]
    tensors = scaled(read_safetensors(source))
    write_safetensors(tensors, target, read_metadata(source))
    count = sum(t.numel() for n, t in tensors.items() if not n.endswith(".scale_weight"))
    print(f"{target}: {count:,} weights, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/ship_model.py RUN")
    main(Path(sys.argv[1]))
