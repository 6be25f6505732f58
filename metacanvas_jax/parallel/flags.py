"""Compiler options per TPU generation, as data, each with its reason; for planning and for training alike.

Planning hands them to each compilation; training puts them into ``LIBTPU_INIT_ARGS`` before jax starts
(``libtpu_arguments``). An option that the installed compiler does not know is an error there, so options that came or
went with a libtpu carry the range of versions.
"""

import dataclasses
import importlib.metadata

from metacanvas_jax.hardware import TPUS


@dataclasses.dataclass(frozen=True)
class Flag:
    """One option of the TPU compiler, the generations it is set on and why. ``before`` is the first libtpu without."""

    name: str
    value: str
    reason: str
    generations: tuple[str, ...] = TPUS
    before: tuple[int, ...] | None = None


FLAGS = (
    Flag(
        "xla_jf_spmd_threshold_for_windowed_einsum_mib",
        "1000000",
        "A product with gathered weights stays one product: cut into ring steps over a wide fsdp axis it becomes many "
        "products of a small inner size, a third slower and with more memory.",
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
        "The gathers of fsdp weights are the collectives worth hiding.",
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "true",
        "One gather may hide under several products.",
    ),
    Flag(
        "xla_tpu_overlap_compute_collective_tc",
        "true",
        "Lets the tensor core drive a collective while it computes; without it nothing above is hidden.",
    ),
    Flag("xla_enable_async_all_gather", "true", "Splits a gather into start and done, between which others run."),
)


def flags_for(generation: str, version: tuple[int, ...] | None = None) -> dict[str, str]:
    """Options of a generation (``v5p``, ...) for a version of libtpu, by default the installed one."""
    version = installed_libtpu() if version is None else version
    return {
        flag.name: flag.value
        for flag in FLAGS
        if generation in flag.generations and (flag.before is None or version < flag.before)
    }


def libtpu_arguments(generation: str, version: tuple[int, ...] | None = None) -> str:
    """The same options as the value of ``LIBTPU_INIT_ARGS``."""
    return " ".join(f"--{name}={value}" for name, value in flags_for(generation, version).items())


def installed_libtpu() -> tuple[int, ...]:
    """Version of the installed libtpu, the first three numbers; (0, 0, 0) without one."""
    try:
        parts = importlib.metadata.version("libtpu").split(".")[:3]
    except importlib.metadata.PackageNotFoundError:
        return (0, 0, 0)
    return tuple(int(part) for part in parts)
