"""The shipped experiments, and one training step of any of them without a file."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from metacanvas_jax.build import Experiment, experiment
from metacanvas_jax.cli.options import load_config
from metacanvas_jax.data.tasks import Bucket
from metacanvas_jax.train import jobs
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.partition import partition
from metacanvas_jax.train.state import new_state
from metacanvas_jax.train.step import make_step

FILES = (
    "t2i_scratch",
    "t2i_lora",
    "connector_ablation",
    "image_editing",
    "video_stage1",
    "video_stage2",
    "video_stage3",
)

# One step is run: what matters is the time to compile it.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def variants(file: str) -> tuple[str, ...]:
    return importlib.import_module(f"configs.{file}").VARIANTS


def build(file: str, variant: str = "") -> Experiment:
    return experiment(load_config(f"configs/{file}.py:{variant}", []))


def miniature(file: str, variant: str = "") -> Experiment:
    """Without the fitted autoencoder, which is a file, and with a batch for eight devices."""
    words = f"{variant}.miniature" if variant else "miniature"
    return dataclasses.replace(build(file, words), vae_weights="")


def batch(setup: Experiment, bucket: Bucket):
    """A batch of zeros, except that a few tokens are real and media stand in their places."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jobs.batch_shapes(setup, bucket))
    zeros["mask"] = zeros["mask"].at[:, : max(1, bucket.length // 2)].set(True)
    if "text_mask" in zeros:
        zeros["text_mask"] = zeros["text_mask"].at[:, :4].set(True)
    return zeros


def step(setup: Experiment, bucket: Bucket, *, traced: bool = False):
    """(state before, state after, metrics) of one step; abstract if ``traced``."""
    job = jobs.make_job(setup)
    optimizer = make_optimizer(job.optimizer)
    one = make_step(job.prepare, job.loss, optimizer)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda key: jobs.unboxed(job.init(key)), key)
    if traced:
        trainable, frozen = partition(shapes, job.rules)
        state = jax.eval_shape(lambda params: new_state(params, optimizer), trainable)
        inputs = jobs.batch_shapes(setup, bucket)
        return state, *jax.eval_shape(one, state, frozen, inputs, key)
    # Random numbers also where a run starts with zeros: every parameter then has a gradient, and nothing is compiled.
    rng = np.random.default_rng(0)
    trainable, frozen = partition(
        jax.tree.map(lambda x: 0.02 * rng.normal(size=x.shape).astype(x.dtype), shapes), job.rules
    )
    before = jax.tree.map(jnp.asarray, trainable)
    state = new_state(jax.tree.map(jnp.copy, before), optimizer)  # the step takes the state for itself
    inputs = batch(setup, bucket)
    after, metrics = one.lower(state, frozen, inputs, key).compile(compiler_options=FAST)(state, frozen, inputs, key)
    return before, after, metrics
