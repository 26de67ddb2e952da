"""Typed configurations: OmegaConf structured dataclasses, loaded from YAML and ``key=value`` overrides.

Every tool owns one dataclass here. Unknown keys are errors that name the nearest known key; ranges are checked once, in
``__post_init__``, after everything is merged. A value of ``null`` means "not set"; ``???`` means "must be given".
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import math
import textwrap
import types
import typing
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Optional, TypeVar

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .choices import (
    ATTENTION_BACKENDS,
    BETA_SCHEDULES,
    CROPS,
    OBJECTIVES,
    PLACEMENTS,
    PRECISIONS,
    PREDICTION_TYPES,
    SAMPLED_LABELS,
    WEIGHTINGS,
)
from .errors import UserError, brief, shortened

Config = TypeVar("Config")

LONGEST_NAME = 4096
MOST_IMAGES = 10**12
MOST_SEED = 2**32 - 1
"""NumPy's and torch's generators both take it."""


def check(condition: bool, key: str, expected: str, found: object) -> None:
    """Raise UserError "key: expected ..., found ..." unless ``condition`` holds."""
    if not condition:
        raise UserError(f"{key}: expected {expected}, found {shortened(repr(found))}")


@dataclass(frozen=True)
class Bounds:
    """What a number, or each of a list, may be: from ``least`` to ``most``; more than ``above``, less than ``below``, where
    given. A list has ``fewest`` entries or more."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    fewest: int = 0

    def __contains__(self, value: float) -> bool:
        """NaN is in no bounds."""
        return (
            not math.isnan(value)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low = f"more than {self.above:,}" if self.least is None else f"from {self.least:,}"
        if self.below is not None:
            return f"{low}, less than {self.below:,}"
        return low if self.most == math.inf else f"{low} to {self.most:,}"


def at_least(key: str, value: float, least: float) -> None:
    """Raise UserError unless ``value >= least``, a bound that depends on another setting."""
    check(value >= least, key, f"at least {least}", value)


def one_of(key: str, value: object, allowed: typing.Collection) -> None:
    """Raise UserError unless ``value`` is one of ``allowed``."""
    check(value in allowed, key, "one of " + ", ".join(map(str, allowed)), value)


def number(
    default: typing.Any,
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> typing.Any:
    """A field that takes numbers within ``Bounds``."""
    return field(default=default, metadata={"bounds": Bounds(least, most, above, below)})


def numbers(default: list, least: float, most: float, fewest: int = 0) -> typing.Any:
    """A field that takes a list of ``fewest`` or more numbers within ``Bounds``."""
    return field(default_factory=lambda: list(default), metadata={"bounds": Bounds(least, most, fewest=fewest)})


def choice(default: str, allowed: tuple[str, ...]) -> typing.Any:
    """A field that takes one of these names, which shells complete."""
    return field(default=default, metadata={"choices": allowed})


def check_field(item: Field, key: str, value: typing.Any) -> None:
    """Raise UserError unless ``value`` is what a field allows; ``key`` is its full name."""
    if value is None or value == MISSING:
        return
    entries = value if isinstance(value, list) else [value]
    if isinstance(value, list):
        check(not any(isinstance(entry, (list, dict)) for entry in value), key, "a list of plain values", value)
    if any(isinstance(entry, str) for entry in entries):
        for entry in entries:
            fits = 0 < len(entry) <= LONGEST_NAME and "\0" not in entry
            check(fits, key, f"a name, a path or words of at most {LONGEST_NAME} characters", entry)
        if "choices" in item.metadata:
            one_of(key, value, item.metadata["choices"])
    bounds = item.metadata.get("bounds")
    if bounds is not None:
        check(len(entries) >= bounds.fewest, key, f"at least {bounds.fewest} numbers", value)
        for entry in entries:
            check(isinstance(entry, (int, float)) and entry in bounds, key, f"a number {bounds}", entry)


@dataclass
class Settings:
    """What all schemas are: every field holds what it allows."""

    def __post_init__(self) -> None:
        for item in fields(self):
            check_field(item, item.name, getattr(self, item.name))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures in


@dataclass
class ImagesConfig(Settings):
    """Where pictures come from and how they are brought to one size."""

    source: str = MISSING
    """A folder (class = first sub-folder), a .zip of one, webdataset tars ("data/train-*.tar", "{000..009}", also at https://
    or s3:// URLs), or datasets:NAME, a Hugging Face dataset of the hub or of a folder."""
    resolution: int = number(64, 8, 8192)
    """Side of the square pictures, in pixels."""
    crop: str = choice("center", CROPS)
    """"center": scale the short side, crop the middle. "pad": scale the long side, pad with ``background``."""
    classes: Optional[str] = None
    """A JSON list of class names; found by itself where ``classes.json`` lies beside the tars."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    cache: str = "~/.cache/ldm_smd"
    """Where tars from URLs are kept."""
    allow_pipe: bool = False
    """Run "pipe:COMMAND" sources, as webdataset does: any command, in a shell."""
    background: str = "white"
    """Colour under transparent pixels and in the padding, as HTML names it: white, #00ff00."""
    strict: bool = False
    """Stop at the first picture that cannot be read; otherwise skip it, count it and list it."""
    max_pixels: int = number(100_000_000, 1, 10**10)
    """A picture with more pixels than this counts as unreadable (a decompression bomb, or a mistake)."""


# ---------------------------------------------------------------------------------------------------------------------
# tools/train_autoencoder.py


@dataclass
class AutoencoderModelConfig(Settings):
    """The AutoencoderKL that is trained; each entry of ``block_out_channels`` after the first halves the resolution."""

    block_out_channels: list[int] = numbers([32, 64, 128, 128], 1, 8192, fewest=1)
    layers_per_block: int = number(1, 1, 32)
    latent_channels: int = number(16, 1, 4096)
    norm_num_groups: int = number(8, 1, 4096)
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for channels in self.block_out_channels:
            check(
                channels % self.norm_num_groups == 0,
                "model.block_out_channels",
                f"multiples of norm_num_groups={self.norm_num_groups}",
                channels,
            )


@dataclass
class TrainAutoencoderConfig(Settings):
    """tools/train_autoencoder.py"""

    images: ImagesConfig = field(default_factory=ImagesConfig)
    held_out: ImagesConfig = field(default_factory=ImagesConfig)
    """Pictures that are only measured (PSNR), never trained on."""
    output: str = MISSING
    """Model folder to write (diffusers layout and a model card)."""
    work: Optional[str] = None
    """Folder for checkpoints, metrics and reconstructions; an interrupted run goes on from here. null: OUTPUT.run."""
    model: AutoencoderModelConfig = field(default_factory=AutoencoderModelConfig)
    init_from: Optional[str] = None
    """Start from the weights of this AutoencoderKL folder instead of random ones."""
    train_encoder: bool = True
    """false: train the decoder only, so that latents encoded before stay valid (as sd-vae-ft-mse did)."""
    images_total: int = number(100_000, 1, MOST_IMAGES)
    batch_size: int = number(16, 1, 2**16)
    learning_rate: float = number(1e-3, above=0, most=1)
    warmup_images: int = number(2_000, 0, MOST_IMAGES)
    kl_weight: float = number(1e-6, 0, 1e6)
    """Weight of the KL term, per latent number, against the reconstruction error per pixel value."""
    squared_weight: float = number(0.0, 0, 1e6)
    """Weight of the squared error, which PSNR counts, beside the absolute one."""
    gradient_weight: float = number(0.1, 0, 1e6)
    """Weight of the error between image gradients (finite differences): keeps edges from blurring."""
    ema_halflife_images: int = number(10_000, 0, MOST_IMAGES)
    flip: bool = True
    seed: int = number(0, 0, MOST_SEED)
    checkpoint_every_images: int = number(10_000, 1, MOST_IMAGES)
    resume_changed: bool = False
    """Go on with a run though its pictures or settings are others now; the model card tells until when which counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.images_total >= self.batch_size, "images_total", "at least one batch", self.images_total)
        check(self.train_encoder or self.init_from is not None, "init_from", "a folder where train_encoder is false", None)


# ---------------------------------------------------------------------------------------------------------------------
# tools/train_classifier.py


@dataclass
class ClassifierSetConfig(Settings):
    """One set of labelled pictures."""

    name: str = MISSING
    images: ImagesConfig = field(default_factory=ImagesConfig)
    held_out: ImagesConfig = field(default_factory=ImagesConfig)
    """Pictures that are only measured (accuracy), never trained on."""
    batch_size: int = number(64, 1, 2**16)
    mirror: bool = False
    """Mirror half of the pictures. Not for letters or flags."""


@dataclass
class TrainClassifierConfig(Settings):
    """tools/train_classifier.py"""

    sets: list[ClassifierSetConfig] = field(default_factory=list)
    """Every step takes a batch of each."""
    output: str = MISSING
    """Model folder to write (diffusers layout and a model card)."""
    block_out_channels: list[int] = numbers([16, 32, 64, 128], 1, 8192, fewest=2)
    """Channels of the stem, then of each stage; the last are the features."""
    images_total: int = number(400_000, 1, MOST_IMAGES)
    """Images seen, all sets together."""
    learning_rate: float = number(0.2, above=0, most=10)
    """Peak learning rate of SGD with momentum."""
    weight_decay: float = number(5e-4, 0, 1)
    seed: int = number(0, 0, MOST_SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.sets) > 0, "sets", "at least one set of pictures", len(self.sets))
        per_step = sum(entry.batch_size for entry in self.sets)
        check(self.images_total >= per_step, "images_total", f"at least one step of {per_step}", self.images_total)


# ---------------------------------------------------------------------------------------------------------------------
# tools/encode.py


@dataclass
class EncodeConfig(Settings):
    """tools/encode.py"""

    images: ImagesConfig = field(default_factory=ImagesConfig)
    autoencoder: str = MISSING
    """A local diffusers model folder or a hub id ("stabilityai/sd-vae-ft-mse")."""
    output: str = MISSING
    """Folder for the latent shards and manifest.json; an unfinished one of the same run is gone on with."""
    worker: Optional[str] = None
    """i/n: do the shards of worker i of n, 0/n to n-1/n, as in an array job. null: all; or under torchrun and accelerate launch
    those of this process."""
    mirror: bool = True
    """Store the encoding of the mirrored picture too (twice the work and size). Not for letters or flags."""
    embedding: Optional[str] = None
    """open_clip:ARCHITECTURE:FILE.safetensors, a name of pretrained weights for the file, or open_clip:FOLDER with the files of
    an OpenCLIP model on the hub: also store each picture's embedding, for models that make pictures like another one."""
    shuffle: bool = True
    """Mix the pictures over the shards, always alike: training goes through a shard before it opens the next, so one should be
    as good as another. false: in the order of the source, where reading it in another is slow."""
    shard_size: int = number(1000, 1, 10**7)
    """Pictures in a shard."""
    batch_size: int = number(32, 1, 2**16)
    num_workers: int = number(1, 0, 256)
    """Processes that decode pictures while the autoencoder runs."""
    compare_contents: bool = False
    """A run goes on only if the pictures are still the same: by their contents, which are all read once more at the start.
    false: by the sizes and modification times of their files."""
    device: str = "auto"


# ---------------------------------------------------------------------------------------------------------------------
# tools/verify.py


@dataclass
class VerifyConfig(Settings):
    """tools/verify.py"""

    shards: str = MISSING
    """Folder with latent shards and manifest.json (tools/encode.py)."""
    sheet: Optional[str] = None
    """PNG to write: some of the latents, from all over the shards, decoded. null: none."""
    autoencoder: Optional[str] = None
    """That decodes them; null: the one the manifest names."""
    pictures: int = number(64, 1, 10_000)
    """On the sheet."""
    device: str = "auto"


# ---------------------------------------------------------------------------------------------------------------------
# tools/train.py


@dataclass
class ModelConfig(Settings):
    """SMDUNet2DModel, less what the shards say (latent size and channels, number of classes)."""

    block_out_channels: list[int] = numbers([128, 256], 1, 8192, fewest=1)
    layers_per_block: int = number(2, 1, 32)
    up_layers_per_block: int = number(1, 1, 32)
    """Residual blocks of a level on the way up, which M draws repeat; not more than layers_per_block."""
    attention_levels: list[int] = numbers([1], 0, 32)
    attention_head_dim: int = number(32, 1, 1024)
    norm_num_groups: int = number(16, 1, 4096)
    dropout: float = number(0.0, 0, 0.95)
    z_channels: int = number(32, 0, 4096)
    """Channels of the mixture's latent map z. 0: the Gaussian baseline, without g_xi and f_phi."""
    identifier_channels: int = number(32, 1, 4096)
    hypernetwork_width: int = number(64, 1, 4096)
    placement: str = choice("up", PLACEMENTS)
    """Where the hypernetwork acts: in_out (the paper), up (the trunk runs once for all draws), all."""
    noise_rank: int = number(128, 0, 2**16)
    """Principal components of the latents that a draw chooses in (ldm_smd/models/noise.py). 0: white noise (the paper)."""
    noise_modes: int = number(256, 1, 2**16)
    """Modes of the Gaussian mixture that the latents are taken to be from, in those directions. 1: one Gaussian."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.up_layers_per_block <= self.layers_per_block,
            "model.up_layers_per_block",
            f"at most layers_per_block={self.layers_per_block}",
            self.up_layers_per_block,
        )
        levels = len(self.block_out_channels)
        for level, channels in enumerate(self.block_out_channels):
            check(
                channels % self.norm_num_groups == 0,
                "model.block_out_channels",
                f"multiples of norm_num_groups={self.norm_num_groups}",
                channels,
            )
            if level in self.attention_levels or level == levels - 1:
                check(
                    channels % self.attention_head_dim == 0,
                    "model.block_out_channels",
                    f"multiples of attention_head_dim={self.attention_head_dim} where attention is",
                    channels,
                )


@dataclass
class ObjectiveConfig(Settings):
    """What the draws of the prediction are compared with the target by (ldm_smd/diffusion/objectives.py)."""

    name: str = choice("energy", OBJECTIVES)
    """energy: a strictly proper score, learns the mixture. mixture_nll: likelihood of the draws' mixture. mse: the paper's
    loss, which collapses; the one for Gaussian models."""
    draws: int = number(4, 1, 1024)
    """M, predictions per picture (energy: at least 2)."""
    beta: float = number(1.0, above=0, below=2)
    """Exponent of the energy score's distance: smaller is sharper and noisier."""
    diversity: float = number(1.0, 0, 1)
    """Weight of the distance between draws; below 1 the mixture is narrower than the data."""
    patches: list[int] = numbers([0, 4, 2, 1], 0, 1024, fewest=1)
    """Sides of the patches, in latent places, that energy and mixture_nll measure distances over; 0: the whole picture."""
    bandwidth: float = number(0.2, above=0, most=1e6)
    """Standard deviation of mixture_nll's Gaussians, in units of the prediction."""
    weighting: str = choice("prediction", WEIGHTINGS)
    """Weighting of the timesteps: the space in which errors weigh the same at each (prediction, v, epsilon, x0), or min_snr."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.draws > 1 or self.name != "energy", "objective.draws", "at least 2 for the energy score", self.draws)


@dataclass
class DiffusionConfig(Settings):
    """The forward process, in diffusers' words."""

    num_train_timesteps: int = number(1000, 2, 10**5)
    beta_schedule: str = choice("cosine", BETA_SCHEDULES)
    """cosine: squaredcos_cap_v2 but for its last step, which ends at sigma = 1,300 and not 20,000, where float32 schedulers
    that work in sigma (EulerAncestralDiscreteScheduler) give NaN. Or squaredcos_cap_v2, linear, scaled_linear."""
    prediction_type: str = choice("v_prediction", PREDICTION_TYPES)
    """v_prediction, epsilon or sample (x_0)."""


@dataclass
class TrainConfig(Settings):
    """tools/train.py. All counts are in images."""

    shards: str = MISSING
    """Folder with latent shards and manifest.json (tools/encode.py)."""
    autoencoder: str = MISSING
    """The autoencoder the shards were made with: decodes the sample grids and goes into the model folder."""
    output: str = MISSING
    """Folder of the run: checkpoints, metrics, sample grids, and model/ (the pipeline, EMA weights) at the end."""
    init_from: Optional[str] = None
    """Start from the weights of this model folder instead of random ones. A Gaussian SMDUNet2DModel's will do for a mixture
    with the same blocks, which then equals it in the mean of its draws; and one without embeddings for one with. A UNet2DModel
    of diffusers is extended to a mixture, with its own blocks; of ``model``, z_channels, identifier_channels,
    hypernetwork_width and noise_* count."""
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    images_total: int = number(1_000_000, 1, MOST_IMAGES)
    batch_size: int = number(256, 1, 2**20)
    """Over all processes together; the number of processes must divide it."""
    accumulate: int = number(1, 1, 2**20)
    """Parts that a process takes its share of a batch in, one after the other, where memory is short; same results."""
    learning_rate: float = number(3e-4, above=0, most=1)
    """Learning rate of AdamW. The energy score can diverge above 1e-3."""
    warmup_images: int = number(10_000, 0, MOST_IMAGES)
    """Linear warm-up of the learning rate."""
    cooldown_images: int = number(0, 0, MOST_IMAGES)
    """Linear cool-down to zero over the last images."""
    weight_decay: float = number(0.01, 0, 100)
    gradient_clip: float = number(1.0, above=0, most=1e9)
    ema_halflife_images: int = number(50_000, 0, MOST_IMAGES)
    ema_widths: list[float] = numbers([], 0.001, 0.28)
    """Also keep averages of these relative widths, as [0.05, 0.1], and a snapshot of each at every checkpoint: tools/average.py
    makes one of any width of them."""
    label_dropout: float = number(0.1, 0, 1)
    """Share of labels replaced by the null class, for classifier-free guidance."""
    mirror: bool = False
    """Take the mirrored encoding for half of the pictures (shards made with mirror: true)."""
    class_conditional: bool = True
    """Use the labels of the shards where they have them."""
    image_conditional: bool = False
    """Use the OpenCLIP embeddings of the shards (tools/encode.py embedding=...): the model makes pictures like another one.
    They are left out as often as the labels."""
    precision: str = choice("auto", PRECISIONS)
    """auto: bf16 on GPUs that have it, else float32. no: float32. bf16."""
    gradient_checkpointing: bool = False
    """Compute what is inside the blocks again on the way back, and do not keep it: a third more time, far less memory."""
    compile: bool = False
    """torch.compile of the network: minutes at the start, faster steps on GPUs."""
    attention: str = choice("auto", ATTENTION_BACKENDS)
    """auto: xformers where it runs, else torch. sdpa: torch. xformers: warn where it does not run."""
    num_workers: int = number(0, 0, 256)
    seed: int = number(0, 0, MOST_SEED)
    log_every_images: int = number(1_000, 1, MOST_IMAGES)
    sample_every_images: int = number(50_000, 1, MOST_IMAGES)
    """Sample grids and the spread over eta."""
    sample_steps: int = number(8, 1, 10**5)
    checkpoint_every_images: int = number(50_000, 1, MOST_IMAGES)
    keep_checkpoints: int = number(2, 1, 10**6)
    resume_changed: bool = False
    """Go on with a run though its data or settings are others now; the model card tells until when which counted. false: such a
    change is refused, as it would not be the run that was resumed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.images_total >= self.batch_size, "images_total", "at least one batch", self.images_total)
        check(
            self.model.z_channels > 0 or self.objective.name == "mse",
            "objective.name",
            "mse for a Gaussian model (model.z_channels=0)",
            self.objective.name,
        )


# ---------------------------------------------------------------------------------------------------------------------
# tools/average.py


@dataclass
class AverageConfig(Settings):
    """tools/average.py"""

    run: str = MISSING
    """Folder of a run of tools/train.py with ema_widths."""
    sigma_rel: float = number(MISSING, 0.001, 0.28)
    """Width of the average, as a share of the training: the deviation of what counts, in images, over all images."""
    output: str = MISSING
    """New model folder."""
    images: Optional[int] = number(None, 1, MOST_IMAGES)
    """Average over the first this many images of the training; null: over all."""


# ---------------------------------------------------------------------------------------------------------------------
# tools/train_moments.py


@dataclass
class TrainMomentsConfig(Settings):
    """tools/train_moments.py. All counts are in images."""

    model: str = MISSING
    """Model folder with a Gaussian UNet: RUN/model of tools/train.py."""
    shards: str = MISSING
    """The latent shards it was trained on."""
    output: str = MISSING
    """New model folder: the same with a moments part, and GMSScheduler as its scheduler."""
    images_total: int = number(50_000, 1, MOST_IMAGES)
    batch_size: int = number(64, 1, 2**16)
    learning_rate: float = number(1e-3, above=0, most=1)
    """Peak learning rate of AdamW: linear warm-up over the first 5 %, then a half cosine to zero."""
    third_weight: float = number(0.1, above=0, most=1e6)
    """Weight of the third-moment loss (r^3 has a larger variance than r^2)."""
    ema_halflife_images: int = number(5_000, 0, MOST_IMAGES)
    label_dropout: float = number(0.1, 0, 1)
    """Share of labels replaced by the null class."""
    seed: int = number(0, 0, MOST_SEED)
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.images_total >= self.batch_size, "images_total", "at least one batch", self.images_total)


# ---------------------------------------------------------------------------------------------------------------------
# tools/fit_gaussian.py


@dataclass
class FitGaussianConfig(Settings):
    """tools/fit_gaussian.py"""

    model: str = MISSING
    """Model folder: RUN/model of tools/train.py."""
    shards: str = MISSING
    """The latent shards it was trained on."""
    output: str = MISSING
    """New model folder: the same with a gaussian part, and TeleportScheduler as its scheduler."""
    components: int = number(1, 1, 2**16)
    """1: a Gaussian for each class and one for all, each with its own covariance. More: a mixture of so many that share one,
    with weights by class."""
    rank: int = number(128, 1, 2**16)
    """Eigenvectors of a covariance that are kept; the other directions share their mean variance."""
    sigma_skip: float = number(5.0, above=0, most=1e6)
    """Noise over signal that TeleportScheduler starts at."""
    batch_size: int = number(512, 1, 2**20)
    mirror: bool = False
    """Take the mirrored encoding for half of the pictures (shards made with mirror: true)."""
    seed: int = number(0, 0, MOST_SEED)


# ---------------------------------------------------------------------------------------------------------------------
# tools/sample.py


@dataclass
class SampleConfig(Settings):
    """tools/sample.py"""

    model: str = MISSING
    """A model folder as tools/train.py writes it (RUN/model), or the id of one on the hub."""
    output: str = MISSING
    """Folder for the pictures: one PNG each, named by class and seed, and grid.png."""
    classes: Optional[list[str]] = None
    """Names or numbers of the classes, ``per_class`` pictures each. null: all classes. []: unconditional."""
    per_class: int = number(8, 1, 10**6)
    """Pictures per class; of an unconditional run, pictures in all."""
    steps: int = number(8, 1, 10**5)
    scheduler: Optional[str] = None
    """Class of diffusers or ours: CogVideoXDDIM, DDIM, DDIMParallel, DDPM, DDPMParallel, DEISMultistep, DPMSolverMultistep,
    DPMSolverSinglestep, EulerAncestralDiscrete, EulerDiscrete, GMS, HeunDiscrete, KDPM2AncestralDiscrete, KDPM2Discrete,
    LMSDiscrete, PNDM, SASolver, Teleport or UniPCMultistep, each followed by "Scheduler"; with settings of its own where
    wanted, as DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++. null: the model folder's own."""
    guidance_scale: float = number(1.0, 0, 1000)
    """Guidance scale, away from the prediction without a class, or from that of ``guide``; 1 is no guidance."""
    guidance_interval: Optional[list[float]] = number(None, 0, math.inf)
    """[low, high]: guidance only at noise levels sigma between these, as [0.3, 5]. null: at all."""
    guide: Optional[str] = None
    """UNet folder of a weaker model (less trained, smaller) to be guided away from, as RUN/checkpoints/images-N/ema."""
    height: Optional[int] = number(None, 1, 2**16)
    """Height of the images in pixels; null: as in training."""
    width: Optional[int] = number(None, 1, 2**16)
    like: Optional[str] = None
    """Make pictures like this one, with a model trained with image_conditional=true."""
    text: Optional[str] = None
    """The same from words: OpenCLIP's two towers share a space, though the model was trained without texts."""
    clip: Optional[str] = None
    """open_clip:ARCHITECTURE:FILE.safetensors, or a name of pretrained weights for the file: the network that the embeddings
    of its training are of, for ``like`` and ``text``."""
    image: Optional[str] = None
    """Start from this picture, noised: a sketch of colours becomes a picture. null: from pure noise."""
    strength: float = number(0.6, above=0, most=1)
    """With ``image``, the share of the noise schedule that is gone through: 1 leaves nothing of it."""
    seed: int = number(0, 0, MOST_SEED)
    """Picture i has seed ``seed + i``: it is the same at any batch size."""
    batch_size: int = number(64, 1, 2**16)
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        interval = self.guidance_interval
        ordered = interval is None or (len(interval) == 2 and interval[0] <= interval[1])
        check(ordered, "guidance_interval", "[low, high], low not above high", interval)
        check(self.like is None or self.text is None, "text", "null where there is a picture to be like", self.text)
        given = self.like is not None or self.text is not None
        check(given == (self.clip is not None), "clip", "an OpenCLIP network with like or text, and only then", self.clip)
        check(self.image is None or self.height is self.width is None, "height", "null where there is an image", self.height)


# ---------------------------------------------------------------------------------------------------------------------
# tools/explore.py


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


# ---------------------------------------------------------------------------------------------------------------------
# tools/evaluate.py


@dataclass
class EvaluateConfig(Settings):
    """tools/evaluate.py"""

    output: str = MISSING
    """JSON file to write; the same as a table beside it, .md."""
    reference: ImagesConfig = field(default_factory=ImagesConfig)
    """Real pictures to compare with. Whatever else is compared is brought to the same size in the same way."""
    held_out: Optional[str] = None
    """Source of real pictures that no model has seen: their distance to the reference is the floor."""
    pictures: Optional[str] = None
    """Source of pictures to measure, as tools/sample.py or another program made them; or"""
    model: Optional[str] = None
    """a model folder, or hub id, to sample them from, with the settings below."""
    count: int = number(5000, 2, 10**9)
    """Pictures to sample."""
    labels: str = choice("reference", SAMPLED_LABELS)
    """Classes sampled. "reference": as often as among the reference; "balanced": each as often as the others; "random"."""
    steps: int = number(8, 1, 10**5)
    scheduler: Optional[str] = None
    """As of tools/sample.py."""
    guidance_scale: float = number(1.0, 0, 1000)
    seed: int = number(0, 0, MOST_SEED)
    """Picture i has seed ``seed + i``."""
    batch_size: int = number(64, 1, 2**16)
    features: list[str] = field(default_factory=lambda: ["checkpoints/classifier"])
    """Feature networks: a FeatureNetwork folder; open_clip:ARCHITECTURE:FILE.safetensors; dinov2:ARCHITECTURE:FILE.safetensors
    with timm's name; inception:FILE. A name of pretrained weights instead of a file is fetched: open_clip:ViT-L-14-336:openai,
    dinov2:vit_large_patch14_dinov2:lvd142m. With #SHA256 after it the weights must have that hash."""
    cache: Optional[str] = None
    """Folder to keep the features of real pictures in: the next evaluation against the same ones need not look at them."""
    bootstrap: int = number(20, 2, 10_000)
    """Resampled sets that the confidence of the distances is taken from."""
    num_workers: int = number(1, 0, 256)
    """Processes that decode pictures."""
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check((self.pictures is None) != (self.model is None), "pictures", "either these or a model", self.pictures)
        check(len(self.features) > 0, "features", "at least one feature network", self.features)


# ---------------------------------------------------------------------------------------------------------------------
# tools/demo.py


@dataclass
class DemoRunConfig(Settings):
    """One model of the demo: the shipped weights it starts from and the training config it goes on with."""

    name: str = MISSING
    config: str = MISSING
    """Training config; its settings but for output, init_from and the lengths below are kept."""
    checkpoint: str = MISSING
    """Shipped UNet folder, with the metrics of its training in metrics.jsonl."""
    schedulers: list[str] = field(default_factory=lambda: ["DDPMScheduler"])
    """Each is sampled with and stands in the report on its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.schedulers) > 0, "runs[].schedulers", "at least one", self.schedulers)


@dataclass
class DemoConfig(Settings):
    """tools/demo.py"""

    output: str = "outputs/demo"
    encode: str = "configs/encode/emoji.yaml"
    held_out: ImagesConfig = field(default_factory=ImagesConfig)
    """Pictures never trained on: the floor of the distance, and the labels to sample."""
    features: str = "checkpoints/classifier"
    """Feature network of the distance: a FeatureNetwork folder, open_clip:ARCHITECTURE:FILE.safetensors or inception:FILE."""
    runs: list[DemoRunConfig] = field(default_factory=list)
    images: int = number(3_000, 1, MOST_IMAGES)
    """Images each model is trained on, from its checkpoint on."""
    steps: list[int] = numbers([2, 4, 8, 32], 1, 10**5, fewest=1)
    guidance_scale: float = number(1.0, 0, 1000)
    seed: int = number(0, 0, MOST_SEED)
    seconds_target: float = number(600.0, above=0, most=1e9)
    memory_target_gb: float = number(4.0, above=0, most=1e6)


# ---------------------------------------------------------------------------------------------------------------------
# Load, merge, validate, dump


def load_config(schema: type[Config], path: str | Path | None, overrides: typing.Sequence[str] = ()) -> Config:
    """Defaults of ``schema`` < YAML file < ``key=value`` overrides, checked, as an instance of ``schema``.

    Raises UserError for an unreadable file, an unknown key (with the nearest known one), a value of the wrong type or out
    of range, and a mandatory value that is missing.
    """
    merged = OmegaConf.structured(schema)
    layers: list[tuple[str, DictConfig]] = []
    if path is not None:
        layers.append((str(path), _read_yaml(path)))
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override: expected key=value, found {override!r}")
        try:
            layers.append((override, OmegaConf.from_dotlist([override])))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(f"override: expected key=value with a YAML value, found {override!r}") from error

    for origin, layer in layers:
        _refuse_unknown_keys(schema, layer, origin)
        try:
            merged = OmegaConf.merge(merged, layer)
        except (OmegaConfBaseException, TypeError) as error:  # TypeError: of a list in the place of a mapping
            key = getattr(error, "full_key", None) or origin
            raise UserError(f"{key}: expected a value of its type, found: {_first_line(error)}") from error
    try:
        # First, as the errors of to_object do not know in which setting a schema stands.
        _check_fields(schema, merged)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"{missing[0]}: expected a value ({missing[0]}=..., or in the config file), found none")
        return typing.cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:  # of an interpolation, ${...}
        raise UserError(f"settings: expected values that can be resolved, found: {_first_line(error)}") from error


def dump_config(config: object) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


@dataclass(frozen=True)
class Setting:
    """One setting of a schema.

    Attributes:
        name: full name, as model.placement.
        default: as YAML; None where a value is required.
        text: docstring.
        choices: the values it takes, where they are a few.
        bounds: of a number, in words.
    """

    name: str
    default: str | None
    text: str
    choices: tuple[str, ...] = ()
    bounds: str = ""


def settings(schema: type, prefix: str = "") -> typing.Iterator[Setting]:
    """All of a schema, nested ones by their full names; those of the entries of a list as NAME[].KEY."""
    hints, texts = typing.get_type_hints(schema), _docstrings(schema)
    for item in fields(schema):
        name = prefix + item.name
        inner = _dataclass_of(hints[item.name])
        if inner is not None:
            yield from settings(inner, f"{name}.")
            continue
        default = item.default_factory() if item.default_factory is not NO_DEFAULT else item.default
        required = default is NO_DEFAULT or default == MISSING
        entries = _dataclass_of(next(iter(typing.get_args(hints[item.name])), None))
        if required:
            text = None
        elif entries is not None and default is not None:
            text = "[...]"  # the entries' own settings say what is in it
        else:
            text = yaml.safe_dump(default, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
        choices = ("true", "false") if hints[item.name] is bool else item.metadata.get("choices", ())
        yield Setting(name, text, texts.get(item.name, ""), choices, str(item.metadata.get("bounds", "")))
        if entries is not None:
            yield from settings(entries, f"{name}[].")


def _docstrings(schema: type) -> dict[str, str]:
    """The string after each field, of a class and those it extends."""
    found: dict[str, str] = {}
    for kind in reversed(schema.__mro__):
        if is_dataclass(kind):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
            assert isinstance(definition, ast.ClassDef)
            for one, following in itertools.pairwise(definition.body):
                if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(following, ast.Expr):
                    found[one.target.id] = inspect.cleandoc(ast.literal_eval(following.value))
    return found


def config_as_dict(config: object) -> dict:
    """The configuration as plain dictionaries and lists, for JSON."""
    return typing.cast(dict, OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))


def _read_yaml(path: str | Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"--config: expected a YAML file, found no file {path}") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"--config: expected a YAML file, found {path}: {brief(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"--config: expected a YAML mapping, found a list or nothing in {path}")
    return loaded


def _refuse_unknown_keys(schema: type, layer: DictConfig, origin: str, prefix: str = "") -> None:
    hints = typing.get_type_hints(schema)
    known = {item.name for item in fields(schema)}
    for key in layer:
        full = f"{prefix}{key!s}"
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise UserError(f"{origin}: unknown key {full!r}; the nearest known key is {prefix + near!r}")
        inner = _dataclass_of(hints[key])
        if inner is not None and not OmegaConf.is_missing(layer, key) and isinstance(layer[key], DictConfig):
            _refuse_unknown_keys(inner, layer[key], origin, f"{full}.")


def _check_fields(schema: type, node: DictConfig, prefix: str = "") -> None:
    """``check_field`` of all settings that have a value, by their full names."""
    hints = typing.get_type_hints(schema)
    for item in fields(schema):
        if OmegaConf.is_missing(node, item.name) or node[item.name] is None:
            continue
        value, inner = node[item.name], _dataclass_of(hints[item.name])
        entries = _dataclass_of(next(iter(typing.get_args(hints[item.name])), None))
        if inner is not None:
            _check_fields(inner, value, f"{prefix}{item.name}.")
        elif entries is not None:
            for index, entry in enumerate(value):
                _check_fields(entries, entry, f"{prefix}{item.name}[{index}].")
        elif value == "False" and "no" in item.metadata.get("choices", ()):
            node[item.name] = "no"  # as YAML has an unquoted no
        else:
            check_field(item, prefix + item.name, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)


def _dataclass_of(hint: object) -> type | None:
    """The dataclass inside ``X`` or ``Optional[X]``, else None."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def _first_line(error: Exception) -> str:
    """What is wrong; OmegaConf names the class of the schema in further lines."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
