"""From samples and parameters to pictures and videos, on whatever devices there are."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8
from tqdm import tqdm

from metacanvas_jax.config.networks import autoencoder, network
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.data.batch import mllm_inputs
from metacanvas_jax.data.inputs import Inputs
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.shapes import latent_grid
from metacanvas_jax.errors import UserError
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.paint.sampling import Paint, Recipe, Target, make_paint
from metacanvas_jax.parallel import distributed
from metacanvas_jax.tasks import TASKS, Bucket
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

    ``model`` is the network where it is not that of the config. Raises UserError for a tokenizer that is missing.
    """

    def __init__(self, setup: Experiment, model: MetaCanvas | None = None):
        self.setup = setup
        self.inputs = Inputs(setup)
        self._model, self._vae = network(setup) if model is None else model, autoencoder(setup)
        self._compiled = functools.lru_cache(maxsize=8)(self._compile)

    def _compile(self, bucket: Bucket, steps: int, guidance: float, maps: bool, canvas: bool, tile: int) -> Paint:
        setup, grid = self.setup, latent_grid(self.setup, bucket)
        tokens = int(np.prod(grid)) // int(np.prod(self._model.dit.patch))
        sampler = dataclasses.replace(setup.sampler, steps=steps, guidance=guidance)
        target = Target(grid, bucket.task, setup.given_channels, setup.dit_guidance, canvas, tile)
        recipe = Recipe(sampler.make(tokens), sampler.method, guidance)
        return make_paint(self._model, self._vae, recipe, target, maps=maps)

    def draw(self, params: Params, prompts: Sequence[str], **options) -> Drawn:
        """One result per prompt, in the shape of the config's first bucket; ``options`` are those of ``paint``."""
        bucket = from_words(self.setup.shapes[0])
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
        progress: bool = False,
    ) -> Drawn:
        """One result for every sample of a task, in the shape of a bucket.

        Of a sample's target only a first frame that the task gives is read. The noise of a result depends on ``seed``
        and its place in the list. ``maps`` asks for the canvas features. ``canvas`` False leaves the canvas out;
        ``tile`` is that of ``sampling.Target``.
        """
        sampler = self.setup.sampler
        steps = sampler.steps if steps is None else steps
        guidance = sampler.guidance if guidance is None else guidance
        paint = self._compiled(bucket, steps, guidance, maps, canvas, tile)
        examples = self.inputs.examples(bucket, target=False)
        size = min(self.setup.eval.batch, max(1 if self.setup.buckets else LEAST_BATCH, len(samples)))
        pixels, features = [], []
        starts = range(0, len(samples), size)
        for number, start in enumerate(tqdm(starts, "drawing", disable=not progress, leave=False)):
            part = list(samples[start : start + size])
            padded = part + part[-1:] * (size - len(part))
            key = jax.random.fold_in(noise_key(seed), number)
            empty = mllm_inputs(examples.batch(padded, words=False))
            painted = paint(params, examples.batch(padded), empty, key)
            pixels.append(to_bytes(distributed.whole(painted.pixels)[: len(part)]))
            if painted.canvas is not None:
                features.append(distributed.whole(painted.canvas)[: len(part)])
        return Drawn(np.concatenate(pixels), np.concatenate(features) if features else None)


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


def to_bytes(pixels: Float[Array, "*n"]) -> UInt8[np.ndarray, "*n"]:
    """Pixels in [-1, 1] to uint8 on the host. Raises NonFinitePixels for NaN or infinity."""
    if bad := int(jnp.sum(~jnp.isfinite(pixels))):
        raise NonFinitePixels(
            f"{bad} of {pixels.size} values of the result are not finite; "
            "a smaller guidance, more steps or float32 may help"
        )
    return np.asarray(jnp.round((jnp.clip(pixels, -1.0, 1.0) + 1.0) * 127.5)).astype(np.uint8)
