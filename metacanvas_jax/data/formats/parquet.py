"""Parquet files with the bytes of pictures in their columns: the layout of Hugging Face's OmniEdit and HQ-Edit.

A row can only be read with its row group. The last groups are kept, so reading in order is fast while a shuffled
stream decodes a whole group for every sample: `metacanvas prepare` such a data set before training on it.
"""

import collections
import contextlib
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from metacanvas_jax import files
from metacanvas_jax.data.decoding import MediaError
from metacanvas_jax.data.guard import Guarded
from metacanvas_jax.data.layout import Layout
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError, first_line
from metacanvas_jax.retries import retried

_GROUPS = 2  # row groups kept; OmniEdit has 100 rows of about 1 MB in each


class Parquet(Guarded):
    """The rows of parquet files, in their order. Raises UserError for a file that is none."""

    def __init__(
        self, paths: Sequence[pathlib.Path], layout: Layout, max_skips: int = 0, in_memory: bool = False
    ) -> None:
        super().__init__(max_skips, in_memory)
        self.paths, self.layout = list(paths), layout
        pyarrow = _pyarrow()
        self._groups: list[tuple[int, int]] = []  # (file, row group)
        ends: list[int] = []
        for number, path in enumerate(self.paths):
            if path.exists() and not path.is_file():  # a pipe would block
                raise UserError(f"{path}: no regular file")
            try:
                metadata = retried(lambda path=path: _metadata(path), path)
            except (OSError, pyarrow.ArrowException) as error:
                raise UserError(f"{path}: no readable parquet file ({first_line(error)})") from error
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                ends.append(metadata.row_group(group).num_rows)
        self._ends = np.cumsum(np.asarray(ends, np.int64))
        self._kept_groups: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_kept_groups": collections.OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __repr__(self) -> str:
        return f"Parquet({str(self.paths[0])!r}, {len(self.paths)} files)"

    def name(self, index: int) -> str:
        """File, row group and row."""
        group, row = self._place(index)
        file, number = self._groups[group]
        return f"{self.paths[file].name}, row {row} of group {number}"

    def read(self, index: int) -> Sample:
        """The sample of a row."""
        group, row = self._place(index)
        table = self._table(group)
        values = {name: table.column(name)[row].as_py() for name in table.column_names}
        return self.layout.sample({"__key__": self.name(index)} | values)

    def _place(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def _table(self, group: int) -> Any:
        with self._lock:
            if group in self._kept_groups:
                self._kept_groups.move_to_end(group)
                return self._kept_groups[group]
            number, inner = self._groups[group]
            pyarrow = _pyarrow()
            wanted = self.layout.keys()
            with _opened(self.paths[number]) as source, pyarrow.parquet.ParquetFile(source) as file:
                columns = [name for name in file.schema_arrow.names if name in wanted]
                size = file.metadata.row_group(inner).total_byte_size
                if size > 2 * self.layout.limits.bytes:
                    raise MediaError(f"a row group of {size} bytes is too large")
                table = file.read_row_group(inner, columns=columns, use_threads=False)
            self._kept_groups[group] = table
            while len(self._kept_groups) > _GROUPS:
                self._kept_groups.popitem(last=False)
            return table


def _metadata(path: pathlib.Path) -> Any:
    with _opened(path) as source:
        return _pyarrow().parquet.read_metadata(source)


def _opened(path: pathlib.Path) -> contextlib.AbstractContextManager[Any]:
    """What pyarrow reads: files of this machine by itself, of a bucket the ranges that it asks for."""
    return contextlib.nullcontext(path) if files.is_local(path) else files.stream(path, block=1 << 18)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet  # optional: the [media] extra
    except ImportError as error:
        raise UserError("parquet files need the package pyarrow: pip install 'metacanvas_jax[media]'") from error
    return pyarrow
