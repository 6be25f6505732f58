"""Parquet files of a benchmark: small columns in memory, pictures read row by row."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from metacanvas_jax import files
from metacanvas_jax.data.formats.parquet import _pyarrow as pyarrow_or_error
from metacanvas_jax.errors import UserError, first_line
from metacanvas_jax.evaluate.benchmarks import base


class Table:
    """The rows of a parquet file, or of all those in a folder or in ``data`` below it, in the order of their names.

    Raises UserError for no file, one that is damaged, and one without the ``columns`` of the benchmark.
    """

    def __init__(self, data: str, columns: Sequence[str], images: Sequence[str]):
        pyarrow, folder = pyarrow_or_error(), files.folder(data)
        paths = [folder]
        if folder.is_dir():
            places = [place for place in (folder, folder / "data") if place.is_dir()]
            paths = [
                place / name for place in places for name in sorted(files.listing(place)) if name.endswith(".parquet")
            ]
        if not paths:
            raise UserError(f"{data}: no parquet files there")
        self.rows: list[dict[str, Any]] = []
        self._places: list[tuple[Any, int, int]] = []  # path, row group, row
        self._kept: tuple[Any, Any] = (None, None)
        self._lock = threading.Lock()
        for path in paths:
            try:
                with files.stream(path) as opened, pyarrow.parquet.ParquetFile(opened) as file:
                    names = file.schema_arrow.names
                    if lacking := [name for name in columns if name not in names]:
                        raise UserError(f"{path}: no column {lacking[0]!r}; it has {', '.join(names)}")
                    self.images = tuple(name for name in images if name in names)
                    small = [name for name in names if name not in images]
                    for group in range(file.num_row_groups):
                        found = file.read_row_group(group, columns=small).to_pylist()
                        self.rows += found
                        self._places += [(path, group, row) for row in range(len(found))]
            except (OSError, pyarrow.ArrowException) as error:
                raise UserError(f"{path}: no readable parquet file ({first_line(error)})") from error

    def name(self, index: int) -> str:
        """Where a row is."""
        path, group, row = self._places[index]
        return f"{path}, row {row} of group {group}"

    def encoded(self, index: int, column: str) -> bytes:
        """The encoded picture of a row. Raises UserError where there is none."""
        return self._encoded(self._cell(index, column), index, column)

    def picture(self, index: int, column: str) -> UInt8[np.ndarray, "h w 3"]:
        """The picture of a row. Raises UserError for one that cannot be decoded."""
        return base.picture(self.encoded(index, column), self.name(index))

    def all_encoded(self, index: int, column: str) -> list[bytes]:
        """All encoded pictures of a row whose cells are lists of them. Raises UserError for a cell without one."""
        return [self._encoded(cell, index, column) for cell in self._cell(index, column) or ()]

    def pictures(self, index: int, column: str) -> tuple[UInt8[np.ndarray, "h w 3"], ...]:
        """All pictures of a row. Raises UserError for one that cannot be decoded."""
        return tuple(base.picture(data, self.name(index)) for data in self.all_encoded(index, column))

    def _encoded(self, cell: Any, index: int, column: str) -> bytes:
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            raise UserError(f"{self.name(index)}: no picture in the column {column!r}")
        return data

    def _cell(self, index: int, column: str) -> Any:
        path, group, row = self._places[index]
        with self._lock:
            if self._kept[0] != (path, group):
                with files.stream(path) as opened, pyarrow_or_error().parquet.ParquetFile(opened) as file:
                    self._kept = ((path, group), file.read_row_group(group, columns=list(self.images)))
            return self._kept[1].column(column)[row].as_py()
