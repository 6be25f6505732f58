"""What the registry knows of Qwen3-VL."""

from metacanvas_jax.mllm.published_folder import record
from metacanvas_jax.mllm.qwen3_vl import published
from metacanvas_jax.mllm.qwen3_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen3_vl.network import MllmConfig, Qwen3VL
from metacanvas_jax.mllm.qwen3_vl.table import adapted_table, table
from metacanvas_jax.mllm.qwen3_vl.vision import VisionConfig

NAMES = {2048: "2B", 2560: "4B", 4096: "8B"}  # of the published sizes, by the width of the language model

TINY_LANGUAGE = LanguageConfig(
    vocab=1024, width=64, layers=2, heads=2, kv_heads=1, mlp=128, rope_sections=(6, 5, 5), rope_theta=1e4
)
TINY_VISION = VisionConfig(
    depth=2, width=32, heads=2, mlp=64, out_width=64, deepstack_layers=(0, 1), position_side=6, patch=6
)

MEDIA = {
    "patch": 16,
    "image_pixels": (65536, 16777216),
    "video_pixels": (4096, 25165824),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "whole_video": True,
    "timestamps": True,
}
"""As the published ``preprocessor_config.json`` and ``video_preprocessor_config.json`` say."""


def _licence(config: MllmConfig) -> tuple[str, str]:
    return f"Qwen3-VL-{NAMES.get(config.language.width, '8B')}-Instruct", "Apache-2.0"


RECORD = record(
    name="qwen3_vl",
    config=MllmConfig,
    module=Qwen3VL,
    tiny={"language": TINY_LANGUAGE, "vision": TINY_VISION},
    published="qwen3_vl",
    read=published.read,
    write=published.write,
    table=table,
    adapted=lambda config: adapted_table(config.language),
    licence=_licence,
    settings={"system": None},
    media=MEDIA,
)
