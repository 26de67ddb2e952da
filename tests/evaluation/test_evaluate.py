import json
import os
import shutil

import numpy as np
import pytest
import torch

from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.config import load_config
from ldm_smd.data.classes import renumbered
from ldm_smd.data.images import load_pixels
from ldm_smd.data.settings import ImagesConfig
from ldm_smd.errors import UserError
from ldm_smd.evaluation import evaluate as evaluation
from ldm_smd.evaluation.distances import FeatureSet, frechet_distance, kernel_distance
from ldm_smd.evaluation.evaluate import choose_labels, evaluate
from ldm_smd.evaluation.features import Extractor, load_extractor
from ldm_smd.evaluation.reconstruction import reconstruct
from ldm_smd.evaluation.settings import EvaluateConfig
from ldm_smd.models.feature_network import FeatureNetwork
from ldm_smd.sampling.batches import SamplingOptions


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("features") / "small"
    FeatureNetwork((4, 8), {"x": 2}).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(image_folder, network, model_folder, tmp_path):
    """A function that returns settings to compare samples of the tiny model with the images, written to tmp_path/NAME.json."""

    def build(name, *overrides):
        common = [f"reference.source={image_folder}", "reference.resolution=16", f"features=[{network}]", "num_workers=0"]
        common += [f"output={tmp_path / name}.json", "num_samples=9", "steps=2", "bootstrap=3", "device=cpu"]
        return [*common, f"model={model_folder}", f"held_out={image_folder}", *overrides]

    return build


def measured(settings, *arguments):
    path = evaluate(load_config(EvaluateConfig, None, settings(*arguments)))
    return json.loads(path.read_text())


def test_a_reference_of_another_size_than_the_samples_is_refused(settings):
    with pytest.raises(
        UserError, match=r"reference.resolution: expected 16, the side of the images of .*, found 32; .* pictures"
    ):
        measured(settings, "other-size", "reference.resolution=32")


def test_the_result_records_everything_it_depends_on(settings, image_folder, network, tmp_path):
    result = measured(settings, "result", "labels=balanced", "seed=5", "scheduler=DDIMScheduler")
    assert result["reference"] == result["reference"] | {"source": str(image_folder), "resolution": 16, "count": 22}
    assert result["samples"] == result["samples"] | {
        "scheduler": "DDIMScheduler",
        "steps": 2,
        "timestep_shift": 1.0,
        "guidance_scale": 1.0,
        "labels": "balanced",
        "seeds": [5, 13],
        "count": 9,
    }
    assert [name.split("/")[0] for name in result["samples"]["weights_sha256"]] == ["unet", "vae"]
    of_network = result["features"]["small"]
    assert of_network["dimensions"] == 8 and of_network["resize"] == "none" and len(of_network["weights_sha256"]) == 64
    # Here the held-out images are the reference itself.
    assert result["held_out"]["sha256"] == result["reference"]["sha256"] != result["samples"]["sha256"]
    assert of_network["held_out"]["frechet"] == pytest.approx(0, abs=1e-6)
    assert (of_network["held_out"]["precision"], of_network["held_out"]["coverage"]) == (1, 1)
    assert "| small | samples |" in (tmp_path / "result.md").read_text()


def test_a_timestep_shift_changes_the_samples(settings):
    found = [measured(settings, f"shift{shift}", f"timestep_shift={shift}")["samples"] for shift in (1, 4)]
    assert [samples["timestep_shift"] for samples in found] == [1, 4] and found[0]["sha256"] != found[1]["sha256"]


def test_guidance_changes_the_samples(settings, model_folder):
    """Guided away from the model itself, they do not change."""
    guide = f"guide={model_folder / 'unet'}"
    options = ([], ["guidance_scale=2"], ["guidance_scale=2", "guidance_interval=[1e6,1e7]"], ["guidance_scale=2", guide])
    results = [measured(settings, f"guided-{number}", *given)["samples"] for number, given in enumerate(options)]
    plain, free, elsewhere, itself = (result["sha256"] for result in results)
    assert plain == elsewhere == itself != free
    assert [len(result["weights_sha256"]) for result in results] == [2, 2, 2, 3]
    hashes = {path.split("/")[0]: value for path, value in results[3]["weights_sha256"].items()}
    assert hashes["guide"] == hashes["unet"] != hashes["vae"]
    assert (results[2]["guidance_interval"], results[3]["guide"]) == ([1e6, 1e7], str(model_folder / "unet"))


