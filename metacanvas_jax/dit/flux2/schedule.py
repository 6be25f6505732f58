"""The noise levels of the published FLUX.2 pipeline."""

from metacanvas_jax.diffusion.schedules import DynamicShift, Schedule, check, dynamic


def empirical_mu(steps: int, tokens: int) -> float:
    """The logarithm of the shift: two lines in the number of tokens, at 10 and at 200 steps, and one between them.

    Beyond 4,300 tokens it is the line at 200 steps. Source: diffusers 0.42.1
    ``pipelines/flux2/pipeline_flux2.py::compute_empirical_mu``.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + (at_200 - 200.0 * slope)


def flux2_empirical(steps: int, tokens: int) -> Schedule:
    """FlowMatchEulerDiscreteScheduler with the shift of ``empirical_mu``."""
    check(steps)
    mu = empirical_mu(steps, tokens)
    return dynamic(steps, tokens, DynamicShift(base_shift=mu, max_shift=mu))
