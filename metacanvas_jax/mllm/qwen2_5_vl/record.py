"""What the registry knows of Qwen2.5-VL."""

from metacanvas_jax.mllm.qwen2_5_vl import published
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig, Qwen25VL, example
from metacanvas_jax.mllm.qwen2_5_vl.table import language_table, table
from metacanvas_jax.weights.record import Network

WIDTH_3B = 2048  # by which the two published sizes are told apart: they have different licences


def _sizes(config: MllmConfig, sizes: dict) -> dict:
    sizes = sizes | {"language.head_width": config.language.head_channels}
    if config.vision is None:  # a published vision tower may be left out
        return {name: size for name, size in sizes.items() if not name.startswith("vision")}
    return sizes


def _licence(config: MllmConfig) -> tuple[str, str]:
    if config.language.width == WIDTH_3B:
        return "Qwen2.5-VL-3B-Instruct", "Qwen Research License (non-commercial)"
    return "Qwen2.5-VL-7B-Instruct", "Apache-2.0"


RECORD = Network(
    family="mllm",
    name="qwen2_5_vl",
    config=MllmConfig,
    module=Qwen25VL,
    arguments=example,
    published="qwen2_5_vl",
    read=published.read,
    write=published.write,
    table=table,
    adapted=lambda config: language_table(config.language),
    ignore=lambda config: () if config.vision is not None else ("visual.*", "model.visual.*"),
    subfolder="text_encoder",
    free=("dtype", "remat", "unroll", "lora"),
    sizes=_sizes,
    licence=_licence,
)
