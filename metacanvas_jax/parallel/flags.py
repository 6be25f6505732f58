"""Compiler options for each TPU generation and for GPUs, with the reason for each; planning and training use the same.

Planning passes them to every compilation. Training puts them into ``LIBTPU_INIT_ARGS``, on GPUs into ``XLA_FLAGS``,
before JAX starts (``libtpu_arguments``). The compiler refuses an option that it does not know, so
options that a version of libtpu removed name that version.

No option for GPUs has been measured here. Command buffers (CUDA graphs) are on by default and have no option.
"""

import dataclasses
import importlib.metadata

from metacanvas_jax.hardware import GPUS, TPUS


@dataclasses.dataclass(frozen=True)
class Flag:
    """An option of the compiler and why ``generations`` set it. ``before`` is the first libtpu without it."""

    name: str
    value: str
    reason: str
    generations: tuple[str, ...] = TPUS
    before: tuple[int, ...] | None = None


FLAGS = (
    Flag(
        "xla_jf_spmd_threshold_for_windowed_einsum_mib",
        "1000000",
        "Keeps a product with gathered weights in one piece. Split into ring steps over a wide fsdp axis it becomes "
        "many products with a small inner size, which take a third more time and more memory.",
    ),
    Flag(
        "xla_tpu_use_minor_sharding_for_major_trivial_input",
        "true",
        "With the next two: sums over the tensor axis become reduce-scatters, half the bytes of all-reduces.",
        before=(0, 0, 50),
    ),
    Flag(
        "xla_tpu_relayout_group_size_threshold_for_reduce_scatter",
        "1",
        "See xla_tpu_use_minor_sharding_for_major_trivial_input.",
        before=(0, 0, 50),
    ),
    Flag(
        "xla_tpu_assign_all_reduce_scatter_layout",
        "true",
        "See xla_tpu_use_minor_sharding_for_major_trivial_input.",
        before=(0, 0, 50),
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion",
        "true",
        "Collectives run beside the products of the same layer instead of before them.",
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "true",
        "The gathers of fsdp weights are the most expensive collectives that can be hidden.",
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "true",
        "One gather may hide under several products.",
    ),
    Flag(
        "xla_tpu_overlap_compute_collective_tc",
        "true",
        "Lets the tensor core drive a collective while it computes; without it no collective is hidden.",
    ),
    Flag("xla_enable_async_all_gather", "true", "Splits a gather into start and done; others run in between."),
    Flag(
        "xla_gpu_enable_latency_hiding_scheduler",
        "true",
        "Moves collectives so that products run beside them. NVIDIA's images of JAX set it "
        "(docs.nvidia.com/jax-toolbox/environment-variables); on one GPU it has nothing to hide.",
        GPUS,
    ),
)


def flags_for(generation: str, version: tuple[int, ...] | None = None) -> dict[str, str]:
    """Options of a generation (``v5p``, ``h100``, ...); of a TPU for a version of libtpu, else the installed one."""
    version = installed_libtpu() if version is None else version
    return {
        flag.name: flag.value
        for flag in FLAGS
        if generation in flag.generations and (flag.before is None or version < flag.before)
    }


def libtpu_arguments(generation: str, version: tuple[int, ...] | None = None) -> str:
    """The same options as the value of ``LIBTPU_INIT_ARGS``; of a GPU as that of ``XLA_FLAGS``."""
    return " ".join(f"--{name}={value}" for name, value in flags_for(generation, version).items())


def installed_libtpu() -> tuple[int, ...]:
    """Version of the installed libtpu, the first three numbers; (0, 0, 0) without one."""
    try:
        parts = importlib.metadata.version("libtpu").split(".")[:3]
    except importlib.metadata.PackageNotFoundError:
        return (0, 0, 0)
    return tuple(int(part) for part in parts)
