"""A published folder of transformers or diffusers as parameters of this project: checked, renamed, in one file."""

from pathlib import Path

import jax

from metacanvas_jax import registry
from metacanvas_jax.weights import saved
from metacanvas_jax.weights.hf_export import new_folder


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model of transformers or diffusers."""
    return (folder / "config.json").is_file() and not (folder / "metrics.jsonl").exists()


def import_model(source: Path, to: Path) -> Path:
    """Reads a model, checks every tensor, and writes ``params.safetensors`` and ``params.json`` to a new folder.

    A config may name either folder as weights; this one needs no renaming at every start. The model is held in memory.

    Raises:
        UserError: a model that is not built here, tensors that are missing, left over or wrong, a folder with contents.
    """
    config = registry.published_config(source)
    abstract = registry.abstract_params(config)
    params = registry.of(config).load(source, config, abstract, "model")
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    with new_folder(to, size) as draft:
        saved.save(draft, params, {"source": str(source), "model": type(config).__name__})
    return to
