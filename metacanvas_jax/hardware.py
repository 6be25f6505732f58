"""The chips that programs are planned for and run on, and the slices that Google Cloud offers of them.

The tables state what the makers publish; imports nothing but the standard library.
"""

import dataclasses
import importlib.util
import math
import re
from pathlib import Path

from metacanvas_jax.errors import UserError

MIB, GIB = 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the compiler has to know of a GPU that is not there.

    ``capability`` is the compute capability, ``units`` the number of multiprocessors, each of which holds ``threads``
    threads, has ``lanes`` float32 units and ``shared`` bytes of shared memory. ``l2`` is in bytes, ``clock`` in GHz.
    ``nvlink`` is the bytes per second that all NVLinks of a GPU carry each way; 0 for a GPU without.

    Sources: xla/backends/gpu/target_config/specs in openxla/xla, the data sheets of NVIDIA, and the table of compute
    capabilities in the CUDA programming guide.
    """

    capability: tuple[int, int]
    units: int
    threads: int
    lanes: int
    shared: int
    l2: int
    clock: float
    nvlink: float = 0.0


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a kind: a GPU, or a TPU chip (on tpu7x one of the two cores of a chip).

    ``kinds`` are the names that JAX gives to the device. ``flops`` is the peak of bfloat16 products per second, without
    sparsity and with float32 sums. ``hbm`` is the bytes of memory: of a TPU those that the compiler lets a program use,
    of a GPU those that its driver reports. ``hbm_bandwidth`` is in bytes per second. ``gpu`` is None for TPUs.

    The rest is 0 for GPUs. ``vmem`` is the on-chip vector memory of a core in bytes. ``clock`` (Hz) turns the
    compiler's cycles into seconds; it follows from the peak. ``link`` is the bytes per second that one inter-chip link
    carries each way. ``network`` is a device's share of the bytes per second of its host's data-centre network.

    Sources: cloud.google.com/tpu/docs/system-architecture-tpu-vm, with ``hbm`` from the compiler's own messages; the
    data sheets of NVIDIA, with ``hbm`` of data-centre GPUs as in openxla/xla (see ``Gpu``).
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
    torus: int = 3  # dimensions of a slice, with two links of each device in each
    gpu: Gpu | None = None

    @property
    def ring(self) -> float:
        """Bytes per second and device of a collective inside a slice.

        On TPUs a ring uses two links, one in each direction; on GPUs all NVLinks.
        """
        return 2 * self.link if self.gpu is None else self.gpu.nvlink

    @property
    def pair(self) -> float:
        """Bytes per second and device between two devices, which one link of a torus joins."""
        return self.link if self.gpu is None else self.gpu.nvlink


def ada(units: int, l2: int, clock: float) -> Gpu:
    """A GPU of the generation Ada Lovelace; ``l2`` is in MiB."""
    return Gpu((8, 9), units, 1536, 128, 102400, l2 * MIB, clock)


GA100 = Gpu((8, 0), 108, 2048, 64, 167936, 40 * MIB, 1.41, 300e9)
GA102 = Gpu((8, 6), 82, 1536, 128, 102400, 6 * MIB, 1.695)
GH100 = Gpu((9, 0), 132, 2048, 128, 233472, 50 * MIB, 1.98, 450e9)

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", ("TPU v4",), 275e12, 30.75 * GIB, 1.23e12, 16 * MIB, 1.05e9, 50e9, 6.25e9),
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 0.82e12, 128 * MIB, 1.5e9, 50e9, 3.1e9, torus=2),
        Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95.74 * GIB, 2.765e12, 64 * MIB, 1.75e9, 100e9, 6.25e9),
        Chip(
            "v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GIB, 1.64e12, 128 * MIB, 1.75e9, 100e9, 6.25e9, torus=2
        ),
        Chip("tpu7x", ("TPU7x", "TPU 7x"), 1153.5e12, 94.75 * GIB, 3.7e12, 64 * MIB, 2.2e9, 100e9, 6.25e9, cores=2),
        Chip("a100-40", ("NVIDIA A100-SXM4-40GB",), 312e12, 42331013120, 1.555e12, gpu=GA100),
        Chip("a100-80", ("NVIDIA A100-SXM4-80GB",), 312e12, 85100068864, 2.039e12, gpu=GA100),
        Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 84942979072, 3.35e12, gpu=GH100),
        Chip("h200", ("NVIDIA H200",), 989e12, 140 * GIB, 4.8e12, gpu=GH100),
        Chip("l4", ("NVIDIA L4",), 121e12, 22.5 * GIB, 300e9, gpu=ada(58, 48, 2.04)),
        Chip("l40s", ("NVIDIA L40S",), 362e12, 45 * GIB, 864e9, gpu=ada(142, 96, 2.52)),
        Chip("rtx3090", ("NVIDIA GeForce RTX 3090",), 71e12, 24 * GIB, 936e9, gpu=GA102),
        Chip("rtx4090", ("NVIDIA GeForce RTX 4090",), 165.2e12, 24 * GIB, 1.008e12, gpu=ada(128, 72, 2.52)),
    )
}
TPUS = tuple(chip.name for chip in CHIPS.values() if chip.gpu is None)  # by generation, the newest last
GPUS = tuple(chip.name for chip in CHIPS.values() if chip.gpu is not None)


def chip_of(kind: str) -> Chip | None:
    """The chip of a device by the name that JAX gives to its kind; None where it is not known, as for a CPU."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)


