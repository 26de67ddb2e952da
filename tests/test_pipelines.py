import logging
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.errors import UserError
from ldm_smd.models.gaussian import LatentGaussians
from ldm_smd.models.moments import MomentHeads
from ldm_smd.pipelines import SMDPipeline, load_pipeline, seeded_generators
from ldm_smd.sampling.settings import SampleConfig
from ldm_smd.sampling.tool import sample
from ldm_smd.schedulers import TeleportScheduler, make_scheduler
from ldm_smd.schedulers.support import SUPPORTED
from ldm_smd.training.fit_gaussian import fit_gaussian
from ldm_smd.training.settings import FitGaussianConfig, TrainMomentsConfig
from ldm_smd.training.train_moments import train_moments
from tests.rounding import alike
from tests.tiny import diffusers_unet

SCHEDULERS = [*SUPPORTED, "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++"]


@pytest.fixture
def pipeline(loud_pipeline, model_folder):
    return loud_pipeline(model_folder)


def latents(pipeline, labels, seeds, **options):
    options = {"num_inference_steps": 3, "output_type": "latent", **options}
    return pipeline(labels, generator=seeded_generators(seeds), **options).images


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler_and_the_same_picture_in_any_batch(pipeline, name):
    pipeline.scheduler = make_scheduler(name, pipeline.scheduler)
    together = latents(pipeline, [0, 1, 0], [5, 6, 7], guidance_scale=1.5)
    alone = latents(pipeline, [1], [6], guidance_scale=1.5)
    assert together.shape == (3, 4, 8, 8) and together.isfinite().all()
    assert alike(together[1], alone[0], 1e-3)
    assert not torch.allclose(together[0], together[2], atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_image_to_image(pipeline, name):
    """Only the last steps are done, from the noised picture: less of it changes at little strength than at more."""
    pipeline.scheduler = make_scheduler(name, pipeline.scheduler)
    image = torch.rand(2, 3, 16, 16)
    autoencoder = FrozenAutoencoder(pipeline.vae)
    start = autoencoder.normalise(autoencoder.encode_moments((image * 255).round().to(torch.uint8))[:, 0])
    evaluations, distances = [], []
    pipeline.unet.register_forward_hook(lambda *_: evaluations.append(1))
    for strength in (0.2, 0.6, 1.0):
        evaluations.clear()
        moved = latents(pipeline, [0, 1], [5, 6], num_inference_steps=5, image=image, strength=strength)
        alone = latents(pipeline, [1], [6], num_inference_steps=5, image=image[1:], strength=strength)
        assert alike(moved[1], alone[0], 1e-3)
        assert len(evaluations) == 2 * pipeline.num_timesteps
        even = not pipeline.scheduler.config.get("use_karras_sigmas")
        assert pipeline.num_timesteps == timesteps_of(pipeline.scheduler, round(5 * strength)) or not even
        distances.append(float((moved - start).square().mean()))
    assert distances[0] < min(distances[1:])


def test_noise_levels_so_near_that_two_timesteps_are_the_same(pipeline):
    """A scheduler that looks its first timestep up takes the second, and ends beyond the last one."""
    pipeline.scheduler = make_scheduler("KDPM2DiscreteScheduler", pipeline.scheduler)
    assert latents(pipeline, [0], [1], num_inference_steps=20).isfinite().all()
    assert pipeline.scheduler.timesteps[0] in pipeline.scheduler.timesteps[1:]


def test_schedulers_that_do_not_fit_are_refused(pipeline):
    said = "scheduler: expected one of the noise schedule .* found FlowMatchEulerDiscreteScheduler: flow matching is not"
    with pytest.raises(ValueError, match=said):
        SMDPipeline(pipeline.unet, pipeline.vae, diffusers.FlowMatchEulerDiscreteScheduler())
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=said):
        pipeline([0])


def timesteps_of(scheduler, steps):
    """Evaluations of the network in so many steps."""
    if isinstance(scheduler, diffusers.PNDMScheduler):
        return steps + (steps > 1)
    return steps * scheduler.order - (scheduler.order - 1)


