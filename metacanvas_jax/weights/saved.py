"""Folders of saved parameters: ``params.safetensors``, and ``params.json`` with hashes of the content."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from metacanvas_jax import files, seals
from metacanvas_jax.errors import UserError, first_line
from metacanvas_jax.trees import flat, nested
from metacanvas_jax.types import Params
from metacanvas_jax.weights.hashes import content_hash, paths, sampled_hash, whole_hash
from metacanvas_jax.weights.identity import stored
from metacanvas_jax.weights.safetensors_io import Checkpoint, write_file


def save(folder: str | os.PathLike, params: Params, meta: Mapping[str, Any] | None = None) -> str:
    """Writes parameters, and ``meta`` beside their hash; returns the hash.

    The leaves are arrays, or anything with ``shape``, ``dtype`` and ``__array__``, which is called when its turn comes:
    one parameter at a time is on the host. ``params.json`` is written last, by renaming, so that a folder with it is
    complete.
    """
    folder = files.folder(folder)
    # With wide dtypes first, every tensor is aligned.
    leaves = dict(sorted(flat(params).items(), key=lambda item: (-np.dtype(item[1].dtype).itemsize, item[0])))
    layout = {path: (np.dtype(leaf.dtype), tuple(leaf.shape)) for path, leaf in leaves.items()}
    try:
        files.remove(folder / "params.json")
        with files.draft(folder / "params.safetensors") as draft:
            write_file(draft, layout, (np.asarray(jax.device_get(leaf)) for leaf in leaves.values()), {})
            digest, sampled = (hashed(stored(Checkpoint(draft))) for hashed in (whole_hash, sampled_hash))
        text = json.dumps(seals.sealed({"hash": digest, "sampled": sampled, "meta": dict(meta or {})}), indent=2)
        files.write(folder / "params.json", text + "\n")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {first_line(error)}") from error
    return digest


def load(folder: str | os.PathLike, abstract: Params | None = None) -> tuple[Params, dict[str, Any]]:
    """Numpy parameters and ``{"hash", "meta"}`` of a folder written by ``save``.

    Raises:
        UserError: the folder is missing, incomplete or damaged, or the parameters are not those of ``abstract``.
    """
    folder = files.folder(folder)
    for name in ("params.json", "params.safetensors"):
        if not (folder / name).exists():
            raise UserError(f"no saved parameters in {folder}: {name} is missing")
    try:
        info = described(folder)
        with files.local_copy(folder, "params.safetensors") as near:
            leaves = load_file(near / "params.safetensors")
    except UserError:
        raise
    except Exception as error:  # safetensors raises its own type for a damaged header
        raise UserError(f"saved parameters in {folder} cannot be read: {error}") from error
    params = nested(leaves)
    if content_hash(params) != info["hash"]:
        raise UserError(f"saved parameters in {folder} are damaged: their hash is not the one in params.json")
    if abstract is not None:
        check_shapes(params, abstract, str(folder))
    return params, {"hash": info["hash"], "meta": info["meta"]}


def described(folder: str | os.PathLike) -> dict[str, Any]:
    """The ``hash`` of the parameters of a folder, that of some ``sampled`` bytes, and the ``meta`` beside them.

    Folders of version 0.1 have no ``sampled``.

    Raises UserError when ``params.json`` is missing or damaged.
    """
    file = files.folder(folder) / "params.json"
    try:
        info = seals.opened(files.read_json(file), file)
        return {"hash": str(info["hash"]), "sampled": info.get("sampled"), "meta": dict(info["meta"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"saved parameters in {file.parent} cannot be read: {file} is damaged ({error})") from error


def check_shapes(saved: Any, model: Any, where: str) -> None:
    """Raises UserError naming the first parameter of which two trees differ; ``where`` the saved one lies."""
    there, here = _shapes(saved), _shapes(model)
    for path in sorted(there.keys() | here.keys()):
        if path not in there:
            raise UserError(f"{where}: parameter {path} {here[path]} is not in the checkpoint")
        if path not in here:
            raise UserError(f"{where}: parameter {path} {there[path]} of the checkpoint is not in the model")
        if there[path] != here[path]:
            raise UserError(f"{where}: parameter {path} has shape {there[path]} there, the model's is {here[path]}")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True)}
