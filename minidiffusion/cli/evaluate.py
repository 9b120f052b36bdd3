"""`minidiffusion evaluate`: how good a run's pictures are, beside what real pictures would get."""

import argparse
import json
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from minidiffusion.cli.main import fail
from minidiffusion.cli.sample import draw, opened, options, sampling_arguments
from minidiffusion.data import MNIST, FashionMNIST
from minidiffusion.data.dataset import Dataset
from minidiffusion.data.fashion import Split
from minidiffusion.evaluation.features import Extractor, inception, judge
from minidiffusion.evaluation.report import Scores, evaluate
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.shapes import Image

EXAMPLES = """examples:
  minidiffusion evaluate runs/demo
  minidiffusion evaluate runs/demo --guidance 1 --guidance 2 --guidance 4 --count 2000
  minidiffusion evaluate runs/mnist --data-folder mnist/data --fid-weights default_1.pt
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.epilog = EXAMPLES
    verb.add_argument("run_folder", metavar="RUN", help="a run's folder or its model.safetensors")
    verb.add_argument("--count", type=int, default=2000, help="pictures to judge (default 2000)")
    verb.add_argument("--guidance", type=float, action="append", metavar="SCALE",
        help="guidance scale, may be repeated (default: 1 and 2)")  # fmt: skip
    sampling_arguments(verb)
    verb.add_argument("--batch-size", type=int, default=250, help="pictures at once")
    verb.add_argument("--data-folder", help="folder of the data set's files, where none ship")
    verb.add_argument("--fid-weights", help="TorchScript file of the FID Inception network")


def run(arguments: argparse.Namespace) -> None:
    pipe = opened(arguments)
    if arguments.count < 1 or arguments.batch_size < 1:
        fail("--count and --batch-size: must be at least 1")
    scores = {}
    for scale in arguments.guidance or [1.0, 2.0]:
        given = {**options(arguments), "guidance_scale": scale}
        scores[scale] = judged(pipe, arguments, given)
        print(f"\nguidance {scale:g}\n{scores[scale].table()}", flush=True)
    folder = Path(arguments.run_folder)
    save(scores, folder if folder.is_dir() else folder.parent)


def save(scores: dict[float, Scores], folder: Path) -> Path:
    """report.json for programs, report.md for people."""
    plain = {f"guidance {scale:g}": score.as_dict() for scale, score in scores.items()}
    (folder / "report.json").write_text(json.dumps(plain, indent=1) + "\n")
    parts = [f"## Guidance {s:g}\n\n```\n{score.table()}\n```\n" for s, score in scores.items()]
    path = folder / "report.md"
    path.write_text("# Figures of this run\n\n" + "\n".join(parts))
    print(f"\n{path}")
    return path


def judged(pipe: Pipeline, arguments: Any, given: dict[str, Any]) -> Scores:
    train, held_out = real(pipe, arguments.data_folder)
    count = min(arguments.count, len(held_out))
    if count < arguments.count:
        print(f"judging {count} pictures: the held-out set has no more to compare with")
    classes = len(pipe.row.classes)
    labels = [i % classes for i in range(count)]
    looks = inception(arguments.fid_weights, pipe.device) if arguments.fid_weights else None
    critic = judge(pipe.row.data)  # type: ignore[arg-type]  # `real` has let only these two through
    check_enough(count, looks or critic.extractor)
    samples = draw(pipe, labels, count, arguments.batch_size, arguments.seed, given)
    return evaluate(samples, torch.tensor(labels), train, held_out, critic, looks)


def check_enough(count: int, looks: Extractor) -> None:
    """No distance can be had of so few pictures: better said before they are drawn."""
    if count <= looks.dim:
        fail(f"--count: {looks.name} has {looks.dim} features and needs more pictures, not {count}")


def real(pipe: Pipeline, folder: str | None) -> tuple[Tensor, Tensor]:
    """The training pictures and the held-out ones of the data set that the run was trained on."""
    kind = judgeable(pipe.row.data)
    train, held_out = (kind(split, folder).open() for split in get_args(Split))
    if (train.shape, train.classes) != (pipe.row.shape, pipe.row.classes):
        fail(f"evaluate: the run's pictures or classes are not those of {pipe.row.data}")
    return pictures(train), pictures(held_out)


def judgeable(data: str) -> type[FashionMNIST | MNIST]:
    """The data set of this name, if there are a judge and held-out pictures for it."""
    sets: dict[str, type[FashionMNIST | MNIST]] = {"fashion_mnist": FashionMNIST, "mnist": MNIST}
    if data not in sets:
        fail(
            f"evaluate: no judge for data {data!r}; allowed: {', '.join(sets)} "
            "(in Python: minidiffusion.evaluation.report.evaluate takes any pictures and features)"
        )
    return sets[data]


def pictures(dataset: Dataset) -> Image:
    return dataset.batch(range(len(dataset))).x
