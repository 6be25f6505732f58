"""GPUs that are not there, described to the compiler by their figures. This needs JAX's CUDA plugin, but no GPU.

cuDNN cannot be asked without a GPU (the plugin would load it and open a device). So programs are compiled with the
attention of XLA, ``chunked_attention``, in place of cuDNN's; ``plan/gpu_cost.py`` says how it is timed.
"""

import importlib.metadata
import importlib.util
from typing import Any

from jax.experimental import topologies

from metacanvas_jax.errors import UserError
from metacanvas_jax.hardware import Chip, Gpu
from metacanvas_jax.parallel.flags import flags_for

MEMORY_SHARE = 0.95  # of a GPU's memory, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 (JAX takes 0.75 without)
LEAST_SHARED = 160 * 1024  # bytes of a multiprocessor: those of the A100
CUDNN = (9, 8)  # the version that is assumed; nothing that is compiled here needs it
RUNTIME = (12, 9)  # of CUDA
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_per_block}
  threads_per_core_limit: {threads} core_count: {units} fpus_per_core: {lanes}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
runtime_version: {{ major: {runtime[0]} minor: {runtime[1]} patch: 0 }}
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} }}
platform_name: "CUDA"
device_description_str: "{kind}"
"""


def target(chip: Chip) -> str:
    """A GPU as the compiler wants it described (stream_executor.GpuTargetConfigProto of openxla/xla, as text)."""
    gpu = gpu_of(chip)
    return TARGET.format(
        **{key: getattr(gpu, key) for key in ("shared", "threads", "units", "lanes", "l2", "clock", "capability")},
        shared_per_block=gpu.shared - 1024,
        bandwidth=int(chip.hbm_bandwidth),
        memory=int(chip.hbm),
        runtime=RUNTIME,
        cudnn=CUDNN,
        kind=chip.kinds[0],
    )


def gpu_of(chip: Chip) -> Gpu:
    """The figures of a chip that is a GPU."""
    assert chip.gpu is not None, chip.name
    return chip.gpu


def options(chip: Chip) -> dict[str, bool | str]:
    """The options of a compilation for a GPU: those of a training, and no optimisation by ptxas of what never runs.

    Buffers do not depend on ptxas. Unlike libtpu, CUDA's compiler takes no "true" for True.

    Without a GPU to time tiles on, XLA takes fixed ones for Triton's products. Some do not fit GPUs with little shared
    memory ("Couldn't find output tile sizes"), for which products are therefore those of cuBLAS.
    """
    flags = {
        name: value == "true" if value in ("true", "false") else value for name, value in flags_for(chip.name).items()
    }
    flags |= {"xla_gpu_disable_gpuasm_optimizations": True}
    return flags | ({"xla_gpu_enable_triton_gemm": False} if gpu_of(chip).shared < LEAST_SHARED else {})


def devices(chip: Chip, count: int) -> tuple:
    """So many GPUs of one machine, as devices to compile for.

    Raises:
        UserError: CUDA's compiler for JAX is not installed.
    """
    if not installed():
        raise UserError(
            "compiling for a GPU needs CUDA's compiler for JAX (0.6 GB): pip install 'metacanvas_jax[gpu-plan]'"
        )
    described = topologies.get_topology_desc("gpus", "cuda", target_config=target(chip), topology=f"1x1x{count}")
    return tuple(described.devices)


def installed() -> bool:
    """Whether programs for GPUs can be compiled: there is JAX's plugin and NVIDIA's assembler."""
    found = importlib.util.find_spec("jax_plugins")
    if found is None or importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        return False
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.cuda_nvcc") is not None


def installed_plugin() -> str:
    """Version of JAX's CUDA plugin."""
    return importlib.metadata.version("jax-cuda12-pjrt")


def memory(chip: Chip) -> float:
    """Bytes of a GPU that a program may use."""
    return MEMORY_SHARE * chip.hbm


def peak(stats: Any) -> float:
    """Bytes of arguments, outputs and temporaries of a program, from the compiler's ``memory_analysis()``.

    All temporaries lie in one buffer, which is there from the first operation to the last.
    """
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return float(stats.argument_size_in_bytes + outputs + stats.temp_size_in_bytes)
