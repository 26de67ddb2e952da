import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, UNet2DModel

from ldm_smd.autoencoder import FrozenAutoencoder, latent_affine, sample_latents, spatial_factor
from ldm_smd.data.shards import Manifest
from ldm_smd.errors import UserError


def tiny():
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


def dc():
    return AutoencoderDC(
        in_channels=3,
        latent_channels=8,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        scaling_factor=0.41,
    )


@pytest.mark.parametrize("make", [tiny, dc])
def test_deterministic_autoencoders(make):
    """FrozenAutoencoder agrees with the diffusers class, and normalises latents by its scaling factor."""
    torch.manual_seed(0)
    model = make().eval()
    frozen = FrozenAutoencoder(model)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        encoded = model.encode(pixels / 127.5 - 1)
        z = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        decoded = model.decode(z).sample.clamp(-1, 1)
    moments = frozen.encode_moments(pixels)
    assert moments.shape == (2, 1, *z.shape[1:]) and torch.allclose(moments[:, 0], z, atol=1e-5)
    latents = frozen.normalise(sample_latents(moments))
    assert torch.allclose(latents, z * model.config.scaling_factor, atol=1e-5)
    assert torch.allclose(frozen.decode(latents), decoded, atol=1e-4)


def test_kl_autoencoder(vae_folder):
    model = AutoencoderKL.from_pretrained(vae_folder).eval()
    frozen = FrozenAutoencoder.from_pretrained(vae_folder)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        posterior = model.encode(pixels / 127.5 - 1).latent_dist
        decoded = model.decode(posterior.mean).sample.clamp(-1, 1)
    moments = frozen.encode_moments(pixels)
    assert torch.allclose(moments, torch.stack((posterior.mean, posterior.logvar), 1), atol=1e-5)
    latents = frozen.normalise(moments[:, 0])
    assert torch.allclose(latents, (posterior.mean - 0.1) * 0.7, atol=1e-5)
    assert torch.allclose(frozen.decode(latents), decoded, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_sampled_latents_have_the_moments_of_the_posterior():
    moments = torch.stack((torch.full((4000, 1, 2, 2), 3.0), torch.full((4000, 1, 2, 2), -1.0)), dim=1)
    z = sample_latents(moments.half(), torch.Generator().manual_seed(0))
    assert z.dtype == torch.float32
    assert z.mean().item() == pytest.approx(3, abs=0.03) and z.var().item() == pytest.approx(0.3679, rel=0.05)


def test_latents_are_normalised_by_either_convention_of_constants():
    shift, scale = latent_affine({"scaling_factor": 0.5, "shift_factor": 0.2})
    assert (shift.item(), scale.item()) == (pytest.approx(0.2), 0.5)
    shift, scale = latent_affine({"scaling_factor": 2.0, "latents_mean": [1.0, 2.0], "latents_std": [4.0, 8.0]})
    assert shift.flatten().tolist() == [1, 2] and scale.flatten().tolist() == [0.5, 0.25]
    shift, scale = latent_affine({"scaling_factor": 0.3, "shift_factor": None, "latents_mean": None})
    assert (shift.item(), scale.item()) == (0, pytest.approx(0.3))


@pytest.mark.parametrize("force_upcast", [True, False])
def test_force_upcast_makes_half_precision_weights_run_in_float32(vae_folder, force_upcast):
    """Afterwards the user's autoencoder has its dtype, training mode and requires_grad again."""
    half = AutoencoderKL.from_pretrained(vae_folder, torch_dtype=torch.float16, force_upcast=force_upcast).train()
    seen = []
    for network in (half.encoder, half.decoder):
        network.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0].dtype, module.training)))
    frozen = FrozenAutoencoder(half)
    latents = frozen.normalise(frozen.encode_moments(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))[:, 0])
    decoded = frozen.decode(latents)
    assert decoded.dtype == torch.float32 and not decoded.requires_grad
    assert seen == [(torch.float32 if force_upcast else torch.float16, False)] * 2
    assert half.dtype == torch.float16 and half.training and all(weights.requires_grad for weights in half.parameters())


def test_other_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="autoencoder: expected one of AutoencoderKL"):
        FrozenAutoencoder(
            UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
        )
    with pytest.raises(UserError, match=r"^autoencoder: expected .*, found neither config\.json nor vae/config\.json in "):
        FrozenAutoencoder.from_pretrained(tmp_path)


def test_the_autoencoder_of_a_pipeline_folder_is_loaded(model_folder):
    """It has the same identity as the autoencoder in its own folder."""
    own, of_pipeline = (FrozenAutoencoder.from_pretrained(folder) for folder in (model_folder / "vae", model_folder))
    assert own.identity() == of_pipeline.identity()
    assert of_pipeline.name == str(model_folder)


def test_a_mismatch_with_the_shards_gives_the_field(shards, vae_folder):
    manifest = Manifest.load(shards)
    model = AutoencoderKL.from_pretrained(vae_folder)
    manifest.check_autoencoder(FrozenAutoencoder(model, "same"))
    with torch.no_grad():
        next(model.decoder.parameters()).add_(1e-3)
    manifest.check_autoencoder(FrozenAutoencoder(model, "another decoder"))
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1e-3)
    with pytest.raises(UserError, match="encoder_sha256 differs"):
        manifest.check_autoencoder(FrozenAutoencoder(model, "changed"))
    model = AutoencoderKL.from_pretrained(vae_folder, scaling_factor=0.5)
    with pytest.raises(UserError, match="scale differs"):
        manifest.check_autoencoder(FrozenAutoencoder(model, "other scale"))
    with pytest.raises(UserError, match="class differs"):
        manifest.check_autoencoder(FrozenAutoencoder(tiny(), "tiny"))


def test_an_offloaded_or_compiled_autoencoder_works(vae_folder):
    """accelerate keeps the device to run on in hooks, of some modules or of all."""
    plain = FrozenAutoencoder.from_pretrained(vae_folder)
    latents = torch.randn(1, 4, 8, 8)
    expected = plain.decode(latents)
    offloaded = FrozenAutoencoder.from_pretrained(vae_folder)
    cpu_offload(offloaded.model, torch.device("cpu"))
    assert torch.allclose(offloaded.decode(latents), expected, atol=1e-5)
    compiled = FrozenAutoencoder(torch.compile(plain.model, backend="eager"))
    assert compiled.identity() == plain.identity() and compiled.factor == plain.factor
    assert torch.allclose(compiled.decode(latents), expected, atol=1e-5)


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_a_tiny_autoencoder_has_a_factor_of_two_for_each_level(levels):
    blocks = {"num_encoder_blocks": (1,) * levels, "num_decoder_blocks": (1,) * levels}
    channels = {"encoder_block_out_channels": (8,) * levels, "decoder_block_out_channels": (8,) * levels}
    model = AutoencoderTiny(**channels, **blocks)
    assert 64 // model.encode(torch.zeros(1, 3, 64, 64)).latents.shape[-1] == spatial_factor(model)
