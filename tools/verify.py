"""Check latent shards against their manifest: hashes, counts, statistics, labels, keys that are there twice, numbers that
are not finite; and look at some of them, decoded.

examples:
  python tools/verify.py shards=my/latents
  python tools/verify.py shards=my/latents sheet=my/sheet.png
  python tools/verify.py shards=my/latents sheet=my/sheet.png autoencoder=my/vae pictures=100
"""

import sys

from ldm_smd.cli import run_tool
from ldm_smd.config import VerifyConfig
from ldm_smd.data.verify import verify

if __name__ == "__main__":
    sys.exit(run_tool(VerifyConfig, verify, __doc__))
