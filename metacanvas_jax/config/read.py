"""From a ConfigDict to a validated Experiment. ConfigDicts end here."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from metacanvas_jax.config.check import check
from metacanvas_jax.config.networks import DITS, VAES
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.mesh import PRESETS


def experiment(config: ConfigDict) -> Experiment:
    """The validated form of a config. Raises UserError that names the key, what was found and what was expected."""
    values = config.to_dict()
    for section, table in (("dit", DITS), ("vae", VAES)):
        if values.get(section) is not None:
            values[section] = _chosen(values[section], table, section)
    if isinstance(values.get("mesh"), Mapping):
        values["mesh"] = _mesh(values["mesh"])
    built = _dataclass(Experiment, values, "")
    check(built)
    return built


def _chosen(values: Mapping[str, Any], table: dict[str, tuple[type, type]], section: str) -> Any:
    kind = values.get("kind")
    if kind not in table:
        raise UserError(f"config: {section}.kind is {kind!r}, expected one of {', '.join(map(repr, table))}")
    rest = {key: value for key, value in values.items() if key != "kind"}
    return _dataclass(table[kind][0], rest, f"{section}.")


def _mesh(values: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``mesh``: an optional ``preset``, and sizes that differ from it."""
    preset = values.get("preset", "data")
    if preset not in PRESETS:
        raise UserError(f"config: mesh.preset is {preset!r}, expected one of {', '.join(map(repr, PRESETS))}")
    return dataclasses.asdict(PRESETS[preset]) | {key: value for key, value in values.items() if key != "preset"}


def _dataclass(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(fields)}"
            raise UserError(f"config: unknown key {prefix}{key}; {hint}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"config: missing key {prefix}{name}")
    hints = typing.get_type_hints(cls)
    built = {key: _value(hints[key], value, prefix + key) for key, value in values.items()}
    try:
        return cls(**built)
    except ValueError as error:
        raise UserError(f"config: {prefix.rstrip('.') or 'top level'}: {error}") from error


def _value(hint: Any, value: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, key)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _dataclass(hint, value, key + ".")
    if origin is tuple and isinstance(value, list | tuple):
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) != len(value):
            raise UserError(f"config: {key} has {len(value)} entries, expected {len(inner)}")
        return tuple(_value(a, v, f"{key}[{i}]") for i, (a, v) in enumerate(zip(inner, value, strict=True)))
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"config: {key} is {value!r}, expected one of {', '.join(map(repr, arguments))}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint is not Any and isinstance(hint, type) and not isinstance(value, hint):
        raise UserError(f"config: {key} is {value!r} ({type(value).__name__}), expected {hint.__name__}")
    return value
