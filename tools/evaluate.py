"""Measure pictures against real ones: Frechet distance, KID, CMMD, precision, recall, density and coverage, in the features of
any networks. A distance is named after its network; only that of Inception is an FID.

examples:
  python tools/evaluate.py --config configs/evaluate/emoji.yaml model=outputs/demo/smd/model output=outputs/smd.json
  python tools/evaluate.py reference.source=my/pictures reference.resolution=256 pictures=my/samples output=my/result.json \\
      features=[open_clip:ViT-L-14-336:openai,dinov2:vit_large_patch14_dinov2:lvd142m]
  accelerate launch tools/evaluate.py --config configs/evaluate/emoji.yaml model=my/run/model count=50000 labels=balanced \\
      output=my/result.json
"""

import sys

from ldm_smd.cli import run_tool
from ldm_smd.config import EvaluateConfig
from ldm_smd.evaluation.evaluate import evaluate

if __name__ == "__main__":
    sys.exit(run_tool(EvaluateConfig, evaluate, __doc__))
