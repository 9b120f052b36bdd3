"""`minidiffusion plan`: what a model takes of memory, and which options make it fit."""

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from typing import get_args

import torch

from minidiffusion import device as devices
from minidiffusion.cli.inspect import amount, called, rows
from minidiffusion.cli.main import fail
from minidiffusion.layers.quantized import How
from minidiffusion.layers.storage import stored_as
from minidiffusion.pipelines.load import located
from minidiffusion.pipelines.plan import PROGRAM, Plan, Total, Way, plan

EXAMPLES = """examples:
  minidiffusion plan --model sd3.5_large.safetensors --text-encoders encoders/
  minidiffusion plan --model v1-5-pruned-emaonly.safetensors --width 1024 --height 1024
  minidiffusion plan --model sd3.5_medium.safetensors --memory 8GB --json
"""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
QUANTIZE = get_args(How)
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
         "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip
MEMORY = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([kmgt]?i?)b?", re.IGNORECASE)


def add_arguments(verb: argparse.ArgumentParser) -> None:
    verb.epilog = EXAMPLES
    verb.add_argument("--model", required=True, help="file, folder or name such as sd1.5")
    verb.add_argument("--width", type=int, help="pixels (the model's own)")
    verb.add_argument("--height", type=int, help="pixels (the model's own)")
    verb.add_argument("--batch-size", type=int, default=1, help="pictures at once (1)")
    verb.add_argument("--guidance", type=float, help="1 halves the work (the model's own)")
    verb.add_argument("--dtype", default="auto", help="auto, fp32 or bf16 (auto)")
    verb.add_argument("--device", default="auto", help=devices.NAMES)
    verb.add_argument("--memory", metavar="SIZE",
        help="of another machine, such as 8GB; its device need not be here")  # fmt: skip
    verb.add_argument("--text-encoders", metavar="FOLDER",
        help="of Stable Diffusion 3, where its file has none; or FILE,FILE,FILE")  # fmt: skip
    verb.add_argument("--no-t5", action="store_true", help="draw without the largest of them")
    verb.add_argument("--quantize", help=", ".join(QUANTIZE))
    verb.add_argument("--offload", action="store_true", help="parts take turns on the device")
    verb.add_argument("--freeze-ladder", action="store_true",
        help="of Stable Diffusion 3: a third of its weights stays in the file")  # fmt: skip
    verb.add_argument("--tile", type=int, help="autoencoder in tiles of so many latent pixels")
    verb.add_argument("--json", action="store_true", help="one line of JSON, sizes in bytes")


def run(arguments: argparse.Namespace) -> None:
    device, room = machine(arguments.device, arguments.memory)
    if arguments.quantize not in (None, *QUANTIZE):
        fail(f"--quantize: must be {', '.join(QUANTIZE)}, got {arguments.quantize!r}")
    if arguments.tile is not None and arguments.tile < 8:
        fail(f"--tile: must be at least 8, got {arguments.tile}")
    if arguments.guidance is not None and not 0 <= arguments.guidance < float("inf"):
        fail(f"--guidance: must be 0 or more, got {arguments.guidance}")
    way = Way(
        arguments.offload, arguments.tile, arguments.freeze_ladder, arguments.quantize,
        not arguments.no_t5,
    )  # fmt: skip
    found = plan(
        located(arguments.model), width=arguments.width, height=arguments.height,
        batch=arguments.batch_size, dtype=precision(arguments.dtype, device),
        guidance=arguments.guidance, device=device, way=way,
        text_encoders=arguments.text_encoders,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps(facts(found, room, arguments)))
    else:
        print("\n".join(page(found, room, arguments)))


def machine(name: str, memory: str | None) -> tuple[torch.device, int]:
    """The device, and how many bytes of it are free; with ``memory`` of one that is not here."""
    if memory is None:
        device = devices.pick(name)
        return device, devices.available_bytes(device)
    size = MEMORY.fullmatch(memory.strip())
    if size is None:
        fail(f"--memory: expected a size such as 8GB or 24GiB, got {memory!r}")
    if name not in devices.KINDS:
        fail(f"--device: {name!r}; allowed beside --memory: {', '.join(devices.KINDS)}")
    device = devices.pick() if name == "auto" else torch.device(name)
    return device, int(float(size[1]) * UNITS[size[2].lower()])


def precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type != devices.pick().type else devices.dtype(
            "auto", device
        )  # fmt: skip
    if name not in DTYPES:
        fail(f"--dtype: must be auto, fp32 or bf16, got {name!r}")
    return DTYPES[name]


def page(found: Plan, room: int, arguments: argparse.Namespace) -> Iterator[str]:
    job, short = found.job, {dtype: name for name, dtype in DTYPES.items()}
    words = called(found.family) if found.family else "parts"
    yield (
        f"{words}: {job.width} x {job.height}, batch of {job.batch}, guidance {job.guidance:g}, "
        f"{short[job.dtype]}, on {job.device.type}"
    )
    yield f"  {'part':<16}{'weights':>10}{'activations':>13}{'peak':>10}"
    for part, weights, activations in found.parts:
        sizes = amount(weights), amount(activations), amount(weights + activations)
        yield f"  {part:<16}{sizes[0]:>10}{sizes[1]:>13}{sizes[2]:>10}"
    yield f"  {'the program':<16}{'':>10}{'':>13}{amount(PROGRAM):>10}"
    wide = max(len(total.way.options) for total in found.totals) + 4
    yield f"  {'options':<{wide}}{'peak':>10}  fits in {amount(room)}"
    for total in found.totals:
        more = f"; {amount(total.host)} of RAM beside it" if total.host else ""
        fits = "yes" if total.peak <= room else "no"
        yield f"  {total.way.options or 'none':<{wide}}{amount(total.peak):>10}  {fits}{more}"
    yield from rows(advice(found, room, arguments))


def advice(found: Plan, room: int, arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    parts, job = {need.part for need in found.parts}, found.job
    if job.computed != job.dtype:
        yield "note", stored_as({job.dtype}, job.device)
    if "denoiser" not in parts:
        yield "note", "no denoiser: nothing can be drawn with these parts alone"
        return
    if parts.isdisjoint({"text encoder", "CLIP-L"}):
        sd3 = found.family.startswith("sd3")
        option = "--text-encoders FOLDER" if sd3 else "--text-encoder FILE of generate"
        yield "note", f"no text encoders here, so they are not counted; {option} names them"
    if "autoencoder" not in parts:
        yield "note", "no autoencoder here, so it is not counted; --vae FILE of generate names one"
    best = found.choice(room)
    if best is None:
        least = min(total.peak for total in found.totals)
        yield "none fits", f"the least is {amount(least)}; smaller pictures or batches take less"
    else:
        yield "recommended", command(found, best, arguments)


def command(found: Plan, total: Total, arguments: argparse.Namespace) -> str:
    """The line that draws so."""
    words = ["--model", arguments.model]
    if arguments.text_encoders is not None:
        words += ["--text-encoders", arguments.text_encoders]
    words += ["--width", str(found.job.width), "--height", str(found.job.height)]
    if arguments.batch_size > 1:
        words += ["--num-images", str(found.job.batch), "--batch-size", str(found.job.batch)]
    if arguments.guidance is not None:
        words += ["--guidance", f"{arguments.guidance:g}"]
    if arguments.dtype != "auto":
        words += ["--precision", arguments.dtype]
    words += ["--device", found.job.device.type] if arguments.device != "auto" else []
    return f'minidiffusion generate "..." {shlex.join(words)} {total.way.options}'.rstrip()


def facts(found: Plan, room: int, arguments: argparse.Namespace) -> dict[str, object]:
    """All of it as plain data, sizes in bytes; command is null where nothing fits."""
    job, best = found.job, found.choice(room)
    drawn = best if any(need.part == "denoiser" for need in found.parts) else None
    return {
        "model": arguments.model, "family": found.family, "device": job.device.type,
        "memory": room, "dtype": str(job.dtype).removeprefix("torch."),
        "computed": str(job.computed).removeprefix("torch."), "width": job.width,
        "height": job.height, "batch_size": job.batch, "guidance": job.guidance,
        "program": PROGRAM,
        "parts": [{**need._asdict(), "peak": need.peak} for need in found.parts],
        "ways": [
            {"options": total.way.options, "peak": total.peak, "ram": total.host,
             "fits": total.peak <= room}
            for total in found.totals
        ],
        "command": None if drawn is None else command(found, drawn, arguments),
    }  # fmt: skip
