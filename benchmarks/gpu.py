"""Steps of training and of drawing on an accelerator, compiled and not, over their floor.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --training --drawing "SD 3.5 medium, 1024 px"

The floor is the operations over the rate of bf16 products of the same run. A machine without an
accelerator is told so.
"""

import argparse

import gpu_drawing
import gpu_training
import torch
from accelerator import kind, matrix_rate

from minidiffusion.device import pick

TABLES = {"training": (gpu_training.table, gpu_training.PRESETS),
          "drawing": (gpu_drawing.table, gpu_drawing.CASES)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="of each; default: %(default)s")
    for name, (_, cases) in TABLES.items():
        which = f"of {'; '.join(cases)}. All unless named, none if empty"
        parser.add_argument(
            f"--{name}", nargs="*", choices=cases, default=list(cases), metavar="CASE", help=which
        )
    given = parser.parse_args()
    where = pick()
    if where.type == "cpu":
        print("no accelerator on this machine: nothing to measure here")
        return
    rate = matrix_rate(where)
    for name, (table, _) in TABLES.items():
        if chosen := getattr(given, name):
            table(chosen, rate, where, given.steps)
    print(f"\n{kind(where)}, bf16 products at {rate / 1e12:.0f} TFLOP/s, torch {torch.__version__}")


if __name__ == "__main__":
    main()
