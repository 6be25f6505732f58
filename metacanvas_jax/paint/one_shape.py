"""Draws many samples of one shape, in groups of a fixed size, with noise of each sample's own.

Where every device holds all parameters, a group is drawn by one device, with the program of one device alone. The same
group then becomes the same bytes on any number of devices and processes: it is the same program on the same numbers. A
program that is compiled for several devices computes the same in another order, and a sample in another batch may be
rounded in another way. Parameters that are cut over devices have a program of all devices together: the same group
becomes the same bytes on a mesh of the same sizes.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Key, UInt8

from metacanvas_jax.data.batch import Batch, mllm_inputs
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.paint.painter import NonFinitePixels, Painter, noise_key
from metacanvas_jax.paint.sampling import Paint
from metacanvas_jax.paint.spread import Spread
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.train.contexts import READ, local_rows
from metacanvas_jax.types import Params

Numbers = tuple[int, int]
"""Of a prompt, and of one of the pictures that are drawn of it; both from 0 to 2^32 - 1."""

Group = Sequence[tuple[Sample, Numbers]]
"""Samples that are drawn as one batch."""

Pending = list[tuple[UInt8[Array, "b t h w 3"], Bool[Array, " b"]]]
"""Batches that are being drawn: pixels, and which samples are finite."""


class OneShape:
    """The samples of one bucket.

    ``each`` samples are a group. A process draws up to ``slots`` groups at once; where the processes draw ``together``,
    each brings a group to every batch. ``options`` are those of ``Painter.program``.
    """

    def __init__(self, painter: Painter, params: Params, bucket: Bucket, *, each: int, seed: int, **options):
        self._each, self._key, self._spread = each, noise_key(seed), Spread.of(params)
        self._run = compiled(painter.program(bucket, **options))
        asked = options.get("guidance")
        self._guided = (painter.setup.sampler.guidance if asked is None else asked) != 1.0
        self._examples = painter.inputs.examples(bucket, target=False)
        self._params, self._copies = params, copies(params, self._spread)
        share = self._spread.share(self._spread.ways)
        self.slots, self.together = len(self._copies) or share.stop - share.start, not self._copies

    def start(self, groups: Sequence[Group]) -> Pending:
        """Begins to draw up to ``slots`` groups of this process and returns at once."""
        if not self.together:
            return self._apart(groups)
        filled = [*groups] + [groups[0]] * (self.slots - len(groups))
        rows = [row for group in filled for row in self._full(group)]
        put = self._spread.put
        with self._spread.open():
            return [self._run(self._params, *map(put, self._inputs(rows)), self._key)]

    def fetch(self, pending: Pending, counts: Sequence[int]) -> list[UInt8[np.ndarray, "n t h w 3"]]:
        """The first ``counts`` results of every group. Raises NonFinitePixels when one holds NaN or infinity."""
        if not counts:
            return []  # of groups that were only brought for others
        pixels, finite = (np.concatenate([local_rows(x) for x in some]) for some in zip(*pending, strict=True))
        places = [slice(i * self._each, i * self._each + count) for i, count in enumerate(counts)]
        if not all(finite[place].all() for place in places):
            raise NonFinitePixels(
                "a result holds values that are not finite; a smaller guidance, more steps or float32 may help"
            )
        return [pixels[place] for place in places]

    def _apart(self, groups: Sequence[Group]) -> Pending:
        """Each device draws a group, by programs that are compiled side by side after one tracing."""
        work = []
        for group, params in zip(groups, self._copies, strict=False):
            device = next(iter(jax.tree.leaves(params)[0].devices()))
            work.append((params, *jax.device_put((*self._inputs(self._full(group)), self._key), device)))
        if len(work) < 2:
            return [self._run(*arguments) for arguments in work]
        self._run.trace(*work[0])
        with ThreadPoolExecutor(len(work)) as pool:
            return list(pool.map(lambda arguments: self._run(*arguments), work))

    def _full(self, group: Group) -> list[tuple[Sample, Numbers]]:
        return [*group] + [group[-1]] * (self._each - len(group))

    def _inputs(self, rows: Group) -> tuple[Batch, Batch, Integer[np.ndarray, "b 2"]]:
        samples = [sample for sample, _ in rows]
        made = self._examples.batch(samples)
        blank = self._examples.batch(samples, words=False) if self._guided else made
        blank = {name: blank[name] for name in READ if name in blank}
        return made, blank, np.asarray([numbers for _, numbers in rows], np.uint32)


def copies(params: Params, spread: Spread) -> list[Params]:
    """The parameters on each device of this process, where every device holds all of them; else none."""
    if spread.mesh is None:
        return [jax.tree.map(jnp.asarray, params)]
    if spread.ways != spread.mesh.size or not spread.copies(params):
        return []

    def on(device: Any) -> Callable[[jax.Array], jax.Array]:
        return lambda leaf: next(shard.data for shard in leaf.addressable_shards if shard.device == device)

    return [jax.tree.map(on(device), params) for device in spread.mesh.local_devices]


@functools.lru_cache(maxsize=8)
def compiled(paint: Paint) -> Any:
    """The whole way from a batch to bytes, as one program; the same one for the same painting."""

    def draw(
        params: Params, batch: Batch, blank: Batch, own: Integer[Array, "b 2"], key: Key[Array, ""]
    ) -> tuple[UInt8[Array, "b t h w 3"], Bool[Array, " b"]]:
        pixels = paint(params, batch, mllm_inputs(blank), keys_of(key, own)).pixels
        return to_bytes(pixels), jnp.all(jnp.isfinite(pixels), axis=(1, 2, 3, 4))

    return jax.jit(draw)


def keys_of(key: Key[Array, ""], numbers: Integer[Array, "b 2"]) -> Key[Array, " b"]:
    """A key for each pair of numbers."""
    return jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1]))(numbers)


def to_bytes(pixels: Float[Array, "*n"]) -> UInt8[Array, "*n"]:
    """Pixels in [-1, 1] to bytes, on the device; what is not finite becomes 0."""
    values = jnp.round((jnp.clip(pixels, -1.0, 1.0) + 1.0) * 127.5)
    return jnp.where(jnp.isfinite(values), values, 0.0).astype(jnp.uint8)
