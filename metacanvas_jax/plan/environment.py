"""Environment variables that compiling for an absent TPU needs; they must be set before jax is imported."""

import os

VARIABLES = {
    "JAX_PLATFORMS": "cpu",  # host arrays live on the CPU, whatever the machine has
    "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server which TPU this is
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # any valid value: it silences a warning and changes no program
    "TPU_WORKER_HOSTNAMES": "localhost",  # silences another
    "TPU_LOG_DIR": "disabled",  # no log files in /tmp
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two compilations may run at once
    # Kernels contain source locations: the kernel's own line and those of its callers. Only the first is kept, without
    # the path of the checkout, so that the cache of plan/compile.py does not depend on the caller or on the folder.
    # Without any location the scopes would be lost too, and a report could not assign operations to parts.
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "1",
    "JAX_HLO_SOURCE_FILE_CANONICALIZATION_REGEX": ".*/(?=metacanvas_jax/)",
}


def prepare_environment() -> None:
    """Sets the variables that are not set yet. It has no effect on JAX if JAX has been imported already."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
