"""Settings of the tools that train, average and fit."""

from dataclasses import dataclass, field
from typing import Optional

from ..data.settings import CacheConfig, ImagesConfig
from ..diffusion.settings import DiffusionConfig, ObjectiveConfig
from ..models.settings import ATTENTION_BACKENDS, AutoencoderModelConfig, ModelConfig
from ..schema import MISSING, MOST_IMAGES, MOST_SEED, Settings, check, choice, number

PRECISIONS = ("auto", "no", "bf16")


@dataclass
class TrainConfig(Settings):
    """tools/train.py. All counts are in images."""

    shards: str = MISSING
    """Folder with latent shards and manifest.json (tools/encode.py), or its URL: s3://, gs://, https://, hf://."""
    shards_cache: CacheConfig = field(default_factory=CacheConfig)
    autoencoder: str = MISSING
    """The autoencoder the shards were made with: decodes the sample grids and goes into the model folder."""
    output: str = MISSING
    """Folder of the run: checkpoints, metrics, sample grids, and model/ (the pipeline, EMA weights) at the end."""
    init_from: Optional[str] = None
    """Start from the weights in this folder of a network, or of this hub id, instead of random ones. A Gaussian
    SMDUNet2DModel's will do for a mixture with the same blocks, which then equals it in the mean of its draws; and one without
    embeddings for one with. A UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel or SD3Transformer2DModel of diffusers is
    extended to a mixture, with its own blocks; of ``model``, z_channels, identifier_channels, hypernetwork_width, noise_* and
    for transformers tail_blocks count."""
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    images_total: int = number(1_000_000, 1, MOST_IMAGES)
    batch_size: int = number(256, 1, 2**20)
    """Over all processes together; the number of processes must divide it."""
    accumulate: int = number(1, 1, 2**20)
    """Parts in which a process takes its slice of a batch, one after the other, where memory is short; same results, but for
    the scale of an adversarial term, which is taken from a part."""
    learning_rate: float = number(3e-4, above=0, most=1)
    """Learning rate of AdamW. The energy score can diverge above 1e-3."""
    warmup_images: int = number(10_000, 0, MOST_IMAGES)
    """Linear warm-up of the learning rate."""
    cooldown_images: int = number(0, 0, MOST_IMAGES)
    """Linear cool-down to zero over the last images."""
    weight_decay: float = number(0.01, 0, 100)
    gradient_clip: float = number(1.0, above=0, most=1e9)
    ema_halflife_images: int = number(50_000, 0, MOST_IMAGES)
    ema_widths: list[float] = number([], 0.001, 0.28)
    """Also keep averages of these relative widths, as [0.05, 0.1], and a snapshot of each at every checkpoint, from which
    tools/average.py makes one of any width."""
    label_dropout: float = number(0.1, 0, 1)
    """Fraction of labels replaced by the null class, for classifier-free guidance."""
    wider_labels: float = number(0.0, 0, 1)
    """Fraction of the other labels replaced by a wider one, where the names of the classes have several parts: of "noto, flags"
    by "noto" or "flags", which are then classes of the model too."""
    mirror: bool = False
    """Take the mirrored encoding for half of the pictures (shards made with mirror: true)."""
    class_conditional: bool = True
    """Use the labels of the shards where they have them."""
    image_conditional: bool = False
    """Use the OpenCLIP embeddings of the shards (tools/encode.py embedding=...): the model makes images like a given one. They
    are left out as often as the labels."""
    precision: str = choice("auto", PRECISIONS)
    """auto: bf16 on GPUs that have it, else float32. no: float32. bf16."""
    gradient_checkpointing: bool = False
    """Recompute activations inside the blocks in the backward pass, not keeping them: a third more time, far less memory."""
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
    """Resume a run though its data or settings have changed; the model card tells what changed and when. false: refuse such a
    change, as the run would not equal an undisturbed one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_images_total(self.images_total, self.batch_size)
        name, fits = self.objective.name, self.model.z_channels > 0 or self.objective.name == "mse"
        check(fits, "objective.name", "mse for a Gaussian model (model.z_channels=0)", name)


@dataclass
class TrainAutoencoderConfig(Settings):
    """tools/train_autoencoder.py"""

    images: ImagesConfig = field(default_factory=ImagesConfig)
    held_out: ImagesConfig = field(default_factory=ImagesConfig)
    """Pictures that are only measured (PSNR), never trained on."""
    output: str = MISSING
    """Model folder to write (diffusers layout and a model card)."""
    work: Optional[str] = None
    """Folder for checkpoints, metrics and reconstructions; an interrupted run resumes from here. null: OUTPUT.run."""
    model: AutoencoderModelConfig = field(default_factory=AutoencoderModelConfig)
    init_from: Optional[str] = None
    """Start from the weights in this folder of such an autoencoder instead of random ones."""
    train_encoder: bool = True
    """false: train the decoder only, so that latents encoded before stay valid (as sd-vae-ft-mse did)."""
    images_total: int = number(100_000, 1, MOST_IMAGES)
    batch_size: int = number(16, 1, 2**16)
    learning_rate: float = number(1e-3, above=0, most=1)
    warmup_images: int = number(2_000, 0, MOST_IMAGES)
    kl_weight: float = number(1e-6, 0, 1e6)
    """Weight of the KL term, per latent element, against the reconstruction error per pixel value."""
    latent_noise: float = number(0.1, above=0, most=10)
    """Of an AutoencoderDC: deviation of the noise on its latents in training, whose size the KL term limits. It then decodes
    well what a denoiser gets slightly wrong."""
    squared_weight: float = number(0.0, 0, 1e6)
    """Weight of the squared error, which PSNR counts, beside the absolute one."""
    gradient_weight: float = number(0.1, 0, 1e6)
    """Weight of the error between image gradients (finite differences): keeps edges from blurring."""
    ema_halflife_images: int = number(10_000, 0, MOST_IMAGES)
    flip: bool = True
    precision: str = choice("no", PRECISIONS)
    """no: float32. bf16. auto: bf16 on GPUs that have it."""
    num_workers: int = number(0, 0, 256)
    """Processes that read the pictures, which are all kept in memory."""
    seed: int = number(0, 0, MOST_SEED)
    checkpoint_every_images: int = number(10_000, 1, MOST_IMAGES)
    resume_changed: bool = False
    """Resume a run though its images or settings have changed; the model card tells what changed and when."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_images_total(self.images_total, self.batch_size)
        check(self.train_encoder or self.init_from is not None, "init_from", "a folder where train_encoder is false", None)


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
    block_out_channels: list[int] = number([16, 32, 64, 128], 1, 8192, fewest=2)
    """Channels of the stem, then of each level; the last are the features."""
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
        check_images_total(self.images_total, per_step, f"step of {per_step}")


