"""Fixtures of the image benchmarks."""

import pytest
import torch

from ldm_smd.models.feature_network import FeatureNetwork


@pytest.fixture
def yardstick_settings(image_folder, tmp_path):
    """Settings of YardstickConfig: the tiny images, and features of an untrained network."""
    torch.manual_seed(0)
    FeatureNetwork((8, 16), {"shapes": 2}).save_pretrained(tmp_path / "features")
    sources = [f"{part}.{key}" for part in ("images", "held_out") for key in (f"source={image_folder}", "resolution=16")]
    return ["name=shapes", f"features={tmp_path / 'features'}", *sources]
