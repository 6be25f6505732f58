"""From a ConfigDict to a validated Experiment. ConfigDicts end here."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from metacanvas_jax import registry
from metacanvas_jax.config import paths
from metacanvas_jax.config.check import check
from metacanvas_jax.config.schema import Experiment, MllmSection, PathsSection, TextSection
from metacanvas_jax.errors import UserError
from metacanvas_jax.limits import most
from metacanvas_jax.parallel.mesh import PRESETS
from metacanvas_jax.weights.record import Family, Network

# These whole numbers may be 0, which turns something off or counts from there; all others are sizes and at least 1.
MAY_BE_ZERO = (
    *("seed", "threads", "prefetch", "recall", "references", "max_skips", "warmup_steps", "keep_best"),
    *("log_every", "checkpoint_every", "preview_every", "evaluate_every"),
    *("per_category", "per_category_held_out", "during_training"),
    *("extra_channels", "chunk", "attention_from", "full_attention_layers", "rope_sections", "skip"),
    "deepstack_layers",
)
# These numbers are ratios, rates and scales, of which 0 makes nothing.
POSITIVE = (
    *("mlp_ratio", "vanilla_ratio", "video_fps", "time_scale", "interpolation_scale", "scale"),
    *("eps", "norm_eps", "theta", "rope_theta", "query_scalar", "softcap"),
)


def experiment(config: ConfigDict) -> Experiment:
    """The validated form of a config. Raises UserError that names the key, what was found and what was expected."""
    values = config.to_dict()
    values = paths.moved(values, _value(PathsSection, values.pop("paths", PathsSection()), "paths"))
    for section in ("dit", "vae"):
        if values.get(section) is not None:
            values[section] = _chosen(values[section], section)
    for section, default in (("mllm", MllmSection.kind), ("text", TextSection.kind)):
        if isinstance(values.get(section), Mapping):
            values[section] = _sized(values[section], section, default)
    if isinstance(values.get("mesh"), Mapping):
        values["mesh"] = _mesh(values["mesh"])
    if values.get("dit") is not None:
        _derive(values)
    built = _dataclass(Experiment, values, "")
    check(built)
    return built


def _derive(values: dict[str, Any]) -> None:
    """Fills in the sizes of connectors, which follow from the DiT. Configs of older versions state them."""
    dit, canvas = values["dit"], values.get("canvas_connector")
    follow = [("canvas_connector", "width", "width"), ("context_connector", "out_width", "context_width")]
    if isinstance(canvas, Mapping) and canvas.get("fuse") == "before_patchify":
        follow.append(("canvas_connector", "latent_channels", "latent_channels"))
    for section, name, source in follow:
        if not isinstance(values.get(section), Mapping):
            continue
        given, size = values[section].get(name), getattr(dit, source)
        if given not in (None, size):
            raise UserError(f"config: {section}.{name} is {given}, but dit.{source} is {size}; it can be left out")
        values[section] = {**values[section], name: size}


def _chosen(values: Mapping[str, Any], section: Family) -> Any:
    rest = {key: value for key, value in values.items() if key != "kind"}
    return _dataclass(_network(values.get("kind"), section).config, rest, f"{section}.")


def _sized(values: Mapping[str, Any], section: Family, default: str) -> dict[str, Any]:
    """A section that holds the config of a network of the registry beside fields of its own."""
    cls = _network(values.get("kind", default), section).config
    hints = typing.get_type_hints(cls) if section == "mllm" else {"encoder": cls}
    sizes = {key: _value(hint, values[key], f"{section}.{key}") for key, hint in hints.items() if key in values}
    return {**values, **sizes}


def _network(kind: Any, family: Family) -> Network:
    table = registry.family(family)
    if kind not in table:
        raise UserError(f"config: {family}.kind is {kind!r}, expected one of {', '.join(map(repr, table))}")
    return table[kind]


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
        section, text = prefix.rstrip("."), str(error)
        named = text if section and text.startswith(section) else f"{section or 'top level'}: {text}"
        raise UserError(f"config: {named}") from error


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
        value = float(value)
    if hint is Any or not isinstance(hint, type):
        return value
    if not isinstance(value, hint) or isinstance(value, bool) != (hint is bool):
        raise UserError(f"config: {key} is {value!r} ({type(value).__name__}), expected {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"config: {key} is {value}, expected a finite number")
    if hint is float and value <= 0 and key.rpartition(".")[2] in POSITIVE:
        raise UserError(f"config: {key} is {value}, expected a positive number")
    if hint is int and value < _least(key):
        raise UserError(f"config: {key} is {value}, expected at least {_least(key)}")
    if hint in (int, float) and value > most(plain := re.sub(r"\[\d+\]", "", key)):
        raise UserError(f"config: {key} is {value}, expected at most {most(plain)}")
    return value


def _least(key: str) -> int:
    """The smallest value of a whole number."""
    section, _, name = re.sub(r"\[\d+\]", "", key).rpartition(".")
    return -1 if section == "mesh" else 0 if name in MAY_BE_ZERO else 1
