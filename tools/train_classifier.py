"""Train the small classifier whose features pictures are measured in.

examples:
  python tools/train_classifier.py --config configs/classifier.yaml
  python tools/train_classifier.py --config configs/classifier.yaml output=outputs/classifier images_total=20000
  python tools/train_classifier.py --config configs/classifier.yaml --dry-run
"""

import sys

from ldm_smd.cli import run_tool
from ldm_smd.config import TrainClassifierConfig
from ldm_smd.training.classifier import train_classifier

if __name__ == "__main__":
    sys.exit(run_tool(TrainClassifierConfig, train_classifier, __doc__))
