"""Typed configurations: OmegaConf structured dataclasses, loaded from YAML and ``key=value`` overrides.

Every tool owns one dataclass here. Unknown keys are errors that name the nearest known key; ranges are checked once, in
``__post_init__``, after everything is merged. A value of ``null`` means "not set"; ``???`` means "must be given".
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import textwrap
import types
import typing
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Optional, TypeVar

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .diffusion.objectives import OBJECTIVES, WEIGHTINGS
from .diffusion.process import PREDICTION_TYPES
from .errors import UserError

Config = TypeVar("Config")

PLACEMENTS = ("in_out", "up", "all")
ATTENTION_BACKENDS = ("auto", "sdpa", "xformers")


def check(condition: bool, key: str, expected: str, found: object) -> None:
    """Raise UserError "key: expected ..., found ..." unless ``condition`` holds."""
    if not condition:
        raise UserError(f"{key}: expected {expected}, found {found!r}")


def check_width(key: str, width: float) -> None:
    """Of an average: a profile that rises has less than 0.289, the deviation of a flat one."""
    check(0.001 <= width <= 0.28, key, "from 0.001 to 0.28", width)


def at_least(key: str, value: float, least: float) -> None:
    """Raise UserError unless ``value >= least``."""
    check(value >= least, key, f"at least {least}", value)


def one_of(key: str, value: object, allowed: typing.Collection) -> None:
    """Raise UserError unless ``value`` is one of ``allowed``."""
    check(value in allowed, key, "one of " + ", ".join(map(str, allowed)), value)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures in


@dataclass
class ImagesConfig:
    """Where pictures come from and how they are brought to one size."""

    source: str = MISSING
    """A folder (class = first sub-folder), a .zip of one, webdataset tars ("data/train-*.tar", "{000..009}", also at https://
    or s3:// URLs), or datasets:NAME, a Hugging Face dataset of the hub or of a folder."""
    resolution: int = 64
    """Side of the square pictures, in pixels."""
    crop: str = "center"
    """"center": scale the short side, crop the middle. "pad": scale the long side, pad with ``background``."""
    classes: Optional[str] = None
    """A JSON list of class names; found by itself where ``classes.json`` lies beside the tars."""
    split: str = "train"
    """Of a Hugging Face dataset."""
    cache: str = "~/.cache/ldm_smd"
    """Where tars from URLs are kept."""
    allow_pipe: bool = False
    """Run "pipe:COMMAND" sources, as webdataset does: any command, in a shell."""
    background: str = "white"
    """Colour under transparent pixels and in the padding."""
    strict: bool = False
    """Stop at the first picture that cannot be read; otherwise skip it, count it and list it."""
    max_pixels: int = 100_000_000
    """A picture with more pixels than this counts as unreadable (a decompression bomb, or a mistake)."""

    def __post_init__(self) -> None:
        at_least("images.resolution", self.resolution, 8)
        one_of("images.crop", self.crop, ("center", "pad"))


# ---------------------------------------------------------------------------------------------------------------------
# tools/train_autoencoder.py


@dataclass
class AutoencoderModelConfig:
    """The AutoencoderKL that is trained; each entry of ``block_out_channels`` after the first halves the resolution."""

    block_out_channels: list[int] = field(default_factory=lambda: [32, 64, 128, 128])
    layers_per_block: int = 1
    latent_channels: int = 16
    norm_num_groups: int = 8
    mid_block_add_attention: bool = True


@dataclass
class TrainAutoencoderConfig:
    """tools/train_autoencoder.py"""

    images: ImagesConfig = field(default_factory=ImagesConfig)
    held_out: ImagesConfig = field(default_factory=ImagesConfig)
    """Pictures that are only measured (PSNR), never trained on."""
    output: str = MISSING
    """Model folder to write (diffusers layout and a model card)."""
    work: str = "outputs/autoencoder"
    """Folder for checkpoints, metrics and reconstructions of the run; an interrupted run goes on from here."""
    model: AutoencoderModelConfig = field(default_factory=AutoencoderModelConfig)
    init_from: Optional[str] = None
    """Start from the weights of this AutoencoderKL folder instead of random ones."""
    train_encoder: bool = True
    """false: train the decoder only, so that latents encoded before stay valid (as sd-vae-ft-mse did)."""
    images_total: int = 100_000
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_images: int = 2_000
    kl_weight: float = 1e-6
    """Weight of the KL term, per latent number, against the reconstruction error per pixel value."""
    squared_weight: float = 0.0
    """Weight of the squared error, which PSNR counts, beside the absolute one."""
    gradient_weight: float = 0.1
    """Weight of the error between image gradients (finite differences): keeps edges from blurring."""
    ema_halflife_images: int = 10_000
    flip: bool = True
    seed: int = 0
    checkpoint_every_images: int = 10_000

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size, 1)
        check(self.images_total >= self.batch_size, "images_total", "at least one batch", self.images_total)
        check(self.learning_rate > 0, "learning_rate", "more than 0", self.learning_rate)
        check(self.train_encoder or self.init_from is not None, "init_from", "a folder where train_encoder is false", None)


