import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_support as support
from safetensors.numpy import load_file

from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.errors import UserError
from metacanvas_jax.train.in_flight import NonFiniteError
from metacanvas_jax.train.job import FitConfig
from metacanvas_jax.train.loop import fit as fit_on
from metacanvas_jax.train.metrics import read_metrics
from metacanvas_jax.train.profiling import Profiler, Steps, parse_steps
from metacanvas_jax.train.store import Store
from metacanvas_jax.trees import flat

SMALL = FitConfig(steps=4, log_every=2, checkpoint_every=2)


def fit(job, config, folder, *, progress=False, **options):
    """On as many devices as the config's mesh has."""
    devices = jax.devices()[: 4 if config.mesh == support.TEN_STEPS.mesh else 1]
    return fit_on(job, config, folder, progress=progress, devices=devices, **options)


def history(folder):
    return [{key: value for key, value in row.items() if key not in support.TIMING} for row in read_metrics(folder)]


def assert_same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    state, frozen = fit(support.job(), support.TEN_STEPS, folder)
    return folder, state, frozen


def test_killed_run_ends_with_the_same_bits_and_the_same_history(uninterrupted, tmp_path, capsys):
    folder, expected, _ = uninterrupted
    rng = random.Random(4)
    kills = [rng.randint(1, 5), rng.randint(6, 9)]
    command = [sys.executable, support.__file__, str(tmp_path), str(support.TEN_STEPS.steps)]
    env = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    seen = []
    for kill in [*kills, None]:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as child:
            for line in child.stdout:
                step = int(line.split()[1])
                seen.append(step)
                if kill is not None and step >= kill:
                    child.kill()
            errors = child.stderr.read()
        assert child.returncode == (0 if kill is None else -9), errors
    assert len(seen) > support.TEN_STEPS.steps - 2, "the later processes were meant to repeat or go on"
    assert history(tmp_path) == history(folder), f"killed after steps {kills}"
    again, _ = fit(support.job(), support.TEN_STEPS, tmp_path)  # nothing is left to do: it restores
    assert_same_bits(again, expected)
    assert f"continues   from step 10 in {tmp_path}" in capsys.readouterr().err


def test_history_has_what_was_asked_for(uninterrupted):
    folder, state, frozen = uninterrupted
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert {"loss", "error", "grad_norm", "param_norm", "finite", "learning_rate"} <= rows[0].keys()
    assert rows[-1].keys() >= support.TIMING - {"compile_seconds"}
    np.testing.assert_allclose([row["learning_rate"] for row in rows[:4]], [0, 1e-2 / 3, 2e-2 / 3, 1e-2], rtol=1e-6)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(frozen)} == {"bfloat16"}
    assert set(flat(frozen)) == {"frozen/kernel", "frozen/bias"}
    assert set(flat(state.ema)) == set(flat(state.params)) == {"up/kernel", "up/bias", "down/kernel", "down/bias"}
    assert list((folder / "tensorboard").glob("events*"))


def test_resumed_state_lies_where_the_mesh_wants_it(uninterrupted):
    folder, state, _ = uninterrupted
    again, _ = fit(support.job(), support.TEN_STEPS, folder)
    jax.tree.map(lambda a, b: np.testing.assert_(a.sharding.is_equivalent_to(b.sharding, a.ndim)), again, state)
    assert not again.params["up"]["kernel"].sharding.is_fully_replicated
    assert not again.opt_state[1].mu["up"]["kernel"].sharding.is_fully_replicated


def test_hooks_run_at_their_steps_and_scores_are_logged(tmp_path):
    calls = []

    def evaluate(state, frozen, step):
        calls.append(("evaluate", step, int(state.step)))
        return {"score": step / 2}

    config = dataclasses.replace(SMALL, steps=5, evaluate_every=2, preview_every=3)
    fit(
        support.job(),
        config,
        tmp_path,
        evaluate=evaluate,
        preview=lambda state, frozen, step: calls.append(("preview", step, int(state.step))),
    )
    assert calls == [
        ("evaluate", 2, 2),
        ("preview", 3, 3),
        ("evaluate", 4, 4),
        ("evaluate", 5, 5),
        ("preview", 5, 5),
    ]
    assert [(row["step"], row["score"]) for row in read_metrics(tmp_path) if "score" in row] == [
        (2, 1),
        (4, 2),
        (5, 2.5),
    ]
    with Store(tmp_path / "checkpoints", writable=False) as store:
        assert store.steps() == [2, 4, 5]


