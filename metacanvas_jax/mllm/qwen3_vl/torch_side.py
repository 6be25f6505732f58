"""Qwen3-VL of transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from metacanvas_jax.mllm import torch_side


class Side(torch_side.Side):
    """A ``Qwen3VLForConditionalGeneration``, and the adapters that act on what is written."""

    model, frames_apart = Qwen3VLForConditionalGeneration, True

    def added(self, seen: Sequence[Any], places: Sequence[Any], embeddings: Tensor) -> dict[str, Any]:
        """What is added after the first layers: features in the order of their tokens in the batch, and where."""
        if not seen:
            return {}
        visual = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        features = [torch.zeros_like(embeddings) for _ in seen[0].deepstack_features]
        for out, where in zip(seen, places, strict=True):
            visual[where] = True
            for feature, own in zip(features, out.deepstack_features, strict=True):
                feature[where] = own.to(embeddings.dtype)
        return {"visual_pos_masks": visual, "deepstack_visual_embeds": [feature[visual] for feature in features]}
