import json

import few_steps
import torch
from few_steps import FewStepsConfig

from ldm_smd.evaluation.features import FeatureNetwork


def test_few_steps_end_to_end(model_folder, pictures, tmp_path, monkeypatch, run):
    torch.manual_seed(0)
    FeatureNetwork((8, 16), {"shapes": 2}).save_pretrained(tmp_path / "features")
    monkeypatch.setattr(few_steps, "RESULTS", tmp_path)
    source = [f"images.source={pictures}", f"held_out.source={pictures}", "images.resolution=16", "held_out.resolution=16"]
    models = [f"smd={model_folder}", f"gaussian={model_folder}", f"features={tmp_path / 'features'}"]
    code, _, error = run(FewStepsConfig, few_steps.few_steps, "name=shapes", "samples=32", "steps=[1,4,8]", *source, *models)
    assert code == 0, error
    result = json.loads((tmp_path / "few_steps-shapes.json").read_text())
    assert list(result["models"]["gaussian"]["distance"]) == list(few_steps.SCHEDULERS)
    cell = result["models"]["smd"]["distance"]["DDPM"]["4"]
    assert cell["frechet"] > 0 and cell["frechet_sd"] > 0 and len(cell["frechet_per_seed"]) == 2
    assert [target["target"] for target in result["targets"]] == ["<= 0.5", "<= 1"]
    assert "| smd, DDPM |" in (tmp_path / "few_steps-shapes.md").read_text()
    assert (tmp_path / "few_steps-shapes.jpg").stat().st_size > 1000
