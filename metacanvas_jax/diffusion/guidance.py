"""Classifier-free guidance: extrapolates from the velocity without the prompt to the velocity with it."""

from typing import TypeVar

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metacanvas_jax.diffusion.flow import Latents, Time, Velocity
from metacanvas_jax.types import Grid

Tree = TypeVar("Tree")


def pair(conditional: Tree, unconditional: Tree) -> Tree:
    """Concatenates two trees of arrays along their batch axes, ``[b ...]`` and ``[b ...]`` to ``[2b ...]``.

    It prepares the condition of a network for ``classifier_free``. The conditional rows come first.
    """
    return jax.tree.map(lambda c, u: jnp.concatenate([c, u]), conditional, unconditional)


def classifier_free(velocity_of_pair: Velocity, scale: float, rescale: Grid | None = None) -> Velocity:
    """One velocity from a conditional and an unconditional one, computed in one batch (arXiv 2207.12598).

    ``velocity_of_pair`` takes latents ``[2b t h w c]`` and times ``[2b]`` (or ``[2b t]``). Its condition is fixed: the
    first ``b`` rows have the prompt, the last ``b`` rows have none (see ``pair``). The result takes latents
    ``[b t h w c]`` and times ``[b]`` (or ``[b t]``) and returns ``u + scale * (c - u)``. A guidance scale of 1 gives
    the conditional velocity; sampling with that alone costs half as much. With ``rescale``, the size of a patch of
    latents, the result gets the norm of ``c`` in every patch (see ``with_norms_of``).
    """

    def velocity(latents: Latents, time: Time) -> Latents:
        both = velocity_of_pair(jnp.concatenate([latents, latents]), jnp.concatenate([time, time]))
        conditional, unconditional = jnp.split(both, 2)
        guided = unconditional + scale * (conditional - unconditional)
        return guided if rescale is None else with_norms_of(conditional, guided, rescale)

    return velocity


def with_norms_of(model: Latents, latents: Latents, patch: Grid) -> Latents:
    """``latents`` with the Euclidean norms of ``model`` in every patch (frames, rows, columns) of all channels.

    A patch of zeros stays as it is. Source: the "true" guidance of diffusers' editing pipelines.
    """
    t, h, w = patch

    def norms(z: Latents) -> Float[Array, "b T H W 1"]:
        return jnp.sqrt(einops.reduce(z * z, "b (t o) (h p) (w q) c -> b t h w 1", "sum", o=t, p=h, q=w))

    factor = norms(model) / jnp.maximum(norms(latents), 1e-12)
    return latents * einops.repeat(factor, "b t h w 1 -> b (t o) (h p) (w q) 1", o=t, p=h, q=w)
