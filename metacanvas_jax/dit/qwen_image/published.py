"""Qwen-Image as diffusers publishes it: its ``config.json``."""

from typing import Any

from metacanvas_jax.dit.qwen_image.network import QwenImageConfig
from metacanvas_jax.weights.published import DIFFUSERS_VERSION, Fields


def read(f: Fields) -> QwenImageConfig:
    """The sizes in the ``config.json`` of ``QwenImageTransformer2DModel``."""
    f.only(patch_size=2, guidance_embeds=False)
    f.only(use_additional_t_cond=False, use_layer3d_rope=False)  # of Qwen-Image-Layered
    f.only(out_channels=f("in_channels") // 4)
    f.skip("pooled_projection_dim")  # in the published files, and read by no class of diffusers
    return QwenImageConfig(
        latent_channels=f("in_channels") // 4,
        layers=f("num_layers"),
        heads=f("num_attention_heads"),
        head_width=f("attention_head_dim"),
        context_width=f("joint_attention_dim"),
        rope_axes=tuple(f("axes_dims_rope", (16, 56, 56))),
        zero_cond_t=f("zero_cond_t", False),
    )


def write(config: QwenImageConfig) -> dict[str, Any]:
    """``QwenImageTransformer2DModel``."""
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "patch_size": 2,
        "in_channels": 4 * config.latent_channels,
        "out_channels": config.latent_channels,
        "num_layers": config.layers,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_width,
        "joint_attention_dim": config.context_width,
        "guidance_embeds": False,
        "axes_dims_rope": list(config.rope_axes),
        "zero_cond_t": config.zero_cond_t,
    }
