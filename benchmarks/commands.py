"""Whole `generate` commands of Stable Diffusion 3: seconds, memory beside the plan, pictures.

    python tests/official.py medium.safetensors --family sd3.5-medium --size full --alone --half
    python tests/official.py encoders --family sd3.5-medium --size full --dialect parts --half
    python benchmarks/commands.py medium.safetensors encoders

Each draws the same seed at 512 px in a fresh process, a part at a time in memory. Memory is the
peak of its anonymous pages; pictures are held against the first one's, in steps of 255.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import machine, notes, show
from PIL import Image

WAYS = {
    "bf16": [],
    "int8": ["--quantize", "int8"],
    "int8-dynamic": ["--quantize", "int8-dynamic"],
    "fp8": ["--quantize", "fp8"],
    "frozen": ["--freeze-ladder"],
}
RUN = [sys.executable, "-m", "minidiffusion"]


def drawn(words: list[str], out: Path) -> tuple[float, float, np.ndarray]:
    """Seconds, GB of anonymous memory at the most, and the picture."""
    began, peak = time.perf_counter(), 0
    done = subprocess.Popen([*RUN, "generate", "a red panda", *words, "--out", str(out)])
    while done.poll() is None:
        lines = Path(f"/proc/{done.pid}/status").read_text().splitlines()
        peak = max([peak, *(int(line.split()[1]) for line in lines if "RssAnon" in line)])
        time.sleep(0.1)
    if done.returncode:
        raise SystemExit(done.returncode)
    picture = np.asarray(Image.open(out / "0001.png"), dtype=np.float64)
    return time.perf_counter() - began, 1.024e-6 * peak, picture


def planned(words: list[str]) -> float:
    found = subprocess.run([*RUN, "plan", *words, "--json"], capture_output=True, check=True)
    return float(json.loads(found.stdout)["ways"][0]["peak"]) / 1e9


def apart(one: np.ndarray, other: np.ndarray) -> str:
    error = np.abs(one - other)
    if not error.any():
        return "0"
    noise = 10 * np.log10(255**2 / (error**2).mean())
    return f"mean {error.mean():.1f}, most {error.max():.0f}, {noise:.1f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a file of Stable Diffusion 3")
    parser.add_argument("encoders", help="the folder of its text encoders")
    parser.add_argument("--steps", default="4", help="default: %(default)s")
    parser.add_argument("--size", default="512", help="pixels a side; default: %(default)s")
    parser.add_argument("--guidance", default="4.5", help="default: %(default)s")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--t5", action="store_true", help="read the prompt with T5, too")
    given = parser.parse_args()
    both = ["--model", given.model, "--text-encoders", given.encoders, "--offload"]
    both += ["--width", given.size, "--height", given.size, "--guidance", given.guidance]
    both += [] if given.t5 else ["--no-t5"]
    rows: list[list[object]] = []
    first: np.ndarray | None = None
    with tempfile.TemporaryDirectory() as folder:
        for k, way in enumerate(given.ways):
            notes.print(f"{way} ...")
            words = [*both, *WAYS[way]]
            seconds, peak, picture = drawn([*words, "--steps", given.steps], Path(folder) / str(k))
            first = picture if first is None else first
            cells = [f"{seconds:.0f}", f"{peak:.2f}", f"{planned(words):.2f}"]
            rows.append([way, *cells, apart(first, picture)])
    header = ["held", "s", "GB, peak", "GB, planned", "away from the first picture"]
    show(f"{Path(given.model).name}, {given.size} px, {given.steps} steps", header, rows)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
