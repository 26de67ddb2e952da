"""The sampling loop, with all schedulers, from noise or images."""

import diffusers
import pytest
import torch

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.errors import UserError
from ldm_smd.models.gaussian import LatentGaussians
from ldm_smd.models.moments import MomentHeads
from ldm_smd.pipelines import SMDPipeline, load_pipeline, seeded_generators
from ldm_smd.pipelines.decoding import encode_images
from ldm_smd.sampling.settings import SampleConfig
from ldm_smd.sampling.tool import sample
from ldm_smd.schedulers import TeleportScheduler, make_scheduler
from ldm_smd.schedulers.conversion import path_of
from ldm_smd.schedulers.support import SUPPORTED, warn_once
from ldm_smd.training.fit_gaussian import fit_gaussian
from ldm_smd.training.settings import FitGaussianConfig, TrainMomentsConfig
from ldm_smd.training.train_moments import train_moments
from tests.rounding import nearly_equal
from tests.sampled import SCHEDULERS, latents
from tests.tiny import diffusers_unet


@pytest.mark.parametrize("name", SCHEDULERS)
def test_samples_do_not_depend_on_the_batch_for_any_scheduler(pipeline, name):
    pipeline.scheduler = make_scheduler(name, pipeline.scheduler)
    together = latents(pipeline, [0, 1, 0], [5, 6, 7], guidance_scale=1.5)
    alone = latents(pipeline, [1], [6], guidance_scale=1.5)
    assert together.shape == (3, 4, 8, 8) and together.isfinite().all()
    assert nearly_equal(together[1], alone[0], 1e-3)
    assert not torch.allclose(together[0], together[2], atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_image_to_image(pipeline, name):
    """Sampling starts from the noised image at one of the last steps. A low strength changes the image less."""
    pipeline.scheduler = make_scheduler(name, pipeline.scheduler)
    image = torch.rand(2, 3, 16, 16)
    autoencoder = FrozenAutoencoder(pipeline.vae)
    start = autoencoder.normalise(autoencoder.encode_moments((image * 255).round().to(torch.uint8))[:, 0])
    evaluations, distances = [], []
    pipeline.unet.register_forward_hook(lambda *_: evaluations.append(1))
    for strength in (0.2, 0.6, 1.0):
        evaluations.clear()
        changed = latents(pipeline, [0, 1], [5, 6], num_inference_steps=5, image=image, strength=strength)
        alone = latents(pipeline, [1], [6], num_inference_steps=5, image=image[1:], strength=strength)
        assert nearly_equal(changed[1], alone[0], 1e-3)
        assert len(evaluations) == 2 * pipeline.num_timesteps
        even = not pipeline.scheduler.config.get("use_karras_sigmas")
        assert pipeline.num_timesteps == timesteps_of(pipeline.scheduler, round(5 * strength)) or not even
        distances.append(float((changed - start).square().mean()))
    assert distances[0] < min(distances[1:])


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_an_image_is_noised_to_the_first_timestep_of_its_run(pipeline, name):
    pipeline.scheduler = make_scheduler(name, pipeline.scheduler)
    noise, image, seen = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 16, 16), []
    pipeline.unet.register_forward_pre_hook(lambda _, given: seen.append(given[:2]))
    latents(pipeline, [0, 1], [5, 6], latents=noise, image=image, num_inference_steps=5, strength=0.6)
    x_t, t = seen[0]
    a, s = path_of(pipeline.scheduler).signal_and_noise(torch.tensor([599]), noise)
    assert len(seen) == 3 and float(t) == 599
    assert nearly_equal(x_t, a * encode_images(pipeline.vae, image, noise.shape) + s * noise, 1e-3)


def test_the_shift_of_the_steps_has_a_default_in_the_model_folder(pipeline, tmp_path, caplog):
    """Schedulers that take no timesteps do without it, and say so."""
    pipeline.register_to_config(timestep_shift=3.0)
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)

    def sampled(**options):
        generator = seeded_generators([0, 1])
        return loaded([0, 1], num_inference_steps=4, generator=generator, output_type="pt", **options).images

    assert loaded.config.timestep_shift == 3.0
    assert torch.equal(sampled(), sampled(timestep_shift=3.0)) and not torch.equal(sampled(), sampled(timestep_shift=1.0))
    loaded.scheduler = make_scheduler("DDIMScheduler", loaded.scheduler)
    warn_once.cache_clear()
    assert not caplog.messages and torch.equal(sampled(), sampled(timestep_shift=1.0))
    assert "DDIMScheduler spaces its timesteps itself, so the model's timestep_shift=3 is not used" in caplog.text
    with pytest.raises(ValueError, match="timestep_shift: expected 1 for DDIMScheduler"):
        sampled(timestep_shift=3.0)