def test_image_to_image_names_mistakes(pipeline):
    with pytest.raises(ValueError, match="strength: expected more than 0"):
        pipeline([0], image=torch.rand(1, 3, 16, 16), strength=0.0)
    with pytest.raises(ValueError, match="image: expected one picture, or one for each of 3 samples, found 2"):
        pipeline([0, 1, 0], image=torch.rand(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"image: expected pictures with latents \(4, 8, 8\), found \(4, 16, 16\)"):
        pipeline([0], image=torch.rand(1, 3, 32, 32))
    pipeline.scheduler = make_scheduler("PNDMScheduler:skip_prk_steps=false", pipeline.scheduler)
    with pytest.raises(ValueError, match="image: expected PNDMScheduler with skip_prk_steps"):
        pipeline([0], num_inference_steps=20, image=torch.rand(1, 3, 16, 16))


def test_guidance_is_its_formula(pipeline):
    """One step of prediction x0-free algebra: guidance 1 is conditional, 0 unconditional, w linear in between."""
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(500)
    labels, eta = torch.tensor([0, 1]), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        cond, uncond, guided = (pipeline._predict(x, t, labels, eta, w) for w in (1.0, 0.0, 3.0))
        assert alike(uncond, pipeline.unet(x, t, None, eta).sample)
    assert alike(guided, uncond + 3 * (cond - uncond))


def test_unconditional_and_output_types(pipeline):
    free = latents(pipeline, None, [1, 2], batch_size=2)
    null = latents(pipeline, [2, 2], [1, 2])
    assert alike(free, null)
    for kind, shape in (("np", (2, 16, 16, 3)), ("pt", (2, 3, 16, 16))):
        images = latents(pipeline, None, [1, 2], batch_size=2, output_type=kind)
        assert images.shape == shape and images.min() >= 0 and images.max() <= 1
    assert latents(pipeline, [0], [1], output_type="pil")[0].size == (16, 16)


def test_eta_matters_to_a_mixture_and_given_noise_is_used(pipeline):
    start, other = torch.randn(2, 1, 4, 8, 8)
    pipeline.scheduler = make_scheduler("DDIMScheduler", pipeline.scheduler)  # no noise but eta's
    found, of_other_eta, of_other_noise, again = (
        latents(pipeline, [0], [seed], latents=noise) for seed, noise in ((1, start), (2, start), (1, other), (1, start))
    )
    assert alike(again, found)
    assert not torch.allclose(of_other_eta, found, atol=1e-2) and not torch.allclose(of_other_noise, found, atol=1e-2)


def test_the_autoencoder_stays_as_it_was(pipeline):
    """A pipeline reads from it, and decodes with it, whatever the user does with it besides."""
    pipeline.vae.half().train().requires_grad_(True)
    assert pipeline.latent_sides(None, 32) == (8, 16)
    assert latents(pipeline, [0], [1], output_type="pt").isfinite().all()
    assert pipeline.vae.dtype == torch.float16 and pipeline.vae.training
    assert all(weights.requires_grad for weights in pipeline.vae.parameters())


def test_callback(pipeline):
    seen = []

    def zero(pipe, index, timestep, tensors):
        seen.append((index, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert not latents(pipeline, [0], [1], callback_on_step_end=zero).any()
    assert seen[0] == (0, 999) and len(seen) == 3


@pytest.mark.parametrize("name", SCHEDULERS)
def test_callbacks_see_what_the_network_saw_and_said(pipeline, name):
    """At the last step, which has no noise left, most schedulers end where the network says."""
    pipeline.scheduler = make_scheduler(name, pipeline.scheduler)
    seen = []

    def keep(pipe, index, timestep, tensors):
        assert set(tensors) == {"sample", "pred_original_sample"}
        seen.append(tensors)
        return {}

    wanted = ["sample", "pred_original_sample"]
    end = latents(pipeline, [0, 1], [1, 2], callback_on_step_end=keep, callback_on_step_end_tensor_inputs=wanted)
    assert len(seen) == pipeline.num_timesteps and seen[0]["sample"].std() == pytest.approx(1, abs=0.15)
    last = seen[-1]["pred_original_sample"]
    if name.partition("Discrete")[0] not in ("Heun", "LMS", "PNDMScheduler"):  # a mean of several evaluations
        assert torch.allclose(last, end, rtol=1e-2, atol=1e-2 * float(end.abs().max()))
    with pytest.raises(ValueError, match="tensor_inputs: expected some of latents, sample, pred_original_sample, found eta"):
        latents(pipeline, [0], [1], callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["eta"])


def test_one_step_is_the_first_of_a_sampling(pipeline):
    """x_0 by the network for the noise that a sampling starts from: with the same eta what its callback sees."""
    seen = []

    def keep(pipe, index, timestep, tensors):
        seen.append((timestep, tensors))
        return {}

    start, options = torch.randn(2, 4, 8, 8), {"guidance_scale": 2.0, "guidance_interval": (0.5, 1e9)}
    wanted = ["sample", "pred_original_sample"]
    callback = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": wanted}
    latents(pipeline, [0, 1], [1, 2], latents=start, **options, **callback)
    timestep, tensors = seen[0]
    found = pipeline.pred_original_sample(start, timestep, [0, 1], generator=seeded_generators([1, 2]), **options)
    assert torch.equal(tensors["sample"], start) and alike(tensors["pred_original_sample"], found)
    assert not torch.allclose(found, pipeline.pred_original_sample(start, timestep, [0, 1], **options), atol=1e-2)


def test_callbacks_of_diffusers_end_guidance_and_the_sampling(pipeline):
    class Cutoff(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            if step_index == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
                pipeline._guidance_scale = 1.0
            return callback_kwargs

    rows = []
    pipeline.unet.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    both = MultiPipelineCallbacks([Cutoff(cutoff_step_ratio=0.5)])
    latents(pipeline, [0], [1], num_inference_steps=4, guidance_scale=3.0, callback_on_step_end=both)
    assert rows == [2, 2, 2, 1] and pipeline.guidance_scale == 1.0

    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = index == 1
        return tensors

    rows.clear()
    assert latents(pipeline, [0], [1], num_inference_steps=9, callback_on_step_end=stop).isfinite().all()
    assert rows == [1, 1] and pipeline.interrupt
    latents(pipeline, [0], [1], num_inference_steps=2)
    assert rows == [1, 1, 1, 1]


def test_progress_bar_as_diffusers_has_it(pipeline, capfd):
    pipeline.set_progress_bar_config(disable=False, desc="two")
    latents(pipeline, [0], [1], num_inference_steps=2)
    assert "two: 100%" in capfd.readouterr().err
    pipeline.set_progress_bar_config(disable=True)
    latents(pipeline, [0], [1], num_inference_steps=2)
    assert not capfd.readouterr().err


def test_a_scheduler_takes_settings(pipeline):
    name = "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++,thresholding=true,solver_order=1"
    scheduler = make_scheduler(name, pipeline.scheduler)
    chosen = (scheduler.config.algorithm_type, scheduler.config.thresholding, scheduler.config.solver_order)
    assert chosen == ("sde-dpmsolver++", True, 1)
    assert torch.equal(scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)


def test_mistakes_are_named(pipeline, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="class_labels: expected 0 to 2"):
        pipeline([3])
    with pytest.raises(ValueError, match="generator: expected one per picture"):
        pipeline([0, 1], generator=seeded_generators([1]))
    with pytest.raises(UserError, match="classes: expected one of disc, square, found 'cat'"):
        pipeline.label_of("cat")
    with pytest.raises(UserError, match=r"scheduler: expected a scheduler class \(DDIM.*GMSScheduler"):
        make_scheduler("UNet2DModel", pipeline.scheduler)
    with pytest.raises(UserError, match=r"scheduler: expected a setting of DDIMScheduler .*found 'solver_order'"):
        make_scheduler("DDIMScheduler:solver_order=2", pipeline.scheduler)
    with pytest.raises(UserError, match=r"model: expected a model folder .* or a hub id, found none"):
        load_pipeline(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model: expected a model folder \(RUN/model\) or a hub id, found someone/none: "):
        load_pipeline("someone/none")


@pytest.mark.slow
def test_save_and_load_in_a_fresh_process(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    program = f"""
import torch
from ldm_smd.pipelines import SMDPipeline, seeded_generators
pipeline = SMDPipeline.from_pretrained({str(tmp_path / "model")!r})
assert pipeline.label_of("square") == 1
images = pipeline([0, 1], num_inference_steps=3, generator=seeded_generators([1, 2]), output_type="pt").images
torch.save(images, {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    here = latents(pipeline, [0, 1], [1, 2], output_type="pt")
    assert torch.allclose(torch.load(tmp_path / "out.pt", weights_only=True), here, atol=1e-4)


def test_pipelines_are_handled_as_those_of_diffusers(pipeline, gaussian_folder, tmp_path):
    """Made of another's parts, with all optional ones; saved as a variant and in shards."""
    gaussian = load_pipeline(gaussian_folder)
    gaussians = LatentGaussians(4, 8, 8, rank=2, count=3, num_classes=2)
    parts = {
        "unet": gaussian.unet,
        "moments": MomentHeads.for_unet(gaussian.unet),
        "gaussian": gaussians,
        "guide": pipeline.unet,
    }
    made = SMDPipeline.from_pipe(pipeline, **parts)
    again = SMDPipeline.from_pipe(made)
    assert again.id2label == pipeline.id2label
    assert all(again.components[name] is component for name, component in made.components.items())
    expected = latents(pipeline, [0, 1], [1, 2])
    for name, options in (("variant", {"variant": "fp16"}), ("shards", {"max_shard_size": "40KB"})):
        pipeline.save_pretrained(tmp_path / name, **options)
        loaded = SMDPipeline.from_pretrained(tmp_path / name, variant=options.get("variant"))
        assert alike(latents(loaded, [0, 1], [1, 2]), expected)
    assert len(list((tmp_path / "shards" / "unet").glob("*.safetensors"))) > 1


def test_our_unet_in_a_diffusers_pipeline(model_folder):
    """DDPMPipeline calls model(x, t).sample: what diffusers expects of a UNet."""
    ours = load_pipeline(model_folder)
    theirs = diffusers.DDPMPipeline(ours.unet, ours.scheduler)
    theirs.set_progress_bar_config(disable=True)
    assert theirs(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 4)


@pytest.mark.slow
def test_a_plain_unet_of_diffusers_in_our_pipeline(model_folder, shards, tmp_path, run):
    """From a UNet2DModel trained elsewhere to its moments, its Gaussians and pictures with both."""
    ours = load_pipeline(model_folder)
    torch.manual_seed(0)
    ours.register_modules(unet=diffusers_unet())
    ours.save_pretrained(tmp_path / "plain")
    plain = load_pipeline(tmp_path / "plain")
    assert alike(latents(plain, None, [1]), latents(plain, [2], [1]))  # the last embedding is that of no class
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
    code, _, error = run(SampleConfig, sample, *options, f"output={tmp_path / 'pictures'}")
    assert code == 0, error
    assert len(list((tmp_path / "pictures").glob("class*.png"))) == 4
    both = load_pipeline(tmp_path / "both")
    assert isinstance(both.scheduler, TeleportScheduler)
    assert latents(both, [0, 1], [1, 2]).isfinite().all()


@pytest.mark.slow
def test_sample_tool(run, model_folder, tmp_path):
    options = [f"model={model_folder}", "per_class=3", "steps=2"]
    code, out, _ = run(SampleConfig, sample, *options, f"output={tmp_path / 'a'}", "classes=[square,0]", "batch_size=2")
    assert code == 0 and "6 pictures" in out
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 7 and names[0] == "class0000-seed00000003.png" and names[-1] == "grid.png"
    code, _, _ = run(SampleConfig, sample, *options, f"output={tmp_path / 'free'}", "classes=[]")
    assert code == 0 and len(list((tmp_path / "free").glob("picture-*.png"))) == 3
    sketch = [f"image={tmp_path / 'a' / names[0]}", "strength=0.5"]
    code, _, _ = run(SampleConfig, sample, *options, *sketch, f"output={tmp_path / 'sketch'}", "classes=[0]")
    assert code == 0 and len(list((tmp_path / "sketch").glob("class0000-*.png"))) == 3
    guided = [f"guide={model_folder / 'unet'}", "guidance_scale=2", "guidance_interval=[0.1,10]", "height=24", "width=16"]
    code, _, _ = run(SampleConfig, sample, *options, *guided, f"output={tmp_path / 'guided'}", "classes=[0]")
    assert code == 0 and Image.open(tmp_path / "guided/class0000-seed00000000.png").size == (16, 24)
    for setting, message in (
        ("guide=nowhere", "guide: expected the folder of a UNet"),
        ("steps=1001", "num_inference_steps: expected 1 to 1000, found 1001"),
        ("steps=61", "num_inference_steps: expected a number at which no timestep is rounded to -1, found 61"),
        ("scheduler=FlowMatchEulerDiscreteScheduler", "scheduler: expected one of the noise schedule that models are trained"),
        ("scheduler=DPMSolverMultistepScheduler:algorithm_type=none", "scheduler: DPMSolverMultistepScheduler: none is not"),
        ("height=23", "height: expected a multiple of 2, found 23"),
        ("guidance_interval=[1]", "guidance_interval: expected [low, high]"),
    ):
        code, _, err = run(SampleConfig, sample, *options, setting, f"output={tmp_path / 'b'}")
        assert code == 2 and message in err
    code, _, err = run(SampleConfig, sample, *options, f"image={tmp_path / 'none.png'}", f"output={tmp_path / 'b'}")
    assert code == 2 and "image: expected a picture, found" in err
    code, _, err = run(SampleConfig, sample, *options, f"output={tmp_path / 'a'}")
    assert code == 2 and "output: expected a new or empty folder" in err
    code, _, err = run(SampleConfig, sample, *options, f"output={tmp_path / 'b'}", "classes=[cat]")
    assert code == 2 and "found 'cat'" in err and not (tmp_path / "b").exists()


def test_guidance_only_between_two_noise_levels(pipeline):
    """From 0 to infinity it is guidance; outside the interval it is none; and the scale of each step follows sigma."""
    options = {"num_inference_steps": 4, "guidance_scale": 3.0}
    everywhere, nowhere = latents(pipeline, [0], [1], **options), latents(pipeline, [0], [1], num_inference_steps=4)
    inside = latents(pipeline, [0], [1], guidance_interval=(1e-9, 1e9), **options)
    outside = latents(pipeline, [0], [1], guidance_interval=(1e8, 1e9), **options)
    assert alike(inside, everywhere) and alike(outside, nowhere) and not torch.allclose(inside, outside, atol=1e-2)
    timesteps, alphabar = torch.tensor([999, 600.5, 300, 10]), pipeline.scheduler.alphas_cumprod
    sigma = float(((1 - alphabar[300]) / alphabar[300]).sqrt())
    assert pipeline._guided(timesteps, (0.9 * sigma, 1.1 * sigma)) == [False, False, True, False]
    assert alphabar[601] < pipeline._alphas_cumprod(timesteps)[1] < alphabar[600]


def test_a_weaker_network_guides(pipeline, model_folder, tmp_path):
    """own + (w - 1) (own - other), also without classes; saved and loaded with the pipeline."""
    guide = load_pipeline(model_folder).unet
    pipeline.register_modules(guide=guide)
    x, t, eta = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 4, 8, 8)
    for labels in (torch.tensor([0, 1]), None):
        with torch.no_grad():
            own, other = (unet(x, t, labels, eta).sample for unet in (pipeline.unet, guide))
            assert torch.allclose(pipeline._predict(x, t, labels, eta, 2.0), own + (own - other), atol=1e-3)
            assert alike(pipeline._predict(x, t, labels, eta, 1.0), own)
    pipeline.save_pretrained(tmp_path / "guided")
    again = load_pipeline(tmp_path / "guided")
    again.set_progress_bar_config(disable=True)
    a, b = (latents(each, [0, 1], [1, 2], guidance_scale=2.0) for each in (pipeline, again))
    assert alike(a, b)


def test_other_sizes(pipeline):
    images = latents(pipeline, [0, 1], [1, 2], height=24, width=32, output_type="pt")
    assert images.shape == (2, 3, 24, 32)
    for wrong in ({"height": 23}, {"width": 1}):
        with pytest.raises(ValueError, match="expected a multiple of 2, found"):
            latents(pipeline, [0], [1], **wrong)


def test_decoding_goes_picture_by_picture_and_in_tiles_above_a_budget(pipeline, monkeypatch, caplog):
    whole = latents(pipeline, [0, 1, 0], [1, 2, 3], output_type="pt")
    monkeypatch.setattr("ldm_smd.pipelines.SLICE_PIXELS", 256)
    assert torch.allclose(latents(pipeline, [0, 1, 0], [1, 2, 3], output_type="pt"), whole, atol=1e-4)
    monkeypatch.setattr("ldm_smd.pipelines.TILED_PIXELS", 255)
    logger = logging.getLogger("ldm_smd.pipelines")
    monkeypatch.setattr(logger, "propagate", True)
    assert latents(pipeline, [0], [1], output_type="pt").shape == (1, 3, 16, 16)
    assert any("decoding in tiles" in record.message for record in caplog.records)
    assert not pipeline.vae.use_tiling


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pipeline, dtype, tmp_path):
    """Moved to it, or loaded in it; and close to float32."""
    pipeline.save_pretrained(tmp_path / "model")
    loaded = SMDPipeline.from_pretrained(tmp_path / "model", dtype=dtype)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.unet.dtype == loaded.vae.dtype == dtype
    options = {"num_inference_steps": 2, "output_type": "pt"}
    whole = pipeline([0, 1], generator=seeded_generators([1, 2]), **options).images
    for half in (pipeline.to(dtype), loaded):
        images = half([0, 1], generator=seeded_generators([1, 2]), **options).images
        assert images.shape == (2, 3, 16, 16) and (images - whole).abs().mean() < 0.02
