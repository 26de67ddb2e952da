"""The demo: encode, train on from the shipped weights, sample, and write a report to look at.

examples:
  python tools/demo.py --config configs/demo.yaml
  python tools/demo.py --config configs/demo.yaml images=20000 output=outputs/longer
  python tools/demo.py --config configs/demo.yaml --dry-run
"""

import sys

from ldm_smd.cli import run_tool
from ldm_smd.config import DemoConfig
from ldm_smd.demo import demo

if __name__ == "__main__":
    sys.exit(run_tool(DemoConfig, demo, __doc__))