# ---------------------------------------------------------------------------------------------------------------------
# tools/train_classifier.py


@dataclass
class ClassifierSetConfig:
    """One set of labelled pictures."""

    name: str = MISSING
    images: ImagesConfig = field(default_factory=ImagesConfig)
    held_out: ImagesConfig = field(default_factory=ImagesConfig)
    """Pictures that are only measured (accuracy), never trained on."""
    batch_size: int = 64
    mirror: bool = False
    """Mirror half of the pictures. Not for letters or flags."""


@dataclass
class TrainClassifierConfig:
    """tools/train_classifier.py"""

    sets: list[ClassifierSetConfig] = field(default_factory=list)
    """Every step takes a batch of each."""
    output: str = MISSING
    """Model folder to write (diffusers layout and a model card)."""
    block_out_channels: list[int] = field(default_factory=lambda: [16, 32, 64, 128])
    """Of the stem, then of each stage; the last are the features."""
    images_total: int = 400_000
    """Of all sets together."""
    learning_rate: float = 0.2
    """Of SGD with momentum, at its peak."""
    weight_decay: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        check(len(self.sets) > 0, "sets", "at least one set of pictures", len(self.sets))
        per_step = sum(entry.batch_size for entry in self.sets)
        check(self.images_total >= per_step, "images_total", f"at least one step of {per_step}", self.images_total)
        check(self.learning_rate > 0, "learning_rate", "more than 0", self.learning_rate)


# ---------------------------------------------------------------------------------------------------------------------
# tools/encode.py


@dataclass
class EncodeConfig:
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
    shard_size: int = 1000
    """Pictures in a shard."""
    batch_size: int = 32
    num_workers: int = 1
    """Processes that decode pictures while the autoencoder runs."""
    device: str = "auto"

    def __post_init__(self) -> None:
        at_least("shard_size", self.shard_size, 1)
        at_least("batch_size", self.batch_size, 1)
        at_least("num_workers", self.num_workers, 0)


# ---------------------------------------------------------------------------------------------------------------------
# tools/verify.py


@dataclass
class VerifyConfig:
    """tools/verify.py"""

    shards: str = MISSING
    """Folder with latent shards and manifest.json (tools/encode.py)."""
    sheet: Optional[str] = None
    """PNG to write: some of the latents, from all over the shards, decoded. null: none."""
    autoencoder: Optional[str] = None
    """That decodes them; null: the one the manifest names."""
    pictures: int = 64
    """On the sheet."""
    device: str = "auto"

    def __post_init__(self) -> None:
        at_least("pictures", self.pictures, 1)


# ---------------------------------------------------------------------------------------------------------------------
# tools/train.py


