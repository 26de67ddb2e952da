import json
from pathlib import Path

import pytest
import schedulers
import yardstick
from PIL import Image
from schedulers import SchedulersConfig

from ldm_smd.config import load_config
from ldm_smd.schedulers.support import SUPPORTED


def test_schedulers_end_to_end(model_folder, yardstick_settings, tmp_path, monkeypatch, run):
    monkeypatch.setattr(yardstick, "RESULTS", tmp_path)
    networks = [f"{key}={model_folder / 'unet'}" for key in ("gaussian", "smd")]
    common = [*yardstick_settings, *networks, f"autoencoder={model_folder / 'vae'}", "samples=32", "steps=3"]
    chosen = ["schedulers=[HeunDiscreteScheduler]", "controls=['HeunDiscreteScheduler:use_karras_sigmas=false']"]
    code, _, error = run(SchedulersConfig, schedulers.schedulers, *common, *chosen)
    assert code == 0, error
    result = json.loads((tmp_path / "schedulers-shapes.json").read_text())
    cells = result["models"]["smd"]["distance"]
    assert list(cells) == ["DDIMScheduler", "HeunDiscreteScheduler", "HeunDiscreteScheduler:use_karras_sigmas=false"]
    heun, ddim = cells["HeunDiscreteScheduler"]["3"], cells["DDIMScheduler"]["3"]
    assert heun["evaluations"] == 5 and ddim["evaluations"] == 3 and 0 < heun["brightness"] < 1
    assert result["settings"]["HeunDiscreteScheduler"] == "use_karras_sigmas=true"
    worst = max(heun["frechet"] / ddim["frechet"], 1.0)
    [distance] = [each for each in result["targets"] if each["name"].startswith("smd, 3 steps: largest distance")]
    assert distance["measured"] == pytest.approx(worst, abs=1e-3) and distance["holds"] == (distance["measured"] <= 1.5)
    table = (tmp_path / "schedulers-shapes.md").read_text()
    assert all(f"| HeunDiscrete | `use_karras_sigmas={value}` | 5 |" in table for value in ("true", "false"))
    assert Image.open(tmp_path / "schedulers-shapes.jpg").width > 100


def test_the_shipped_config_measures_all_supported_schedulers():
    path = Path(__file__).parents[2] / "configs" / "benchmarks" / "schedulers-emoji.yaml"
    assert set(load_config(SchedulersConfig, path, []).schedulers) == set(SUPPORTED)
