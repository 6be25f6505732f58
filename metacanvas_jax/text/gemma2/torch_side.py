"""Gemma-2 as the text encoder of a DiT: an instruction in front of the prompt, the first and the last states kept.

Source: ``encode_prompt`` of the diffusers pipeline that uses it.
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
    def __call__(self, prompts: Sequence[str], instruct: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """States ``[b l d]`` and mask of prompts; ``instruct`` says which of them follow the instruction."""
        length = self.config["length"]
        instruction = self.config["instruction"] if self.config["reads_prompt"] else ""
        total = len(self.encode(instruction)) + length - 2 if instruction else length
        tokens = torch.full((len(prompts), total), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, (prompt, instructed) in enumerate(zip(prompts, instruct, strict=True)):
            text = prompt.lower().strip() if self.config["reads_prompt"] else ""
            ids = self.encode(instruction + text if instructed else text)
            ids = ids[: total if instructed else length]
            tokens[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), True
        tokens, mask = tokens.to(self.net.device), mask.to(self.net.device)
        states = self.net(tokens, attention_mask=mask.long()).last_hidden_state
        keep = [0, *range(total - length + 1, total)]
        return states[:, keep], mask[:, keep]

    def encode(self, text: str) -> list[int]:
        """Tokens, of which the first begins the sequence: padding, where the tokenizer has no token for that."""
        ids = list(self.tokenizer.encode(text)) if text else []
        if self.tokenizer.bos_token_id is None:
            return [self.tokenizer.pad_token_id or 0, *ids]
        return ids or [self.tokenizer.bos_token_id]
