"""A published folder of transformers or diffusers as parameters of this project: checked, renamed, in one file."""

import math
import os
from pathlib import Path

from metacanvas_jax import files, registry
from metacanvas_jax.trees import nested
from metacanvas_jax.weights import published, saved
from metacanvas_jax.weights.hf_export import new_folder


def is_model(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a model of transformers or diffusers."""
    folder = files.folder(folder)
    return (folder / "config.json").is_file() and not (folder / "metrics.jsonl").exists()


def import_model(source: str | os.PathLike, to: str | os.PathLike) -> Path:
    """Reads a model, checks every tensor, and writes ``params.safetensors`` and ``params.json`` to a new folder.

    A config may name either folder as weights; this one needs no renaming at every start. One parameter is held in
    memory at a time: of a stack of layers, all its layers.

    Raises:
        UserError: a model that is not built here, tensors that are missing, left over or wrong, a folder with contents.
    """
    source, to = files.folder(source), files.folder(to)
    config = registry.published_config(source)
    record = registry.of(config)
    record.check(source, config, "model")
    params = published.lazy(source, record.table(config), registry.abstract_params(config), record.ignore(config))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in params.values())
    with new_folder(to, size) as draft:
        saved.save(draft, nested(params), {"source": str(source), "model": type(config).__name__})
    return to
