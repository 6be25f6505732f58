"""SIGTERM: everything is saved, and a restart ends as if nothing had happened."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import train_support as support

from metacanvas_jax.errors import Preempted
from metacanvas_jax.train.job import FitConfig
from metacanvas_jax.train.loop import fit
from metacanvas_jax.train.metrics import read_metrics
from metacanvas_jax.train.preemption import Interrupted, Preemption
from metacanvas_jax.train.store import Store

CONFIG = FitConfig(steps=7, log_every=1, checkpoint_every=100, evaluate_every=5)


def run(folder, hook=None, config=CONFIG):
    def evaluate(state, frozen, step):
        if hook is not None:
            hook(step)
        return {"score": step / 10}

    return fit(support.job(), config, folder, evaluate=evaluate, progress=False, devices=jax.devices()[:1])[0]


def history(folder):
    return [{key: value for key, value in row.items() if key not in support.TIMING} for row in read_metrics(folder)]


def test_run_that_is_stopped_while_it_is_scored_goes_on_as_if_it_had_not_been(tmp_path):
    expected = run(tmp_path / "whole")
    asked = []

    def stop(step):
        if not asked:
            asked.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(100):  # the signal ends this hook; without it the test would wait and fail
                time.sleep(0.1)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="asked to stop; the checkpoint of step 5 is complete in"):
        run(tmp_path / "stopped", stop)
    assert signal.getsignal(signal.SIGTERM) is handler
    with Store(tmp_path / "stopped" / "checkpoints", writable=False) as store:
        assert store.steps() == [5]
        assert store.meta()["owed"]
    assert not any("score" in row for row in read_metrics(tmp_path / "stopped"))
    again = run(tmp_path / "stopped", asked.append)
    assert asked == [5, 5, 7], "the score of step 5 was still owed"
    jax.tree.map(np.testing.assert_array_equal, again, expected)
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")


def test_run_that_is_asked_between_steps_saves_the_step_it_has_reached(tmp_path):
    config = dataclasses.replace(CONFIG, evaluate_every=0, steps=50)
    job = support.job()
    seen = []

    def batches():
        stream = job.batches()

        class Stream:
            def __next__(self):
                seen.append(None)
                if len(seen) == 4:
                    os.kill(os.getpid(), signal.SIGTERM)
                return next(stream)

            get_state, set_state = stream.get_state, stream.set_state

        return Stream()

    with pytest.raises(Preempted, match="the checkpoint of step 4 is complete"):
        fit(dataclasses.replace(job, batches=batches), config, tmp_path, progress=False, devices=jax.devices()[:1])
    assert len(seen) == 4


def test_nothing_is_raised_outside_of_what_may_be_interrupted():
    with Preemption() as preemption:
        preemption.begin()
        assert not preemption.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached(2)
        with pytest.raises(Interrupted), preemption.interrupting():
            pytest.fail("it had been asked before")


@pytest.mark.faults
def test_before_the_first_step_the_process_ends_at_once_with_the_code_for_restart(tmp_path):
    program = """
import ctypes, os, signal
from metacanvas_jax.train.preemption import Preemption
with Preemption():
    os.kill(os.getpid(), signal.SIGTERM)
    ctypes.CDLL(None).sleep(60)  # inside compiled code
"""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=50)
    assert done.returncode == 75
    assert done.stderr == "metacanvas: asked to stop before the first step; nothing to save\n"
