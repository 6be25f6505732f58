"""Qwen3 as the text encoder of a DiT in PyTorch: states of several layers of ``Qwen3Model``, side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Model

from metacanvas_jax.text.qwen3.prompts import AFTER, BEFORE


class Side:
    """A ``Qwen3Model`` and its tokenizer."""

    model = Qwen3Model

    def __init__(self, net: Any, tokenizer: Any, config: Mapping[str, Any]):
        self.net, self.tokenizer, self.config = net, tokenizer, config

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], instruct: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """States ``[b l d]`` and mask of prompts. All prompts are worded alike; states of padding are read too."""
        del instruct
        length = self.config["length"]
        tokens = torch.full((len(prompts), length), self.tokenizer.pad_token_id or 0)
        seen = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            words = f"{BEFORE}{prompt if self.config['reads_prompt'] else ''}{AFTER}"
            ids = self.tokenizer(words, add_special_tokens=False)["input_ids"][:length]
            tokens[row, : len(ids)], seen[row, : len(ids)] = torch.tensor(ids), True
        tokens, seen = tokens.to(self.net.device), seen.to(self.net.device)
        found = self.net(tokens, attention_mask=seen.long(), output_hidden_states=True).hidden_states
        states = torch.cat([found[layer] for layer in self.config["encoder"]["states"]], dim=2)
        return states, torch.ones_like(seen)
