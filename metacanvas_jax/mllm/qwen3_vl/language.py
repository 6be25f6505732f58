"""The language model of Qwen3-VL: the shared decoder with normalised queries and keys, and interleaved multimodal RoPE.

Reference: transformers ``models/qwen3_vl/modeling_qwen3_vl.py``.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from metacanvas_jax.mllm.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True)
class LanguageConfig(DecoderConfig):
    """Sizes of the decoder, see ``DecoderConfig``."""

    qk_norm = True

    rope_theta: float = 5e6
    qkv_bias: bool = False

    def rope_axes(self) -> Int[np.ndarray, " f"]:
        """Which axis each frequency turns with: time, height and width in turn, then time alone.

        Height and width keep every third frequency until each has as many as its section says.
        """
        axes = np.zeros(sum(self.rope_sections), np.int64)
        for axis in (1, 2):
            axes[axis : 3 * self.rope_sections[axis] : 3] = axis
        return axes
