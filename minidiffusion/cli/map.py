"""`minidiffusion map`: draw or encode what is too much for one process, over a cluster."""

import argparse
import os
import time
import warnings
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from minidiffusion.cli.generate import (
    EXACT,
    check_folder,
    drawing_arguments,
    parts_arguments,
    usual_model,
)
from minidiffusion.cli.main import MissingExtraError, fail
from minidiffusion.cli.prompts import pieces, split_lines
from minidiffusion.data.pictures import Fit
from minidiffusion.files import claimed
from minidiffusion.pipelines.cluster import Cluster, over
from minidiffusion.pipelines.jobs import Cut, Drawing, Encoding
from minidiffusion.pipelines.making import Job, claim, listed
from minidiffusion.pipelines.settings import Settings, model_hash
from minidiffusion.typed import build

EXAMPLES = """examples:
  minidiffusion map generate --prompts prompts.txt --model emoji --out drawn --batch-size 8
  minidiffusion map encode --data my_pictures --model emoji --out encoded --workers 4
  minidiffusion map generate --prompts prompts.txt --out drawn --address 10.0.0.1:6379 --gpus 1

The same command again goes on where it was stopped. docs/cluster.md: on several machines.
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.epilog = EXAMPLES
    jobs = verb.add_subparsers(dest="job", metavar="JOB", required=True)
    how = argparse.RawDescriptionHelpFormatter
    draw = jobs.add_parser("generate", help="prompts become pictures",
                           allow_abbrev=False, formatter_class=how)  # fmt: skip
    draw.add_argument("--prompts", required=True, metavar="FILE", help="a prompt a line")
    draw.add_argument("--exact", action="store_true", help=EXACT)
    shared_arguments(draw)
    drawing_arguments(draw)
    parts_arguments(draw.add_argument_group("the model"))
    code = jobs.add_parser("encode", help="pictures become latents, captions embeddings",
                           allow_abbrev=False, formatter_class=how)  # fmt: skip
    code.add_argument("--data", required=True, help="a folder of pictures, or tar shards")
    code.add_argument("--size", type=int, help="pixels a side (the model's own)")
    code.add_argument("--fit", choices=get_args(Fit), default="crop",
                      help="pictures of another size (%(default)s)")  # fmt: skip
    shared_arguments(code)
    parts_arguments(code.add_argument_group("the model"))


def shared_arguments(job: argparse.ArgumentParser) -> None:
    job.add_argument(
        "--model", help="file, folder or name such as sd1.5 (the only one in models/, else emoji)"
    )
    job.add_argument("--out", required=True, help="the folder of the shards; it may be begun")
    job.add_argument("--batch-size", type=int, default=1, help="pictures at once (%(default)s)")
    job.add_argument("--per-shard", type=int, default=1000, metavar="N",
        help="pictures at most; of tar shards each becomes one (%(default)s)")  # fmt: skip
    place = job.add_argument_group("the cluster")
    place.add_argument("--workers", type=int, metavar="N", help="processes (as many as fit)")
    place.add_argument("--threads", type=int, default=1, help="cores of each (%(default)s)")
    place.add_argument("--gpus", type=float, default=0.0, help="of each; 0.5: two share one")
    place.add_argument(
        "--address", metavar="HOST:PORT", help="a running cluster (one started here)"
    )


PER_CORE = 8
"""Threads at most; more than 1 only to try what many workers do."""
KNOWN = {field.name for field in fields(Settings)} - {"fit"}


def run(arguments: argparse.Namespace) -> None:
    if find_spec("ray") is None:
        raise MissingExtraError("map needs Ray: pip install 'minidiffusion[ray]'")
    cluster = Cluster(arguments.address, arguments.workers, arguments.threads, arguments.gpus)
    check_machine(cluster)
    job, cut = asked(arguments)
    out = Path(arguments.out)
    check_folder(out)
    job = replace(job, settings=replace(job.settings, model_hash=model_hash(job.settings.model)))
    with claimed(out):
        follow(cluster, job, cut, out)


def check_machine(cluster: Cluster) -> None:
    """A cluster that is started here has as many processes and threads as are asked of it."""
    most, asked = PER_CORE * (os.cpu_count() or 1), (cluster.workers or 1) * cluster.threads
    if cluster.address is None and asked > most:
        fail(f"--workers, --threads: {most} threads at most on this machine, got {asked}")


def follow(cluster: Cluster, job: Job, cut: Cut, out: Path) -> None:
    """Do what is left of a job, and say how far it is."""
    works, began, count = claim(job, cut, out), time.monotonic(), 0
    there = len(cut.works) - len(works)
    if there:
        print(f"{out}: {there} of {len(cut.works)} shards are there")
    for number, done in enumerate(over(cluster, job, works, out), start=there + 1):
        if done.error:
            fail(done.error)
        for text in done.said:
            warnings.warn(text, stacklevel=1)
        count += done.made
        pace = count / (time.monotonic() - began)
        print(f"{out / done.name}  {done.made} in {done.seconds:.1f} s  "
              f"({number} of {len(cut.works)}; {pace:.2f}/s)", flush=True)  # fmt: skip
    bad = listed(out, cut)
    if bad:
        print(f"{bad} left out; {out / 'quarantined.txt'} lists them")
    print(f"{out}  {len(cut.works)} shards, {len(works)} of them made now, {count:,} samples")


def asked(arguments: argparse.Namespace) -> tuple[Job, Cut]:
    """The job, checked as far as it can be before a model is read, and its shards."""
    given = {key: value for key, value in vars(arguments).items()
             if key in KNOWN and value is not None}  # fmt: skip
    if "slg_layers" in given and "slg" not in given:
        fail("--slg-layers: only with --slg")
    settings = build(Settings, given | {"model": arguments.model or usual_model()})
    size, per_shard = arguments.batch_size, arguments.per_shard
    if arguments.job == "generate":
        drawing = Drawing(settings, 1 if arguments.exact else size)
        return drawing, drawing.cut(prompts_of(Path(arguments.prompts)), per_shard)
    encoding = Encoding(settings, size, arguments.size, arguments.fit)
    return encoding, encoding.cut(arguments.data, per_shard)


def prompts_of(path: Path) -> tuple[str, ...]:
    """A prompt a line, as `generate --from-file` reads them; one that is not UTF-8 stays a line."""
    lines = (line for _, text in pieces(path, "surrogateescape") for line in split_lines(text))
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        fail(f"{path}: holds no prompts")
    return prompts
