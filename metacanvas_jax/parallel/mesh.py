"""The device mesh, and batches spread over it."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.activations import using
from metacanvas_jax.parallel.rules import RULES, Rules, resolve

AXES = ("data", "fsdp", "context", "tensor")
FrozenPart = Literal["mllm", "vae", "text"]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. One axis may be -1: it takes all devices that the others leave.

    ``data`` and ``fsdp`` split the batch. Devices along ``data`` hold copies of the parameters; those along ``fsdp``
    hold shards of them and gather a layer when it is used. ``context`` splits the sequence of latent tokens, ``tensor``
    splits heads and the hidden widths of feed-forward layers.

    Several TPU slices are joined by the data-centre network, which is about ten times slower than the links inside a
    slice. Only the axis ``across_slices`` uses that network; its size is a multiple of the number of slices. "data"
    exchanges gradients there once per step, "fsdp" parameters in every layer.

    ``whole`` names frozen parts of the model ("mllm", "vae", "text") that are not sharded along ``fsdp``, except for
    their adapters. Every device holds all of such a part, or the heads and hidden widths that it computes where the
    devices along ``tensor`` (and, in the MLLM, along ``context``) split these. It costs memory and saves an all-gather
    of the part in every pass. That pays for a large MLLM, whose passes over a canvas are short.
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    across_slices: Literal["data", "fsdp"] = "data"
    whole: tuple[FrozenPart, ...] = ()

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in AXES]
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise UserError(f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes are positive, at most one is -1")


PRESETS: dict[str, MeshConfig] = {
    # Every device holds all parameters: for models that fit into one device.
    "data": MeshConfig(),
    # Parameters, gradients and optimizer state are sharded. The first choice if each device has at least one sample.
    "fsdp": MeshConfig(data=1, fsdp=-1),
    # Four neighbours also share heads and feed-forward layers: for fewer samples than devices, and smaller all-gathers.
    "fsdp+tensor": MeshConfig(data=1, fsdp=-1, tensor=4),
    # Four neighbours also share the tokens of a sample: for videos, whose activations need most of the memory.
    "fsdp+context": MeshConfig(data=1, fsdp=-1, context=4),
}


def mesh_sizes(config: MeshConfig, devices: int, slices: int = 1) -> tuple[int, ...]:
    """Sizes of the four axes on so many devices (of all slices together).

    Raises:
        UserError: the sizes do not multiply to the number of devices, or the slices do not divide their axis.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % known:
        given = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True) if size > 1)
        raise UserError(f"mesh {given} does not divide {devices} device{'s' * (devices > 1)}")
    sizes = [devices // known if size == -1 else size for size in sizes]
    product = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if math.prod(sizes) != devices:
        raise UserError(f"mesh {product} = {math.prod(sizes)} does not fit {devices} devices")
    if sizes[AXES.index(config.across_slices)] % slices:
        raise UserError(
            f"mesh {product}: the axis {config.across_slices!r} reaches across the {slices} slices, so its size must "
            f"be a multiple of {slices}"
        )
    return tuple(sizes)


def parse_mesh(text: str) -> MeshConfig:
    """The mesh of ``data=1,fsdp=32,tensor=4``; axes without a size are 1. Raises UserError for other text."""
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis.strip() not in AXES or not size.strip().removeprefix("-").isdigit():
            raise UserError(f"--mesh {text!r}: expected AXIS=N,... with axes {', '.join(AXES)}, found {part!r}")
        sizes[axis.strip()] = int(size)
    return MeshConfig(**sizes)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices (of all processes), or over ``devices``; neighbours on an axis are near in the torus.

    Raises:
        UserError: as ``mesh_sizes``.
    """
    array = mesh_array(config, jax.devices() if devices is None else list(devices))
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_array(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """The devices in the order of a mesh, one axis of the array per axis of the mesh."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = mesh_sizes(config, len(devices), slices)
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    outer = tuple(slices if axis == config.across_slices else 1 for axis in AXES)
    inner = tuple(size // many for size, many in zip(sizes, outer, strict=True))
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


@contextlib.contextmanager
def on_mesh(mesh: Mesh, rules: Rules = RULES, *, abstract: bool = False) -> Iterator[None]:
    """While open, names of axes inside traced code mean this mesh and these rules.

    ``abstract`` is for a mesh of devices that are not there (ahead-of-time compilation for a described topology).
    """
    scope = jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if abstract else jax.set_mesh(mesh)
    with scope, using(rules):
        yield


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_part(mesh: Mesh, rules: Rules = RULES, process: int | None = None) -> tuple[int, int]:
    """Which part of every batch this process reads: (number of the part, number of parts).

    Processes whose devices hold the same samples (a tensor or context axis that reaches across hosts) have the same
    number, and must bring the same samples.

    Raises:
        UserError: the devices of some processes hold overlapping but different samples.
    """
    return _batch_part(mesh, rules, jax.process_index() if process is None else process)


@functools.lru_cache(maxsize=8)
def _batch_part(mesh: Mesh, rules: Rules, process: int) -> tuple[int, int]:
    axes = resolve(("batch",), None, mesh, rules)[0]
    axes = (axes,) if isinstance(axes, str) else axes or ()
    order = [AXES.index(axis) for axis in axes]
    rest = [i for i in range(len(AXES)) if i not in order]
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices).transpose(*order, *rest)
    owners = owners.reshape(math.prod(mesh.devices.shape[i] for i in order), -1)
    shares = {int(p): tuple(np.flatnonzero((owners == p).any(axis=1))) for p in np.unique(owners)}
    parts = sorted(set(shares.values()))
    if sum(len(part) for part in parts) != len(owners) or len({len(part) for part in parts}) != 1:
        raise UserError(
            f"mesh {dict(mesh.shape)}: the devices of the {len(shares)} processes hold batch slices {shares}, expected "
            "each slice with one process, or the same slices with several; make tensor times context a multiple or a "
            "divisor of the devices of a process"
        )
    return parts.index(shares[process]), len(parts)


def batch_shards(mesh: Mesh, rules: Rules = RULES) -> int:
    """Into how many parts the devices of a mesh split the samples of a batch."""
    axes = resolve(("batch",), None, mesh, rules)[0]
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def put_batch(batch: PyTree, mesh: Mesh, rules: Rules = RULES) -> PyTree:
    """Host arrays to the mesh, samples (first axis) spread by the rule of "batch"; each process brings its own samples.

    Raises:
        UserError: the samples of all processes do not divide among the devices that split the batch.
    """
    _, parts = batch_part(mesh, rules)

    def put(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        shape = (x.shape[0] * parts, *x.shape[1:])
        return jax.make_array_from_process_local_data(_samples(shape[0], mesh, rules), x, shape)

    return jax.tree.map(put, batch)


def placed_batch(batch: PyTree, mesh: Mesh, rules: Rules = RULES) -> PyTree:
    """A whole batch as shapes, with the places that ``put_batch`` gives it. Raises UserError as it does."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_samples(x.shape[0], mesh, rules)), batch
    )


def _samples(count: int, mesh: Mesh, rules: Rules) -> NamedSharding:
    spec = resolve(("batch",), (count,), mesh, rules)
    if spec != resolve(("batch",), None, mesh, rules):
        raise UserError(f"a batch of {count} samples does not divide among the devices of mesh {dict(mesh.shape)}")
    return NamedSharding(mesh, spec)