def test_schedules_with_a_repeated_timestep(pipeline):
    """A scheduler that looks up its first timestep would find the second, and run past the last one."""
    pipeline.scheduler = make_scheduler("KDPM2DiscreteScheduler", pipeline.scheduler)
    assert latents(pipeline, [0], [1], num_inference_steps=20).isfinite().all()
    assert pipeline.scheduler.timesteps[0] in pipeline.scheduler.timesteps[1:]


def test_unsupported_schedulers_are_refused(pipeline):
    message = "expected a scheduler with a noise schedule .* found FlowMatchLCMScheduler: it needs a network distilled"
    with pytest.raises(ValueError, match=message):
        SMDPipeline(pipeline.unet, pipeline.vae, diffusers.FlowMatchLCMScheduler())
    with pytest.raises(ValueError, match=message):
        SMDPipeline(pipeline.unet, pipeline.vae, pipeline.scheduler, training_scheduler=diffusers.FlowMatchLCMScheduler())
    pipeline.scheduler = diffusers.FlowMatchLCMScheduler()
    with pytest.raises(ValueError, match=message):
        pipeline([0])


def timesteps_of(scheduler, steps):
    """Return the number of evaluations of the network in ``steps`` steps."""
    if isinstance(scheduler, diffusers.PNDMScheduler):
        return steps + (steps > 1)
    return steps * scheduler.order - (scheduler.order - 1)


def test_no_labels_are_the_null_class_and_output_types_have_their_shapes(pipeline):
    unlabelled = latents(pipeline, None, [1, 2], batch_size=2)
    null = latents(pipeline, [2, 2], [1, 2])
    assert nearly_equal(unlabelled, null)
    for kind, shape in (("np", (2, 16, 16, 3)), ("pt", (2, 3, 16, 16))):
        images = latents(pipeline, None, [1, 2], batch_size=2, output_type=kind)
        assert images.shape == shape and images.min() >= 0 and images.max() <= 1
    assert latents(pipeline, [0], [1], output_type="pil")[0].size == (16, 16)


def test_samples_depend_on_eta_and_on_the_given_noise(pipeline):
    start, other = torch.randn(2, 1, 4, 8, 8)
    pipeline.scheduler = make_scheduler("DDIMScheduler", pipeline.scheduler)  # no randomness other than eta
    found, other_eta, other_noise, again = (
        latents(pipeline, [0], [seed], latents=noise) for seed, noise in ((1, start), (2, start), (1, other), (1, start))
    )
    assert nearly_equal(again, found)
    assert not torch.allclose(other_eta, found, atol=1e-2) and not torch.allclose(other_noise, found, atol=1e-2)


def test_an_smd_unet_in_a_diffusers_pipeline(model_folder):
    """DDPMPipeline calls model(x, t).sample, as for any UNet of diffusers."""
    smd = load_pipeline(model_folder)
    ddpm = diffusers.DDPMPipeline(smd.unet, smd.scheduler)
    ddpm.set_progress_bar_config(disable=True)
    assert ddpm(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 4)


