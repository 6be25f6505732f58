"""FLUX.2 as diffusers publishes it: its ``config.json`` and its scheduler."""

import math
from typing import Any

from metacanvas_jax.diffusion.schedules import DynamicShift
from metacanvas_jax.dit.flux2.network import Flux2Config
from metacanvas_jax.dit.schedulers import flow_euler
from metacanvas_jax.weights.published import DIFFUSERS_VERSION, Fields
from metacanvas_jax.weights.record import Sampling


def read(f: Fields) -> Flux2Config:
    """The sizes in the ``config.json`` of ``Flux2Transformer2DModel``."""
    f.must(guidance_embeds=False)  # FLUX.2 [dev] has an input for guidance
    f.only(patch_size=1, timestep_guidance_channels=256, eps=1e-6)
    f.among(out_channels=(f("in_channels"), None))
    ratio = f("mlp_ratio", 3.0)
    if ratio != math.floor(ratio):
        f.refuse("mlp_ratio", "a whole number")
    return Flux2Config(
        latent_channels=f("in_channels"),
        layers_double=f("num_layers"),
        layers_single=f("num_single_layers"),
        heads=f("num_attention_heads"),
        head_width=f("attention_head_dim"),
        mlp_ratio=int(ratio),
        context_width=f("joint_attention_dim"),
        rope_axes=tuple(f("axes_dims_rope", (32, 32, 32, 32))),
        theta=float(f("rope_theta", 2000)),
    )


def write(config: Flux2Config) -> dict[str, Any]:
    """``Flux2Transformer2DModel``."""
    return {
        "_class_name": "Flux2Transformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "patch_size": 1,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "num_layers": config.layers_double,
        "num_single_layers": config.layers_single,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_width,
        "mlp_ratio": float(config.mlp_ratio),
        "joint_attention_dim": config.context_width,
        "timestep_guidance_channels": 256,
        "axes_dims_rope": list(config.rope_axes),
        "rope_theta": int(config.theta),
        "eps": 1e-6,
        "guidance_embeds": False,
    }


def sampling(f: Fields) -> Sampling:
    """``FlowMatchEulerDiscreteScheduler``, whose shift the pipeline computes itself (``schedule.py``)."""
    f.only(shift_terminal=None)
    return flow_euler(f)._replace(schedule="flux2_empirical", dynamic=DynamicShift())
