"""From prompts to pictures: encode and plan once, follow the velocity from noise to data, decode."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Key

from metacanvas_jax.data.batch import Batch, given_latents, mllm_inputs
from metacanvas_jax.diffusion.flow import Latents, Time
from metacanvas_jax.diffusion.guidance import classifier_free, pair
from metacanvas_jax.diffusion.samplers import Method, sample, sample_trajectory
from metacanvas_jax.diffusion.schedules import Schedule
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.tasks import TASKS, TaskName, clean_first_levels, for_dit, replace_first_frame
from metacanvas_jax.types import Given, Grid, MllmInputs, Params, Plan
from metacanvas_jax.vae.tiling import tiled_decode

Guide = TypeVar("Guide")

MAP_TIME = 0.5  # the noise level at which canvas maps are taken (paper, appendix I: 499 of 1000)


@struct.dataclass
class Painted:
    """Pictures in [-1, 1], and ``canvas_features`` half-way through the steps (None without maps or canvas).

    Of a film of the sampling, t are its moments.
    """

    pixels: Float[Array, "b t h w 3"]
    canvas: Float[Array, "b t h w d"] | None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How noise becomes latents. ``guidance`` is the guidance scale; 1 turns guidance off and halves the cost.

    ``rescale`` is that of ``classifier_free``.
    """

    schedule: Schedule
    method: Method = "euler"
    guidance: float = 1.0
    rescale: Grid | None = None


def draw(
    velocity: Callable[[Latents, Time, Guide], Latents],
    guide: Guide,
    noise: Latents,
    recipe: Recipe,
    *,
    empty: Guide | None = None,
    first: Float[Array, "b 1 h w c"] | None = None,
    stop: int | None = None,
    every: bool = False,
) -> Latents:
    """Latents from noise: ``velocity(latents, time, guide)`` followed along a schedule.

    ``guide`` is what the network is conditioned on: any tree of arrays with the batch in front. ``empty`` is the same
    for the empty prompt; classifier-free guidance needs it. ``first`` is the clean latent of an image (first-frame
    image-to-video): in every step and in the result it is the first frame, at noise level 0. ``stop`` is that of
    ``samplers.sample``. ``every`` returns the latents of all stages [s b t h w c], as ``samplers.sample_trajectory``;
    it goes without ``first`` and ``stop``.
    """
    if recipe.guidance == 1.0:
        bound = lambda z, t: velocity(z, t, guide)  # noqa: E731
    else:
        both = pair(guide, empty)
        bound = classifier_free(lambda z, t: velocity(z, t, both), recipe.guidance, recipe.rescale)
    if every:
        return sample_trajectory(bound, noise, recipe.schedule, recipe.method)
    if first is None:
        return sample(bound, noise, recipe.schedule, recipe.method, stop=stop)

    def after_first(z: Latents, t: Time) -> Latents:
        return bound(replace_first_frame(z, first), clean_first_levels(t, z.shape[1]))

    drawn = sample(after_first, noise, recipe.schedule, recipe.method, stop=stop)
    return replace_first_frame(drawn, first)


Paint = Callable[[Params, Batch, MllmInputs, Key[Array, "*k"]], Painted]
"""``paint(params, batch, empty, key)``: ``batch`` is as in training (``train/objectives.py``); of its ``pixels`` only a
first frame is read. ``empty`` are the inputs of the empty prompt, for guidance. ``key`` may be several [k], each for
the next of k equal parts of the batch."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What is painted: the grid of its latents and its task.

    ``channels`` and ``guidance`` are those of ``tasks.for_dit``. ``canvas`` False paints without the model's canvas.
    ``tile`` is the side, in latents, of the tiles that are decoded one by one (0: all at once).
    """

    latents: Grid
    task: str = "text_to_image"
    channels: bool = False
    guidance: float | None = None
    canvas: bool = True
    tile: int = 0


