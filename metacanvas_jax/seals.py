"""JSON objects with a checksum of themselves, so that damage is found when they are read."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from metacanvas_jax.errors import UserError

SEAL = frozenset({"sealed", "checksum"})
"""The keys of a JSON object that `sealed` adds: two, so that no damage to one of them hides the other."""


def json_hash(values: Any) -> str:
    """SHA-256 of values that are, or become, JSON; the same whatever the order of their keys."""
    plain = json.loads(json.dumps(values))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def sealed(values: Mapping[str, Any], decides: Callable[[Any], Any] = dict) -> dict[str, Any]:
    """A JSON object with a checksum of itself, or of what ``decides`` returns of it, in place of an earlier one."""
    plain = {key: value for key, value in values.items() if key not in SEAL}
    return {**plain, "sealed": True, "checksum": json_hash(decides(plain))}


def opened(values: Any, where: str | os.PathLike, decides: Callable[[Any], Any] = dict) -> dict[str, Any]:
    """What was sealed, after comparing its checksum. Objects from before there were checksums are taken as they are.

    Raises UserError, naming ``where`` it lies, when it is no JSON object or not what was sealed.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{os.fspath(where)}: expected a JSON object")
    rest = {key: value for key, value in values.items() if key not in SEAL}
    old = len(rest) == len(values)
    if not old and (values.get("sealed") is not True or values.get("checksum") != json_hash(decides(rest))):
        raise UserError(f"{os.fspath(where)} is damaged: it is not what was written, as its checksum differs")
    return rest
