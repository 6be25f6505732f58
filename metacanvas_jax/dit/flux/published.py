"""FLUX.1 as diffusers publishes it: its ``config.json``."""

from typing import Any

from metacanvas_jax.dit.flux.network import FluxConfig
from metacanvas_jax.weights.published import DIFFUSERS_VERSION, Fields


def read(f: Fields) -> FluxConfig:
    """The sizes in the ``config.json`` of ``FluxTransformer2DModel``."""
    f.only(patch_size=1)
    f.among(out_channels=(f("in_channels"), None))
    return FluxConfig(
        latent_channels=f("in_channels") // 4,
        layers_double=f("num_layers"),
        layers_single=f("num_single_layers"),
        heads=f("num_attention_heads"),
        head_width=f("attention_head_dim"),
        context_width=f("joint_attention_dim"),
        pooled_width=f("pooled_projection_dim"),
        guidance=f("guidance_embeds", False),
        rope_axes=tuple(f("axes_dims_rope", (16, 56, 56))),
    )


def write(config: FluxConfig) -> dict[str, Any]:
    """``FluxTransformer2DModel``."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "patch_size": 1,
        "in_channels": 4 * config.latent_channels,
        "out_channels": 4 * config.latent_channels,
        "num_layers": config.layers_double,
        "num_single_layers": config.layers_single,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_width,
        "joint_attention_dim": config.context_width,
        "pooled_projection_dim": config.pooled_width,
        "guidance_embeds": config.guidance,
        "axes_dims_rope": list(config.rope_axes),
    }
