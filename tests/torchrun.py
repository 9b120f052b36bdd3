"""Two processes of torchrun, and what the first of them finds.

Starting them takes longer than most of what they do, so they stay, and take one script's cases
after another's. Run as a script this is what each rank does.
"""

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

LONGEST = 300
"""Seconds for one script's cases."""


class Ranks:
    """Two ranks that wait for requests: files request-0, request-1, ... in a folder."""

    def __init__(self) -> None:
        self.folder, self.count = Path(tempfile.mkdtemp(prefix="ranks-")), 0
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--master-port", "0", "--standalone", __file__, str(self.folder)]
        places = os.pathsep.join([str(Path.cwd()), str(Path(__file__).parent)])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
        with (self.folder / "stderr").open("w") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=errors, env=env
            )
        atexit.register(self.end)

    def run(self, script: Path, file: Path) -> tuple[int, str]:
        """The exit code, 0 while the ranks live, and what the first one printed."""
        number, self.count = self.count, self.count + 1
        write(self.folder / f"request-{number}", json.dumps([str(script), str(file)]))
        answers = [self.folder / f"answer-{number}-{rank}" for rank in (0, 1)]
        began = time.monotonic()
        while not all(answer.exists() for answer in answers):
            if (code := self.process.poll()) is not None:
                return code or 1, ""
            if time.monotonic() - began > LONGEST:
                raise TimeoutError(f"{script}: no answer in {LONGEST} s: {self.errors()}")
            time.sleep(0.02)
        return 0, answers[0].read_text()

    def errors(self) -> str:
        return (self.folder / "stderr").read_text()[-3000:]

    def end(self) -> None:
        (self.folder / "end").touch()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


@cache
def ranks() -> Ranks:
    return Ranks()


def launch(script: Path, folder: Path, cases: dict[str, Any]) -> tuple[int, dict[str, Any], str]:
    """Run a script's cases on two ranks; the exit code, the findings by name, what went wrong."""
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    two = ranks()
    code, printed = two.run(script, file)
    if code:
        ranks.cache_clear()  # one rank has died, and torchrun has ended the other
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith('{"name"')]
    return code, {row["name"]: row["found"] for row in rows}, two.errors()


def write(path: Path, text: str) -> None:
    """A file that is not seen before it is whole."""
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.rename(path)


def serve(folder: Path) -> None:
    """Take requests in their order until the folder says that it is the end."""
    import torch

    from minidiffusion.training import parallel

    number, parent = 0, os.getppid()
    with parallel.joined(torch.device("cpu")) as world:
        while not (folder / "end").exists() and os.getppid() == parent:
            request = folder / f"request-{number}"
            if not request.exists():
                time.sleep(0.02)
                continue
            script, file = json.loads(request.read_text())
            sys.argv = [script, file]
            answer = folder / f"answer-{number}-{world.rank}"
            with answer.with_suffix(".printed").open("w") as out, redirect_stdout(out):
                runpy.run_path(script, run_name="__main__")
            answer.with_suffix(".printed").rename(answer)
            number += 1


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
