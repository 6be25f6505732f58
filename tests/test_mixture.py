"""Buckets step by step: their shares, agreement between processes, and exact resumption."""

import json
import subprocess
import sys

import grain
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from metacanvas_jax.data.mixture import Mixture, Source, Stream, bucket_of_step
from metacanvas_jax.data.pipeline import PipelineConfig, pipeline
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError

SHARES = {"pictures": 0.2, "edits": 0.3, "videos": 0.5}  # (share of steps; batch, frames) differ below
SHAPES = {"pictures": (16, 1), "edits": (8, 1), "videos": (2, 5)}


class Numbered:
    def __init__(self, name, count, frames):
        self.name, self.count, self.frames = name, count, frames

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Sample(f"{self.name} {index}", np.full((self.frames, 2, 2, 3), index, np.uint8))


def _collate(samples):
    return {
        "pixels": np.stack([sample.target for sample in samples]),
        "number": np.asarray([sample.target[0, 0, 0, 0] for sample in samples]),
        "drawn": np.asarray([len(sample.prompt) for sample in samples]),
    }


def _mixture(seed=3, process_index=0, process_count=1, threads=1):
    streams = []
    for i, (name, weight) in enumerate(SHARES.items()):
        batch, frames = SHAPES[name]
        config = PipelineConfig(batch, seed=seed + i, caption_dropout=0.3, threads=threads)
        batches = pipeline(
            [Source(Numbered(name, 30 + i, frames))],
            config,
            _collate,
            process_index=process_index,
            process_count=process_count,
        )
        streams.append(Stream(name, batches, weight))
    return Mixture(streams, seed)


def _take(mixture, count):
    return [next(mixture) for _ in range(count)]


def test_mixture_ratios_over_ten_thousand_draws():
    weights = [5, 15, 15, 15, 25, 25]  # stage 3 of the paper
    counts = np.bincount([bucket_of_step(weights, 7, step) for step in range(10_000)], minlength=len(weights))
    expected = np.asarray(weights) / sum(weights)
    assert np.all(np.abs(counts / 10_000 - expected) < 4 * np.sqrt(expected * (1 - expected) / 10_000))
    draws = [bucket_of_step(weights, 7, step) for step in range(200)]
    assert draws != [bucket_of_step(weights, 8, step) for step in range(200)]
    assert {bucket_of_step([1, 0, 1], 0, step) for step in range(100)} == {0, 2}


def test_mixture_batches_have_the_shape_of_their_bucket():
    mixture = _mixture()
    seen = set()
    for step in range(30):
        name = mixture.bucket(step)
        batch, frames = SHAPES[name]
        assert next(mixture)["pixels"].shape == (batch, frames, 2, 2, 3)
        seen.add(name)
    assert seen == set(SHARES)


def test_mixture_on_two_hosts_is_the_mixture_on_one():
    whole = _mixture()
    hosts = [_mixture(process_index=i, process_count=2) for i in range(2)]
    for _ in range(20):
        batch = next(whole)
        halves = [next(host) for host in hosts]
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), batch[name])


PROGRAM = """
import json, sys
from test_mixture import _mixture, _take
mixture = _mixture(process_index=int(sys.argv[1]), process_count=2)
names = [mixture.bucket(step) for step in range(500)]
print(json.dumps([names, [list(batch["pixels"].shape) for batch in _take(mixture, 40)]]))
"""


def test_mixture_of_two_processes_agrees_on_every_bucket():
    """Two interpreters with different hash seeds, that never talk."""
    import pathlib

    folder = pathlib.Path(__file__).parent
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(i)],
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": f"{folder}:{folder.parent}", "PYTHONHASHSEED": str(i + 1), "JAX_PLATFORMS": "cpu"},
        )
        for i in range(2)
    ]
    first, second = (json.loads(run.communicate()[0].splitlines()[-1]) for run in runs)
    assert first == second and set(first[0]) == set(SHARES)


@pytest.mark.parametrize("at", [0, 7, 23])
def test_mixture_resumes_exactly(at):
    uninterrupted = _take(_mixture(), at + 12)
    mixture = _mixture()
    _take(mixture, at)
    state = json.loads(json.dumps(mixture.get_state()))
    resumed = _mixture()
    _take(resumed, 5)  # wherever it stood
    resumed.set_state(state)
    for found, expected in zip(_take(resumed, 12), uninterrupted[at:], strict=True):
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


def test_mixture_resumes_through_orbax(tmp_path):
    uninterrupted = _take(_mixture(), 16)
    mixture = _mixture()
    _take(mixture, 9)
    with ocp.CheckpointManager(tmp_path) as manager:
        state = {"w": jnp.arange(3.0, dtype=jnp.float32)}
        save = grain.checkpoint.CheckpointSave(mixture)
        manager.save(9, args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=save))
        manager.wait_until_finished()
        restore = grain.checkpoint.CheckpointRestore(_mixture())
        resumed = manager.restore(9, args=ocp.args.Composite(data=restore))["data"]
    for found, expected in zip(_take(resumed, 7), uninterrupted[9:], strict=True):
        np.testing.assert_array_equal(found["number"], expected["number"])
        np.testing.assert_array_equal(found["drawn"], expected["drawn"])


def test_mixture_refuses_what_it_cannot_do():
    batches = pipeline([Source(Numbered("a", 4, 1))], PipelineConfig(2, threads=0), _collate)
    with pytest.raises(UserError, match="no bucket has a weight above zero"):
        Mixture([Stream("a", batches, 0.0)], 0)
    with pytest.raises(UserError, match="must not be negative"):
        Mixture([Stream("a", batches, -1.0)], 0)
    with pytest.raises(UserError, match="same name"):
        Mixture([Stream("a", batches), Stream("a", batches)], 0)
    mixture = Mixture([Stream("a", batches), Stream("b", batches)], 0)
    with pytest.raises(UserError, match="position is that of a, expected the buckets a, b"):
        mixture.set_state({"step": 3, "buckets": {"a": {"next_index": 1}}})
    with pytest.raises(UserError, match="that of no buckets"):
        mixture.set_state({"next_index": 1})
