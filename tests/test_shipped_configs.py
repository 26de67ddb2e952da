"""Tools accept every file in configs/, and the networks of the large ones are built at full size, without weights.

test_launch_configs.py tests the files for accelerate and SLURM.
"""

from pathlib import Path

import pytest
import torch
from autoencoders import deep_compression, stable_diffusion
from conversion import ConversionConfig
from few_steps import FewStepsConfig
from gms import GMSConfig
from image_prompts import ImagePromptsConfig
from pictures_256 import Pictures256Config
from rivals import RivalsConfig
from schedulers import SchedulersConfig
from teleport import TeleportBenchmarkConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from train_features import TrainFeaturesConfig

from ldm_smd.apps.settings import DemoConfig, ExploreConfig
from ldm_smd.autoencoder import FrozenAutoencoder
from ldm_smd.config import load_config
from ldm_smd.data.settings import EncodeConfig
from ldm_smd.evaluation.settings import EvaluateConfig
from ldm_smd.models.unet import SMDUNet2DModel
from ldm_smd.training.settings import TrainAutoencoderConfig, TrainClassifierConfig, TrainConfig

ROOT = Path(__file__).parents[1] / "configs"
FOLDERS = {
    "train": (TrainConfig, []),
    "encode": (EncodeConfig, []),
    "autoencoder": (TrainAutoencoderConfig, []),
    "evaluate": (EvaluateConfig, ["output=x.json", "model=x"]),
}
FILES = [(path, *FOLDERS[folder]) for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.yaml"))]
FILES += [
    (ROOT / "demo.yaml", DemoConfig, []),
    (ROOT / "classifier.yaml", TrainClassifierConfig, []),
    (ROOT / "classifier-256.yaml", TrainClassifierConfig, []),
    (ROOT / "explore.yaml", ExploreConfig, []),
    (ROOT / "benchmarks/conversion-emoji.yaml", ConversionConfig, []),
    (ROOT / "benchmarks/features-selfsupervised.yaml", TrainFeaturesConfig, []),
    (ROOT / "benchmarks/few-steps-cifar10.yaml", FewStepsConfig, []),
    (ROOT / "benchmarks/few-steps-emoji.yaml", FewStepsConfig, []),
    (ROOT / "benchmarks/gms-cifar10.yaml", GMSConfig, []),
    (ROOT / "benchmarks/gms-emoji.yaml", GMSConfig, []),
    (ROOT / "benchmarks/image-prompts-emoji.yaml", ImagePromptsConfig, []),
    (ROOT / "benchmarks/pictures-256.yaml", Pictures256Config, []),
    (ROOT / "benchmarks/shift-emoji.yaml", Pictures256Config, []),
    (ROOT / "benchmarks/rivals-cifar10.yaml", RivalsConfig, []),
    (ROOT / "benchmarks/rivals-cifar10-hour.yaml", RivalsConfig, []),
    (ROOT / "benchmarks/rivals-emoji.yaml", RivalsConfig, []),
    (ROOT / "benchmarks/schedulers-emoji.yaml", SchedulersConfig, []),
    (ROOT / "benchmarks/teleport-emoji.yaml", TeleportBenchmarkConfig, []),
]


@pytest.mark.parametrize("path, schema, given", FILES, ids=lambda value: value.stem if isinstance(value, Path) else "")
def test_a_config_is_valid(path, schema, given):
    load_config(schema, path, given)


def test_every_file_has_a_test():
    elsewhere = {"accelerate", "slurm"}
    found = {path for path in ROOT.rglob("*") if path.is_file() and path.parent.name not in elsewhere}
    assert found == {path for path, _, _ in FILES}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, build, pixels, factor",
    [
        ("imagenet-256", stable_diffusion, 256, 8),
        ("imagenet-512", stable_diffusion, 512, 8),
        ("pictures-1024", deep_compression, 1024, 32),
    ],
)
def test_full_size_unet_and_autoencoder_have_matching_latents(name, build, pixels, factor):
    config = load_config(TrainConfig, ROOT / "train" / f"{name}.yaml")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        autoencoder = FrozenAutoencoder(build())
        assert autoencoder.factor == factor
        shape = (autoencoder.latent_channels, pixels // factor, pixels // factor)
        unet = SMDUNet2DModel(
            sample_size=shape[1], in_channels=shape[0], out_channels=shape[0], num_classes=1000, **config.model.unet_arguments()
        )
        eta = torch.empty(2 * config.objective.draws, *shape)
        prediction = unet(torch.empty(2, *shape), torch.zeros(2), torch.zeros(2, dtype=torch.long), eta).sample
        assert prediction.shape == eta.shape
        assert autoencoder.model.decode(prediction[:1]).sample.shape == (1, 3, pixels, pixels)
    assert 1e8 < unet.num_parameters() < 1.3e8
