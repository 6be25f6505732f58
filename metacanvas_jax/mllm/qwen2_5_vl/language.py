"""The language model of Qwen2.5-VL: the shared decoder with biases in q, k and v.

Reference: transformers ``models/qwen2_5_vl/modeling_qwen2_5_vl.py``. With ``qkv_bias=False`` it is a Llama decoder.
"""

import dataclasses

from metacanvas_jax.mllm.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True)
class LanguageConfig(DecoderConfig):
    """Sizes of the decoder, see ``DecoderConfig``."""
