"""What a checkpoint says about itself against the run that would use it: config and frozen weights."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from metacanvas_jax.config.identity import deciding
from metacanvas_jax.errors import UserError
from metacanvas_jax.weights import identity

Meta = dict[str, Any]


CONFIG_KEYS = {
    **{"batch": "train.batch", "fit.seed": "seed", "fit.accumulate": "train.accumulate"},
    **{"fit.ema_decay": "train.ema", "fit.frozen_dtype": "train.frozen_dtype"},
}
"""Keys of a checkpoint's description that have another name in a config."""


def check_same(saved: Meta, now: Meta, where: str) -> None:
    """Compares what a checkpoint says about itself with the present run, except keys that cannot change a result.

    Raises:
        UserError: naming every key that differs, with both values.
    """
    old, new = (_dotted(deciding(meta["config"])) for meta in (saved, now))
    different = [key for key in sorted(old.keys() | new.keys()) if old.get(key, "absent") != new.get(key, "absent")]
    if different:
        pairs = [
            f"{CONFIG_KEYS.get(key, key)} was {old.get(key, 'absent')!r}, is {new.get(key, 'absent')!r}"
            for key in different
        ]
        advice = _advice(different, old, new)
        raise UserError(f"checkpoint {where} is of another config: {'; '.join(pairs)}{advice}")
    check_frozen(saved["frozen"], now["frozen"], now.get("folders", {}), where)
    if gone := identity.missing(saved["frozen"], now["frozen"]):
        raise UserError(f"checkpoint {where} was trained beside frozen weights of {gone[0]}, and there are none now")


def _advice(different: Sequence[str], old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The arguments with which a run goes on as its checkpoint was; "" where arguments cannot give that."""
    there = new.keys() | {key for key in old if key.startswith("optimizer.")}  # a constant rate has fewer keys
    single = [key for key in different if key in there and isinstance(old.get(key), int | float | str)]
    if single != different:
        return ""
    flags = {f"--config.{CONFIG_KEYS.get(key, key)}={shlex.quote(str(old[key]))}": None for key in single}
    return f"; to go on as it was: {' '.join(flags)}; to begin anew: another --workdir"


def check_frozen(saved: Mapping[str, str], now: Mapping[str, str], folders: Mapping[str, str], where: str) -> None:
    """Compares frozen weights with those that a checkpoint was trained beside. Places may change, content may not.

    Raises:
        UserError: naming the first part of the model whose weights are others, and their folder.
    """
    if other := identity.differing(saved, now, folders):
        part = other[0]
        raise UserError(
            f"checkpoint {where} was trained beside other frozen weights: those of {part} in "
            f"{folders.get(part, part)} are not the same"
        )


def check_known(saved: Mapping[str, str], now: Mapping[str, str], folders: Mapping[str, str], where: str) -> None:
    """`check_frozen` for what only draws or exports: what a checkpoint says nothing about is not compared."""
    if known := identity.known(saved):
        check_frozen(known, now, folders, where)


def _dotted(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            out |= _dotted(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
