"""The sharding of activations: networks call ``constrain`` with the names of an array's axes.

The mesh and the rules are set once, outside the networks (``on_mesh`` in ``mesh.py``). Without a mesh, or on one
device, nothing is constrained. XLA propagates shardings by itself, but it guesses: a feed-forward whose hidden layer
has no constraint may be computed completely on every device.
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
    """One constraint, as it was resolved while tracing."""

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
    """While open, the names of axes are resolved by these rules."""
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """While open, traced code belongs to this part of the model and follows its rules (``rules.PART_RULES``)."""
    token = _part.set(name)
    try:
        yield
    finally:
        _part.reset(token)


@contextlib.contextmanager
def noting() -> Iterator[list[Note]]:
    """While open, every constraint that is traced is added to the returned list, once."""
    notes: list[Note] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def current_rules() -> Rules:
    """The rules by which names of axes are resolved; the common ones outside of ``using``."""
    return _rules.get() or RULES


def current_mesh() -> AbstractMesh | None:
    """The mesh of the constraints; None without a mesh or rules, on a single device, or inside ``shard_map``."""
    mesh = jax.sharding.get_abstract_mesh()
    if _rules.get() is None or mesh.empty or mesh.size == 1:
        return None
    # Inside shard_map, arrays are those of one device.
    return mesh if all(kind == AxisType.Auto for kind in mesh.axis_types) else None


def spec_of(names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """The sharding of an array with these axes on the current mesh; unsplit without a mesh."""
    mesh = current_mesh()
    if mesh is None:
        return PartitionSpec(*(None,) * len(names))
    return resolve(names, shape, mesh, rules_of(_part.get(), _rules.get() or RULES))


def constrain(x: Shaped[Array, "..."], names: Sequence[str | None]) -> Shaped[Array, "..."]:
    """The same array, sharded by the names of its axes; see the table in ``rules.py``."""
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
    """Shards tokens on a grid like a sequence: its length may divide where the sides of the grid do not."""
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
