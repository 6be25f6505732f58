"""Compiled programs kept on disk, so that a second start compiles nothing."""

import collections
import functools
import os
from pathlib import Path

import jax

from metacanvas_jax import files
from metacanvas_jax.parallel.distributed import client

LARGEST = 4 << 30  # bytes of the folder on this machine; what was used longest ago goes first


def keep(folder: str | os.PathLike | None = None) -> str | None:
    """Keeps what this process compiles in a folder or bucket, by default in the user's cache; returns where.

    What the user says with JAX's own JAX_COMPILATION_CACHE_DIR stands. None where the folder cannot be written.
    """
    if jax.config.jax_compilation_cache_dir:
        return jax.config.jax_compilation_cache_dir
    place = str(user_cache() if folder is None else folder)
    local = files.is_local(place)
    files.folder(place)  # prepares what reads and writes a bucket
    if local:
        try:
            Path(place).mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        if not os.access(place, os.W_OK):
            return None
    # Several processes would wait for the lock that a bounded folder has; a run's own folder stays small.
    jax.config.update("jax_compilation_cache_max_size", LARGEST if local and client() is None else -1)
    if not local:  # XLA itself, which keeps what it has tuned for a GPU beside the programs, writes to no bucket
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_compilation_cache_dir", place)
    return place


def user_cache() -> Path:
    """Where commands keep what they compile: below XDG_CACHE_HOME, or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metacanvas_jax" / "compiled"


@functools.cache
def counts() -> collections.Counter[str]:
    """How many programs this process has asked for ("asked") and found on disk ("found") since the first call."""
    seen: collections.Counter[str] = collections.Counter()
    names = {"compile_requests_use_cache": "asked", "cache_hits": "found"}

    def listen(event: str, **_: object) -> None:
        if (name := names.get(event.rpartition("/")[2])) is not None:
            seen[name] += 1

    jax.monitoring.register_event_listener(listen)
    return seen
