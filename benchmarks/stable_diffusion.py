"""Stable Diffusion 1.5 at full size beside diffusers: the same random weights, in turns.

    python tests/official.py sd15.safetensors --family sd1 --size full
    minidiffusion convert sd15.safetensors --to diffusers --out sd15
    python benchmarks/stable_diffusion.py sd15.safetensors sd15 --parts step decode load picture

step: the UNet at 512 px, a batch of two. decode: the autoencoder, one picture of 512 px. load: the
whole file, cast to bf16, in fresh processes. start: a fresh process to its first tiny picture.
picture: a whole walk of DDIM with guidance, how far apart the latents end.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from measure import GEMM, in_turns, machine, notes, product, ratio, show
from torch import Tensor

import minidiffusion
from minidiffusion.diffusion.noise import START, keyed
from minidiffusion.shapes import Cond

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOP = {"step": 1.607e12, "decode": 2.52e12}
"""Of products and convolutions, counted on the meta device."""
Row = list[str]


def compared(name: str, kind: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor],
             rounds: int) -> Row:  # fmt: skip
    """Seconds, their ratio, the floor at the matrix rate of the same run, how far apart."""
    works = {"ours": ours, "theirs": theirs, "product": product(DTYPES[kind])}
    with torch.inference_mode(False), torch.no_grad():
        apart = (ours().float() - theirs().float()).abs().max().item()
        seconds = in_turns(works, rounds)
    floor = FLOP[name] / (2 * GEMM**3 / median(seconds["product"]))
    times = [f"{median(seconds[who]):.2f}" for who in ("ours", "theirs")]
    faster = str(ratio(seconds["theirs"], seconds["ours"]))
    return [f"{name} {kind}", *times, faster, f"{floor:.2f}", f"{apart:.1e}"]


def step(model: Path, folder: Path, kind: str, rounds: int) -> Row:
    from diffusers import UNet2DConditionModel

    dtype = DTYPES[kind]
    ours = minidiffusion.load_denoiser(model, dtype=dtype).network
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).eval()
    x, t, words = torch.randn(2, 4, 64, 64), torch.full((2,), 500.0), torch.randn(2, 77, 768)
    x, words = x.to(dtype), words.to(dtype)
    cond = Cond(tokens=words)
    return compared(
        "step", kind, lambda: ours(x, t, cond), lambda: theirs(x, t, words).sample, rounds
    )


def decode(model: Path, folder: Path, kind: str, rounds: int) -> Row:
    from diffusers import AutoencoderKL

    dtype = DTYPES[kind]
    ours = minidiffusion.load_autoencoder(model, dtype=dtype)
    theirs = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype).eval()
    z = torch.randn(1, 4, 64, 64)
    raw = (z / ours.config.scale).to(dtype)
    return compared(
        "decode", kind, lambda: ours.decode(z), lambda: theirs.decode(raw).sample, rounds
    )


PROBE = """
import threading, time
born = time.perf_counter()
{first}
peak, done = [0.0], []
def anonymous():  # from the kernel's counter: a walk of the page tables would slow what is timed
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1.024e-6
def watch():
    while not done:
        peak[0] = max(peak[0], anonymous()); time.sleep(0.02)
