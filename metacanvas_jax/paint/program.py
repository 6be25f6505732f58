"""The program that draws results of one shape of an experiment, and which parameters it reads; no tokenizer needed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from metacanvas_jax.config.networks import autoencoder, network
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.data.batch import mllm_inputs
from metacanvas_jax.data.shapes import drawn_shapes, latent_grid
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.paint import needs, placing
from metacanvas_jax.paint.sampling import Paint, Recipe, Target, make_paint
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.train import parameters
from metacanvas_jax.trees import flat, nested
from metacanvas_jax.types import Params


@dataclasses.dataclass(frozen=True)
class How:
    """How results of one shape are drawn; the options of ``Painter.paint`` with the config's values filled in."""

    bucket: Bucket
    steps: int
    guidance: float
    maps: bool = False
    canvas: bool = True
    tile: int = 0
    moments: int = 0


def how_to(
    setup: Experiment, bucket: Bucket, *, steps: int | None = None, guidance: float | None = None, **rest: bool | int
) -> How:
    """Options of a drawing; None is the config's value."""
    steps = setup.sampler.steps if steps is None else steps
    return How(bucket, steps, setup.sampler.guidance if guidance is None else guidance, **rest)


def program(setup: Experiment, how: How, model: MetaCanvas | None = None) -> Paint:
    """The jitted program. Parameters that it does not read may be left out of its argument.

    ``model`` is the network where it is not that of the config; it then needs all of its parameters.
    """
    complete = functools.partial(_complete, setup) if model is None else lambda params: params
    model, vae, grid = network(setup) if model is None else model, autoencoder(setup), latent_grid(setup, how.bucket)
    target = Target(grid, how.bucket.task, setup.given_channels, setup.dit_guidance, how.canvas, how.tile)
    return make_paint(
        model, vae, recipe_of(setup, how, model), target, maps=how.maps, moments=how.moments, complete=complete
    )


def recipe_of(setup: Experiment, how: How, model: MetaCanvas) -> Recipe:
    """The sampler of the config with the steps and the guidance of a drawing."""
    tokens = int(np.prod(latent_grid(setup, how.bucket))) // int(np.prod(model.dit.patch))
    sampler = dataclasses.replace(setup.sampler, steps=how.steps, guidance=how.guidance)
    rescale = model.dit.patch if sampler.rescale else None
    return Recipe(sampler.make(tokens), sampler.method, how.guidance, rescale)


def reads(setup: Experiment, how: How, paint: Paint | None = None) -> dict[str, np.dtype]:
    """The parameters that a drawing reads, by path, and the dtype in which to hold each (`paint/needs.py`)."""
    paint = program(setup, how) if paint is None else paint
    params, batch = placing.abstract(setup), drawn_shapes(setup, how.bucket)
    key = jax.eval_shape(lambda: jax.random.key(0))
    traced = paint.trace(params, batch, jax.eval_shape(mllm_inputs, batch), key)
    return needs.needed(traced.jaxpr, list(flat(params).items()))


def _complete(setup: Experiment, params: Params) -> Params:
    """Zeros for what was left out: nothing reads them, but networks ask for all their parameters by name."""
    have, every = flat(params), flat(parameters.param_shapes(setup))
    if not every.keys() - have.keys():
        return params
    return nested({path: have[path] if path in have else jnp.zeros(x.shape, x.dtype) for path, x in every.items()})
