"""Training steps with published times, to compare estimates with. Compiling them needs only shapes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.diffusion.flow import TimeConfig, flow_loss, sample_time
from metacanvas_jax.parallel.mesh import MeshConfig, placed_batch
from metacanvas_jax.parallel.rules import RULES, placed, shardings
from metacanvas_jax.plan.programs import Program, abstract_key, device_bytes
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.state import abstract_state
from metacanvas_jax.train.step import make_step
from metacanvas_jax.types import Given, States


@dataclasses.dataclass(frozen=True)
class Measured:
    """A job with a published step time, and the assumptions of the program that is compiled for it."""

    name: str
    seconds: float
    source: str
    assumptions: str
    topology: str
    mesh: MeshConfig
    make: Callable[[Mesh], Program]


def dit_program(name: str, network: nn.Module, inputs: dict[str, Any], mesh: Mesh) -> Program:
    """The train step of a DiT without MLLM, text encoder and autoencoder."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5))
    batch = {key: jax.ShapeDtypeStruct(shape, dtype) for key, (shape, dtype) in inputs.items()}

    def conditions(batch):
        return States(batch["context"]), Given(pooled=batch.get("pooled"), guidance=batch.get("guidance"))

    def loss(trainable, frozen, batch, key):
        noise_key, time_key = jax.random.split(key)
        latents = batch["latents"]
        text, given = conditions(batch)
        noise = jax.random.normal(noise_key, latents.shape, latents.dtype)
        time = sample_time(time_key, latents.shape[:1], TimeConfig())
        velocity = lambda z, t: network.apply({"params": trainable}, z, t, text, given)  # noqa: E731
        return flow_loss(velocity, latents, noise, time), {}

    def init(key, batch):
        return network.init(key, batch["latents"], jnp.ones(batch["latents"].shape[:1]), *conditions(batch))["params"]

    boxed = jax.eval_shape(init, jax.random.key(0), batch)
    params = placed(boxed, shardings(boxed, mesh))
    state = abstract_state(params, optimizer, mesh)
    batch = placed_batch(batch, mesh)
    step = make_step(
        lambda frozen, batch, key: batch, loss, optimizer, state_shardings=jax.tree.map(lambda x: x.sharding, state)
    )
    held = {
        "trainable": device_bytes(state.params),
        "optimizer": device_bytes(state.opt_state),
        "batch": device_bytes(batch),
    }
    samples = inputs["latents"][0][0]
    return Program(name, step, (state, {}, batch, abstract_key(mesh)), held, samples, mesh, RULES)
