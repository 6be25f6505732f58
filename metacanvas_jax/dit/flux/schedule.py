"""The noise levels of the published FLUX.1 pipeline."""

import math

import numpy as np

from metacanvas_jax.diffusion.schedules import TRAIN_STEPS, Schedule, check, schedule


def flux_dynamic(
    steps: int,
    tokens: int,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
) -> Schedule:
    """FLUX's: FlowMatchEulerDiscreteScheduler with dynamic shifting by the number of *target* latent tokens.

    The shift is ``exp(mu)`` with ``mu`` linear in ``tokens``, from ``base_shift`` to ``max_shift``.
    """
    check(steps)
    if tokens < 1:
        raise ValueError(f"a dynamic shift needs the number of latent tokens; got {tokens}")
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    shift = math.exp(tokens * slope + (base_shift - slope * base_tokens))
    grid = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    sigmas = shift / (shift + (1 / grid - 1))
    times = (sigmas * np.float32(TRAIN_STEPS)) / np.float32(TRAIN_STEPS)  # the pipeline's way, rounded twice
    return schedule(sigmas, times)