def make_paint(
    model: MetaCanvas,
    vae: nn.Module,
    recipe: Recipe,
    target: Target,
    *,
    maps: bool = False,
    moments: int = 0,
    complete: Callable[[Params], Params] = lambda params: params,
) -> Paint:
    """A jitted ``Paint``. ``params`` hold the model's parameters and ``vae``, once ``complete`` has added what nothing
    reads.

    Noise depends on ``key`` only: one key gives the same noise for any prompts. With guidance 1 the empty prompt is not
    run. ``maps`` also returns the canvas features, which repeats the first half of the steps. With ``moments`` n, a
    picture becomes a film of its sampling: n stages from noise to the picture, and the canvas features of each. Raises
    ValueError for the film of a video.
    """
    row = TASKS[target.task]
    if moments and target.latents[0] > 1:
        raise ValueError("a film of the sampling shows a picture, not a video")

    def paint(params: Params, batch: Batch, empty: MllmInputs, key: Key[Array, "*k"]) -> Painted:
        params = complete(params)
        variables = {"params": {name: tree for name, tree in params.items() if name != "vae"}}
        inputs = mllm_inputs(batch)
        noise = noise_of(key, (inputs.tokens.shape[0], *target.latents, vae.channels))
        latents = given_latents(vae, params["vae"], TaskName(target.task), batch)

        def plan_of(inputs: MllmInputs) -> Plan:
            shape = None if model.canvas is None else model.canvas.config.shape_for(target.latents)
            plan = model.apply(variables, model.apply(variables, inputs, method="read"), shape, method="plan")
            return plan if target.canvas else plan.replace(canvas=None)

        def velocity(latents: Latents, time: Time, guide: tuple[Plan, Given]) -> Latents:
            return model.apply(variables, latents, time, *guide, method="velocity")

        plan = plan_of(inputs)
        given = for_dit(latents, noise, channels=target.channels, guidance=target.guidance)
        nothing = None if recipe.guidance == 1.0 else (plan_of(empty), given)
        first = latents.first if row.first_frame == "clean" else None

        def features(z: Latents, time: Float[Array, ""]) -> Float[Array, "b t h w d"]:
            level = jnp.broadcast_to(time, z.shape[:1])
            return model.apply(variables, z, level, plan, given, method=canvas_features)

        if moments:
            stages = draw(velocity, (plan, given), noise, recipe, empty=nothing, every=True)
            shown = np.linspace(0, recipe.schedule.steps, moments).round().astype(int)
            times = jnp.asarray(
                np.asarray(recipe.schedule.times)[np.minimum(shown, recipe.schedule.steps - 1)], jnp.float32
            )
            pixels = jax.lax.map(lambda z: decode(vae, params["vae"], z, target.tile), stages[shown])
            canvas = None if plan.canvas is None else jax.lax.map(lambda zt: features(*zt), (stages[shown], times))
            return Painted(_in_time(pixels), None if canvas is None else _in_time(canvas))
        painted = draw(velocity, (plan, given), noise, recipe, empty=nothing, first=first)
        canvas = None
        if maps and plan.canvas is not None:
            middle = recipe.schedule.step_near(MAP_TIME)
            halfway = draw(velocity, (plan, given), noise, recipe, empty=nothing, first=first, stop=middle)
            canvas = features(halfway, jnp.float32(recipe.schedule.times[middle]))
        return Painted(decode(vae, params["vae"], painted, target.tile), canvas)

    return jax.jit(paint)


def _in_time(x: Float[Array, "n b 1 *d"]) -> Float[Array, "b n *d"]:
    return jnp.swapaxes(x[:, :, 0], 0, 1)


def noise_of(key: Key[Array, "*k"], shape: tuple[int, ...]) -> Float[Array, "b t h w c"]:
    """Noise of a shape; of several keys each makes an equal part of the samples.

    A sample's noise does not depend on how many come after it.
    """
    if key.ndim == 0:
        return jax.random.normal(key, shape, jnp.float32)
    part = (shape[0] // key.shape[0], *shape[1:])
    return jax.vmap(lambda one: jax.random.normal(one, part, jnp.float32))(key).reshape(shape)


def canvas_features(
    model: MetaCanvas, latents: Latents, time: Time, plan: Plan, given: Given
) -> Float[Array, "b t h w d"]:
    """What the canvas connector adds to the patch tokens; the canvas maps of the paper (figure 5) are made of it."""
    bare = model.dit.embed(latents, time, plan.text, given)
    return model.embed(latents, time, plan, given).grid - bare.grid


def decode(vae: nn.Module, params: Params, latents: Latents, tile: int = 0) -> Float[Array, "b t h w 3"]:
    """Float32 pixels of latents; latents larger than ``tile`` a side are decoded in overlapping tiles (0: at once)."""

    def whole(z: Latents) -> Float[Array, "b t h w 3"]:
        return vae.apply({"params": params}, z, method="decode").astype(jnp.float32)

    if not tile or max(latents.shape[2:4]) <= tile:
        return whole(latents)
    return tiled_decode(whole, latents, spatial=vae.spatial, tile=tile, overlap=max(1, tile // 4))