@dataclass
class ModelConfig:
    """SMDUNet2DModel, less what the shards say (latent size and channels, number of classes)."""

    block_out_channels: list[int] = field(default_factory=lambda: [128, 256])
    layers_per_block: int = 2
    up_layers_per_block: int = 1
    """Residual blocks of a level on the way up, which M draws repeat; not more than layers_per_block."""
    attention_levels: list[int] = field(default_factory=lambda: [1])
    attention_head_dim: int = 32
    norm_num_groups: int = 16
    dropout: float = 0.0
    latent_channels: int = 32
    """Channels of the mixture's latent map z. 0: the Gaussian baseline, without g_xi and f_phi."""
    identifier_channels: int = 32
    hypernetwork_width: int = 64
    placement: str = "up"
    """Where the hypernetwork acts: in_out (the paper), up (the trunk runs once for all draws), all."""
    noise_rank: int = 128
    """Principal components of the latents that a draw chooses in (ldm_smd/models/noise.py). 0: white noise (the paper)."""
    noise_modes: int = 256
    """Modes of the Gaussian mixture that the latents are taken to be from, in those directions. 1: one Gaussian."""

    def __post_init__(self) -> None:
        one_of("model.placement", self.placement, PLACEMENTS)
        at_least("model.noise_rank", self.noise_rank, 0)
        at_least("model.noise_modes", self.noise_modes, 1)
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
class ObjectiveConfig:
    """What the draws of the prediction are compared with the target by (ldm_smd/diffusion/objectives.py)."""

    name: str = "energy"
    """energy: a strictly proper score, learns the mixture. mixture_nll: likelihood of the draws' mixture. mse: the paper's
    loss, which collapses; the one for Gaussian models."""
    draws: int = 4
    """M, predictions per picture (energy: at least 2)."""
    beta: float = 1.0
    """Exponent of the energy score's distance: smaller is sharper and noisier."""
    diversity: float = 1.0
    """Weight of the distance between draws; below 1 the mixture is narrower than the data."""
    patches: list[int] = field(default_factory=lambda: [0, 4, 2, 1])
    """Sides of the patches, in latent places, that energy and mixture_nll measure distances over; 0: the whole picture."""
    bandwidth: float = 0.2
    """Standard deviation of mixture_nll's Gaussians, in units of the prediction."""
    weighting: str = "prediction"
    """Of the timesteps: the space in which an error counts the same at each. prediction, v, epsilon, x0; or min_snr."""

    def __post_init__(self) -> None:
        one_of("objective.name", self.name, OBJECTIVES)
        one_of("objective.weighting", self.weighting, WEIGHTINGS)
        least = 2 if self.name == "energy" else 1
        at_least("objective.draws", self.draws, least)
        check(0 < self.beta < 2, "objective.beta", "more than 0 and less than 2", self.beta)
        check(0 <= self.diversity <= 1, "objective.diversity", "from 0 to 1", self.diversity)
        check(len(self.patches) > 0, "objective.patches", "at least one side", self.patches)
        check(self.bandwidth > 0, "objective.bandwidth", "more than 0", self.bandwidth)


@dataclass
class DiffusionConfig:
    """The forward process, in diffusers' words."""

    num_train_timesteps: int = 1000
    beta_schedule: str = "cosine"
    """cosine: squaredcos_cap_v2 but for its last step, which ends at sigma = 1,300 and not 20,000, where float32 schedulers
    that work in sigma (EulerAncestralDiscreteScheduler) give NaN. Or squaredcos_cap_v2, linear, scaled_linear."""
    prediction_type: str = "v_prediction"
    """v_prediction, epsilon or sample (x_0)."""

    def __post_init__(self) -> None:
        schedules = ("cosine", "squaredcos_cap_v2", "linear", "scaled_linear")
        one_of("diffusion.beta_schedule", self.beta_schedule, schedules)
        one_of("diffusion.prediction_type", self.prediction_type, PREDICTION_TYPES)


