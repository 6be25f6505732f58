"""Numbers that tell arrays and files apart from damaged or other ones."""

import collections
import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metacanvas_jax import files
from metacanvas_jax.errors import UserError
from metacanvas_jax.trees import flat
from metacanvas_jax.types import Params

PLACES, PLACE_BYTES = 4, 4096  # of an array that are sampled; a smaller array is read whole
_PIECE = 1 << 22  # bytes that are read and hashed at a time
_AHEAD = 16  # parts of distant arrays that are fetched at the same time


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


@dataclasses.dataclass(frozen=True)
class Distant:
    """An array that lies elsewhere: ``part(start, count)`` fetches some of its bytes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    part: Callable[[int, int], bytes]


Arrays = Iterable[tuple[str, "np.ndarray | Distant"]]


def sampled_hash(arrays: Arrays) -> str:
    """SHA-256 over names, dtypes, shapes and some bytes of every array: its beginning, its end, and places between."""
    return _hash(arrays, _places)


def whole_hash(arrays: Arrays) -> str:
    """SHA-256 over names, dtypes, shapes and all bytes."""
    return _hash(arrays, lambda size: [(start, min(_PIECE, size - start)) for start in range(0, size, _PIECE)])


def files_hash(folder: str | os.PathLike) -> str:
    """SHA-256 over the names and contents of the safetensors files of a folder of published weights.

    Raises:
        UserError: the folder holds none.
    """
    found = [files.folder(folder) / name for name in files.listing(folder) if name.endswith(".safetensors")]
    if not found:
        raise UserError(f"no safetensors file in {folder}")
    return contents_hash(found)


def contents_hash(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\n".encode())
        digest.update(bytes.fromhex(file_hash(path)))
    return digest.hexdigest()


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file. Raises OSError where there is none."""
    digest = hashlib.sha256()
    with files.stream(path, block=_PIECE) as file:
        while part := file.read(_PIECE):
            digest.update(part)
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


def _hash(arrays: Arrays, pick: Callable[[int], list[tuple[int, int]]]) -> str:
    digest = hashlib.sha256()
    waiting: collections.deque[Any] = collections.deque()

    def take(most: int) -> None:
        while len(waiting) > most or (waiting and not isinstance(waiting[0], Future)):
            part = waiting.popleft()
            digest.update(part.result() if isinstance(part, Future) else part)

    with ThreadPoolExecutor(_AHEAD) as pool:  # parts of distant arrays are fetched while others are hashed
        for name, array in arrays:
            waiting.append(f"{name} {array.dtype.name} {array.shape}\n".encode())
            spans = pick(math.prod(array.shape) * array.dtype.itemsize)
            if isinstance(array, Distant):
                waiting.extend(pool.submit(array.part, *span) for span in spans[:_AHEAD])
                for span in spans[_AHEAD:]:
                    take(_AHEAD)
                    waiting.append(pool.submit(array.part, *span))
            else:
                data = array.reshape(-1).view(np.uint8)
                waiting.extend(data[start : start + count] for start, count in spans)
            take(4 * _AHEAD)
        take(0)
    return digest.hexdigest()


def _places(size: int) -> list[tuple[int, int]]:
    if size <= PLACES * PLACE_BYTES:
        return [(0, size)]
    return [(i * (size - PLACE_BYTES) // (PLACES - 1), PLACE_BYTES) for i in range(PLACES)]


def _key(part: Any) -> str:
    # Dict keys, sequence indices and fields of structs all stand for one name on disk.
    for field in ("key", "idx", "name"):
        if hasattr(part, field):
            return str(getattr(part, field))
    return str(part)
