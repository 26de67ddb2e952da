"""Run the tools on a simulated GPU (pretend_gpu.py) and compare results with those on the CPU.

test_gpu.py runs python tests/gpu_run.py MODEL GAUSSIAN CONDITIONAL CLIP SHARDS VAE IMAGES OUTPUT. All checks run in one
process, and their results are written to OUTPUT/outcomes.json.
"""

import functools
import json
import sys
import traceback
from collections import Counter
from pathlib import Path

import pretend_gpu
import tiny
import torch
from accelerate.state import AcceleratorState
from pretend_gpu import DEVICE

from ldm_smd.apps.explorer import Explorer, Request
from ldm_smd.apps.settings import ExploreConfig
from ldm_smd.config import load_config
from ldm_smd.data.encode import encode
from ldm_smd.data.settings import EncodeConfig
from ldm_smd.data.shards import Manifest
from ldm_smd.evaluation.evaluate import evaluate
from ldm_smd.evaluation.settings import EvaluateConfig
from ldm_smd.pipelines import load_pipeline, seeded_generators
from ldm_smd.sampling.settings import SampleConfig
from ldm_smd.sampling.tool import sample
from ldm_smd.schedulers import make_scheduler
from ldm_smd.training.average import average
from ldm_smd.training.fit_gaussian import fit_gaussian
from ldm_smd.training.loop import train
from ldm_smd.training.settings import (
    AverageConfig,
    FitGaussianConfig,
    TrainAutoencoderConfig,
    TrainClassifierConfig,
    TrainConfig,
    TrainMomentsConfig,
)
from ldm_smd.training.train_autoencoder import train_autoencoder
from ldm_smd.training.train_classifier import train_classifier
from ldm_smd.training.train_moments import train_moments

MODEL, GAUSSIAN, CONDITIONAL, CLIP, SHARDS, VAE, IMAGES, OUTPUT = sys.argv[1:]
OUTPUT = Path(OUTPUT)
SOURCE = [f"images.source={IMAGES}", "images.resolution=16"]
CHECKS = {}


def check(function):
    """Add a function to the checks, under its name."""
    CHECKS[function.__name__] = function
    return function


def sample_images(folder, device, scheduler=None, offload=False, guide=None, **options):
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    if guide is not None:
        pipeline.register_modules(guide=load_pipeline(guide).unet)
    if scheduler:
        pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler)
    if offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt", **options}
    found = pipeline([0, 1], generator=seeded_generators([5, 6]), **options).images
    assert found.device.type == torch.device(device).type
    if offload:
        assert pipeline.unet.device.type == "cpu"
    return found.cpu()


def assert_close(a, b, tolerance=1e-3):
    assert a.shape == b.shape and torch.allclose(a, b, atol=tolerance), float((a - b).abs().max())


def run_tool(schema, main, *settings):
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
    return main(load_config(schema, None, list(map(str, settings))))


def run_training(output, *more):
    """Train for four steps, with samples, checkpoints and reports."""
    often = ["images_total=32", "sample_every_images=16", "checkpoint_every_images=16", "log_every_images=8", "num_workers=0"]
    run_tool(TrainConfig, train, *tiny.training(SHARDS, VAE, OUTPUT / output, *often, *more))


def assert_no_waits_for_more_steps(act, few, many):
    """Assert that the host waits for the device equally often in ``act(few)`` and in ``act(many)``, which takes more steps."""
    waits = []
    for steps in (few, many):
        pretend_gpu.waits.clear()
        act(steps)
        waits.append(Counter(pretend_gpu.waits))
    assert waits[0], "nothing was done on the device"
    assert waits[0].total() == waits[1].total(), f"the host waits for the device in each step: {waits[1] - waits[0]}"


@functools.cache
def fitted():
    """Fit Gaussians of the latents to the Gaussian model."""
    return run_tool(
        FitGaussianConfig, fit_gaussian, f"model={GAUSSIAN}", f"shards={SHARDS}", "rank=4", f"output={OUTPUT / 'fitted'}"
    )


@functools.cache
def fitted_with_moments():
    """Train moment heads for the model of ``fitted``."""
    few = ["images_total=16", "batch_size=8"]
    return run_tool(
        TrainMomentsConfig, train_moments, f"model={fitted()}", f"shards={SHARDS}", *few, f"output={OUTPUT / 'both'}"
    )


@check
def fits_gaussians():
    assert fitted().is_dir()


@check
def trains_moments():
    assert fitted_with_moments().is_dir()


def samples_the_same(folder, **options):
    """Compare samples with those on the CPU, also with CPU offload."""
    expected = sample_images(folder, "cpu", **options)
    assert_close(sample_images(folder, DEVICE, offload=True, **options), expected)
    found = {}
    assert_no_waits_for_more_steps(
        lambda steps: found.update({steps: sample_images(folder, DEVICE, **options, num_inference_steps=steps)}), 3, 5
    )
    assert_close(found[3], expected)


