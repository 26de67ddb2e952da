"""Pipelines saved, loaded and made of another's parts."""

import subprocess
import sys

import pytest
import torch

from ldm_smd.errors import UserError
from ldm_smd.models.gaussian import LatentGaussians
from ldm_smd.models.moments import MomentHeads
from ldm_smd.pipelines import SMDPipeline, load_pipeline
from tests.rounding import alike
from tests.sampled import latents


def test_what_is_no_model_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"model: expected a model folder .* or a hub id, found neither"):
        load_pipeline(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model: expected a model folder \(RUN/model\) or a hub id, found someone/none: "):
        load_pipeline("someone/none")


@pytest.mark.slow
def test_save_and_load_in_a_fresh_process(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    program = f"""
import torch
from ldm_smd.pipelines import SMDPipeline, seeded_generators
pipeline = SMDPipeline.from_pretrained({str(tmp_path / "model")!r})
assert pipeline.label_of("square") == 1
images = pipeline([0, 1], num_inference_steps=3, generator=seeded_generators([1, 2]), output_type="pt").images
torch.save(images, {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    here = latents(pipeline, [0, 1], [1, 2], output_type="pt")
    assert torch.allclose(torch.load(tmp_path / "out.pt", weights_only=True), here, atol=1e-4)


def test_pipelines_are_handled_as_those_of_diffusers(pipeline, gaussian_folder, tmp_path):
    """Made of another's parts, with all optional ones; saved as a variant and in shards."""
    gaussian = load_pipeline(gaussian_folder)
    gaussians = LatentGaussians(4, 8, 8, rank=2, count=3, num_classes=2)
    parts = {
        "unet": gaussian.unet,
        "moments": MomentHeads.for_unet(gaussian.unet),
        "gaussian": gaussians,
        "guide": pipeline.unet,
    }
    made = SMDPipeline.from_pipe(pipeline, **parts)
    again = SMDPipeline.from_pipe(made)
    assert again.id2label == pipeline.id2label
    assert all(again.components[name] is component for name, component in made.components.items())
    expected = latents(pipeline, [0, 1], [1, 2])
    for name, options in (("variant", {"variant": "fp16"}), ("shards", {"max_shard_size": "40KB"})):
        pipeline.save_pretrained(tmp_path / name, **options)
        loaded = SMDPipeline.from_pretrained(tmp_path / name, variant=options.get("variant"))
        assert alike(latents(loaded, [0, 1], [1, 2]), expected)
    assert len(list((tmp_path / "shards" / "unet").glob("*.safetensors"))) > 1
