import math

import pytest
import torch
from image_measure import ImageMeasure, MeasureConfig
from nearest import NearestImage
from PIL import Image
from train_features import TrainFeaturesConfig, contrastive_loss, effective_rank, nearest_right, train_features
from views import ViewConfig, gaussian_blur, hue_turn, random_views

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.config import load_config
from ldm_smd.data.images import load_pixels
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.evaluation.distances import FeatureSet, bootstrap_deviation, kernel_deviation, kernel_distance
from ldm_smd.evaluation.features import load_extractor
from ldm_smd.models.feature_network import FeatureNetwork


@pytest.fixture
def networks(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        FeatureNetwork((8, 8 + 4 * seed)).save_pretrained(folder)
    return list(map(str, folders))


@pytest.fixture
def measure(image_folder, networks, tmp_path):
    """An ImageMeasure whose held-out images are the training images upside down."""
    images, held_out = (ImagesConfig(source=str(folder), resolution=16) for folder in (image_folder, tmp_path / "held_out"))
    for path in image_folder.rglob("*.png"):
        (tmp_path / "held_out" / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(tmp_path / "held_out" / path.parent.name / path.name)
    return ImageMeasure(MeasureConfig(images, held_out, networks, resampled=40, bootstrap=3), "cpu")


def test_both_networks_distinguish_noise_from_copies(measure, image_folder):
    training, labels, _ = load_pixels(ImagesConfig(source=str(image_folder), resolution=16))
    noise = torch.randint(256, training.shape, dtype=torch.uint8)
    copies, noisy = measure.measure(training), measure.measure(noise)
    assert copies["pictures"] == 22 and copies["copies"] == 1 and copies["nearest_pixels"] == 0 and noisy["copies"] == 0
    assert set(copies["features"]) == set(noisy["features"]) == {"one", "two"}
    for name, found in copies["features"].items():
        assert found["frechet"] == pytest.approx(0, abs=1e-4) and found["nearest"] == 0 and found["precision"] == 1
        assert noisy["features"][name]["frechet"] > 10 * found["frechet_held_out"] > 0
        assert noisy["features"][name]["coverage"] < found["coverage"] and found["frechet_sd"] > 0 and found["kid_sd"] > 0
        assert set(measure.floor["features"][name]) == set(found) - {"frechet_held_out", "frechet_held_out_sd"}
        assert measure.training["features"][name]["frechet_held_out"] > 0
    assert measure.training["pictures"] == 40 and measure.training["copies"] == 1
    assert sorted(measure.labels(44)) == sorted(labels * 2)


def test_reconstructions_are_near_reconstructions(image_folder, networks, vae_folder):
    """Errors of the autoencoder are part of the distance to real images, and not of that to reconstructions."""
    images = ImagesConfig(source=str(image_folder), resolution=16)
    autoencoder = FrozenAutoencoder.from_pretrained(vae_folder)
    measure = ImageMeasure(MeasureConfig(images, images, networks, resampled=22, bootstrap=3), "cpu", autoencoder)
    for found in measure.reconstructed_floor["features"].values():
        # The held-out images are the training images, so both are the same reconstructions.
        assert found["frechet_reconstructed"] == pytest.approx(0, abs=1e-4) and found["frechet"] > 1e-3


def test_copies_are_not_chosen(measure, image_folder):
    training, _, _ = load_pixels(ImagesConfig(source=str(image_folder), resolution=16))
    measure._copies_among_training = 0.1
    assert measure.choice(training) == math.inf
    noise = torch.randint(256, training.shape, dtype=torch.uint8)
    half = torch.where(torch.rand(training.shape) < 0.5, noise, training)
    assert measure.choice(half) < measure.choice(noise) < math.inf
    measure._copies_among_training = 1.0
    assert measure.choice(training) < measure.choice(half)


@pytest.mark.parametrize("spread", [3, 60])
def test_the_nearest_image_is_exact(spread):
    torch.manual_seed(0)
    images = torch.randint(256, (60, 3, 8, 8), dtype=torch.uint8)
    noisy = (images[:30].float() + spread * torch.randn(30, 3, 8, 8)).clamp(0, 255).to(torch.uint8)
    search = NearestImage(images, torch.device("cpu"))
    for itself, given in ((False, noisy), (True, images)):
        all_distances = torch.cdist(given.flatten(1).double() / 255, images.flatten(1).double() / 255) / math.sqrt(192)
        expected = all_distances.kthvalue(2 if itself else 1, dim=1).values
        assert torch.allclose(search(given, itself).double(), expected, atol=1e-4)


def test_kernel_deviation_equals_the_bootstrap():
    a, b = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)), torch.randn(70, 6)
    expected = bootstrap_deviation(kernel_distance, a, FeatureSet(b), 7, 3)
    assert kernel_deviation(a, b, 7, 3) == pytest.approx(expected, rel=1e-6)