def test_images_get_the_distances_of_the_functions(settings, image_folder, network):
    result = measured(settings, "discs", "model=null", f"pictures={image_folder / 'disc'}")["features"]["small"]["pictures"]
    model = FeatureNetwork.from_pretrained(network).eval()
    with torch.no_grad():
        discs, everything = (
            model(2 * load_pixels(ImagesConfig(source=str(source), resolution=16))[0].float() / 255 - 1)
            for source in (image_folder / "disc", image_folder)
        )
    assert result["frechet"] == pytest.approx(frechet_distance(discs, everything), rel=1e-4)
    assert result["kid"] == pytest.approx(kernel_distance(discs, everything), rel=1e-4)


@pytest.mark.distributed
def test_neither_batches_nor_processes_change_the_result(settings, tmp_path, launch):
    """Rounding of samples to eight bits may differ: one pixel value of 7,000 that differs by one changes the distances by
    0.005 % and their standard deviations by 6e-7. One of the 9 samples or 22 images may then cross the surface of a ball."""
    one = {"precision": 1 / 9, "recall": 1 / 22, "density": 1 / 45, "coverage": 1 / 22}
    single, batches = measured(settings, "single"), measured(settings, "batches", "batch_size=4")
    process = launch(2, "tools/evaluate.py", *settings("two", "batch_size=4"))
    error = process.output()
    assert process.returncode == 0, error[-3000:]
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["processes"] == 2 and single["processes"] == 1
    for other in (batches, two):
        assert all(other[name]["sha256"] == single[name]["sha256"] for name in ("reference", "held_out"))
        assert other["samples"]["count"] == single["samples"]["count"]
        for name, value in single["features"]["small"]["samples"].items():
            within = pytest.approx(value, rel=1e-3, abs=1.01 * one.get(name, 1e-6))
            assert other["features"]["small"]["samples"][name] == within, name


def test_features_of_real_images_are_cached(settings, image_folder, tmp_path, monkeypatch):
    """They are computed again after an image has changed."""
    copied = tmp_path / "copied"
    shutil.copytree(image_folder, copied)
    options = (f"cache={tmp_path / 'cache'}", f"reference.source={copied}", "held_out=null")
    extracted = []
    real = Extractor.__call__
    monkeypatch.setattr(Extractor, "__call__", lambda self, pixels: extracted.append(len(pixels)) or real(self, pixels))
    first = measured(settings, "first", *options)
    assert sum(extracted) == 22 + 9
    extracted.clear()
    again = measured(settings, "again", *options)
    assert sum(extracted) == 9
    assert again["features"]["small"]["samples"] == pytest.approx(first["features"]["small"]["samples"], rel=1e-4)
    assert again["reference"] == first["reference"]
    os.utime(next((copied / "disc").iterdir()), ns=(1, 1))
    extracted.clear()
    measured(settings, "changed", *options)
    assert sum(extracted) == 22 + 9


@pytest.mark.parametrize("changed", ["features", "reference.crop=pad", "reference.background=black"])
def test_cached_features_are_those_of_the_same_network_and_resizing(settings, tmp_path, monkeypatch, changed):
    """The other network has the same name."""
    if changed == "features":
        torch.manual_seed(1)
        FeatureNetwork((4, 8), {"x": 2}).save_pretrained(tmp_path / "other/small")
        changed = f"features=[{tmp_path / 'other/small'}]"
    options = (f"cache={tmp_path / 'cache'}", "held_out=null")
    measured(settings, "first", *options)
    extracted, real = [], Extractor.__call__
    monkeypatch.setattr(Extractor, "__call__", lambda self, pixels: extracted.append(len(pixels)) or real(self, pixels))
    measured(settings, "changed", *options, changed)
    assert sum(extracted) == 22 + 9


