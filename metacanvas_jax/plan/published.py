"""Training steps whose times others published: what estimates are held against. Compiling them needs shapes only."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.diffusion.flow import TimeConfig, flow_loss, sample_time
from metacanvas_jax.dit.flux.network import Flux, flux_dev
from metacanvas_jax.dit.wan.network import Wan, wan2_1_t2v_14b
from metacanvas_jax.parallel.mesh import MeshConfig
from metacanvas_jax.parallel.rules import RULES, placed, shardings
from metacanvas_jax.plan.programs import Program, abstract_key, device_bytes, spread
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.state import abstract_state
from metacanvas_jax.train.step import make_step
from metacanvas_jax.types import Given, States


@dataclasses.dataclass(frozen=True)
class Measured:
    """A job whose step time others published, what is assumed about it, and why an estimate differs."""

    name: str
    seconds: float
    source: str
    assumptions: str
    topology: str
    mesh: MeshConfig
    make: Callable[[Mesh], Program]
    difference: str = ""


def wan_program(mesh: Mesh) -> Program:
    """Full training of Wan2.1-14B on 75,600 tokens of one sample."""
    config = wan2_1_t2v_14b(dtype="bfloat16", remat="full")
    inputs = {"latents": ((1, 21, 90, 160, 16), jnp.float32), "context": ((1, 512, 4096), jnp.bfloat16)}
    return dit_program("train Wan2.1-14B", Wan(config), inputs, mesh)


def flux_program(mesh: Mesh) -> Program:
    """Full training of FLUX.1-dev on 4,096 image and 512 text tokens of 8 samples."""
    config = flux_dev(dtype="bfloat16", remat="full")
    inputs = {
        "latents": ((8, 1, 128, 128, 16), jnp.float32),
        "context": ((8, 512, 4096), jnp.bfloat16),
        "pooled": ((8, 768), jnp.float32),
        "guidance": ((8,), jnp.float32),
    }
    return dit_program("train FLUX.1-dev", Flux(config), inputs, mesh)


def dit_program(name: str, network: nn.Module, inputs: dict[str, Any], mesh: Mesh) -> Program:
    """A train step of a DiT alone."""
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
    batch = jax.tree.map(lambda x: spread(x.shape, x.dtype, mesh), batch)
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


SOURCE = "MaxDiffusion README, github.com/AI-Hypercomputer/maxdiffusion"
COMMON = "all weights trained in float32 with AdamW, bfloat16 compute, blocks recomputed, latents and text states given"
JOBS = (
    Measured(
        name="Wan2.1-14B text-to-video, 720x1280, 81 frames, batch 1, v5p-8 (4 chips)",
        seconds=36.0,
        source=SOURCE,
        assumptions=f"{COMMON}, tokens split over the chips",
        topology="v5p:2x2x1",
        mesh=MeshConfig(data=1, context=4),
        make=wan_program,
        difference=(
            "Two thirds of the estimate are attention at 97 % of peak, which is what the schedule of this project's "
            "kernels says (docs/kernels.md), with five products in the backward pass. MaxDiffusion runs the splash "
            "kernels of JAX, whose separate passes for dq and for dk, dv take seven, and no schedule knows what "
            "waiting for HBM costs on a chip. Were all of the difference attention, theirs would run at 38 % of peak. "
            "The other job, which has little attention, says that the rest is reckoned well."
        ),
    ),
    Measured(
        name="FLUX.1-dev text-to-image, 1024x1024, batch 8, v5p-8 (4 chips)",
        seconds=1.769,
        source=SOURCE,
        assumptions=f"{COMMON}, parameters split over the chips",
        topology="v5p:2x2x1",
        mesh=MeshConfig(data=1, fsdp=4),
        make=flux_program,
    ),
)
