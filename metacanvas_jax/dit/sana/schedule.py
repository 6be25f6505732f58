"""The noise levels of the published SANA pipeline."""

import numpy as np

from metacanvas_jax.diffusion.schedules import TRAIN_STEPS, Schedule, check, schedule, shifted, whole_timesteps


def sana_dpm(steps: int, shift: float = 3.0) -> Schedule:
    """SANA's: DPMSolverMultistepScheduler with flow sigmas. The network gets whole timesteps."""
    check(steps, shift)
    grid = 1.0 - np.linspace(1, 1 / TRAIN_STEPS, steps + 1)
    sigmas = np.flip(shifted(grid, shift))[:-1]
    return schedule(sigmas, whole_timesteps(sigmas))
