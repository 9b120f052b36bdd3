"""Commands that torchrun starts on each of its ranks: ``rank_command.py CASES.json``."""

import json
import sys
from pathlib import Path

from minidiffusion.cli.main import main

if __name__ == "__main__":
    for words in json.loads(Path(sys.argv[1]).read_text()).values():
        main(words)
