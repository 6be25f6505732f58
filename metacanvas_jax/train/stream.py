"""Parameters of a checkpoint, read a few at a time: a host exports a model without holding it in memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from metacanvas_jax.errors import UserError
from metacanvas_jax.train.store import Store, groups, reading
from metacanvas_jax.trees import flat, nested
from metacanvas_jax.types import Params

BLOCK = 1 << 22  # values whose bits are summed at a time
TOGETHER = 1 << 28  # bytes of the parameters that are read together, and held until others are asked for


def lazy_params(
    checkpoints: Store, abstract: Params, *, ema: bool = False, step: int | None = None, order: Sequence[str] = ()
) -> Params:
    """Like ``Store.restore_params``, but a leaf is read, and its checksum compared, when it is indexed.

    Those that follow it in ``order``, in which they will be asked for, are read with it, up to ``TOGETHER`` bytes:
    every reading of a checkpoint begins with its table of contents, which a bucket sends in many answers.

    Raises UserError, when a leaf is read, for other shapes or damaged files, and if the run kept no moving average, and
    Unreachable where the storage does not answer.
    """
    meta = checkpoints.meta(step)
    step = checkpoints.steps()[-1] if step is None else step
    name = "ema" if ema else "params"
    folder = checkpoints.folder / str(step) / name
    if not folder.exists():
        raise UserError(f"checkpoint {folder.parent} holds no {name}")
    sums = {path.removeprefix(f"{name}/"): value for path, value in meta["checksums"].items()}
    return Reader(folder, abstract, sums, order).leaves()


class Leaf:
    """A parameter that is read when it is indexed; the reader keeps it until one of another group is asked for."""

    def __init__(self, reader: "Reader", path: str, shape: tuple[int, ...], dtype: np.dtype):
        self.reader, self.path, self.shape, self.dtype = reader, path, shape, dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        """A block of it, or all of it (``leaf[...]``)."""
        return self.reader.read(self.path)[index]


class Reader:
    """One tree of a checkpoint, written by any number of hosts. It holds one group of parameters at a time.

    ``sums`` are the checksums that were saved with it (``store.checksums``), by path. Parameters that ``order`` does
    not name come after those that it names.
    """

    def __init__(self, folder: epath.Path, abstract: Params, sums: Mapping[str, int], order: Sequence[str] = ()):
        self.folder, self.sums = folder, sums
        self._abstract = flat(abstract)
        known = dict.fromkeys((*(path for path in order if path in self._abstract), *self._abstract))
        parts = groups({path: self._abstract[path] for path in known}, TOGETHER)
        self._groups = {path: tuple(group) for group in parts for path in group}
        self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        self._held: dict[str, np.ndarray] = {}

    def leaves(self) -> Params:
        """The tree, with nothing read yet."""
        return nested({path: Leaf(self, path, x.shape, np.dtype(x.dtype)) for path, x in self._abstract.items()})

    def read(self, path: str) -> np.ndarray:
        """A whole parameter. Raises UserError for files that are damaged."""
        if path not in self._held:
            self._held = {}  # before others take its place
            self._held = self._read(self._groups[path])
        return self._held[path]

    def _read(self, group: Sequence[str]) -> dict[str, np.ndarray]:
        tree: dict[str, Any] = dict.fromkeys(self._abstract, ocp.PLACEHOLDER)
        args = dict.fromkeys(self._abstract, ocp.RestoreArgs())
        for path in group:
            tree[path] = jax.ShapeDtypeStruct(self._abstract[path].shape, self._abstract[path].dtype)
            args[path] = ocp.RestoreArgs(restore_type=np.ndarray)
        restore = ocp.args.PyTreeRestore(item=nested(tree), restore_args=nested(args))
        with reading(self.folder):
            found = flat(self._checkpointer.restore(self.folder, args=restore))
        values = {path: np.asarray(found[path]) for path in group}
        for path, value in values.items():
            if value.shape != self._abstract[path].shape:
                expected = list(self._abstract[path].shape)
                raise UserError(f"checkpoint {self.folder}: {path} has shape {list(value.shape)}, expected {expected}")
            if self.sums.get(path) != checksum(value):
                raise UserError(
                    f"checkpoint {self.folder} is damaged: the values of {path} are not those that were saved"
                )
        return values


def checksum(x: np.ndarray) -> int:
    """The checksum of ``store.checksums``, computed on the host in little memory."""
    bits = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * x.itemsize}")
    total = 0
    for start in range(0, bits.size, BLOCK):
        part = bits[start : start + BLOCK].astype(np.uint32)
        place = np.arange(start, start + part.size, dtype=np.uint64).astype(np.uint32)
        total += int(np.sum(part * (place * np.uint32(2) + np.uint32(1)), dtype=np.uint32))
    return total % 2**32
