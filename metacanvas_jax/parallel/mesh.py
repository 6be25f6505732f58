"""The device mesh, and batches spread over it."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.rules import RULES, Rules, resolve

AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; at most one may be -1 and takes what the others leave.

    ``data`` holds copies of the parameters, ``fsdp`` holds slices of them and gathers them when used (both split the
    batch), ``context`` splits the sequence of latent tokens, ``tensor`` splits heads and feed-forward widths.
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in AXES]
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise UserError(f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes are positive, at most one is -1")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices (of all processes), or over ``devices``.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise UserError(f"mesh {dataclasses.asdict(config)} does not fit {len(devices)} devices")
    return jax.make_mesh(tuple(sizes), AXES, (AxisType.Auto,) * len(AXES), devices=devices)


@contextlib.contextmanager
def on_mesh(mesh: Mesh, rules: Rules = RULES) -> Iterator[None]:
    """While open, logical constraints inside traced code mean this mesh and these rules."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: PyTree, mesh: Mesh, rules: Rules = RULES) -> PyTree:
    """Host arrays to the mesh, samples (first axis) spread by the rule of "batch"; each process brings its own samples.

    Raises:
        UserError: the samples of all processes do not divide among the devices that split the batch.
    """

    def put(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        shape = (x.shape[0] * jax.process_count(), *x.shape[1:])
        spec = resolve(("batch",), shape[:1], mesh, rules)
        if spec != resolve(("batch",), None, mesh, rules):
            raise UserError(
                f"a batch of {shape[0]} samples does not divide among the devices of mesh {dict(mesh.shape)}"
            )
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x, shape)

    return jax.tree.map(put, batch)
