"""Settings of tools/explore.py and tools/demo.py."""

from dataclasses import dataclass, field
from typing import Optional

from ..data.settings import ImagesConfig
from ..schema import MAX_IMAGES, MAX_SEED, MISSING, Settings, check, number


@dataclass
class ExploreConfig(Settings):
    """tools/explore.py"""

    models: dict[str, str] = field(default_factory=dict)
    """Name -> model folder (RUN/model) or hub id: side by side on the page, with the same noise and classes."""
    clip: Optional[str] = None
    """open_clip:ARCHITECTURE:FILE.safetensors or open_clip:FOLDER, for models trained with image_conditional=true: ask for
    pictures like another one, or by words."""
    host: str = "127.0.0.1"
    """Where the page listens: this machine alone. 0.0.0.0: whoever reaches it may use it."""
    port: Optional[int] = number(None, 1, 2**16 - 1)
    """null: the first free one from 7860 on."""
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.models) > 0, "models", "at least one, models.NAME=FOLDER", "none")


@dataclass
class DemoRunConfig(Settings):
    """One model of the demo: the shipped weights that it starts from, and its training config."""

    RENAMED = {"learning_rate_share": "learning_rate_factor"}

    name: str = MISSING
    config: str = MISSING
    """Training config; its settings but for output, init_from, the learning rate and the lengths below are kept."""
    checkpoint: str = MISSING
    """Shipped UNet folder, with the metrics of its training in metrics.jsonl."""
    learning_rate_factor: float = number(0.1, 0, 1)
    """Part of the config's learning rate that it is trained with. 0: not at all, it is shown as shipped. Below 1: the shipped
    training goes on, gently, as its weights are averages that a full rate would first undo. 1: a training of its own that
    starts from these weights, such as a distillation from a Gaussian model."""
    schedulers: list[str] = field(default_factory=lambda: ["DDPMScheduler"])
    """The report shows samples of each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.schedulers) > 0, "runs[].schedulers", "at least one", self.schedulers)


@dataclass
class ShownModelConfig(Settings):
    """A shipped model of the showcase."""

    name: str = MISSING
    caption: str = MISSING
    """What the report calls it."""
    checkpoint: str = MISSING
    """UNet folder."""
    steps: list[int] = number([1, 2, 4, 8], 1, 10**5, min_length=1)
    """A row of pictures for each."""
    guidance_scale: float = number(1.0, 0, 1000)


@dataclass
class ShowcaseConfig(Settings):
    """Large pictures by shipped models, which the report begins with."""

    models: list[ShownModelConfig] = field(default_factory=list)
    """None: no such pictures."""
    config: str = "configs/train/emoji-256-gaussian.yaml"
    """Training config of the models: its autoencoder, schedule and classes."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    """The pictures they were trained on; only the names of their classes are read."""
    classes: list[str] = field(default_factory=list)
    """A column of pictures for each name; of as many seeds where one is there several times."""


@dataclass
class DemoConfig(Settings):
    """tools/demo.py"""

    output: str = "outputs/demo"
    encode: str = "configs/encode/emoji.yaml"
    held_out: ImagesConfig = field(default_factory=ImagesConfig)
    """Pictures never trained on: they give the lowest distance to expect, and the labels to sample."""
    features: str = "checkpoints/classifier"
    """Feature network of the distance: a FeatureNetwork folder, open_clip:ARCHITECTURE:FILE.safetensors or inception:FILE."""
    runs: list[DemoRunConfig] = field(default_factory=list)
    images: int = number(3_000, 1, MAX_IMAGES)
    """Images that a model is trained on, from its checkpoint on."""
    steps: list[int] = number([2, 4, 8, 32], 1, 10**5, min_length=1)
    guidance_scale: float = number(1.0, 0, 1000)
    seed: int = number(0, 0, MAX_SEED)
    showcase: ShowcaseConfig = field(default_factory=ShowcaseConfig)
    seconds_target: float = number(600.0, above=0, maximum=1e9)
    memory_target_gb: float = number(4.0, above=0, maximum=1e6)
