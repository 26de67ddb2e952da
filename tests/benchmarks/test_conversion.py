import json

import conversion
import torch
from conversion import ConversionConfig
from safetensors.torch import load_file

from ldm_smd.config import dump_config
from ldm_smd.evaluation.features import FeatureNetwork
from ldm_smd.training.loop import train


def test_conversion_end_to_end(train_config, pictures, tmp_path, monkeypatch, run):
    gaussian = ("model.latent_channels=0", "objective.name=mse", f"output={tmp_path / 'gaussian'}", "images_total=8", "seed=1")
    start = train(train_config(*gaussian)) / "unet"
    (tmp_path / "smd.yaml").write_text(dump_config(train_config(f"init_from={start}")))
    torch.manual_seed(0)
    FeatureNetwork((8, 16), {"shapes": 2}).save_pretrained(tmp_path / "features")
    monkeypatch.setattr(conversion, "RESULTS", tmp_path)
    settings = ["name=shapes", f"train={tmp_path / 'smd.yaml'}", f"images.source={pictures}", "images.resolution=16"]
    settings += [f"held_out.source={pictures}", "held_out.resolution=16"]
    settings += [f"output={tmp_path / 'runs'}", f"features={tmp_path / 'features'}"]
    settings += ["images_total=16", "every_images=8", "steps=[1,2]", "samples=24"]
    code, _, error = run(ConversionConfig, conversion.conversion, *settings)
    assert code == 0, error
    curves = json.loads((tmp_path / "conversion-shapes.json").read_text())["curves"]
    assert [point["images"] for point in curves["from scratch"]] == [0, 8, 16]
    runs = [tmp_path / "runs" / name / "model/unet" for name in ("from-scratch", "from-the-Gaussian-model")]
    scratch, converted = (load_file(run / "diffusion_pytorch_model.safetensors") for run in runs)
    given = load_file(start / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    apart = [(weights["conv_in.weight"] - given).abs().max() for weights in (scratch, converted)]
    assert apart[1] < 0.01 < apart[0]
    assert (tmp_path / "conversion-shapes.md").read_text().count("\n") == 7
