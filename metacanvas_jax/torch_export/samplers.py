"""Noise levels and samplers of rectified flow: from noise at level 1 to data at level 0.

The schedules of published pipelines stand beside their networks (``SCHEDULES`` in ``dit/*/torch_side.py``). Levels
reported to the network may differ from those it is used at: two pipelines round them to whole timesteps.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metacanvas_jax.dit.torch_side import dynamic, shifted
from metacanvas_jax.torch_export import sides

Velocity = Callable[[Tensor, float], Tensor]
"""``velocity(latents, time)``: noise minus data."""


def schedule(config: Mapping[str, Any], tokens: int) -> tuple[list[float], list[float]]:
    """``steps + 1`` noise levels, and the ``steps`` levels reported to the network, rounded to float32."""
    kinds = {"linear": linear, "dynamic": lambda steps, shift, tokens: dynamic(steps, tokens, config["dynamic"])}
    for side in sides.every("dit"):
        kinds |= getattr(side, "SCHEDULES", {})
    sigmas, times = kinds[config["schedule"]](config["steps"], config["shift"], tokens)
    return [*map(float, np.float32(sigmas)), 0.0], list(map(float, np.float32(times)))


def linear(steps: int, shift: float, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spaced from 1 to 0, then shifted."""
    sigmas = shifted(np.linspace(1.0, 0.0, steps + 1)[:-1], shift)
    return sigmas, sigmas


def euler(velocity: Velocity, latents: Tensor, sigmas: list[float], times: list[float]) -> Tensor:
    """One step along the velocity from each level to the next."""
    for i, time in enumerate(times):
        latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity(latents, time)
    return latents


def _log_snr(sigma: float) -> float:
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0.0 else -math.inf
    return math.log(1 - sigma) - math.log(sigma)


def dpmpp_2m(velocity: Velocity, latents: Tensor, sigmas: list[float], times: list[float]) -> Tensor:
    """DPM-Solver++(2M), midpoint form; first order at the first and the last step (arXiv 2211.01095)."""
    steps, previous = len(times), latents
    for i, time in enumerate(times):
        data = latents - sigmas[i] * velocity(latents, time)
        h = _log_snr(sigmas[i + 1]) - _log_snr(sigmas[i])
        gain = -(1 - sigmas[i + 1]) * math.expm1(-h)
        target = data
        if 0 < i < steps - 1:
            r = (_log_snr(sigmas[i]) - _log_snr(sigmas[i - 1])) / h
            target = data + (data - previous) / (2 * r)
        latents = sigmas[i + 1] / sigmas[i] * latents + gain * target
        previous = data
    return latents


def unipc(velocity: Velocity, latents: Tensor, sigmas: list[float], times: list[float]) -> Tensor:
    """UniPC of order 2 with B(h) = expm1(-h): every step is corrected once the data at its end are known.

    Source: arXiv 2302.04867; order 1 at both ends, as diffusers has it.
    """
    steps, seen = len(times), []
    last, order = latents, 1
    for i, time in enumerate(times):
        data = latents - sigmas[i] * velocity(latents, time)
        if i > 0:
            latents = _corrected(last, data, seen, sigmas, i, order)
        seen.append(data)
        order = min(2, i + 1, steps - i)
        h = _log_snr(sigmas[i + 1]) - _log_snr(sigmas[i])
        slope = 0.0
        if order == 2:
            r = (_log_snr(sigmas[i - 1]) - _log_snr(sigmas[i])) / h
            slope = 0.5 * (seen[-2] - data) / r
        last = latents
        gain = -(1 - sigmas[i + 1]) * math.expm1(-h)
        latents = sigmas[i + 1] / sigmas[i] * latents + gain * (data + slope)
    return latents


def _corrected(last: Tensor, data: Tensor, seen: list[Tensor], sigmas: list[float], i: int, order: int) -> Tensor:
    h = _log_snr(sigmas[i]) - _log_snr(sigmas[i - 1])
    gain = -(1 - sigmas[i]) * math.expm1(-h)
    known = seen[-1]
    if order == 1:
        change = 0.5 * (data - known)
    else:
        r = (_log_snr(sigmas[i - 2]) - _log_snr(sigmas[i - 1])) / h
        phi_1 = math.expm1(-h) / -h - 1
        phi_2 = phi_1 / -h - 0.5
        first, second = phi_1 / math.expm1(-h), 2 * phi_2 / math.expm1(-h)
        old = (first - second) / (1 - r)  # of the two conditions old + new = first, r old + new = second
        change = old * (seen[-2] - known) / r + (first - old) * (data - known)
    return sigmas[i] / sigmas[i - 1] * last + gain * (known + change)


METHODS = {"euler": euler, "dpmpp_2m": dpmpp_2m, "unipc": unipc}


@torch.no_grad()
def sample(velocity: Velocity, noise: Tensor, config: Mapping[str, Any], tokens: int) -> Tensor:
    """Latents from noise, in float32. ``tokens`` is the number of tokens painted, on which a schedule may depend."""
    return METHODS[config["method"]](velocity, noise.float(), *schedule(config, tokens))


def with_norms_of(model: Tensor, latents: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Latents ``[b c t h w]`` with the norms of ``model`` in every patch (frames, rows, columns) of all channels."""

    def norms(z: Tensor) -> Tensor:
        for axis, size in enumerate(patch, 2):
            z = z.unflatten(2 * axis - 2, (-1, size))
        return z.square().sum((1, 3, 5, 7), keepdim=True).sqrt()

    factor = norms(model) / norms(latents).clamp_min(1e-12)
    factor = factor.expand(-1, -1, -1, patch[0], -1, patch[1], -1, patch[2])
    return latents * factor.flatten(6, 7).flatten(4, 5).flatten(2, 3)
