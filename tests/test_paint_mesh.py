"""Drawing on other devices than those of the training: a run of eight on one, of one on eight, the same pictures."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import export_support as support
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from qwen_support import tokenizer

from configs import base
from metacanvas_jax.config import read
from metacanvas_jax.config.load import write_config
from metacanvas_jax.data.tokenizer import save_tokenizer
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh
from metacanvas_jax.parallel.rules import RULES
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.train import start, store
from metacanvas_jax.train.job import fingerprint, fit_config, make_job
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.state import new_state
from metacanvas_jax.trees import nested

ROOT = Path(__file__).parents[1]
EIGHT = MeshConfig(data=2, fsdp=4)
ASKED = ("--prompt", "a red cat", "--count", "3", "--steps", "2", "--seed", "5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs with the same parameters, of which one was saved by eight devices and one by one."""
    folder = tmp_path_factory.mktemp("runs")
    save_tokenizer(tokenizer(), folder / "tokenizer")
    buckets = base.buckets(Bucket("text_to_image", (24, 36), length=64))
    config = support.config(folder, "sana", buckets=buckets)
    config.mllm.weights = ""
    config.vae_weights = str(support.save_patch_pca(folder / "pca"))
    setup = read.experiment(config)
    job, optimizer = make_job(setup), make_optimizer(setup.optimizer)
    leaves = {path: jnp.asarray(leaf) for path, leaf in support.trained_leaves(config).items()}
    for name, mesh, devices in (("eight", EIGHT, 8), ("one", MeshConfig(), 1)):
        there = make_mesh(mesh, jax.devices()[:devices])
        shapes = start.shapes(job, dataclasses.replace(fit_config(setup), mesh=mesh), optimizer, there, RULES)
        state = new_state(nested(leaves), optimizer, ema=True).replace(step=jnp.asarray(7, jnp.int32))
        write_config(config, folder / name)
        with store.Store(folder / name / "checkpoints") as checkpoints:
            about = store.describe(fingerprint(job, fit_config(setup)), job.frozen, job.folders)
            checkpoints.save(jax.device_put(state, shapes.shardings), None, about)
    return folder


def draw(run, out, devices, *options):
    """``metacanvas sample`` as a process of its own with that many devices."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "metacanvas_jax.cli.main", "sample", "--run", run, *ASKED, "--out", out, *options]
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.asarray(Image.open(out)).astype(int)


def test_a_run_of_eight_devices_is_drawn_on_one(folder, tmp_path):
    assert draw(folder / "eight", tmp_path / "x.png", 1).std() > 10


def test_tmp(folder):
    from metacanvas_jax.paint import runs

    for name in ("eight", "one"):
        t = runs.load(folder / name)
        print(name, {str(x.sharding)[:80] for x in jax.tree.leaves(t.params)})
        print(t.draw(["a red cat"], steps=1).pixels.std())