def test_reconstructions_are_the_images_that_the_autoencoder_decodes(settings, image_folder, network, model_folder):
    result = measured(settings, "reconstructed", "reconstructions=true", "num_samples=11")
    pixels, _, _ = load_pixels(ImagesConfig(source=str(image_folder), resolution=16))
    chosen = np.random.default_rng(0).permutation(22)[:11]
    decoded = reconstruct(FrozenAutoencoder.from_pretrained(model_folder / "vae"), pixels[chosen])
    extractor = load_extractor(str(network), "cpu")
    expected = frechet_distance(extractor(decoded), FeatureSet(extractor(pixels)))
    assert result["reconstructions"]["count"] == 11 and result["reconstructions"]["source"] == str(image_folder)
    assert result["features"]["small"]["reconstructions"]["frechet"] == pytest.approx(expected, rel=1e-3) and expected > 0
    of_reference = measured(settings, "without", "reconstructions=true", "num_samples=11", "held_out=null")
    assert of_reference["features"]["small"]["reconstructions"] == result["features"]["small"]["reconstructions"]
    with pytest.raises(UserError, match="reconstructions: expected false without a model, found True"):
        measured(settings, "pictures", "model=null", f"pictures={image_folder}", "reconstructions=true")


def test_held_out_images_are_resized_as_the_reference(settings, image_folder, network):
    options = (f"held_out={image_folder / 'disc'}", "reference.crop=pad")
    result = measured(settings, "padded", *options)
    model = FeatureNetwork.from_pretrained(network).eval()
    with torch.no_grad():
        discs, everything = (
            model(2 * load_pixels(ImagesConfig(source=str(source), resolution=16, crop="pad"))[0].float() / 255 - 1)
            for source in (image_folder / "disc", image_folder)
        )
    assert result["held_out"]["count"] == 11
    expected = pytest.approx(frechet_distance(discs, everything), rel=1e-4)
    assert result["features"]["small"]["held_out"]["frechet"] == expected


def test_samples_are_rounded_to_eight_bits(settings, monkeypatch):
    """As tools/sample.py writes them."""
    seen, real = [], Extractor.__call__
    monkeypatch.setattr(evaluation, "sample_batches", lambda *_: [torch.full((9, 3, 16, 16), 99.7 / 255)])
    monkeypatch.setattr(Extractor, "__call__", lambda self, pixels: seen.append(pixels) or real(self, pixels))
    measured(settings, "rounded", "held_out=null")
    assert seen[-1].shape == (9, 3, 16, 16) and (seen[-1] == 100).all()


@pytest.mark.parametrize("setting", ["held_out", "pictures", "reference.source"])
def test_a_missing_source_is_found_before_sampling(settings, monkeypatch, setting):
    monkeypatch.setattr(evaluation, "sample_batches", lambda *_: pytest.fail("samples were drawn"))
    with pytest.raises(UserError, match=f"^{setting}: expected a folder, .* found nothing at none$"):
        measured(settings, "missing", f"{setting}=none", *(["model=null"] if setting == "pictures" else []))


def test_the_samples_are_made_with_the_given_settings(settings, monkeypatch):
    seen = []
    sampled = [torch.rand(9, 3, 16, 16)]
    monkeypatch.setattr(evaluation, "sample_batches", lambda *given: seen.append(given) or sampled)
    given = ("seed=5", "steps=3", "batch_size=4", "guidance_scale=2.5", "guidance_interval=[0.1,9]", "timestep_shift=2")
    measured(settings, "given", *given, "labels=balanced", "held_out=null")
    [(_, labels, indices, options, _)] = seen
    expected = SamplingOptions(3, 2.5, guidance_interval=(0.1, 9.0), seed=5, batch_size=4, timestep_shift=2.0)
    assert (labels, indices, options) == ([0, 1] * 4 + [0], range(9), expected)


