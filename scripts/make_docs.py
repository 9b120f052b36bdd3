"""Draws the pictures of docs/from-noise-to-picture and refreshes the key tables of docs/recipes.md.

    python scripts/make_docs.py                   every picture, then the tables: about a minute
    python scripts/make_docs.py ladders paths     these pictures alone
    python scripts/make_docs.py --run runs/demo   samples.png and strip.png of a trained run as well

Everything is computed with public functions of the package; the clouds of points are learned here,
in seconds.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import torch
from docs_canvas import save
from docs_mathematics import (
    densities,
    ladders,
    noising,
    paths,
    snr,
    targets,
    time_embedding,
    weights,
)
from docs_sampling import convergence, floors, guidance, inpainting, tradeoff, trajectories
from matplotlib.figure import Figure

from minidiffusion import load
from minidiffusion.cli import figures
from minidiffusion.data import save_png
from minidiffusion.training.recipe import Recipe
from minidiffusion.typed import fields_help

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = DOCS / "from-noise-to-picture" / "pictures"


DRAWN: dict[str, Callable[[], Figure]] = {
    draw.__name__: draw
    for draw in (
        noising, paths, snr, targets, densities, weights, time_embedding, ladders, trajectories,
        convergence, guidance, inpainting, floors, tradeoff,
    )
}  # fmt: skip


def of_run(run: Path) -> None:
    """A contact sheet and the way from noise to picture."""
    pipe = load(run)
    save_png(figures.sheet(pipe, rows=4), PICTURES / "samples.png")
    save_png(figures.strip(pipe), PICTURES / "strip.png")


TABLE = re.compile(r"(<!-- keys: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
ROW = re.compile(r"\| `([\w.]+)`(?: \((\w+)\))? \| .*? \| .*? \| (.*) \|")


def with_tables(page: str) -> str:
    """The page with its tables of keys as the package has them now.

    Keys, what they take and their defaults come from Recipe; the meanings stay as they stand.
    """
    meanings = {(key, of): meaning for key, of, meaning in ROW.findall(page)}

    def table(found: re.Match[str]) -> str:
        lines = ["| key | takes | default | meaning |", "|---|---|---|---|"]
        for key, of, takes, default in recipe_keys():
            if key.split(".")[0] == found[2]:
                name = f"`{key}` ({of})" if of else f"`{key}`"
                meaning = meanings.get((key, of), "TODO")
                lines.append(f"| {name} | {takes} | {default} | {meaning} |")
        return "\n".join([found[1], *lines, "", found[3]])

    return TABLE.sub(table, page)


def recipe_keys() -> list[tuple[str, str, str, str]]:
    """(key, the block that it belongs to where several may stand there, takes, default)."""
    rows = []
    for key, takes, default in fields_help(Recipe):
        takes, _, of = takes.partition(" (of ")
        takes = re.sub(r"(\.\d{3})\d+", r"\1", takes).replace(" | ", " or ")
        default = {"None": "null", "True": "true", "False": "false"}.get(default, default)
        rows.append((key, of.removesuffix(")"), takes, default))
    return rows


def main() -> None:
    options = argparse.ArgumentParser(description="Draws the pictures of the documentation.")
    options.add_argument("pictures", nargs="*", metavar="PICTURE", help=", ".join(DRAWN))
    options.add_argument("--run", type=Path, help="a trained run, for samples.png and strip.png")
    given = options.parse_args()
    if unknown := [name for name in given.pictures if name not in DRAWN]:
        options.error(f"no picture {unknown[0]!r}; there are {', '.join(DRAWN)}")
    torch.set_num_threads(1)
    PICTURES.mkdir(exist_ok=True)
    for name in given.pictures or DRAWN:
        save(DRAWN[name](), PICTURES / f"{name}.png")
        print(f"{name}.png  {(PICTURES / f'{name}.png').stat().st_size // 1024} KB", flush=True)
    if given.run is not None:
        of_run(given.run)
    page = DOCS / "recipes.md"
    page.write_text(with_tables(page.read_text()))


if __name__ == "__main__":
    main()
