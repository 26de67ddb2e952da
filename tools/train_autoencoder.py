"""Train a small AutoencoderKL on your own pictures.

examples:
  python tools/train_autoencoder.py --config configs/autoencoder/emoji.yaml
  python tools/train_autoencoder.py --config configs/autoencoder/emoji.yaml images.source=my/pictures output=my/vae
  python tools/train_autoencoder.py --config configs/autoencoder/emoji.yaml --dry-run
"""

import sys

from ldm_smd.cli import run_tool
from ldm_smd.config import TrainAutoencoderConfig
from ldm_smd.training.autoencoder import train_autoencoder

if __name__ == "__main__":
    sys.exit(run_tool(TrainAutoencoderConfig, train_autoencoder, __doc__))
