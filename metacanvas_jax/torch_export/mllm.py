"""Qwen2.5-VL of transformers, read once and then written on (paper, section 3.2).

The language model is called with embeddings, explicit positions ``[3 b n]`` and an explicit mask: given embeddings
without positions, transformers would silently number the canvas like text.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from metacanvas_jax.torch_export.lora import Adapters
from metacanvas_jax.torch_export.prompt import Inputs


@dataclasses.dataclass
class Context:
    """What the MLLM made of a prompt, and its keys and values, against which the canvas is written."""

    hidden: Tensor  # [b l d], after the final norm
    mask: Tensor  # [b l], True on real tokens
    cache: DynamicCache
    next_position: Tensor  # [b]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask ``[b n m]``, True where attention may look, as transformers adds it to its scores."""
    blocked = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return blocked.masked_fill(~mask, torch.finfo(dtype).min)[:, None]


def canvas_positions(start: Tensor, shape: tuple[int, int, int], config: Mapping[str, Any]) -> Tensor:
    """Positions ``[3 b n]`` of a canvas in raster order: those of an image (one keyframe) or of a video."""
    k, y, x = shape
    count = k * y * x
    if not config["rope"]:
        offsets = torch.arange(count, device=start.device).expand(3, count)
    else:
        grid = {1: (1, 1, count), 2: (1, k * y, x), 3: (k, y, x)}[config["dims"]]
        axes = torch.meshgrid(*(torch.arange(side, device=start.device) for side in grid), indexing="ij")
        time, rows, columns = (axis.flatten() for axis in axes)
        offsets = torch.stack([(time.float() * config["spacing"]).floor().long(), rows, columns])
    return offsets[:, None] + start[None, :, None]


class Mllm:
    """A ``Qwen2_5_VLForConditionalGeneration``, and the adapters that act on what is written.

    ``gate`` says where the adapters act: "canvas" (as they were trained), "everywhere" or "nowhere".
    """

    def __init__(self, model: nn.Module, adapters: Adapters | None = None, gate: str = "canvas"):
        self.model, self.adapters, self.gate = model, adapters, gate
        self._language = model.model.language_model
        parameters = inspect.signature(type(self._language).forward).parameters
        self._cache = "cache" if "cache" in parameters else "past_key_values"  # renamed in transformers 5.24

    @torch.no_grad()
    def read(self, inputs: Inputs) -> Context:
        """Reads prompts with their media."""
        embeddings = self._language.embed_tokens(inputs.tokens)
        for patches, grid, places in inputs.media:
            features = self.model.model.visual(patches.to(embeddings.dtype), grid_thw=grid).pooler_output
            embeddings[places] = features.to(embeddings.dtype)
        length = inputs.tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=inputs.mask.device).tril()
        cache = DynamicCache()
        hidden = self._run(
            embeddings, inputs.positions, causal & inputs.mask[:, None], cache, self.gate == "everywhere"
        )
        last = inputs.positions.masked_fill(~inputs.mask, -1).amax((0, 2))
        return Context(hidden, inputs.mask, cache, last + 1)

    @torch.no_grad()
    def write(self, context: Context, tokens: Tensor, config: Mapping[str, Any]) -> Tensor:
        """Hidden states ``[b k y x d]`` of learnable tokens ``[k y x d]`` that follow a context."""
        batch, shape = len(context.mask), tokens.shape[:3]
        positions = canvas_positions(context.next_position, tuple(shape), config)
        tokens = tokens.flatten(0, 2).to(context.hidden.dtype).expand(batch, -1, -1)
        count = tokens.shape[1]
        seen = torch.ones(count, count, dtype=torch.bool, device=tokens.device)
        seen = seen if config["bidirectional"] else seen.tril()
        mask = torch.cat([context.mask[:, None].expand(-1, count, -1), seen.expand(batch, -1, -1)], dim=2)
        hidden = self._run(tokens, positions, mask, context.cache, self.gate != "nowhere")
        context.cache.crop(-count)  # the context stays as it was read
        return hidden.unflatten(1, shape)

    def _run(self, embeddings: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache, adapted: bool) -> Tensor:
        call = {
            "inputs_embeds": embeddings,
            "position_ids": positions,
            "attention_mask": {"full_attention": additive(mask, embeddings.dtype)},
            "use_cache": True,
            self._cache: cache,
        }
        if self.adapters is None:
            return self._language(**call).last_hidden_state
        with self.adapters.switched(adapted):
            return self._language(**call).last_hidden_state
