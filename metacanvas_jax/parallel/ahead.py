"""Compilation for devices that are not on this machine."""

import contextlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Compiles without JAX's persistent cache: what was compiled for absent devices cannot be loaded back from it.

    Whoever compiles here keeps what is needed of the result. The cache is as before afterwards.
    """
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once whether there is a cache, and remembers the answer
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
