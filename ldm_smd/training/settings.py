"""Settings of the training tools: train, train_autoencoder, train_classifier, train_moments, average, fit_gaussian."""

from dataclasses import dataclass, field
from typing import Optional

from ..data.settings import CacheConfig, ImagesConfig
from ..diffusion.settings import DiffusionConfig, ObjectiveConfig
from ..models.settings import ATTENTION_BACKENDS, AutoencoderModelConfig, ModelConfig
from ..schema import MAX_IMAGES, MAX_SEED, MISSING, PRECISIONS, Settings, check, choice, number


@dataclass
class TrainConfig(Settings):
    """tools/train.py. All counts are in images."""

    RENAMED = {"accumulate": "micro_batches", "wider_labels": "coarse_label_fraction"}

    shards: str = MISSING
    """Folder with latent shards and manifest.json, from tools/encode.py, or its URL: s3://, gs://, https://, hf://."""
    shards_cache: CacheConfig = field(default_factory=CacheConfig)
    autoencoder: str = MISSING
    """Folder or hub id of the autoencoder that the shards were encoded with, or of a pipeline with it. Decodes previews and
    becomes part of the model folder."""
    output: str = MISSING
    """Folder of the run: checkpoints, metrics and sample grids; at the end model/, the pipeline with EMA weights."""
    init_from: Optional[str] = None
    """Folder or hub id of a network to start from. null: random weights.
    SMDUNet2DModel: the same blocks as configured. A mixture can start from a Gaussian model, and a model with image embeddings
    from one without.
    UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, SD3Transformer2DModel of diffusers: extended to a mixture. It
    keeps its blocks; of ``model``, only z_channels, identifier_channels, hypernetwork_width, noise_* and tail_blocks apply."""
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    images_total: int = number(1_000_000, 1, MAX_IMAGES)
    batch_size: int = number(256, 1, 2**20)
    """Total batch size over all processes; a multiple of their number."""
    micro_batches: int = number(1, 1, 2**20)
    """Number of micro-batches per process and step (gradient accumulation), to save memory. batch_size stays the total. Results
    are the same, except that the adversarial loss is scaled per micro-batch."""
    learning_rate: float = number(3e-4, above=0, maximum=1)
    """Learning rate of AdamW. The energy score can diverge above 1e-3."""
    warmup_images: int = number(10_000, 0, MAX_IMAGES)
    """Linear warm-up of the learning rate."""
    cooldown_images: int = number(0, 0, MAX_IMAGES)
    """Linear cool-down of the learning rate to zero at the end. 0: none."""
    weight_decay: float = number(0.01, 0, 100)
    gradient_clip: float = number(1.0, above=0, maximum=1e9)
    ema_halflife_images: int = number(50_000, 0, MAX_IMAGES)
    """Half-life of the EMA weights, which are sampled and saved."""
    ema_widths: list[float] = number([], 0.001, 0.28)
    """Also track power-function EMAs of these relative widths, such as [0.05, 0.1], with a snapshot at every checkpoint.
    tools/average.py makes an EMA of any width from them."""
    timestep_shift: float = number(1.0, above=0, maximum=1e3)
    """Above 1: more of the training at high noise. The signal-to-noise ratio of each of the uniform timesteps is divided by the
    square of this, as in Stable Diffusion 3. In large latents, high noise decides what an image shows."""
    sampling_shift: Optional[float] = number(None, above=0, maximum=1e3)
    """Default ``timestep_shift`` for sampling from the trained model. null: that of the training."""
    label_dropout: float = number(0.1, 0, 1)
    """Fraction of labels replaced by the null class, for classifier-free guidance."""
    coarse_label_fraction: float = number(0.0, 0, 1)
    """Fraction of the remaining labels replaced by a coarser one: "noto, flags" by "noto" or "flags", which become classes of
    the model too. Every class name must have the same number of parts."""
    mirror: bool = False
    """Use the mirrored encoding for half of the images. Needs shards encoded with mirror: true."""
    class_conditional: bool = True
    """Condition on the class labels of the shards, if they have any."""
    image_conditional: bool = False
    """Condition on the OpenCLIP embeddings of the shards (tools/encode.py embedding=...), to sample from image or text prompts.
    They are dropped as often as the labels (label_dropout)."""
    precision: str = choice("auto", PRECISIONS)
    """auto: bf16 on GPUs that support it, otherwise float32. no: float32. bf16: bf16 autocast."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: far less memory, a third more time."""
    compile: bool = False
    """Use torch.compile: minutes at the start, faster steps on GPUs."""
    attention: str = choice("auto", ATTENTION_BACKENDS)
    """auto: xformers if it works, otherwise torch. sdpa: torch. xformers: as auto, with a warning if it does not work."""
    num_workers: int = number(0, 0, 256)
    """Processes that read shards. 0: the main process reads them."""
    seed: int = number(0, 0, MAX_SEED)
    log_every_images: int = number(0, 0, MAX_IMAGES)
    """0: every 32 batches. The host waits for the device when it reads the values."""
    sample_every_images: int = number(50_000, 1, MAX_IMAGES)
    """Interval of sample grids and of the spread over eta in the log."""
    sample_steps: int = number(8, 1, 10**5)
    checkpoint_every_images: int = number(50_000, 1, MAX_IMAGES)
    keep_checkpoints: int = number(2, 1, 10**6)
    resume_changed: bool = False
    """Resume a run even if its data or settings have changed; the model card lists the changes. false: refuse, because the
    result would differ from an uninterrupted run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_images_total(self.images_total, self.batch_size)
        name, fits = self.objective.name, self.model.z_channels > 0 or self.objective.name == "mse"
        check(fits, "objective.name", "mse for a Gaussian model (model.z_channels=0)", name)


@dataclass
class TrainAutoencoderConfig(Settings):
    """tools/train_autoencoder.py"""

    RENAMED = {"flip": "mirror", "squared_weight": "l2_weight"}

    images: ImagesConfig = field(default_factory=ImagesConfig)
    held_out: ImagesConfig = field(default_factory=ImagesConfig)
    """Images for measuring the PSNR, never trained on."""
    output: str = MISSING
    """New model folder, in diffusers layout with a model card."""
    work: Optional[str] = None
    """Folder for checkpoints, metrics and reconstructions. Interrupted runs resume from it. null: OUTPUT.run."""
    model: AutoencoderModelConfig = field(default_factory=AutoencoderModelConfig)
    init_from: Optional[str] = None
    """Folder of an autoencoder with the same settings to start from. null: random weights."""
    train_encoder: bool = True
    """false: train only the decoder, so that existing latents stay valid (as sd-vae-ft-mse did)."""
    images_total: int = number(100_000, 1, MAX_IMAGES)
    batch_size: int = number(16, 1, 2**16)
    learning_rate: float = number(1e-3, above=0, maximum=1)
    warmup_images: int = number(2_000, 0, MAX_IMAGES)
    kl_weight: float = number(1e-6, 0, 1e6)
    """Weight of the KL loss per latent element, relative to the reconstruction error per pixel value."""
    latent_noise: float = number(0.1, above=0, maximum=10)
    """AutoencoderDC only: standard deviation of the noise added to the latents in training. Makes the decoder robust to small
    errors of the denoiser; the KL loss bounds the size of the latents."""
    l2_weight: float = number(0.0, 0, 1e6)
    """Weight of the squared error (what PSNR measures), in addition to the absolute error."""
    gradient_weight: float = number(0.1, 0, 1e6)
    """Weight of the error of image gradients (finite differences). Keeps edges sharp."""
    ema_halflife_images: int = number(10_000, 0, MAX_IMAGES)
    mirror: bool = True
    """Mirror half of the images. Not for letters or flags."""
    precision: str = choice("no", PRECISIONS)
    """no: float32. bf16: bf16 autocast. auto: bf16 on GPUs that support it, otherwise float32."""
    num_workers: int = number(0, 0, 256)
    """Processes that read the images. All images are kept in memory."""
    seed: int = number(0, 0, MAX_SEED)
    checkpoint_every_images: int = number(10_000, 1, MAX_IMAGES)
    resume_changed: bool = False
    """Resume a run even if its images or settings have changed; the model card lists the changes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_images_total(self.images_total, self.batch_size)
        check(self.train_encoder or self.init_from is not None, "init_from", "a folder if train_encoder is false", None)
        side, factor = self.images.resolution, 2 ** (len(self.model.block_out_channels) - 1)
        check(side % factor == 0, "images.resolution", f"a multiple of {factor}, the downsampling factor", side)
        check(
            self.held_out.resolution == side, "held_out.resolution", f"{side}, as images.resolution", self.held_out.resolution
        )


