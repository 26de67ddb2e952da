"""Mixtures made from a diffusers UNet with cross-attention, without text."""

import json

import pytest
import torch

from ldm_smd import ExtendedUNet2DConditionModel
from ldm_smd.errors import UserError
from ldm_smd.models.denoiser import predict
from ldm_smd.pipelines import load_pipeline
from ldm_smd.training.loop import train
from tests.rounding import nearly_equal
from tests.tiny import MIXTURE, diffusers_condition


@pytest.fixture
def folder(tmp_path):
    """The folder of a UNet with the layout of Stable Diffusion."""
    torch.manual_seed(0)
    diffusers_condition().save_pretrained(tmp_path / "condition")
    return tmp_path / "condition"


def test_predictions_depend_on_classes_and_embeddings(folder):
    model = ExtendedUNet2DConditionModel.from_unet(folder, num_classes=2, embedding_dimensions=6, noise_rank=0, **MIXTURE)
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([900, 20]), torch.tensor([0, 2])
    plain = diffusers_condition().from_pretrained(folder)
    before = predict(plain, x, t)
    assert nearly_equal(before, plain(x, t, torch.zeros(2, 3, 12)).sample)
    embeds = torch.nn.functional.normalize(torch.randn(2, 6), dim=1)
    assert nearly_equal(model(x, t, labels, image_embeds=embeds).sample, before), "initially the tokens are zero"
    for token in (model.empty_states, model.class_states.weight, model.image_states.weight):
        torch.nn.init.normal_(token)
    found = [model(x, t, labels, image_embeds=given).sample for given in (embeds, None, torch.zeros(2, 6))]
    assert not nearly_equal(found[0], found[1]) and nearly_equal(found[1], found[2])
    assert not nearly_equal(model(x, t, labels).sample[0], model(x, t, None).sample[0])
    assert nearly_equal(model(x, t, labels).sample[1], model(x, t, None).sample[1]), "label 2 is the null class"
    assert model(torch.randn(1, 4, 5, 7), 10).sample.shape == (1, 4, 5, 7)


def test_empty_states_replace_the_text_states(folder):
    model = ExtendedUNet2DConditionModel.from_unet(folder, empty_tokens=5, noise_rank=0, **MIXTURE)
    states = torch.randn(5, 12)
    model.empty_states.data = states
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([900, 20])
    assert nearly_equal(model(x, t).sample, model.unet(x, t, states.expand(2, -1, -1)).sample)
    with pytest.raises(ValueError, match="class_labels: expected None"):
        model(x, t, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="image_embeds: expected None"):
        model(x, t, image_embeds=torch.randn(2, 6))


@pytest.mark.slow
def test_a_mixture_can_start_from_a_unet_with_cross_attention(train_config, folder, tmp_path):
    """It is trained, resumed and sampled. The plain UNet is sampled as a Gaussian model."""
    start = f"init_from={folder}"
    train(train_config(start, "images_total=32"))
    model = train(train_config(start))
    config = json.loads((model / "unet/config.json").read_text())
    assert config["_class_name"] == "ExtendedUNet2DConditionModel" and config["num_classes"] == 2
    pipeline = load_pipeline(model)
    assert pipeline.unet.class_states.weight.any()
    assert pipeline([0, 1], num_inference_steps=2, guidance_scale=2.0, output_type="pt").images.isfinite().all()
    pipeline.register_modules(unet=diffusers_condition().from_pretrained(folder))
    pipeline.save_pretrained(tmp_path / "plain")
    assert load_pipeline(tmp_path / "plain")(batch_size=2, num_inference_steps=2, output_type="pt").images.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["regression", "distillation"])
def test_an_unconditional_unet_can_be_the_teacher(train_config, folder, objective):
    settings = ("model.noise_rank=0", "objective.teacher_steps=2", "class_conditional=false", "objective.draws=1")
    adversarial = "objective.distillation.adversarial_weight=0.3"
    assert train(train_config(f"init_from={folder}", f"objective.name={objective}", adversarial, *settings)).is_dir()


def test_a_unet_with_other_embeddings_is_refused(train_config, folder, tmp_path):
    diffusers_condition(class_embed_type="timestep").save_pretrained(tmp_path / "more")
    with pytest.raises(UserError, match=r"init_from: unet: expected a UNet with cross-attention as.*'timestep'"):
        train(train_config(f"init_from={tmp_path / 'more'}"))
