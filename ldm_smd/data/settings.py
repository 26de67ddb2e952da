"""Settings of the images, of tools/encode.py and tools/verify.py."""

from dataclasses import dataclass, field
from typing import Optional

from ..schema import MISSING, Settings, choice, number

MOST_PIXELS = 100_000_000


@dataclass
class CacheConfig(Settings):
    """Local copies of shards at URLs: s3://, gs://, https://, hf://. Processes and nodes may share one."""

    folder: str = "~/.cache/ldm_smd/shards"
    """On a local disk, best of all."""
    gigabytes: float = number(100.0, above=0, maximum=10**6)
    """The copies least recently used go beyond this. A few more shards stay on the disk while they are read."""

    @property
    def bytes(self) -> int:
        return int(self.gigabytes * 1e9)


@dataclass
class ImagesConfig(Settings):
    """Where pictures come from and how they are resized."""

    source: str = MISSING
    """A folder (class = first sub-folder), a .zip of one, webdataset tars ("data/train-*.tar", "{000..009}", also at s3://,
    gs://, https:// or hf:// URLs), or datasets:NAME, a Hugging Face dataset of the hub or of a folder."""
    resolution: int = number(64, 8, 8192)
    """Side of the square pictures, in pixels."""
    crop: str = choice("center", ("center", "pad"))
    """"center": scale the short side, crop the middle. "pad": scale the long side, pad with ``background``."""
    classes: Optional[str] = None
    """A JSON list of class names; found by itself where ``classes.json`` lies beside the tars."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    cache: str = "~/.cache/ldm_smd"
    """Folder for local copies of tars from URLs; processes and machines may share it."""
    cache_gigabytes: float = number(200.0, above=0, maximum=1e9)
    """Beyond this, the copies that were used least recently are removed. It must have room for the tars that are read at a
    time (``shuffle_tars`` of tools/encode.py)."""
    allow_pipe: bool = False
    """Run "pipe:COMMAND" sources, as webdataset does: any command, in a shell."""
    background: str = "white"
    """Colour under transparent pixels and in the padding, as HTML names it: white, #00ff00."""
    strict: bool = False
    """Stop at the first picture that cannot be read; otherwise skip it, count it and list it."""
    max_pixels: int = number(MOST_PIXELS, 1, 10**10)
    """A picture with more pixels than this counts as unreadable (a decompression bomb, or a mistake)."""


@dataclass
class EncodeConfig(Settings):
    """tools/encode.py"""

    images: ImagesConfig = field(default_factory=ImagesConfig)
    autoencoder: str = MISSING
    """Folder or hub id of a diffusers autoencoder ("stabilityai/sd-vae-ft-mse"), or of a pipeline with one in vae/."""
    output: str = MISSING
    """Folder for the latent shards and manifest.json, or its URL (s3://, gs://, hf://); an unfinished one of the same run is
    continued."""
    worker: Optional[str] = None
    """i/n: do the shards of worker i of n, 0/n to n-1/n, as in an array job. null: all; or under torchrun and accelerate launch
    those of this process."""
    mirror: bool = True
    """Store the encoding of the mirrored picture too (twice the work and size). Not for letters or flags."""
    embedding: Optional[str] = None
    """open_clip:ARCHITECTURE:FILE.safetensors, a name of pretrained weights for the file, or open_clip:FOLDER with the files of
    an OpenCLIP model on the hub: also store each picture's embedding, for models that make pictures like another one."""
    shuffle: bool = True
    """Mix the pictures over the shards, with a fixed seed: training reads a whole shard before the next, so all should be
    alike. false: keep the order of the source."""
    shuffle_tars: int = number(64, 1, 10**6)
    """Pictures of this many tars at a time, chosen at random, are mixed with each other (of other sources: of so many runs of
    100,000 pictures). A worker reads from at most twice as many tars at once."""
    shard_size: int = number(1000, 1, 10**7)
    """Pictures in a shard."""
    batch_size: int = number(32, 1, 2**16)
    num_workers: int = number(1, 0, 256)
    """Processes that decode pictures while the autoencoder runs."""
    compare_contents: bool = False
    """A restarted run checks that the pictures are the same, by their contents, which are all read again. false: by the sizes
    and modification times of their files."""
    device: str = "auto"


@dataclass
class VerifyConfig(Settings):
    """tools/verify.py"""

    shards: str = MISSING
    """Folder with latent shards and manifest.json (tools/encode.py), or its URL."""
    shards_cache: CacheConfig = field(default_factory=CacheConfig)
    sheet: Optional[str] = None
    """PNG to write: some of the latents, from all over the shards, decoded. null: none."""
    autoencoder: Optional[str] = None
    """Autoencoder that decodes them; null: the one the manifest names."""
    pictures: int = number(64, 1, 10_000)
    """Pictures on the sheet."""
    device: str = "auto"
