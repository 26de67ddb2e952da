"""Train the feature network that tools/evaluate.py uses."""

import sys

from ldm_smd.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("train-classifier"))
