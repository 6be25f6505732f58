"""From samples and parameters to pictures and videos, on whatever devices there are."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8
from tqdm import tqdm

from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.data.batch import mllm_inputs
from metacanvas_jax.data.inputs import Inputs
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.paint import needs, placing
from metacanvas_jax.paint.program import How, how_to, program, reads
from metacanvas_jax.paint.sampling import Paint
from metacanvas_jax.paint.spread import Spread
from metacanvas_jax.parallel import distributed
from metacanvas_jax.tasks import TASKS, Bucket
from metacanvas_jax.train import parameters
from metacanvas_jax.trees import flat
from metacanvas_jax.types import Params

LEAST_BATCH = 8  # of the pictures of a world, which are small: few batch sizes mean few compilations


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Videos (a picture is one of one frame), and the canvas features of each.

    The features are None unless they were asked for, and in a model without canvas.
    """

    pixels: UInt8[np.ndarray, "n t h w 3"]
    canvas: Float[np.ndarray, "n t y x d"] | None = None


class NonFinitePixels(UserError):
    """What was drawn holds NaN or infinity, of which there is no picture."""


class Painter:
    """The networks of an experiment, its prompts and its compiled samplers. Parameters are arguments.

    It draws where the parameters lie: on a mesh, the results are split over its devices. Parameters that a drawing does
    not read may be left out. ``model`` is the network where it is not that of the config; it needs all its parameters.

    Raises UserError for a tokenizer that is missing.
    """

    def __init__(self, setup: Experiment, model: MetaCanvas | None = None):
        self.setup = setup
        self.inputs = Inputs(setup)
        self._configured = model is None
        self._compiled = functools.lru_cache(maxsize=8)(functools.partial(program, setup, model=model))
        self._reads = functools.lru_cache(maxsize=64)(lambda how: reads(setup, how, self._compiled(how)))

    def needs(self, buckets: Sequence[Bucket], **options: Any) -> dict[str, np.dtype]:
        """The parameters that drawings of some shapes read, by path, and the dtype in which to hold each.

        In that dtype every result is the same as in the dtype of the training. ``options`` are those of ``paint``.
        """
        return needs.together(*(self._reads(how_to(self.setup, bucket, **options)) for bucket in buckets))

    def held(self) -> dict[str, np.dtype]:
        """The dtype in which to hold each parameter for all that a run may be asked for, drawing or not."""
        every = {path: leaf.dtype for path, leaf in flat(placing.abstract(self.setup)).items()}
        return every | self.needs([from_words(self.setup.drawn[0]), *self.setup.drawn])

    def program(self, bucket: Bucket, **options: Any) -> Paint:
        """The compiled sampler of a bucket; ``options`` are those of ``paint``."""
        return self._compiled(how_to(self.setup, bucket, **options))

    def draw(self, params: Params, prompts: Sequence[str], **options) -> Drawn:
        """One result per prompt, in the shape of the config's first bucket; ``options`` are those of ``paint``."""
        bucket = from_words(self.setup.drawn[0])
        return self.paint(params, [blank(prompt, bucket) for prompt in prompts], bucket, **options)

    def paint(
        self,
        params: Params,
        samples: Sequence[Sample],
        bucket: Bucket,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        maps: bool = False,
        canvas: bool = True,
        tile: int = 0,
        moments: int = 0,
        progress: bool = False,
    ) -> Drawn:
        """One result for every sample of a task, in the shape of a bucket, on every process.

        Of a sample's target only a first frame that the task gives is read. The noise of a result depends on ``seed``
        and its place in the list, not on the devices. ``maps`` asks for the canvas features. ``canvas`` False leaves
        the canvas out; ``tile`` is that of ``sampling.Target``. With ``moments`` n each result is a film of n stages of
        its picture's sampling.

        Raises ValueError for parameters that were loaded without some that this drawing reads.
        """
        options = {"steps": steps, "guidance": guidance, "maps": maps, "canvas": canvas, "tile": tile}
        how = how_to(self.setup, bucket, moments=moments, **options)
        self._check(params, how)
        spread, examples = Spread.of(params), self.inputs.examples(bucket, target=False)
        size = min(self.setup.eval.batch, max(1 if self.setup.buckets else LEAST_BATCH, len(samples)))
        rows, keys = filled(size, spread.ways)
        parts = [list(samples[start : start + size]) for start in range(0, len(samples), size)]
        pixels, features = [], []
        for start in tqdm(range(0, len(parts), keys), "drawing", disable=not progress, leave=False):
            together = parts[start : start + keys]
            padded = [sample for part in together for sample in part + part[-1:] * (rows - len(part))]
            padded += padded[-1:] * (rows * keys - len(padded))
            mine = padded[spread.share(len(padded))]
            with spread.open():
                empty = mllm_inputs(spread.put(examples.batch(mine, words=False)))
                batch = spread.put(examples.batch(mine))
                painted = self._compiled(how)(params, batch, empty, noise_keys(seed, start, keys))
            kept = [i * rows + row for i, part in enumerate(together) for row in range(len(part))]
            pixels.append(to_bytes(distributed.whole(painted.pixels)[kept]))
            if painted.canvas is not None:
                features.append(distributed.whole(painted.canvas)[kept])
        return Drawn(np.concatenate(pixels), np.concatenate(features) if features else None)

    def _check(self, params: Params, how: How) -> None:
        have = flat(params).keys()
        complete = not self._configured or flat(parameters.param_shapes(self.setup)).keys() <= have
        if not complete and (lacking := self._reads(how).keys() - have):
            raise ValueError(f"{how.bucket.task} reads {min(lacking)}, and the parameters were loaded without it")


