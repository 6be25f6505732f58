"""The noise levels of the published Wan2.2 pipeline."""

import numpy as np

from metacanvas_jax.diffusion.schedules import TRAIN_STEPS, Schedule, check, schedule, shifted, whole_timesteps


def wan_unipc(steps: int, shift: float = 5.0) -> Schedule:
    """Wan's: UniPCMultistepScheduler with flow sigmas. Starts 1e-6 below 1; the network gets whole timesteps."""
    check(steps, shift)
    sigmas = shifted(np.linspace(1, 1 / TRAIN_STEPS, steps + 1)[:-1], shift)
    sigmas[0] -= 1e-6
    return schedule(sigmas, whole_timesteps(sigmas))
