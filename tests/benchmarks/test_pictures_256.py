import json

import numpy as np
import pytest
import torch
from pictures_256 import Pictures256Config, pictures_256, resized, targets
from PIL import Image

from ldm_smd.config import load_config
from ldm_smd.data.images import decode
from ldm_smd.models.feature_network import FeatureNetwork
from ldm_smd.training.loop import train


def cell(model, steps, frechet, sd=0.1):
    return {"model": model, "steps": steps, "features": {"one": {"frechet": frechet, "frechet_sd": sd}}}


def test_targets_compare_the_best_cells_of_each_model():
    cells = [
        cell("mixture", 4, 1.0),
        cell("mixture", 4, 0.7),
        cell("mixture", 8, 0.1),
        cell("gaussian", 8, 2),
        cell("gaussian", 50, 0.5),
    ]
    over, ratio = targets(dict(enumerate(cells)))
    assert ratio["measured"] == pytest.approx(1.4) and not ratio["holds"]
    assert over["measured"] == pytest.approx(0.2 / (1.96 * 0.1 * 2**0.5), abs=1e-3) and over["holds"]
    assert targets({0: cells[0]}) == []


def test_samples_are_resized_like_real_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    real = decode((tmp_path / "one.png").read_bytes(), 8)
    assert torch.equal(resized(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255.0, 8)[0], real)


@pytest.mark.slow
def test_only_missing_cells_are_measured(image_folder, train_config, tmp_path, monkeypatch):
    monkeypatch.setattr("pictures_256.RESULTS", tmp_path)
    for index in range(2):
        torch.manual_seed(index)
        FeatureNetwork((8, 16), {"shapes": 2}).save_pretrained(tmp_path / f"features{index}")
    smd = train(train_config("images_total=8", f"output={tmp_path / 'smd'}"))
    gaussian = train(
        train_config("images_total=8", "model.z_channels=0", "objective.name=mse", f"output={tmp_path / 'gaussian'}")
    )
    images = [f"{part}.{key}" for part in ("images", "held_out") for key in (f"source={image_folder}", "resolution=8")]
    models = [
        f"models.mixture={{model: {smd}, steps: [4]}}",
        f"models.gaussian={{model: {gaussian}, steps: [2], guidance: [1.0, 2.0]}}",
        f"models.gaussian-weaker={{model: {gaussian}, guide: {smd / 'unet'}, steps: [2], guidance: [2.0]}}",
    ]
    features = f"features=[{tmp_path / 'features0'},{tmp_path / 'features1'}]"
    sheets = ["sheet_pictures=2", f"sheets.few={{model: {smd}, steps: [1]}}"]
    config = load_config(
        Pictures256Config, None, [*images, *models, features, *sheets, "samples=8", "name=tiny", "bootstrap=2"]
    )
    found = json.loads(pictures_256(config).read_text())
    assert [(each["model"], each["steps"], each["guidance"]) for each in found["cells"].values()] == [
        ("mixture", 4, 1),
        ("gaussian", 2, 1),
        ("gaussian", 2, 2),
        ("gaussian-weaker", 2, 2),
    ]
    free, weaker = list(found["cells"].values())[2:]
    assert len(weaker["weights"]) == len(free["weights"]) + 1 and weaker["features"] != free["features"]
    assert len(found["targets"]) == 4 and Image.open(tmp_path / "pictures-tiny-few.jpg").size == (131, 131)
    assert (tmp_path / "pictures-tiny.md").read_text().count(", guidance ") == 4
    monkeypatch.setattr("pictures_256.resized_samples", None)
    config.sheet_pictures = 0
    again = json.loads(pictures_256(config).read_text())
    assert again["cells"] == found["cells"], "existing cells are not measured again"