@dataclass
class ClassifierSetConfig(Settings):
    """One set of labelled images."""

    name: str = MISSING
    images: ImagesConfig = field(default_factory=ImagesConfig)
    held_out: ImagesConfig = field(default_factory=ImagesConfig)
    """Images for measuring the accuracy, never trained on."""
    batch_size: int = number(64, 1, 2**16)
    mirror: bool = False
    """Mirror half of the images. Not for letters or flags."""


@dataclass
class TrainClassifierConfig(Settings):
    """tools/train_classifier.py"""

    sets: list[ClassifierSetConfig] = field(default_factory=list)
    """Image sets. Every step takes a batch of each."""
    output: str = MISSING
    """New model folder, in diffusers layout with a model card."""
    block_out_channels: list[int] = number([16, 32, 64, 128], 1, 8192, min_length=2)
    """Channels of the stem, then of each level. The last number is that of the features."""
    images_total: int = number(400_000, 1, MAX_IMAGES)
    """Total number of images seen, over all sets."""
    learning_rate: float = number(0.2, above=0, maximum=10)
    """Peak learning rate of SGD with momentum."""
    weight_decay: float = number(5e-4, 0, 1)
    seed: int = number(0, 0, MAX_SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.sets) > 0, "sets", "at least one set of images", len(self.sets))
        names = [entry.name for entry in self.sets]
        check(len(set(names)) == len(names), "sets", "sets of different names", ", ".join(names))
        check(not any("." in name for name in names), "sets", "names without a dot", ", ".join(names))
        per_step = sum(entry.batch_size for entry in self.sets)
        check_images_total(self.images_total, per_step, f"step of {per_step}")