TPU_FILES, GPU_FILES = ("accel*", "vfio/[0-9]*"), ("nvidia[0-9]*", "kfd")  # of drivers, below /dev


def platforms(devices: Path = Path("/dev")) -> str | None:
    """The value of JAX_PLATFORMS for a machine that has libtpu, as for planning, and no TPU; None elsewhere.

    JAX would load libtpu first, which then complains on stderr that it cannot find out which TPU it has.
    """
    if importlib.util.find_spec("libtpu") is None or any(any(devices.glob(files)) for files in TPU_FILES):
        return None
    return None if any(any(devices.glob(files)) for files in GPU_FILES) else "cpu"


NAME = re.compile(rf"({'|'.join(TPUS)}):(\d+(?:x\d+){{1,2}})(?:\*(\d+))?")
EXAMPLES = "v5e:4x4, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, or v5p:4x4x4*2 for two slices"


@dataclasses.dataclass(frozen=True)
class Machine:
    """A TPU VM, the host of ``chips`` chips: its machine type on GKE and the GB of its memory."""

    name: str
    chips: int
    memory: int


@dataclasses.dataclass(frozen=True)
class Offer:
    """How Google Cloud offers a generation.

    ``accelerator`` is the beginning of the accelerator type; a number of chips follows, or of TensorCores where
    ``counted`` is 2. ``runtime`` is the system image of a TPU VM (empty: the generation is offered on GKE alone),
    ``node`` the selector of node pools on GKE. ``machines`` are the kinds of TPU VMs. A slice of one VM has the machine
    with exactly its chips; a larger slice has VMs with four chips each, although two such VMs of v5e and v6e lie on one
    physical host of eight chips. ``flat`` lists all sizes of a generation whose torus has two dimensions.

    Sources: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x (sizes, VMs, memory) and regions-zones, as of
    November 2026.
    """

    accelerator: str
    counted: int
    runtime: str
    node: str
    machines: tuple[Machine, ...]
    zones: tuple[str, ...]
    flat: tuple[str, ...] = ()


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
OFFERS = {
    "v4": Offer(
        "v4-", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice", (Machine("ct4p-hightpu-4t", 4, 407),), ("us-central2-b",)
    ),
    "v5e": Offer(
        "v5litepod-",
        1,
        "v2-alpha-tpuv5-lite",
        "tpu-v5-lite-podslice",
        tuple(Machine(f"ct5lp-hightpu-{chips}t", chips, 48 * chips) for chips in (1, 4, 8)),
        ("us-central1-a", "us-south1-a", "us-west1-c", "us-west4-a", "europe-west4-b"),
        FLAT,
    ),
    "v5p": Offer(
        "v5p-",
        2,
        "v2-alpha-tpuv5",
        "tpu-v5p-slice",
        (Machine("ct5p-hightpu-4t", 4, 448),),
        ("us-east5-a", "us-central1-a", "europe-west4-b"),
    ),
    "v6e": Offer(
        "v6e-",
        1,
        "v2-alpha-tpuv6e",
        "tpu-v6e-slice",
        (
            Machine("ct6e-standard-1t", 1, 176),
            Machine("ct6e-standard-4t", 4, 720),
            Machine("ct6e-standard-8t", 8, 1440),
        ),
        ("us-east5-a", "us-east5-b", "us-central1-b", "us-east1-d", "europe-west4-a"),
        FLAT,
    ),
    "tpu7x": Offer("tpu7x-", 2, "", "tpu7x", (Machine("tpu7x-standard-4t", 4, 960),), ("us-central1-c",)),
}
BOOT_DISK = 100  # GB of the disk of a TPU VM


