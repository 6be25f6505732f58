"""What a start does before its first step: it reads nothing twice, and compiles everything, once for all starts."""

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import export_support
import grain
import jax
import miniature_support
import numpy as np
import pytest
import train_support as support
from qwen_support import tokenizer

from metacanvas_jax.config import read
from metacanvas_jax.config.load import load_config
from metacanvas_jax.data import inputs
from metacanvas_jax.data.mixture import Mixture, Stream
from metacanvas_jax.data.tokenizer import save_tokenizer
from metacanvas_jax.launch.prepare import prepare
from metacanvas_jax.parallel import kept
from metacanvas_jax.parallel.mesh import make_mesh
from metacanvas_jax.parallel.rules import RULES
from metacanvas_jax.train import start
from metacanvas_jax.train.checkpoints import Checkpoints, check_workdir, save_imported
from metacanvas_jax.train.job import FitConfig, fed_shapes, fit_config, make_job
from metacanvas_jax.train.loop import fit
from metacanvas_jax.train.metrics import read_metrics
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.parameters import param_shapes
from metacanvas_jax.trees import flat, nested, partition
from metacanvas_jax.weights import safetensors_io, saved

ROOT = Path(__file__).parents[1]


def buckets():
    """Batches of 16 and of 8 samples, in turns that only the seed decides."""
    streams = []
    for size in (16, 8):
        stream = grain.MapDataset.range(64).repeat().map(support.sample).batch(size, drop_remainder=True)
        streams.append(Stream(f"of {size}", stream.to_iter_dataset(grain.ReadOptions(num_threads=1))))
    return Mixture(streams, seed=1)


def shape(size):
    return {name: jax.ShapeDtypeStruct((size, width), np.float32) for name, width in (("x", support.WIDTH), ("y", 1))}


def said_while_training(folder, capsys, known):
    """What a training of six steps says about compilation and, between the lines, which steps it has taken."""
    job = support.job(batches=buckets, shapes=lambda: {f"of {size}": shape(size) for size in known})
    announce = lambda state, frozen, step: print(f"step {step}", file=sys.stderr)  # noqa: E731
    config = FitConfig(steps=6, log_every=1, preview_every=1)
    fit(job, config, folder, progress=False, devices=jax.devices()[:1], preview=announce)
    return re.findall(r"^step \d|the step for .*, \d+\.\d\d GiB on each device", capsys.readouterr().err, re.MULTILINE)


def test_every_bucket_is_compiled_before_the_first_step(tmp_path, capsys):
    said = said_while_training(tmp_path, capsys, (16, 8))
    assert [line.split(",")[0] for line in said[:2]] == ["the step for of 16", "the step for of 8"]
    assert said[2:] == [f"step {number}" for number in range(1, 7)]
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "compile_seconds" in row] == [1]


def test_a_batch_of_another_shape_is_compiled_when_it_comes(tmp_path, capsys):
    said = said_while_training(tmp_path, capsys, (16,))
    (late,) = [place for place, line in enumerate(said) if line.startswith("the step for the batch")]
    steps = [len(batch["x"]) for batch in itertools.islice(buckets(), 6)]
    assert said[late + 1] == f"step {steps.index(8) + 1}"


@pytest.mark.miniature
@pytest.mark.parametrize("config", ["t2i_scratch", "image_editing", "video_stage3"])
def test_the_shapes_that_are_compiled_are_those_of_the_batches(tmp_path, config):
    save_tokenizer(tokenizer(), tmp_path / "tokenizer")
    options = [f"--config.mllm.tokenizer={tmp_path}/tokenizer", "--config.vae_weights="]
    loaded = load_config(f"configs/{config}.py:miniature", options)
    if loaded.get("text") is not None:
        loaded.text.update({"tokenizer": f"{tmp_path}/tokenizer", "instruction": True})
    setup = read.experiment(loaded)
    expected = fed_shapes(setup)
    assert len(expected) == len(setup.shapes)
    for bucket in setup.shapes:
        one = dataclasses.replace(setup, buckets=(bucket,))
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), next(inputs.batches(one)))
        assert jax.tree.structure(batch) == jax.tree.structure(expected[bucket.name])
        assert jax.tree.leaves(batch) == jax.tree.leaves(expected[bucket.name])


START = """
import sys
from metacanvas_jax.parallel import kept
counts = kept.counts()
from metacanvas_jax.cli.main import main
assert main(sys.argv[1:]) == 0
print("counts", counts["asked"], counts["found"])
"""


