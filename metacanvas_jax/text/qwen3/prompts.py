"""The prompt of Qwen3 as a text encoder: the user's turn, and an answer that begins after an empty thought.

Source: the diffusers pipeline that uses it, and the chat template of Qwen3 with ``enable_thinking=False``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

BEFORE, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def rows(tokenizer: Any, length: int) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """Makes the tokens ``[length]`` of a prompt and their mask: cut, or padded, on the right. All prompts alike."""
    pad = tokenizer.pad_token_id or 0

    def make(prompt: str) -> tuple[np.ndarray, np.ndarray]:
        found = tokenizer(f"{BEFORE}{prompt}{AFTER}", add_special_tokens=False)["input_ids"][:length]
        tokens, mask = np.full(length, pad, np.int32), np.zeros(length, bool)
        tokens[: len(found)], mask[: len(found)] = found, True
        return tokens, mask

    return make