@dataclasses.dataclass(frozen=True)
class SliceName:
    """The name of a TPU slice, such as v5p:4x4x4, or v5p:4x4x4*2 for two slices, taken apart."""

    chip: Chip
    size: str
    slices: int

    @property
    def chips(self) -> int:
        """Number of chips in all slices."""
        return math.prod(self.sides) * self.slices

    @property
    def sides(self) -> tuple[int, ...]:
        """Chips along each dimension of a slice."""
        return tuple(int(side) for side in self.size.split("x"))

    @property
    def devices(self) -> int:
        """Number of JAX devices in all slices."""
        return self.chips * self.chip.cores

    @property
    def offer(self) -> Offer:
        """How Google Cloud offers the generation."""
        return OFFERS[self.chip.name]

    @property
    def machine(self) -> Machine:
        """The TPU VM of each host. Raises UserError for a size that Google Cloud does not offer."""
        chips, found = math.prod(self.sides), self.offer
        if found.flat:
            offered = self.size in found.flat
        else:
            cubes = sorted(self.sides) == list(self.sides) and all(side % 4 == 0 for side in self.sides)
            offered = len(self.sides) == 3 and (self.size in ("2x2x1", "2x2x2", "2x2x4", "2x4x4") or cubes)
        if not offered:
            sizes = ", ".join(found.flat) or "2x2x1, 2x2x2, 2x2x4, 2x4x4, and multiples of 4 from small to large"
            raise UserError(f"{self.chip.name}:{self.size} is not offered; the sizes of {self.chip.name} are {sizes}")
        alone = [machine for machine in found.machines if machine.chips == chips]
        return (alone or [machine for machine in found.machines if machine.chips == 4])[0]

    @property
    def hosts(self) -> int:
        """Number of TPU VMs in all slices: processes of a run. Raises UserError as ``machine``."""
        return self.chips // self.machine.chips

    @property
    def accelerator(self) -> str:
        """The accelerator type of one slice, such as v5litepod-16, or v5p-128 for its 64 chips."""
        return f"{self.offer.accelerator}{math.prod(self.sides) * self.offer.counted}"

    def __str__(self) -> str:
        many = f"{self.slices} x " if self.slices > 1 else ""
        return f"{self.chips} TPU {self.chip.name.removeprefix('tpu')} chips ({many}{self.size})"


def slice_name(name: str, key: str = "--topology") -> SliceName:
    """The parts of a slice's name. Raises UserError, which begins with ``key``, for what is no such name."""
    match = NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{key} {name!r} is no name of a TPU slice; expected GENERATION:SIZE, as in {EXAMPLES}")
    return SliceName(CHIPS[match.group(1)], match.group(2), int(match.group(3) or 1))


GPU_NAME = re.compile(rf"({'|'.join(GPUS)}):(\d+)")
GPU_EXAMPLES = "h100:1, h100:8, a100-80:8 or rtx4090:1 for GPUs of one machine"
GPU_COUNTS = (1, 2, 4, 8)  # of one machine


def gpu_name(name: str, key: str = "--topology") -> tuple[Chip, int] | None:
    """The GPU and the number of them that a name such as h100:8 says; None for a name that begins with no GPU.

    Raises UserError, which begins with ``key``, for a GPU in a number that is not planned.
    """
    if name.partition(":")[0] not in GPUS:
        return None
    match = GPU_NAME.fullmatch(name)
    chip, count = CHIPS[name.partition(":")[0]], int(match.group(2)) if match else 0
    counts = GPU_COUNTS if chip.ring else (1,)
    if count not in counts:
        raise UserError(
            f"{key} {name!r}: expected {chip.name}:N with N of {', '.join(map(str, counts))}"
            f"{'' if chip.ring else ', as it has no NVLink'}; examples are {GPU_EXAMPLES}"
        )
    return chip, count
