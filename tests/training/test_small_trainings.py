"""Trainings beside that of the denoiser: formulas of autoencoder, classifier and moments, and that settings have effects."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.config import load_config
from ldm_smd.data.images import load_pixels
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.data.shards import Manifest
from ldm_smd.data.stream import LatentStream
from ldm_smd.evaluation.reconstruction import to_uint8
from ldm_smd.models.feature_network import FeatureNetwork
from ldm_smd.models.moments import MomentHeads
from ldm_smd.pipelines import load_pipeline
from ldm_smd.training import train_autoencoder as autoencoder
from ldm_smd.training.metrics_log import read_metrics
from ldm_smd.training.rates import warmup_cosine
from ldm_smd.training.settings import ClassifierSetConfig, TrainAutoencoderConfig, TrainClassifierConfig, TrainMomentsConfig
from ldm_smd.training.train_autoencoder import (
    autoencoder_loss,
    save_comparison,
    set_latent_statistics,
    train_autoencoder,
)
from ldm_smd.training.train_classifier import LabelledPictures, accuracy, augmented_batch, train_classifier
from ldm_smd.training.train_moments import PredictionErrors, calibration, train_moments
from tests.rounding import alike
from tests.tiny import TINY_AUTOENCODER

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pixels(pictures):
    return load_pixels(ImagesConfig(source=str(pictures), resolution=16))[0]


def test_a_learning_rate_rises_and_falls():
    done = (0.0, 0.05, 0.1, 0.55, 1.0)
    assert [warmup_cosine(2.0, share, 0.1) for share in done] == pytest.approx([0, 1, 2, 1, 0], abs=1e-12)


@pytest.fixture
def steps(monkeypatch):
    """(loss, whether there were gradients before it, their norm after it) of every step of an AdamW."""
    found, parameters = [], []
    start, backward, step = torch.optim.AdamW.__init__, torch.Tensor.backward, torch.optim.AdamW.step

    def starting(self, given, **options):
        parameters[:] = list(given)
        start(self, parameters, **options)

    def going_back(self, *given, **options):
        found.append([self.item(), any(parameter.grad is not None for parameter in parameters)])
        backward(self, *given, **options)

    def stepping(self, *given, **options):
        gradients = [parameter.grad.square().sum() for parameter in parameters if parameter.grad is not None]
        found[-1].append(torch.stack(gradients).sum().sqrt().item())
        return step(self, *given, **options)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", starting)
    monkeypatch.setattr(torch.Tensor, "backward", going_back)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder


@pytest.fixture
def config(pictures, tmp_path):
    """A function from overrides to the settings of a training of four steps, into tmp_path/vae."""

    def build(*overrides):
        images = [f"{part}.{key}" for part in ("images", "held_out") for key in (f"source={pictures}", "resolution=16")]
        counts = ["images_total=32", "batch_size=8", "warmup_images=16", "ema_halflife_images=8"]
        places = [f"output={tmp_path / 'vae'}", f"work={tmp_path / 'work'}"]
        return load_config(TrainAutoencoderConfig, None, [*images, *counts, *TINY_AUTOENCODER, *places, *overrides])

    return build


def test_the_loss_is_its_formula(config):
    generator = torch.Generator().manual_seed(0)
    x, found = torch.randn(2, 2, 3, 4, 5, generator=generator).double()
    mean, logvar = torch.randn(2, 2, 4, 2, 2, generator=generator).double()
    terms = autoencoder_loss(found, x, mean, logvar, config("kl_weight=0.3", "squared_weight=0.7", "gradient_weight=0.2"))
    error = found - x
    down, right = error[:, :, 1:] - error[:, :, :-1], error[..., 1:] - error[..., :-1]
    expected = {
        "l1": error.abs().mean(),
        "l2": (error**2).mean(),
        "gradient": (down.abs().mean() + right.abs().mean()) / 2,
        "kl": ((mean**2 + logvar.exp() - 1 - logvar) / 2).mean(),
    }
    expected["loss"] = expected["l1"] + 0.7 * expected["l2"] + 0.2 * expected["gradient"] + 0.3 * expected["kl"]
    assert {name: value.item() for name, value in terms.items()} == pytest.approx({n: v.item() for n, v in expected.items()})


def test_the_autoencoders_rate_warms_up_and_falls_to_zero(config):
    settings = config("images_total=80", "batch_size=10", "warmup_images=40", "learning_rate=0.2")
    found = [autoencoder.learning_rate(settings, seen) for seen in (0, 20, 40, 80)]
    half = 1 + math.cos(math.pi / 4)
    assert found == pytest.approx([0.2 * 0.25, 0.075 * half, 0.1, 0])


def test_batches_are_of_all_pictures_half_of_them_mirrored(config):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (22, 3, 16, 16), dtype=torch.uint8, generator=generator)
    whole = pixels / 127.5 - 1
    seen, mirrored = set(), 0
    for flip in ("true", "false"):
        settings = config("images_total=200", "batch_size=200", f"flip={flip}")
        for picture in autoencoder.random_batch(pixels, settings, generator):
            same = [torch.allclose(picture, each, atol=1e-5) for each in whole]
            turned = [torch.allclose(picture, each.flip(2), atol=1e-5) for each in whole]
            assert any(same) or (flip == "true" and any(turned))
            seen.add((same if any(same) else turned).index(True))
            mirrored += flip == "true" and not any(same)
    assert seen == set(range(22)) and 60 < mirrored < 140


def test_pictures_stand_above_their_reconstructions(vae_folder, pixels, tmp_path):
    frozen = FrozenAutoencoder.from_pretrained(vae_folder)
    save_comparison(frozen, pixels[:10], tmp_path / "both.png")
    decoded = to_uint8(frozen.decode(frozen.normalise(frozen.encode_moments(pixels[:10])[:, 0])))
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "both.png"))).permute(2, 0, 1).int()
    for row, (pictures, first) in enumerate(((pixels, 0), (decoded, 0), (pixels, 8), (decoded, 8))):
        for column in range(2 if first else 8):
            # The last two and their reconstructions follow each other, as rows are of eight.
            place = 8 * row + column if first == 0 else 16 + column + 2 * (row - 2)
            top, left = (2 + 18 * part for part in divmod(place, 8))
            apart = sheet[:, top : top + 16, left : left + 16] - pictures[first + column].int()
            assert apart.abs().max() <= 1


def test_a_step_of_the_autoencoder_has_the_gradients_of_its_batch_clipped(config, steps):
    train_autoencoder(config("gradient_weight=100"))
    assert [before for _, before, _ in steps] == [False] * 4
    assert all(norm == pytest.approx(1, rel=1e-3) for *_, norm in steps)


def test_reports_are_means_over_their_steps(config, monkeypatch):
    totals, real = [], autoencoder.autoencoder_loss
    monkeypatch.setattr(autoencoder, "autoencoder_loss", lambda *given: totals.append(real(*given)) or totals[-1])
    monkeypatch.setattr(autoencoder, "REPORT_EVERY_IMAGES", 16)
    settings = config()
    train_autoencoder(settings)
    lines = [line for line in read_metrics(Path(settings.work) / "metrics.jsonl") if "l1" in line]
    assert [line["images_seen"] for line in lines] == [16, 32]
    for line, pair in zip(lines, (totals[:2], totals[2:])):
        assert {n: line[n] for n in pair[0]} == pytest.approx({n: float(sum(t[n].detach() for t in pair) / 2) for n in pair[0]})


def test_normalised_latents_have_mean_zero_and_variance_one(vae_folder, pixels):
    model = AutoencoderKL.from_pretrained(vae_folder, scaling_factor=1.0, shift_factor=None)
    set_latent_statistics(model, pixels, batch_size=5)
    frozen = FrozenAutoencoder(model)
    mean, logvar = frozen.encode_moments(pixels).unbind(dim=1)
    normalised = frozen.normalise(mean)
    variance = normalised.var(dim=(0, 2, 3), correction=0) + logvar.exp().mean(dim=(0, 2, 3)) * frozen.scale.flatten() ** 2
    assert torch.allclose(normalised.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(variance, torch.ones(4), atol=1e-3)


OTHERS = [
    "batch_size=4",
    "ema_halflife_images=1",
    "flip=false",
    "gradient_weight=2",
    "images_total=24",
    "kl_weight=0.1",
    "learning_rate=1e-2",
    "model.latent_channels=3",
    "model.layers_per_block=2",
    "model.mid_block_add_attention=false",
    "model.norm_num_groups=2",
    "seed=1",
    "squared_weight=2",
    "warmup_images=64",
]


@pytest.fixture(scope="module")
def usual():
    """The weights that the settings as they are end at, once they have been computed."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("setting", OTHERS)
