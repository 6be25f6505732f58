"""Safetensors: checked headers, slices of files and of buckets, and a writer that holds one tensor at a time.

A file is 8 bytes (the header's length, little endian), a JSON header that gives every tensor's dtype, shape and byte
range, and the bytes. Nothing here can run code from a file: pickles are refused by name and by content.
"""

import collections
import dataclasses
import fnmatch
import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from metacanvas_jax import files
from metacanvas_jax.errors import UserError
from metacanvas_jax.weights.table import Box

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

STEMS = ("model", "diffusion_pytorch_model")  # what transformers and diffusers call the weights of a folder
_HEADER = 1 << 16  # bytes of a file that are read first
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = "pickled weights can run code and are never read; convert them to safetensors"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one published tensor lies; ``offset`` counts bytes from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Checkpoint:
    """The tensors of a file or folder by name; ``bytes_read`` counts what was asked of them so far.

    Files of this machine are mapped. Of a bucket the rows that are asked for are fetched, and no others.

    Raises UserError for whatever is wrong with the files themselves, before any weight is read.
    """

    def __init__(self, path: str | Path):
        self.path = files.folder(path)
        self.local = files.is_local(path)
        self.bytes_read = 0
        self.tensors: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        self._rows = _Recent()
        found = find_weights(self.path)
        if not isinstance(found, dict):
            self.tensors = read_header(found)
            return
        there = files.listing(self.path)
        for file in sorted(set(found.values())):
            if file not in there:
                raise UserError(f"{self.path}: the index names the shard {file}, which is not there")
            self.tensors |= read_header(self.path / file)
        for name, file in found.items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise UserError(f"{self.path}: the index puts {name} into {file}, which does not hold it")

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """A block of a tensor: a view of the mapped file, whose pages are given back with it, or fetched rows."""
        tensor = self.tensors[name]
        dtype = DTYPES[tensor.dtype]
        box = tuple((0, size) for size in tensor.shape) if box is None else box
        shape = tuple(stop - start for start, stop in box)
        with self._lock:
            self.bytes_read += math.prod(shape) * dtype.itemsize
        if not math.prod(shape):
            return np.empty(shape, dtype)
        if not self.local:
            return self._fetched(tensor, dtype, box)
        if not shape:
            return np.memmap(tensor.file, dtype, mode="r", offset=tensor.offset, shape=())
        # Only the rows asked for are mapped, so that what counts as resident is bounded by the block.
        offset = tensor.offset + box[0][0] * math.prod(tensor.shape[1:]) * dtype.itemsize
        rows = np.memmap(tensor.file, dtype, mode="r", offset=offset, shape=(shape[0], *tensor.shape[1:]))
        return rows[(slice(None), *(slice(*span) for span in box[1:]))]

    def part(self, name: str, start: int, count: int) -> bytes:
        """Some of the bytes of a tensor."""
        tensor = self.tensors[name]
        with self._lock:
            self.bytes_read += count
        return files.read_range(tensor.file, tensor.offset + start, count)

    def _fetched(self, tensor: Tensor, dtype: np.dtype, box: Box) -> np.ndarray:
        """A block of a tensor in a bucket. Devices that hold other columns of the same rows share what is fetched."""
        rows = (box or ((0, 1),))[0]
        row = math.prod(tensor.shape[1:]) * dtype.itemsize
        span = (tensor.offset + rows[0] * row, (rows[1] - rows[0]) * row)
        data = self._rows.get((tensor.file, *span), lambda: files.read_range(tensor.file, *span))
        if len(data) < span[1]:
            raise UserError(f"{tensor.file}: truncated while it was read, at byte {span[0] + len(data)}")
        values = np.frombuffer(data, dtype).reshape((rows[1] - rows[0], *tensor.shape[1:]) if box else ())
        return values[(slice(None), *(slice(*span) for span in box[1:]))] if box else values


class _Recent:
    """The last few values of a function, each computed once, by whichever thread asks first."""

    def __init__(self, size: int = 16) -> None:
        self._size, self._lock = size, threading.Lock()
        self._kept: collections.OrderedDict[Any, Future] = collections.OrderedDict()

    def get(self, key: Any, make: Any) -> Any:
        with self._lock:
            mine = key not in self._kept
            future = self._kept.setdefault(key, Future())
            self._kept.move_to_end(key)
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    self._kept.pop(key, None)
                future.set_exception(error)
        return future.result()


