"""Folders of saved parameters: ``params.safetensors``, and ``params.json`` with hashes of the content."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from metacanvas_jax import files, seals
from metacanvas_jax.errors import UserError, first_line
from metacanvas_jax.trees import flat, nested
from metacanvas_jax.types import Params
from metacanvas_jax.weights.hashes import arrays, content_hash, paths, sampled_hash


def save(folder: str | os.PathLike, params: Params, meta: Mapping[str, Any] | None = None) -> str:
    """Writes parameters, and ``meta`` beside their hash; returns the hash.

    ``params.json`` is written last, by renaming, so that a folder with it is complete.
    """
    folder = files.folder(folder)
    leaves = {path: np.asarray(leaf, order="C") for path, leaf in flat(jax.device_get(params)).items()}
    digest = content_hash(params)
    values = {"hash": digest, "sampled": sampled_hash(arrays(params)), "meta": dict(meta or {})}
    text = json.dumps(seals.sealed(values), indent=2)
    try:
        files.remove(folder / "params.json")
        with files.draft(folder / "params.safetensors") as draft:
            save_file(leaves, draft)
        files.write(folder / "params.json", text + "\n")
    except (OSError, SafetensorError) as error:
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
