"""CPU seconds that an import adds to `import torch`, over fresh processes that take turns.

python benchmarks/import_time.py
"""

import argparse
import resource
import statistics
import subprocess
import sys

from measure import machine, notes, show

TORCH = "import torch"
IMPORTS = {
    TORCH: TORCH,
    "import minidiffusion": "import torch, minidiffusion",
    "minidiffusion.load": "import torch, minidiffusion; minidiffusion.load",
    "minidiffusion.train": "import torch, minidiffusion; minidiffusion.train",
    "diffusers.UNet2DModel": "import torch; from diffusers import UNet2DModel",
    "diffusers.DDIMPipeline": "import torch; from diffusers import DDIMPipeline",
}


def spent(code: str) -> float | None:
    """CPU seconds, user and system, of a fresh process; None where the import fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return None if failed else seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    arguments = parser.parse_args()
    # The first round of all fills the disk's cache, and shows what is installed.
    there = {name: code for name, code in IMPORTS.items() if spent(code) is not None}
    for name in IMPORTS.keys() - there.keys():
        notes.print(f"skipped, not installed: {name}")
    seconds: dict[str, list[float]] = {name: [] for name in there}
    for _ in range(arguments.rounds):
        for name, code in there.items():
            seconds[name].append(spent(code) or 0.0)
    rows = []
    for name, each in seconds.items():
        added = [a - b for a, b in zip(each, seconds[TORCH], strict=True)]
        rows.append([name, f"{statistics.median(each):.2f}", f"{statistics.median(added):+.2f}",
                     f"{min(added):+.2f} to {max(added):+.2f}"])  # fmt: skip
    header = ["import", "CPU seconds", "beyond torch", "least to most"]
    show(f"Start, medians over {arguments.rounds} rounds of fresh processes", header, rows)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