@dataclass
class AverageConfig(Settings):
    """tools/average.py"""

    run: str = MISSING
    """Folder of a run of tools/train.py with ema_widths."""
    sigma_rel: float = number(MISSING, 0.001, 0.28)
    """Relative width of the EMA: standard deviation of its profile, as a fraction of the training (EDM2, arXiv 2312.02696)."""
    output: str = MISSING
    """New model folder."""
    images: Optional[int] = number(None, 1, MAX_IMAGES)
    """Average the run as it was after this many images; null: at its end."""


@dataclass
class TrainMomentsConfig(Settings):
    """tools/train_moments.py. All counts are in images."""

    RENAMED = {"third_weight": "third_moment_weight"}

    model: str = MISSING
    """Model folder with a Gaussian UNet: RUN/model of tools/train.py, or a pipeline of diffusers by its folder or hub id."""
    shards: str = MISSING
    """The latent shards that the model was trained on: folder or URL."""
    shards_cache: CacheConfig = field(default_factory=CacheConfig)
    output: str = MISSING
    """New model folder: the same with a moments component, and GMSScheduler as its scheduler."""
    images_total: int = number(50_000, 1, MAX_IMAGES)
    batch_size: int = number(64, 1, 2**16)
    learning_rate: float = number(1e-3, above=0, maximum=1)
    """Peak learning rate of AdamW: linear warm-up over the first 5 %, then a half cosine to zero."""
    third_moment_weight: float = number(0.1, above=0, maximum=1e6)
    """Weight of the third-moment loss (r^3 has a larger variance than r^2)."""
    ema_halflife_images: int = number(5_000, 0, MAX_IMAGES)
    label_dropout: float = number(0.1, 0, 1)
    """Fraction of labels replaced by the null class."""
    seed: int = number(0, 0, MAX_SEED)
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_images_total(self.images_total, self.batch_size)


@dataclass
class FitGaussianConfig(Settings):
    """tools/fit_gaussian.py"""

    model: str = MISSING
    """Model folder: RUN/model of tools/train.py, or a pipeline of diffusers by its folder or hub id."""
    shards: str = MISSING
    """The latent shards that the model was trained on: folder or URL."""
    shards_cache: CacheConfig = field(default_factory=CacheConfig)
    output: str = MISSING
    """New model folder: the same with a gaussian component, and TeleportScheduler as its scheduler."""
    components: int = number(1, 1, 2**16)
    """1: a Gaussian per class and one for all classes, each with its own covariance. More: a mixture with this many components,
    one shared covariance, and weights per class."""
    rank: int = number(128, 1, 2**16)
    """Number of eigenvectors kept per covariance. The other directions share their mean variance."""
    sigma_skip: float = number(5.0, above=0, maximum=1e6)
    """Noise-to-signal ratio where the steps of TeleportScheduler start."""
    batch_size: int = number(512, 1, 2**20)
    mirror: bool = False
    """Use the mirrored encoding for half of the images. Needs shards encoded with mirror: true."""
    seed: int = number(0, 0, MAX_SEED)


def check_images_total(images_total: int, batch_size: int, batch: str = "batch") -> None:
    """Raise UserError unless there is at least one batch."""
    check(images_total >= batch_size, "images_total", f"at least one {batch}", images_total)
