"""Numbers that tell arrays and files apart from damaged or other ones."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metacanvas_jax.errors import UserError
from metacanvas_jax.trees import flat
from metacanvas_jax.types import Params

PLACES, PLACE_BYTES = 4, 4096  # of an array that are sampled; a smaller array is read whole


def checksums(tree: Any) -> dict[str, int]:
    """A number for every array, from its bits and their places: the same on every mesh, computed where the array lies.

    The files' own check sums do not cover the values.
    """
    sums = jax.device_get(_checksums(jax.tree.leaves(tree)))
    return {name: int(value) for name, value in zip(paths(tree), sums, strict=True)}


def content_hash(params: Params) -> str:
    """SHA-256 over paths, dtypes, shapes and bytes; the same wherever and however the parameters are stored."""
    return whole_hash(arrays(params))


def arrays(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Paths and values in the order in which they are hashed, one at a time on the host."""
    for path, leaf in sorted(flat(params).items()):
        yield path, np.asarray(jax.device_get(leaf), order="C")


def sampled_hash(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """SHA-256 over names, dtypes, shapes and some bytes of every array: its beginning, its end, and places between."""
    return _hash(arrays, _sample)


def whole_hash(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """SHA-256 over names, dtypes, shapes and all bytes."""
    return _hash(arrays, lambda data: [data])


def files_hash(folder: str | os.PathLike) -> str:
    """SHA-256 over the names and contents of the safetensors files of a folder of published weights.

    Raises:
        UserError: the folder holds none.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"no safetensors file in {folder}")
    return contents_hash(files)


def contents_hash(files: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\n".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def paths(tree: Any) -> list[str]:
    """The leaves' "/"-joined paths, for trees of dicts, sequences and structs alike, in the order of their leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return ["/".join(_key(part) for part in path) for path, _ in leaves]


@jax.jit
def _checksums(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_checksum(x) for x in arrays]


def _checksum(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    # Multiplied by an odd number, no change of a value's bits is lost.
    return jnp.sum(x.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)


def _hash(arrays: Iterable[tuple[str, np.ndarray]], pick: Callable[[np.ndarray], Iterable[Any]]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays:
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        for part in pick(array.reshape(-1).view(np.uint8)):
            digest.update(part)
    return digest.hexdigest()


def _sample(data: np.ndarray) -> list[np.ndarray]:
    if data.size <= PLACES * PLACE_BYTES:
        return [data]
    starts = [i * (data.size - PLACE_BYTES) // (PLACES - 1) for i in range(PLACES)]
    return [data[start : start + PLACE_BYTES] for start in starts]


def _key(part: Any) -> str:
    # Dict keys, sequence indices and fields of structs all stand for one name on disk.
    for field in ("key", "idx", "name"):
        if hasattr(part, field):
            return str(getattr(part, field))
    return str(part)
