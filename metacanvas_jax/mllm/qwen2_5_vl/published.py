"""Qwen2.5-VL's ``config.json`` as transformers publishes it."""

from typing import Any

from metacanvas_jax.mllm.qwen2_5_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig
from metacanvas_jax.mllm.qwen2_5_vl.vision import VisionConfig
from metacanvas_jax.weights.published import Fields, rope_fields


def read(f: Fields) -> MllmConfig:
    """The sizes in the ``config.json`` of ``Qwen2_5_VLForConditionalGeneration``, of old and new layout."""
    text = f.inside("text_config") if "text_config" in f.values else f
    vision, rope = f.inside("vision_config"), rope_fields(text)
    language = LanguageConfig(
        vocab=text("vocab_size"),
        width=text("hidden_size"),
        layers=text("num_hidden_layers"),
        heads=text("num_attention_heads"),
        kv_heads=text("num_key_value_heads"),
        mlp=text("intermediate_size"),
        rope_sections=tuple(rope("mrope_section")),
        rope_theta=float(rope("rope_theta", 1e6)),
        norm_eps=float(text("rms_norm_eps", 1e-6)),
        tied=f("tie_word_embeddings", text("tie_word_embeddings", False)),
    )
    tower = VisionConfig(
        depth=vision("depth"),
        width=vision("hidden_size"),
        heads=vision("num_heads"),
        mlp=vision("intermediate_size"),
        out_width=vision("out_hidden_size"),
        full_attention_layers=tuple(vision("fullatt_block_indexes")),
        patch=vision("patch_size", 14),
        temporal_patch=vision("temporal_patch_size", 2),
        merge=vision("spatial_merge_size", 2),
        window=vision("window_size", 112),
        in_channels=vision("in_chans", vision("in_channels", 3)),
    )
    return MllmConfig(language, tower)


def write(config: MllmConfig, tokens: dict[str, int]) -> dict[str, Any]:
    """``Qwen2_5_VLForConditionalGeneration``; ``tokens`` are the ids of Qwen's special tokens by their text."""
    language, vision = config.language, config.vision
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
