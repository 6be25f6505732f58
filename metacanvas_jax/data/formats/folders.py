"""Loose media: a folder with a file of rows (JSONL, CSV), or files of one name (``CLIP.mp4`` + ``CLIP.txt``)."""

import csv
import dataclasses
import io
import json
import pathlib
import posixpath
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from metacanvas_jax import files
from metacanvas_jax.data.decoding import MediaError, read_medium
from metacanvas_jax.data.guard import Guarded
from metacanvas_jax.data.layout import NAMES, Layout, gathered, place_of
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError, first_line

JSONL = ("metadata.jsonl", "data.jsonl")
CSV = ("metadata.csv", "data.csv")
DELIMITERS = ",;\t"
_LONGEST_ROW = 1 << 22


class JsonLines(Guarded):
    """One JSON object a line; paths in it are relative to the file and may not leave its folder.

    ``path`` is the JSONL file, or a folder with a ``metadata.jsonl`` (Hugging Face's name) or ``data.jsonl``.
    Raises UserError when there is none.
    """

    def __init__(self, path: pathlib.Path, layout: Layout, max_skips: int = 0, in_memory: bool = False) -> None:
        super().__init__(max_skips, in_memory)
        if path.is_dir():
            path = next((path / name for name in JSONL if (path / name).is_file()), path / JSONL[0])
        self.path, self.layout = path, inside(layout, path.parent)
        # To find its lines a file is read whole; that of a bucket then stays here, so that samples ask for media only.
        self._near = path if files.is_local(path) else _near(path, self)
        self._starts, self._lengths = _lines(self._near, path)

    def __len__(self) -> int:
        return len(self._starts)

    def __repr__(self) -> str:
        return f"JsonLines({str(self.path)!r})"

    def name(self, index: int) -> str:
        """The number of the row, from 1, without empty lines."""
        return f"row {index + 1}"

    def key(self, index: int) -> str:
        """The path of the target, which stays the same when rows are added; else the number of the row."""
        try:
            return _target(self._row(index), self.layout) or self.name(index)
        except MediaError:
            return self.name(index)

    def read(self, index: int) -> Sample:
        """The sample of a row."""
        return self.layout.sample({"__key__": f"{self.path.name}:{index + 1}"} | self._row(index))

    def _row(self, index: int) -> dict[str, Any]:
        if self._lengths[index] > _LONGEST_ROW:
            raise MediaError(f"a row of {self._lengths[index]} bytes, at most {_LONGEST_ROW} are allowed")
        line = files.read_range(self._near, int(self._starts[index]), int(self._lengths[index]))
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MediaError(f"not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise MediaError(f"a JSON {type(row).__name__}, wanted an object")
        return row


class CsvRows(Guarded):
    """One sample a line, whose first line names the columns; paths are as in ``JsonLines``.

    ``path`` is the CSV file, or a folder with a ``metadata.csv`` (Hugging Face's name) or ``data.csv``. Commas,
    semicolons or tabs separate the columns. An empty field is one that is not there. Raises UserError for a file that
    is missing, not UTF-8, or no table.
    """

    def __init__(self, path: pathlib.Path, layout: Layout, max_skips: int = 0, in_memory: bool = False) -> None:
        super().__init__(max_skips, in_memory)
        if path.is_dir():
            path = next((path / name for name in CSV if (path / name).is_file()), path / CSV[0])
        self.path, self.layout = path, inside(layout, path.parent)
        text = files.read_text(path)
        delimiter = max(DELIMITERS, key=text.partition("\n")[0].count)
        try:
            rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
        except csv.Error as error:
            raise UserError(f"{path}: no table ({first_line(error)})") from error
        self._columns = [name.strip() for name in rows[0]] if rows else []
        self._rows = rows[1:]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"CsvRows({str(self.path)!r})"

    def name(self, index: int) -> str:
        """The number of the row, from 1, without the names of the columns and empty lines."""
        return f"row {index + 1}"

    def key(self, index: int) -> str:
        """The path of the target, else the number of the row."""
        return _target(dict(zip(self._columns, self._rows[index], strict=False)), self.layout) or self.name(index)

    def read(self, index: int) -> Sample:
        """The sample of a row."""
        fields = self._rows[index]
        if len(fields) != len(self._columns):
            raise MediaError(f"{len(fields)} fields, the first line names {len(self._columns)}")
        row: dict[str, Any] = {name: field for name, field in zip(self._columns, fields, strict=True) if field}
        rate = self.layout.columns.get("fps", "fps")
        if rate in row:
            row[rate] = float(row[rate])
        return self.layout.sample({"__key__": f"{self.path.name}:{index + 1}"} | row)


class Files(Guarded):
    """Files of one name make a sample: ``CLIP.mp4`` with ``CLIP.txt`` or ``CLIP.json``, in folders of any depth.

    Raises UserError when the folder is not there.
    """

    def __init__(self, path: pathlib.Path, layout: Layout, max_skips: int = 0, in_memory: bool = False) -> None:
        super().__init__(max_skips, in_memory)
        if not path.is_dir():
            raise UserError(f"{path}: no such folder")
        self.path, self.layout = path, inside(layout, path)
        groups: dict[str, dict[str, list[str]]] = {}
        wanted = layout.keys()
        for name in files.listing(path, deep=True):
            place = place_of(name)
            if place is not None and (place[1] in wanted or place[1].startswith("references.")):
                groups.setdefault(place[0], {}).setdefault(place[1], []).append(name)
        self._groups = list(groups.items())

    def __len__(self) -> int:
        return len(self._groups)

    def __repr__(self) -> str:
        return f"Files({str(self.path)!r})"

    def name(self, index: int) -> str:
        """The path without its extension."""
        return self._groups[index][0]

    def read(self, index: int) -> Sample:
        """The sample of this number."""
        key, columns = self._groups[index]
        row: dict[str, Any] = {"__key__": key}
        for column, names in columns.items():
            if len(names) > 1:
                raise MediaError(f"{' and '.join(names)} are one part of one sample")
            row[column] = self.layout.open(names[0])
        return self.layout.sample(gathered(row))


def inside(layout: Layout, folder: pathlib.Path) -> Layout:
    """The layout with paths opened relative to a folder; a path that leads out of it is a MediaError."""
    local = files.is_local(folder)
    root = folder.resolve() if local else folder

    def opened(name: str) -> bytes:
        path = (root / name).resolve() if local else folder / posixpath.normpath(name)
        outside = not path.is_relative_to(root) if local else _leads_out(name)
        if outside:
            raise MediaError(f"{name} points outside {folder}")
        return read_medium(path, name, layout.limits)

    return dataclasses.replace(layout, open=opened)


def _target(row: Mapping[str, Any], layout: Layout) -> str | None:
    """The path of a row's target, where that is what it has."""
    names = (layout.columns["target"],) if "target" in layout.columns else NAMES["target"]
    found = next((row[name] for name in names if name in row), None)
    return found if isinstance(found, str) and found else None


def _leads_out(name: str) -> bool:
    """Whether a path of a row leads out of its folder; in a bucket there are no links that could."""
    place = posixpath.normpath(name)
    return place.startswith(("/", "../")) or place == ".." or "://" in name


def _near(path: pathlib.Path, owner: object) -> pathlib.Path:
    """A copy of a file on this machine, which is removed with its owner. Raises UserError where there is none."""
    home = tempfile.mkdtemp(prefix="metacanvas-")
    weakref.finalize(owner, shutil.rmtree, home, ignore_errors=True)
    try:
        files.download(path, pathlib.Path(home) / path.name)
    except OSError as error:
        raise UserError(f"{path}: no rows of media ({error.strerror or error})") from error
    return pathlib.Path(home) / path.name


def _lines(near: pathlib.Path, path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of every line that is not empty, of a file ``near`` that messages call ``path``."""
    starts, lengths, at = [], [], 0
    if near.exists() and not near.is_file():
        raise UserError(f"{path}: no regular file")
    try:
        with open(near, "rb") as file:
            for line in file:
                if line.strip():
                    starts.append(at)
                    lengths.append(len(line))
                at += len(line)
    except OSError as error:
        raise UserError(f"{path}: no rows of media ({error.strerror})") from error
    return np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
