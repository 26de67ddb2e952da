import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.config import load_config
from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentStream
from ldm_smd.errors import UserError
from ldm_smd.models.moments import MomentHeads
from ldm_smd.pipelines import load_pipeline, seeded_generators
from ldm_smd.schedulers import make_scheduler
from ldm_smd.training.loop import train
from ldm_smd.training.settings import TrainMomentsConfig
from ldm_smd.training.train_moments import PredictionErrors, calibration, train_moments
from tests.rounding import nearly_equal
from tests.training.results import WEIGHTS


@pytest.mark.slow
def test_moments_end_to_end(gaussian_folder, shards, tmp_path, run):
    settings = [f"model={gaussian_folder}", f"shards={shards}", "images_total=320", "batch_size=16", "ema_halflife_images=64"]
    code, printed, error = run(TrainMomentsConfig, train_moments, *settings, f"output={tmp_path / 'gms'}")
    assert code == 0, error
    assert "ratio of predicted variance to squared error" in printed
    pipeline, before = load_pipeline(tmp_path / "gms"), load_pipeline(gaussian_folder)
    assert type(pipeline.scheduler).__name__ == "GMSScheduler"
    assert pipeline.scheduler.config.prediction_type == before.scheduler.config.prediction_type
    for name, value in before.unet.state_dict().items():
        assert torch.equal(value, pipeline.unet.state_dict()[name]), name
    assert pipeline.moments.conv_out.weight.any()
    images = pipeline([0, 1], 2, 3, guidance_scale=2.0, generator=seeded_generators([0, 1]), output_type="pt").images
    alone = pipeline([1], 1, 3, guidance_scale=2.0, generator=seeded_generators([1]), output_type="pt").images
    assert nearly_equal(images[1:], alone)
    code, _, error = run(TrainMomentsConfig, train_moments, *settings, f"output={tmp_path / 'gms'}")
    assert code == 2 and "output: expected a new or empty folder" in error


def test_a_mixture_or_missing_moment_heads_give_one_line(gaussian_folder, model_folder, shards, tmp_path):
    config = TrainMomentsConfig(model=str(model_folder), shards=str(shards), output=str(tmp_path / "gms"))
    with pytest.raises(UserError, match="model: expected a Gaussian UNet"):
        train_moments(config)
    pipeline = load_pipeline(gaussian_folder)
    pipeline.scheduler = make_scheduler("GMSScheduler:num_moments=2", pipeline.scheduler)
    with pytest.raises(UserError, match=r"a model with a moments component.*see tools/train_moments\.py"):
        pipeline([0])


@pytest.fixture
def errors(gaussian_folder):
    pipeline = load_pipeline(gaussian_folder)
    return PredictionErrors(pipeline, FrozenAutoencoder(pipeline.vae), label_dropout=0.0)


def test_errors_are_errors_of_v(errors, shards):
    """They are (predicted x_0 - x_0) / s_t for every prediction type. Here the network outputs 0."""
    unet = errors.pipeline.unet
    heads = MomentHeads.for_unet(unet)
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    few = LatentStream(Manifest.load(shards), 8, 8).batch_at(0)
    few.moments[:, 1] = -30.0  # no posterior noise
    x0 = errors.autoencoder.normalise(few.moments[:, 0].float())
    t = torch.full((8,), 400)
    alphabar = errors.pipeline.scheduler.alphas_cumprod[400]
    a, s = alphabar.sqrt(), (1 - alphabar).sqrt()
    for kind, expected in (("sample", lambda noise: -x0 / s), ("v_prediction", lambda noise: a * noise - s * x0)):
        errors.pipeline.training_scheduler.register_to_config(prediction_type=kind)
        torch.manual_seed(0)
        variance, third, found = errors(heads, few, t)
        torch.manual_seed(0)
        torch.randn_like(x0), torch.rand(8)  # for the posterior, and for the labels to drop
        assert nearly_equal(found, expected(torch.randn_like(x0)), 1e-3)
        assert torch.allclose(variance, torch.ones_like(x0)) and not third.any()
    errors.pipeline.training_scheduler = FlowMatchEulerDiscreteScheduler()
    torch.manual_seed(0)
    found = errors(heads, few, t)[2]
    torch.manual_seed(0)
    torch.randn_like(x0), torch.rand(8)
    velocity = torch.randn_like(x0) - x0  # the error of the flow prediction; times the norm of x_t, it is the error of v
    assert nearly_equal(found, (0.6**2 + 0.4**2) ** 0.5 * velocity, 1e-3)


