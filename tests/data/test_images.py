import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from ldm_smd.data import images
from ldm_smd.data.images import decode, load_pixels, read_images
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.data.sources import list_images
from ldm_smd.errors import UserError


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def centre(data):
    return decode(data, 16)[:, 8, 8].tolist()


def test_cmyk_is_converted():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.allclose(centre(encoded(red, "TIFF")), [255, 0, 0], atol=3)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    for grey, expected in ((0, 0), (32768, 127.5), (65535, 255)):
        image = Image.fromarray(np.full((16, 16), grey, dtype=np.uint16))
        assert np.allclose(centre(encoded(image)), [expected] * 3, atol=0.5)


def test_palette_with_transparency_shows_the_background():
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    assert centre(encoded(image, transparency=0)) == [255, 255, 255]
    assert centre(encoded(image)) == [255, 0, 0]


def test_alpha_is_composited():
    half = Image.new("RGBA", (16, 16), (255, 0, 0, 128))
    assert np.allclose(centre(encoded(half)), [255, 127, 127], atol=1)
    assert np.allclose(decode(encoded(half), 16, background="black")[:, 8, 8], [128, 0, 0], atol=1)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("blue", "red")]
    assert centre(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == [0, 0, 255]


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (32, 16), "white")
    image.paste("red", (0, 0, 16, 16))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise: the left half becomes the upper half
    pixels = decode(encoded(image, exif=exif), 16, crop="pad")
    assert pixels[:, 2, 8].tolist() == [255, 0, 0]
    assert pixels[:, 13, 8].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("crop", ["center", "pad"])
def test_a_large_photo_is_decoded_at_a_fraction_of_its_size(monkeypatch, mode, crop):
    """Which hardly changes the result. Below four times the resolution, it does not change it at all."""
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(colours).resize((800, 600), Image.Resampling.BICUBIC).convert(mode)
    found = {}
    for factor in (images.DRAFT_FACTOR, 1_000_000):
        monkeypatch.setattr(images, "DRAFT_FACTOR", factor)
        found[factor] = [decode(encoded(image, "JPEG", quality=95), side, crop).float() for side in (16, 200)]
    (small, large), (exact, exact_large) = found.values()
    assert 0 < (small - exact).abs().mean() < 1 and torch.equal(large, exact_large)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_images_are_read(tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.avif")
    pixels, *_ = load_pixels(ImagesConfig(source=str(tmp_path), resolution=16))
    assert np.allclose(pixels[0, :, 8, 8], [255, 0, 0], atol=5)


def test_crop_and_pad():
    wide = Image.new("RGB", (64, 16), "red")
    assert decode(encoded(wide), 16).unique().tolist() == [0, 255]
    padded = decode(encoded(wide), 16, crop="pad", background="blue")
    assert padded[:, 0, 8].tolist() == [0, 0, 255] and padded[:, 8, 8].tolist() == [255, 0, 0]


def test_the_crop_is_in_the_centre():
    for size, box in (((64, 16), (24, 0, 40, 16)), ((16, 64), (0, 24, 16, 40))):
        image = Image.new("RGB", size, "white")
        image.paste("red", box)
        assert (np.array([255, 0, 0]) == decode(encoded(image), 16).view(3, -1).T).all()


def test_shrinking_averages_pixels():
    """A pattern of single black and white pixels becomes grey."""
    board = Image.fromarray((np.indices((96, 96)).sum(axis=0) % 2 * 255).astype(np.uint8))
    for crop in ("center", "pad"):
        pixels = decode(encoded(board), 16, crop)[:, 2:-2, 2:-2].float()
        assert (pixels - 127.5).abs().max() < 10


def test_unreadable_images_are_listed_or_raise(tmp_path):
    intact = encoded(Image.effect_noise((64, 64), 50))
    (tmp_path / "a.png").write_bytes(intact)
    (tmp_path / "b.png").write_bytes(intact[: len(intact) // 2])
    (tmp_path / "c.png").write_bytes(b"not an image")
    (tmp_path / "d.png").write_bytes(b"")
    config = ImagesConfig(source=str(tmp_path), resolution=16)
    entries = list_images(config)
    [batch] = read_images(entries, config, [range(4)])
    assert batch.keys == ["a"] and batch.pixels.shape == (1, 3, 16, 16)
    assert [Path(item["name"]).name for item in batch.unreadable] == ["b.png", "c.png", "d.png"]
    assert all(item["reason"] and "0x" not in item["reason"] for item in batch.unreadable)
    [empty] = read_images(entries, config, [range(1, 3)])
    assert empty.pixels.shape == (0, 3, 16, 16) and empty.keys == [] and len(empty.unreadable) == 2
    config.strict = True
    with pytest.raises(UserError, match=r"images\.strict: expected every image to be readable, found .*b\.png"):
        list(read_images(entries, config, [range(4)]))


def test_skipped_images_are_said(tmp_path, caplog):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    pixels, _, _ = load_pixels(ImagesConfig(source=str(tmp_path), resolution=16))
    assert len(pixels) == 1
    [record] = [record.getMessage() for record in caplog.records if "unreadable" in record.getMessage()]
    assert record.startswith(f"{tmp_path}: skipped 1 unreadable images, first ") and "b.png: UnidentifiedImageError" in record


def test_images_with_too_many_pixels_are_unreadable():
    image = encoded(Image.new("RGB", (16, 16)))
    assert decode(image, 16, max_pixels=256).shape == (3, 16, 16)
    with pytest.raises(ValueError, match="max_pixels=255"):
        decode(image, 64, max_pixels=255)
