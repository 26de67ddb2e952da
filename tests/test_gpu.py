"""Tools run on a simulated GPU (pretend_gpu.py), which finds tensors that were left on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

from ldm_smd.config import load_config
from ldm_smd.training.loop import train
from ldm_smd.training.settings import TrainConfig
from tests.tiny import training

SCRIPT = Path(__file__).parent / "gpu_run.py"
CHECKS = [
    "fits_gaussians",
    "trains_moments",
    "samples",
    "samples_by_an_sde_solver",
    "samples_guided_at_some_noise_levels",
    "samples_from_an_image",
    "samples_guided_by_another_network",
    "samples_by_teleport",
    "samples_by_gms",
    "samples_by_teleport_and_gms_from_an_image",
    "trains_resumes_and_averages",
    "trains_without_waiting",
    "distils_without_waiting",
    "encodes",
    "samples_from_a_text_prompt",
    "explores",
    "evaluates",
    "trains_a_classifier",
    "trains_an_autoencoder",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("gpu"),  # their common fixture runs once
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="needs a torch that supports devices written in Python",
    ),
]


@pytest.fixture(scope="module")
def outcomes(model_folder, embedded, clip, shards, vae_folder, image_folder, tmp_path_factory):
    """The result of each check: None, or a traceback. All checks run in one process."""
    output = tmp_path_factory.mktemp("gpu")

    def trained(name, data, *settings):
        settings = training(data, vae_folder, output / name, "images_total=16", *settings)
        return train(load_config(TrainConfig, None, settings))

    gaussian = trained("gaussian", shards, "model.z_channels=0", "objective.name=mse", "seed=1")
    conditional = trained("conditional", embedded, "image_conditional=true")
    folders = [model_folder, gaussian, conditional, clip, shards, vae_folder, image_folder, output]
    subprocess.run([sys.executable, SCRIPT, *folders], check=True, timeout=1800)
    return json.loads((output / "outcomes.json").read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_passes_on_the_simulated_gpu(outcomes, check):
    assert outcomes[check] is None, outcomes[check]


def test_every_check_has_a_test(outcomes):
    assert list(outcomes) == CHECKS
