"""Average a run's weights over a share of its training, chosen afterwards (post-hoc EMA).

examples:
  python tools/train.py --config my/train.yaml ema_widths=[0.05,0.1]
  python tools/average.py run=my/run sigma_rel=0.12 output=my/average
  python tools/average.py run=my/run sigma_rel=0.07 images=150000 output=my/earlier
  python tools/sample.py model=my/average output=my/samples
"""

import sys

from ldm_smd.cli import run_tool
from ldm_smd.config import AverageConfig
from ldm_smd.training.average import average

if __name__ == "__main__":
    sys.exit(run_tool(AverageConfig, average, __doc__))
