"""Settings of tools/evaluate.py."""

import math
from dataclasses import dataclass, field
from typing import Optional

from ..data.settings import ImagesConfig
from ..sampling.settings import check_interval
from ..schema import MAX_SEED, MISSING, PRECISIONS, Settings, check, choice, number

SAMPLED_LABELS = ("reference", "balanced", "random")


@dataclass
class EvaluateConfig(Settings):
    """tools/evaluate.py"""

    RENAMED = {"count": "num_samples"}

    output: str = MISSING
    """JSON file to write. A Markdown table is written next to it."""
    reference: ImagesConfig = field(default_factory=ImagesConfig)
    """Real images to compare with. All other images are resized in the same way."""
    held_out: Optional[str] = None
    """Source of real images that were not trained on. Their distance to the reference is the best to expect."""
    pictures: Optional[str] = None
    """Source of images to evaluate, from tools/sample.py or any other program. null: sample from ``model``."""
    model: Optional[str] = None
    """Folder or hub id of a model to sample from, or of a pipeline of diffusers, with the settings below."""
    num_samples: int = number(5000, 2, 10**9)
    """Number of images to sample."""
    labels: str = choice("reference", SAMPLED_LABELS)
    """Classes of the samples. reference: in the same proportions as in the reference. balanced: equally many of each. random:
    uniformly random."""
    steps: int = number(8, 1, 10**5)
    timestep_shift: Optional[float] = number(None, above=0, maximum=1e3)
    """Above 1: more of the steps at high noise, as in tools/sample.py. null: that of the model."""
    scheduler: Optional[str] = None
    """As in tools/sample.py."""
    guidance_scale: float = number(1.0, 0, 1000)
    guidance_interval: Optional[list[float]] = number(None, 0, math.inf)
    """This and ``guide``: as in tools/sample.py."""
    guide: Optional[str] = None
    reconstructions: bool = False
    """true: also measure ``num_samples`` of the held-out images, or of the reference, that the model's autoencoder has encoded
    and decoded. A denoiser can hardly come closer to the reference than these."""
    seed: int = number(0, 0, MAX_SEED)
    """Image i has seed ``seed + i``."""
    batch_size: int = number(64, 1, 2**16)
    precision: str = choice("no", PRECISIONS)
    """Precision of sampling, as in tools/sample.py. Feature networks are always in float32."""
    features: list[str] = field(default_factory=lambda: ["checkpoints/classifier"])
    """Feature networks: a FeatureNetwork folder; open_clip:ARCHITECTURE:FILE.safetensors; dinov2:ARCHITECTURE:FILE.safetensors
    with the architecture's name in timm; inception:FILE. A name of pretrained weights instead of a file is downloaded:
    open_clip:ViT-L-14-336:openai, dinov2:vit_large_patch14_dinov2:lvd142m. Append #SHA256 to check the weights. The networks
    in checkpoints/ were trained on emoji and CIFAR-10; use others for your own images."""
    cache: Optional[str] = None
    """Folder to cache the features of real images for later evaluations."""
    bootstrap: int = number(20, 2, 10_000)
    """Bootstrap resamples for the confidence intervals of the distances."""
    num_workers: int = number(1, 0, 256)
    """Processes that decode images."""
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check((self.pictures is None) != (self.model is None), "pictures", "either images or a model", self.pictures)
        possible = not self.reconstructions or self.model is not None
        check(possible, "reconstructions", "false without a model", self.reconstructions)
        check_interval(self.guidance_interval)
        check(len(self.features) > 0, "features", "at least one feature network", self.features)
