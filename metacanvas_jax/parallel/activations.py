"""Where activations lie: one function that networks call by the names of an array's axes.

Networks name axes; which mesh and which rules are meant is said once, outside of them (``on_mesh`` in ``mesh.py``).
Without a mesh, or on one device, nothing is constrained. XLA spreads shardings by itself, but it guesses: a
feed-forward whose hidden layer is not named may be computed whole on every device.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Shaped

from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.rules import RULES, Rules, resolve, rules_of


@dataclasses.dataclass(frozen=True)
class Note:
    """One constraint as it was resolved while tracing; ``nbytes`` are those of the whole array."""

    part: str
    names: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * jax.numpy.dtype(self.dtype).itemsize


_rules: contextvars.ContextVar[Rules | None] = contextvars.ContextVar("rules", default=None)
_part: contextvars.ContextVar[str] = contextvars.ContextVar("part", default="")
_notes: contextvars.ContextVar[list[Note] | None] = contextvars.ContextVar("notes", default=None)


@contextlib.contextmanager
def using(rules: Rules) -> Iterator[None]:
    """While open, names of axes mean these rules."""
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """While open, what is traced belongs to this part of the model and follows its rules (``rules.PART_RULES``)."""
    token = _part.set(name)
    try:
        yield
    finally:
        _part.reset(token)


@contextlib.contextmanager
def noting() -> Iterator[list[Note]]:
    """While open, every constraint that is traced is added to the list this gives; a repeated one only once."""
    notes: list[Note] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def current_mesh() -> AbstractMesh | None:
    """The mesh constraints refer to; None without one, without rules, with a single device, or inside ``shard_map``."""
    mesh = jax.sharding.get_abstract_mesh()
    if _rules.get() is None or mesh.empty or mesh.size == 1:
        return None
    # Inside shard_map arrays are those of one device.
    return mesh if all(kind == AxisType.Auto for kind in mesh.axis_types) else None


def spec_of(names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """How an array with these axes lies on the current mesh (all whole without one)."""
    mesh = current_mesh()
    if mesh is None:
        return PartitionSpec(*(None,) * len(names))
    return resolve(names, shape, mesh, rules_of(_part.get(), _rules.get() or RULES))


def constrain(x: Shaped[Array, "..."], names: Sequence[str | None]) -> Shaped[Array, "..."]:
    """The array, laid out by the names of its axes; see the table in ``rules.py``."""
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} names {tuple(names)} for an array of shape {x.shape}")
    if current_mesh() is None:
        return x
    spec = spec_of(names, x.shape)
    notes = _notes.get()
    if notes is not None:
        note = Note(_part.get(), tuple(names), x.shape, x.dtype.name, spec)
        if note not in notes:
            notes.append(note)
    return jax.lax.with_sharding_constraint(x, spec)


def constrain_grid(x: Shaped[Array, "b *grid d"], axis: str) -> Shaped[Array, "b *grid d"]:
    """Lays tokens on their grid out like a sequence, whose length divides where the sides of the grid may not."""
    return constrain(x.reshape(x.shape[0], -1, x.shape[-1]), ("batch", "seq", axis)).reshape(x.shape)


def check_notes(notes: Sequence[Note], at_least: int) -> None:
    """Refuses activations of ``at_least`` bytes of which every device would hold a full copy.

    Raises:
        UserError: naming the largest of them, its axes and its size.
    """
    large = [note for note in notes if note.nbytes >= at_least and all(entry is None for entry in note.spec)]
    if large:
        worst = max(large, key=lambda note: note.nbytes)
        raise UserError(
            f"mesh: an activation {worst.names} of shape {list(worst.shape)} ({worst.nbytes / 2**20:.0f} MiB) in "
            f"{worst.part or 'the model'} lies whole on every device; expected a mesh axis that divides one of its "
            f"axes (activations from {at_least / 2**20:.0f} MiB on must be split)"
        )