@pytest.mark.miniature
def test_a_second_start_compiles_nothing(tmp_path):
    run = tmp_path / "run"
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    prepare(read.experiment(miniature_support.config(tmp_path, "mllm")))
    found = []
    for steps in (2, 4):
        name, options = miniature_support.arguments(tmp_path, "mllm", 4)
        options += [f"--config.train.steps={steps}", "--config.train.checkpoint_every=2"]
        command = [sys.executable, "-c", START, "train", "--config", name, *options, "--workdir", str(run)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(tuple(map(int, done.stdout.split()[-2:])))
    (asked, hits), (asked_again, hits_again) = found
    assert asked > hits
    assert asked_again == hits_again > 0, "the second start compiled something"
    assert "read from the cache in" in done.stderr
    assert list((run / "compiled").glob("*-cache"))
    assert not (tmp_path / "cache" / "metacanvas_jax").exists(), "a training keeps its programs in its own folder"


IN_A_BUCKET = """
import sys
from metacanvas_jax.parallel import kept
counts = kept.counts()
import jax
import train_support as support
kept.keep(f"{sys.argv[1]}/compiled")
support.fit(support.job(), support.FitConfig(steps=int(sys.argv[2])), sys.argv[1], progress=False)
print("counts", counts["asked"], counts["found"])
"""


def test_a_run_in_a_bucket_goes_on_and_compiles_nothing_again(bucket):
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    found = []
    for steps in ("1", "2"):
        command = [sys.executable, "-c", IN_A_BUCKET, f"{bucket.url}/run", steps]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(tuple(map(int, done.stdout.split()[-2:])))
    assert found[0][1] == 0 < found[0][0]
    assert found[1][0] == found[1][1] > 0, "the second start compiled something"
    assert [row["step"] for row in read_metrics(f"{bucket.url}/run")] == [1, 2]


def test_a_start_beside_a_checkpoint_reads_it_and_the_frozen_weights_once(tmp_path, monkeypatch):
    save_tokenizer(tokenizer(), tmp_path / "tokenizer")
    config = export_support.config(tmp_path, "sana")
    config.mllm.language.update({"width": 256, "heads": 4, "mlp": 1024, "rope_sections": (8, 12, 12)})
    config.mllm.vision.out_width = 256
    config.dit.update({"head_width": 128})
    config.canvas_connector.width = 256
    config.mllm.weights = ""
    config.mesh = {"data": 1, "fsdp": 8}
    frozen = partition(param_shapes(read.experiment(config)), config.train.rules)[1]["mllm"]
    saved.save(tmp_path / "qwen", nested(export_support.random_leaves(frozen)))
    config.mllm.weights = str(tmp_path / "qwen")
    config.vae_weights = str(export_support.save_patch_pca(tmp_path / "pca"))
    setup = read.experiment(config)
    job, mesh, optimizer = make_job(setup), make_mesh(setup.mesh), make_optimizer(setup.optimizer)
    shapes = start.shapes(job, fit_config(setup), optimizer, mesh, RULES)
    places = {path: leaf.sharding for path, leaf in flat(shapes.trainable).items()}
    leaves = {path: jax.device_put(x, places[path]) for path, x in export_support.trained_leaves(config).items()}
    save_imported(tmp_path / "run", job, fit_config(setup), nested(leaves), 7, "nothing")
    init = safetensors_io.Checkpoint.__init__

    def unmapped(self, path):
        init(self, path)
        self.local = False  # as in a bucket: what is read is then read with calls of the system

    monkeypatch.setattr(safetensors_io.Checkpoint, "__init__", unmapped)
    before = read_by_this_process()
    job = make_job(setup)
    check_workdir(job, fit_config(setup), tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", job, fit_config(setup), None)
    jax.block_until_ready(start.begin(job, fit_config(setup), optimizer, jax.random.key(0), shapes, checkpoints))
    read_now = read_by_this_process() - before
    checkpoints.store.close()

    size = lambda folder: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())  # noqa: E731
    needed = size(tmp_path / "run" / "checkpoints") + size(tmp_path / "qwen") + size(tmp_path / "pca")
    assert needed > 20e6
    assert read_now <= 1.1 * needed, f"{read_now / needed:.2f} x what a start needs"
    assert read_now >= 0.8 * needed, "not everything that was read was counted"


def read_by_this_process():
    """Bytes that this process has read with calls of the system; mapped files are not among them."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def test_commands_share_a_bounded_cache_and_respect_the_one_that_is_set(tmp_path, monkeypatch):
    set_values = {}
    monkeypatch.setattr(jax.config, "update", set_values.__setitem__)
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "metacanvas_jax" / "compiled"
    assert kept.keep() == str(place) == set_values["jax_compilation_cache_dir"]
    assert place.is_dir()
    assert set_values["jax_compilation_cache_max_size"] == kept.LARGEST
    assert "jax_persistent_cache_enable_xla_caches" not in set_values
    assert kept.keep("gs://bucket/run/compiled") == "gs://bucket/run/compiled"
    assert set_values["jax_persistent_cache_enable_xla_caches"] == "none"
    assert set_values["jax_compilation_cache_max_size"] == -1
    (tmp_path / "file").write_text("")
    assert kept.keep(tmp_path / "file" / "x") is None
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", "/mine", raising=False)
    set_values.clear()
    assert kept.keep() == "/mine"
    assert not set_values
