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
    layers = [] if path is None else [(str(path), *_read_yaml(path))]
    layers += [(override, *_read_override(override)) for override in overrides]

    for origin, given, texts in layers:
        layer = OmegaConf.create(_normalised(schema, given, texts, origin))
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


def _read_override(override: str) -> tuple[dict, dict]:
    """Read key=value; returns it as YAML, and with all values as texts."""
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"override: expected key=value, found {override!r}")
    value, texts = value.strip(), OmegaConf.create()
    try:
        layer = OmegaConf.from_dotlist([override])
        OmegaConf.update(texts, key, yaml.load(value, yaml.BaseLoader) if value[:1] in "[{'\"" else value)
        return typing.cast(dict, OmegaConf.to_container(layer)), typing.cast(dict, OmegaConf.to_container(texts))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"override: expected key=value with a YAML value, found {override!r}") from error


def _read_yaml(path: str | Path) -> tuple[dict, dict]:
    """Read a file; returns its content, and the same with all values as texts."""
    try:
        loaded, texts = OmegaConf.load(path), yaml.load(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader)
    except FileNotFoundError:
        raise UserError(f"--config: expected a YAML file, found no file {path}") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"--config: expected a YAML file, found {path}: {one_line(error)}") from error
    if not isinstance(loaded, DictConfig) or not isinstance(texts, dict | None):
        raise UserError(f"--config: expected a YAML mapping, found something else in {path}")
    return typing.cast(dict, OmegaConf.to_container(loaded)), texts or {}


def current_name(schema: type, name: str) -> str:
    """Return the current full name of a setting that may have a former one, as ``model.latent_channels``."""
    first, dot, rest = name.partition(".")
    first = _renamed(schema).get(first, first)
    inner = next((inner for item, inner, _ in _fields(schema) if item.name == first), None)
    return first + dot + (current_name(inner, rest) if inner is not None else rest)


def _renamed(schema: type) -> dict[str, str]:
    """Return former name -> current name; schemas of benchmarks may be plain dataclasses, which rename nothing."""
    return getattr(schema, "RENAMED", {})


def _normalised(schema: type, layer: dict, texts: dict, origin: str, prefix: str = "") -> dict:
    """Give the settings in a layer their current names, and texts the value as it was written: 007 is not the number 7, nor is
    no false. Warns once for each former name."""
    renamed, found = _renamed(schema), {}
    schemas = {item.name: (inner, entries) for item, inner, entries in _fields(schema)}
    hints = _hints(schema)
    for key, value in layer.items():
        text: typing.Any = texts.get(str(key))
        name = renamed.get(key, key)
        if name != key:
            if name in layer:
                raise UserError(f"{origin}: expected {prefix}{name}, found its former name {prefix}{key} too")
            logger.warning("%s: %s%s is deprecated, use %s%s", origin, prefix, key, prefix, name)
        inner, entries = schemas.get(name, (None, None))
        if inner is not None and isinstance(value, dict):
            value = _normalised(inner, value, text if isinstance(text, dict) else {}, origin, f"{prefix}{name}.")
        elif entries is not None and isinstance(value, list):
            each_text = text if isinstance(text, list) else [{}] * len(value)
            value = [
                _normalised(entries, entry, each, origin, f"{prefix}{name}[{index}].") if isinstance(entry, dict) else entry
                for index, (entry, each) in enumerate(zip(value, each_text))
            ]
        else:
            value = _as_written(hints.get(name), value, text)
        found[name] = value
    return found


def _as_written(hint: typing.Any, value: typing.Any, text: typing.Any) -> typing.Any:
    """Return ``value`` as it was written in ``text``, where the type ``hint`` is str, Optional[str], list[str] or dict[str,
    str]."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if typing.get_origin(hint) is typing.Union and len(kinds) == 1:
        return _as_written(kinds[0], value, text)
    if hint is str:
        return text if isinstance(text, str) and value is not None else value
    if typing.get_origin(hint) is list and isinstance(value, list) and isinstance(text, list):
        return [_as_written(kinds[0], *pair) for pair in zip(value, text)]
    if typing.get_origin(hint) is dict and isinstance(value, dict) and isinstance(text, dict):
        return {key: _as_written(kinds[1], each, text.get(str(key))) for key, each in value.items()}
    return value


def _refuse_unknown_keys(schema: type, layer: DictConfig, origin: str, prefix: str = "") -> None:
    known = {item.name: inner for item, inner, _ in _fields(schema)}
    for key in layer:
        full = f"{prefix}{key!s}"
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise UserError(f"{origin}: unknown key {full!r}; the nearest known key is {prefix + near!r}")
        inner = known[key]
        unresolved = OmegaConf.is_missing(layer, key) or OmegaConf.is_interpolation(layer, key)
        if inner is not None and not unresolved and isinstance(layer[key], DictConfig):
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
        else:
            check_field(item, prefix + item.name, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)


_hints = functools.cache(typing.get_type_hints)


@functools.cache
def _fields(schema: type) -> tuple[tuple[Field, type | None, type | None], ...]:
    """Return each field with its nested schema, and the schema of its list entries; None if there is none."""
    hints, found = _hints(schema), []
    for item in fields(schema):
        types = (hints[item.name], next(iter(typing.get_args(hints[item.name])), None))
        inner, entries = (cls if isinstance(cls, type) and is_dataclass(cls) else None for cls in types)
        found.append((item, inner, entries))
    return tuple(found)


def _first_line(error: Exception) -> str:
    """Return the first line of a message. OmegaConf's other lines name the class of the schema."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
