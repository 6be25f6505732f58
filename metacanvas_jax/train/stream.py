"""Parameters of a checkpoint, read one at a time: a host exports a model without holding it in memory."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from metacanvas_jax.errors import UserError
from metacanvas_jax.train.store import Store
from metacanvas_jax.trees import flat, nested
from metacanvas_jax.types import Params

BLOCK = 1 << 22  # values whose bits are summed at a time


def lazy_params(checkpoints: Store, abstract: Params, *, ema: bool = False, step: int | None = None) -> Params:
    """Like ``Store.restore_params``, but every leaf is read, and its checksum compared, when it is indexed.

    Raises UserError, when a leaf is read, for other shapes or damaged files, and if the run kept no moving average.
    """
    meta = checkpoints.meta(step)
    step = checkpoints.steps()[-1] if step is None else step
    name = "ema" if ema else "params"
    folder = checkpoints.folder / str(step) / name
    if not folder.exists():
        raise UserError(f"checkpoint {folder.parent} holds no {name}")
    sums = {path.removeprefix(f"{name}/"): value for path, value in meta["checksums"].items()}
    return Reader(folder, abstract, sums).leaves()


class Leaf:
    """A parameter that is read when it is indexed; the reader keeps the last one in memory."""

    def __init__(self, reader: "Reader", path: str, shape: tuple[int, ...], dtype: np.dtype):
        self.reader, self.path, self.shape, self.dtype = reader, path, shape, dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        """A block of it, or all of it (``leaf[...]``)."""
        return self.reader.read(self.path)[index]


class Reader:
    """One tree of a checkpoint, written by any number of hosts. It holds one parameter at a time.

    ``sums`` are the checksums that were saved with it (``store.checksums``), by path.
    """

    def __init__(self, folder: epath.Path, abstract: Params, sums: Mapping[str, int]):
        self.folder, self.sums = folder, sums
        self._abstract = flat(abstract)
        self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        self._held: tuple[str, np.ndarray] | None = None

    def leaves(self) -> Params:
        """The tree, with nothing read yet."""
        return nested({path: Leaf(self, path, x.shape, np.dtype(x.dtype)) for path, x in self._abstract.items()})

    def read(self, path: str) -> np.ndarray:
        """A whole parameter. Raises UserError for files that are damaged."""
        if self._held is not None and self._held[0] == path:
            return self._held[1]
        self._held = None
        tree = dict.fromkeys(self._abstract, ocp.PLACEHOLDER)
        tree[path] = jax.ShapeDtypeStruct(self._abstract[path].shape, self._abstract[path].dtype)
        args = dict.fromkeys(self._abstract, ocp.RestoreArgs())
        args[path] = ocp.RestoreArgs(restore_type=np.ndarray)
        restore = ocp.args.PyTreeRestore(item=nested(tree), restore_args=nested(args))
        try:
            value = np.asarray(flat(self._checkpointer.restore(self.folder, args=restore))[path])
        except Exception as error:  # Orbax raises many types, and for a damaged array Exception itself
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise UserError(f"checkpoint {self.folder} cannot be read: {reason[0][:300]}") from error
        if value.shape != self._abstract[path].shape:
            expected = list(self._abstract[path].shape)
            raise UserError(f"checkpoint {self.folder}: {path} has shape {list(value.shape)}, expected {expected}")
        if self.sums.get(path) != checksum(value):
            raise UserError(f"checkpoint {self.folder} is damaged: the values of {path} are not those that were saved")
        self._held = (path, value)
        return value


def checksum(x: np.ndarray) -> int:
    """The checksum of ``store.checksums``, computed on the host in little memory."""
    bits = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * x.itemsize}")
    total = 0
    for start in range(0, bits.size, BLOCK):
        part = bits[start : start + BLOCK].astype(np.uint32)
        place = np.arange(start, start + part.size, dtype=np.uint64).astype(np.uint32)
        total += int(np.sum(part * (place * np.uint32(2) + np.uint32(1)), dtype=np.uint32))
    return total % 2**32