def test_a_setting_changes_what_the_autoencoder_learns(config, usual, tmp_path, setting):
    if not usual:
        usual.update(
            load_file(train_autoencoder(config(f"output={tmp_path / 'usual'}", f"work={tmp_path / 'first'}")) / WEIGHTS)
        )
    found = load_file(train_autoencoder(config(setting)) / WEIGHTS)
    assert found.keys() != usual.keys() or not all(torch.equal(found[name], usual[name]) for name in found)


def test_the_decoder_alone_is_trained_from_given_weights(config, tmp_path):
    """The encoder and the constants of its latents stay, so that shards do."""
    model = autoencoder.build(config())
    model.register_to_config(latents_mean=[1.0, 2, 3, 4], latents_std=[2.0] * 4)
    model.save_pretrained(tmp_path / "start")
    start = model.state_dict()
    settings = [f"init_from={tmp_path / 'start'}", "train_encoder=false", "learning_rate=1e-2"]
    folder = train_autoencoder(config(*settings))
    after = load_file(folder / WEIGHTS)
    changed = {name.split(".")[0] for name in start if not torch.equal(start[name], after[name])}
    assert changed == {"decoder"}
    assert AutoencoderKL.load_config(folder)["latents_mean"] == [1, 2, 3, 4]
    assert "by the decoder alone after those of" in (folder / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Classifier


@pytest.mark.parametrize("mirror", [True, False])
def test_pictures_of_the_classifier_are_shifted_and_some_mirrored(mirror):
    """By up to an eighth of the side, the edge repeated, and all pictures of a class with its label."""
    picture = torch.arange(16).expand(3, 16, 16).to(torch.uint8) * 8  # a ramp to the right
    labelled = LabelledPictures(torch.stack([picture, picture // 2]), torch.tensor([4, 7]))
    torch.manual_seed(0)
    settings = ClassifierSetConfig(name="x", batch_size=400, mirror=mirror)
    found, labels = augmented_batch(labelled, settings)
    assert found.shape == (400, 3, 16, 16) and set(labels.tolist()) == {4, 7}
    shifts, turned = set(), 0
    for ramp, label in zip((found[:, 0, 8] + 1) * 127.5 / 8, labels):
        ramp = (ramp if label == 4 else 2 * ramp).round()
        turned += int(ramp[0] > ramp[-1])
        ramp = ramp.flip(0) if ramp[0] > ramp[-1] else ramp
        [shift] = [s for s in range(-4, 5) if (ramp - (torch.arange(16) + s).clamp(0, 15)).abs().max() < 0.5]
        shifts.add(shift)
    assert {-2, 2} <= shifts <= set(range(-2, 3))
    assert 140 < turned < 260 if mirror else turned == 0


def test_accuracy_is_the_share_that_is_right():
    torch.manual_seed(0)
    model = FeatureNetwork((4, 8), {"x": 3}).eval()
    pixels = torch.randint(0, 256, (300, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        likely = model.heads["x"](model(pixels / 127.5 - 1)).argmax(dim=1)
    labels = torch.where(torch.arange(300) < 75, (likely + 1) % 3, likely)
    ranges = set()
    model.register_forward_pre_hook(lambda _, given: ranges.add((given[0].min().item(), given[0].max().item())))
    assert accuracy(model, "x", LabelledPictures(pixels, labels), torch.device("cpu")) == pytest.approx(0.75, abs=0.01)
    assert ranges == {(-1.0, 1.0)}


def test_a_seed_gives_a_classifier(pictures, tmp_path):
    def trained(name, seed):
        images = f"{{source: '{pictures}', resolution: 16}}"
        sets = f"sets=[{{name: a, batch_size: 8, images: {images}, held_out: {images}}}]"
        settings = [sets, "images_total=8", f"output={tmp_path / name}", f"seed={seed}", "block_out_channels=[4,8]"]
        return load_file(train_classifier(load_config(TrainClassifierConfig, None, settings)) / WEIGHTS)

    a, b, c = trained("a", 0), trained("b", 0), trained("c", 1)
    assert all(torch.equal(a[name], b[name]) for name in a) and not all(torch.equal(a[name], c[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------------------
# Moments


@pytest.fixture
def errors(gaussian_folder):
    pipeline = load_pipeline(gaussian_folder)
    return PredictionErrors(pipeline, FrozenAutoencoder(pipeline.vae), label_dropout=0.0)


def test_the_error_is_that_of_v(errors, shards):
    """(prediction of x_0 - x_0) / s_t, whatever the network predicts; here it says 0."""
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
        errors.pipeline.scheduler.register_to_config(prediction_type=kind)
        torch.manual_seed(0)
        variance, third, found = errors(heads, few, t)
        torch.manual_seed(0)
        torch.randn_like(x0), torch.rand(8)  # of the posterior, and of the labels to leave out
        assert alike(found, expected(torch.randn_like(x0)), 1e-3)
        assert torch.allclose(variance, torch.ones_like(x0)) and not third.any()


def test_calibration_is_the_predicted_variance_over_that_found(errors, shards):
    heads = MomentHeads.for_unet(errors.pipeline.unet)
    few = LatentStream(Manifest.load(shards), 22, 22).batch_at(0)
    found = calibration(errors, heads, few)
    assert list(found) == [99, 249, 499, 749, 999]
    torch.manual_seed(0)
    again = calibration(errors, heads, few)
    torch.manual_seed(0)
    for t, share in again.items():
        variance, _, error = errors(heads, few, torch.full((22,), t))
        assert share == pytest.approx(float((variance.mean() / (error**2).mean()).detach()), rel=1e-4)


@pytest.mark.slow
def test_settings_change_what_the_heads_learn(gaussian_folder, loud_pipeline, shards, tmp_path):
    loud_pipeline(gaussian_folder).save_pretrained(tmp_path / "loud")

    def trained(name, *changes):
        settings = [f"model={tmp_path / 'loud'}", f"shards={shards}", "images_total=32", "batch_size=8"]
        config = load_config(TrainMomentsConfig, None, [*settings, *changes, f"output={tmp_path / name}"])
        return load_file(train_moments(config) / "moments" / WEIGHTS)

    usual = trained("usual")
    for setting in ("learning_rate=1e-2", "third_weight=1", "ema_halflife_images=1", "label_dropout=0.9", "seed=1"):
        found = trained(setting, setting)
        assert usual.keys() == found.keys() and not all(torch.equal(found[name], usual[name]) for name in found), setting


def test_a_step_of_the_heads_has_its_loss_and_the_gradients_of_its_batch_clipped(
    gaussian_folder, loud_pipeline, shards, tmp_path, steps, monkeypatch
):
    """mean (variance - e^2)^2 + third_weight mean (third - e^3)^2."""
    loud_pipeline(gaussian_folder).save_pretrained(tmp_path / "loud")
    outputs, real = [], PredictionErrors.__call__
    monkeypatch.setattr(PredictionErrors, "__call__", lambda *given: outputs.append(real(*given)) or outputs[-1])
    settings = [f"model={tmp_path / 'loud'}", f"shards={shards}", "images_total=24", "batch_size=8", "third_weight=0.7"]
    train_moments(load_config(TrainMomentsConfig, None, [*settings, f"output={tmp_path / 'heads'}"]))
    assert [before for _, before, _ in steps] == [False] * 3
    for (loss, _, norm), (variance, third, error) in zip(steps, outputs):
        expected = ((variance - error**2) ** 2).mean() + 0.7 * ((third - error**3) ** 2).mean()
        assert loss == pytest.approx(expected.item(), rel=1e-4) and norm < 1.001
    assert max(norm for *_, norm in steps) > 0.99