def test_few_samples_have_classes_in_the_proportions_of_the_reference(settings):
    """Although its images are sorted by class."""
    config = load_config(EvaluateConfig, None, settings("x", "labels=reference", "num_samples=300"))
    labels = choose_labels(config, 2000 * [0] + 1000 * [1] + 1000 * [2], 3)
    assert [labels.count(label) / 300 for label in range(3)] == pytest.approx([0.5, 0.25, 0.25], abs=0.1)


def test_the_table_has_95_percent_intervals(settings, tmp_path):
    found = measured(settings, "table")["features"]["small"]["samples"]
    rows = (tmp_path / "table.md").read_text().splitlines()
    [row] = [line for line in rows if line.startswith("| small | samples |")]
    for name in ("frechet", "kid"):
        assert f"| {found[name]:.4g} ± {1.96 * found[f'{name}_sd']:.2g} |" in row


def test_labels_of_the_samples(settings):
    def config(labels):
        return load_config(EvaluateConfig, None, settings("x", f"labels={labels}", "num_samples=6"))

    assert choose_labels(config("reference"), [0, 1, 1], None) is None
    assert sorted(choose_labels(config("reference"), [0, 1, 1], 2)) == [0, 0, 1, 1, 1, 1]
    assert choose_labels(config("balanced"), [], 3) == [0, 1, 2, 0, 1, 2]
    assert set(choose_labels(config("random"), [], 2)) <= {0, 1}
    with pytest.raises(UserError, match="labels: expected a reference with labels"):
        choose_labels(config("reference"), [], 3)
    with pytest.raises(UserError, match="labels: expected labels below the model's 2 classes, found 2"):
        choose_labels(config("reference"), [2], 2)


def test_classes_of_the_reference_are_found_by_name(settings, image_folder, tmp_path, monkeypatch):
    """The model has the classes disc and square. In a reference of squares alone, they have number 0."""
    shutil.copytree(image_folder / "square", tmp_path / "reference/square")
    sampled, real = [], evaluation.sample_batches
    monkeypatch.setattr(evaluation, "sample_batches", lambda *given: sampled.append(given[1]) or real(*given))
    measured(settings, "squares", f"reference.source={tmp_path / 'reference'}")
    assert sampled == [9 * [1]]
    assert renumbered([0, None, 0], ["square"], ["disc", "square"], "here") == [1, None, 1]
    assert renumbered([0, 1], ["0", "1"], ["tench", "goldfish", "shark"], "here") == [0, 1]  # tars without classes.json
    assert renumbered([0, 1], ["b", "c"], ["0", "1", "2"], "here") == [0, 1]
    assert renumbered([1], ["n01440764", "n01443537"], ["tench", "goldfish"], "here") == [1]
    (tmp_path / "reference/square").rename(tmp_path / "reference/ring")
    with pytest.raises(UserError, match=r"reference\.source: expected classes among disc, square, found 'ring'"):
        measured(settings, "rings", f"reference.source={tmp_path / 'reference'}")


def test_wrong_settings_give_one_line(settings, network, tmp_path):
    for overrides, message in (
        (["pictures=somewhere"], "pictures: expected either images or a model, found 'somewhere'"),
        (["labels=all"], "labels: expected"),
        ([f"features=[{network},{network}]"], "features: expected different networks"),
        ([f"features=[{network}#abc]"], "features: expected weights with the SHA-256 abc, found"),
    ):
        with pytest.raises(UserError, match=message):
            measured(settings, "wrong", *overrides)
    assert not (tmp_path / "wrong.json").exists()


def test_a_set_of_one_image_is_refused(settings, image_folder, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(sorted(image_folder.rglob("*.png"))[0], tmp_path / "one/a.png")
    with pytest.raises(UserError, match="held_out: expected at least two images, found 1"):
        measured(settings, "one", f"held_out={tmp_path / 'one'}")


def test_features_that_are_not_finite_are_refused(settings, tmp_path):
    """As from a network whose training has diverged."""
    network = FeatureNetwork((4, 8), {"x": 2})
    network.norm.bias.data.fill_(torch.nan)
    network.save_pretrained(tmp_path / "diverged")
    with pytest.raises(UserError, match="features: expected finite features of diverged, found others for the reference"):
        measured(settings, "one", f"features=[{tmp_path / 'diverged'}]")
