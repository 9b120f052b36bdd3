"""`minidiffusion download`: a model's official files, whole and checked."""

import argparse
import shlex
from pathlib import Path

from minidiffusion.checkpoints.hub import Fetched, fetch
from minidiffusion.checkpoints.releases import MODELS, find
from minidiffusion.cli.main import MissingExtraError, fail

EXAMPLES = """examples:
  minidiffusion download --list
  minidiffusion download sd1.5
  minidiffusion download sd3.5-medium --out /data/models     (accept its licence, set HF_TOKEN)
  minidiffusion download OWNER/NAME:some_model.safetensors
"""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.epilog = EXAMPLES
    verb.add_argument("model", nargs="?", help="a name of --list, or OWNER/NAME[:FILE] on the hub")
    verb.add_argument("--out", default="models", metavar="FOLDER", help="default: models/")
    verb.add_argument("--list", action="store_true", help="the models that have a name here")
    verb.add_argument("--force", action="store_true", help="replace another file in the way")


def run(arguments: argparse.Namespace) -> None:
    if arguments.list:
        print(listing())
        return
    if arguments.model is None:
        fail("download: give a model, such as sd1.5, or --list")
    row, out = find(arguments.model), Path(arguments.out)
    if out.exists() and not out.is_dir():
        fail(f"{out}: a file is in the way of the folder")
    try:
        from huggingface_hub.utils.logging import set_verbosity_error
    except ImportError:
        raise MissingExtraError(
            "download needs huggingface_hub: pip install 'minidiffusion[hub]'"
        ) from None
    # Its warnings are paragraphs; what ends a download is said below in a line.
    set_verbosity_error()  # type: ignore[no-untyped-call]
    facts = (row.repository, row.size and f"{row.size:g} GB", row.licence, row.note)
    print(", ".join(str(fact) for fact in facts if fact), flush=True)
    fetched = fetch(arguments.model, out, force=arguments.force)
    for one in fetched:
        print(described(one))
    print(
        f'next: minidiffusion generate "a cat in a hat" --model {shlex.quote(str(model(fetched)))}'
    )


def described(one: Fetched) -> str:
    check = f"{one.checked} fits" if one.checked else "the hub states no checksum: its size fits"
    size = f"{one.size / 1e9:.2f} GB" if one.size >= 1e7 else f"{one.size:,} bytes"
    return f"{one.path}  {size}, {'' if one.fresh else 'is there already, '}{check}"


def model(fetched: list[Fetched]) -> Path:
    """What the other verbs take: the file, or the folder that holds the parts."""
    index = next((one.path for one in fetched if one.path.name == "model_index.json"), None)
    return fetched[0].path if index is None else index.parent


def listing() -> str:
    width = max(map(len, MODELS))
    lines = []
    for name, row in MODELS.items():
        notes = ["licence to accept, HF_TOKEN"] if row.gated else []
        notes += [row.note] if row.note else []
        tail = f" ({'; '.join(notes)})" if notes else ""
        lines.append(f"{name:{width}}  {row.size:5.1f} GB  {row.repository}, {row.licence}{tail}")
    return "\n".join(lines)
