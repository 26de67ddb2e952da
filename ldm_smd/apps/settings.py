"""Settings of tools/explore.py and tools/demo.py."""

from dataclasses import dataclass, field
from typing import Optional

from ..data.settings import ImagesConfig
from ..schema import MAX_IMAGES, MAX_SEED, MISSING, Settings, check, number


@dataclass
class ExploreConfig(Settings):
    """tools/explore.py"""

    models: dict[str, str] = field(default_factory=dict)
    """Name -> model folder (RUN/model) or hub id, to compare side by side."""
    clip: Optional[str] = None
    """open_clip:ARCHITECTURE:FILE.safetensors or open_clip:FOLDER, to sample from image and text prompts with models trained
    with image_conditional=true."""
    host: str = "127.0.0.1"
    """Address to listen on. The default accepts connections from this machine only; 0.0.0.0 accepts them from anywhere."""
    port: Optional[int] = number(None, 1, 2**16 - 1)
    """null: the first free port from 7860 on."""
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.models) > 0, "models", "at least one, models.NAME=FOLDER", "none")
        for name, folder in self.models.items():
            check(isinstance(folder, str), f"models.{name}", "a folder or hub id, and a name without dots", folder)


@dataclass
class DemoRunConfig(Settings):
    """One model of the demo."""

    RENAMED = {"learning_rate_share": "learning_rate_factor"}

    name: str = MISSING
    config: str = MISSING
    """Training config. The demo overrides its output, init_from, learning rate and number of images."""
    checkpoint: str = MISSING
    """Shipped UNet folder, with metrics.jsonl of its training."""
    learning_rate_factor: float = number(0.1, 0, 1)
    """Factor on the config's learning rate. 0: do not train, show the shipped weights. Between 0 and 1: continue the shipped
    training; a full rate would undo the averaging of the EMA weights. 1: a new training that starts from these weights, such
    as a distillation."""
    schedulers: list[str] = field(default_factory=lambda: ["DDPMScheduler"])
    """Schedulers to sample with for the report."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.schedulers) > 0, "runs[].schedulers", "at least one", self.schedulers)


@dataclass
class ShownModelConfig(Settings):
    """One shipped model of the showcase."""

    name: str = MISSING
    caption: str = MISSING
    """Caption in the report."""
    config: str = MISSING
    """Config of its training, for the autoencoder, schedule and classes."""
    checkpoint: str = MISSING
    """UNet folder."""
    steps: list[int] = number([1, 2, 4, 8], 1, 10**5, min_length=1)
    """Numbers of steps, a row of images for each."""
    guidance_scale: float = number(1.0, 0, 1000)
    guide: Optional[str] = None
    """UNet folder of a weaker model to guide away from. null: classifier-free guidance."""
    timestep_shift: Optional[float] = number(None, above=0, maximum=1e3)
    """Above 1: more of the steps at high noise, as in tools/sample.py. It becomes the default of the model folder. null: that
    of ``config``."""


@dataclass
class ShowcaseConfig(Settings):
    """Large images at the top of the report, from shipped models."""

    models: list[ShownModelConfig] = field(default_factory=list)
    """Empty: no such images."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    """The training images. Only the names of their classes are used."""
    classes: list[str] = field(default_factory=list)
    """Class names, a column of images for each. A repeated name gets another seed."""


@dataclass
class DemoConfig(Settings):
    """tools/demo.py"""

    output: str = "outputs/demo"
    encode: str = "configs/encode/emoji.yaml"
    held_out: ImagesConfig = field(default_factory=ImagesConfig)
    """Images not trained on. They give the lowest distance to expect, and the labels to sample."""
    features: str = "checkpoints/classifier"
    """Feature network of the distance: a FeatureNetwork folder, open_clip:ARCHITECTURE:FILE.safetensors or inception:FILE."""
    runs: list[DemoRunConfig] = field(default_factory=list)
    images: int = number(3_000, 1, MAX_IMAGES)
    """Number of images for each training in the demo."""
    steps: list[int] = number([2, 4, 8, 32], 1, 10**5, min_length=1)
    guidance_scale: float = number(1.0, 0, 1000)
    seed: int = number(0, 0, MAX_SEED)
    showcase: ShowcaseConfig = field(default_factory=ShowcaseConfig)
    seconds_target: float = number(600.0, above=0, maximum=1e9)
    memory_target_gb: float = number(4.0, above=0, maximum=1e6)
