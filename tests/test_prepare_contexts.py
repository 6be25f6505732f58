"""Contexts computed ahead: a training then finds every one of its prompts."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from miniature_support import config

from metacanvas_jax import precompute
from metacanvas_jax.cli.main import main
from metacanvas_jax.config import read
from metacanvas_jax.data.inputs import Inputs
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError
from metacanvas_jax.launch.prepare import prepare
from metacanvas_jax.parallel.mesh import make_mesh
from metacanvas_jax.parallel.rules import RULES
from metacanvas_jax.train.job import make_job
from metacanvas_jax.train.parameters import param_shapes
from metacanvas_jax.trees import partition
from metacanvas_jax.weights import saved

pytestmark = pytest.mark.miniature


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contexts")
    setup = read.experiment(config(folder, "canvas"))
    setup = dataclasses.replace(
        setup,
        data=dataclasses.replace(setup.data, count=24, caption_dropout=0.5),
        mllm=dataclasses.replace(setup.mllm, context_cache=str(folder / "cache"), buckets=(24,)),
    )
    prepare(setup)
    shapes = param_shapes(setup)
    rng = np.random.default_rng(0)
    random = jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(x.dtype), shapes["mllm"])
    saved.save(folder / "mllm" / "weights", random, {})
    return setup


def stored(setup):
    return {path.name: path.stat().st_mtime_ns for path in Path(setup.mllm.context_cache).rglob("*.safetensors")}


def test_prepare_contexts_are_those_that_a_training_reads(setup):
    assert precompute.fill_contexts(setup, 8, progress=False) == 24
    before = stored(setup)
    assert 2 < len(before) <= 25  # some prompts come twice; one is the empty one
    job, mesh = make_job(setup), make_mesh(setup.mesh)
    shapes = param_shapes(setup)
    frozen = partition(shapes, job.rules)[1]  # no weights at all: whatever is missing cannot be computed
    (bucket,) = setup.shapes
    empty = Inputs(setup).examples(bucket)(Sample("", np.zeros((1, *bucket.size, 3), np.uint8)))["mask"].sum()
    stream, lengths = job.batches(), []
    for _ in range(4):
        batch = job.enrich(frozen, next(stream), mesh, RULES)
        assert "tokens" not in batch and np.isfinite(batch["context"].hidden).all()
        lengths += batch["context"].mask.sum(axis=1).tolist()
    stream.close()
    assert stored(setup) == before
    assert lengths.count(empty) / len(lengths) == pytest.approx(0.5, abs=0.2), "the share without a caption"
    assert min(lengths) == empty and len(set(lengths)) > 2
    share = precompute.fill_contexts(setup, 8, process_index=1, process_count=5, progress=False)
    assert share == 5 and stored(setup) == before


def test_prepare_contexts_needs_a_folder_and_a_config(setup, capsys):
    nowhere = dataclasses.replace(setup, mllm=dataclasses.replace(setup.mllm, context_cache=""))
    with pytest.raises(UserError, match=r"mllm\.context_cache is empty"):
        precompute.fill_contexts(nowhere, 8)
    assert main(["prepare", "--contexts"]) == 2
    assert "--contexts needs --config" in capsys.readouterr().err
