"""Fit Gaussians to the latents, for TeleportScheduler."""

import sys

from ldm_smd.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("fit-gaussian"))
