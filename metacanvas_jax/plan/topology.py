"""TPU slices by name: their chips' public figures, and their devices without the hardware.

Names are ``GENERATION:SIZE``, with ``*N`` behind for N slices joined by the data-centre network: ``v5p:4x4x8``,
``v6e:16x16*2``. Names are not checked against what can be bought.
"""

import dataclasses
import importlib.util
import re

from jax.experimental import topologies

from metacanvas_jax.errors import UserError

GIB = 2**30
NAME = re.compile(r"(v4|v5e|v5p|v6e|tpu7x):(\d+(?:x\d+){1,2})(?:\*(\d+))?")
EXAMPLES = "v5e:4x4, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, or v5p:4x4x4*2 for two slices"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One jax device of a TPU generation (a whole chip; on tpu7x one of the two cores of a chip).

    ``flops`` is the peak of bfloat16 products per second, ``hbm`` the bytes that the compiler lets a program use,
    ``hbm_bandwidth`` bytes per second. ``link`` is what one inter-chip link carries each way per second; a collective
    is reckoned at two links, a ring both ways around one axis of the torus. ``network`` is the share of its host's
    data-centre network. ``clock`` (Hz) turns the compiler's cycles into seconds; it follows from the peak.

    Sources: cloud.google.com/tpu/docs/system-architecture-tpu-vm; ``hbm`` from the compiler's own messages.
    """

    name: str
    kind: str
    flops: float
    hbm: float
    hbm_bandwidth: float
    clock: float
    link: float
    network: float

    @property
    def ring(self) -> float:
        """Bytes per second and device of a collective inside a slice."""
        return 2 * self.link


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 275e12, 30.75 * GIB, 1.23e12, 1.05e9, 50e9, 6.25e9),
        Chip("v5e", "TPU v5 lite", 197e12, 15.75 * GIB, 0.82e12, 1.5e9, 50e9, 3.1e9),
        Chip("v5p", "TPU v5", 459e12, 95.74 * GIB, 2.765e12, 1.75e9, 100e9, 6.25e9),
        Chip("v6e", "TPU v6 lite", 918e12, 31.25 * GIB, 1.64e12, 1.75e9, 100e9, 6.25e9),
        Chip("tpu7x", "TPU7x", 1153.5e12, 94.75 * GIB, 3.7e12, 2.2e9, 100e9, 6.25e9),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A named slice: ``name`` as it was given, its chip, its devices in ``slices`` equal parts."""

    name: str
    chip: Chip
    slices: int
    devices: tuple

    @property
    def size(self) -> int:
        """Number of devices."""
        return len(self.devices)


def find_slice(name: str) -> Slice:
    """Devices of a named slice; no TPU is needed, but libtpu is.

    Raises:
        UserError: a name that is none, or that the compiler does not know, or libtpu is not installed.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise UserError(f"--topology {name!r} is no name of a TPU slice; expected GENERATION:SIZE, as in {EXAMPLES}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs libtpu: pip install 'metacanvas_jax[tpu]'")
    generation, size, slices = match.group(1), match.group(2), int(match.group(3) or 1)
    options: dict = {"num_slices": slices} if slices > 1 else {}
    if generation == "v4":
        options["chip_config_name"] = "megacore"
    if set(size.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"{generation}:{size}", **options)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--topology {name!r}: {generation} has no slice of {size} chips ({_first_line(error)}); "
            f"sides are multiples of a host's 2x2x1, as in {EXAMPLES}"
        ) from error
    return Slice(name, CHIPS[generation], slices, tuple(described.devices))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
