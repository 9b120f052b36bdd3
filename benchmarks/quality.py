"""The quality table: trains each row by the command, judges it by the command, prints the figures.

    python benchmarks/quality.py                                     # all rows without MNIST
    python benchmarks/quality.py --rows fashion-flow-0 fashion-dit --minutes 5
    python benchmarks/quality.py --rows mnist-flow-0 --mnist package/data

Five minutes of training a row unless said, and one of judging. It may be stopped at any time: run
again it skips what is finished and goes on with what is not, exactly where the last checkpoint was.
"""

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from measure import machine, notes, show

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "bench"
FASHION, MNIST = "configs/fashion_unet.yaml", "configs/mnist_unet.yaml"
# The other predictions are trained on DDPM's path: an eps-network says nothing at alpha = 0, where
# the ladder of a flow begins.
DDPM = "configs/fashion_ddpm.yaml"
ROWS = {
    "fashion-flow-0": [FASHION, "--seed", "0"],
    "fashion-flow-1": [FASHION, "--seed", "1"],
    "fashion-flow-2": [FASHION, "--seed", "2"],
    "fashion-dit": ["configs/fashion_dit.yaml"],
    "fashion-mmdit": ["configs/mmdit_flow.yaml"],
    "fashion-eps": [DDPM],
    "fashion-v": [DDPM, "--target", "v"],
    "fashion-x0": [DDPM, "--target", "x0", "--objective.weighting", "min_snr"],
    "mnist-flow-0": [MNIST, "--seed", "0"],
    "mnist-flow-1": [MNIST, "--seed", "1"],
    "mnist-flow-2": [MNIST, "--seed", "2"],
}


def command(*words: str) -> None:
    """One verb of ours, as a user calls it; stops here if it fails."""
    notes.print(f"minidiffusion {' '.join(words)}", style="dim")
    subprocess.run([sys.executable, "-m", "minidiffusion", *words], cwd=ROOT, check=True)


def trained(row: str, minutes: float, mnist: str | None) -> Path:
    """The folder of this row's finished run."""
    out = RUNS / row
    if (out / "model.safetensors").exists():
        return out
    if list((out / "checkpoints").glob("*")):
        command("train", "--resume", str(out))
        return out
    folder = ["--data.folder", str(Path(str(mnist)).resolve())] if row.startswith("mnist") else []
    force = ["--force"] if (out / "recipe.yaml").exists() else []
    length = ["--minutes", str(minutes), "--run.sample_every", "0"]
    command("train", *ROWS[row], *length, *folder, *force, "--out", str(out))
    return out


def judged(row: str, out: Path, count: int, mnist: str | None) -> dict[str, Any]:
    """report.json of this run, made now unless it is there for as many pictures."""
    report = out / "report.json"
    found = json.loads(report.read_text()) if report.exists() else {}
    if any(scores["count"] != count for scores in found.values()) or not found:
        folder = ["--data-folder", str(Path(str(mnist)).resolve())]
        extra = folder if row.startswith("mnist") else []
        command("evaluate", str(out), "--count", str(count), *extra)
        found = json.loads(report.read_text())
    return dict(found)


def training(out: Path) -> tuple[float, int]:
    """Seconds and steps of a run; the log's clock starts anew with every resume."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    clocks = [line["seconds"] for line in lines]
    ended = [before for before, after in pairwise(clocks) if after < before]
    return sum(ended) + clocks[-1], lines[-1]["step"]


def figures(row: str, out: Path, report: dict[str, Any]) -> list[object]:
    seconds, steps = training(out)
    cells: list[object] = [row, f"{seconds:.0f}", steps]
    for scale in ("1", "2"):
        scores = report[f"guidance {scale}"]
        cells.append(f"{100 * scores['agreement']:.1f} %")
        cells.append(f"{scores['frechet']:.1f} / {scores['frechet_floor']:.1f}")
    return cells


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: all that have data")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, default 5")
    parser.add_argument("--count", type=int, default=2000, help="pictures to judge, default 2000")
    parser.add_argument("--mnist", metavar="FOLDER", help="MNIST's four IDX files, for its rows")
    arguments = parser.parse_args()
    rows = arguments.rows or list(ROWS)
    if arguments.mnist is None:
        left = [row for row in rows if row.startswith("mnist")]
        if left:
            notes.print(f"skipped, for want of --mnist FOLDER: {', '.join(left)}")
        rows = [row for row in rows if row not in left]
    arguments.rows = rows
    return arguments


def main() -> None:
    arguments = parsed()
    table = []
    for row in arguments.rows:
        out = trained(row, arguments.minutes, arguments.mnist)
        report = judged(row, out, arguments.count, arguments.mnist)
        table.append(figures(row, out, report))
    header = ["run", "seconds", "steps"]
    for scale in ("1", "2"):
        header += [f"agreement, guidance {scale}", f"Frechet / floor, guidance {scale}"]
    show(f"Quality, {arguments.count} pictures of each run", header, table)
    print(f"\n{machine()}")


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, subprocess.CalledProcessError) as error:
        raise SystemExit(f"stopped ({error}); the same command goes on from here") from None
