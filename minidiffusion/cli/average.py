"""`minidiffusion average`: a run's weights, averaged over a length that is chosen afterwards."""

import argparse
import math
import warnings
from pathlib import Path

from minidiffusion.checkpoints.reader import write_safetensors
from minidiffusion.cli.generate import check_target
from minidiffusion.cli.main import fail
from minidiffusion.training import posthoc
from minidiffusion.training.average import exponent

EXAMPLES = """examples:
  minidiffusion train configs/fashion_unet.yaml --run.averages "[0.05, 0.1]"
  minidiffusion average runs/fashion_unet --sigma-rel 0.08 --out wide.safetensors
  minidiffusion average runs/fashion_unet --sigma-rel 0.05,0.1,0.15 --out sweep.safetensors
  minidiffusion sample wide.safetensors
A sweep writes one file each: sweep_0.05.safetensors and so on.
"""
ROUGH = 0.1
"""The distance of a profile to what was asked for, above which it is said in a warning."""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.epilog = EXAMPLES
    verb.add_argument("folder", metavar="RUN", help="a run that kept run.averages")
    verb.add_argument(
        "--sigma-rel", required=True, metavar="WIDTH[,WIDTH...]",
        help="the average's standard deviation, as a share of the run's length: above 0, "
        "below 0.2887",
    )  # fmt: skip
    verb.add_argument("--step", type=int, help="as of this step (default: the last snapshot's)")
    verb.add_argument("--out", required=True, metavar="FILE", help="the model file to write")
    verb.add_argument("--force", action="store_true", help="replace what is in the way")


def run(arguments: argparse.Namespace) -> None:
    widths, out = read_widths(arguments.sigma_rel), Path(arguments.out)
    outs = [out if len(widths) == 1 else named(out, width) for width in widths]
    for target in outs:
        check_target(target, arguments.force)
    found = posthoc.stored(Path(arguments.folder))
    if any(target.resolve() in {one.weights.files[0].resolve() for one in found}
           for target in outs):  # fmt: skip
        fail(f"{arguments.out}: is one of the snapshots; --out must name another place")
    for width, target in zip(widths, outs, strict=True):
        chosen = posthoc.choose(found, width, arguments.step)
        facts = posthoc.model_facts(chosen.parts[-1])
        if chosen.fit.error > ROUGH:
            warnings.warn(
                f"sigma_rel {width:g}: the snapshots come no closer than "
                f"{100 * chosen.fit.error:.2g} % to this average's profile; more of them "
                "(run.average_every), a second width, or another step would", stacklevel=1,
            )  # fmt: skip
        write_safetensors(posthoc.combined(chosen), target, facts, fresh=not arguments.force)
        count = sum(1 for _ in posthoc.shares(chosen))
        print(
            f"{target}  sigma_rel {width:g} of {count} snapshot{'s' * (count > 1)}; "
            f"its profile is {100 * chosen.fit.error:.2g} % off"
        )


def read_widths(text: str) -> list[float]:
    """The numbers between the commas."""
    try:
        widths = [float(word) for word in text.split(",")]
    except ValueError:
        fail(f"--sigma-rel: expected numbers with commas between them, got {text!r}")
    for width in widths:
        if math.isnan(width) or width in (math.inf, -math.inf):
            fail(f"--sigma-rel: must be finite, got {text!r}")
        exponent(width)
    if len(set(widths)) < len(widths):
        fail(f"--sigma-rel: a width stands twice in {text!r}")
    return widths


def named(out: Path, width: float) -> Path:
    return out.with_name(f"{out.stem}_{width:g}{out.suffix}")
