"""A local page for trained models, side by side: class, steps, scheduler, seed, guidance; the way of a picture; draws of eta.

Needs the package gradio: pip install 'gradio>=6'.

examples:
  python tools/explore.py --config configs/explore.yaml
  python tools/explore.py models.mine=my/run/model port=8000
  python tools/explore.py models.like=my/like/model clip=open_clip:ViT-B-32:my/clip.safetensors
"""

import sys

from ldm_smd.cli import run_tool
from ldm_smd.config import ExploreConfig
from ldm_smd.explore import explore

if __name__ == "__main__":
    sys.exit(run_tool(ExploreConfig, explore, __doc__))
