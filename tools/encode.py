"""Turn pictures into latent shards for training.

examples:
  python tools/encode.py --config configs/encode/emoji.yaml
  python tools/encode.py images.source=my/pictures images.resolution=256 \\
      autoencoder=stabilityai/sd-vae-ft-mse output=my/latents
  python tools/encode.py --config configs/encode/emoji.yaml --dry-run
"""

import sys

from ldm_smd.cli import run_tool
from ldm_smd.config import EncodeConfig
from ldm_smd.data.encode import encode

if __name__ == "__main__":
    sys.exit(run_tool(EncodeConfig, encode, __doc__))
