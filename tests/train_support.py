"""A tiny job with everything in it: frozen weights, noise, dropout keys, a shuffled grain stream. Also a program.

``python train_support.py WORKDIR STEPS`` trains it and prints every step that has been taken.
"""

import sys
from pathlib import Path

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np

from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.nn.layers import Dense
from metacanvas_jax.parallel.mesh import MeshConfig
from metacanvas_jax.train.job import FitConfig, Job
from metacanvas_jax.train.loop import fit

WIDTH, BATCH = 8, 16
CONFIG = {"model": {"width": WIDTH}, "data": {"batch": BATCH}}
TIMING = {"steps_per_second", "samples_per_second", "data_wait", "compile_seconds"}
TEN_STEPS = FitConfig(
    steps=10,
    accumulate=2,
    ema_decay=0.9,
    log_every=1,
    checkpoint_every=3,
    mesh=MeshConfig(data=2, fsdp=2),
)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jax.nn.gelu(Dense(WIDTH, (None, "embed"), "float32", name="frozen")(x))
        x = jax.nn.gelu(Dense(2 * WIDTH, ("embed", "mlp"), "float32", name="up")(x))
        return Dense(1, ("mlp", None), "float32", name="down")(x)


def init(key):
    return Net().init(key, jnp.zeros((1, WIDTH)))["params"]


def prepare(frozen, batch, key):
    return batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape), batch["y"]


def loss(trainable, frozen, prepared, key):
    x, y = prepared
    x = x * jax.random.bernoulli(key, 0.9, x.shape).astype(jnp.float32)
    frozen = jax.tree.map(lambda w: w.astype(jnp.float32), frozen)
    error = Net().apply({"params": trainable | frozen}, x) - y
    return jnp.mean(error**2), {"error": jnp.mean(jnp.abs(error))}


def sample(index):
    x = np.random.default_rng(int(index)).normal(size=WIDTH).astype(np.float32)
    return {"x": x, "y": np.sin(x[:1] * 2)}


def batches(records=1000):
    stream = grain.MapDataset.range(records).seed(3).shuffle().repeat().map(sample).batch(BATCH, drop_remainder=True)
    return iter(stream.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def job(**changes):
    fields = {
        "init": init,
        "prepare": prepare,
        "loss": loss,
        "rules": (("frozen/.*", "freeze"), (".*", "train")),
        "batches": batches,
        "optimizer": OptimizerConfig(1e-2, warmup_steps=3),
        "config": CONFIG,
    }
    return Job(**(fields | changes))


def announce(state, frozen, step):
    jax.block_until_ready(state)
    print("step", step, flush=True)


if __name__ == "__main__":
    steps = FitConfig(**{**vars(TEN_STEPS), "steps": int(sys.argv[2]), "preview_every": 1})
    fit(job(), steps, Path(sys.argv[1]), preview=announce, progress=False, devices=jax.devices()[:4])
