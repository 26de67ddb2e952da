"""Fit the Gaussians of the latents that TeleportScheduler starts from: mean and covariance, for each class and for all.

One pass over the shards. The output is a model folder as the input, with a gaussian part and TeleportScheduler as its
scheduler.

examples:
  python tools/fit_gaussian.py model=outputs/demo/vanilla/model shards=outputs/demo/latents output=outputs/teleport
  python tools/fit_gaussian.py model=outputs/demo/vanilla/model shards=outputs/demo/latents output=outputs/gm components=256
  python tools/sample.py model=outputs/teleport output=outputs/teleport-samples steps=8
"""

import sys

from ldm_smd.cli import run_tool
from ldm_smd.config import FitGaussianConfig
from ldm_smd.training.gaussian import fit_gaussian

if __name__ == "__main__":
    sys.exit(run_tool(FitGaussianConfig, fit_gaussian, __doc__))
