"""TPU slices by name, described by the compiler. This needs libtpu, but no TPU.

Names are those of Google Cloud: GENERATION:SIZE. It is not checked whether Google Cloud offers a size.
"""

import dataclasses
import importlib.util

from jax.experimental import topologies

from metacanvas_jax.errors import UserError, first_line
from metacanvas_jax.hardware import EXAMPLES, Chip, slice_name


@dataclasses.dataclass(frozen=True)
class Slice:
    """A named slice: ``name`` as the user wrote it, its chip, and its devices, in ``slices`` equal groups."""

    name: str
    chip: Chip
    slices: int
    devices: tuple

    @property
    def size(self) -> int:
        """Number of devices."""
        return len(self.devices)


def find_slice(name: str) -> Slice:
    """The devices of a named slice. This needs libtpu, but no TPU.

    Raises:
        UserError: the name is malformed or unknown to the compiler, or libtpu is not installed.
    """
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