def test_loss_that_is_not_finite_stops_with_a_state_that_repeats_it(tmp_path):
    stream = support.batches()
    poison = [next(stream)["x"] for _ in range(4)][3][5]  # in the fourth batch, after the checkpoint of step 2

    def explosive(trainable, frozen, prepared, key):
        value, metrics = support.loss(trainable, frozen, prepared, key)
        return value * jnp.where(jnp.any(jnp.all(prepared[0] == poison[None], axis=1)), jnp.nan, 1.0), metrics

    config = dataclasses.replace(SMALL, steps=20)
    job = support.job(loss=explosive, prepare=lambda frozen, batch, key: (batch["x"], batch["y"]))
    where = re.escape(str(tmp_path / "nonfinite" / "3"))
    with pytest.raises(NonFiniteError, match=f"step 4: loss nan, gradient norm nan.* the state before it .* {where}"):
        fit(job, config, tmp_path)
    batch = load_file(tmp_path / "nonfinite" / "batch_of_step_4_process_0.safetensors")
    assert np.any(np.all(batch["x"] == poison, axis=1))
    # What was saved is the state after three healthy steps, and its next batch is the one that failed.
    harmless = dataclasses.replace(job, loss=support.loss)
    healthy, _ = fit(harmless, dataclasses.replace(config, steps=3), tmp_path / "healthy")
    with Store(tmp_path / "nonfinite", writable=False) as store:
        assert_same_bits(store.restore_params(healthy.params), healthy.params)
    (tmp_path / "again").mkdir()
    (tmp_path / "nonfinite").rename(tmp_path / "again" / "checkpoints")
    with pytest.raises(NonFiniteError, match="step 4: loss nan"):
        fit(job, config, tmp_path / "again")


def test_weights_that_are_loaded_replace_the_random_start(tmp_path):
    kernel = np.arange(64, dtype=np.float32).reshape(8, 8)
    seen = {}

    def load(abstract):
        seen.update(flat(abstract))
        return {"frozen": {"kernel": kernel}, "down": {"bias": np.full(1, 5.0, np.float32)}}

    config = dataclasses.replace(SMALL, steps=1, frozen_dtype="float32", ema_decay=0.0)
    job = support.job(load=load, optimizer=OptimizerConfig(1e-9))
    state, frozen = fit(job, config, tmp_path)
    assert seen["up/kernel"].shape == (8, 16)
    assert seen["up/kernel"].sharding is not None
    np.testing.assert_array_equal(frozen["frozen"]["kernel"], kernel)
    np.testing.assert_array_equal(frozen["frozen"]["bias"], np.zeros(8))
    np.testing.assert_allclose(state.params["down"]["bias"], [5.0], atol=1e-6)


def test_a_run_that_continues_reads_weights_for_what_is_frozen_only(tmp_path):
    asked = []

    def load(abstract):
        asked.append(set(flat(abstract)))
        return {}

    for steps in (1, 2):
        fit(support.job(load=load), dataclasses.replace(SMALL, steps=steps), tmp_path)
    frozen = {"frozen/kernel", "frozen/bias"}
    assert asked == [frozen | {"up/kernel", "up/bias", "down/kernel", "down/bias"}, frozen]


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (
            {"frozen": {"kernel": np.zeros((8, 9), np.float32)}},
            r"frozen/kernel has shape \(8, 9\), the model's is \(8, 8\)",
        ),
        ({"vae": {"kernel": np.zeros(3, np.float32)}}, "loaded parameter vae/kernel is not one of the model's"),
    ],
)
def test_loaded_weights_that_do_not_fit_are_named(tmp_path, loaded, message):
    with pytest.raises(UserError, match=message):
        fit(support.job(load=lambda abstract: loaded), SMALL, tmp_path)


def test_checkpoint_of_another_config_is_refused_before_anything_is_written(uninterrupted):
    folder, _, _ = uninterrupted
    before = (folder / "metrics.jsonl").read_bytes()
    job = support.job(config=support.CONFIG | {"model": {"width": 16}}, optimizer=OptimizerConfig(5e-3, warmup_steps=3))
    with pytest.raises(UserError, match=r"model.width was 8, is 16; optimizer.learning_rate was 0.01, is 0.005"):
        fit(job, support.TEN_STEPS, folder)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_data_that_ends_too_early_is_an_error(tmp_path):
    def short():
        import grain

        stream = grain.MapDataset.range(48).map(support.sample).batch(support.BATCH)
        return iter(stream.to_iter_dataset(grain.ReadOptions(num_threads=1)))

    with pytest.raises(UserError, match="the data ended before step 4 of 4"):
        fit(support.job(batches=short), SMALL, tmp_path)


