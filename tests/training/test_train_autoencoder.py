"""Training of the autoencoder: its formulas, and the effects of its settings."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.data.images import load_pixels
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.errors import UserError
from ldm_smd.evaluation.reconstruction import to_uint8
from ldm_smd.training import train_autoencoder as autoencoder
from ldm_smd.training.metrics_log import read_metrics
from ldm_smd.training.train_autoencoder import autoencoder_loss, normalise_latents, save_comparison, train_autoencoder
from tests.training.results import WEIGHTS


@pytest.fixture(scope="module")
def pixels(image_folder):
    return load_pixels(ImagesConfig(source=str(image_folder), resolution=16))[0]


def test_the_loss_computes_its_formula(vae_config):
    generator = torch.Generator().manual_seed(0)
    x, found = torch.randn(2, 2, 3, 4, 5, generator=generator).double()
    mean, logvar = torch.randn(2, 2, 4, 2, 2, generator=generator).double()
    terms = autoencoder_loss(found, x, mean, logvar, vae_config("kl_weight=0.3", "l2_weight=0.7", "gradient_weight=0.2"))
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


def test_batches_contain_all_images_and_half_are_mirrored(vae_config):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (22, 3, 16, 16), dtype=torch.uint8, generator=generator)
    scaled = pixels / 127.5 - 1
    seen, mirrored = set(), 0
    for mirror in ("true", "false"):
        settings = vae_config("images_total=200", "batch_size=200", f"mirror={mirror}")
        for image in autoencoder.random_batch(pixels, settings, generator):
            same = [torch.allclose(image, each, atol=1e-5) for each in scaled]
            flipped = [torch.allclose(image, each.flip(2), atol=1e-5) for each in scaled]
            assert any(same) or (mirror == "true" and any(flipped))
            seen.add((same if any(same) else flipped).index(True))
            mirrored += mirror == "true" and not any(same)
    assert seen == set(range(22)) and 60 < mirrored < 140


def test_the_sheet_shows_images_above_their_reconstructions(vae_folder, pixels, tmp_path):
    frozen = FrozenAutoencoder.from_pretrained(vae_folder)
    save_comparison(frozen, pixels[:10], tmp_path / "both.png")
    decoded = to_uint8(frozen.decode(frozen.normalise(frozen.encode_moments(pixels[:10])[:, 0])))
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "both.png"))).permute(2, 0, 1).int()
    for row, (images, first) in enumerate(((pixels, 0), (decoded, 0), (pixels, 8), (decoded, 8))):
        for column in range(2 if first else 8):
            # Rows have eight cells, so the last two images and their reconstructions share a row.
            cell = 8 * row + column if first == 0 else 16 + column + 2 * (row - 2)
            top, left = (2 + 18 * part for part in divmod(cell, 8))
            difference = sheet[:, top : top + 16, left : left + 16] - images[first + column].int()
            assert difference.abs().max() <= 1


def test_every_step_uses_only_the_clipped_gradients_of_its_batch(vae_config, adamw_steps):
    train_autoencoder(vae_config("gradient_weight=100"))
    assert [before for _, before, _ in adamw_steps] == [False] * 4
    assert all(norm == pytest.approx(1, rel=1e-3) for *_, norm in adamw_steps)


def test_reports_are_means_over_steps(vae_config, monkeypatch):
    totals, real = [], autoencoder.autoencoder_loss
    monkeypatch.setattr(autoencoder, "autoencoder_loss", lambda *given: totals.append(real(*given)) or totals[-1])
    monkeypatch.setattr(autoencoder, "REPORT_EVERY_IMAGES", 16)
    settings = vae_config()
    train_autoencoder(settings)
    lines = [line for line in read_metrics(Path(settings.work) / "metrics.jsonl") if "l1" in line]
    assert [line["images_seen"] for line in lines] == [16, 32]
    for line, pair in zip(lines, (totals[:2], totals[2:])):
        assert {n: line[n] for n in pair[0]} == pytest.approx({n: float(sum(t[n].detach() for t in pair) / 2) for n in pair[0]})


@pytest.mark.parametrize("constants", [(1.0, None), (0.36, 0.1)])
def test_normalised_latents_have_mean_zero_and_variance_one(vae_folder, pixels, constants):
    """Also after a start from an autoencoder with a scaling factor."""
    model = AutoencoderKL.from_pretrained(vae_folder, scaling_factor=constants[0], shift_factor=constants[1])
    normalise_latents(model, pixels, batch_size=5)
    frozen = FrozenAutoencoder(model)
    mean, logvar = frozen.encode_moments(pixels).unbind(dim=1)
    normalised = frozen.normalise(mean)
    variance = normalised.var(dim=(0, 2, 3), correction=0) + logvar.exp().mean(dim=(0, 2, 3)) * frozen.scale.flatten() ** 2
    assert torch.allclose(normalised.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(variance, torch.ones(4), atol=1e-3)


def test_the_quality_is_measured_on_the_held_out_images(vae_config, image_folder, monkeypatch):
    measured, real = [], autoencoder.reconstruction_psnr
    monkeypatch.setattr(autoencoder, "reconstruction_psnr", lambda *given: measured.append(given[1]) or real(*given))
    train_autoencoder(vae_config(f"held_out.source={image_folder / 'disc'}", "checkpoint_every_images=16"))
    expected = load_pixels(ImagesConfig(source=str(image_folder / "disc"), resolution=16))[0]
    assert len(measured) == 3 and all(torch.equal(pixels, expected) for pixels in measured)


def test_the_decoder_gets_samples_of_the_posterior(vae_config, monkeypatch):
    """With its standard deviation, here 3, and its mean, here 5."""
    decoded, real = [], AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, z, **options: decoded.append(z) or real(self, z, **options))

    def known(model, x, latent_noise):
        mean = model.encode(x).latent_dist.mean
        return 0 * mean + 5, torch.full_like(mean, 9.0).log()

    monkeypatch.setattr(autoencoder, "posterior", known)
    train_autoencoder(vae_config("images_total=8"))
    assert decoded[0].mean().item() == pytest.approx(5, abs=0.3) and decoded[0].std().item() == pytest.approx(3, rel=0.1)


OTHERS = [
    "batch_size=4",
    "ema_halflife_images=1",
    "mirror=false",
    "gradient_weight=2",
    "images_total=24",
    "kl_weight=0.1",
    "learning_rate=1e-2",
    "model.kind=AutoencoderDC",
    "model.latent_channels=3",
    "model.layers_per_block=2",
    "model.mid_block_add_attention=false",
    "model.norm_num_groups=2",
    "precision=bf16",
    "seed=1",
    "l2_weight=2",
    "warmup_images=64",
]


@pytest.fixture(scope="module")
def usual():
    """The weights of the default settings, after the first test has computed them."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("setting", OTHERS)
