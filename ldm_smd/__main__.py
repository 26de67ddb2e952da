"""``python -m ldm_smd``: the console command ldm-smd, also for launchers that start a module."""

import sys

from .cli import CONSOLE, main

if __name__ == "__main__":
    sys.argv[0] = CONSOLE
    sys.exit(main())