@dataclass
class TrainConfig:
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
    of diffusers is extended to a mixture, with its own blocks; of ``model``, latent_channels, identifier_channels,
    hypernetwork_width and noise_* count."""
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    images_total: int = 1_000_000
    batch_size: int = 256
    """Over all processes together; the number of processes must divide it."""
    accumulate: int = 1
    """Parts that a process takes its share of a batch in, one after the other, where memory is short; same results."""
    learning_rate: float = 3e-4
    """Of AdamW. The energy score can diverge above 1e-3."""
    warmup_images: int = 10_000
    """Linear warm-up of the learning rate."""
    cooldown_images: int = 0
    """Linear cool-down to zero over the last images."""
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    ema_halflife_images: int = 50_000
    ema_widths: list[float] = field(default_factory=list)
    """Also keep averages of these relative widths, as [0.05, 0.1], and a snapshot of each at every checkpoint: tools/average.py
    makes one of any width of them."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null class, for classifier-free guidance."""
    mirror: bool = False
    """Take the mirrored encoding for half of the pictures (shards made with mirror: true)."""
    class_conditional: bool = True
    """Use the labels of the shards where they have them."""
    image_conditional: bool = False
    """Use the OpenCLIP embeddings of the shards (tools/encode.py embedding=...): the model makes pictures like another one.
    They are left out as often as the labels."""
    precision: str = "auto"
    """auto: bf16 on GPUs that have it, else float32. no: float32. bf16."""
    gradient_checkpointing: bool = False
    """Compute what is inside the blocks again on the way back, and do not keep it: a third more time, far less memory."""
    compile: bool = False
    """torch.compile of the network: minutes at the start, faster steps on GPUs."""
    attention: str = "auto"
    """auto: xformers where it runs, else torch. sdpa: torch. xformers: warn where it does not run."""
    num_workers: int = 0
    seed: int = 0
    log_every_images: int = 1_000
    sample_every_images: int = 50_000
    """Sample grids and the spread over eta."""
    sample_steps: int = 8
    checkpoint_every_images: int = 50_000
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size, 1)
        check(self.images_total >= self.batch_size, "images_total", "at least one batch", self.images_total)
        check(self.learning_rate > 0, "learning_rate", "more than 0", self.learning_rate)
        at_least("accumulate", self.accumulate, 1)
        for width in self.ema_widths:
            check_width("ema_widths", width)
        check(self.gradient_clip > 0, "gradient_clip", "more than 0", self.gradient_clip)
        check(0 <= self.label_dropout <= 1, "label_dropout", "from 0 to 1", self.label_dropout)
        at_least("keep_checkpoints", self.keep_checkpoints, 1)
        one_of("precision", self.precision, ("auto", "no", "bf16"))
        one_of("attention", self.attention, ATTENTION_BACKENDS)
        check(
            self.model.latent_channels > 0 or self.objective.name == "mse",
            "objective.name",
            "mse for a Gaussian model (model.latent_channels=0)",
            self.objective.name,
        )


# ---------------------------------------------------------------------------------------------------------------------
# tools/average.py


@dataclass
class AverageConfig:
    """tools/average.py"""

    run: str = MISSING
    """Folder of a run of tools/train.py with ema_widths."""
    sigma_rel: float = MISSING
    """Width of the average, as a share of the training: the deviation of what counts, in images, over all images."""
    output: str = MISSING
    """New model folder."""
    images: Optional[int] = None
    """Of the first so many images of the training; null: of all."""

    def __post_init__(self) -> None:
        check_width("sigma_rel", self.sigma_rel)


# ---------------------------------------------------------------------------------------------------------------------
# tools/train_moments.py