@dataclass
class AverageConfig(Settings):
    """tools/average.py"""

    run: str = MISSING
    """Folder of a run of tools/train.py with ema_widths."""
    sigma_rel: float = number(MISSING, 0.001, 0.28)
    """Width of the average, as a fraction of the training: the deviation of its profile, in images, over all images."""
    output: str = MISSING
    """New model folder."""
    images: Optional[int] = number(None, 1, MOST_IMAGES)
    """Average over the first this many images of the training; null: over all."""


@dataclass
class TrainMomentsConfig(Settings):
    """tools/train_moments.py. All counts are in images."""

    model: str = MISSING
    """Model folder with a Gaussian UNet: RUN/model of tools/train.py."""
    shards: str = MISSING
    """The latent shards it was trained on: folder or URL."""
    shards_cache: CacheConfig = field(default_factory=CacheConfig)
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
    """Fraction of labels replaced by the null class."""
    seed: int = number(0, 0, MOST_SEED)
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_images_total(self.images_total, self.batch_size)


@dataclass
class FitGaussianConfig(Settings):
    """tools/fit_gaussian.py"""

    model: str = MISSING
    """Model folder: RUN/model of tools/train.py."""
    shards: str = MISSING
    """The latent shards it was trained on: folder or URL."""
    shards_cache: CacheConfig = field(default_factory=CacheConfig)
    output: str = MISSING
    """New model folder: the same with a gaussian part, and TeleportScheduler as its scheduler."""
    components: int = number(1, 1, 2**16)
    """1: a Gaussian for each class and one for all, each with its own covariance. More: a mixture of so many with one
    covariance, with weights by class."""
    rank: int = number(128, 1, 2**16)
    """Eigenvectors of a covariance that are kept; the other directions share their mean variance."""
    sigma_skip: float = number(5.0, above=0, most=1e6)
    """Noise over signal that TeleportScheduler starts at."""
    batch_size: int = number(512, 1, 2**20)
    mirror: bool = False
    """Take the mirrored encoding for half of the pictures (shards made with mirror: true)."""
    seed: int = number(0, 0, MOST_SEED)


def check_images_total(images_total: int, batch_size: int, batch: str = "batch") -> None:
    """Raise UserError unless there is at least one batch."""
    check(images_total >= batch_size, "images_total", f"at least one {batch}", images_total)
