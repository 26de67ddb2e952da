"""Settings of image sources, and of tools/encode.py and tools/verify.py."""

from dataclasses import dataclass, field
from typing import Optional

from ..schema import MISSING, Settings, choice, number

MAX_PIXELS = 100_000_000


@dataclass
class CacheConfig(Settings):
    """Local copies of shards at URLs: s3://, gs://, https://, hf://. Processes and nodes may share one."""

    folder: str = "~/.cache/ldm_smd/shards"
    """Folder of the copies, best on a local disk."""
    gigabytes: float = number(100.0, above=0, maximum=10**6)
    """Maximum size. Beyond it, the least recently used copies are removed. A few more shards stay on disk while they are
    read."""

    @property
    def bytes(self) -> int:
        return int(self.gigabytes * 1e9)


@dataclass
class ImagesConfig(Settings):
    """Where images come from and how they are resized."""

    source: str = MISSING
    """A folder (class = first sub-folder), a .zip of one, webdataset tars ("data/train-*.tar", "{000..009}", also at s3://,
    gs://, https:// or hf:// URLs), or datasets:NAME or datasets:NAME:CONFIGURATION, a Hugging Face dataset on the hub or
    in a folder."""
    resolution: int = number(64, 8, 8192)
    """Side of the square images, in pixels."""
    crop: str = choice("center", ("center", "pad"))
    """"center": scale the short side and crop the middle. "pad": scale the long side and pad with ``background``."""
    classes: Optional[str] = None
    """A JSON list of class names. null: ``classes.json`` beside the tars, if there is one."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    cache: str = "~/.cache/ldm_smd"
    """Folder for local copies of tars from URLs. Processes and machines may share it."""
    cache_gigabytes: float = number(200.0, above=0, maximum=1e9)
    """Maximum size of the copies. Beyond it, the least recently used ones are removed. It must hold all tars that are read at
    the same time (``shuffle_tars`` of tools/encode.py)."""
    allow_pipe: bool = False
    """Run "pipe:COMMAND" sources, as webdataset does. The command runs in a shell and may do anything."""
    background: str = "white"
    """Colour of the padding and behind transparent pixels, as in HTML: white, #00ff00."""
    strict: bool = False
    """Stop at the first unreadable image. false: skip unreadable images, count them and list them."""
    max_pixels: int = number(MAX_PIXELS, 1, 10**10)
    """Images with more pixels count as unreadable. This guards against decompression bombs and mistakes."""


@dataclass
class EncodeConfig(Settings):
    """tools/encode.py"""

    images: ImagesConfig = field(default_factory=ImagesConfig)
    autoencoder: str = MISSING
    """Folder or hub id of a diffusers autoencoder ("stabilityai/sd-vae-ft-mse"), or of a pipeline with one in vae/."""
    output: str = MISSING
    """Folder for the latent shards and manifest.json, or its URL (s3://, gs://, hf://). An unfinished run there with the same
    settings is continued."""
    worker: Optional[str] = None
    """i/n: encode the shards of worker i of n, from 0/n to n-1/n, as in an array job. null: all shards; under torchrun or
    accelerate launch, the shards of this process."""
    mirror: bool = False
    """Also store the encoding of the mirrored image, for training with mirror=true. It takes twice the time and space. Not for
    images with letters or flags."""
    embedding: Optional[str] = None
    """Also store an OpenCLIP embedding of each image, for models with image prompts. null: none.
    open_clip:ARCHITECTURE:FILE.safetensors, open_clip:ARCHITECTURE:NAME with the name of pretrained weights, or
    open_clip:FOLDER with the files of an OpenCLIP model on the hub."""
    shuffle: bool = True
    """Shuffle the images over the shards with a fixed seed. Training reads one shard after the other, so each should be a
    random sample. false: keep the order of the source."""
    shuffle_tars: int = number(64, 1, 10**6)
    """Number of tars, chosen at random, whose images are shuffled together. Sources other than tars are split into runs of
    100,000 images instead. A worker reads from at most twice as many tars at once."""
    shard_size: int = number(1000, 1, 10**7)
    """Images per shard."""
    batch_size: int = number(32, 1, 2**16)
    num_workers: int = number(1, 0, 256)
    """Processes that decode images while the autoencoder runs."""
    compare_contents: bool = False
    """On a restart, compare the images by their contents, which reads them all again. false: by the sizes and modification
    times of their files."""
    device: str = "auto"


@dataclass
class VerifyConfig(Settings):
    """tools/verify.py"""

    shards: str = MISSING
    """Folder with latent shards and manifest.json, from tools/encode.py, or its URL."""
    shards_cache: CacheConfig = field(default_factory=CacheConfig)
    sheet: Optional[str] = None
    """PNG to write, with decoded latents that are evenly spaced over the shards. null: none."""
    autoencoder: Optional[str] = None
    """Autoencoder that decodes them. null: the one that the manifest names."""
    pictures: int = number(64, 1, 10_000)
    """Images on the sheet."""
    device: str = "auto"
