"""Published weights in: safetensors streamed block by block onto the devices that hold them.

Tensors are visited in the order they lie on disk. Of each one this process maps only the blocks its own devices need,
a few megabytes at a time, rearranges them, casts once and puts them where they stay. Names, shapes and dtypes are
checked against the headers before the first weight is read, so a bad folder costs nothing.
"""

import dataclasses
import fnmatch
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from tqdm import tqdm

from metacanvas_jax.errors import UserError
from metacanvas_jax.types import Params
from metacanvas_jax.weights.safetensors_io import DTYPES, Checkpoint, Tensor
from metacanvas_jax.weights.table import SAME, Box, Entry, Transform, check_table, published_shape

BFLOAT16 = np.dtype(jnp.bfloat16)

logger = logging.getLogger(__name__)

SINGLE_FILE = ("model.diffusion_model.", "diffusion_model.")

BLOCK_BYTES = 2 << 20  # mapped at a time: small enough for a transpose to stay in cache
FETCHED_BYTES = 16 << 20  # fetched at a time from a bucket, which takes a while to answer each request
THREADS = 8  # that read, cast and rearrange blocks of one tensor


def load_params(
    source: str | Path | Checkpoint,
    table: Sequence[Entry],
    abstract: Mapping[str, Any],
    *,
    ignore: Sequence[str] = (),
    check_finite: bool = True,
    progress: bool = True,
) -> Params:
    """Reads the parameters that ``abstract`` describes from a safetensors file, or from a folder of them.

    Args:
        source: a file, a folder (one file, or an index and its shards), or a ``Checkpoint`` already opened.
        table: which published tensor is which parameter; every parameter of ``abstract`` exactly once.
        abstract: nested dict of ``jax.ShapeDtypeStruct``. Its dtype wins over the file's; where ``.sharding`` is set, a
            process reads only what its devices hold.
        ignore: shell patterns (``visual.*``) of published names to leave out; any other unknown name is an error.
        check_finite: refuse NaN and infinity, also those made by the cast.
        progress: show a bar on a terminal.

    Raises:
        UserError: names the file, the tensor, what was found and what was expected. Nothing is returned by halves.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    read_before = checkpoint.bytes_read
    check_table(table, abstract)
    targets = flatten_dict(abstract, sep="/")
    found = match(checkpoint, table, targets, ignore)
    left = Counter(source.entry.path for source in found)
    slots: dict[str, _HostSlot | _DeviceSlot] = {}
    params: dict[str, jax.Array] = {}
    total = sum(source.info.nbytes for source in found)
    bar = tqdm(total=total, unit="B", unit_scale=True, disable=None if progress else True)
    with bar, ThreadPoolExecutor(THREADS) as pool:
        for source in sorted(found, key=lambda s: (s.info.file, s.info.offset)):
            path = source.entry.path
            slot = slots[path] if path in slots else slots.setdefault(path, _slot(targets[path], source.entry.layers))
            _fill(slot.blocks(source.layer), checkpoint, source, check_finite, pool)
            slot.done(source.layer)
            left[path] -= 1
            if not left[path]:  # waits, or transfers would run ahead with more tensors in host memory
                params[path] = jax.block_until_ready(slots.pop(path).array())
            bar.update(source.info.nbytes)
    logger.info("read %.3f GB of %s", (checkpoint.bytes_read - read_before) / 1e9, checkpoint.path)
    return unflatten_dict(params, sep="/")


@dataclasses.dataclass(frozen=True)
class Source:
    """One published tensor, found, and the entry (and layer) it is for."""

    name: str
    info: Tensor
    entry: Entry
    layer: int | None


def match(
    checkpoint: Checkpoint, table: Sequence[Entry], targets: Mapping[str, Any], ignore: Sequence[str]
) -> list[Source]:
    """Finds every tensor the table asks for and checks names, shapes and kinds of dtype against the headers."""
    sources, wrong, known = [], [], set()
    for entry in table:
        target = targets[entry.path]
        expected = published_shape(entry, target.shape)
        for layer in entry.tensors:
            names = entry.names(layer)
            found = [name for name in names if name in checkpoint.tensors]
            known.update(found)
            if not found:
                wrong.append(f"{' or '.join(names)} is missing (expected shape {list(expected)})")
                continue
            info = checkpoint.tensors[found[0]]
            if info.shape != expected:
                wrong.append(f"{found[0]} has shape {list(info.shape)}, expected {list(expected)}")
            elif _kind(DTYPES[info.dtype]) != _kind(target.dtype):
                wrong.append(f"{found[0]} has dtype {info.dtype}, expected one that becomes {target.dtype}")
            for other in found[1:]:
                if not _equal(checkpoint, found[0], other):
                    wrong.append(f"{other} differs from {found[0]}, which this network ties to it")
            sources.append(Source(found[0], info, entry, layer))
    extra = [name for name in checkpoint.tensors if name not in known]
    extra = [name for name in extra if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)]
    wrong += [f"{name} is not a tensor of this network (list it in ignore to skip it)" for name in extra]
    if wrong:
        if packed := [name for name in extra if name.startswith(SINGLE_FILE)]:
            raise UserError(
                f"{checkpoint.path}: {packed[0]} is a name of a single-file checkpoint (ComfyUI and the like); "
                "expected diffusers' layout, as its `save_pretrained` writes it after `from_single_file`"
            )
        more = f" (and {len(wrong) - 1} more such errors)" if len(wrong) > 1 else ""
        raise UserError(f"{checkpoint.path}: {wrong[0]}{more}")
    return sources


def _kind(dtype: np.dtype) -> str:
    return "float" if jnp.issubdtype(dtype, jnp.floating) else "bool" if dtype == np.bool_ else "int"


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    a, b = checkpoint.tensors[one], checkpoint.tensors[other]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    boxes = [box for box, _ in _pieces(SAME, tuple((0, n) for n in a.shape), DTYPES[a.dtype].itemsize)]
    return all(np.array_equal(checkpoint.read(one, box), checkpoint.read(other, box)) for box in boxes)


def _index(box: Box, origin: Box) -> tuple[Any, ...]:
    slices = (slice(start - first, stop - first) for (start, stop), (first, _) in zip(box, origin, strict=True))
    return (*slices, ...)  # with the ellipsis a scalar stays an array, too


def _size(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _pieces(
    transform: Transform, box: Box, itemsize: int, most: int = BLOCK_BYTES
) -> list[tuple[Box, tuple[Box, Box] | None]]:
    """Halves a block of a parameter until each part reads at most ``most`` bytes of consecutive rows of the file."""
    window = transform.window(box)
    if window is None or _size(window[0]) * itemsize <= most:
        return [(box, window)]
    for axis, (start, stop) in enumerate(box):
        if stop - start < 2:
            continue
        half = transform.window((*box[:axis], (start, (start + stop) // 2), *box[axis + 1 :]))
        if half is None or half[0][0] == window[0][0] or half[1][axis][1] >= stop:
            continue
        middle = half[1][axis][1]
        return [
            piece
            for part in ((start, middle), (middle, stop))
            for piece in _pieces(transform, (*box[:axis], part, *box[axis + 1 :]), itemsize, most)
        ]
    return [(box, window)]


def _fill(
    blocks: Sequence[tuple[Box, np.ndarray]],
    checkpoint: Checkpoint,
    source: Source,
    check_finite: bool,
    pool: ThreadPoolExecutor,
) -> None:
    """Copies one published tensor into the blocks of its parameter: (box inside the parameter, memory to fill)."""
    transform = source.entry.transform

    def values(box: Box | None, dtype: np.dtype) -> np.ndarray:
        x = _cast(checkpoint.read(source.name, box), dtype)
        if check_finite and not _finite(x):
            raise UserError(f"{source.info.file}: {source.name} holds NaN or infinity as {dtype}")
        return transform.forward(x)

    def copy(job: tuple[Box, np.ndarray, Box, tuple[Box, Box]]) -> None:
        box, block, piece, (wanted, covered) = job
        block[_index(piece, box)] = values(wanted, block.dtype)[_index(piece, covered)]

    jobs, whole = [], None
    most = BLOCK_BYTES if checkpoint.local else FETCHED_BYTES
    for box, block in blocks:
        for piece, window in _pieces(transform, box, DTYPES[source.info.dtype].itemsize, most):
            if window is not None:
                jobs.append((box, block, piece, window))
                continue
            whole = values(None, block.dtype) if whole is None else whole
            block[_index(piece, box)] = whole[_index(piece, ((0, 0),) * len(piece))]
    jobs.sort(key=lambda job: job[3][0][:1])  # by rows, which devices that hold other columns then share
    for _ in pool.map(copy, jobs):
        pass


def _cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A contiguous copy in another dtype. Numbers that do not fit become infinite without a warning."""
    if x.dtype == BFLOAT16 and dtype == np.float32:  # numpy has no fast loop for it
        wide = x.view(np.uint16).astype(np.uint32, order="C")
        return np.left_shift(wide, 16, out=wide).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(dtype, order="C")


