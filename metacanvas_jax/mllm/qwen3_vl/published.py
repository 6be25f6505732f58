"""Qwen3-VL's ``config.json`` as transformers publishes it."""

import math
from typing import Any

from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.published_folder import outer_values, text_values, vision_values
from metacanvas_jax.mllm.qwen3_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen3_vl.network import MllmConfig
from metacanvas_jax.mllm.qwen3_vl.vision import VisionConfig
from metacanvas_jax.mllm.vision import ROPE_THETA
from metacanvas_jax.weights.published import Fields, rope_theta

DEFAULT_THETA = 5e5  # of the reference, for a file that says nothing


def read(f: Fields) -> MllmConfig:
    """The sizes in the ``config.json`` of ``Qwen3VLForConditionalGeneration``, of transformers 4.57 and 5."""
    text = f.inside("text_config")
    tied = [part("tie_word_embeddings", False) for part in (f, text)]
    language = _language(text, any(tied))
    f.repeat(text)  # some versions of transformers write values of the text twice
    return MllmConfig(language, _vision(f.inside("vision_config")))


def _language(f: Fields, tied: bool) -> LanguageConfig:
    rope, theta = rope_theta(f, DEFAULT_THETA, "mrope")
    rope.among(mrope_interleaved=(True, None))
    layers, heads = f("num_hidden_layers"), f("num_attention_heads")
    f.among(layer_types=(["full_attention"] * layers, None), use_sliding_window=(False, None))
    f.only(hidden_act="silu", attention_bias=False)
    f.skip("max_position_embeddings", "sliding_window", "max_window_layers")  # positions have no end here
    return LanguageConfig(
        vocab=f("vocab_size"),
        width=f("hidden_size"),
        layers=layers,
        heads=heads,
        kv_heads=f("num_key_value_heads"),
        mlp=f("intermediate_size"),
        rope_sections=tuple(rope("mrope_section", (24, 20, 20))),
        rope_theta=theta,
        norm_eps=float(f("rms_norm_eps", 1e-6)),
        tied=tied,
        head_width=f("head_dim", 128),
    )


def _vision(f: Fields) -> VisionConfig:
    _, theta = rope_theta(f, ROPE_THETA, "axial")
    if theta != ROPE_THETA:
        raise UserError(f"{f.file}: the vision tower's rope_theta is {theta}; only {ROPE_THETA} is built here")
    f.only(hidden_act="gelu_pytorch_tanh")
    places = f("num_position_embeddings", 48**2)
    if math.isqrt(places) ** 2 != places:
        f.refuse("num_position_embeddings", "a square number")
    return VisionConfig(
        depth=f("depth"),
        width=f("hidden_size"),
        heads=f("num_heads"),
        mlp=f("intermediate_size"),
        out_width=f("out_hidden_size"),
        deepstack_layers=tuple(f("deepstack_visual_indexes")),
        position_side=math.isqrt(places),
        patch=f("patch_size", 16),
        temporal_patch=f("temporal_patch_size", 2),
        merge=f("spatial_merge_size", 2),
        in_channels=f("in_channels", 3),
    )


def write(config: MllmConfig, tokens: dict[str, int]) -> dict[str, Any]:
    """``Qwen3VLForConditionalGeneration``; ``tokens`` are the ids of Qwen's special tokens by their text."""
    language, vision = config.language, config.vision
    return {
        **outer_values("Qwen3VLForConditionalGeneration", "qwen3_vl", language.tied, tokens),
        "text_config": {
            **text_values("qwen3_vl_text", language, tokens, mrope_interleaved=True),
            "head_dim": language.head_channels,
            "attention_bias": False,
        },
        "vision_config": {
            **vision_values("qwen3_vl_vision", vision, "gelu_pytorch_tanh"),
            "num_position_embeddings": vision.position_side**2,
            "deepstack_visual_indexes": list(vision.deepstack_layers),
        },
    }
