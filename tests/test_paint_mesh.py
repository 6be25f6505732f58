"""Drawing on other devices than those of the training: a run of eight on one, of one on eight, the same pictures."""

import dataclasses
import os
import socket
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
from metacanvas_jax.paint import needs, runs
from metacanvas_jax.paint.painter import Painter, filled
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh
from metacanvas_jax.parallel.rules import RULES
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.train import start, store
from metacanvas_jax.train.job import fingerprint, fit_config, make_job
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.parameters import param_shapes
from metacanvas_jax.train.state import new_state
from metacanvas_jax.trees import flat, nested

ROOT = Path(__file__).parents[1]
EIGHT = MeshConfig(data=2, fsdp=4)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Compiles without optimising: the networks are tiny."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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


def drawn(run, mesh, prompts=3):
    """Pictures, and where the parameters that drew them lay."""
    painter = Painter(runs.setup_of(run))
    trained = runs.load(run, mesh=mesh, needs=painter.needs([painter.setup.shapes[0]], steps=2), painter=painter)
    pixels = trained.draw([f"{i} red cats" for i in range(prompts)], steps=2, seed=5).pixels
    assert pixels.std() > 10, "a picture of nothing"
    return pixels.astype(int), trained.params


def test_runs_of_eight_and_of_one_are_drawn_on_one_and_on_eight(folder):
    one, eight = make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(EIGHT)
    expected, params = drawn(folder / "one", one)
    assert {leaf.sharding.mesh.size for leaf in jax.tree.leaves(params)} == {1}
    assert np.array_equal(drawn(folder / "eight", one)[0], expected)
    for run in ("one", "eight"):
        pixels, params = drawn(folder / run, eight)
        assert np.abs(pixels - expected).max() <= 1
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params["dit"]))


def test_a_drawing_holds_what_it_reads_in_the_dtype_that_it_computes_in(folder):
    setup = runs.setup_of(folder / "one")
    half = dataclasses.replace(setup, dit=dataclasses.replace(setup.dit, dtype="bfloat16"))
    painter = Painter(half)
    held = painter.needs([setup.shapes[0]], steps=2)
    every = flat(param_shapes(half))
    assert not any(path.startswith("mllm/vision") for path in held), "no picture is read"
    assert {path for path, x in held.items() if x == jnp.bfloat16} == {
        path for path in held if path.startswith("dit/") and every[path].dtype != held[path]
    }
    assert painter.held().keys() == every.keys()
    assert held.items() <= painter.held().items(), "scoring reads more, in the same dtypes"
    narrow = runs.load(folder / "one", painter=painter, needs=held)
    assert {path: x.dtype for path, x in flat(narrow.params).items()} == held
    assert narrow.params["dit"]["blocks"]["attention"]["q"]["kernel"].dtype == jnp.bfloat16
    wide = runs.load(folder / "one", painter=painter)
    asked = {"prompts": ["a red cat"], "steps": 2}
    assert np.array_equal(narrow.draw(**asked).pixels, wide.draw(**asked).pixels)
    without = {name: tree for name, tree in narrow.params.items() if name != "canvas"}
    with pytest.raises(ValueError, match="text_to_image reads canvas/tokens, and the parameters were loaded without"):
        painter.draw(without, **asked)


def test_only_what_every_use_casts_is_held_narrow():
    def program(params, x):
        cast = lambda name: params[name].astype(jnp.bfloat16)  # noqa: E731
        y, _ = jax.lax.scan(
            lambda c, k: (jax.checkpoint(lambda c: c @ k.astype(jnp.bfloat16))(c), None), x, params["stack"]
        )
        rows = params["table"][jnp.asarray([1, 2])].astype(jnp.bfloat16)
        both = cast("both").astype(jnp.float32) + params["both"]
        carried, _ = jax.lax.scan(
            lambda c, _: (c.astype(jnp.bfloat16).astype(jnp.float32), None), params["carry"], None, 2
        )
        gain = params["gain"].astype(jnp.float32).astype(jnp.bfloat16)
        return (y @ cast("kernel")) * gain[None] + rows, both, carried

    shapes = {
        "stack": (3, 4, 4),
        "table": (9, 4),
        "both": (4,),
        "carry": (4,),
        "kernel": (4, 4),
        "gain": (4,),
        "idle": (2,),
    }
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    traced = jax.jit(program).trace(params, jax.ShapeDtypeStruct((2, 4), jnp.bfloat16))
    found = needs.needed(traced.jaxpr, sorted(params.items()))
    assert {name for name, dtype in found.items() if dtype == jnp.bfloat16} == {"stack", "table", "kernel", "gain"}
    assert {name for name, dtype in found.items() if dtype == jnp.float32} == {"both", "carry"}
    assert needs.together(found, {"table": np.dtype("float32")})["table"] == jnp.float32


@pytest.mark.parametrize(
    ("size", "shards", "expected"), [(5, 1, (5, 1)), (6, 4, (8, 1)), (3, 8, (4, 2)), (1, 8, (1, 8))]
)
def test_batches_fill_the_devices(size, shards, expected):
    assert filled(size, shards) == expected


@pytest.mark.slow
def test_processes_draw_together_what_one_draws_and_the_first_writes(folder, tmp_path):
    with socket.create_server(("", 0)) as server:
        where = f"localhost:{server.getsockname()[1]}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    asked = ("sample", "--run", folder / "eight", "--prompt", "a red cat", "--count", "3", "--steps", "2")

    def start(out, *options):
        command = [sys.executable, "-m", "metacanvas_jax.cli.main", *asked, "--out", tmp_path / out, *options]
        return subprocess.Popen(list(map(str, command)), env=env, stderr=subprocess.PIPE, text=True)

    group = ("--processes", 2, "--coordinator", where, "--mesh", "data=2,fsdp=2", "--process")
    processes = [start("alone.png"), *(start(f"{i}.png", *group, i) for i in range(2))]
    for process in processes:
        said = process.communicate(timeout=600)[1]
        assert process.returncode == 0, said[-3000:]
    alone, together = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("alone.png", "0.png"))
    assert np.abs(alone - together).max() <= 1
    assert not (tmp_path / "1.png").exists()