def test_moments_are_those_for_the_embedding_of_each_image(embedded, train_config, tmp_path):
    """Without embeddings in the batch, they would be those for no prompt."""
    overrides = (f"shards={embedded}", "image_conditional=true", "images_total=16", "model.z_channels=0", "objective.name=mse")
    pipeline = load_pipeline(train(train_config(*overrides, f"output={tmp_path / 'gaussian'}")))
    shown = []
    pipeline.unet.register_forward_pre_hook(lambda _, given, options: shown.append(options["image_embeds"]), with_kwargs=True)
    batch = LatentStream(Manifest.load(embedded), 22, 22, embeddings=True).batch_at(0)
    for dropout, wanted in ((0.0, batch.embeddings.float()), (1.0, torch.zeros(22, 16))):
        errors = PredictionErrors(pipeline, FrozenAutoencoder(pipeline.vae), dropout)
        errors(MomentHeads.for_unet(pipeline.unet), batch, torch.full((22,), 400))
        assert torch.equal(shown[-1], wanted)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_labels_are_dropped_at_the_given_rate(gaussian_folder, shards, dropout):
    pipeline, labels = load_pipeline(gaussian_folder), []
    errors = PredictionErrors(pipeline, FrozenAutoencoder(pipeline.vae), label_dropout=dropout)
    pipeline.unet.register_forward_pre_hook(lambda _, given: labels.extend(given[2].tolist()))
    batch = LatentStream(Manifest.load(shards), 22, 22).batch_at(0)
    errors(MomentHeads.for_unet(pipeline.unet), batch)
    assert labels == (22 * [2] if dropout else batch.labels.tolist())


def test_calibration_is_the_ratio_of_predicted_variance_to_squared_error(errors, shards):
    heads = MomentHeads.for_unet(errors.pipeline.unet)
    few = LatentStream(Manifest.load(shards), 22, 22).batch_at(0)
    found = calibration(errors, heads, few)
    assert list(found) == [99, 249, 499, 749, 999]
    torch.manual_seed(0)
    again = calibration(errors, heads, few)
    torch.manual_seed(0)
    for t, ratio in again.items():
        variance, _, error = errors(heads, few, torch.full((22,), t))
        assert ratio == pytest.approx(float((variance.mean() / (error**2).mean()).detach()), rel=1e-4)


@pytest.mark.slow
def test_settings_change_the_weights_of_the_heads(gaussian_folder, loud_pipeline, shards, tmp_path):
    loud_pipeline(gaussian_folder).save_pretrained(tmp_path / "loud")

    def trained(name, *changes):
        settings = [f"model={tmp_path / 'loud'}", f"shards={shards}", "images_total=32", "batch_size=8"]
        config = load_config(TrainMomentsConfig, None, [*settings, *changes, f"output={tmp_path / name}"])
        return load_file(train_moments(config) / "moments" / WEIGHTS)

    usual = trained("usual")
    for setting in ("learning_rate=1e-2", "third_moment_weight=1", "ema_halflife_images=1", "label_dropout=0.9", "seed=1"):
        found = trained(setting, setting)
        assert usual.keys() == found.keys() and not all(torch.equal(found[name], usual[name]) for name in found), setting


def test_the_loss_of_the_heads_computes_its_formula_and_gradients_are_clipped(
    gaussian_folder, loud_pipeline, shards, tmp_path, adamw_steps, monkeypatch
):
    """The loss is mean (variance - e^2)^2 + third_moment_weight mean (third - e^3)^2."""
    loud_pipeline(gaussian_folder).save_pretrained(tmp_path / "loud")
    outputs, real = [], PredictionErrors.__call__
    monkeypatch.setattr(PredictionErrors, "__call__", lambda *given: outputs.append(real(*given)) or outputs[-1])
    settings = [f"model={tmp_path / 'loud'}", f"shards={shards}", "images_total=24", "batch_size=8", "third_moment_weight=0.7"]
    train_moments(load_config(TrainMomentsConfig, None, [*settings, f"output={tmp_path / 'heads'}"]))
    assert [before for _, before, _ in adamw_steps] == [False] * 3
    for (loss, _, norm), (variance, third, error) in zip(adamw_steps, outputs):
        expected = ((variance - error**2) ** 2).mean() + 0.7 * ((third - error**3) ** 2).mean()
        assert loss == pytest.approx(expected.item(), rel=1e-4) and norm < 1.001
    assert max(norm for *_, norm in adamw_steps) > 0.99
