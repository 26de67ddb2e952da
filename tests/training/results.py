"""What a run leaves behind, read back."""

import pytest
from safetensors.torch import load_file

from ldm_smd.training.metrics_log import read_metrics

WEIGHTS = "diffusion_pytorch_model.safetensors"


def weights(folder):
    return load_file(folder / WEIGHTS)


def logged_losses(folder):
    return [(line["images_seen"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def assert_same_losses(one, other):
    """But for rounding."""
    first, second = dict(logged_losses(one)), dict(logged_losses(other))
    assert first.keys() == second.keys() and all(second[n] == pytest.approx(first[n], rel=1e-4) for n in first)
