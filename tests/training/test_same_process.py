"""An initial model or teacher with another diffusion process is refused, with a message that gives the right settings."""

import pytest
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from ldm_smd.diffusion.settings import DiffusionConfig
from ldm_smd.errors import UserError
from ldm_smd.training.loop import train
from ldm_smd.training.same_process import check_process
from tests.tiny import diffusers_unet

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def refusal(tmp_path, scheduler, config):
    """Return the message of the UserError for a network beside this scheduler."""
    scheduler.save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UserError) as error:
        check_process(config, tmp_path / "unet", "init_from")
    return str(error.value)


def test_the_message_gives_the_right_settings(tmp_path):
    message = refusal(tmp_path, PNDMScheduler(**STABLE_DIFFUSION), DiffusionConfig())
    wanted = (
        "diffusion.path=variance_preserving diffusion.num_train_timesteps=1000 diffusion.beta_schedule=scaled_linear "
        "diffusion.beta_start=0.00085 diffusion.beta_end=0.012 diffusion.prediction_type=epsilon"
    )
    assert message.startswith(f"init_from: expected {wanted}, as in the scheduler beside the network in ")
    assert message.endswith(
        "found diffusion.path=variance_preserving diffusion.num_train_timesteps=1000 diffusion.beta_schedule=cosine "
        "diffusion.prediction_type=v_prediction"
    )
    check_process(DiffusionConfig(prediction_type="epsilon", **STABLE_DIFFUSION), tmp_path / "unet", "init_from")


def test_other_prediction_types_and_paths_are_refused(tmp_path):
    assert "diffusion.prediction_type=epsilon, as in" in refusal(
        tmp_path, DDPMScheduler(beta_schedule="squaredcos_cap_v2"), DiffusionConfig(beta_schedule="squaredcos_cap_v2")
    )
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    message = refusal(tmp_path, flow, DiffusionConfig())
    assert "expected diffusion.path=flow diffusion.num_train_timesteps=1000, as in" in message
    check_process(DiffusionConfig(path="flow"), tmp_path / "unet", "init_from")
    unknown = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert "expected a noise schedule that the settings of diffusion can express" in refusal(
        tmp_path, unknown, DiffusionConfig()
    )


def test_without_a_scheduler_nothing_is_checked(tmp_path):
    check_process(DiffusionConfig(), tmp_path / "unet", "init_from")
    (tmp_path / "scheduler").mkdir()
    for content in ("", "[]", "{}", '{"_class_name": "Nothing"}', '{"_class_name": "UNet2DModel"}'):
        (tmp_path / "scheduler/scheduler_config.json").write_text(content)
        check_process(DiffusionConfig(), tmp_path / "unet", "init_from")


def test_training_checks_the_initial_model_and_the_teacher(train_config, tmp_path):
    diffusers_unet().save_pretrained(tmp_path / "unet")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    start = f"init_from={tmp_path}"
    with pytest.raises(UserError, match=r"init_from: expected .*beta_schedule=linear .*prediction_type=epsilon, as in"):
        train(train_config(start))
    fitting = ("diffusion.beta_schedule=linear", "diffusion.prediction_type=epsilon", "images_total=8")
    assert train(train_config(start, *fitting)).is_dir()
    teacher = ("objective.name=distillation", f"objective.distillation.teacher={tmp_path}", f"output={tmp_path / 'other'}")
    with pytest.raises(UserError, match=r"objective\.distillation\.teacher: expected .*beta_schedule=linear"):
        train(train_config(*teacher))
