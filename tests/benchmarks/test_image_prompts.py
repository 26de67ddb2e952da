import json
from pathlib import Path

import pytest
import torch
from image_prompts import ImagePromptsConfig, image_prompts, ranks
from train_clip import TrainClipConfig, name_of, train_clip

from ldm_smd.config import load_config
from ldm_smd.models.clip import ClipEncoder
from ldm_smd.training.loop import train

HELD_OUT = Path(__file__).parents[2] / "data/emoji/heldout.zip"


def test_names_of_code_points():
    assert name_of("Activities/1f388") == "balloon"
    assert name_of("1f1f0-1f1f7") == "flag of kr"
    assert name_of("1f468-1f3fd-200d-1f692") == "man medium skin tone fire engine"
    assert name_of("0023-fe0f-20e3") == "number sign"
    assert name_of("e0fff") == ""


def test_ranks_of_the_right_image():
    own = torch.eye(4)
    assert ranks(own.repeat_interleave(2, dim=0), own) == {"nearest": 1.0, "near": 1.0, "median_rank": 1.0}
    assert ranks(own.flip(0), own)["nearest"] == 0.0
    half = torch.stack([own[0], own[1] + 0.1 * own[2], own[0], own[0]])
    assert ranks(half, own)["nearest"] == 0.5


@pytest.mark.slow
def test_the_benchmark_and_train_clip_end_to_end(train_config, embedded, clip, tmp_path, monkeypatch):
    """The benchmark runs with a hardly trained model, and OpenCLIP reads the folder of a training of two steps."""
    monkeypatch.setattr("image_prompts.RESULTS", tmp_path)
    model = train(train_config(f"shards={embedded}", "image_conditional=true", "class_conditional=false", "images_total=8"))
    held_out = [f"held_out.source={HELD_OUT}", "held_out.resolution=16"]
    images = [f"images.source={HELD_OUT}", "images.resolution=16"]
    options = ["name=tiny", f"model={model}", f"clip={clip}", "per_picture=1", "steps=1", "guidance_scales=[2]"]
    path = image_prompts(load_config(ImagePromptsConfig, None, [*options, *held_out, *images]))
    result = json.loads(path.read_text())
    assert [row["by"] for row in result["rows"]] == ["a picture", "words"]
    assert result["held_out_pictures"] == result["samples"] > 300 and abs(result["floor_frechet"]) < 1
    assert all(row["nearest"] < 0.1 for row in result["rows"])
    assert path.with_suffix(".jpg").is_file() and "| (chance) |" in path.with_suffix(".md").read_text()

    few = [f"images.source={HELD_OUT}", "images_total=16", "batch_size=8"]
    folder = train_clip(load_config(TrainClipConfig, None, [f"output={tmp_path / 'clip'}", *few]))
    assert ClipEncoder.of(f"open_clip:{folder}", torch.device("cpu"), "clip").texts(["a", "b"]).shape == (2, 128)
