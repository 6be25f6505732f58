"""Qwen3-VL: its config, its module and the published sizes."""

import dataclasses

from metacanvas_jax.mllm.qwen3_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen3_vl.vision import Vision, VisionConfig
from metacanvas_jax.mllm.vision_language import VisionLanguage, VisionLanguageConfig
from metacanvas_jax.nn.layers import Dtype
from metacanvas_jax.nn.lora import LoraConfig


@dataclasses.dataclass(frozen=True)
class MllmConfig(VisionLanguageConfig):
    """A language model and its vision tower; without ``vision`` it reads text only.

    Raises ValueError if the tower's tokens do not have the width of the language model, or are taken at more depths
    than the language model has layers.
    """

    language: LanguageConfig
    vision: VisionConfig | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.vision is not None and len(self.vision.deepstack_layers) > self.language.layers:
            raise ValueError(
                f"vision deepstack_layers {self.vision.deepstack_layers} are more than the language model's "
                f"{self.language.layers} layers"
            )


class Qwen3VL(VisionLanguage):
    """The multimodal language model. Its parameters are ``language/...`` and ``vision/...``."""

    tower, frames_apart = Vision, True

    config: MllmConfig


_LANGUAGE_4B = LanguageConfig(
    vocab=151936,
    width=2560,
    layers=36,
    heads=32,
    kv_heads=8,
    mlp=9728,
    rope_sections=(24, 20, 20),
    tied=True,
    head_width=128,
)
_VISION_4B = VisionConfig(depth=24, width=1024, heads=16, mlp=4096, out_width=2560, deepstack_layers=(5, 11, 17))


def qwen3_vl_2b(*, lora: LoraConfig | None = None, remat: str = "none", dtype: Dtype = "float32") -> MllmConfig:
    """Qwen3-VL-2B-Instruct."""
    return _sized({"width": 2048, "layers": 28, "heads": 16, "mlp": 6144}, {"out_width": 2048}, lora, remat, dtype)


def qwen3_vl_4b(*, lora: LoraConfig | None = None, remat: str = "none", dtype: Dtype = "float32") -> MllmConfig:
    """Qwen3-VL-4B-Instruct."""
    return _sized({}, {}, lora, remat, dtype)


def qwen3_vl_8b(*, lora: LoraConfig | None = None, remat: str = "none", dtype: Dtype = "float32") -> MllmConfig:
    """Qwen3-VL-8B-Instruct: a larger vision tower, and a head of its own."""
    vision = {"depth": 27, "width": 1152, "mlp": 4304, "out_width": 4096, "deepstack_layers": (8, 16, 24)}
    return _sized({"width": 4096, "mlp": 12288, "tied": False}, vision, lora, remat, dtype)


def _sized(language: dict, vision: dict, lora: LoraConfig | None, remat: str, dtype: Dtype) -> MllmConfig:
    """The sizes of 4B with changes."""
    return MllmConfig(
        dataclasses.replace(_LANGUAGE_4B, **language, lora=lora, remat=remat, dtype=dtype),
        dataclasses.replace(_VISION_4B, **vision, remat=remat, dtype=dtype),
    )
