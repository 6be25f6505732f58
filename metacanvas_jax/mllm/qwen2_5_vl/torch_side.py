"""Qwen2.5-VL of transformers."""

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from metacanvas_jax.mllm import torch_side
from metacanvas_jax.mllm.torch_side import additive


class Side(torch_side.Side):
    """A ``Qwen2_5_VLForConditionalGeneration``, and the adapters that act on what is written."""

    model, unnamed = Qwen2_5_VLForConditionalGeneration, True

    def masked(self, mask: Tensor, dtype: torch.dtype) -> Any:
        """The model makes a mask for each kind of its layers, and all are of one kind."""
        return {"full_attention": additive(mask, dtype)}
