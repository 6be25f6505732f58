"""What may change when a run continues from its checkpoint, and what may not."""

import dataclasses
import shlex

import pytest
import train_support
from experiments_support import build

from metacanvas_jax.config import read
from metacanvas_jax.config.identity import identity
from metacanvas_jax.config.load import load_config
from metacanvas_jax.errors import UserError
from metacanvas_jax.train.agreement import check_same
from metacanvas_jax.train.job import fingerprint, fit_config
from metacanvas_jax.train.store import describe


def changed(tree, key, value):
    """The same dataclasses with another value at a dotted key; numbers are places in a tuple."""
    name, _, rest = key.partition(".")
    if isinstance(tree, tuple):
        place = int(name)
        return (*tree[:place], changed(tree[place], rest, value), *tree[place + 1 :])
    new = changed(getattr(tree, name), rest, value) if rest else value
    return dataclasses.replace(tree, **{name: new})


def description(setup):
    job = train_support.job(config=identity(setup), optimizer=setup.optimizer, rules=setup.train.rules)
    return describe(fingerprint(job, fit_config(setup)))


@pytest.fixture(scope="module")
def setup():
    return build("video_stage3", "keyframes_3")


HOW = {
    "data.threads": 7,
    "data.prefetch": 9,
    "data.in_memory": False,
    "data.max_skips": 9,
    "sources.0.max_skips": 9,
    "sources.0.in_memory": True,
    "sources.0.path": "elsewhere",
    "dit.remat": "dots",
    "mllm.language.remat": "dots",
    "mllm.vision.remat": "dots",
    "vae.chunk": 3,
    "train.max_skips": 9,
    "train.steps": 10**6,
    "train.log_every": 1,
    "train.checkpoint_every": 7,
    "train.keep_best": 1,
    "mesh.fsdp": 2,
    "eval.batch": 5,
    "dit_weights": "elsewhere",
    "start": "elsewhere",
    "name": "renamed",
}
WHAT = {
    "seed": 99,
    "data.caption_dropout": 0.9,
    "data.canvas_dropout": 0.3,
    "sources.0.weight": 0.9,
    "sources.0.kind": "jsonl",
    "dit.heads": 7,
    "dit.dtype": "float32",
    "mllm.language.layers": 3,
    "mllm.buckets": (17,),
    "canvas.rows": 3,
    "canvas.latents_per_cell": 4,
    "buckets.0.length": 17,
    "buckets.0.weight": 0.01,
    "train.batch": 17,
    "train.accumulate": 17,
    "train.ema": 0.5,
    "train.frozen_dtype": "float32",
    "train.rules": ((".*", "train"),),
    "optimizer.learning_rate": 0.5,
    "optimizer.weight_decay": 0.5,
    "time": None,
}


@pytest.mark.parametrize("key", HOW)
def test_what_cannot_change_a_result_may_change(setup, key):
    other = changed(setup, key, HOW[key])
    assert other != setup, "the value is that of the config already"
    check_same(description(setup), description(other), "run")


@pytest.mark.parametrize("key", WHAT)
def test_what_decides_a_result_may_not_change(setup, key):
    with pytest.raises(UserError, match="checkpoint run is of another config: "):
        check_same(description(setup), description(changed(setup, key, WHAT[key])), "run")


@pytest.mark.parametrize(
    "flags",
    [
        ["--config.data.caption_dropout=0.1"],
        ["--config.train.batch=17", "--config.train.accumulate=17", "--config.train.ema=0.5"],
        ["--config.optimizer.schedule=cosine", "--config.optimizer.total_steps=9000", "--config.seed=3"],
        ["--config.train.frozen_dtype=float32", "--config.mllm.system=you draw; well"],
    ],
)
def test_the_refusal_gives_the_arguments_with_which_a_run_goes_on(flags):
    def described(arguments):
        return description(read.experiment(load_config("configs/image_editing.py", arguments)))

    old, now = described(flags), described([])
    with pytest.raises(UserError, match="to go on as it was: ") as caught:
        check_same(old, now, "run")
    told, _, anew = str(caught.value).partition("to go on as it was: ")[2].partition("; to begin anew: ")
    advised = shlex.split(told)
    assert anew == "another --workdir"
    assert len(flags) > 1 or advised == flags
    check_same(old, described(advised), "run")


def test_the_refusal_gives_no_arguments_where_none_would_do(setup):
    with pytest.raises(UserError) as caught:
        check_same(description(changed(setup, "train.rules", WHAT["train.rules"])), description(setup), "run")
    assert "to go on as it was" not in str(caught.value)
