"""The code accepts every choice of a setting."""

import pytest
import torch

from ldm_smd.data.settings import ImagesConfig
from ldm_smd.device import pick_precision
from ldm_smd.diffusion.objectives import objective, timestep_weight
from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.diffusion.settings import BETA_SCHEDULES, LOSSES, PREDICTION_TYPES, WEIGHTINGS, DiffusionConfig
from ldm_smd.evaluation.evaluate import choose_labels
from ldm_smd.evaluation.settings import SAMPLED_LABELS, EvaluateConfig
from ldm_smd.models.attention import set_attention_backend
from ldm_smd.models.settings import ATTENTION_BACKENDS, PLACEMENTS
from ldm_smd.models.unet import SMDUNet2DModel
from ldm_smd.schedulers.schedule import build_scheduler
from ldm_smd.schema import PRECISIONS


@pytest.mark.parametrize("name", LOSSES)
def test_objectives(name):
    assert objective(name)(torch.ones(3, 2, 1, 2, 2), torch.zeros(3, 1, 2, 2)).shape == (3,)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weightings(weighting, prediction_type):
    process = DiffusionProcess(torch.tensor([0.9, 0.1]))
    assert (timestep_weight(weighting, 1.0, process, torch.tensor([0, 1]), prediction_type) > 0).all()


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_noise_schedules(schedule):
    alphas_cumprod = build_scheduler(DiffusionConfig(beta_schedule=schedule)).alphas_cumprod
    assert (alphas_cumprod.diff() < 0).all() and alphas_cumprod[0] > 0.9 and alphas_cumprod[-1] < 0.1


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placements(placement):
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8, "z_channels": 4}
    assert SMDUNet2DModel(placement=placement, noise_rank=2, noise_modes=2, **sizes).is_mixture


def test_other_names_are_refused():
    with pytest.raises(ValueError, match=r"objective: expected one of mse, energy, mixture_nll"):
        objective("likelihood")
    with pytest.raises(ValueError, match=r"placement: expected one of in_out, up, all"):
        SMDUNet2DModel(placement="down")
    with pytest.raises(ValueError, match=r"attention: expected one of auto, sdpa, xformers"):
        set_attention_backend("flash")


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_attention_backends(backend):
    set_attention_backend(backend)
    set_attention_backend("auto")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision):
    assert pick_precision(precision) in ("no", "bf16")


@pytest.mark.parametrize("labels", SAMPLED_LABELS)
def test_sampled_labels(labels):
    config = EvaluateConfig(output="x", reference=ImagesConfig(source="x"), model="x", num_samples=6, labels=labels)
    assert set(choose_labels(config, [0, 1, 2], 3)) <= {0, 1, 2}