@pytest.mark.slow
def test_a_plain_diffusers_unet_in_an_smd_pipeline(model_folder, shards, tmp_path, run):
    """Moment heads and Gaussians are fitted to it, and it is sampled with both."""
    smd = load_pipeline(model_folder)
    torch.manual_seed(0)
    smd.register_modules(unet=diffusers_unet())
    smd.save_pretrained(tmp_path / "plain")
    plain = load_pipeline(tmp_path / "plain")
    assert nearly_equal(latents(plain, None, [1]), latents(plain, [2], [1]))  # the last embedding is the null class
    with pytest.raises(ValueError, match="class_labels: expected 0 to 2"):
        plain([3])

    common = [f"model={tmp_path / 'plain'}", f"shards={shards}"]
    few = ["images_total=16", "batch_size=8"]
    code, _, error = run(TrainMomentsConfig, train_moments, *common, *few, f"output={tmp_path / 'moments'}")
    assert code == 0, error
    common[0] = f"model={tmp_path / 'moments'}"
    code, _, error = run(FitGaussianConfig, fit_gaussian, *common, "rank=4", f"output={tmp_path / 'both'}")
    assert code == 0, error
    options = [f"model={tmp_path / 'both'}", "per_class=2", "steps=3", "guidance_scale=2", "scheduler=GMSScheduler"]
    code, _, error = run(SampleConfig, sample, *options, f"output={tmp_path / 'images'}")
    assert code == 0, error
    assert len(list((tmp_path / "images").glob("class*.png"))) == 4
    both = load_pipeline(tmp_path / "both")
    assert isinstance(both.scheduler, TeleportScheduler)
    assert latents(both, [0, 1], [1, 2]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(pipeline, dtype, tmp_path):
    """For a pipeline that was converted, and for one that was loaded in this dtype."""
    pipeline.save_pretrained(tmp_path / "model")
    loaded = SMDPipeline.from_pretrained(tmp_path / "model", dtype=dtype)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.unet.dtype == loaded.vae.dtype == dtype
    options = {"num_inference_steps": 2, "output_type": "pt"}
    expected = pipeline([0, 1], generator=seeded_generators([1, 2]), **options).images
    for half in (pipeline.to(dtype), loaded):
        images = half([0, 1], generator=seeded_generators([1, 2]), **options).images
        assert images.shape == (2, 3, 16, 16) and (images - expected).abs().mean() < 0.02


@pytest.mark.parametrize("name", SUPPORTED)
def test_half_precision_is_close_to_float32_with_any_scheduler(pipeline, name):
    """Schedulers that work in sigma would lose x_0 if x_t were in half precision too."""
    pipeline.scheduler = make_scheduler(name, pipeline.scheduler)
    expected = latents(pipeline, [0, 1], [1, 2], num_inference_steps=8)
    found = latents(pipeline.to(torch.bfloat16), [0, 1], [1, 2], num_inference_steps=8)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).square().mean() < 0.05**2 * expected.square().mean()


def test_eta_is_drawn_in_float32_for_a_network_in_half_precision(pipeline):
    """Rounded to bf16, the modes of a fitted mixture would have other weights, and some none."""
    pipeline.to(torch.bfloat16)
    drawn = []
    pipeline.unet.register_forward_pre_hook(lambda _, given: drawn.append(given[3]))
    latents(pipeline, [0], [1])
    assert len(drawn) == 3 and all(eta.dtype == torch.float32 and (eta != eta.bfloat16()).any() for eta in drawn)


def test_given_noise_has_the_number_and_size_of_the_images(pipeline):
    noise = torch.randn(4, 4, 8, 16)
    assert latents(pipeline, None, [1, 2, 3, 4], latents=noise).shape == noise.shape
    assert latents(pipeline, [0, 1], [1, 2, 3, 4], latents=noise, num_images_per_prompt=2).shape == noise.shape
    for labels, size in (([0], {}), (None, {"height": 32}), ([0, 1, 0, 1], {"width": 16})):
        with pytest.raises(ValueError, match=r"^latents: expected \(., 4, .+\), found \(4, 4, 8, 16\)"):
            pipeline(labels, latents=noise, **size)


def test_one_image_for_each_label_or_each_sample(pipeline):
    images = torch.rand(2, 3, 16, 16)
    by_label = latents(pipeline, [0, 1], [1, 2, 3, 4], image=images, num_images_per_prompt=2)
    by_sample = latents(pipeline, [0, 1], [1, 2, 3, 4], image=images.repeat_interleave(2, dim=0), num_images_per_prompt=2)
    assert nearly_equal(by_label, by_sample)
    with pytest.raises(ValueError, match="image: expected one image, or one for each of 6 samples, found 2"):
        pipeline([0, 1, 0, 1, 0, 1], image=images)


