"""Read and compare the results of runs."""

import pytest
from safetensors.torch import load_file

from ldm_smd.training.metrics_log import read_metrics

WEIGHTS = "diffusion_pytorch_model.safetensors"


def weights(folder):
    return load_file(folder / WEIGHTS)


def logged_losses(folder):
    return [(line["images_seen"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def logged(folder):
    """Return all logged losses by (images seen, name)."""
    lines = read_metrics(folder / "metrics.jsonl")
    return {(line["images_seen"], name): line[name] for line in lines for name in line if name.endswith("loss")}


def assert_same_losses(one, other, rel=1e-4):
    """Assert that two runs logged the same losses up to rounding, also where a loss is 0."""
    first, second = logged(one), logged(other)
    assert first and first.keys() == second.keys()
    assert all(second[n] == pytest.approx(first[n], rel=rel, abs=1e-9) for n in first), (first, second)