before = anonymous(); began = time.perf_counter()
thread = threading.Thread(target=watch); thread.start()
{then}
now = time.perf_counter(); done.append(1); thread.join()
print(now - began, now - born, max(peak[0], anonymous()) - before)
"""
LOADS = {
    "minidiffusion.load": (
        "import torch, minidiffusion, minidiffusion.pipelines.load",
        "kept = minidiffusion.load({model!r}, dtype=torch.bfloat16)",
    ),
    "diffusers, single file": (
        "import torch, diffusers; from diffusers import StableDiffusionPipeline as Pipe",
        "kept = Pipe.from_single_file({model!r}, config={folder!r}, local_files_only=True, "
        "torch_dtype=torch.bfloat16, safety_checker=None)",
    ),
    "diffusers, folder": (
        "import torch, diffusers; from diffusers import StableDiffusionPipeline as Pipe",
        "kept = Pipe.from_pretrained({folder!r}, local_files_only=True, "
        "torch_dtype=torch.bfloat16, safety_checker=None)",
    ),
}


LOADING = ["load, cast to bf16", "GB anonymous, peak", "s", "ours takes", "s with import", "ours"]


def fresh(code: str) -> list[float]:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    if ran.returncode:
        notes.print(ran.stderr[-600:])
        raise SystemExit(1)
    return [float(word) for word in ran.stdout.split()[-3:]]


def loads(
    ways: dict[str, tuple[str, str]], model: Path, folder: Path, rounds: int
) -> Iterator[Row]:
    """What each way of loading takes; the ratios are to the first."""
    found: dict[str, list[list[float]]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, (first, then) in ways.items():
            code = PROBE.format(first=first, then=then.format(model=str(model), folder=str(folder)))
            seconds = fresh(code)
            if round_:
                found[name].append(seconds)
    ours = next(iter(found.values()))
    for name, measured in found.items():
        cells = [name, f"{median(row[2] for row in measured):.2f}"]
        for i in range(2):  # without the import, and with it
            cells.append(f"{median(row[i] for row in measured):.2f}")
            cells.append(str(ratio([row[i] for row in ours], [row[i] for row in measured])))
        yield cells


FIRST = """
import minidiffusion
minidiffusion.load({tiny!r}).generate("a cat", num_steps=4, width=64, height=64)
"""


def start(rounds: int) -> Row:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import official

    with tempfile.TemporaryDirectory() as folder:
        tiny = official.make(Path(folder) / "tiny.safetensors")
        seconds = []
        for round_ in range(rounds + 1):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", FIRST.format(tiny=str(tiny))], check=True)
            if round_:
                seconds.append(time.perf_counter() - began)
    return ["fresh process to its first tiny picture", f"{median(seconds):.2f}",
            f"{min(seconds):.2f} to {max(seconds):.2f}"]  # fmt: skip


def picture(model: Path, folder: Path, steps: int) -> Row:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    prompt, noise = "an astronaut scuba diving", keyed([7], (4, 64, 64))(START)
    began = time.perf_counter()
    pipe = minidiffusion.load(model, dtype=torch.float32)
    *_, last = pipe.stream(prompt, seed=7, num_steps=steps, sampler="ddim", guidance_scale=7.5)
    ours, between = last.x, time.perf_counter()
    del pipe
    peer = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, local_files_only=True
    )
    peer.scheduler = DDIMScheduler.from_config(
        peer.scheduler.config, set_alpha_to_one=False, clip_sample=False, steps_offset=1
    )
    theirs = peer(prompt, num_inference_steps=steps, guidance_scale=7.5, latents=noise,
                  output_type="latent").images  # fmt: skip
    ended = time.perf_counter()
    apart, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    return [
        f"{steps}",
        f"{between - began:.0f}",
        f"{ended - between:.0f}",
        f"{apart:.1e}",
        f"{size:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a single file of full size")
    parser.add_argument("folder", type=Path, help="the same weights as a folder of diffusers'")
    parser.add_argument("--parts", nargs="+", default=["step", "decode", "load", "start"])
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=int, default=20, help="of the picture; default: %(default)s"
    )
    given = parser.parse_args()
    rows = [
        work(given.model, given.folder, kind, given.rounds)
        for name, work in (("step", step), ("decode", decode))
        for kind in ("bf16", "fp32") if name in given.parts
    ]  # fmt: skip
    if rows:
        header = [
            "work at 512 px",
            "s, ours",
            "s, diffusers",
            "ratio",
            "floor, s",
            "max difference",
        ]
        show("Stable Diffusion 1.5", header, rows)
    if "load" in given.parts:
        show(
            "Loading 4.27 GB", LOADING, list(loads(LOADS, given.model, given.folder, given.rounds))
        )
    if "start" in given.parts:
        show("Start", ["work", "s", "least to most"], [start(given.rounds)])
    if "picture" in given.parts:
        header = ["DDIM steps", "s, ours", "s, diffusers", "max difference", "largest latent"]
        rows = [picture(given.model, given.folder, given.steps)]
        show("A picture of 512 px, guidance 7.5, fp32", header, rows)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
