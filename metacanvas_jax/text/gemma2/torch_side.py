"""SANA's own text encoder, Gemma-2: an instruction in front of the prompt, the first and the last states kept.

Source: diffusers ``pipelines/sana/pipeline_sana.py``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma2Model


class Side:
    """A ``Gemma2Model`` and its tokenizer."""

    model, unnamed = Gemma2Model, True

    def __init__(self, net: Any, tokenizer: Any, config: Mapping[str, Any]):
        self.net, self.tokenizer, self.config = net, tokenizer, config

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], *, instruct: bool = True) -> tuple[Tensor, Tensor]:
        """States ``[b l d]`` and mask; the empty prompt of guidance has no instruction."""
        length = self.config["length"]
        instruction = self.config["instruction"] if instruct else ""
        if not self.config["reads_prompt"]:
            prompts = [""] * len(prompts)
        total = len(self.tokenizer(instruction).input_ids) + length - 2 if instruction else length
        texts = [instruction + prompt.lower().strip() for prompt in prompts]
        self.tokenizer.padding_side = "right"
        batch = self.tokenizer(texts, padding="max_length", max_length=total, truncation=True, return_tensors="pt")
        mask = batch.attention_mask.to(self.net.device)
        states = self.net(batch.input_ids.to(self.net.device), attention_mask=mask).last_hidden_state
        keep = [0, *range(total - length + 1, total)]
        return states[:, keep], mask[:, keep].bool()
