"""Where batches lie when parameters are spread over devices and processes."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from metacanvas_jax.parallel.activations import current_rules
from metacanvas_jax.parallel.mesh import batch_part, batch_shards, on_mesh, put_batch
from metacanvas_jax.parallel.rules import RULES, Rules
from metacanvas_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Spread:
    """How the samples of a batch are spread over a mesh; ``mesh`` None: one device computes all of them."""

    mesh: Mesh | None
    rules: Rules = RULES

    @classmethod
    def of(cls, params: Params) -> "Spread":
        """The mesh that parameters lie on."""
        shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
        mesh = next((found.mesh for found in shardings if isinstance(found, NamedSharding)), None)
        return cls(mesh, current_rules())

    @property
    def ways(self) -> int:
        """Into how many parts the samples of a batch are split."""
        if self.mesh is None:
            return 1
        return batch_shards(self.mesh, self.rules)

    def batch(self, size: int) -> int:
        """The smallest batch of at least ``size`` samples that divides evenly."""
        return -(-size // self.ways) * self.ways

    def share(self, size: int) -> slice:
        """The samples of a batch that this process brings."""
        if self.mesh is None:
            return slice(0, size)
        part, parts = batch_part(self.mesh, self.rules)
        return slice(part * size // parts, (part + 1) * size // parts)

    @property
    def writes(self) -> bool:
        """Whether this process is the first of those that have the same samples: the others leave writing to it."""
        if self.mesh is None:
            return jax.process_index() == 0
        mine, before = batch_part(self.mesh)[0], range(jax.process_index())
        return all(batch_part(self.mesh, process=process)[0] != mine for process in before)

    def part(self) -> tuple[int, int]:
        """The number of this process's part of the samples, and the number of parts."""
        return (0, 1) if self.mesh is None else batch_part(self.mesh)

    def copies(self, params: Params) -> bool:
        """Whether every device holds all parameters."""
        return all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))

    def put(self, batch: PyTree) -> PyTree:
        """This process's samples as its share of the batch."""
        return batch if self.mesh is None else put_batch(batch, self.mesh, self.rules)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """While open, names of axes in traced code mean this mesh."""
        with contextlib.nullcontext() if self.mesh is None else on_mesh(self.mesh, self.rules):
            yield