def test_random_views():
    torch.manual_seed(0)
    x = torch.rand(64, 3, 16, 16)
    same = ViewConfig(16, [1.0, 1.0], recoloured=0, grey=0, blurred=0)
    views = random_views(x, same)
    # A crop of the full area with an aspect ratio other than 1 does not fit, so one side is cropped and the centre may move.
    assert views.shape == x.shape and (views - x).abs().mean() < 0.3
    grey = random_views(x, ViewConfig(12, grey=1.0, recoloured=0, blurred=0))
    assert grey.shape == (64, 3, 12, 12) and torch.allclose(grey[:, 0], grey[:, 1], atol=1e-5)
    full = random_views(x, ViewConfig(12))
    assert full.min() >= 0 and full.max() <= 1 and not torch.equal(full, random_views(x, ViewConfig(12)))


def test_hue_rotates_around_grey_and_blur_keeps_the_mean():
    turn = hue_turn(torch.tensor([0.0, 0.7, 2 * math.pi / 3]))
    assert torch.allclose(turn[0], torch.eye(3)) and torch.allclose(turn @ torch.ones(3), torch.ones(3), atol=1e-6)
    assert torch.allclose(turn @ turn.mT, torch.eye(3), atol=1e-6)
    assert torch.allclose(turn[2] @ torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0]), atol=1e-6)
    point = torch.zeros(2, 3, 9, 9)
    point[:, :, 4, 4] = 1.0
    blurred = gaussian_blur(point, torch.tensor([0.1, 1.0]))
    assert torch.allclose(blurred.sum(dim=(2, 3)), torch.ones(2, 3)) and torch.allclose(blurred[0], point[0], atol=1e-6)
    assert blurred[1, 0, 4, 4] < 0.3 and torch.allclose(blurred[1], blurred[1].mT)


def test_contrastive_loss_effective_rank_and_nearest_neighbours():
    z = torch.eye(4).repeat(2, 1)
    assert contrastive_loss(z, 0.5) == pytest.approx(math.log(1 + 6 * math.exp(-2)), rel=1e-5)
    assert contrastive_loss(torch.ones(8, 3), 0.5) == pytest.approx(math.log(7), rel=1e-5)
    x = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0))
    assert effective_rank(x) == pytest.approx(5, abs=0.1) and effective_rank(x[:, :1] * torch.ones(5)) == pytest.approx(1)
    labels = torch.arange(40) % 2
    features = torch.stack([labels.double(), 1.0 - labels], dim=1)
    assert nearest_right(features, labels, features, labels) == 1
    assert nearest_right(features, labels, features, 1 - labels) == 0


@pytest.mark.slow
def test_training_writes_a_network_for_evaluation(image_folder, networks, tmp_path):
    given = [f"{part}={{source: '{image_folder}', resolution: 16}}" for part in ("images", "held_out")]
    entry = f"{{name: shapes, {', '.join(each.replace('=', ': ', 1) for each in given)}, batch_size: 8, views: {{side: 16}}}}"
    settings = [f"output={tmp_path / 'f'}", f"sets=[{entry}]", f"compared={networks[0]}", "images_total=40"]
    sizes = ["block_out_channels=[8,16]", "head_channels=8"]
    folder = train_features(load_config(TrainFeaturesConfig, None, [*settings, *sizes]))
    pixels = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    assert load_extractor(str(folder), "cpu")(pixels).shape == (3, 16)
    card = (folder / "README.md").read_text()
    assert "| one | shapes | 22 |" in card and "| f | shapes | 22 |" in card and "arXiv 2002.05709" in card
