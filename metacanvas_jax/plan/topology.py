"""TPU slices and GPUs by name, described by the compiler. This needs the compiler, but no TPU and no GPU.

Names of slices are those of Google Cloud: GENERATION:SIZE. It is not checked whether Google Cloud offers a size. GPUs
are named GPU:NUMBER.
"""

import dataclasses
import importlib.util

from jax.experimental import topologies

from metacanvas_jax.errors import UserError, first_line
from metacanvas_jax.hardware import EXAMPLES, Chip, gpu_name, slice_name
from metacanvas_jax.plan import gpu


@dataclasses.dataclass(frozen=True)
class Slice:
    """A named slice, or GPUs: ``name`` as the user wrote it, the chip, and the devices, in ``slices`` equal groups."""

    name: str
    chip: Chip
    slices: int
    devices: tuple

    @property
    def size(self) -> int:
        """Number of devices."""
        return len(self.devices)

    @property
    def limit(self) -> float:
        """Bytes of a device that a program may use."""
        return self.chip.hbm if self.chip.gpu is None else gpu.memory(self.chip)


def find_slice(name: str) -> Slice:
    """The devices of a named slice, or named GPUs. This needs libtpu or CUDA's compiler, but no TPU and no GPU.

    Raises:
        UserError: the name is malformed or unknown to the compiler, or the compiler is not installed.
    """
    if (found := gpu_name(name)) is not None:
        chip, count = found
        return Slice(name, chip, 1, gpu.devices(chip, count))
    parts = slice_name(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs libtpu: pip install 'metacanvas_jax[tpu]'")
    generation, size, slices = parts.chip.name, parts.size, parts.slices
    options: dict = {"num_slices": slices} if slices > 1 else {}
    if generation == "v4":
        options["chip_config_name"] = "megacore"
    if set(size.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"{generation}:{size}", **options)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--topology {name!r}: {generation} has no slice of {size} chips ({first_line(error)}); "
            f"sides are multiples of a host's 2x2x1, as in {EXAMPLES}"
        ) from error
    return Slice(name, parts.chip, slices, tuple(described.devices))
