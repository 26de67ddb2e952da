"""Train an SMD UNet (or the Gaussian baseline) from latent shards.

examples:
  python tools/train.py --config configs/train/emoji-smd.yaml
  python tools/train.py --config configs/train/emoji-smd.yaml model.latent_channels=0 objective.name=mse output=outputs/vanilla
  python tools/train.py --config configs/train/emoji-smd.yaml --dry-run
  accelerate launch --num_processes 8 tools/train.py --config configs/train/emoji-smd.yaml
"""

import sys

from ldm_smd.cli import run_tool
from ldm_smd.config import TrainConfig
from ldm_smd.training.loop import train

if __name__ == "__main__":
    sys.exit(run_tool(TrainConfig, train, __doc__))