@dataclass
class TrainMomentsConfig:
    """tools/train_moments.py. All counts are in images."""

    model: str = MISSING
    """Model folder with a Gaussian UNet: RUN/model of tools/train.py."""
    shards: str = MISSING
    """The latent shards it was trained on."""
    output: str = MISSING
    """New model folder: the same with a moments part, and GMSScheduler as its scheduler."""
    images_total: int = 50_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    """Of AdamW; up over the first 5 %, then a half cosine to zero."""
    third_weight: float = 0.1
    """Of the squared error of r^3, whose own spread is that much larger than that of r^2."""
    ema_halflife_images: int = 5_000
    label_dropout: float = 0.1
    """Share of labels replaced by the null class."""
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size, 1)
        check(self.images_total >= self.batch_size, "images_total", "at least one batch", self.images_total)
        check(self.learning_rate > 0, "learning_rate", "more than 0", self.learning_rate)
        check(self.third_weight > 0, "third_weight", "more than 0", self.third_weight)
        check(0 <= self.label_dropout <= 1, "label_dropout", "from 0 to 1", self.label_dropout)


# ---------------------------------------------------------------------------------------------------------------------
# tools/fit_gaussian.py


@dataclass
class FitGaussianConfig:
    """tools/fit_gaussian.py"""

    model: str = MISSING
    """Model folder: RUN/model of tools/train.py."""
    shards: str = MISSING
    """The latent shards it was trained on."""
    output: str = MISSING
    """New model folder: the same with a gaussian part, and TeleportScheduler as its scheduler."""
    components: int = 1
    """1: a Gaussian for each class and one for all, each with its own covariance. More: a mixture of so many that share one,
    with weights by class."""
    rank: int = 128
    """Eigenvectors of a covariance that are kept; the other directions share their mean variance."""
    sigma_skip: float = 5.0
    """Noise over signal that TeleportScheduler starts at."""
    batch_size: int = 512
    mirror: bool = False
    """Take the mirrored encoding for half of the pictures (shards made with mirror: true)."""
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("components", self.components, 1)
        at_least("rank", self.rank, 1)
        at_least("batch_size", self.batch_size, 1)
        check(self.sigma_skip > 0, "sigma_skip", "more than 0", self.sigma_skip)


# ---------------------------------------------------------------------------------------------------------------------
# tools/sample.py


@dataclass
class SampleConfig:
    """tools/sample.py"""

    model: str = MISSING
    """A model folder as tools/train.py writes it (RUN/model), or the id of one on the hub."""
    output: str = MISSING
    """Folder for the pictures: one PNG each, named by class and seed, and grid.png."""
    classes: Optional[list[str]] = None
    """Names or numbers of the classes, ``per_class`` pictures each. null: all classes. []: unconditional."""
    per_class: int = 8
    """Pictures per class; of an unconditional run, pictures in all."""
    steps: int = 8
    scheduler: Optional[str] = None
    """Class of diffusers or ours: CogVideoXDDIM, DDIM, DDIMParallel, DDPM, DDPMParallel, DEISMultistep, DPMSolverMultistep,
    DPMSolverSinglestep, EulerAncestralDiscrete, EulerDiscrete, GMS, HeunDiscrete, KDPM2AncestralDiscrete, KDPM2Discrete,
    LMSDiscrete, PNDM, SASolver, Teleport or UniPCMultistep, each followed by "Scheduler"; with settings of its own where
    wanted, as DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++. null: the model folder's own."""
    guidance_scale: float = 1.0
    """Of guidance, away from the prediction without a class, or from that of ``guide``; 1 is none."""
    guidance_interval: Optional[list[float]] = None
    """[low, high]: guidance only at noise levels sigma between these, as [0.3, 5]. null: at all."""
    guide: Optional[str] = None
    """UNet folder of a weaker model (less trained, smaller) to be guided away from, as RUN/checkpoints/images-N/ema."""
    height: Optional[int] = None
    """Of the pictures, in pixels; null as in training."""
    width: Optional[int] = None
    like: Optional[str] = None
    """Make pictures like this one, with a model trained with image_conditional=true."""
    text: Optional[str] = None
    """The same from words: OpenCLIP's two towers share a space, though the model was trained without texts."""
    clip: Optional[str] = None
    """open_clip:ARCHITECTURE:FILE.safetensors, or a name of pretrained weights for the file: the network that the embeddings
    of its training are of, for ``like`` and ``text``."""
    image: Optional[str] = None
    """Start from this picture, noised: a sketch of colours becomes a picture. null: from pure noise."""
    strength: float = 0.6
    """With ``image``, the share of the noise schedule that is gone through: 1 leaves nothing of it."""
    seed: int = 0
    """Picture i has seed ``seed + i``: it is the same at any batch size."""
    batch_size: int = 64
    device: str = "auto"

    def __post_init__(self) -> None:
        at_least("per_class", self.per_class, 1)
        at_least("steps", self.steps, 1)
        at_least("batch_size", self.batch_size, 1)
        at_least("guidance_scale", self.guidance_scale, 0)
        check(0 < self.strength <= 1, "strength", "more than 0, to 1", self.strength)
        interval = self.guidance_interval
        check(interval is None or len(interval) == 2, "guidance_interval", "[low, high]", interval)
        check(self.like is None or self.text is None, "text", "null where there is a picture to be like", self.text)
        given = self.like is not None or self.text is not None
        check(given == (self.clip is not None), "clip", "an OpenCLIP network with like or text, and only then", self.clip)
        check(self.image is None or self.height is self.width is None, "height", "null where there is an image", self.height)


