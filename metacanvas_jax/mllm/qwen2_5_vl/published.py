"""Qwen2.5-VL's ``config.json`` as transformers publishes it."""

from typing import Any

from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.published_folder import outer_values, text_values, vision_values
from metacanvas_jax.mllm.qwen2_5_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig
from metacanvas_jax.mllm.qwen2_5_vl.vision import VisionConfig
from metacanvas_jax.mllm.vision import ROPE_THETA
from metacanvas_jax.weights.published import Fields, rope_theta

TOKENS_PER_SECOND = 2  # positions that a second of video takes (``PromptConfig.tokens_per_second``)


def read(f: Fields) -> MllmConfig:
    """The sizes in the ``config.json`` of ``Qwen2_5_VLForConditionalGeneration``, of old and new layout."""
    text = f.inside("text_config") if "text_config" in f.values else f
    language = _language(text, f("tie_word_embeddings", False) or text("tie_word_embeddings", False))
    if text is not f:
        f.repeat(text)  # some versions of transformers write the values of the text twice
    return MllmConfig(language, _vision(f.inside("vision_config")))


def _language(f: Fields, tied: bool) -> LanguageConfig:
    rope, theta = rope_theta(f, 1e6, "mrope")
    width, layers, heads = f("hidden_size"), f("num_hidden_layers"), f("num_attention_heads")
    f.among(use_sliding_window=(False, None), layer_types=(["full_attention"] * layers, None))
    f.among(hidden_act=("silu",), head_dim=(width // heads, None))
    # Sliding windows are off, and positions have no end here.
    f.skip("sliding_window", "max_window_layers", "max_position_embeddings")
    return LanguageConfig(
        vocab=f("vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=f("num_key_value_heads"),
        mlp=f("intermediate_size"),
        rope_sections=tuple(rope("mrope_section")),
        rope_theta=theta,
        norm_eps=float(f("rms_norm_eps", 1e-5)),
        tied=tied,
    )


def _vision(f: Fields) -> VisionConfig:
    _, theta = rope_theta(f, ROPE_THETA, "axial")
    if theta != ROPE_THETA:
        raise UserError(f"{f.file}: the vision tower's rope_theta is {theta}; only {ROPE_THETA} is built here")
    f.must(tokens_per_second=TOKENS_PER_SECOND)
    f.only(hidden_act="silu")
    patch, channels = f("patch_size", 14), f("in_channels", 3)
    f.only(spatial_patch_size=patch, in_chans=channels)
    return VisionConfig(
        depth=f("depth"),
        width=f("hidden_size"),
        heads=f("num_heads"),
        mlp=f("intermediate_size"),
        out_width=f("out_hidden_size"),
        full_attention_layers=tuple(f("fullatt_block_indexes")),
        patch=patch,
        temporal_patch=f("temporal_patch_size", 2),
        merge=f("spatial_merge_size", 2),
        window=f("window_size", 112),
        in_channels=channels,
    )


def write(config: MllmConfig, tokens: dict[str, int]) -> dict[str, Any]:
    """``Qwen2_5_VLForConditionalGeneration``; ``tokens`` are the ids of Qwen's special tokens by their text."""
    language, vision = config.language, config.vision
    return {
        **outer_values("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", language.tied, tokens),
        "text_config": {
            **text_values("qwen2_5_vl_text", language, tokens),
            "tie_word_embeddings": language.tied,
            "use_sliding_window": False,
        },
        "vision_config": {
            **vision_values("qwen2_5_vl", vision, "silu"),
            "in_chans": vision.in_channels,
            "window_size": vision.window,
            "fullatt_block_indexes": list(vision.full_attention_layers),
            "tokens_per_second": TOKENS_PER_SECOND,
        },
    }
