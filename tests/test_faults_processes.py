"""Several real processes on this machine (CPU, gloo): the same losses, and one that fails ends all with a message."""

import re
import socket

import faults_support as support
import jax
import numpy as np
import pytest

from metacanvas_jax.train.loop import fit

pytestmark = pytest.mark.faults
MESH = {"mesh": {"data": 2, "fsdp": 2}}
TOLERANCE = 2e-6
"""Relative, of a loss: a mesh is the same for any number of processes, the order of its sums may not be."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with four devices."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    fit(support.job({}), support.config(MESH), folder, progress=False, devices=jax.devices()[:4])
    return folder


def losses(folder):
    rows = support.rows(folder)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def check(codes, outputs, code):
    assert codes == [code] * len(codes), "\n----\n".join(outputs)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_the_losses_of_one_and_another_number_goes_on(alone, tmp_path, faults, count):
    folder = tmp_path / "run"
    codes, outputs = support.run_together(folder, count, 4 // count, steps=9, **MESH)
    check(codes, outputs, 0)
    assert len({str(support.final(output)) for output in outputs}) == 1
    np.testing.assert_allclose(losses(folder), losses(alone)[:9], rtol=TOLERANCE)
    # And on one process, where the data goes on without a record repeated or left out.
    fit(support.job({}), support.config(MESH), folder, progress=False, devices=jax.devices()[:4])
    np.testing.assert_allclose(losses(folder), losses(alone), rtol=TOLERANCE)
    faults("resume on fewer processes")


FAILURES = {
    "data error": ({"corrupt": 5, "on": 1}, 2, r"process 1 \(HOST\): record of step 5 is corrupt"),
    "NaN": ({"nan": 5, "on": 1}, 2, r"process \d \(HOST\): step 5: loss nan, gradient norm nan"),
    "bug": ({"bug": 5, "on": 0}, 1, r"process 0 \(HOST\): 'bug at step 5'"),
    "kill": ({"kill": 5, "delay": 0.0, "on": 1}, 75, r"lost process 1 \(HOST\): not heard of for 40 s"),
    "sigterm": ({"sigterm": 5, "on": 1}, 75, r"asked to stop; the checkpoint of step \d+ is complete"),
}


@pytest.mark.parametrize(
    "failure", ["data error", *(pytest.param(name, marks=pytest.mark.slow) for name in list(FAILURES)[1:])]
)
def test_failure_of_one_process_ends_all_and_a_restart_goes_on(alone, tmp_path, faults, failure):
    options, code, message = FAILURES[failure]
    message = message.replace("HOST", re.escape(socket.gethostname()))
    folder = tmp_path / "run"
    codes, outputs = support.run_together(folder, 2, 2, **options, **MESH)
    killed = options["on"] if "kill" in options else None
    for process, (found, output) in enumerate(zip(codes, outputs, strict=True)):
        assert found == (-9 if process == killed else code), "\n----\n".join(outputs)
        if process != killed:
            assert len(re.findall(message, output)) == 1, "\n----\n".join(outputs)
    faults(f"{failure} in one of two processes")
    codes, outputs = support.run_together(folder, 2, 2, **MESH)
    check(codes, outputs, 0)
    np.testing.assert_allclose(losses(folder), losses(alone), rtol=TOLERANCE)


@pytest.mark.slow
def test_loss_of_process_zero_ends_the_others(tmp_path, faults):
    codes, outputs = support.run_together(tmp_path / "run", 2, 2, kill=5, delay=0.0, on=0, **MESH)
    assert codes[0] == -9
    assert codes[1] in (75, -6), outputs[1]  # JAX aborts as soon as its service is gone; the watch may be faster
    assert "process 0 cannot be reached" in outputs[1] or "coordination service" in outputs[1]
    faults("kill of process 0 of two")


@pytest.mark.slow
def test_process_that_never_comes_is_named(tmp_path, faults):
    with socket.create_server(("", 0)) as server:
        coordinator = f"localhost:{server.getsockname()[1]}"
    code, output = support.run(tmp_path / "run", processes=3, coordinator=coordinator, process=0, timeout_s=5)
    assert code == 75, output  # whoever restarts it gives a host the time to boot
    assert "processes 1 and 2 of 3 did not come up within 5 s" in output
    assert not (tmp_path / "run").exists()
    faults("processes that do not come up")
