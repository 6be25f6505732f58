"""kill -9 and SIGTERM, anywhere: nothing is lost, nothing is wrong. `make test-faults` runs all, the gate a slice."""

import os
import random
import re
import subprocess
import sys

import faults_support as support
import jax
import numpy as np
import pytest

from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh
from metacanvas_jax.parallel.rules import placed, shardings
from metacanvas_jax.train.loop import fit
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.state import abstract_state
from metacanvas_jax.train.store import Store
from metacanvas_jax.trees import partition
from metacanvas_jax.weights.hashes import checksums

pytestmark = pytest.mark.faults
EVENTS_OF_A_RUN = 200
"""Fewer than what a run of twelve steps opens, makes, renames and deletes; the test checks it."""


def in_process(folder, **options):
    """The same training here, undisturbed."""
    config = support.config(options)
    return fit(support.job(options), config, folder, progress=False, devices=jax.devices()[:1])[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, in_process(folder)


def check_checkpoints(folder, job):
    """Every checkpoint that is listed loads, and its arrays are those that were saved; returns the steps."""
    store = Store(folder / "checkpoints", writable=False)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    boxed = jax.eval_shape(job.init, jax.random.key(0))
    abstract, _ = partition(placed(boxed, shardings(boxed, mesh)), job.rules)
    target = abstract_state(abstract, make_optimizer(job.optimizer), mesh, ema=True)
    with store:
        for step in store.steps():
            try:
                state = store.restore(target, None, store.meta(step), step)
            except UserError as error:
                assert "cannot be read" in str(error), "a checkpoint may be half deleted, but never wrong"
                assert step != store.steps()[-1], "the newest one is whole"
            else:
                assert int(state.step) == step
        return store.steps()


@pytest.mark.parametrize("events", [[90], pytest.param("sweep", marks=pytest.mark.slow)])
def test_kill_during_the_writing_of_a_checkpoint(undisturbed, tmp_path, faults, events):
    """At the n-th opening, making, renaming or deleting under the checkpoints, for n over the whole run."""
    expected_folder, expected = undisturbed
    if events == "sweep":
        events = sorted(random.Random(3).sample(range(1, EVENTS_OF_A_RUN), 12))
    folder, last = tmp_path / "run", 0
    for number in events:
        code, output = support.run(folder, event=number)
        assert code in (-9, 0), output
        if code == -9:
            faults("kill -9 during the writing of checkpoints")
        if (folder / "checkpoints").exists():
            steps = check_checkpoints(folder, support.job({}))
            assert (steps or [0])[-1] >= last, "what was complete stays"
            last = (steps or [0])[-1]
        if code == 0:
            break
    code, output = support.run(folder, event=10**9)
    assert code == 0, output
    assert support.final(output) == checksums(expected)
    assert support.rows(folder) == support.rows(expected_folder)


@pytest.mark.slow
def test_a_run_has_as_many_events_as_the_kills_are_spread_over(tmp_path):
    code, output = support.run(tmp_path / "run", event=10**9)
    assert code == 0, output
    assert int(re.search(r"events (\d+)", output)[1]) > EVENTS_OF_A_RUN


@pytest.mark.slow
def test_twenty_kills_at_random_steps_leave_the_same_bits(tmp_path, faults):
    steps = {"steps": 70, "checkpoint_every": 4}
    expected = in_process(tmp_path / "whole", **steps)
    folder, rng = tmp_path / "run", random.Random(20)
    kills, done = [], 0
    while len(kills) < 20:
        kill = min(done + rng.randint(1, 6), 69)
        kills.append((kill, round(rng.uniform(0, 0.1), 3)))
        code, output = support.run(folder, kill=kill, delay=kills[-1][1], **steps)
        assert code == -9, (kills, output)
        faults("kill -9 at a random step")
        with Store(folder / "checkpoints", writable=False) as store:
            done = (store.steps() or [0])[-1]
    code, output = support.run(folder, **steps)
    assert code == 0, output
    assert support.final(output) == checksums(expected), kills
    assert support.rows(folder) == support.rows(tmp_path / "whole"), kills


@pytest.mark.parametrize("step", [5, pytest.param(9, marks=pytest.mark.slow)])  # 9 has a checkpoint of its own
def test_sigterm_saves_and_exits_with_the_code_for_restart(undisturbed, tmp_path, faults, step):
    folder = tmp_path / "run"
    code, output = support.run(folder, sigterm=step)
    assert code == 75, output
    assert f"asked to stop; the checkpoint of step {step} is complete in {folder}/checkpoints" in output
    faults("SIGTERM")
    again = in_process(folder)
    jax.tree.map(np.testing.assert_array_equal, again, undisturbed[1])
    assert support.rows(folder) == support.rows(undisturbed[0])


@pytest.mark.slow
def test_other_numbers_of_devices_go_on(undisturbed, tmp_path, faults):
    """One, two, four and one virtual devices, split and copied: the losses agree to the order of float32 sums."""
    folder = tmp_path / "run"
    meshes = [(1, {}), (2, {"data": 1, "fsdp": 2}), (4, {"data": 2, "fsdp": 2}), (1, {})]
    for steps, (devices, mesh) in zip((3, 6, 9, 12), meshes, strict=True):
        config = support.config({"steps": steps, "mesh": mesh})
        state, _ = fit(support.job({}), config, folder, progress=False, devices=jax.devices()[:devices])
        faults("resume on another mesh")
    losses, expected = ([row["loss"] for row in support.rows(f)] for f in (folder, undisturbed[0]))
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), state.params, undisturbed[1].params
    )


def test_nothing_that_is_loaded_is_unpickled(undisturbed):
    """The restart of a run under an audit hook that ends the process at the first class a pickle asks for."""
    program = f"""
import os, sys
sys.path.insert(0, {str(support.ROOT / "tests")!r})
import faults_support as support
from pathlib import Path
def hook(event, arguments):
    if event == "pickle.find_class":
        print("unpickled", arguments, flush=True)
        os._exit(3)
sys.addaudithook(hook)
support.main(Path({str(undisturbed[0])!r}), {{}})
"""
    env = os.environ | {"PYTHONPATH": str(support.ROOT), "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert support.final(done.stdout) == checksums(undisturbed[1])


def test_no_source_file_unpickles():
    words = re.compile(
        r"\b(pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal)\.(loads?|Unpickler)\b|allow_pickle=True"
    )
    torch_load = re.compile(r"torch\.load\((?![^)]*weights_only=True)")
    found = []
    for path in (support.ROOT / "metacanvas_jax").rglob("*.py"):
        text = path.read_text()
        found += [f"{path.name}: {match[0]}" for match in (*words.finditer(text), *torch_load.finditer(text))]
    # torch's sharded checkpoints have pickled metadata; its reader allows only the types of tensors' places.
    assert found == ["dcp.py: pickle.Unpickler"]
    assert words.search("pickle.load(file)") and torch_load.search("torch.load(path)")
    assert not torch_load.search("torch.load(path, weights_only=True)")
