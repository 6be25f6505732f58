"""From prompts to pictures: read once, plan once, then follow the velocity from noise to data and decode."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Key

from metacanvas_jax.diffusion.flow import Latents, Time
from metacanvas_jax.diffusion.guidance import classifier_free, pair
from metacanvas_jax.diffusion.samplers import Method, sample
from metacanvas_jax.diffusion.schedules import Schedule
from metacanvas_jax.dit.wan import first_frame_inputs, replace_first_frame
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.types import Grid, MllmInputs, Params

Guide = TypeVar("Guide")

MAP_TIME = 0.5  # the noise level at which canvas maps are taken (paper, appendix I: 499 of 1000)


@struct.dataclass
class Painted:
    """Pictures in [-1, 1], and what the canvas connector added to the tokens half-way (None without maps or canvas)."""

    pixels: Float[Array, "b t h w 3"]
    canvas: Float[Array, "b t h w d"] | None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How noise becomes latents. ``guidance`` is the scale of classifier-free guidance; 1 is none, at half the cost."""

    schedule: Schedule
    method: Method = "euler"
    guidance: float = 1.0


def draw(
    velocity: Callable[[Latents, Time, Guide], Latents],
    guide: Guide,
    noise: Latents,
    recipe: Recipe,
    *,
    empty: Guide | None = None,
    first: Float[Array, "b 1 h w c"] | None = None,
    stop: int | None = None,
) -> Latents:
    """Latents from noise: ``velocity(latents, time, guide)`` followed along a schedule.

    ``guide`` is what the network is conditioned on, any tree of arrays with the batch in front; ``empty`` is the same
    of the empty prompt, which guidance needs. With ``first``, the clean latent of an image, every step sees it as its
    first frame at noise level 0, and so does the result (first-frame image-to-video; diffusers
    ``pipeline_wan_i2v.py`` with ``expand_timesteps``). ``stop`` is that of ``samplers.sample``.
    """
    if recipe.guidance == 1.0:
        bound = lambda z, t: velocity(z, t, guide)  # noqa: E731
    else:
        both = pair(guide, empty)
        bound = classifier_free(lambda z, t: velocity(z, t, both), recipe.guidance)
    if first is None:
        return sample(bound, noise, recipe.schedule, recipe.method, stop=stop)

    def after_first(z: Latents, t: Time) -> Latents:
        seen, levels, _ = first_frame_inputs(z, first, t)
        return bound(seen, levels)

    drawn = sample(after_first, noise, recipe.schedule, recipe.method, stop=stop)
    return replace_first_frame(drawn, first)


Painter = Callable[[Params, MllmInputs, MllmInputs, Key[Array, ""]], Painted]
"""``paint(params, inputs, empty, key)``: ``empty`` is the empty prompt for guidance, with the batch of ``inputs``."""


def make_painter(
    model: MetaCanvas,
    vae: nn.Module,
    schedule: Schedule,
    method: Method,
    guidance: float,
    latents: Grid,
    *,
    maps: bool = False,
) -> Painter:
    """A jitted painter of latents ``(t, h, w)``. ``params`` hold the model's parameters and ``vae``.

    Noise depends on ``key`` alone, so that one key gives one set of noises for any prompts. With guidance 1 the empty
    prompt is not run. ``maps`` asks for the canvas features, which costs the first half of the steps again.
    """

    def paint(params: Params, inputs: MllmInputs, empty: MllmInputs, key: Key[Array, ""]) -> Painted:
        variables = {"params": {name: tree for name, tree in params.items() if name != "vae"}}

        def planned(inputs: MllmInputs):
            context = model.apply(variables, inputs, method="read")
            return model.apply(variables, context, method="plan")

        plan = planned(inputs)
        noise = jax.random.normal(key, (inputs.tokens.shape[0], *latents, vae.channels), jnp.float32)
        if guidance == 1.0:
            velocity = lambda z, t: model.apply(variables, z, t, plan, method="velocity")  # noqa: E731
        else:
            both = pair(plan, planned(empty))
            velocity = classifier_free(lambda z, t: model.apply(variables, z, t, both, method="velocity"), guidance)
        painted = sample(velocity, noise, schedule, method)
        canvas = None
        if maps and plan.canvas is not None:
            middle = schedule.step_near(MAP_TIME)
            halfway = sample(velocity, noise, schedule, method, stop=middle)
            time = jnp.full(noise.shape[:1], schedule.times[middle], jnp.float32)
            canvas = model.apply(variables, halfway, time, plan, method="canvas_features")
        return Painted(vae.apply({"params": params["vae"]}, painted, method="decode"), canvas)

    return jax.jit(paint)
