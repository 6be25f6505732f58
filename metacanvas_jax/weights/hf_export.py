"""Parameters out: safetensors in the published layout, one tensor in memory at a time.

A folder appears under its own name only when everything in it is written, so that an interrupted export never looks
like a finished one.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from metacanvas_jax import files
from metacanvas_jax.errors import UserError
from metacanvas_jax.weights.safetensors_io import DTYPE_NAMES, write_file
from metacanvas_jax.weights.table import Entry, check_table, published_shape

Layout = dict[str, tuple[np.dtype, tuple[int, ...]]]


def save_params(
    params: Mapping[str, Any],
    table: Sequence[Entry],
    folder: str | os.PathLike,
    *,
    max_shard_bytes: float = 5e9,
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
    stem: str = "model",
    progress: bool = True,
) -> list[Path]:
    """Writes parameters as safetensors under their published names; the inverse of ``load_params``.

    Args:
        params: nested dict of arrays, or of anything with ``shape``, ``dtype`` and numpy indexing (a lazy reader).
        table: the table ``params`` was, or could have been, imported with.
        folder: a new or empty folder. Several shards get an index, as transformers and diffusers read it.
        max_shard_bytes: a file grows no larger, unless a single tensor is.
        dtype: of floating-point tensors in the files; None keeps their own.
        metadata: strings for the header of every file; ``format`` is ``pt`` unless given.
        stem: name of the files: ``model`` for transformers, ``diffusion_pytorch_model`` for diffusers.
        progress: show a bar on a terminal.

    Returns:
        The files of weights.

    Raises:
        UserError: the folder has contents, the disk is too small or full, a dtype cannot be stored.
    """
    check_table(table, params)
    leaves = flatten_dict(params, sep="/")
    layout: Layout = {}
    sources: dict[str, tuple[Entry, int | None]] = {}
    for entry in table:
        leaf = leaves[entry.path]
        stored = _stored_dtype(entry.path, leaf, dtype)
        for layer in entry.tensors:
            name = entry.names(layer)[0]
            layout[name] = (stored, published_shape(entry, leaf.shape))
            sources[name] = (entry, layer)
    shards = _split(layout, max_shard_bytes)
    total = sum(map(_nbytes, layout.values()))
    header = {"format": "pt", **(metadata or {})}
    bar = tqdm(total=total, unit="B", unit_scale=True, disable=None if progress else True)

    def values(shard: Layout) -> Iterator[np.ndarray]:
        for name, spec in shard.items():
            entry, layer = sources[name]
            yield entry.transform.backward(_read(leaves[entry.path], layer)).astype(spec[0], copy=False)
            bar.update(_nbytes(spec))

    with new_folder(folder, total) as draft, bar:
        names = [f"{stem}.safetensors"]
        if len(shards) > 1:
            names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        for name, shard in zip(names, shards, strict=True):
            write_file(draft / name, shard, values(shard), header)
        if len(shards) > 1:
            weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (draft / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return [files.folder(folder) / name for name in names]


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike, needed_bytes: int = 0, *, inside: bool = False) -> Iterator[Path]:
    """A draft that becomes ``folder`` when the block ends well, and is removed when it does not.

    The draft lies beside a folder of this machine, and in the temporary folder of this machine for one in a bucket.
    What writes to a bucket by itself (Orbax) says ``inside`` and gets the place in the bucket; it writes last what
    tells readers that the folder is complete.

    Raises UserError when ``folder`` is a file or has contents, or when the disk has no room for ``needed_bytes``.
    """
    if not files.is_local(folder):
        with _new_in_bucket(files.folder(folder), needed_bytes, inside) as draft:
            yield draft
        return
    folder = files.folder(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder; nothing was written")
    draft = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.draft"
    try:
        draft.mkdir(parents=True)
        _check_room(folder, draft, needed_bytes)
        yield draft
        os.replace(draft, folder)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; nothing was written") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _new_in_bucket(folder: Path, needed_bytes: int, inside: bool) -> Iterator[Path]:
    _check_empty(folder)
    if inside:
        with _removed_on_error(folder):
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="metacanvas-") as near:
        _check_room(folder, Path(near), needed_bytes)
        yield Path(near)
        _check_empty(folder)  # another process may have been faster
        # A bucket knows no renaming: what readers look for, JSON files of the folder itself, is written last.
        last = sorted(files.listing(near, deep=True), key=lambda name: ("/" not in name, name.endswith(".json")))
        with _removed_on_error(folder):
            for name in last:
                files.upload(Path(near) / name, folder / name)


@contextlib.contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        files.remove(folder)
        raise


def _check_empty(folder: Path) -> None:
    if folder.is_file() or files.listing(folder, deep=True):
        raise UserError(f"{folder}: exists and is not an empty folder; nothing was written")


def _check_room(folder: Path, draft: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(draft).free
    if needed_bytes > free:
        raise UserError(f"{folder}: needs {needed_bytes / 1e9:.3g} GB and the disk has {free / 1e9:.3g} GB left")


def _stored_dtype(path: str, leaf: Any, dtype: str | None) -> np.dtype:
    own = np.dtype(leaf.dtype)
    stored = np.dtype(jnp.dtype(dtype)) if dtype is not None and jnp.issubdtype(own, jnp.floating) else own
    if stored not in DTYPE_NAMES:
        raise UserError(f"{path}: safetensors cannot hold {stored}; expected one of {', '.join(map(str, DTYPE_NAMES))}")
    return stored


def _nbytes(spec: tuple[np.dtype, tuple[int, ...]]) -> int:
    return math.prod(spec[1]) * spec[0].itemsize


def _split(layout: Layout, max_bytes: float) -> list[Layout]:
    """Consecutive tensors into files; wide dtypes first inside one, so that every tensor is aligned."""
    shards, size = [{}], 0.0
    for name, spec in layout.items():
        if shards[-1] and size + _nbytes(spec) > max_bytes:
            shards.append({})
            size = 0.0
        shards[-1][name] = spec
        size += _nbytes(spec)
    return [dict(sorted(shard.items(), key=lambda item: -item[1][0].itemsize)) for shard in shards]


def _read(leaf: Any, layer: int | None) -> np.ndarray:
    """One tensor of a leaf on the host. Jax keeps the host copy of an array with it, so it gets a passing one."""
    if isinstance(leaf, jax.Array):
        if not leaf.is_fully_addressable:
            raise ValueError("parameters lie on several hosts: export from their checkpoint, or gather them first")
        return np.asarray(leaf.copy() if layer is None else leaf[layer])
    return np.asarray(leaf[...] if layer is None else leaf[layer])