def test_bar_shows_loss_speed_and_utilisation(tmp_path, capsys):
    fit(support.job(), dataclasses.replace(SMALL, steps=6), tmp_path, peak=1e9, progress=True)
    row = read_metrics(tmp_path)[-1]
    forward = 2 * support.BATCH * (support.WIDTH**2 + 2 * support.WIDTH**2 + 2 * support.WIDTH)
    backward = 2 * support.BATCH * (2 * support.WIDTH**2 + 2 * (2 * support.WIDTH))  # nothing for what is frozen
    assert row["mfu"] == pytest.approx((forward + backward) * row["steps_per_second"] / 1e9)
    assert 0 <= row["data_wait"] < 1
    assert row["samples_per_second"] == pytest.approx(16 * row["steps_per_second"])
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert all(f"{name}=" in shown for name in ("loss", "samples_per_second", "mfu"))


def test_samples_that_several_processes_share_are_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr("metacanvas_jax.train.loop.batch_part", lambda mesh, rules: (0, 3))  # of, say, 6 processes
    fit(support.job(), SMALL, tmp_path)
    row = read_metrics(tmp_path)[-1]
    assert row["samples_per_second"] == pytest.approx(3 * support.BATCH * row["steps_per_second"])


@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")  # of JAX 0.12 itself
@pytest.mark.parametrize(("steps", "last"), [(Steps(2, 3), 3), (Steps(3, 9), 4)])
def test_steps_asked_for_are_traced_under_their_numbers(tmp_path, steps, last):
    fit(support.job(), SMALL, tmp_path, profile=steps)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(trace))  # owns what its planes show
    numbers = {
        dict(event.stats).get("step_num")
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    }
    assert numbers == set(range(steps.start, last + 1))
    assert (tmp_path / "profile" / f"memory_after_{last}_process_0.prof").stat().st_size > 0


def test_no_trace_is_left_open_or_begun_after_its_start(tmp_path):
    with pytest.raises(RuntimeError, match="broken"), Profiler(tmp_path, Steps(1, 2)) as profiler:
        profiler.begin(1)
        raise RuntimeError("broken")
    with Profiler(tmp_path, Steps(1, 2)) as profiler:  # a run continued at step 2
        profiler.begin(2)
        assert not profiler.ends(2)
    with Profiler(tmp_path, Steps(1, 1)) as profiler:
        profiler.begin(1)
        assert profiler.ends(1)
        profiler.end()
    assert list(tmp_path.rglob("memory_after_*")) == [tmp_path / "profile" / "memory_after_1_process_0.prof"]


@pytest.mark.parametrize("text", ["20", "0:3", "5:4", "a:b"])
def test_steps_to_trace_that_are_none_are_named(text):
    with pytest.raises(UserError, match=rf"--profile '?{text}'?: expected START:STOP"):
        parse_steps(text)


@pytest.mark.parametrize("fields", [{"steps": 0}, {"log_every": -1}, {"ema_decay": 1.0}, {"accumulate": 0}])
def test_bad_settings_are_named(fields):
    with pytest.raises(UserError, match=next(iter(fields)).removesuffix("_decay")):
        FitConfig(**({"steps": 1} | fields))


def test_metrics_are_valid_json(uninterrupted):
    folder, _, _ = uninterrupted
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in lines]
    assert entries
    assert all("step" in entry for entry in entries)


def buckets(records=100):
    """Batches of two shapes by turns, as a mixture of buckets has them."""

    def batch(index):
        rows = [support.sample(index + i) for i in range(support.BATCH >> (index % 2))]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    return iter(grain.MapDataset.range(records).map(batch).to_iter_dataset(grain.ReadOptions(num_threads=1)))


def test_nothing_is_compiled_after_the_first_step_of_each_bucket(tmp_path, caplog):
    config = dataclasses.replace(support.TEN_STEPS, checkpoint_every=2, preview_every=1)
    compiled = []

    def count(state, frozen, step):
        names = [record.args[0] for record in caplog.records if record.msg.startswith("Compiling %s")]
        compiled.append(names[sum(map(len, compiled)) :])

    with jax.log_compiles():
        fit(support.job(batches=buckets), config, tmp_path, preview=count)
    assert len(compiled) == 10
    assert ["jit(step)" in names for names in compiled[:2]] == [True, True]
    assert not any(compiled[3:]), compiled  # the third: what the first checkpoint needs
