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
    assert list(result["models"]["gaussian"]["distance"]) == FewStepsConfig().gaussian_schedulers
    cell = result["models"]["smd"]["distance"]["DDPM"]["4"]
    assert cell["frechet"] > 0 and cell["frechet_sd"] > 0 and len(cell["frechet_per_seed"]) == 2
    assert [target["target"] for target in result["targets"]] == ["<= 0.5", "<= 1"]
    assert "| smd, DDPM |" in (tmp_path / "few_steps-shapes.md").read_text()
    assert (tmp_path / "few_steps-shapes.jpg").stat().st_size > 1000

    # Again with one more number of steps: the rest is taken from the file, where the pictures and weights are the same.
    def again(*settings):
        settings = ("name=shapes", "samples=32", "steps=[1,2]", "resume=true", "smd_schedulers=[DDPM]", *settings)
        code, _, error = run(FewStepsConfig, few_steps.few_steps, *settings, "gaussian_schedulers=[DDIM]", *source, *models)
        assert code == 0, error
        models_found = json.loads((tmp_path / "few_steps-shapes.json").read_text())["models"]
        return models_found["smd"]["distance"]["DDPM"], models_found["gaussian"]["distance"]["DDIM"]

    result["models"]["smd"]["distance"]["DDPM"]["1"]["frechet"] = 123.0
    result["models"]["gaussian"]["weights_sha256"] = "other"
    result["models"]["gaussian"]["distance"]["DDIM"]["1"]["frechet"] = 123.0
    (tmp_path / "few_steps-shapes.json").write_text(json.dumps(result))
    smd, gaussian = again()
    assert smd["1"]["frechet"] == 123.0 and smd["2"]["frechet"] != 123.0 and gaussian["1"]["frechet"] != 123.0
    assert again("sampling_seeds=4")[0]["1"]["frechet"] != 123.0
