"""Compare trained models side by side on a local web page."""

import sys

from ldm_smd.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("explore"))
