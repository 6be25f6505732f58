"""On which devices the parameters of a drawing lie, and how: the devices at hand, whatever those of the training were.

Parameters that take at most half of a device's memory are copied to every device, and the prompts are split over the
axis ``data``. Larger ones are cut over the axis ``fsdp``, which splits the prompts as well.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.hardware import chip_of
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh
from metacanvas_jax.parallel.rules import placed, shardings
from metacanvas_jax.train import parameters
from metacanvas_jax.trees import flat, nested
from metacanvas_jax.types import Params

SHARE = 0.5  # of a device's memory that copies of the parameters may take; the rest is for pictures being drawn


def mesh_for(
    setup: Experiment,
    needs: Mapping[str, np.dtype] | None = None,
    *,
    results: int | None = None,
    chosen: MeshConfig | None = None,
) -> Mesh:
    """The mesh of a drawing of so many ``results`` (None: many) over all devices of all processes.

    ``needs`` are the parameters that it reads, ``chosen`` a mesh that the user asks for. A process alone takes one
    device where more would only repeat its work: for a single result, and on a CPU, whose devices are one machine.

    Raises UserError for a chosen mesh that does not fit the devices.
    """
    devices = jax.devices()
    if chosen is not None:
        return make_mesh(chosen, devices)
    config = config_for(
        sum(math.prod(x.shape) * x.dtype.itemsize for x in flat(abstract(setup, needs)).values()),
        memory_of(jax.local_devices()[0], len(devices)),
        len({getattr(device, "slice_index", 0) for device in devices}),
    )
    if jax.process_count() == 1 and (devices[0].platform == "cpu" or (config.fsdp == 1 and results == 1)):
        return make_mesh(MeshConfig(), devices[:1])
    return make_mesh(config, devices)


def config_for(nbytes: float, memory: float, slices: int = 1) -> MeshConfig:
    """Copies of parameters of so many bytes on devices with so much memory, or shards of them inside every slice."""
    return MeshConfig() if nbytes <= SHARE * memory else MeshConfig(data=slices, fsdp=-1)


def memory_of(device: Any, devices: int) -> float:
    """Bytes of memory of a device of this process, others cannot be asked; on a CPU its share of this machine's."""
    stats = device.memory_stats() or {}
    chip = chip_of(device.device_kind)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    return float(stats.get("bytes_limit") or (chip.hbm if chip else whole))


def abstract(setup: Experiment, needs: Mapping[str, np.dtype] | None = None, mesh: Mesh | None = None) -> Params:
    """Parameters as shapes, in the dtypes that a drawing holds them in, with their places on a mesh if one is given.

    ``needs`` are those that it reads and their dtypes (`Painter.needs`); without it they are all, as in training.
    """
    boxed = parameters.boxed(setup)
    shapes = parameters.param_shapes(setup) if mesh is None else placed(boxed, shardings(boxed, mesh))
    held = flat(parameters.as_held(setup, shapes))
    if needs is None:
        return nested(held)
    return nested({path: held[path].update(dtype=needs[path]) for path in held if path in needs})
