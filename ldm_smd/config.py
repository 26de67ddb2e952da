"""Typed configurations: OmegaConf structured dataclasses, loaded from YAML and ``key=value`` overrides.

Every tool has a dataclass in the settings.py of its package. Unknown keys are errors that suggest the closest known key.
Former names of settings are accepted with a warning. Ranges are checked after merging. ``null`` means "not set", ``???``
"required".
"""

from __future__ import annotations

import ast
import copy
import difflib
import functools
import inspect
import itertools
import logging
import textwrap
import typing
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import UserError, one_line
from .schema import MISSING, check_field

Config = TypeVar("Config")

logger = logging.getLogger(__name__)


def load_config(schema: type[Config], path: str | Path | None, overrides: typing.Sequence[str] = ()) -> Config:
    """Merge defaults of ``schema`` < YAML file < ``key=value`` overrides, check them, and return an instance of ``schema``.

    Raises UserError for an unreadable file, an unknown key, a value of the wrong type or out of range, and a missing required
    value.
    """
    merged = copy.deepcopy(_defaults(typing.cast(type, schema)))
    layers = [] if path is None else [(str(path), _read_yaml(path))]
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override: expected key=value, found {override!r}")
        try:
            layers.append((override, OmegaConf.from_dotlist([override])))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(f"override: expected key=value with a YAML value, found {override!r}") from error

    for origin, layer in layers:
        given = typing.cast(dict, OmegaConf.to_container(layer))
        layer = OmegaConf.create(_with_current_names(schema, given, origin))
        _refuse_unknown_keys(schema, layer, origin)
        try:
            merged.merge_with(layer)
        except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list in place of a mapping
            key = getattr(error, "full_key", None) or origin
            raise UserError(f"{key}: expected a value of the right type, found: {_first_line(error)}") from error
    try:
        # Before to_object, whose errors do not name nested settings in full.
        _check_fields(schema, merged)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(f"{missing[0]}: expected a value ({missing[0]}=..., or in the config file), found none")
        return typing.cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:  # in an interpolation, ${...}
        raise UserError(f"settings: expected values that can be resolved, found: {_first_line(error)}") from error


@functools.cache
def _defaults(schema: type) -> DictConfig:
    """Return the defaults of a schema. They are cached, because building them takes longest, and must not be modified."""
    return OmegaConf.structured(schema)


