"""The noise levels of the published FLUX.1 pipeline, by the name that runs have for them."""

from metacanvas_jax.diffusion.schedules import DynamicShift, Schedule, dynamic


def flux_dynamic(steps: int, tokens: int) -> Schedule:
    """FlowMatchEulerDiscreteScheduler with its own defaults of dynamic shifting."""
    return dynamic(steps, tokens, DynamicShift())