# ---------------------------------------------------------------------------------------------------------------------
# tools/explore.py


@dataclass
class ExploreConfig:
    """tools/explore.py"""

    models: dict[str, str] = field(default_factory=dict)
    """Name -> model folder (RUN/model) or hub id: side by side on the page, with the same noise and classes."""
    clip: Optional[str] = None
    """open_clip:ARCHITECTURE:FILE.safetensors or open_clip:FOLDER, for models trained with image_conditional=true: ask for
    pictures like another one, or by words."""
    host: str = "127.0.0.1"
    """Where the page listens: this machine alone. 0.0.0.0: whoever reaches it may use it."""
    port: Optional[int] = None
    """null: the first free one from 7860 on."""
    device: str = "auto"

    def __post_init__(self) -> None:
        check(len(self.models) > 0, "models", "at least one, models.NAME=FOLDER", "none")


# ---------------------------------------------------------------------------------------------------------------------
# tools/evaluate.py


@dataclass
class EvaluateConfig:
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
    count: int = 5000
    """Pictures to sample."""
    labels: str = "reference"
    """Classes sampled. "reference": as often as among the reference; "balanced": each as often as the others; "random"."""
    steps: int = 8
    scheduler: Optional[str] = None
    """As of tools/sample.py."""
    guidance_scale: float = 1.0
    seed: int = 0
    """Picture i has seed ``seed + i``."""
    batch_size: int = 64
    features: list[str] = field(default_factory=lambda: ["checkpoints/classifier"])
    """Feature networks: a FeatureNetwork folder; open_clip:ARCHITECTURE:FILE.safetensors; dinov2:ARCHITECTURE:FILE.safetensors
    with timm's name; inception:FILE. A name of pretrained weights instead of a file is fetched: open_clip:ViT-L-14-336:openai,
    dinov2:vit_large_patch14_dinov2:lvd142m. With #SHA256 after it the weights must have that hash."""
    cache: Optional[str] = None
    """Folder to keep the features of real pictures in: the next evaluation against the same ones need not look at them."""
    bootstrap: int = 20
    """Resampled sets that the confidence of the distances is taken from."""
    num_workers: int = 1
    """Processes that decode pictures."""
    device: str = "auto"

    def __post_init__(self) -> None:
        check((self.pictures is None) != (self.model is None), "pictures", "either these or a model", self.pictures)
        one_of("labels", self.labels, ("reference", "balanced", "random"))
        check(len(self.features) > 0, "features", "at least one feature network", self.features)
        for name, least in (("count", 2), ("steps", 1), ("batch_size", 1), ("bootstrap", 2), ("num_workers", 0)):
            at_least(name, getattr(self, name), least)
        at_least("guidance_scale", self.guidance_scale, 0)


