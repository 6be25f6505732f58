"""The chips that programs are planned for and run on: one table of what their makers state, and the names of slices."""

import dataclasses
import math
import re

from metacanvas_jax.errors import UserError

MIB, GIB = 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a kind: a GPU, or a TPU chip (on tpu7x one of the two cores of a chip).

    ``kinds`` are the names that JAX gives to the device. ``flops`` is the peak of bfloat16 products per second, ``hbm``
    the bytes of memory that the compiler lets a program use, ``hbm_bandwidth`` bytes per second.

    The rest is 0 for GPUs. ``vmem`` is the on-chip vector memory of a core in bytes. ``clock`` (Hz) turns the
    compiler's cycles into seconds; it follows from the peak. ``link`` is the bytes per second that one inter-chip link
    carries each way. ``network`` is a device's share of the bytes per second of its host's data-centre network.

    Sources: cloud.google.com/tpu/docs/system-architecture-tpu-vm, with ``hbm`` from the compiler's own messages; the
    data sheets of NVIDIA.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    hbm: float
    hbm_bandwidth: float
    vmem: int = 0
    clock: float = 0.0
    link: float = 0.0
    network: float = 0.0
    cores: int = 1  # JAX devices of one chip

    @property
    def ring(self) -> float:
        """Bytes per second and device of a collective inside a slice: a ring uses two links, one in each direction."""
        return 2 * self.link


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", ("TPU v4",), 275e12, 30.75 * GIB, 1.23e12, 16 * MIB, 1.05e9, 50e9, 6.25e9),
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 0.82e12, 128 * MIB, 1.5e9, 50e9, 3.1e9),
        Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95.74 * GIB, 2.765e12, 64 * MIB, 1.75e9, 100e9, 6.25e9),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GIB, 1.64e12, 128 * MIB, 1.75e9, 100e9, 6.25e9),
        Chip("tpu7x", ("TPU7x", "TPU 7x"), 1153.5e12, 94.75 * GIB, 3.7e12, 64 * MIB, 2.2e9, 100e9, 6.25e9, cores=2),
        Chip("a100-40", ("NVIDIA A100-SXM4-40GB",), 312e12, 40 * GIB, 1.555e12),
        Chip("a100-80", ("NVIDIA A100-SXM4-80GB",), 312e12, 80 * GIB, 2.039e12),
        Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 80 * GIB, 3.35e12),
        Chip("h200", ("NVIDIA H200",), 989e12, 141e9, 4.8e12),
    )
}
TPUS = tuple(chip.name for chip in CHIPS.values() if chip.clock)  # by generation, the newest last


def chip_of(kind: str) -> Chip | None:
    """The chip of a device by the name that JAX gives to its kind; None where it is not known, as for a CPU."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)


NAME = re.compile(rf"({'|'.join(TPUS)}):(\d+(?:x\d+){{1,2}})(?:\*(\d+))?")
EXAMPLES = "v5e:4x4, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, or v5p:4x4x4*2 for two slices"


@dataclasses.dataclass(frozen=True)
class SliceName:
    """The name of a TPU slice, such as v5p:4x4x4, or v5p:4x4x4*2 for two slices, taken apart."""

    chip: Chip
    size: str
    slices: int

    @property
    def chips(self) -> int:
        """Number of chips in all slices."""
        return math.prod(int(side) for side in self.size.split("x")) * self.slices

    @property
    def devices(self) -> int:
        """Number of JAX devices in all slices."""
        return self.chips * self.chip.cores

    def __str__(self) -> str:
        many = f"{self.slices} x " if self.slices > 1 else ""
        return f"{self.chips} TPU {self.chip.name.removeprefix('tpu')} chips ({many}{self.size})"


def slice_name(name: str, key: str = "--topology") -> SliceName:
    """The parts of a slice's name. Raises UserError, which begins with ``key``, for what is no such name."""
    match = NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{key} {name!r} is no name of a TPU slice; expected GENERATION:SIZE, as in {EXAMPLES}")
    return SliceName(CHIPS[match.group(1)], match.group(2), int(match.group(3) or 1))
