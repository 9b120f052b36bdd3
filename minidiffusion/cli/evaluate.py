"""`minidiffusion evaluate`: how good a run's pictures are, beside what real pictures would get."""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from minidiffusion.checkpoints import own
from minidiffusion.checkpoints.catalog import is_run
from minidiffusion.checkpoints.catalog import opened as files_of
from minidiffusion.checkpoints.reader import write_whole
from minidiffusion.checkpoints.weights import Weights
from minidiffusion.cli import apart, prompted
from minidiffusion.cli.main import check_seeds, fail
from minidiffusion.cli.sample import draw, opened, options, sampling_arguments
from minidiffusion.data import MNIST, Emoji, FashionMNIST
from minidiffusion.data.dataset import Dataset
from minidiffusion.data.fashion import Split
from minidiffusion.evaluation.features import Extractor, inception, judge
from minidiffusion.evaluation.matching import clip_cosines, emoji_judge
from minidiffusion.evaluation.prompted import Eyes, Prompted
from minidiffusion.evaluation.report import Scores, evaluate
from minidiffusion.pipelines.load import SHIPPED, located
from minidiffusion.pipelines.pipeline import Pipeline
from minidiffusion.shapes import Image

COUNT = 2000
EXAMPLES = """examples:
  minidiffusion evaluate emoji --guidance 3
  minidiffusion evaluate runs/tiny_vae
  minidiffusion evaluate runs/demo
  minidiffusion evaluate runs/demo --guidance 1 --guidance 2 --guidance 4 --count 2000
  minidiffusion evaluate runs/mnist --data-folder mnist/data --fid-weights default_1.pt
"""


@runtime_checkable
class Table(Protocol):
    """Figures to print, and for JSON."""

    def table(self) -> str: ...

    def as_dict(self) -> dict[str, object]: ...


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.epilog = EXAMPLES
    verb.add_argument("run_folder", metavar="RUN", help="a run's folder or its model.safetensors")
    usual = f"default {COUNT}; of emoji {prompted.COUNT} of each kind of caption"
    verb.add_argument("--count", type=int, help=f"pictures to judge ({usual})")
    verb.add_argument("--guidance", type=float, action="append", metavar="SCALE",
        help="guidance scale, may be repeated (default: 1 and 2)")  # fmt: skip
    sampling_arguments(verb)
    verb.add_argument("--batch-size", type=int, default=250, help="pictures at once")
    verb.add_argument("--data-folder", help="folder of the data set's files, where none ship")
    verb.add_argument("--fid-weights", help="TorchScript file of the FID Inception network")


def run(arguments: argparse.Namespace) -> None:
    if arguments.batch_size < 1 or (arguments.count is not None and arguments.count < 1):
        fail("--count and --batch-size: must be at least 1")
    check_seeds(arguments.seed, arguments.count or COUNT)
    place = located(arguments.run_folder)
    out = Path("runs") / arguments.run_folder if arguments.run_folder in SHIPPED else place
    weights = files_of(place)[0]
    scores: dict[str, Table] = {}
    for name, score in figures(weights, arguments):
        print(f"\n{name}\n{score.table()}", flush=True)
        scores[name] = score
    save(scores, out.parent if out.is_file() else out)


def figures(weights: Weights, arguments: Any) -> Iterator[tuple[str, Table]]:
    """What a file is judged by, one set of figures after the other."""
    if not is_run([weights]) and own.holds(weights, "autoencoder"):
        yield from apart.autoencoder(weights, arguments.data_folder).items()
        return
    if not is_run([weights]) and own.holds(weights, "clip"):
        yield from apart.clip(weights).items()
        return
    pipe = opened(arguments)
    for scale in arguments.guidance or [1.0, 2.0]:
        given = {**options(arguments), "guidance_scale": scale}
        kind = worded if pipe.row.data == Emoji.name else judged
        yield f"guidance {scale:g}", kind(pipe, arguments, given)


def save(scores: Mapping[str, Table], folder: Path) -> Path:
    """report.json for programs, report.md for people."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: score.as_dict() for name, score in scores.items()}
    write_whole(folder / "report.json", [f"{json.dumps(plain, indent=1)}\n".encode()])
    parts = [
        f"## {name[0].upper()}{name[1:]}\n\n```\n{score.table()}\n```\n"
        for name, score in scores.items()
    ]
    path = folder / "report.md"
    write_whole(path, ["\n".join(["# Figures of this run\n", *parts]).encode()])
    print(f"\n{path}")
    return path


def worded(pipe: Pipeline, arguments: Any, given: dict[str, Any]) -> Prompted:
    """Of a model of emoji: how well it draws what captions say."""
    prompted.check(pipe)
    judge = emoji_judge()
    looks = inception(arguments.fid_weights) if arguments.fid_weights else judge.extractor
    weights = files_of(located(arguments.run_folder))[0]
    clip = clip_cosines(own.load_clip(weights)) if own.holds(weights, "clip") else None
    count, size, seed = arguments.count or prompted.COUNT, arguments.batch_size, arguments.seed
    return prompted.judged(pipe, Eyes(judge, looks, clip), count, size, seed, given)


def judged(pipe: Pipeline, arguments: Any, given: dict[str, Any]) -> Scores:
    train, held_out = real(pipe, arguments.data_folder)
    asked = arguments.count or COUNT
    count = min(asked, len(held_out))
    if count < asked:
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
