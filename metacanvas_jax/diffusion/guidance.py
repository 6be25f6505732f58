"""Classifier-free guidance: away from what the network paints without the prompt, towards what it paints with it."""

from typing import TypeVar

import jax
import jax.numpy as jnp

from metacanvas_jax.diffusion.flow import Latents, Time, Velocity

Tree = TypeVar("Tree")


def pair(conditional: Tree, unconditional: Tree) -> Tree:
    """Concatenates two trees of arrays along their batch axes, ``[b ...]`` and ``[b ...]`` to ``[2b ...]``.

    For the condition of a network that ``classifier_free`` is to guide: conditional rows first.
    """
    return jax.tree.map(lambda c, u: jnp.concatenate([c, u]), conditional, unconditional)


def classifier_free(velocity_of_pair: Velocity, scale: float) -> Velocity:
    """One velocity from a conditional and an unconditional one, computed in one batch (arXiv 2207.12598).

    ``velocity_of_pair`` takes latents ``[2b t h w c]`` and times ``[2b]`` (or ``[2b t]``), and is bound to a condition
    whose first ``b`` rows carry the prompt and whose last ``b`` rows carry none (see ``pair``). The result takes
    latents ``[b t h w c]`` and times ``[b]`` (or ``[b t]``) and returns ``u + scale * (c - u)``. Scale 1 is the
    conditional velocity: sample with that alone, at half the cost, instead of calling this.
    """

    def velocity(latents: Latents, time: Time) -> Latents:
        both = velocity_of_pair(jnp.concatenate([latents, latents]), jnp.concatenate([time, time]))
        conditional, unconditional = jnp.split(both, 2)
        return unconditional + scale * (conditional - unconditional)

    return velocity
