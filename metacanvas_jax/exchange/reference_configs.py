"""Configs of this project as the ``config.json`` of diffusers and transformers: the inverse of reading theirs."""

from typing import Any

from metacanvas_jax.dit.flux.network import FluxConfig
from metacanvas_jax.dit.sana.network import SanaConfig
from metacanvas_jax.dit.wan.network import WanConfig
from metacanvas_jax.mllm.qwen2_5_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen2_5_vl.vision import VisionConfig

DIFFUSERS_VERSION = "0.42.1"


def sana(config: SanaConfig) -> dict[str, Any]:
    """``SanaTransformer2DModel``."""
    return {
        "_class_name": "SanaTransformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_width,
        "num_cross_attention_heads": config.cross_heads,
        "cross_attention_head_dim": config.width // config.cross_heads,
        "cross_attention_dim": config.width,
        "num_layers": config.layers,
        "caption_channels": config.context_width,
        "mlp_ratio": config.mlp_ratio,
        "attention_bias": False,
        "sample_size": config.sample_size,
        "patch_size": config.patch,
        "norm_elementwise_affine": False,
        "norm_eps": config.eps,
        "interpolation_scale": config.interpolation_scale,
        "qk_norm": None if config.qk_norm is None else "rms_norm_across_heads",
        "guidance_embeds": False,
    }


def flux(config: FluxConfig) -> dict[str, Any]:
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


def wan(config: WanConfig) -> dict[str, Any]:
    """``WanTransformer3DModel``; further input channels are no part of it (see ``tables/metacanvas.py``)."""
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


def qwen(language: LanguageConfig, vision: VisionConfig, tokens: dict[str, int]) -> dict[str, Any]:
    """``Qwen2_5_VLForConditionalGeneration``; ``tokens`` are the ids of Qwen's special tokens by their text."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": language.tied,
        "image_token_id": tokens["<|image_pad|>"],
        "video_token_id": tokens["<|video_pad|>"],
        "vision_start_token_id": tokens["<|vision_start|>"],
        "vision_end_token_id": tokens["<|vision_end|>"],
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "vocab_size": language.vocab,
            "hidden_size": language.width,
            "intermediate_size": language.mlp,
            "num_hidden_layers": language.layers,
            "num_attention_heads": language.heads,
            "num_key_value_heads": language.kv_heads,
            "hidden_act": "silu",
            "rms_norm_eps": language.norm_eps,
            "bos_token_id": tokens["<|im_start|>"],
            "eos_token_id": tokens["<|im_end|>"],
            "pad_token_id": tokens["<|endoftext|>"],
            "tie_word_embeddings": language.tied,
            "use_sliding_window": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": language.rope_theta,
                "mrope_section": list(language.rope_sections),
            },
        },
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": vision.depth,
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp,
            "num_heads": vision.heads,
            "out_hidden_size": vision.out_width,
            "in_channels": vision.in_channels,
            "in_chans": vision.in_channels,
            "patch_size": vision.patch,
            "temporal_patch_size": vision.temporal_patch,
            "spatial_merge_size": vision.merge,
            "window_size": vision.window,
            "fullatt_block_indexes": list(vision.full_attention_layers),
            "tokens_per_second": 2,
            "hidden_act": "silu",
        },
    }
