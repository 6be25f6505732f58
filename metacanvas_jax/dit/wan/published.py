"""Wan2.2 as diffusers publishes it: its ``config.json`` and its scheduler."""

from typing import Any

from metacanvas_jax.dit.schedulers import flow_solver
from metacanvas_jax.dit.wan.network import WanConfig
from metacanvas_jax.weights.published import DIFFUSERS_VERSION, Fields
from metacanvas_jax.weights.record import Sampling


def read(f: Fields) -> WanConfig:
    """The sizes in the ``config.json`` of ``WanTransformer3DModel``."""
    f.only(image_dim=None, added_kv_proj_dim=None, pos_embed_seq_len=None, qk_norm="rms_norm_across_heads")
    channels = f("out_channels", None) or f("in_channels")
    f.only(in_channels=channels)
    f.skip("rope_max_seq_len")  # the length of a table that is made for any length here
    return WanConfig(
        latent_channels=channels,
        heads=f("num_attention_heads"),
        head_width=f("attention_head_dim"),
        mlp=f("ffn_dim"),
        layers=f("num_layers"),
        context_width=f("text_dim"),
        freq=f("freq_dim"),
        patch=tuple(f("patch_size")),
        cross_norm=f("cross_attn_norm"),
        eps=float(f("eps", 1e-6)),
    )


def write(config: WanConfig) -> dict[str, Any]:
    """``WanTransformer3DModel``; further input channels are no part of it (they are exported with the connector)."""
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "patch_size": list(config.patch),
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_width,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "text_dim": config.context_width,
        "freq_dim": config.freq,
        "ffn_dim": config.mlp,
        "num_layers": config.layers,
        "cross_attn_norm": config.cross_norm,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.eps,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }


def sampling(f: Fields) -> Sampling:
    """Schedule, method and shift of ``UniPCMultistepScheduler`` with flow sigmas."""
    flow_solver(f)
    f.only(solver_type="bh2", predict_x0=True, disable_corrector=[], solver_p=None)
    f.only(sigma_min=None, sigma_max=None, shift_terminal=None)
    return Sampling("wan_unipc", "unipc", float(f("flow_shift", 1.0)))
