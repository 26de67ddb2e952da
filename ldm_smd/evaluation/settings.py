"""Settings of tools/evaluate.py."""

from dataclasses import dataclass, field
from typing import Optional

from ..data.settings import ImagesConfig
from ..schema import MAX_SEED, MISSING, Settings, check, choice, number

SAMPLED_LABELS = ("reference", "balanced", "random")


@dataclass
class EvaluateConfig(Settings):
    """tools/evaluate.py"""

    RENAMED = {"count": "num_samples"}

    output: str = MISSING
    """JSON file to write; the same as a table beside it, .md."""
    reference: ImagesConfig = field(default_factory=ImagesConfig)
    """Real pictures to compare with. Whatever else is compared is brought to the same size in the same way."""
    held_out: Optional[str] = None
    """Source of real pictures that no model has seen: their distance to the reference is the floor."""
    pictures: Optional[str] = None
    """Source of pictures to measure, as tools/sample.py or another program made them. null: sample them from ``model``."""
    model: Optional[str] = None
    """Model folder, or hub id, to sample pictures from, with the settings below."""
    num_samples: int = number(5000, 2, 10**9)
    """Pictures to sample."""
    labels: str = choice("reference", SAMPLED_LABELS)
    """Classes of the samples. "reference": in the proportions of the reference; "balanced": equally many; "random"."""
    steps: int = number(8, 1, 10**5)
    scheduler: Optional[str] = None
    """As in tools/sample.py."""
    guidance_scale: float = number(1.0, 0, 1000)
    seed: int = number(0, 0, MAX_SEED)
    """Picture i has seed ``seed + i``."""
    batch_size: int = number(64, 1, 2**16)
    features: list[str] = field(default_factory=lambda: ["checkpoints/classifier"])
    """Feature networks: a FeatureNetwork folder; open_clip:ARCHITECTURE:FILE.safetensors; dinov2:ARCHITECTURE:FILE.safetensors
    with timm's name; inception:FILE. A name of pretrained weights instead of a file is fetched: open_clip:ViT-L-14-336:openai,
    dinov2:vit_large_patch14_dinov2:lvd142m. With #SHA256 after it the weights must have that hash."""
    cache: Optional[str] = None
    """Folder to keep the features of real pictures in: the next evaluation against the same ones need not read them."""
    bootstrap: int = number(20, 2, 10_000)
    """Resampled sets that the confidence of the distances is taken from."""
    num_workers: int = number(1, 0, 256)
    """Processes that decode pictures."""
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check((self.pictures is None) != (self.model is None), "pictures", "either these or a model", self.pictures)
        check(len(self.features) > 0, "features", "at least one feature network", self.features)