def filled(size: int, shards: int) -> tuple[int, int]:
    """(rows, parts): how batches of ``size`` results go onto devices that split a batch into so many shards.

    Each of the ``parts`` batches is filled up to ``rows``; together they divide among the shards.
    """
    if size >= shards:
        return size + -size % shards, 1
    rows = next(rows for rows in range(size, shards + 1) if shards % rows == 0)
    return rows, shards // rows


def noise_keys(seed: int, first: int, count: int) -> Key[Array, "*k"]:
    """The keys of consecutive batches; that of one batch alone has no axis."""
    keys = [jax.random.fold_in(noise_key(seed), number) for number in range(first, first + count)]
    return keys[0] if count == 1 else jnp.stack(keys)


def blank(prompt: str, bucket: Bucket) -> Sample:
    """A sample of which only the prompt is known."""
    return Sample(prompt, np.zeros((bucket.frames, *bucket.size, 3), np.uint8), task=bucket.task)


def from_words(bucket: Bucket) -> Bucket:
    """The bucket itself where its task needs only a prompt, else one of the same shape whose task does."""
    if TASKS[bucket.task].vae == TASKS[bucket.task].mllm == "nothing":
        return bucket
    task = "text_to_image" if bucket.frames == 1 else "text_to_video"
    return dataclasses.replace(bucket, task=task, references=0)


def noise_key(seed: int) -> Key[Array, ""]:
    """The key of a seed. Raises UserError for one outside of 0 to 2^64 - 1.

    A key of JAX takes 32 bits of a seed. The upper half of a larger one is folded in, so that each has its own noise.
    """
    if not 0 <= seed < 1 << 64:
        raise UserError(f"the seed is {seed}, expected a number from 0 to {(1 << 64) - 1}")
    key = jax.random.key(seed & 0xFFFFFFFF)
    return jax.random.fold_in(key, seed >> 32) if seed >> 32 else key


def to_bytes(pixels: Float[np.ndarray, "*n"] | Float[Array, "*n"]) -> UInt8[np.ndarray, "*n"]:
    """Pixels in [-1, 1] to uint8 on the host. Raises NonFinitePixels for NaN or infinity."""
    pixels = np.asarray(pixels)
    if bad := int(np.sum(~np.isfinite(pixels))):
        raise NonFinitePixels(
            f"{bad} of {pixels.size} values of the result are not finite; "
            "a smaller guidance, more steps or float32 may help"
        )
    return np.round((np.clip(pixels, -1.0, 1.0) + np.float32(1.0)) * np.float32(127.5)).astype(np.uint8)
