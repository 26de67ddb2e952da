"""make gpu, run on a CPU with tiny networks."""

import json
import sys

import gpu
import pytest
import torch

from ldm_smd.models.unet import SMDUNet2DModel
from tests.tiny import MIXTURE, SIZES


def tiny_unet(mixture, checkpointing):
    shape = SIZES | (MIXTURE if mixture else {"z_channels": 0})
    return SMDUNet2DModel(sample_size=32, in_channels=4, out_channels=4, num_classes=10, **shape)


TINY = gpu.Sizes({"tiny": tiny_unet}, batch=2, encoded=1, resolutions=(32,), tokens=16)
RUN = gpu.Run(torch.device("cpu"), seconds=0.01, teraflops=1.0)


def test_everything_is_measured_and_written(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "RESULT", tmp_path / "gpu.json")
    monkeypatch.setattr(gpu, "MODES", gpu.MODES[:2])  # compiling takes half a minute
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu.write_result(TINY, RUN)
    result = json.loads((tmp_path / "gpu.json").read_text())
    models = (gpu.GAUSSIAN, gpu.MIXTURE)
    assert list(result["training"]) == [f"tiny, {model}, {mode}" for mode in gpu.MODES for model in models]
    for cell in result["training"].values():
        assert cell["images_per_second"] > 0
    assert 0 < result["training"]["tiny, mixture, bf16"]["share_of_peak"] < 1
    assert result["encoding"]["32"] > 0 and result["attention"] is None
    wanted = "tiny: training step, 4 draws, relative to the Gaussian model"
    assert [each["name"] for each in result["targets"]] == [wanted]
    assert "| tiny, mixture, bf16 |" in (tmp_path / "gpu.md").read_text()


def test_a_stopped_run_leaves_what_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "RESULT", tmp_path / "gpu.json")
    measured, stopped = gpu.training, f"tiny, {gpu.MIXTURE}, {gpu.MODES[0]}"

    def training(build, mode, model, sizes, run):
        if f"tiny, {model}, {mode}" == stopped:
            raise KeyboardInterrupt
        return measured(build, mode, model, sizes, run)

    monkeypatch.setattr(gpu, "training", training)
    with pytest.raises(KeyboardInterrupt):
        gpu.write_result(TINY, RUN)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert list(result["training"]) == [f"tiny, {gpu.GAUSSIAN}, {gpu.MODES[0]}"] and result["targets"] == []
    assert result["encoding"]["32"] > 0


def test_full_size_networks_have_the_stated_numbers_of_parameters():
    with torch.device("meta"):
        unet, dit = (build(False, False) for build in gpu.full_sizes().networks.values())
    assert 95e6 < unet.num_parameters() < 120e6 and 125e6 < dit.num_parameters() < 150e6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_gives_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as raised:
        gpu.main()
    assert raised.value.code == 2 and "expected a GPU that torch can use, found none" in capsys.readouterr().err
