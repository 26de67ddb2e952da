"""Typed configurations: OmegaConf structured dataclasses, loaded from YAML and ``key=value`` overrides.

Every tool owns one dataclass here. Unknown keys are errors that name the nearest known key; ranges are checked once, in
``__post_init__``, after everything is merged. A value of ``null`` means "not set"; ``???`` means "must be given".
"""

from __future__ import annotations

import difflib
import types
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Optional, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .errors import UserError

Config = TypeVar("Config")


def check(condition: bool, key: str, expected: str, found: object) -> None:
    """Raise UserError "key: expected ..., found ..." unless ``condition`` holds."""
    if not condition:
        raise UserError(f"{key}: expected {expected}, found {found!r}")


def one_of(key: str, value: object, allowed: typing.Collection) -> None:
    """Raise UserError unless ``value`` is one of ``allowed``."""
    check(value in allowed, key, "one of " + ", ".join(map(str, allowed)), value)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures in


@dataclass
class ImagesConfig:
    """Where pictures come from and how they are brought to one size."""

    source: str = MISSING
    """A folder (class = first sub-folder), a .zip of one, or webdataset tars ("data/train-*.tar", "{000..009}")."""
    resolution: int = 64
    """Side of the square pictures, in pixels."""
    crop: str = "center"
    """"center": scale the short side, crop the middle. "pad": scale the long side, pad with ``background``."""
    classes: Optional[str] = None
    """A JSON list of class names; found by itself where ``classes.json`` lies beside the tars."""
    background: str = "white"
    """Colour under transparent pixels and in the padding."""
    strict: bool = False
    """Stop at the first picture that cannot be read; otherwise skip it, count it and list it."""
    max_pixels: int = 100_000_000
    """A picture with more pixels than this counts as unreadable (a decompression bomb, or a mistake)."""

    def __post_init__(self) -> None:
        check(self.resolution >= 8, "images.resolution", "at least 8", self.resolution)
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
    images_total: int = 100_000
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_images: int = 2_000
    kl_weight: float = 1e-6
    """Weight of the KL term, per latent number, against the reconstruction error per pixel value."""
    gradient_weight: float = 0.1
    """Weight of the error between image gradients (finite differences): keeps edges from blurring."""
    ema_halflife_images: int = 10_000
    flip: bool = True
    seed: int = 0
    checkpoint_every_images: int = 10_000

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        check(self.images_total >= self.batch_size, "images_total", "at least one batch", self.images_total)
        check(self.learning_rate > 0, "learning_rate", "more than 0", self.learning_rate)


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
        except (OmegaConfBaseException, YAMLError) as error:
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


def config_as_dict(config: object) -> dict:
    """The configuration as plain dictionaries and lists, for JSON."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


def _read_yaml(path: str | Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"--config: expected a YAML file, found no file {path}") from None
    except (OSError, YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
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