# ---------------------------------------------------------------------------------------------------------------------
# tools/demo.py


@dataclass
class DemoRunConfig:
    """One model of the demo: the shipped weights it starts from and the training config it goes on with."""

    name: str = MISSING
    config: str = MISSING
    """Training config; its settings but for output, init_from and the lengths below are kept."""
    checkpoint: str = MISSING
    """Shipped UNet folder, with the metrics of its training in metrics.jsonl."""
    schedulers: list[str] = field(default_factory=lambda: ["DDPMScheduler"])
    """Each is sampled with and stands in the report on its own."""


@dataclass
class DemoConfig:
    """tools/demo.py"""

    output: str = "outputs/demo"
    encode: str = "configs/encode/emoji.yaml"
    held_out: ImagesConfig = field(default_factory=ImagesConfig)
    """Pictures never trained on: the floor of the distance, and the labels to sample."""
    features: str = "checkpoints/classifier"
    """Feature network of the distance: a FeatureNetwork folder, open_clip:ARCHITECTURE:FILE.safetensors or inception:FILE."""
    runs: list[DemoRunConfig] = field(default_factory=list)
    images: int = 3_000
    """Images each model is trained on, from its checkpoint on."""
    steps: list[int] = field(default_factory=lambda: [2, 4, 8, 32])
    guidance_scale: float = 1.0
    seed: int = 0
    seconds_target: float = 600.0
    memory_target_gb: float = 4.0


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
        except OmegaConfBaseException as error:
            raise UserError(f"{origin}: {_first_line(error)}") from error
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise UserError(f"{missing[0]}: expected a value ({missing[0]}=..., or in the config file), found none")
    return typing.cast(Config, OmegaConf.to_object(merged))


def dump_config(config: object) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


@dataclass(frozen=True)
class Setting:
    """Of a schema: its name, its default as YAML (None where it is required), and its docstring."""

    name: str
    default: str | None
    text: str


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
        yield Setting(name, text, texts.get(item.name, ""))
        if entries is not None:
            yield from settings(entries, f"{name}[].")


def _docstrings(schema: type) -> dict[str, str]:
    """The string after each field, of a class and those it extends."""
    found: dict[str, str] = {}
    for kind in reversed(schema.__mro__):
        if is_dataclass(kind):
            body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
            for one, following in itertools.pairwise(body):
                if isinstance(one, ast.AnnAssign) and isinstance(following, ast.Expr):
                    found[one.target.id] = inspect.cleandoc(ast.literal_eval(following.value))
    return found


def config_as_dict(config: object) -> dict:
    """The configuration as plain dictionaries and lists, for JSON."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


def _read_yaml(path: str | Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"--config: expected a YAML file, found no file {path}") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"--config: expected a YAML file, found {path}: {_first_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"--config: expected a YAML mapping, found a list or nothing in {path}")
    return loaded


def _refuse_unknown_keys(schema: type, layer: DictConfig, origin: str, prefix: str = "") -> None:
    hints = typing.get_type_hints(schema)
    known = {item.name for item in fields(schema)}
    for key in layer:
        full = f"{prefix}{key}"
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise UserError(f"{origin}: unknown key {full!r}; the nearest known key is {prefix + near!r}")
        inner = _dataclass_of(hints[key])
        if inner is not None and not OmegaConf.is_missing(layer, key) and isinstance(layer[key], DictConfig):
            _refuse_unknown_keys(inner, layer[key], origin, f"{full}.")


def _dataclass_of(hint: object) -> type | None:
    """The dataclass inside ``X`` or ``Optional[X]``, else None."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((option for option in options if is_dataclass(option)), None)


def _first_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:3])
