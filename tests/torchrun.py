"""Two processes of torchrun, and what the first of them finds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def launch(script: Path, folder: Path, cases: dict[str, Any]) -> tuple[int, dict[str, Any], str]:
    """Run a script's cases on two ranks; the exit code, the findings by name, what went wrong."""
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--standalone", str(script), str(file)]
    places = os.pathsep.join([str(Path.cwd()), str(Path(__file__).parent)])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": places},
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    return done.returncode, {row["name"]: row["found"] for row in rows}, done.stderr[-3000:]