def dump_config(config: object) -> str:
    """Format the resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


@dataclass(frozen=True)
class Setting:
    """One setting of a schema.

    Attributes:
        name: full name, such as model.placement.
        default: default value in YAML; None if a value is required.
        text: docstring.
        choices: the allowed values, if they are few.
        bounds: range of a number, in words.
    """

    name: str
    default: str | None
    text: str
    choices: tuple[str, ...] = ()
    bounds: str = ""


def settings(schema: type, prefix: str = "") -> typing.Iterator[Setting]:
    """Yield all settings of a schema, nested ones with full names; those of list entries as NAME[].KEY."""
    texts = _docstrings(schema)
    for item, inner, entries in _fields(schema):
        name = prefix + item.name
        if inner is not None:
            yield from settings(inner, f"{name}.")
            continue
        default = item.default_factory() if item.default_factory is not NO_DEFAULT else item.default
        if default is NO_DEFAULT or default == MISSING:
            text = None
        elif entries is not None and default is not None:
            text = "[...]"  # the settings of the entries follow
        else:
            text = yaml.safe_dump(default, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
        choices = ("true", "false") if isinstance(default, bool) else item.metadata.get("choices", ())
        yield Setting(name, text, texts.get(item.name, ""), choices, str(item.metadata.get("bounds", "")))
        if entries is not None:
            yield from settings(entries, f"{name}[].")


def _docstrings(schema: type) -> dict[str, str]:
    """Return the docstrings after the fields of a class and its bases."""
    found: dict[str, str] = {}
    for cls in filter(is_dataclass, reversed(schema.__mro__)):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for item, following in itertools.pairwise(definition.body):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(following, ast.Expr):
                found[item.target.id] = inspect.cleandoc(ast.literal_eval(following.value))
    return found


def config_as_dict(config: object) -> dict:
    """Convert the configuration to plain dictionaries and lists, for JSON."""
    return typing.cast(dict, OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))


def _read_yaml(path: str | Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"--config: expected a YAML file, found no file {path}") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"--config: expected a YAML file, found {path}: {one_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"--config: expected a YAML mapping, found a list or nothing in {path}")
    return loaded


def current_name(schema: type, name: str) -> str:
    """Return the current full name of a setting that may have a former one, as ``model.latent_channels``."""
    first, dot, rest = name.partition(".")
    first = _renamed(schema).get(first, first)
    inner = next((inner for item, inner, _ in _fields(schema) if item.name == first), None)
    return first + dot + (current_name(inner, rest) if inner is not None else rest)


def _renamed(schema: type) -> dict[str, str]:
    """Return former name -> current name; schemas of benchmarks may be plain dataclasses, which rename nothing."""
    return getattr(schema, "RENAMED", {})


def _with_current_names(schema: type, layer: dict, origin: str, prefix: str = "") -> dict:
    """Give the settings in a layer their current names. Warns once for each former name."""
    renamed, found = _renamed(schema), {}
    schemas = {item.name: (inner, entries) for item, inner, entries in _fields(schema)}
    for key, value in layer.items():
        name = renamed.get(key, key)
        if name != key:
            if name in layer:
                raise UserError(f"{origin}: expected {prefix}{name}, found its former name {prefix}{key} too")
            logger.warning("%s: %s%s is deprecated, use %s%s", origin, prefix, key, prefix, name)
        inner, entries = schemas.get(name, (None, None))
        if inner is not None and isinstance(value, dict):
            value = _with_current_names(inner, value, origin, f"{prefix}{name}.")
        elif entries is not None and isinstance(value, list):
            value = [
                _with_current_names(entries, entry, origin, f"{prefix}{name}[{index}].") if isinstance(entry, dict) else entry
                for index, entry in enumerate(value)
            ]
        found[name] = value
    return found


def _refuse_unknown_keys(schema: type, layer: DictConfig, origin: str, prefix: str = "") -> None:
    known = {item.name: inner for item, inner, _ in _fields(schema)}
    for key in layer:
        full = f"{prefix}{key!s}"
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise UserError(f"{origin}: unknown key {full!r}; the nearest known key is {prefix + near!r}")
        inner = known[key]
        if inner is not None and not OmegaConf.is_missing(layer, key) and isinstance(layer[key], DictConfig):
            _refuse_unknown_keys(inner, layer[key], origin, f"{full}.")


def _check_fields(schema: type, node: DictConfig, prefix: str = "") -> None:
    """Call ``check_field`` for all settings that have a value, with their full names."""
    for item, inner, entries in _fields(schema):
        if OmegaConf.is_missing(node, item.name) or node[item.name] is None:
            continue
        value = node[item.name]
        if inner is not None:
            _check_fields(inner, value, f"{prefix}{item.name}.")
        elif entries is not None:
            for index, entry in enumerate(value):
                _check_fields(entries, entry, f"{prefix}{item.name}[{index}].")
        elif value == "False" and "no" in item.metadata.get("choices", ()):
            node[item.name] = "no"  # YAML reads an unquoted no as False
        else:
            check_field(item, prefix + item.name, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)


@functools.cache
def _fields(schema: type) -> tuple[tuple[Field, type | None, type | None], ...]:
    """Return each field with its nested schema, and the schema of its list entries; None if there is none."""
    hints, found = typing.get_type_hints(schema), []
    for item in fields(schema):
        types = (hints[item.name], next(iter(typing.get_args(hints[item.name])), None))
        inner, entries = (cls if isinstance(cls, type) and is_dataclass(cls) else None for cls in types)
        found.append((item, inner, entries))
    return tuple(found)


def _first_line(error: Exception) -> str:
    """Return the first line of a message. OmegaConf's other lines name the class of the schema."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