def test_a_setting_changes_the_weights(vae_config, usual, tmp_path, setting):
    if not usual:
        usual.update(
            load_file(train_autoencoder(vae_config(f"output={tmp_path / 'usual'}", f"work={tmp_path / 'first'}")) / WEIGHTS)
        )
    found = load_file(train_autoencoder(vae_config(setting)) / WEIGHTS)
    assert found.keys() != usual.keys() or not all(torch.equal(found[name], usual[name]) for name in found)


DEEP = ["model.kind=AutoencoderDC", "model.block_out_channels=[8,8,16]"]
"""16 pixels to 4 latents."""


def test_a_deep_compression_autoencoder_has_the_given_noise(vae_config):
    mean, logvar = autoencoder.posterior(autoencoder.build(vae_config(*DEEP)), torch.zeros(2, 3, 16, 16), latent_noise=0.3)
    assert logvar.shape == mean.shape and torch.allclose((0.5 * logvar).exp(), torch.tensor(0.3))


@pytest.mark.parametrize("setting", ["latent_noise=1", "model.decoder_layers_per_block=1"])
def test_a_setting_changes_the_weights_of_a_deep_compression_autoencoder(vae_config, tmp_path, setting):
    usual = load_file(
        train_autoencoder(vae_config(*DEEP, f"output={tmp_path / 'usual'}", f"work={tmp_path / 'first'}")) / WEIGHTS
    )
    found = load_file(train_autoencoder(vae_config(*DEEP, setting)) / WEIGHTS)
    assert found.keys() != usual.keys() or not all(torch.equal(found[name], usual[name]) for name in found)


