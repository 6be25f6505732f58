"""Where weights, data and runs lie: ``config.paths`` moves all relative paths of a kind with one value."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metacanvas_jax import files
from metacanvas_jax.config.schema import PathsSection

KINDS = {
    "weights": (
        *("mllm.weights", "mllm.tokenizer", "text.weights", "text.tokenizer"),
        *("dit_weights", "vae_weights", "context_connector.weights"),
    ),
    "data": (
        *("data.path", "data.pictures_path", "mllm.context_cache", "eval.data"),
        *("sources.path", "sources.cache", "eval.sources.path", "eval.sources.cache"),
    ),
    "runs": ("start",),
}
"""The keys of a config that hold paths, by the value of ``config.paths`` that moves them."""


def below(base: str, path: str, kind: str) -> str:
    """A relative path of a kind below ``base``, which takes the place of a leading folder called like the kind.

    ``base`` empty, and paths that are empty, absolute or URLs, change nothing.
    """
    return files.join(base, path.removeprefix(f"{kind}/")) if base else path


def moved(values: Mapping[str, Any], paths: PathsSection) -> dict[str, Any]:
    """The values of a config with every relative path below its value of ``paths``."""
    tree = dict(values)
    for kind, keys in KINDS.items():
        if base := getattr(paths, kind):
            for key in keys:
                _move(tree, key.split("."), base, kind)
    return tree


def workdir(config: ConfigDict, asked: str | None, default: str) -> Path:
    """The folder of a run: the one that was asked for, or ``default``, below ``config.paths.runs`` where relative."""
    base = str((config.get("paths") or {}).get("runs") or "")
    return files.folder(below(base, os.fspath(asked or f"runs/{default}"), "runs"))


def _move(tree: dict[str, Any], key: list[str], base: str, kind: str) -> None:
    """Moves what a key names inside of nested objects and lists, which are copied on the way."""
    name, rest = key[0], key[1:]
    value = tree.get(name)
    if not rest:
        if isinstance(value, str):
            tree[name] = below(base, value, kind)
    elif isinstance(value, list | tuple):
        tree[name] = type(value)(_copied(value, rest, base, kind))
    elif isinstance(value, Mapping):
        (tree[name],) = _copied([value], rest, base, kind)


def _copied(values: Any, key: list[str], base: str, kind: str) -> Iterator[Any]:
    for value in values:
        if isinstance(value, Mapping):
            value = dict(value)
            _move(value, key, base, kind)
        yield value
