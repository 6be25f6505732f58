"""What lies beside the shards of a data set: the recipe that it was made from, and a manifest of hashes."""

import functools
import os
import pathlib
from typing import Any

import numpy as np

from metacanvas_jax import files, seals
from metacanvas_jax.errors import UserError
from metacanvas_jax.weights.hashes import Distant, file_hash, sampled_hash

RECIPE, MANIFEST = "recipe.json", "manifest.json"
NAME = "samples"


def read_recipe(folder: str | os.PathLike) -> dict[str, Any]:
    """What a dataset folder was made from. Raises UserError when it holds no dataset."""
    path = files.folder(folder) / RECIPE
    if not path.exists():
        raise UserError(f"{folder}: no dataset there; make it with `metacanvas prepare --config FILE`")
    try:
        return files.read_json(path)
    except UserError as error:
        raise UserError(f"{error}; delete the folder and prepare again") from error


def verify(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest, after comparing every shard with its hash. Raises UserError naming the first that differs."""
    path = files.folder(folder) / MANIFEST
    manifest = _manifest(path)
    check_files(folder)
    for shard in manifest["shards"]:
        file = path.with_name(os.path.basename(shard["file"]))
        if not file.is_file():
            raise UserError(f"{file}: the shard is missing")
        if file_hash(file) != shard["sha256"]:
            raise UserError(f"{file}: the shard is not what the manifest says; delete the folder and prepare again")
    return manifest


def check_files(folder: str | os.PathLike) -> None:
    """Compares the small files of a dataset, which say how its shards are read, with the hashes in its manifest.

    Raises UserError naming the first that differs. Folders of version 0.1 have no such hashes.
    """
    path = files.folder(folder) / MANIFEST
    for name, digest in _manifest(path).get("files", {}).items() if path.exists() else ():
        file = path.with_name(os.path.basename(name))
        if not file.is_file() or file_hash(file) != digest:
            raise UserError(f"{file} is missing or damaged; delete the folder and prepare again")


def check_places(folder: str | os.PathLike) -> None:
    """Compares some bytes of every shard with the manifest. Raises UserError naming one in the place of another.

    Other damage is left to the checksums that records have of their own, so that bad records can be passed over.
    """
    path = files.folder(folder) / MANIFEST
    shards = _manifest(path)["shards"] if path.exists() else []
    written = {shard["sampled"] for shard in shards if "sampled" in shard}
    for shard in shards:
        file = path.with_name(os.path.basename(shard["file"]))
        if "sampled" in shard and (found := sampled(file)) != shard["sampled"] and found in written:
            raise UserError(f"{file}: this is another shard of the dataset; delete the folder and prepare again")


def content(folder: str | os.PathLike) -> tuple[int, str]:
    """The number of samples and a hash of all shards. Raises UserError where there is no manifest, or a damaged one."""
    manifest = _manifest(files.folder(folder) / MANIFEST)
    return manifest["count"], seals.json_hash(manifest["shards"])


def skipped(folder: str | os.PathLike) -> list[str]:
    """The names of the records that were left out as bad. Raises UserError as ``content`` does."""
    shards = _manifest(files.folder(folder) / MANIFEST)["shards"]
    return [str(name) for shard in shards for name in shard["skipped"]]


def _manifest(path: pathlib.Path) -> dict[str, Any]:
    try:
        manifest = seals.opened(files.read_json(path), path)
        shards = [{**shard, "file": str(shard["file"]), "sha256": str(shard["sha256"])} for shard in manifest["shards"]]
        return manifest | {"shards": shards, "files": dict(manifest.get("files", {}))}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no manifest of `metacanvas prepare` ({error})") from error


def sampled(file: pathlib.Path) -> str | None:
    """A hash of the size and some bytes of a file; None for one that is missing or empty."""
    if not file.is_file() or not (size := files.size(file)):
        return None
    if files.is_local(file):
        return sampled_hash([(NAME, np.memmap(file, np.uint8, mode="r"))])
    return sampled_hash([(NAME, Distant(np.dtype(np.uint8), (size,), functools.partial(files.read_range, file)))])
