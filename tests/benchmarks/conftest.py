"""Fixtures of the benchmarks."""

import pytest
import torch
from few_step.method import Latents
from few_step.network import start_from

from ldm_smd.models.feature_network import FeatureNetwork
from tests.benchmarks.tiny_start import tiny_unet


@pytest.fixture
def yardstick_settings(image_folder, tmp_path):
    """Settings of YardstickConfig: the tiny images, and features of an untrained network."""
    torch.manual_seed(0)
    FeatureNetwork((8, 16), {"shapes": 2}).save_pretrained(tmp_path / "features")
    sources = [f"{part}.{key}" for part in ("images", "held_out") for key in (f"source={image_folder}", "resolution=16")]
    return ["name=shapes", f"features={tmp_path / 'features'}", *sources]


@pytest.fixture
def latents():
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(40, 2, 3, 4, 4, generator=generator)
    return Latents(moments, torch.arange(40) % 2, 2)


@pytest.fixture
def start(latents):
    start = start_from(tiny_unet())
    start.latents, start.labels = latents.moments[:, 0], latents.labels
    return start
