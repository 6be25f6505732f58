"""Every full-size config on its slices: minutes each, so they run in ``make test-slow`` only."""

import pytest

pytest.importorskip("libtpu")

from metacanvas_jax.plan.shipped import JOBS, run_job


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job.config.rsplit('/')[-1]}-{job.topology}")
def test_full_size_configs_fit_their_slices(job):
    for report in run_job(job):
        assert report.passed, report.verdict
        if report.program.startswith("train"):
            assert 0.9 < report.flops_ratio < 1.02
