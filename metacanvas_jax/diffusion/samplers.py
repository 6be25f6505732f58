"""Samplers: from noise to data along the predicted velocity, as plain functions under ``lax.scan``.

Every method here is linear in the outputs of the network: the next latents are a weighted sum of the current latents
and of the last data estimates ``x - sigma * v``. The weights depend on the schedule only. They are computed on the host
in float64; a step is one weighted sum in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from metacanvas_jax.diffusion.flow import Latents, Velocity
from metacanvas_jax.diffusion.schedules import Schedule

Method = str
"""One of "euler", "dpmpp_2m", "unipc"."""

Weights = Float[np.ndarray, "steps k"]


def sample(
    velocity: Velocity, noise: Latents, schedule: Schedule, method: Method = "euler", *, stop: int | None = None
) -> Latents:
    """Integrates from noise to data; ``velocity(latents, time [b])`` is the network with a fixed condition.

    Latents are float32 for every dtype of the network. With ``stop=i`` sampling ends early and returns the latents that
    the network would get at step ``i``. Raises ValueError for an unknown method or a ``stop`` outside 0..steps.
    """
    return _run(velocity, noise, schedule, method, stop, keep=False)[0]


def sample_trajectory(
    velocity: Velocity, noise: Latents, schedule: Schedule, method: Method = "euler"
) -> Float[Array, "stages b t h w c"]:
    """As ``sample``, but returns all latents: entry ``i`` is the network's input at step ``i``, the last the result."""
    _, seen = _run(velocity, noise, schedule, method, None, keep=True)
    return jnp.concatenate([noise.astype(jnp.float32)[None], seen])


def _run(velocity: Velocity, noise: Latents, schedule: Schedule, method: Method, stop: int | None, *, keep: bool):
    if method not in _METHODS:
        raise ValueError(f"unknown sampler {method!r}; expected one of {', '.join(_METHODS)}")
    stop = schedule.steps if stop is None else stop
    if not 0 <= stop <= schedule.steps:
        raise ValueError(f"stop is step {stop}, but the schedule has {schedule.steps} steps")
    weights_of, step, memories = _METHODS[method]
    noise = noise.astype(jnp.float32)
    weights = jnp.asarray(weights_of(np.asarray(schedule.sigmas, np.float64))[:stop], jnp.float32)
    sigmas = jnp.asarray(schedule.sigmas[:stop], jnp.float32)
    times = jnp.asarray(schedule.times[:stop], jnp.float32)

    def body(carry, row):
        latents, *memory = carry
        sigma, time, w = row
        v = velocity(latents, jnp.broadcast_to(time, latents.shape[:1])).astype(latents.dtype)
        carry = step(latents, latents - sigma * v, tuple(memory), w)
        return carry, carry[0] if keep else None

    start = (noise, *(jnp.zeros_like(noise) for _ in range(memories)))
    (latents, *_), seen = jax.lax.scan(body, start, (sigmas, times, weights))
    return latents, seen


def _log_snr(sigmas: Float[np.ndarray, " s"]) -> Float[np.ndarray, " s"]:
    """log(alpha / sigma) of the straight path. It is infinite at both ends, where the formulas below take limits."""
    with np.errstate(divide="ignore"):
        return np.log(1 - sigmas) - np.log(sigmas)


def euler_weights(sigmas: Float[np.ndarray, " s"]) -> Weights:
    """Weights of (latents, data): ``x + (sigma' - sigma) v`` is ``r x + (1 - r) data`` with ``r = sigma' / sigma``."""
    ratio = sigmas[1:] / sigmas[:-1]
    return np.stack([ratio, 1 - ratio], axis=1)


def dpmpp_2m_weights(sigmas: Float[np.ndarray, " s"]) -> Weights:
    """Weights of (latents, data, previous data) for DPM-Solver++(2M), midpoint form.

    First order at the first step and at the last, which ends at sigma 0 (arXiv 2211.01095; diffusers
    ``DPMSolverMultistepScheduler`` with flow prediction and its defaults).
    """
    steps, lam = len(sigmas) - 1, _log_snr(sigmas)
    weights = np.zeros((steps, 3))
    for i in range(steps):
        h = lam[i + 1] - lam[i]
        gain = -(1 - sigmas[i + 1]) * np.expm1(-h)
        slope = 0.0 if i in (0, steps - 1) else 0.5 * gain * h / (lam[i] - lam[i - 1])
        weights[i] = sigmas[i + 1] / sigmas[i], gain + slope, -slope
    return weights


def unipc_weights(sigmas: Float[np.ndarray, " s"]) -> Weights:
    """Weights of UniPC, order 2, B(h) = expm1(-h), data prediction, lower order at both ends.

    The corrected latents are a sum with the first five weights, of (latents, last corrected latents, data, previous
    data, data before that). The next latents are a sum with the other three, of (corrected latents, data, previous
    data). Sources: arXiv 2302.04867; diffusers ``UniPCMultistepScheduler`` with flow prediction, solver bh2.
    """
    steps, lam = len(sigmas) - 1, _log_snr(sigmas)
    order = [min(2, i + 1, steps - i) for i in range(steps)]
    weights = np.zeros((steps, 8))
    weights[0, :5] = 1, 0, 0, 0, 0
    for i in range(steps):
        if i > 0:  # correct the step from i - 1 to i, now that the data estimate at i is known
            h = lam[i] - lam[i - 1]
            gain = -(1 - sigmas[i]) * np.expm1(-h)
            new, old = 0.5, 0.0
            if order[i - 1] == 2:
                r = (lam[i - 2] - lam[i - 1]) / h
                phi_1 = np.expm1(-h) / -h - 1
                phi_2 = phi_1 / -h - 0.5
                b_1, b_2 = phi_1 / np.expm1(-h), 2 * phi_2 / np.expm1(-h)
                rho = (b_1 - b_2) / (1 - r)  # the 2 x 2 system of the order conditions, solved by hand
                new, old = b_1 - rho, rho / r
            weights[i, :5] = 0, sigmas[i] / sigmas[i - 1], gain * new, gain * (1 - new - old), gain * old
        h = lam[i + 1] - lam[i]
        gain = -(1 - sigmas[i + 1]) * np.expm1(-h)
        slope = 0.0 if order[i] == 1 else 0.5 * gain * h / (lam[i - 1] - lam[i])
        weights[i, 5:] = sigmas[i + 1] / sigmas[i], gain - slope, slope
    return weights


def _euler_step(latents: Latents, data: Latents, memory: tuple, w: Float[Array, "2"]) -> tuple:
    return (w[0] * latents + w[1] * data,)


def _dpmpp_2m_step(latents: Latents, data: Latents, memory: tuple, w: Float[Array, "3"]) -> tuple:
    (previous,) = memory
    return w[0] * latents + w[1] * data + w[2] * previous, data


def _unipc_step(latents: Latents, data: Latents, memory: tuple, w: Float[Array, "8"]) -> tuple:
    last, previous, before = memory
    corrected = w[0] * latents + w[1] * last + w[2] * data + w[3] * previous + w[4] * before
    return w[5] * corrected + w[6] * data + w[7] * previous, corrected, data, previous


_METHODS: dict[str, tuple[Callable[..., Weights], Callable[..., tuple], int]] = {
    "euler": (euler_weights, _euler_step, 0),
    "dpmpp_2m": (dpmpp_2m_weights, _dpmpp_2m_step, 1),
    "unipc": (unipc_weights, _unipc_step, 3),
}
