"""Conditions and guidance."""

import pytest
import torch

from ldm_smd.models.moments import MomentHeads
from ldm_smd.pipelines import load_pipeline
from ldm_smd.pipelines.guidance import Conditions, guided_prediction, guided_steps, read_conditions
from tests.rounding import nearly_equal
from tests.sampled import latents
from tests.tiny import diffusers_unet


def test_guidance_computes_its_formula(pipeline):
    """A scale of 1 gives the conditional prediction, 0 the unconditional one, and the prediction is linear in the scale."""
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(500)
    labels, eta = torch.tensor([0, 1]), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        cond, uncond, guided = (guided_prediction(pipeline.unet, x, t, Conditions(labels), eta, w) for w in (1.0, 0.0, 3.0))
        assert nearly_equal(uncond, pipeline.unet(x, t, None, eta).sample)
    assert nearly_equal(guided, uncond + 3 * (cond - uncond))


def test_guidance_applies_only_inside_its_interval_of_noise_levels(pipeline):
    options = {"num_inference_steps": 4, "guidance_scale": 3.0}
    everywhere, nowhere = latents(pipeline, [0], [1], **options), latents(pipeline, [0], [1], num_inference_steps=4)
    inside = latents(pipeline, [0], [1], guidance_interval=(1e-9, 1e9), **options)
    outside = latents(pipeline, [0], [1], guidance_interval=(1e8, 1e9), **options)
    assert (
        nearly_equal(inside, everywhere) and nearly_equal(outside, nowhere) and not torch.allclose(inside, outside, atol=1e-2)
    )
    timesteps, alphabar = torch.tensor([999, 600.5, 300, 10]), pipeline.scheduler.alphas_cumprod
    sigma = float(((1 - alphabar[300]) / alphabar[300]).sqrt())
    assert guided_steps(pipeline.scheduler, timesteps, (0.9 * sigma, 1.1 * sigma)) == [False, False, True, False]


def test_guidance_by_a_weaker_network(pipeline, model_folder, tmp_path):
    """The prediction is own + (w - 1) (own - guide), also without classes. The guide is saved and loaded with the pipeline."""
    guide = load_pipeline(model_folder).unet
    pipeline.register_modules(guide=guide)
    x, t, eta = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 4, 8, 8)
    for labels in (torch.tensor([0, 1]), None):
        with torch.no_grad():
            own, other = (unet(x, t, labels, eta).sample for unet in (pipeline.unet, guide))
            guided, unguided = (guided_prediction(pipeline.unet, x, t, Conditions(labels), eta, w, guide) for w in (2.0, 1.0))
        assert torch.allclose(guided, own + (own - other), atol=1e-3)
        assert nearly_equal(unguided, own)
    pipeline.save_pretrained(tmp_path / "guided")
    again = load_pipeline(tmp_path / "guided")
    again.set_progress_bar_config(disable=True)
    a, b = (latents(each, [0, 1], [1, 2], guidance_scale=2.0) for each in (pipeline, again))
    assert nearly_equal(a, b)


def test_networks_of_different_precision_work_together(gaussian_folder, model_folder, pipeline):
    """A guide, or moment heads, in another precision than the denoiser."""
    guide = load_pipeline(model_folder).unet
    x, t, eta = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 4, 8, 8)
    conditions = Conditions(torch.tensor([0, 1]))
    with torch.no_grad():
        full = guided_prediction(pipeline.unet, x, t, conditions, eta, 2.0, guide)
        half = guided_prediction(pipeline.unet, x, t, conditions, eta, 2.0, guide.to(torch.bfloat16))
    assert half.dtype == full.dtype and (half - full).abs().mean() < 0.05 * full.abs().mean()

    gaussian = load_pipeline(gaussian_folder).unet.to(torch.bfloat16)
    moments = MomentHeads.for_unet(gaussian)
    x = x.to(torch.bfloat16)
    for heads in (moments.to(torch.float32), moments.to(torch.bfloat16)):
        with torch.no_grad():
            found = guided_prediction(gaussian, x, t, conditions, None, 2.0, gaussian, heads)
        assert found.isfinite().all() and found.shape == (2, 12, 8, 8)


def test_guidance_changes_the_mean_but_not_the_moments(gaussian_folder, loud_pipeline):
    unet = loud_pipeline(gaussian_folder).unet
    moments, x, t = MomentHeads.for_unet(unet), torch.randn(2, 4, 8, 8), torch.tensor(500)
    conditions = Conditions(torch.tensor([0, 1]))
    with torch.no_grad():
        own, guided = (guided_prediction(unet, x, t, conditions, None, w, moments=moments) for w in (1.0, 3.0))
        mean = guided_prediction(unet, x, t, conditions, None, 3.0)
    assert nearly_equal(guided[:, :4], mean) and nearly_equal(guided[:, 4:], own[:, 4:]) and own.shape == (2, 12, 8, 8)


def test_with_null_appends_the_null_conditions(pipeline):
    doubled = Conditions(torch.tensor([0, 1]), torch.ones(2, 16)).with_null(pipeline.unet)
    assert doubled.labels.tolist() == [0, 1, 2, 2] and doubled.image_embeds.sum(dim=1).tolist() == [16, 16, 0, 0]
    assert Conditions().with_null(pipeline.unet) == Conditions()


def test_invalid_conditions_are_refused(pipeline):
    cpu = torch.device("cpu")
    assert read_conditions(pipeline.unet, [1, 0], None, cpu).labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="class_labels: expected 0 to 2"):
        pipeline([3])
    with pytest.raises(ValueError, match=r"class_labels: expected a class number for each image, such as \[0, 1\], found 1"):
        pipeline(1)
    with pytest.raises(ValueError, match="class_labels: expected at least one, found none"):
        pipeline([])
    with pytest.raises(ValueError, match=r"class_labels: expected class numbers or names, found \[None\]"):
        pipeline([None])
    with pytest.raises(ValueError, match=r"class_labels: expected class numbers or names, found \[0.7\]"):
        pipeline([0.7])
    with pytest.raises(ValueError, match="image_embeds: expected None, this model is not conditioned"):
        read_conditions(pipeline.unet, None, torch.ones(1, 16), cpu)
    with pytest.raises(ValueError, match="class_labels: expected None, this model is unconditional"):
        read_conditions(diffusers_unet(num_class_embeds=None), [0], None, cpu)
