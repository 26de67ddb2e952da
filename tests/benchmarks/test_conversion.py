import json

import conversion
import pytest
from conversion import ConversionConfig
from safetensors.torch import load_file

from ldm_smd.config import dump_config


@pytest.mark.slow
def test_conversion_end_to_end(train_config, gaussian_folder, yardstick_settings, tmp_path, monkeypatch, run):
    start = gaussian_folder / "unet"
    (tmp_path / "smd.yaml").write_text(dump_config(train_config(f"init_from={start}")))
    monkeypatch.setattr(conversion, "RESULTS", tmp_path)
    settings = [*yardstick_settings, f"train={tmp_path / 'smd.yaml'}", f"output={tmp_path / 'runs'}"]
    settings += ["images_total=16", "every_images=8", "steps=[1,2]", "samples=24"]
    code, _, error = run(ConversionConfig, conversion.conversion, *settings)
    assert code == 0, error
    curves = json.loads((tmp_path / "conversion-shapes.json").read_text())["curves"]
    assert [point["images"] for point in curves["from scratch"]] == [0, 8, 16]
    runs = [tmp_path / "runs" / name / "model/unet" for name in ("from-scratch", "from-the-Gaussian-model")]
    scratch, converted = (load_file(run / "diffusion_pytorch_model.safetensors") for run in runs)
    initial = load_file(start / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    change = [(weights["conv_in.weight"] - initial).abs().max() for weights in (scratch, converted)]
    assert change[1] < 0.01 < change[0]
    assert (tmp_path / "conversion-shapes.md").read_text().count("\n") == 7
