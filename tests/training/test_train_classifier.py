"""Training of the classifier: augmentation, accuracy and seed."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from ldm_smd.config import load_config
from ldm_smd.data.images import load_pixels
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.errors import UserError
from ldm_smd.models.feature_network import FeatureNetwork
from ldm_smd.training.rates import warmup_then_cosine
from ldm_smd.training.settings import ClassifierSetConfig, TrainClassifierConfig
from ldm_smd.training.train_classifier import LabelledImages, accuracy, augmented_batch, train_classifier
from tests.training.results import WEIGHTS


@pytest.mark.parametrize("mirror", [True, False])
def test_training_images_are_shifted_and_half_are_mirrored(mirror):
    """By up to an eighth of the side, with repeated edges. Each image keeps its label."""
    image = torch.arange(16).expand(3, 16, 16).to(torch.uint8) * 8  # a ramp to the right
    labelled = LabelledImages(torch.stack([image, image // 2]), torch.tensor([4, 7]))
    torch.manual_seed(0)
    settings = ClassifierSetConfig(name="x", batch_size=400, mirror=mirror)
    found, labels = augmented_batch(labelled, settings)
    assert found.shape == (400, 3, 16, 16) and set(labels.tolist()) == {4, 7}
    shifts, flipped = set(), 0
    for ramp, label in zip((found[:, 0, 8] + 1) * 127.5 / 8, labels):
        ramp = (ramp if label == 4 else 2 * ramp).round()
        flipped += int(ramp[0] > ramp[-1])
        ramp = ramp.flip(0) if ramp[0] > ramp[-1] else ramp
        [shift] = [s for s in range(-4, 5) if (ramp - (torch.arange(16) + s).clamp(0, 15)).abs().max() < 0.5]
        shifts.add(shift)
    assert {-2, 2} <= shifts <= set(range(-2, 3))
    assert 140 < flipped < 260 if mirror else flipped == 0


def test_accuracy_is_the_fraction_of_correct_predictions():
    torch.manual_seed(0)
    model = FeatureNetwork((4, 8), {"x": 3}).eval()
    pixels = torch.randint(0, 256, (300, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        likely = model.heads["x"](model(pixels / 127.5 - 1)).argmax(dim=1)
    labels = torch.where(torch.arange(300) < 75, (likely + 1) % 3, likely)
    ranges = set()
    model.register_forward_pre_hook(lambda _, given: ranges.add((given[0].min().item(), given[0].max().item())))
    assert accuracy(model, "x", LabelledImages(pixels, labels), torch.device("cpu")) == pytest.approx(0.75, abs=0.01)
    assert ranges == {(-1.0, 1.0)}


def test_a_seed_determines_the_classifier(image_folder, tmp_path):
    def trained(name, seed):
        images = f"{{source: '{image_folder}', resolution: 16}}"
        sets = f"sets=[{{name: a, batch_size: 8, images: {images}, held_out: {images}}}]"
        settings = [sets, "images_total=8", f"output={tmp_path / name}", f"seed={seed}", "block_out_channels=[4,8]"]
        return load_file(train_classifier(load_config(TrainClassifierConfig, None, settings)) / WEIGHTS)

    a, b, c = trained("a", 0), trained("b", 0), trained("c", 1)
    assert all(torch.equal(a[name], b[name]) for name in a) and not all(torch.equal(a[name], c[name]) for name in a)


def test_the_learning_rate_rises_and_falls_to_zero(image_folder, tmp_path, monkeypatch):
    rates, real = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or real(self))
    images = f"{{source: '{image_folder}', resolution: 16}}"
    sets = f"sets=[{{name: a, batch_size: 8, images: {images}, held_out: {images}}}]"
    settings = [sets, "images_total=160", f"output={tmp_path / 'a'}", "learning_rate=0.02", "block_out_channels=[4,8]"]
    train_classifier(load_config(TrainClassifierConfig, None, settings))
    assert rates == pytest.approx([warmup_then_cosine(0.02, step / 20, 0.15) for step in range(20)])


def test_the_accuracy_is_measured_on_the_held_out_images(image_folder, tmp_path):
    """Here these are one of the two classes, half of the images."""
    shutil.copytree(image_folder / "square", tmp_path / "held-out/square")
    parts = [
        f"{part}: {{source: '{folder}', resolution: 16}}"
        for part, folder in (("images", image_folder), ("held_out", tmp_path / "held-out"))
    ]
    settings = [f"sets=[{{name: a, batch_size: 8, {', '.join(parts)}}}]", "images_total=8", "block_out_channels=[4,8]"]
    folder = train_classifier(load_config(TrainClassifierConfig, None, [*settings, f"output={tmp_path / 'model'}"]))
    [row] = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| a |")]
    pixels = load_pixels(ImagesConfig(source=str(image_folder / "square"), resolution=16))[0]
    model = FeatureNetwork.from_pretrained(folder).eval()
    right = accuracy(model, "a", LabelledImages(pixels, torch.ones(11, dtype=torch.long)), torch.device("cpu"))
    assert f"| 22 of `{image_folder}` | 11 of `{tmp_path / 'held-out'}` | {right:.1%} |" in row


@pytest.mark.parametrize(("names", "message"), [("aa", "sets of different names, found 'a, a'"), ("a.", "names without a dot")])
def test_names_of_sets_that_cannot_be_told_apart_are_refused(names, message):
    with pytest.raises(UserError, match=f"^sets: expected {message}"):
        TrainClassifierConfig(sets=[ClassifierSetConfig(name=name) for name in names], output="out")
