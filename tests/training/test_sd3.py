"""Mixtures made from a diffusers flow matching transformer (SD3), without text."""

import json

import pytest
import torch

from ldm_smd import ExtendedSD3Transformer2DModel
from ldm_smd.errors import UserError
from ldm_smd.models.denoiser import predict
from ldm_smd.pipelines import load_pipeline
from ldm_smd.schedulers import make_scheduler
from ldm_smd.training.loop import train
from tests.rounding import nearly_equal
from tests.tiny import MIXTURE, diffusers_sd3
from tests.training.results import assert_same_losses, weights

FLOW, TAIL = "diffusion.path=flow", "model.tail_blocks=1"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = diffusers_sd3()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "sd3")
    return tmp_path / "sd3"


def test_a_new_mixture_predicts_as_the_transformer(folder):
    model = ExtendedSD3Transformer2DModel.from_transformer(
        folder, num_classes=2, embedding_dimensions=6, tail_blocks=2, noise_rank=0, **MIXTURE
    )
    plain = diffusers_sd3().from_pretrained(folder)
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 20.5]), torch.tensor([0, 2])
    expected = plain(x, torch.zeros(2, 1, 12), torch.zeros(2, 10), t).sample
    assert nearly_equal(predict(plain, x, t), expected)
    embeds = torch.nn.functional.normalize(torch.randn(2, 6), dim=1)
    assert nearly_equal(model(x, t, labels, image_embeds=embeds).sample, expected), "initially the conditions have no effect"
    assert model(torch.randn(1, 4, 4, 12), 10).sample.shape == (1, 4, 4, 12)
    for weight in (model.class_pooled.weight, model.image_pooled.weight):
        torch.nn.init.normal_(weight)
    found = [model(x, t, labels, image_embeds=given).sample for given in (embeds, None, torch.zeros(2, 6))]
    assert not nearly_equal(found[0], found[1]) and nearly_equal(found[1], found[2])
    assert not nearly_equal(found[1][0], model(x, t, None).sample[0]) and nearly_equal(found[1][1], model(x, t, None).sample[1])
    with pytest.raises(ValueError, match=r"sample: expected sides that are multiples of 2, found \(8, 7\)"):
        model(torch.randn(1, 4, 8, 7), 10)
    unconditional = ExtendedSD3Transformer2DModel.from_transformer(folder, tail_blocks=1, noise_rank=0, **MIXTURE)
    with pytest.raises(ValueError, match="class_labels: expected None"):
        unconditional(x, t, labels)
    with pytest.raises(ValueError, match="image_embeds: expected None"):
        unconditional(x, t, image_embeds=embeds)


@pytest.mark.slow
def test_a_mixture_can_start_from_sd3(train_config, folder, tmp_path):
    """It is trained, resumed, and sampled with schedulers of both paths."""
    start = (f"init_from={folder}", FLOW, TAIL)
    train(train_config(*start, "images_total=32"))
    model = train(train_config(*start))
    assert json.loads((model / "unet/config.json").read_text())["_class_name"] == "ExtendedSD3Transformer2DModel"
    train(train_config(*start, f"output={tmp_path / 'straight'}"))
    straight = weights(tmp_path / "straight/model/unet")
    assert all(torch.equal(straight[name], value) for name, value in weights(model / "unet").items())
    pipeline = load_pipeline(model)
    assert pipeline.unet.class_pooled.weight.any()
    for name in ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"):
        pipeline.scheduler = make_scheduler(name, pipeline.scheduler)
        assert pipeline([0, 1], num_inference_steps=2, guidance_scale=2.0, output_type="pt").images.isfinite().all()
    pipeline.register_modules(unet=diffusers_sd3().from_pretrained(folder))
    pipeline.save_pretrained(tmp_path / "plain")
    assert load_pipeline(tmp_path / "plain")(batch_size=2, num_inference_steps=2, output_type="pt").images.isfinite().all()
    train(train_config(f"init_from={model / 'unet'}", FLOW, f"output={tmp_path / 'again'}", "images_total=8"))
    train(train_config(*start, "micro_batches=2", "gradient_checkpointing=true", f"output={tmp_path / 'micro-batches'}"))
    assert_same_losses(tmp_path / "straight", tmp_path / "micro-batches")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["regression", "distillation"])
def test_sd3_can_be_the_teacher(train_config, folder, objective):
    settings = ("model.noise_rank=0", "objective.teacher_steps=2", "class_conditional=false", "objective.draws=1")
    assert train(train_config(f"init_from={folder}", FLOW, TAIL, f"objective.name={objective}", *settings)).is_dir()


def test_another_path_is_refused(train_config, folder):
    with pytest.raises(UserError, match=r"diffusion\.path: expected flow, as the SD3Transformer2DModel of init_from, found"):
        train(train_config(f"init_from={folder}", TAIL))
