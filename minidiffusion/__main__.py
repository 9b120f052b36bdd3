"""`python -m minidiffusion` is the command `minidiffusion`."""

import sys

from minidiffusion.cli.main import main

sys.exit(main())
