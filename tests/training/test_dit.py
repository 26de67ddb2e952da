"""Mixtures made from a diffusers DiT, with every objective."""

import json

import pytest
import torch

from ldm_smd import ExtendedDiTTransformer2DModel
from ldm_smd.data.encode import encode
from ldm_smd.data.settings import EncodeConfig
from ldm_smd.errors import UserError
from ldm_smd.models.denoiser import predict
from ldm_smd.pipelines import load_pipeline
from ldm_smd.sampling.settings import SampleConfig
from ldm_smd.sampling.tool import sample
from ldm_smd.training.fit_gaussian import fit_gaussian
from ldm_smd.training.loop import train
from ldm_smd.training.settings import FitGaussianConfig, TrainConfig, TrainMomentsConfig
from ldm_smd.training.train_moments import train_moments
from tests.rounding import nearly_equal
from tests.tiny import MIXTURE, diffusers_dit
from tests.training.results import assert_same_losses, weights

TAIL = "model.tail_blocks=2"


@pytest.fixture
def dit(tmp_path):
    """The folder of a DiT for two classes. Four more output channels are a learned variance, as in the DiTs for ImageNet."""
    torch.manual_seed(0)
    model = diffusers_dit(out_channels=8, num_embeds_ada_norm=2)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


def test_a_new_mixture_predicts_as_the_dit(dit):
    """Without the variance, and also for other sizes of latents."""
    plain = diffusers_dit(out_channels=8, num_embeds_ada_norm=2).from_pretrained(dit)
    model = ExtendedDiTTransformer2DModel.from_transformer(dit, tail_blocks=1, noise_rank=0, **MIXTURE).train()
    x, t, labels = torch.randn(3, 4, 8, 8), torch.tensor([999, 400, 3]), torch.tensor([0, 1, 2])
    expected = plain(x, t, labels).sample[:, :4]
    assert nearly_equal(model(x, t, labels).sample, expected)
    assert nearly_equal(model(x, t, labels).sample, model(x, t, labels).sample), "it drops no labels itself"
    assert nearly_equal(predict(plain, x, t, labels), expected)
    assert predict(plain, x, 400).shape == x.shape
    assert model(torch.randn(1, 4, 8, 12), 10).sample.shape == (1, 4, 8, 12)
    with pytest.raises(ValueError, match=r"sample: expected sides that are multiples of 2, found \(8, 7\)"):
        model(torch.randn(1, 4, 8, 7), 10)


@pytest.mark.slow
def test_a_mixture_can_start_from_a_dit(train_config, dit, tmp_path):
    """It is trained, resumed and sampled, and another training starts from it."""
    start = (f"init_from={dit}", TAIL)
    train(train_config(*start, "images_total=32"))
    folder = train(train_config(*start, "images_total=64"))
    assert json.loads((folder / "unet/config.json").read_text())["_class_name"] == "ExtendedDiTTransformer2DModel"
    train(train_config(*start, "images_total=64", f"output={tmp_path / 'straight'}"))
    straight = weights(tmp_path / "straight/model/unet")
    assert all(torch.equal(straight[name], value) for name, value in weights(folder / "unet").items())
    assert load_pipeline(folder)([0, 1], num_inference_steps=2, output_type="pt").images.isfinite().all()
    train(train_config(f"init_from={folder / 'unet'}", f"output={tmp_path / 'again'}", "images_total=8"))
    train(train_config(*start, "micro_batches=2", "gradient_checkpointing=true", f"output={tmp_path / 'micro-batches'}"))
    assert_same_losses(tmp_path / "straight", tmp_path / "micro-batches")


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        ["mixture_nll"],
        ["regression", "model.noise_rank=0", "objective.teacher_steps=2"],
        ["distillation", "objective.draws=1", "objective.distillation.views=joined"],
        ["distillation", "objective.draws=1", "objective.distillation.adversarial_weight=0.3"],
    ],
    ids=["mixture_nll", "regression", "joined", "conditional"],
)
def test_every_objective_trains_a_dit(train_config, dit, objective):
    name, *settings = objective
    folder = train(train_config(f"init_from={dit}", TAIL, f"objective.name={name}", *settings))
    assert load_pipeline(folder)([1], num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_a_plain_dit_is_sampled_in_a_pipeline(model_folder, dit, tmp_path):
    pipeline = load_pipeline(model_folder)
    pipeline.register_modules(unet=diffusers_dit().from_pretrained(dit))
    pipeline.save_pretrained(tmp_path / "plain")
    plain = load_pipeline(tmp_path / "plain")
    images = plain([0, 1], num_inference_steps=2, guidance_scale=2.0, output_type="pt").images
    assert images.isfinite().all() and images.std() > 0


def test_wrong_settings_for_a_dit_are_refused(train_config, dit):
    start = f"init_from={dit}"
    with pytest.raises(UserError, match="init_from: tail_blocks: expected 1 to 2, fewer than the network has, found 3"):
        train(train_config(start, "model.tail_blocks=3"))
    with pytest.raises(UserError, match=r"init_from: expected .* to extend a DiTTransformer2DModel to a mixture"):
        train(train_config(start, "model.z_channels=0", "objective.name=mse"))


def test_moment_heads_need_a_unet(model_folder, shards, dit, tmp_path, run):
    pipeline = load_pipeline(model_folder)
    pipeline.register_modules(unet=diffusers_dit().from_pretrained(dit))
    pipeline.save_pretrained(tmp_path / "plain")
    settings = [f"model={tmp_path / 'plain'}", f"shards={shards}", f"output={tmp_path / 'moments'}"]
    code, _, error = run(TrainMomentsConfig, train_moments, *settings)
    assert code == 2 and "model: unet: expected a UNet" in error and "DiTTransformer2DModel" in error
    assert not (tmp_path / "moments").exists()


@pytest.mark.slow
def test_the_recipe_for_a_dit(run, image_folder, vae_folder, dit, tmp_path):
    """Encode, train, fit Gaussians, and sample with four steps."""
    latents, mixture, drafts, samples = (tmp_path / name for name in ("latents", "mixture", "drafts", "samples"))
    images = [f"images.source={image_folder}", "images.resolution=16", "num_workers=0"]
    assert run(EncodeConfig, encode, *images, f"autoencoder={vae_folder}", f"output={latents}")[0] == 0
    process = ["diffusion.prediction_type=epsilon", "diffusion.beta_schedule=linear"]
    settings = [f"shards={latents}", f"autoencoder={vae_folder}", f"init_from={dit}", TAIL, "images_total=32", "batch_size=8"]
    assert run(TrainConfig, train, *settings, *process, "sample_steps=2", f"output={mixture}")[0] == 0
    fit = [f"model={mixture / 'model'}", f"shards={latents}", "rank=4", f"output={drafts}"]
    assert run(FitGaussianConfig, fit_gaussian, *fit)[0] == 0
    code, _, error = run(SampleConfig, sample, f"model={drafts}", "steps=4", "per_class=2", f"output={samples}")
    assert code == 0, error
    assert len(list(samples.glob("class*.png"))) == 4
