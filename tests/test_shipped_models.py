"""The pipelines in checkpoints/ consist of the shipped networks, with the autoencoder and noise schedule of their training."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ldm_smd import SMDPipeline
from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.config import load_config
from ldm_smd.data.images import decode
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.data.sources import list_images
from ldm_smd.models.denoiser import is_mixture, predict
from ldm_smd.models.guide import load_guide
from ldm_smd.models.unet import SMDUNet2DModel
from ldm_smd.pipelines import load_pipeline
from ldm_smd.schedulers.conversion import process_of
from ldm_smd.schedulers.schedule import build_scheduler
from ldm_smd.training.coarse_labels import class_names
from ldm_smd.training.settings import TrainConfig
from tests.sampled import latents

ROOT = Path(__file__).parents[1]
SMALL, LARGE = "data/emoji/train.zip", "data/emoji-256/train.zip"


def settings(scheduler):
    """Return the config of a scheduler without its computed betas."""
    return {name: value for name, value in scheduler.config.items() if name[0] != "_" and name != "trained_betas"}


@pytest.mark.parametrize(
    "name, unet, training, source, pixels",
    [
        ("emoji-smd", "unet-emoji-smd", "emoji-smd", SMALL, 64),
        ("emoji-gaussian", "unet-emoji-vanilla", "emoji-vanilla", SMALL, 64),
        ("emoji-256-smd", "unet-emoji-256-smd", "emoji-256-smd", LARGE, 256),
        ("emoji-256-gaussian", "unet-emoji-256-gaussian", "emoji-256-gaussian", LARGE, 256),
    ],
)
def test_a_shipped_pipeline_agrees_with_its_training_config(name, unet, training, source, pixels):
    folder = ROOT / "checkpoints" / name
    config = load_config(TrainConfig, ROOT / f"configs/train/{training}.yaml")
    assert (folder / "unet").resolve() == ROOT / "checkpoints" / unet
    assert (folder / "vae").resolve() == ROOT / config.autoencoder
    pipeline = load_pipeline(folder)
    classes = class_names(config, list_images(ImagesConfig(source=str(ROOT / source), resolution=pixels)).classes)
    assert pipeline.id2label == dict(enumerate(classes)) and pipeline.unet.config.num_classes == len(classes)
    trained = build_scheduler(config.diffusion)
    assert type(pipeline.scheduler) is type(trained) and settings(pipeline.scheduler) == settings(trained)
    torch.testing.assert_close(pipeline.scheduler.betas, trained.betas)
    assert (folder / "training_scheduler").resolve() == (folder / "scheduler").resolve()
    assert settings(pipeline.training_scheduler) == settings(pipeline.scheduler)
    assert is_mixture(pipeline.unet) == (config.model.z_channels > 0)
    assert pipeline.config.timestep_shift == (1.0 if pixels == 64 else 3.0 if is_mixture(pipeline.unet) else 4.0)


def test_the_shipped_guide_is_a_weaker_model_of_the_same_latents_and_classes():
    unet = SMDUNet2DModel.from_pretrained(ROOT / "checkpoints/unet-emoji-256-gaussian")
    guide = load_guide(str(ROOT / "checkpoints/unet-emoji-256-guide"), "guide", unet)
    assert guide.num_parameters() < unet.num_parameters() / 3 and not is_mixture(guide)


def test_the_scheduler_of_a_shipped_pipeline_can_be_replaced_when_loading():
    """As in diffusers. The network is still evaluated on the process that it was trained on."""
    folder, images = ROOT / "checkpoints/emoji-smd", []
    given = FlowMatchEulerDiscreteScheduler()
    for pipeline in (SMDPipeline.from_pretrained(folder, scheduler=given), SMDPipeline.from_pretrained(folder)):
        pipeline.scheduler = given
        pipeline.set_progress_bar_config(disable=True)
        images.append(latents(pipeline, [0], [1]))
    assert torch.equal(*images)


@pytest.mark.parametrize(
    "name, source, pixels, errors, psnr",
    [
        ("emoji-smd", SMALL, 64, (0.0770, 0.307), 29.5),
        ("emoji-gaussian", SMALL, 64, (0.0610, 0.269), 29.5),
        ("emoji-256-smd", LARGE, 256, (0.0560, 0.223), 29.3),
        ("emoji-256-gaussian", LARGE, 256, (0.0290, 0.105), 29.3),
    ],
)
def test_a_shipped_network_denoises_held_out_images_as_well_as_before(name, source, pixels, errors, psnr):
    """A change of the forward pass would ruin all weights that were trained before. Errors are relative to the variance."""
    pipeline, count = load_pipeline(ROOT / "checkpoints" / name), 8 if pixels == 64 else 2
    entries = list_images(ImagesConfig(source=str((ROOT / source).with_name("heldout.zip")), resolution=pixels))
    images = torch.stack([decode(entries[index * len(entries) // count].read(), pixels) for index in range(count)])
    autoencoder, process = FrozenAutoencoder(pipeline.vae), process_of(pipeline.scheduler)
    latents = autoencoder.normalise(autoencoder.encode_moments(images)[:, 0])
    mse = ((autoencoder.decode(latents) + 1) * 127.5 - images).square().mean()
    assert (10 * torch.log10(255**2 / mse)).item() == pytest.approx(psnr, abs=0.3)
    for t, error in zip((300, 700), errors):
        generator, steps = torch.Generator().manual_seed(0), torch.full((count,), t)
        eps, eta = (torch.randn(latents.shape, generator=generator) for _ in range(2))
        x_t = process.path.noise(latents, eps, steps)
        with torch.no_grad():
            found = process.path.to_x0(predict(pipeline.unet, x_t, steps, None, eta), x_t, steps, process.prediction_type)
        assert ((found - latents).square().mean() / latents.var()).item() == pytest.approx(error, rel=0.1), t


def test_a_shipped_pipeline_samples():
    pipeline = SMDPipeline.from_pretrained(ROOT / "checkpoints/emoji-smd")
    pixels = pipeline([7, 3], num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert pixels.shape == (2, 3, 64, 64) and (pixels[0] - pixels[1]).abs().mean() > 0.05
