"""Draws many samples in batches of one shape, split over devices and processes, with noise of each sample's own.

What a sample becomes depends on the parameters, on itself, on its two numbers and on the seed: neither on the other
samples of its batch nor, with the same number of samples per device, on how many devices or processes there are.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Integer, Key, UInt8

from metacanvas_jax.data.batch import Batch, mllm_inputs
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.paint.painter import Drawn, NonFinitePixels, Painter, noise_key
from metacanvas_jax.paint.spread import Spread
from metacanvas_jax.parallel.rules import RULES, resolve
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.train.contexts import READ, local_rows
from metacanvas_jax.types import Params

Numbers = tuple[int, int]
"""Of a prompt, and of one of the pictures that are drawn of it; both from 0 to 2^32 - 1."""

Pending = tuple[jax.Array, jax.Array, jax.Array | None]
"""A batch that is being drawn: pixels, which samples are finite, and canvas features."""


class OneShape:
    """The samples of one bucket.

    ``each`` samples are drawn at once on every device that splits a batch; a process brings ``size`` of them.
    ``options`` are those of ``Painter.program``.
    """

    def __init__(self, painter: Painter, params: Params, bucket: Bucket, *, each: int, seed: int, **options):
        self._params, self._key, self._spread = params, noise_key(seed), Spread.of(params)
        self._paint = painter.program(bucket, **options)
        asked = options.get("guidance")
        self._guided = (painter.setup.sampler.guidance if asked is None else asked) != 1.0
        self._examples = painter.inputs.examples(bucket, target=False)
        self._run = self._compiled()
        whole = each * self._spread.ways
        share = self._spread.share(whole)
        self.size = share.stop - share.start

    def start(self, samples: Sequence[Sample], numbers: Sequence[Numbers]) -> Pending:
        """Begins to draw up to ``size`` samples of this process, at least one, and returns at once.

        All processes call it together. One that has none left draws any sample, and fetches none.
        """
        missing = self.size - len(samples)
        samples, numbers = [*samples] + [samples[-1]] * missing, [*numbers] + [numbers[-1]] * missing
        made = self._examples.batch(samples)
        blank = self._examples.batch(samples, words=False) if self._guided else made
        blank = {name: blank[name] for name in READ if name in blank}
        put = self._spread.put
        with self._spread.open():
            return self._run(self._params, put(made), put(blank), self._key, put(np.asarray(numbers, np.uint32)))

    def fetch(self, pending: Pending, count: int) -> Drawn:
        """The first ``count`` results of this process. Raises NonFinitePixels when one holds NaN or infinity."""
        pixels, finite, canvas = pending
        if count and not local_rows(finite)[:count].all():
            raise NonFinitePixels(
                "a result holds values that are not finite; a smaller guidance, more steps or float32 may help"
            )
        return Drawn(local_rows(pixels)[:count], None if canvas is None else local_rows(canvas)[:count])

    def _compiled(self) -> Callable:
        """The whole way from a batch to bytes, as one program.

        Where every device holds all parameters, each device runs the program of one device alone: then its results
        have the same bits on any number of devices. Otherwise the compiler splits the program.
        """
        mesh, own = self._spread.mesh, self._spread.ways
        if mesh is None or not own == mesh.size > 1 or not self._spread.copies(self._params):
            return jax.jit(self._batch)
        rows = resolve(("batch",), None, mesh, RULES)
        split = jax.shard_map(
            self._batch, mesh=mesh, in_specs=(P(), rows, rows, P(), rows), out_specs=rows, check_vma=False
        )
        return jax.jit(split)

    def _batch(self, params: Params, batch: Batch, blank: Batch, key: Key[Array, ""], own: Integer[Array, "b 2"]):
        painted = self._paint(params, batch, mllm_inputs(blank), keys_of(key, own))
        finite = jnp.all(jnp.isfinite(painted.pixels), axis=(1, 2, 3, 4))
        return to_bytes(painted.pixels), finite, painted.canvas


def keys_of(key: Key[Array, ""], numbers: Integer[Array, "b 2"]) -> Key[Array, " b"]:
    """A key for each pair of numbers."""
    return jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1]))(numbers)


def to_bytes(pixels: Float[Array, "*n"]) -> UInt8[Array, "*n"]:
    """Pixels in [-1, 1] to bytes, on the device; what is not finite becomes 0."""
    values = jnp.round((jnp.clip(pixels, -1.0, 1.0) + 1.0) * 127.5)
    return jnp.where(jnp.isfinite(values), values, 0.0).astype(jnp.uint8)
