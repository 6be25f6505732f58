"""What the registry knows of Qwen2.5-VL."""

from metacanvas_jax.mllm.published_folder import record
from metacanvas_jax.mllm.qwen2_5_vl import published
from metacanvas_jax.mllm.qwen2_5_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig, Qwen25VL
from metacanvas_jax.mllm.qwen2_5_vl.table import decoder_table, table
from metacanvas_jax.mllm.qwen2_5_vl.vision import VisionConfig

WIDTH_3B = 2048  # by which the two published sizes are told apart: they have different licences

TINY_LANGUAGE = LanguageConfig(
    vocab=1024, width=64, layers=2, heads=2, kv_heads=1, mlp=128, rope_sections=(4, 6, 6), rope_theta=1e4
)
TINY_VISION = VisionConfig(
    depth=1, width=32, heads=2, mlp=64, out_width=64, full_attention_layers=(0,), patch=6, window=24
)


def _licence(config: MllmConfig) -> tuple[str, str]:
    if config.language.width == WIDTH_3B:
        return "Qwen2.5-VL-3B-Instruct", "Qwen Research License (non-commercial)"
    return "Qwen2.5-VL-7B-Instruct", "Apache-2.0"


RECORD = record(
    name="qwen2_5_vl",
    config=MllmConfig,
    module=Qwen25VL,
    tiny={"language": TINY_LANGUAGE, "vision": TINY_VISION},
    published="qwen2_5_vl",
    read=published.read,
    write=published.write,
    table=table,
    adapted=lambda config: decoder_table(config.language),
    licence=_licence,
)
