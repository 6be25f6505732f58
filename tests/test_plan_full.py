"""Every full-size config on its slices: minutes each, so they run in ``make test-slow`` only."""

import jax
import pytest

pytest.importorskip("libtpu")

from metacanvas_jax.plan.shipped import jobs, run_job


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(jobs())))  # names would be picked by words such as "lora" and "config"
def test_full_size_jobs_fit_their_slices(number):
    job = jobs()[number]
    # JAX's settings of a training, not the tests' own: highest precision is another program in bfloat16, and JAX's
    # own derivative of a product with a float32 result mixes dtypes.
    with jax.default_matmul_precision(None), jax.numpy_dtype_promotion("standard"):
        reports = list(run_job(job))
    assert reports
    for report in reports:
        assert report.passed, f"{job.title} on {job.on.topology}: {report.verdict}"
        if report.program.startswith("train"):
            # Below 1 where the traced program repeats an attention whose result is kept, which the compiler drops.
            assert 0.85 < report.flops_ratio < 1.02, f"{job.title} on {job.on.topology}"