def find_weights(path: Path) -> Path | dict[str, str]:
    """The one file of ``path``, or the ``weight_map`` of its index (tensor name to file name)."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        return path
    there = files.listing(path)
    for stem in STEMS:
        if f"{stem}.safetensors" in there:
            return path / f"{stem}.safetensors"
        if f"{stem}.safetensors.index.json" in there:
            return read_index(path / f"{stem}.safetensors.index.json")
    # A variant has its name in the middle: model.fp16.safetensors, model.safetensors.index.fp16.json and its shards.
    indices = fnmatch.filter(there, "*.safetensors.index*.json")
    shards = fnmatch.filter(there, "*.safetensors")
    if len(indices) == 1:
        return read_index(path / indices[0])
    if len(shards) == 1 and not indices:
        return path / shards[0]
    if shards or indices:
        names = ", ".join(indices or shards)
        raise UserError(f"{path}: cannot tell which weights to read among {names}; leave one set in the folder")
    if any(name.endswith(PICKLES) for name in there):
        raise UserError(f"{path}: no safetensors here; {CONVERT}")
    raise UserError(f"{path}: no safetensors here; expected {STEMS[0]}.safetensors or an index beside its shards")


def read_index(file: Path) -> dict[str, str]:
    """The ``weight_map`` of an index file."""
    try:
        weight_map = files.read_json(file)["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: not an index of safetensors, a JSON object with a weight_map ({error})") from error


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, checked against its size. Raises UserError unless it is complete and well formed."""
    if file.suffix in PICKLES:
        raise UserError(f"{file}: {CONVERT}")
    if not file.is_file():  # opening a pipe would block
        raise UserError(f"{file}: no regular file, expected safetensors")
    size = files.size(file)
    begin = files.read_range(file, 0, _HEADER)  # of most files the whole header
    first, brace = begin[:8], begin[8:9]  # a header is JSON; its length may begin with a pickle's byte
    if brace != b"{" and (first[:4] == b"PK\x03\x04" or first[:1] == b"\x80"):
        raise UserError(f"{file}: {CONVERT}")
    if first == b"version ":
        raise UserError(f"{file}: a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= length <= 100_000_000:
        raise UserError(f"{file}: not a safetensors file")
    if 8 + length > size:
        raise UserError(f"{file}: truncated, its header needs {8 + length} bytes and the file has {size}")
    text = begin[8 : 8 + length]
    if len(text) < length:
        text += files.read_range(file, len(begin), length - len(text))
    try:
        header = {name: spec for name, spec in json.loads(text).items() if name != "__metadata__"}
        spans = {name: _span(spec) for name, spec in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{file}: not a safetensors file, its header cannot be read ({error})") from error
    tensors = {}
    for name, (dtype, shape, start, stop) in spans.items():
        if dtype not in DTYPES:
            raise UserError(f"{file}: {name} has dtype {dtype}; expected one of {', '.join(DTYPES)}")
        tensor = tensors[name] = Tensor(file, dtype, shape, 8 + length + start)
        if tensor.offset + tensor.nbytes > size:
            raise UserError(f"{file}: truncated, {name} ends at byte {tensor.offset + tensor.nbytes} of {size}")
        if start < 0 or min(shape, default=0) < 0 or stop - start != tensor.nbytes:
            raise UserError(
                f"{file}: {name}, {dtype} {list(shape)}, takes {tensor.nbytes} bytes but is given {stop - start}"
            )
    return tensors


def _span(spec: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape and byte range of a tensor as the header gives them."""
    start, stop = spec["data_offsets"]
    return str(spec["dtype"]), tuple(map(int, spec["shape"])), int(start), int(stop)


def write_file(
    file: Path,
    layout: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    values: Iterable[np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes tensors in the order of ``layout``, taking one at a time from ``values``."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        given = iter(values)
        for name, (dtype, shape) in layout.items():
            value = next(given)
            if value.shape != shape or value.dtype != dtype:
                raise ValueError(f"{name}: announced as {dtype} {shape}, given as {value.dtype} {value.shape}")
            stream.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
            del value  # before the next is made
        stream.flush()
        os.fsync(stream.fileno())  # a rename must not outlive the bytes
