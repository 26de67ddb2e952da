"""Fixtures for the tests of training."""

import signal

import pytest
import torch
from accelerate import Accelerator

from ldm_smd.config import load_config
from ldm_smd.training.run import Run
from ldm_smd.training.settings import TrainAutoencoderConfig
from tests.tiny import TINY_AUTOENCODER


@pytest.fixture
def open_run(train_config):
    """A function that opens the Run of the tiny training, with overrides."""
    return lambda *overrides: Run.open(train_config(*overrides), Accelerator())


@pytest.fixture
def distillation(gaussian_folder):
    """Settings that distil a mixture from the Gaussian model."""
    return f"init_from={gaussian_folder / 'unet'}", "objective.name=distillation", "objective.draws=1"


@pytest.fixture
def distil(train_config, distillation):
    return lambda *overrides: train_config(*distillation, *overrides)


@pytest.fixture
def foreground():
    """Ctrl-C has its usual effect. A shell that runs the tests in its background lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def adamw_steps(monkeypatch):
    """For every step of AdamW: (loss, whether there were gradients before the backward pass, their norm after it)."""
    found, parameters = [], []
    init, backward, step = torch.optim.AdamW.__init__, torch.Tensor.backward, torch.optim.AdamW.step

    def recording_init(self, params, **options):
        parameters[:] = list(params)
        init(self, parameters, **options)

    def recording_backward(self, *args, **options):
        found.append([self.item(), any(parameter.grad is not None for parameter in parameters)])
        backward(self, *args, **options)

    def recording_step(self, *args, **options):
        gradients = [parameter.grad.square().sum() for parameter in parameters if parameter.grad is not None]
        found[-1].append(torch.stack(gradients).sum().sqrt().item())
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", recording_init)
    monkeypatch.setattr(torch.Tensor, "backward", recording_backward)
    monkeypatch.setattr(torch.optim.AdamW, "step", recording_step)
    return found


@pytest.fixture
def vae_config(image_folder, tmp_path):
    """A function that returns settings of a training of four steps, with overrides. Its output is tmp_path/vae."""

    def build(*overrides):
        images = [f"{part}.{key}" for part in ("images", "held_out") for key in (f"source={image_folder}", "resolution=16")]
        counts = ["images_total=32", "batch_size=8", "warmup_images=16", "ema_halflife_images=8"]
        folders = [f"output={tmp_path / 'vae'}", f"work={tmp_path / 'work'}"]
        return load_config(TrainAutoencoderConfig, None, [*images, *counts, *TINY_AUTOENCODER, *folders, *overrides])

    return build
