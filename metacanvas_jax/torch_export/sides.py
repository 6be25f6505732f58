"""Finds the torch side of a network: ``torch_side.py`` in its folder, by the name that an export gives it."""

import functools
import importlib
import importlib.util
import pkgutil
from types import ModuleType

from metacanvas_jax.errors import UserError


@functools.cache
def every(family: str) -> tuple[ModuleType, ...]:
    """The torch sides of a family of networks: "dit", "vae", "text" or "mllm"."""
    folders = importlib.import_module(f"metacanvas_jax.{family}").__path__
    names = sorted(module.name for module in pkgutil.iter_modules(folders) if module.ispkg)
    found = (f"metacanvas_jax.{family}.{name}.torch_side" for name in names)
    return tuple(importlib.import_module(name) for name in found if importlib.util.find_spec(name) is not None)


def named(family: str, name: str | None) -> type:
    """The class ``Side`` of a network. Exports of version 0.1 name no MLLM and no text encoder: then the one they had.

    Raises UserError for a network that this version does not know.
    """
    known = {module.__name__.split(".")[-2]: module.Side for module in every(family)}
    if name is None:
        return next(side for side in known.values() if getattr(side, "unnamed", False))
    if name not in known:
        raise UserError(f"the export has the {family} {name!r}, expected one of {', '.join(known)}")
    return known[name]


def providing(family: str, attribute: str) -> ModuleType:
    """The torch side that has an attribute which one network of its family shares with the rest."""
    return next(module for module in every(family) if hasattr(module, attribute))
