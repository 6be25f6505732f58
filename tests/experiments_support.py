"""The shipped experiments, and one training step of any of them without a file."""

import dataclasses
import functools
import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.config.schema import Experiment, OptimizerConfig
from metacanvas_jax.data.shapes import batch_shapes
from metacanvas_jax.tasks import TASKS, Bucket
from metacanvas_jax.train.job import Job, make_job
from metacanvas_jax.train.optimizer import learning_rate, make_optimizer
from metacanvas_jax.train.state import new_state
from metacanvas_jax.train.step import make_step
from metacanvas_jax.trees import flat, partition

FILES = (
    "t2i_scratch",
    "t2i_lora",
    "connector_ablation",
    "image_editing",
    "qwen_image_edit",
    "flux2_klein",
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
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch_shapes(setup, bucket))
    zeros["mask"] = zeros["mask"].at[:, : max(1, bucket.length // 2)].set(True)
    if "text_mask" in zeros:
        zeros["text_mask"] = zeros["text_mask"].at[:, :4].set(True)
    return zeros


def shapes_of_a_step(setup: Experiment, bucket: Bucket):
    """(state before, state after, metrics) of the step as it is compiled for training, as shapes."""
    job = make_job(setup)
    optimizer = make_optimizer(job.optimizer)
    key = jax.random.key(0)
    trainable, frozen = partition(jax.eval_shape(lambda key: nn.meta.unbox(job.init(key)), key), job.rules)
    state = jax.eval_shape(lambda params: new_state(params, optimizer), trainable)
    one = make_step(job.prepare, job.loss, optimizer)
    return state, *jax.eval_shape(one, state, frozen, batch_shapes(setup, bucket), key)


def take_step(setup: Experiment, bucket: Bucket):
    """(loss, gradients, parameters before, parameters after) of one step.

    The optimizer gets all parameters as one array, which it treats alike: compiled leaf by leaf together with the
    gradients, as ``make_step`` does (test_train_step.py), it takes as long as they do, for every learning rate anew.
    """
    loss, grads, before = _gradients(dataclasses.replace(setup, name="", optimizer=ANY), bucket)
    optimizer = make_optimizer(setup.optimizer)
    flat, tree = jax.tree.flatten(before)
    grad, param = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(side)]) for side in (grads, before))
    moved = jax.jit(lambda g, p: optax.apply_updates(p, optimizer.update(g, optimizer.init(p), p)[0]))(grad, param)
    parts = np.split(np.asarray(moved), np.cumsum([x.size for x in flat])[:-1])
    after = [part.reshape(x.shape) for part, x in zip(parts, flat, strict=True)]
    return loss, grads, before, jax.tree.unflatten(tree, after)


ANY = OptimizerConfig(1.0)


def takes_a_step(setup, bucket):
    """Every parameter that trains has a gradient, and the largest move of the first step of AdamW is its rate."""
    loss, grads, before, after = take_step(setup, bucket)
    assert np.isfinite(loss) and loss > 0
    still = {path for path, grad in flat(grads).items() if not np.abs(grad).max() > 0}
    if TASKS[bucket.task].vae == "nothing":  # nothing is given, so the input channels for it are zeros
        still -= {path for path in still if path.startswith("dit/extra_in/")}
    assert not still and all(np.isfinite(grad).all() for grad in flat(grads).values())
    moved = max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    np.testing.assert_allclose(moved, float(learning_rate(setup.optimizer, 0)), rtol=0.01)


def random_parameters(job: Job):
    """Random numbers also where a run starts with zeros: all parameters then have a gradient, and none is compiled."""
    shapes = jax.eval_shape(lambda key: nn.meta.unbox(job.init(key)), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.02 * rng.normal(size=x.shape).astype(x.dtype), shapes)


@functools.cache
def _gradients(setup: Experiment, bucket: Bucket):
    job, key = make_job(setup), jax.random.key(0)
    trainable, frozen = partition(random_parameters(job), job.rules)

    def gradients(trainable, frozen, batch, key):
        prepared = job.prepare(frozen, batch, key)
        return jax.value_and_grad(job.loss, has_aux=True)(trainable, frozen, prepared, key)

    inputs = trainable, frozen, batch(setup, bucket), key
    (loss, _), grads = jax.jit(gradients).lower(*inputs).compile(compiler_options=FAST)(*inputs)
    return float(loss), jax.device_get(grads), trainable
