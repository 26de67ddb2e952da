import json

import gms
import pytest
import torch
import yardstick
from gms import GMSConfig, strokes_of

from ldm_smd.config import load_config
from ldm_smd.training.settings import TrainMomentsConfig
from ldm_smd.training.train_moments import train_moments


@pytest.mark.slow
def test_gms_end_to_end(gaussian_folder, shards, yardstick_settings, tmp_path, monkeypatch, run):
    settings = [f"model={gaussian_folder}", f"shards={shards}", f"output={tmp_path / 'moments'}", "images_total=16"]
    folder = train_moments(load_config(TrainMomentsConfig, None, [*settings, "batch_size=8"]))
    monkeypatch.setattr(yardstick, "RESULTS", tmp_path)
    settings = [f"model={folder}", "schedulers=[DDPM,GMS]", "steps=[2,3]", "samples=22", "stroke_steps=4"]
    code, _, error = run(GMSConfig, gms.gms, *yardstick_settings, *settings, "strengths=[0.25,1]", "stroke_schedulers=[GMS]")
    assert code == 0, error
    result = json.loads((tmp_path / "gms-shapes.json").read_text())
    cells = result["models"]["gaussian"]["distance"]
    assert cells["GMS"]["2"]["frechet"] != cells["DDPM"]["2"]["frechet"]
    weak, full = result["strokes"]["GMS"]
    assert weak["rms_to_stroke"] > 0 and full["frechet"] > 0
    assert "| GMS | " in (tmp_path / "gms-shapes.md").read_text()
    assert (tmp_path / "gms-shapes.png").stat().st_size > 1000


def test_strokes_are_patches_of_few_colours():
    images = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = strokes_of(images, side=4, colours=3)
    assert set(found.unique().tolist()) <= {0.0, 0.5, 1.0}
    patches = found.unfold(2, 4, 4).unfold(3, 4, 4)
    assert torch.equal(patches, patches[..., :1, :1].expand_as(patches))
    assert (found - images.float() / 255).abs().mean() < 0.3
