import json

import few_steps
import pytest
import yardstick
from few_steps import FewStepsConfig


@pytest.mark.slow
def test_few_steps_end_to_end(model_folder, yardstick_settings, tmp_path, monkeypatch, run):
    monkeypatch.setattr(yardstick, "RESULTS", tmp_path)
    common = [*yardstick_settings, f"smd={model_folder}", f"gaussian={model_folder}", "samples=32"]
    code, _, error = run(FewStepsConfig, few_steps.few_steps, *common, "steps=[1,4,8]")
    assert code == 0, error
    result = json.loads((tmp_path / "few_steps-shapes.json").read_text())
    assert list(result["models"]["gaussian"]["distance"]) == FewStepsConfig().gaussian_schedulers
    cell = result["models"]["smd"]["distance"]["DDPM"]["4"]
    assert cell["frechet"] > 0 and cell["frechet_sd"] > 0 and len(cell["frechet_per_seed"]) == 2
    assert [target["target"] for target in result["targets"]] == ["<= 0.5", "<= 1"]
    assert "| smd, DDPM |" in (tmp_path / "few_steps-shapes.md").read_text()
    assert (tmp_path / "few_steps-shapes.jpg").stat().st_size > 1000

    # With resume, results for the same images and weights are taken from the file.
    def again(*settings):
        settings = ("steps=[1,2]", "resume=true", "smd_schedulers=[DDPM]", "gaussian_schedulers=[DDIM]", *settings)
        code, _, error = run(FewStepsConfig, few_steps.few_steps, *common, *settings)
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

    # A resumed run that is interrupted keeps all earlier results.
    before = json.loads((tmp_path / "few_steps-shapes.json").read_text())

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(yardstick.Yardstick, "cell", stopped)
    code, _, _ = run(FewStepsConfig, few_steps.few_steps, *common, "steps=[1,3]", "resume=true", "sampling_seeds=4")
    assert code == 130
    assert json.loads((tmp_path / "few_steps-shapes.json").read_text())["models"] == before["models"]
