import pytest
import torch

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.data.images import load_pixels
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.evaluation.reconstruction import reconstruction_psnr, to_uint8


def test_psnr_computes_its_formula(vae_folder, image_folder):
    pixels, _, _ = load_pixels(ImagesConfig(source=str(image_folder), resolution=16))
    frozen = FrozenAutoencoder.from_pretrained(vae_folder)
    decoded = frozen.decode(frozen.normalise(frozen.encode_moments(pixels)[:, 0]))
    errors = (((decoded + 1) * 127.5).round().clamp(0, 255) - pixels.float()).square().mean(dim=(1, 2, 3))
    found = reconstruction_psnr(frozen, pixels, batch_size=5)
    assert found["psnr"] == pytest.approx(float((10 * torch.log10(255**2 / errors)).mean()), abs=0.01)
    assert found["psnr_of_mean"] == pytest.approx(float(10 * torch.log10(255**2 / errors.mean())), abs=0.01)


def test_values_outside_the_range_of_an_image_are_clamped():
    assert to_uint8(torch.tensor([-1.2, -1.0, 0.1, 1.0, 1.3])).tolist() == [0, 0, 140, 255, 255]
