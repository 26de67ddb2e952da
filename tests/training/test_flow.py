"""Flow matching with all tools: training on its path, and sampling with schedulers of both paths."""

import diffusers
import pytest
import torch

from ldm_smd.diffusion.process import RectifiedFlow
from ldm_smd.pipelines import SMDPipeline, load_pipeline
from ldm_smd.schedulers import make_scheduler
from ldm_smd.training.checkpoint import checkpoints
from ldm_smd.training.fit_gaussian import fit_gaussian
from ldm_smd.training.loop import train
from ldm_smd.training.settings import FitGaussianConfig, TrainMomentsConfig
from ldm_smd.training.train_moments import train_moments
from tests.rounding import nearly_equal
from tests.training.results import logged_losses, weights

FLOW = "diffusion.path=flow"
GAUSSIAN = (FLOW, "model.z_channels=0", "objective.name=mse")


@pytest.fixture
def flow_model(train_config, tmp_path):
    """The folder of a Gaussian model that was trained with flow matching."""
    return train(train_config(*GAUSSIAN, "images_total=16", f"output={tmp_path / 'gaussian'}"))


def sample(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline([0, 1], generator=torch.Generator().manual_seed(0), output_type="latent", **options).images


def test_the_path_setting_determines_process_scheduler_and_prediction_type(open_run):
    run = open_run(FLOW)
    assert isinstance(run.process(), RectifiedFlow) and run.config.diffusion.predicts == "flow_prediction"
    assert isinstance(run.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    assert open_run().config.diffusion.predicts == "v_prediction"


def test_a_mixture_trained_with_flow_matching_resumes(train_config, tmp_path):
    """Its fitted noise covers all timesteps of the path."""
    train(train_config(FLOW, "model.noise_rank=8", "images_total=32", f"output={tmp_path / 'stopped'}"))
    for name in ("stopped", "straight"):
        folder = train(train_config(FLOW, "model.noise_rank=8", f"output={tmp_path / name}"))
    found = [weights(checkpoints(tmp_path / name / "checkpoints")[-1] / "model") for name in ("straight", "stopped")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert logged_losses(tmp_path / "straight") == logged_losses(tmp_path / "stopped")
    pipeline = load_pipeline(folder)
    assert pipeline.unet.mixture.noise.is_fitted and len(pipeline.unet.mixture.noise.norms) == 1001
    assert torch.isfinite(sample(pipeline, num_inference_steps=2)).all()


@pytest.mark.parametrize("objective", ["regression", "distillation"])
def test_a_mixture_learns_from_a_flow_matching_teacher(train_config, flow_model, objective):
    draws = ("objective.draws=1", "model.noise_rank=0", "objective.distillation.pure_noise_fraction=0.5")
    settings = (f"objective.name={objective}", *draws)
    folder = train(train_config(FLOW, f"init_from={flow_model / 'unet'}", "images_total=32", *settings))
    assert torch.isfinite(sample(load_pipeline(folder), num_inference_steps=2)).all()


@pytest.mark.parametrize(
    "name",
    ["FlowMatchEulerDiscreteScheduler:shift=3.0", "FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler", "DDPMScheduler"],
)
def test_a_flow_model_is_sampled_with_any_scheduler(flow_model, name, tmp_path):
    """Saved with another scheduler and loaded, it samples the same, because the folder also has the training scheduler."""
    pipeline = load_pipeline(flow_model)
    pipeline.scheduler = make_scheduler(name, pipeline.scheduler)
    found = sample(pipeline, num_inference_steps=4)
    pipeline.save_pretrained(tmp_path / "saved")
    again = load_pipeline(tmp_path / "saved")
    assert type(again.scheduler) is type(pipeline.scheduler)
    assert isinstance(again.training_scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    assert nearly_equal(sample(again, num_inference_steps=4), found)
    image = torch.rand(2, 3, 16, 16)
    assert torch.isfinite(sample(again, num_inference_steps=4, image=image, strength=0.5)).all()


def test_both_paths_converge_to_the_same_latents(flow_model, model_folder):
    """Their probability flows are equivalent, so with many steps the same noise gives the same latents."""
    for folder in (flow_model, model_folder):
        pipeline, found = load_pipeline(folder), []
        pipeline.unet = pipeline.unet if not pipeline.unet.is_mixture else with_constant_eta(pipeline.unet)
        for name in ("FlowMatchHeunDiscreteScheduler", "EulerDiscreteScheduler:use_karras_sigmas=true"):
            pipeline.scheduler = make_scheduler(name, pipeline.scheduler)
            found.append(sample(pipeline, num_inference_steps=200))
        assert (found[0] - found[1]).square().mean() < 1e-3 * found[0].square().mean()


def with_constant_eta(unet):
    """Make the network use eta = 0 for all draws, and return it."""
    unet.mixture.draw_ = unet.mixture.draw
    unet.mixture.draw = lambda eta, *others: unet.mixture.draw_(torch.zeros_like(eta), *others)
    return unet


def test_gaussians_and_moment_heads_are_fitted_to_a_flow_model(flow_model, shards, tmp_path):
    """TeleportScheduler and GMSScheduler then sample it on a noise schedule."""
    fitted = fit_gaussian(
        FitGaussianConfig(model=str(flow_model), shards=str(shards), output=str(tmp_path / "gaussians"), sigma_skip=3.0)
    )
    pipeline = load_pipeline(fitted)
    assert type(pipeline.scheduler).__name__ == "TeleportScheduler" and pipeline.scheduler.config.sigma_skip == 3.0
    assert torch.isfinite(sample(pipeline, num_inference_steps=2)).all()
    length = {"images_total": 16, "batch_size": 8}
    heads = train_moments(
        TrainMomentsConfig(model=str(flow_model), shards=str(shards), output=str(tmp_path / "heads"), **length)
    )
    pipeline = load_pipeline(heads)
    assert type(pipeline.scheduler).__name__ == "GMSScheduler"
    assert torch.isfinite(sample(pipeline, num_inference_steps=2)).all()


def test_pred_original_sample_equals_that_of_callbacks(flow_model):
    pipeline, seen = load_pipeline(flow_model), []
    pipeline.scheduler = make_scheduler("DDIMScheduler", pipeline.scheduler)
    names = ["sample", "pred_original_sample"]
    sample(
        pipeline,
        num_inference_steps=2,
        callback_on_step_end=lambda _, index, t, tensors: seen.append((t, dict(tensors))) or {},
        callback_on_step_end_tensor_inputs=names,
    )
    for t, tensors in seen:
        assert nearly_equal(pipeline.pred_original_sample(tensors["sample"], t, [0, 1]), tensors["pred_original_sample"])


def test_without_a_training_scheduler_the_scheduler_is_used(model_folder, tmp_path):
    """Older model folders have none."""
    pipeline = load_pipeline(model_folder)
    components = {name: each for name, each in pipeline.components.items() if name != "training_scheduler"}
    assert SMDPipeline(**components).training_scheduler is pipeline.scheduler