@pytest.mark.parametrize("size", [(8, 16), None])
def test_a_denoiser_of_another_shape_than_a_square(model_folder, size):
    pipeline = load_pipeline(model_folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline = SMDPipeline(diffusers_unet(sample_size=size), pipeline.vae, pipeline.scheduler)
    assert latents(pipeline, [0], [1], height=16, width=16).shape == (1, 4, 8, 8)
    if size is None:
        with pytest.raises(ValueError, match="height: expected a number of pixels"):
            pipeline([0])
    else:
        assert latents(pipeline, [0], [1]).shape == (1, 4, 8, 16)


def test_invalid_arguments_are_refused(pipeline):
    with pytest.raises(ValueError, match="generator: expected one per image"):
        pipeline([0, 1], generator=seeded_generators([1]))
    with pytest.raises(UserError, match="classes: expected one of disc, square, found 'cat'"):
        pipeline.label_of("cat")
    with pytest.raises(UserError, match=r"^class_labels: expected one of disc, square, found 'cat'"):
        pipeline(["disc", "cat"])
    with pytest.raises(ValueError, match="num_images_per_prompt: expected at least 1, found 0"):
        pipeline([0], num_images_per_prompt=0)


def test_classes_by_name(pipeline):
    expected = latents(pipeline, [1, 0], [1, 2])
    assert nearly_equal(latents(pipeline, ["square", 0], [1, 2]), expected)
    assert nearly_equal(latents(pipeline, "square", [1]), expected[:1])
    t, square = torch.tensor(500), torch.tensor([1])
    by_number, by_name = (
        pipeline.pred_original_sample(expected[:1], t, labels, generator=seeded_generators([3]))
        for labels in (square, ["square"])
    )
    assert nearly_equal(by_number, by_name)


def test_classes_are_found_by_names_then_numbers_then_unique_synonyms(pipeline):
    pipeline.id2label = {0: "crane, bird", 1: "crane, machine"}
    assert [pipeline.label_of(name) for name in ("bird", "machine", "crane, bird", "1")] == [0, 1, 0, 1]
    with pytest.raises(UserError, match="found 'crane'"):
        pipeline.label_of("crane")
    pipeline.id2label = dict(enumerate(["0", "1", "10", "2"]))
    assert [pipeline.label_of(name) for name in ("2", "10", "3")] == [3, 2, 3]


def test_images_of_one_prompt_are_consecutive(pipeline):
    """As in the pipelines of diffusers."""
    several = latents(pipeline, [1, 0], [1, 2, 3, 4], num_images_per_prompt=2)
    assert nearly_equal(several, latents(pipeline, [1, 1, 0, 0], [1, 2, 3, 4]))
    without = latents(pipeline, None, [1, 2, 3, 4, 5, 6], batch_size=3, num_images_per_prompt=2)
    assert nearly_equal(without, latents(pipeline, None, [1, 2, 3, 4, 5, 6], batch_size=6))


class FromTheMean(diffusers.DDIMScheduler):
    """A user's scheduler, which the pipeline does not know."""

    start_part = "gaussian"

    def start(self, noise, gaussians, class_labels, generator):
        return noise + gaussians.means[class_labels].view_as(noise)


def test_a_missing_component_of_a_scheduler_gives_one_line(pipeline, gaussian_folder):
    """Also if a scheduler inside another one needs it."""
    gaussians = LatentGaussians(4, 8, 8, rank=2, count=3, num_classes=2)
    gaussians.means.normal_()
    noise = torch.randn(2, 4, 8, 8)
    plain = make_scheduler("DDIMScheduler", pipeline.scheduler)
    pipeline.scheduler = FromTheMean.from_config(plain.config)
    with pytest.raises(UserError, match=r"a model with a gaussian component for FromTheMean, .*fit_gaussian.py"):
        pipeline([0, 1])
    pipeline.register_modules(gaussian=gaussians)
    found = latents(pipeline, [0, 1], [1, 2], latents=noise)
    pipeline.scheduler = plain
    assert torch.equal(found, latents(pipeline, [0, 1], [1, 2], latents=noise + gaussians.means[:2].view_as(noise)))

    gaussian = load_pipeline(gaussian_folder)
    gaussian.register_modules(gaussian=gaussians)
    gaussian.scheduler = make_scheduler("TeleportScheduler:scheduler=GMSScheduler", gaussian.scheduler)
    with pytest.raises(UserError, match=r"a model with a moments component for TeleportScheduler, .*train_mom"):
        gaussian([0, 1])
    gaussian.register_modules(moments=MomentHeads.for_unet(gaussian.unet))
    assert latents(gaussian, [0, 1], [1, 2]).isfinite().all()
