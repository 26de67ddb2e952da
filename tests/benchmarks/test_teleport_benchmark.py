import json

import pytest
import teleport
import yardstick
from teleport import PLAIN, TeleportBenchmarkConfig

from ldm_smd.config import load_config
from ldm_smd.training.fit_gaussian import fit_gaussian
from ldm_smd.training.settings import FitGaussianConfig


@pytest.mark.slow
def test_teleport_end_to_end(gaussian_folder, model_folder, shards, yardstick_settings, tmp_path, monkeypatch, run):
    for name, model, components in (("classes", gaussian_folder, 1), ("mixture", gaussian_folder, 3), ("smd", model_folder, 3)):
        settings = [f"model={model}", f"shards={shards}", f"output={tmp_path / name}", "rank=8"]
        fit_gaussian(load_config(FitGaussianConfig, None, [*settings, f"components={components}"]))
    monkeypatch.setattr(yardstick, "RESULTS", tmp_path)
    parts = [f"fits.one={tmp_path / 'classes'}", f"fits.many={tmp_path / 'mixture'}", f"smd={tmp_path / 'smd'}"]
    settings = [f"gaussian={gaussian_folder}", f"shards={shards}", "solvers=[UniPC,Heun]", "steps=[2,3]", "full_steps=4"]
    settings += [*parts, "sigmas=[2.5,10]", "choosing_steps=[2]", "samples=24"]
    code, _, error = run(TeleportBenchmarkConfig, teleport.teleport, *yardstick_settings, *settings)
    assert code == 0, error
    result = json.loads((tmp_path / "teleport-shapes.json").read_text())
    models = result["models"]
    assert models[PLAIN]["distance"]["Heun"]["3"]["evaluations"] == 5
    assert set(models["many"]["distance"]) == {"UniPC from 2.5", "Heun from 2.5", "UniPC from 10"}
    assert models["control: plain noise"]["distance"]["UniPC from 2.5"]["2"]["frechet"] > 0
    assert set(models["SMD"]["distance"]) == {"SDE-DPM-Solver++", "SDE-DPM-Solver++ from 2.5", "SDE-DPM-Solver++ from 10"}
    # At almost pure noise the score is -x_t / s for any latents.
    assert result["score"]["score"]["one"][0] == pytest.approx(1.0, abs=0.01)
    assert set(result["nearest"]) == {f"{PLAIN}, 4 steps", "one, 2 steps", "many, 2 steps"}
    assert all(value > 0 for value in result["nearest"].values())
    assert len(result["savings"]) == 2 * 2 * 3
    assert "| UniPC, many from 2.5 |" in (tmp_path / "teleport-shapes.md").read_text()
    assert (tmp_path / "teleport-shapes.png").stat().st_size > 1000


def test_savings_count_evaluations_within_two_percent():
    def cells(*pairs):
        return {n: {"evaluations": n, "frechet": value} for n, value in pairs}

    models = {
        PLAIN: {"distance": {"UniPC": cells((10, 1.0), (50, 0.5))}},
        "one": {"distance": {"UniPC from 5": cells((2, 1.5), (5, 1.01), (8, 0.6), (10, 0.52))}},
    }
    found = teleport.savings(models, "one", "UniPC", TeleportBenchmarkConfig(fits={"one": "x"}, sigma_skip=5))
    assert [(entry["with"], entry["saved"]) for entry in found] == [(5, 0.5), (None, None)]
