"""MetaCanvas in JAX/Flax: a frozen MLLM plans on canvas tokens, a diffusion transformer paints the plan.

``import metacanvas_jax as mc`` offers the names of `metacanvas_jax/library.py`, such as ``mc.experiment``, ``mc.build``
and ``mc.load_run``. They are imported when they are first used.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metacanvas_jax.library import *  # noqa: F403

__version__ = "0.1.0"

NAMES = frozenset(
    {
        "Bucket",
        "Drawn",
        "Experiment",
        "Given",
        "MetaCanvas",
        "Painter",
        "Params",
        "Sample",
        "States",
        "Tokens",
        "Trained",
        "Training",
        "assemble",
        "batch",
        "build",
        "canvas_maps",
        "experiment",
        "init",
        "load_run",
        "prepare",
        "training",
    }
)
"""The names of the library. They are written out: finding them out would import it."""


def __getattr__(name: str) -> Any:
    """A name of the library, which is imported for it."""
    if name in NAMES:
        _without_noise()
        return getattr(importlib.import_module("metacanvas_jax.library"), name)
    raise AttributeError(f"module 'metacanvas_jax' has no attribute {name!r}")


def _without_noise() -> None:
    """Keeps JAX from loading libtpu where there is no TPU, as the command line does: libtpu complains on stderr."""
    if "jax" not in sys.modules:
        from metacanvas_jax.hardware import platforms

        if (known := platforms()) is not None:
            os.environ.setdefault("JAX_PLATFORMS", known)


def __dir__() -> list[str]:
    """The names of the library beside those that are there."""
    return sorted({*globals(), *NAMES})
