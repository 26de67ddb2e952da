"""What several trainings are tested with."""

import pytest
import torch
from accelerate import Accelerator

from ldm_smd.config import load_config
from ldm_smd.training.run import Run
from ldm_smd.training.settings import TrainAutoencoderConfig
from tests.tiny import TINY_AUTOENCODER


@pytest.fixture
def open_run(train_config):
    """A function from overrides to the Run of the tiny training."""
    return lambda *overrides: Run.open(train_config(*overrides), Accelerator())


@pytest.fixture
def distillation(gaussian_folder):
    """Settings of a distillation from the Gaussian model."""
    return f"init_from={gaussian_folder / 'unet'}", "objective.name=distillation", "objective.draws=1"


@pytest.fixture
def distil(train_config, distillation):
    return lambda *overrides: train_config(*distillation, *overrides)


@pytest.fixture
def adamw_steps(monkeypatch):
    """(loss, whether there were gradients before it, their norm after it) of every step of an AdamW."""
    found, parameters = [], []
    start, backward, step = torch.optim.AdamW.__init__, torch.Tensor.backward, torch.optim.AdamW.step

    def starting(self, given, **options):
        parameters[:] = list(given)
        start(self, parameters, **options)

    def going_back(self, *given, **options):
        found.append([self.item(), any(parameter.grad is not None for parameter in parameters)])
        backward(self, *given, **options)

    def stepping(self, *given, **options):
        gradients = [parameter.grad.square().sum() for parameter in parameters if parameter.grad is not None]
        found[-1].append(torch.stack(gradients).sum().sqrt().item())
        return step(self, *given, **options)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", starting)
    monkeypatch.setattr(torch.Tensor, "backward", going_back)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    return found


@pytest.fixture
def vae_config(pictures, tmp_path):
    """A function from overrides to the settings of a training of four steps, into tmp_path/vae."""

    def build(*overrides):
        images = [f"{part}.{key}" for part in ("images", "held_out") for key in (f"source={pictures}", "resolution=16")]
        counts = ["images_total=32", "batch_size=8", "warmup_images=16", "ema_halflife_images=8"]
        places = [f"output={tmp_path / 'vae'}", f"work={tmp_path / 'work'}"]
        return load_config(TrainAutoencoderConfig, None, [*images, *counts, *TINY_AUTOENCODER, *places, *overrides])

    return build
