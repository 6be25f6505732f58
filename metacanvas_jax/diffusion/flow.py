"""Rectified flow: the path from data to noise, how training draws its noise levels, and the loss (paper A.2).

A noise level ``t`` lies in [0, 1]; 1 is pure noise. The path is straight, ``z_t = (1 - t) z + t noise``, so its
velocity ``noise - z`` does not depend on ``t`` and a velocity network needs no weighting of its loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

Latents = Float[Array, "b t h w c"]
Time = Float[Array, "b"] | Float[Array, "b t"]
Velocity = Callable[[Latents, Time], Latents]
"""A velocity network with a fixed condition: (latents [b t h w c], noise level [b] or [b t]) -> [b t h w c]."""


@dataclass(frozen=True)
class TimeConfig:
    """How training draws noise levels.

    ``uniform`` draws from [0, 1] and ignores ``mean`` and ``std``. ``logit_normal`` draws ``sigmoid(mean + std * n)``
    with standard normal ``n``. A ``shift`` above 1 then moves the levels towards noise, which larger pictures need.
    """

    kind: Literal["uniform", "logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self):
        if self.std <= 0:
            raise ValueError(f"time.std is {self.std}; expected a positive number")
        if self.shift <= 0:
            raise ValueError(f"time.shift is {self.shift}; expected a positive number (1 changes nothing)")


def shift_time(time: Float[Array, "*n"], shift: float) -> Float[Array, "*n"]:
    """``s t / (1 + (s - 1) t)``: keeps 0 and 1, moves everything between towards noise when ``s > 1``."""
    return shift * time / (1 + (shift - 1) * time)


def sample_time(key: Key[Array, ""], shape: tuple[int, ...], config: TimeConfig) -> Float[Array, "*n"]:
    """Noise levels for training, float32, of the given shape: ``(b,)``, or ``(b, t)`` for one level per frame."""
    if config.kind == "uniform":
        time = jax.random.uniform(key, shape, jnp.float32)
    else:
        time = jax.nn.sigmoid(config.mean + config.std * jax.random.normal(key, shape, jnp.float32))
    return shift_time(time, config.shift)


def expand_time(time: Time, ndim: int) -> Float[Array, "..."]:
    """Adds trailing axes of length 1 so that ``time`` broadcasts against latents with ``ndim`` axes."""
    return jnp.expand_dims(time, range(time.ndim, ndim))


def interpolate(latents: Latents, noise: Latents, time: Time) -> Latents:
    """The point at noise level ``time`` on the straight path from ``latents`` (0) to ``noise`` (1)."""
    level = expand_time(time, latents.ndim).astype(latents.dtype)
    return (1 - level) * latents + level * noise


def flow_loss(
    velocity: Velocity,
    latents: Latents,
    noise: Latents,
    time: Time,
    mask: Bool[Array, "b #t #h #w"] | None = None,
) -> Float[Array, ""]:
    """Mean squared error of the predicted velocity against ``noise - latents``, in float32.

    Positions where ``mask`` is False are left out of the mean: frames given as a condition have no meaningful target.
    The loss is 0 if all positions are left out.
    """
    predicted = velocity(interpolate(latents, noise, time), time)
    target = noise.astype(jnp.float32) - latents.astype(jnp.float32)
    error = jnp.mean(jnp.square(predicted.astype(jnp.float32) - target), axis=-1)
    if mask is None:
        return jnp.mean(error)
    counted = jnp.broadcast_to(mask, error.shape)
    return jnp.sum(jnp.where(counted, error, 0.0)) / jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)
