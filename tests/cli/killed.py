"""Verbs that are killed at random moments: ``killed.py FOLDER VERB COUNT``, a process of its own.

It forks, which threads would spoil. After each SIGKILL what stands under a final name must be
whole, and all else must be a draft by its name; the next call must work, and sweep dead drafts.
Prints how many calls ended before they were killed, and how many drafts were left, as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import official
import torch
import yaml
from conftest import PICTURES, TOY
from PIL import Image

from minidiffusion.checkpoints.catalog import load_denoiser
from minidiffusion.checkpoints.parts import load_parts
from minidiffusion.cli.main import main
from minidiffusion.data import Shards

torch.set_num_threads(1)
Words = list[str]


def child(work: Callable[[], object]) -> int:
    """A process that does this and nothing else, without a word."""
    number = os.fork()
    if number:
        return number
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 1)
    if "DEBUG" not in os.environ:
        os.dup2(silence, 2)
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def done(work: Callable[[], object]) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(child(work), 0)[1]) == 0


def prepared(verb: str, root: Path) -> tuple[Words, Path]:
    """The command and the folder that it writes into."""
    out = root / "out"
    out.mkdir(parents=True)
    if verb == "generate":
        (root / "r.yaml").write_text(yaml.safe_dump(PICTURES))
        done(lambda: main(["train", str(root / "r.yaml"), "--out", str(root / "run")]))
        more = ["--num-images", "6", "--batch-size", "2", "--steps", "1"]
        return ["generate", "bag", "--model", str(root / "run"), "--out", str(out), *more], out
    if verb == "average":
        recipe = {**TOY, "model": {"name": "mlp", "width": 128, "depth": 4}}
        (root / "r.yaml").write_text(yaml.safe_dump(recipe))
        keep = ["--run.averages", "[0.05, 0.1]", "--run.average_every", "1"]
        done(lambda: main(["train", str(root / "r.yaml"), "--out", str(root / "run"), *keep]))
        call = ["average", str(root / "run"), "--sigma-rel", "0.05,0.1,0.15", "--force"]
        return [*call, "--out", str(out / "a.safetensors")], out
    if verb.startswith("convert"):
        model = official.make(root / "sd1.safetensors", "sd1")
        to = verb.removeprefix("convert-")
        name = "sd1" if to == "diffusers" else "sd1.safetensors"
        return ["convert", str(model), "--to", to, "--out", str(out / name), "--force"], out
    if verb == "shard":
        (root / "in").mkdir()
        for n in range(24):
            Image.new("RGB", (8, 8), (n, n, n)).save(root / "in" / f"{n}.png")
        return ["shard", str(root / "in"), "--out", str(out), "--per-shard", "6"], out
    return downloading(out)


def downloading(out: Path) -> tuple[Words, Path]:
    """The server is a process as well; it ends with this one."""
    from test_download import KEPT, NAME, Hub, constants

    constants.DOWNLOAD_CHUNK_SIZE = KEPT // 4
    read, write = os.pipe()

    def serve() -> None:
        os.write(write, Hub().address.encode())
        while os.getppid() == parent:
            time.sleep(0.2)

    parent = os.getpid()
    child(serve)
    os.environ |= {"NO_PROXY": "127.0.0.1", "HF_ENDPOINT": os.read(read, 100).decode()}
    return ["download", NAME, "--out", str(out)], out


def check(path: Path) -> None:
    """A file or folder under its final name is whole, or this raises."""
    if path.suffix == ".png":
        with Image.open(path) as picture:
            picture.load()
    elif path.suffix == ".tar":
        assert len(Shards(str(path), size=8, strict=True).open()) == 6
    elif path.name == "tiny.safetensors":
        from test_download import DATA

        assert path.read_bytes() == DATA
    elif path.name.startswith("sd1"):
        assert load_parts(path).denoiser
    elif path.suffix == ".safetensors":
        load_denoiser(path)
    else:
        assert path.name.endswith((".part", ".tar.index")), path


def emptied(out: Path) -> None:
    """shard refuses a folder that holds its shards; a finished download is not done again."""
    for path in out.iterdir():
        if path.is_file() and not path.name.startswith(".tmp-"):
            path.unlink()


def kill(verb: str, root: Path, count: int) -> dict[str, object]:
    words, out = prepared(verb, root)
    import_module(f"minidiffusion.cli.{words[0]}")  # before the clock starts
    import_module("huggingface_hub.file_download")
    began = time.monotonic()
    done(lambda: main(words))
    length, draw, ended, left, half = time.monotonic() - began, random.Random(0), 0, 0, 0
    for _ in range(count):
        if verb in ("shard", "download"):
            emptied(out)
        number = child(lambda: main(words))
        time.sleep(draw.uniform(0, length))
        os.kill(number, signal.SIGKILL)
        ended += os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 0
        for path in out.iterdir():
            if path.name.startswith(".tmp-"):
                left += 1
                os.utime(path, (0, 0))  # old enough to be swept
                continue
            if path.name.startswith(".minidiffusion-old-"):
                continue
            try:
                check(path)
            except (AssertionError, ValueError, OSError) as error:
                half += 1
                print(f"{path}: {error}", file=sys.stderr)
    if verb == "shard":
        emptied(out)
    done(lambda: main(words))
    names = [path.name for path in out.iterdir()]
    drafts = ".tmp-", ".minidiffusion-old-"
    swept = not any(name.startswith(drafts) or name.endswith(".part") for name in names)
    return {"half": half, "ended": ended, "left": left, "swept": swept, "seconds": round(length, 3)}


if __name__ == "__main__":
    print(json.dumps(kill(sys.argv[2], Path(sys.argv[1]), int(sys.argv[3]))))
