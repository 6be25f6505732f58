"""Environment variables that compiling for an absent TPU needs; they must be set before jax is imported."""

import os

VARIABLES = {
    "JAX_PLATFORMS": "cpu",  # host arrays live on the CPU, whatever the machine has
    "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server which TPU this is
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # any valid value: it silences a warning and changes no program
    "TPU_WORKER_HOSTNAMES": "localhost",  # silences another
    "TPU_LOG_DIR": "disabled",  # no log files in /tmp
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two compilations may run at once
    # Kernels carry the places they are written at and called from. With the first alone, and without the checkout's own
    # path, a compilation is known whoever asks for it and from where (plan/compile.py). No place at all would take the
    # scopes away too, by which parts are told.
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "1",
    "JAX_HLO_SOURCE_FILE_CANONICALIZATION_REGEX": ".*/(?=metacanvas_jax/)",
}


def prepare_environment() -> None:
    """Sets what is not set; without effect on jax if jax has been imported already."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
