"""Units in which the figures of a plan can be read: those of full-size steps, and smaller ones for miniatures."""

from typing import NamedTuple

from metacanvas_jax.hardware import GIB, MIB


class Unit(NamedTuple):
    """A unit's name, and its size in the basic unit."""

    name: str
    size: float


def time_unit(step: float) -> Unit:
    """For the times of the parts of a step that takes so many seconds."""
    return Unit("s", 1.0) if step >= 0.01 else Unit("µs", 1e-6)


def flop_unit(step: float) -> Unit:
    """For the FLOPs of the parts of a step that has so many."""
    return Unit("PFLOP", 1e15) if step >= 1e13 else Unit("GFLOP", 1e9)


def memory_unit(peak: float) -> Unit:
    """For what makes a peak of so many bytes."""
    return Unit("GiB", GIB) if peak >= 0.1 * GIB else Unit("MiB", MIB)


def memory(size: float) -> str:
    """Bytes: 1.23 GiB, 4.5 MiB."""
    unit = memory_unit(size)
    return f"{size / unit.size:.{2 if unit.size == GIB else 1}f} {unit.name}"


def seconds(value: float) -> str:
    """A time: 1.234 s, 0.012 s, 25.7 µs."""
    return f"{value:.3f} s" if value >= 0.001 or value == 0 else f"{value * 1e6:.3g} µs"


def between(value: float, low: float, high: float) -> str:
    """A time and its range: 1.234 s (0.987 to 1.543), 25.7 µs (20.6 to 32.1)."""
    if value >= 0.001 or value == 0:
        return f"{value:.3f} s ({low:.3f} to {high:.3f})"
    return f"{value * 1e6:.3g} µs ({low * 1e6:.3g} to {high * 1e6:.3g})"


def duration(value: float) -> str:
    """How long a training of so many seconds takes: 12.3 days, 2.5 hours, 40 s, 0.5 ms."""
    for name, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("s", 1.0)):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value * 1e3:.2g} ms"
