import pytest
import torch

from ldm_smd.errors import UserError
from ldm_smd.pipelines import load_pipeline, seeded_generators
from ldm_smd.schedulers import make_scheduler
from ldm_smd.training.settings import TrainMomentsConfig
from ldm_smd.training.train_moments import train_moments
from tests.rounding import alike


@pytest.mark.slow
def test_moments_end_to_end(gaussian_folder, shards, tmp_path, run):
    settings = [f"model={gaussian_folder}", f"shards={shards}", "images_total=320", "batch_size=16", "ema_halflife_images=64"]
    code, printed, error = run(TrainMomentsConfig, train_moments, *settings, f"output={tmp_path / 'gms'}")
    assert code == 0, error
    assert "predicted variance over that found" in printed
    pipeline, before = load_pipeline(tmp_path / "gms"), load_pipeline(gaussian_folder)
    assert type(pipeline.scheduler).__name__ == "GMSScheduler"
    assert pipeline.scheduler.config.prediction_type == before.scheduler.config.prediction_type
    for name, value in before.unet.state_dict().items():
        assert torch.equal(value, pipeline.unet.state_dict()[name]), name
    assert pipeline.moments.conv_out.weight.any()
    images = pipeline([0, 1], 2, 3, guidance_scale=2.0, generator=seeded_generators([0, 1]), output_type="pt").images
    alone = pipeline([1], 1, 3, guidance_scale=2.0, generator=seeded_generators([1]), output_type="pt").images
    assert alike(images[1:], alone)
    code, _, error = run(TrainMomentsConfig, train_moments, *settings, f"output={tmp_path / 'gms'}")
    assert code == 2 and "output: expected a new or empty folder" in error


def test_mistakes_are_named(gaussian_folder, model_folder, shards, tmp_path):
    config = TrainMomentsConfig(model=str(model_folder), shards=str(shards), output=str(tmp_path / "gms"))
    with pytest.raises(UserError, match="model: expected a Gaussian UNet"):
        train_moments(config)
    pipeline = load_pipeline(gaussian_folder)
    pipeline.scheduler = make_scheduler("GMSScheduler:num_moments=2", pipeline.scheduler)
    with pytest.raises(UserError, match=r"a moments part of the model for GMSScheduler, found none; tools/train_moments\.py"):
        pipeline([0])
