"""Qwen2.5-VL: its config, its module and the published sizes."""

import dataclasses

from metacanvas_jax.mllm.qwen2_5_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen2_5_vl.vision import Vision, VisionConfig
from metacanvas_jax.mllm.vision_language import VisionLanguage, VisionLanguageConfig
from metacanvas_jax.nn.layers import Dtype
from metacanvas_jax.nn.lora import LoraConfig


@dataclasses.dataclass(frozen=True)
class MllmConfig(VisionLanguageConfig):
    """A language model and its vision tower; without ``vision`` it reads text only."""

    language: LanguageConfig
    vision: VisionConfig | None = None


class Qwen25VL(VisionLanguage):
    """The multimodal language model. Its parameters are ``language/...`` and ``vision/...``."""

    tower = Vision

    config: MllmConfig


_LANGUAGE_3B = LanguageConfig(
    vocab=151936,
    width=2048,
    layers=36,
    heads=16,
    kv_heads=2,
    mlp=11008,
    rope_sections=(16, 24, 24),
    tied=True,
)
_VISION_3B = VisionConfig(
    depth=32, width=1280, heads=16, mlp=3420, out_width=2048, full_attention_layers=(7, 15, 23, 31)
)


def qwen2_5_vl_3b(*, lora: LoraConfig | None = None, remat: str = "none", dtype: Dtype = "float32") -> MllmConfig:
    """Qwen2.5-VL-3B-Instruct."""
    language = dataclasses.replace(_LANGUAGE_3B, lora=lora, remat=remat, dtype=dtype)
    return MllmConfig(language, dataclasses.replace(_VISION_3B, remat=remat, dtype=dtype))


def qwen2_5_vl_7b(*, lora: LoraConfig | None = None, remat: str = "none", dtype: Dtype = "float32") -> MllmConfig:
    """Qwen2.5-VL-7B-Instruct: wider, shallower, and with a head of its own."""
    sizes = {"vocab": 152064, "width": 3584, "layers": 28, "heads": 28, "kv_heads": 4, "mlp": 18944, "tied": False}
    language = dataclasses.replace(_LANGUAGE_3B, **sizes, lora=lora, remat=remat, dtype=dtype)
    return MllmConfig(language, dataclasses.replace(_VISION_3B, out_width=3584, remat=remat, dtype=dtype))
