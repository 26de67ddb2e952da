"""Train what GMSScheduler needs beside a Gaussian model's prediction: the variance and the skew of the step.

The UNet stays as it is; a small head on its last features learns. The output is a model folder as the input, with a moments
part and GMSScheduler as its scheduler.

examples:
  python tools/train_moments.py model=outputs/demo/vanilla/model shards=outputs/demo/latents output=outputs/gms
  python tools/train_moments.py model=my/run/model shards=my/latents output=my/gms images_total=200000 batch_size=256
  python tools/sample.py model=outputs/gms output=outputs/gms-samples steps=10
"""

import sys

from ldm_smd.cli import run_tool
from ldm_smd.config import TrainMomentsConfig
from ldm_smd.training.moments import train_moments

if __name__ == "__main__":
    sys.exit(run_tool(TrainMomentsConfig, train_moments, __doc__))
