"""The benchmark of full-size networks, run with tiny ones."""

import json
import sys

import denoisers
import pytest
import torch

from ldm_smd.models.extended import plain_config
from ldm_smd.models.extended_condition import ExtendedUNet2DConditionModel
from ldm_smd.models.extended_dit import ExtendedDiTTransformer2DModel
from tests.tiny import MIXTURE, diffusers_condition, diffusers_dit

SIZES = {"sample_size": 8, "in_channels": 4, "num_classes": 1000, **MIXTURE}


def tiny_dit():
    return ExtendedDiTTransformer2DModel(plain_config(diffusers_dit(num_embeds_ada_norm=1000)), tail_blocks=1, **SIZES)


def tiny_unet():
    return ExtendedUNet2DConditionModel(plain_config(diffusers_condition()), **SIZES)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    plain = {name: network.plain for name, network in denoisers.NETWORKS.items()}
    networks = {
        name: denoisers.Network(make, plain[name])
        for name, make in zip(plain, (tiny_dit, tiny_unet, tiny_unet, tiny_unet), strict=True)
    }
    monkeypatch.setattr(denoisers, "NETWORKS", networks)
    monkeypatch.setattr(denoisers, "peak_in_a_process", lambda name, batch: 1.5)
    monkeypatch.setattr(denoisers, "RESULTS", tmp_path)
    return tmp_path


def test_training_and_sampling_are_timed_and_written(tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["denoisers.py", "--rounds", "2"])
    denoisers.main()
    result = json.loads((tiny / "denoisers.json").read_text())
    assert list(result["networks"]) == list(denoisers.NETWORKS) and len(result["targets"]) == 8
    for each in result["networks"].values():
        assert len(each["training_seconds"]) == 2 and len(each["sampling_seconds"]) == 4
        assert each["training_ratio"] > 0 and each["sampling_ratio"] > 0 and each["mixture_parameters"] > 0
    assert "| DiT-XL/2 |" in (tiny / "denoisers.md").read_text()


@pytest.mark.parametrize("name", list(denoisers.NETWORKS))
def test_the_gaussian_model_uses_no_weights_of_the_mixture(tiny, name):
    steps = denoisers.Steps(denoisers.NETWORKS[name], torch.device("cpu"), batch=2)
    steps.training_seconds(denoisers.GAUSSIAN)
    trained = [key for key, parameter in steps.model.named_parameters() if parameter.grad is not None]
    assert trained and not any(key.startswith("mixture.") for key in trained)
    steps.training_seconds(denoisers.MIXTURE)
    assert any(p.grad is not None for key, p in steps.model.named_parameters() if key.startswith("mixture."))
