"""Sample pictures from a trained model.

examples:
  python tools/sample.py model=outputs/demo/smd/model output=outputs/samples
  python tools/sample.py model=outputs/demo/smd/model output=outputs/flags classes=[Flags,Symbols] per_class=16 steps=4
  python tools/sample.py model=outputs/demo/smd/model output=outputs/free classes=[] per_class=64
  python tools/sample.py model=outputs/demo/vanilla/model output=outputs/ddim scheduler=DDIMScheduler guidance_scale=2
  python tools/sample.py model=outputs/demo/smd/model output=outputs/sde steps=16 \\
      scheduler=DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++
  python tools/sample.py model=outputs/demo/smd/model output=outputs/from-sketch image=sketch.png strength=0.6 steps=16
  python tools/sample.py model=my/run/model output=outputs/guided guide=my/run/checkpoints/images-000000200000/ema \\
      guidance_scale=2 guidance_interval=[0.3,5]
  python tools/sample.py model=my/like/model output=outputs/text text="a red balloon" clip=open_clip:ViT-B-32:laion2b_s34b_b79k
"""

import sys

from ldm_smd.cli import run_tool
from ldm_smd.config import SampleConfig
from ldm_smd.sampling import sample

if __name__ == "__main__":
    sys.exit(run_tool(SampleConfig, sample, __doc__))
