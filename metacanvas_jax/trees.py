"""What trains and what is frozen: two trees of parameters, separated by regular expressions on their paths."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

from metacanvas_jax.errors import UserError
from metacanvas_jax.types import Params

Rules = tuple[tuple[str, str], ...]
"""Ordered (regex on the whole "/"-joined path, "train" or "freeze"); the first match wins."""


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by their "/"-joined paths; whatever is not a dict is a leaf."""
    return traverse_util.flatten_dict(dict(tree), sep="/")


def nested(leaves: Mapping[str, Any]) -> Params:
    """Inverse of ``flat``."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def partition(params: Params, rules: Rules) -> tuple[Params, Params]:
    """Splits a tree into (trainable, frozen); what belongs to the other side is absent.

    The leaves may be anything: arrays, abstract shapes, shardings.

    Raises:
        UserError: a parameter that no rule matches, a rule that decides about no parameter (it matches none, or earlier
            rules take all it matches), an action other than "train" and "freeze", or a regex that does not compile.
    """
    patterns = [_compile(regex, action) for regex, action in rules]
    decided = [0] * len(rules)
    sides: dict[str, dict[str, Any]] = {"train": {}, "freeze": {}}
    unmatched = []
    for path, leaf in flat(params).items():
        first = next((i for i, pattern in enumerate(patterns) if pattern.fullmatch(path)), None)
        if first is None:
            unmatched.append(path)
            continue
        decided[first] += 1
        sides[rules[first][1]][path] = leaf
    if unmatched:
        raise UserError(f"no rule of the partition matches {_some(unmatched)}")
    idle = [rules[i][0] for i, count in enumerate(decided) if count == 0]
    if idle:
        raise UserError(f"these rules of the partition decide about no parameter: {_some([repr(x) for x in idle])}")
    return nested(sides["train"]), nested(sides["freeze"])


def trains(path: str, rules: Rules) -> bool:
    """Whether the first rule that matches a parameter says so, for a tree that is known to be covered."""
    return next((action == "train" for regex, action in rules if re.fullmatch(regex, path)), False)


def held_dtype(path: str, dtype: str, keep_float32: Sequence[str]) -> str:
    """The dtype of a frozen floating parameter: ``dtype``, or "float32" if it stays so."""
    return "float32" if stays_float32(path, keep_float32) else dtype


def stays_float32(path: str, keep_float32: Sequence[str]) -> bool:
    """Whether one of the expressions matches the whole path of a parameter."""
    return any(re.fullmatch(regex, path) for regex in keep_float32)


def without(tree: Params, patterns: Sequence[str]) -> Params:
    """The tree without the leaves whose whole path one of the regular expressions matches."""
    return nested({path: leaf for path, leaf in flat(tree).items() if not any(re.fullmatch(x, path) for x in patterns)})


def merge(trainable: Params, frozen: Params) -> Params:
    """The whole tree again; the exact inverse of ``partition``.

    Raises:
        ValueError: a path that stands on both sides.
    """
    left, right = flat(trainable), flat(frozen)
    both = sorted(left.keys() & right.keys())
    if both:
        raise ValueError(f"both trainable and frozen: {_some(both)}")
    return nested(left | right)


def parameter_count(params: Params) -> int:
    """Number of values in a tree of arrays or abstract shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _compile(regex: str, action: str) -> re.Pattern[str]:
    if action not in ("train", "freeze"):
        raise UserError(f"partition rule {regex!r}: the action is 'train' or 'freeze', not {action!r}")
    try:
        return re.compile(regex)
    except re.error as error:
        raise UserError(f"partition rule {regex!r} is not a regular expression: {error}") from error


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
