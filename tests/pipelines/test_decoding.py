"""Decoding and encoding of images, in slices and tiles, without changes to the user's autoencoder."""

import logging

import pytest
import torch
from PIL import Image

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.pipelines.decoding import decode_latents, encode_images
from ldm_smd.rgb import to_rgb
from ldm_smd.schedulers import make_scheduler
from tests.rounding import nearly_equal
from tests.sampled import latents


def test_the_users_autoencoder_is_not_changed(pipeline):
    """The pipeline decodes with it in any dtype and mode."""
    pipeline.vae.half().train().requires_grad_(True)
    assert pipeline.latent_sides(None, 32) == (8, 16)
    assert latents(pipeline, [0], [1], output_type="pt").isfinite().all()
    assert pipeline.vae.dtype == torch.float16 and pipeline.vae.training
    assert all(weights.requires_grad for weights in pipeline.vae.parameters())


def test_wrong_arguments_for_image_to_image_are_refused(pipeline):
    with pytest.raises(ValueError, match="strength: expected a number above 0"):
        pipeline([0], image=torch.rand(1, 3, 16, 16), strength=0.0)
    with pytest.raises(ValueError, match="image: expected one image, or one for each of 3 samples, found 2"):
        pipeline([0, 1, 0], image=torch.rand(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"image: expected images with latents of shape \(4, 8, 8\), found \(4, 16, 16\)"):
        pipeline([0], image=torch.rand(1, 3, 32, 32))
    pipeline.scheduler = make_scheduler("PNDMScheduler:skip_prk_steps=false", pipeline.scheduler)
    with pytest.raises(ValueError, match="image: expected PNDMScheduler with skip_prk_steps"):
        pipeline([0], num_inference_steps=20, image=torch.rand(1, 3, 16, 16))


def test_large_batches_are_decoded_image_by_image_and_large_images_in_tiles(pipeline, monkeypatch, caplog):
    expected = latents(pipeline, [0, 1, 0], [1, 2, 3], output_type="pt")
    monkeypatch.setattr("ldm_smd.pipelines.decoding.SLICE_PIXELS", 256)
    assert torch.allclose(latents(pipeline, [0, 1, 0], [1, 2, 3], output_type="pt"), expected, atol=1e-4)
    monkeypatch.setattr("ldm_smd.pipelines.decoding.TILED_PIXELS", 255)
    logger = logging.getLogger("ldm_smd.pipelines.decoding")
    monkeypatch.setattr(logger, "propagate", True)
    assert latents(pipeline, [0], [1], output_type="pt").shape == (1, 3, 16, 16)
    assert any("works in tiles" in record.message for record in caplog.records)
    assert not pipeline.vae.use_tiling


def test_images_of_other_sizes(pipeline):
    images = latents(pipeline, [0, 1], [1, 2], height=24, width=32, output_type="pt")
    assert images.shape == (2, 3, 24, 32)
    for wrong in ({"height": 23}, {"width": 1}):
        with pytest.raises(ValueError, match="expected a multiple of 2, found"):
            latents(pipeline, [0], [1], **wrong)


def test_images_are_encoded_to_normalised_means(pipeline):
    """One image applies to all samples."""
    image, autoencoder = torch.rand(1, 3, 16, 16), FrozenAutoencoder(pipeline.vae)
    expected = autoencoder.normalise(autoencoder.encode_moments((image * 255).round().to(torch.uint8))[:, 0])
    found = encode_images(pipeline.vae, image, (3, 4, 8, 8))
    assert found.shape == (3, 4, 8, 8) and all(torch.equal(each, expected[0]) for each in found)
    assert nearly_equal(decode_latents(pipeline.vae, expected), autoencoder.decode(expected))


def test_pixels_out_of_range_are_clamped_and_bytes_are_read(pipeline):
    """Resizing overshoots white. A wrapped byte would make it black."""
    image = torch.rand(1, 3, 16, 16).mul(255).round() / 255
    image[..., :4] = 1.0
    over = image.clone()
    over[..., :4] = 1.02
    expected = encode_images(pipeline.vae, image, (1, 4, 8, 8))
    bytes_ = (image * 255).round().to(torch.uint8)
    array = bytes_.permute(0, 2, 3, 1).numpy()
    for each in (over, bytes_, array, list(array)):
        assert torch.equal(encode_images(pipeline.vae, each, (1, 4, 8, 8)), expected)


def test_images_are_encoded_in_slices_and_tiles(pipeline, monkeypatch, caplog):
    images = torch.rand(3, 3, 16, 16)
    expected = encode_images(pipeline.vae, images, (3, 4, 8, 8))
    rows, tiles = [], []
    pipeline.vae.encoder.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    monkeypatch.setattr("ldm_smd.pipelines.decoding.SLICE_PIXELS", 2 * 16 * 16)
    assert nearly_equal(encode_images(pipeline.vae, images, (3, 4, 8, 8)), expected) and rows == [2, 1]
    monkeypatch.setattr("ldm_smd.pipelines.decoding.TILED_PIXELS", 16 * 16 - 1)
    monkeypatch.setattr(type(pipeline.vae), "enable_tiling", lambda self: tiles.append("on"))
    monkeypatch.setattr(type(pipeline.vae), "disable_tiling", lambda self: tiles.append("off"))
    encode_images(pipeline.vae, images, (3, 4, 8, 8))
    assert tiles == ["on", "off"]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P"])
def test_pictures_of_other_modes_are_read_as_training_images_are(pipeline, mode):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0)).convert(mode)
    white = Image.new("RGB", (16, 16), "white")
    shape = (1, 4, 8, 8)
    found, expected = (encode_images(pipeline.vae, each, shape) for each in ([image], to_rgb(image)))
    assert torch.equal(found, expected)
    if mode in ("RGBA", "LA"):
        assert torch.equal(found, encode_images(pipeline.vae, white, shape))