def test_a_deep_compression_autoencoder_has_normalised_latents(vae_config, pixels):
    """They are normalised by the weights, so that other programs need no constants. Decoding is the same away from borders."""
    torch.manual_seed(0)
    model = autoencoder.build(vae_config(*DEEP)).eval()
    before = FrozenAutoencoder(model)
    latents = before.encode_moments(pixels)[:, 0]
    with torch.no_grad():
        features = model.decoder.conv_in(latents)
    normalise_latents(model, pixels, batch_size=5)
    frozen = FrozenAutoencoder(model)
    found = frozen.encode_moments(pixels)[:, 0]
    assert torch.equal(frozen.normalise(found), found), "no other normalisation"
    assert torch.allclose(found.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(found.var(dim=(0, 2, 3), correction=0), torch.ones(4), atol=1e-3)
    with torch.no_grad():
        assert torch.allclose(model.decoder.conv_in(found)[..., 1:-1, 1:-1], features[..., 1:-1, 1:-1], atol=1e-4)


def test_a_deep_compression_autoencoder_is_trained_in_two_stages(vae_config, pixels, tmp_path):
    first = train_autoencoder(vae_config(*DEEP, f"output={tmp_path / 'first'}", f"work={tmp_path / 'first-run'}"))
    decoder_only = [*DEEP, f"init_from={first}", "train_encoder=false", "learning_rate=1e-2"]
    second = train_autoencoder(vae_config(*decoder_only))
    models = [AutoencoderDC.from_pretrained(folder).state_dict() for folder in (first, second)]
    changed = {name.split(".")[0] for name in models[0] if not torch.equal(models[0][name], models[1][name])}
    assert changed == {"decoder"}
    a, b = (FrozenAutoencoder.from_pretrained(folder) for folder in (first, second))
    assert a.identity() == b.identity() and a.factor == 4
    assert "# A small AutoencoderDC" in (first / "README.md").read_text()


def test_a_training_in_channels_last_resumes(vae_config, tmp_path, monkeypatch, capsys):
    """On a GPU, the state of the optimizer is in channels last too, which safetensors does not accept."""
    real = autoencoder.build
    monkeypatch.setattr(autoencoder, "build", lambda config: real(config).to(memory_format=torch.channels_last))
    straight = load_file(
        train_autoencoder(vae_config(*DEEP, f"output={tmp_path / 'a'}", f"work={tmp_path / 'a-run'}")) / WEIGHTS
    )
    interrupted = [*DEEP, "checkpoint_every_images=16", f"work={tmp_path / 'b-run'}"]
    monkeypatch.setattr(autoencoder, "write_model_folder", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_autoencoder(vae_config(*interrupted, "images_total=16", f"output={tmp_path / 'b'}"))
    monkeypatch.undo()
    capsys.readouterr()
    again = load_file(train_autoencoder(vae_config(*interrupted, f"output={tmp_path / 'c'}", "resume_changed=true")) / WEIGHTS)
    assert straight.keys() == again.keys()
    printed = capsys.readouterr().out
    assert "32 images: " in printed and "16 images: " not in printed, "the second half alone"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.block_out_channels=[8]"], "two levels or more"),
        (["model.block_out_channels=[8,8,24]"], "a divisor of 32 after 8"),
        (["model.block_out_channels=[8,8,16]", "model.latent_channels=3"], "a multiple of latent_channels=3 at the end"),
    ],
)
def test_invalid_sizes_of_a_deep_compression_autoencoder_are_refused(vae_config, settings, message):
    with pytest.raises(UserError, match=message):
        vae_config("model.kind=AutoencoderDC", *settings)


def test_sizes_that_do_not_fit_are_refused(vae_config):
    with pytest.raises(UserError, match=r"^images\.resolution: expected a multiple of 2, the downsampling factor, found 17"):
        vae_config("images.resolution=17", "held_out.resolution=17")
    with pytest.raises(UserError, match=r"^held_out\.resolution: expected 16, as images\.resolution, found 64"):
        vae_config("held_out.resolution=64")


def test_a_diverged_training_replaces_nothing(vae_config, tmp_path):
    """A network of NaN decodes to black, so its PSNR looks like that of a bad one."""
    folder = train_autoencoder(vae_config())
    before = (folder / WEIGHTS).read_bytes()
    model = autoencoder.build(vae_config())
    model.decoder.conv_in.bias.data.fill_(torch.nan)
    model.save_pretrained(tmp_path / "diverged")
    settings = [f"init_from={tmp_path / 'diverged'}", f"work={tmp_path / 'other'}", "checkpoint_every_images=16"]
    with pytest.raises(UserError, match=r"^learning_rate: expected one .*, found weights of NaN at 16 images"):
        train_autoencoder(vae_config(*settings))
    assert (folder / WEIGHTS).read_bytes() == before and not list((tmp_path / "other").glob("checkpoints/images-*"))


def test_the_average_has_its_half_life(vae_config, tmp_path):
    """After one step from other weights, EMA = start + (1 - 0.5^(batch / half-life)) (weights - start)."""
    torch.manual_seed(0)
    model = autoencoder.build(vae_config())
    model.save_pretrained(tmp_path / "start")
    settings = ["images_total=8", "checkpoint_every_images=8", "ema_halflife_images=16", "learning_rate=1e-2"]
    train_autoencoder(vae_config(*settings, f"init_from={tmp_path / 'start'}"))
    start, newest = model.state_dict(), tmp_path / "work/checkpoints/images-000000000008"
    weights, average = (load_file(newest / name / WEIGHTS) for name in ("model", "ema"))
    assert any(not torch.equal(weights[name], start[name]) for name in start)
    for name, value in start.items():
        assert torch.allclose(average[name], value + (1 - 0.5**0.5) * (weights[name] - value), atol=1e-6), name


def test_only_the_decoder_is_trained_without_train_encoder(vae_config, tmp_path):
    """The encoder and the normalisation of its latents do not change, so existing shards can still be used."""
    model = autoencoder.build(vae_config())
    constants = {"latents_mean": [1, 2, 3, 4], "latents_std": [2] * 4, "scaling_factor": 1.5, "shift_factor": 0.25}
    model.register_to_config(**constants)
    model.save_pretrained(tmp_path / "start")
    start = model.state_dict()
    settings = [f"init_from={tmp_path / 'start'}", "train_encoder=false", "learning_rate=1e-2"]
    folder = train_autoencoder(vae_config(*settings))
    after = load_file(folder / WEIGHTS)
    changed = {name.split(".")[0] for name in start if not torch.equal(start[name], after[name])}
    assert changed == {"decoder"}
    assert AutoencoderKL.load_config(folder).items() >= constants.items()
    assert "(decoder only), starting from" in (folder / "README.md").read_text()