def _finite(x: np.ndarray) -> bool:
    """Compares bits: as integers, NaN and infinity are the largest of their sign. Faster than ``isfinite``, no copy."""
    if not x.size or not jnp.issubdtype(x.dtype, jnp.floating):
        return True
    signed, unsigned = np.dtype(f"i{x.itemsize}"), np.dtype(f"u{x.itemsize}")
    infinity = np.array(np.inf, x.dtype)
    return bool(x.view(signed).max() < infinity.view(signed) and x.view(unsigned).max() < (-infinity).view(unsigned))


class _HostSlot:
    """A parameter assembled in host memory, one buffer for each distinct block of its local devices.

    The CPU backend takes an aligned buffer over as it is, so there nothing is copied again and replicas share one.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None):
        self.shape, self.dtype, self.sharding = shape, dtype, sharding
        self.boxes: dict[Any, Box] = {None: tuple((0, size) for size in shape)}
        if sharding is not None:
            self.boxes = {
                device: tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
                for device, index in sharding.addressable_devices_indices_map(shape).items()
            }
        self.buffers = {box: _aligned(tuple(b - a for a, b in box), dtype) for box in self.boxes.values()}

    def blocks(self, layer: int | None) -> list[tuple[Box, np.ndarray]]:
        """What to fill for one tensor: the box it covers of the parameter (or of its layer), and the memory."""
        if layer is None:
            return list(self.buffers.items())
        return [
            (box[1:], buffer[layer - box[0][0], ...])
            for box, buffer in self.buffers.items()
            if box[0][0] <= layer < box[0][1]
        ]

    def done(self, layer: int | None) -> None:
        """Called when the blocks of a tensor are filled."""

    def array(self) -> jax.Array:
        """The parameter on its devices."""
        if self.sharding is None:
            return jax.device_put(self.buffers[self.boxes[None]])
        arrays = [jax.device_put(self.buffers[box], device) for device, box in self.boxes.items()]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays, dtype=self.dtype)


class _DeviceSlot:
    """A stack that grows on the devices, so that the host holds one layer of it at a time."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None):
        self.shape, self.dtype, self.sharding = shape, dtype, sharding
        self.stack = jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)()

    def blocks(self, layer: int) -> list[tuple[Box, np.ndarray]]:
        """What to fill for one layer."""
        sharding = self.sharding
        if isinstance(sharding, NamedSharding):
            sharding = sharding.update(spec=PartitionSpec(*sharding.spec[1:]))
        self.layer = _HostSlot(self.shape[1:], self.dtype, sharding)
        return self.layer.blocks(None)

    def done(self, layer: int) -> None:
        """Moves a filled layer into the stack; waits, or the host would run ahead with more layers in memory."""
        self.stack = jax.block_until_ready(_set_layer(self.stack, self.layer.array(), layer))
        del self.layer

    def array(self) -> jax.Array:
        """The parameter on its devices."""
        return self.stack


@partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, layer: jax.Array, i: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, i, axis=0)


def _slot(struct: Any, layers: int | None) -> _HostSlot | _DeviceSlot:
    kind = _HostSlot if layers is None or _in_host_memory(struct.sharding) else _DeviceSlot
    return kind(struct.shape, np.dtype(struct.dtype), struct.sharding)


def _in_host_memory(sharding: Sharding | None) -> bool:
    devices = jax.local_devices()[:1] if sharding is None else sharding.device_set
    return all(device.platform == "cpu" for device in devices)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that the CPU backend can take over: it must start at a multiple of 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
