"""Classifier-free guidance: extrapolates from the velocity without the prompt to the velocity with it."""

from typing import TypeVar

import jax
import jax.numpy as jnp

from metacanvas_jax.diffusion.flow import Latents, Time, Velocity

Tree = TypeVar("Tree")


def pair(conditional: Tree, unconditional: Tree) -> Tree:
    """Concatenates two trees of arrays along their batch axes, ``[b ...]`` and ``[b ...]`` to ``[2b ...]``.

    It prepares the condition of a network for ``classifier_free``. The conditional rows come first.
    """
    return jax.tree.map(lambda c, u: jnp.concatenate([c, u]), conditional, unconditional)


def classifier_free(velocity_of_pair: Velocity, scale: float) -> Velocity:
    """One velocity from a conditional and an unconditional one, computed in one batch (arXiv 2207.12598).

    ``velocity_of_pair`` takes latents ``[2b t h w c]`` and times ``[2b]`` (or ``[2b t]``). Its condition is fixed: the
    first ``b`` rows have the prompt, the last ``b`` rows have none (see ``pair``). The result takes latents
    ``[b t h w c]`` and times ``[b]`` (or ``[b t]``) and returns ``u + scale * (c - u)``. A guidance scale of 1 gives
    the conditional velocity; sampling with that alone costs half as much.
    """

    def velocity(latents: Latents, time: Time) -> Latents:
        both = velocity_of_pair(jnp.concatenate([latents, latents]), jnp.concatenate([time, time]))
        conditional, unconditional = jnp.split(both, 2)
        return unconditional + scale * (conditional - unconditional)

    return velocity