@check
def samples():
    samples_the_same(MODEL)


@check
def samples_by_an_sde_solver():
    samples_the_same(MODEL, scheduler="DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++")


@check
def samples_guided_at_some_noise_levels():
    samples_the_same(MODEL, scheduler="EulerAncestralDiscreteScheduler", guidance_interval=(0.3, 5.0))


@check
def samples_from_an_image():
    samples_the_same(MODEL, scheduler="HeunDiscreteScheduler", image=torch.rand(2, 3, 16, 16))


@check
def samples_guided_by_another_network():
    samples_the_same(MODEL, guide=GAUSSIAN)


@check
def samples_by_teleport():
    samples_the_same(fitted_with_moments())


@check
def samples_by_gms():
    samples_the_same(fitted_with_moments(), scheduler="GMSScheduler")


@check
def samples_by_teleport_and_gms_from_an_image():
    samples_the_same(
        fitted_with_moments(), scheduler="TeleportScheduler:scheduler=GMSScheduler", image=torch.rand(2, 3, 16, 16)
    )


@check
def trains_resumes_and_averages():
    settings = ["ema_widths=[0.05,0.1]", "gradient_checkpointing=true", "micro_batches=2", "cooldown_images=8"]
    for images in (16, 32):
        run_training("trained", *settings, f"images_total={images}")
    run_tool(AverageConfig, average, f"run={OUTPUT / 'trained'}", "sigma_rel=0.07", f"output={OUTPUT / 'average'}")


@check
def trains_without_waiting():
    rare = ["log_every_images=1000", "sample_every_images=1000", "checkpoint_every_images=1000"]
    assert_no_waits_for_more_steps(lambda images: run_training(f"{images}", *rare, f"images_total={images}"), 16, 32)


@check
def distils_without_waiting():
    rare = ["log_every_images=1000", "sample_every_images=1000", "checkpoint_every_images=1000"]
    settings = [f"init_from={GAUSSIAN}/unet", "objective.name=distillation", *rare]
    assert_no_waits_for_more_steps(lambda images: run_training(f"distil-{images}", *settings, f"images_total={images}"), 16, 32)


@check
def encodes():
    few = ["shard_size=8", "batch_size=4", "num_workers=0", f"embedding={CLIP}", f"output={OUTPUT / 'shards'}"]
    again = run_tool(EncodeConfig, encode, *SOURCE, f"autoencoder={VAE}", *few)
    assert_close(*(torch.tensor([shard["mean"] for shard in each.shards]) for each in (again, Manifest.load(SHARDS))))


@check
def samples_from_a_text_prompt():
    request = ["prompt=a disc", f"clip={CLIP}", "per_class=2", "steps=2", f"output={OUTPUT / 'samples'}"]
    run_tool(SampleConfig, sample, f"model={CONDITIONAL}", *request)


@check
def explores():
    explorer = run_tool(ExploreConfig, Explorer, f"models.a={CONDITIONAL}", f"models.b={CONDITIONAL}", f"clip={CLIP}")
    request = Request(steps=2, embedding=explorer.embedding(None, "a square"))
    [samples, _] = explorer.sample(request, lambda fraction: None).values()
    explorer.filmstrip("a", samples.frames)
    explorer.draws(samples.frames[0], request)


@check
def evaluates():
    real = [f"reference.source={IMAGES}", "reference.resolution=16", f"held_out={IMAGES}"]
    run_tool(
        EvaluateConfig, evaluate, *real, f"model={MODEL}", "num_samples=12", "steps=2", f"output={OUTPUT / 'evaluation.json'}"
    )


@check
def trains_a_classifier():
    images = f"{{source: '{IMAGES}', resolution: 16}}"
    one_set = f"sets=[{{name: a, batch_size: 8, images: {images}, held_out: {images}}}]"
    run_tool(TrainClassifierConfig, train_classifier, one_set, "images_total=16", f"output={OUTPUT / 'classifier'}")


@check
def trains_an_autoencoder():
    held_out = [f"held_out.source={IMAGES}", "held_out.resolution=16", f"work={OUTPUT / 'work'}", f"output={OUTPUT / 'vae'}"]
    few = ["images_total=16", "batch_size=8"]
    run_tool(TrainAutoencoderConfig, train_autoencoder, *SOURCE, *held_out, *tiny.TINY_AUTOENCODER, *few)


def outcome(function):
    """Run a check; returns None or its traceback."""
    try:
        function()
    except Exception:
        return traceback.format_exc()


(OUTPUT / "outcomes.json").write_text(json.dumps({name: outcome(function) for name, function in CHECKS.items()}))
