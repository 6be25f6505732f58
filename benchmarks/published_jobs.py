"""Training steps of published networks with published times."""

import jax.numpy as jnp
from jax.sharding import Mesh

from metacanvas_jax.dit.flux.network import Flux, flux_dev
from metacanvas_jax.dit.wan.network import Wan, wan2_1_t2v_14b
from metacanvas_jax.parallel.mesh import MeshConfig
from metacanvas_jax.plan.measured import Measured, dit_program
from metacanvas_jax.plan.programs import Program


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
