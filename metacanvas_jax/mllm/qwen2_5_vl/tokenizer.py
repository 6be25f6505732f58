"""Qwen's own tokenizer from its tiktoken file, for those who have no folder of Hugging Face."""

import base64
import binascii
import itertools
import os

from tokenizers import AddedToken, models
from transformers import PreTrainedTokenizerFast

from metacanvas_jax import files
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.byte_level import assemble, wrapped

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen2.5-VL's special tokens in the order of their ids (151643 and up in its own vocabulary)."""

_PLAIN = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)


def qwen_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerFast:
    """Qwen's tokenizer from its ``qwen.tiktoken`` file (the `dashscope` package has it in dashscope/resources/).

    Gives the vocabulary, merges and special tokens of Qwen2.5-VL. Raises UserError when the file is missing or is none.
    """
    data = files.read_bytes(path, hint="expected a tiktoken file; `pip download dashscope` has one")
    try:
        lines = (line.split() for line in data.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise UserError(f"{path}: expected lines of a base64 token and its rank ({error})") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path}: expected ranks 0 to {len(ranks) - 1} that include every byte")
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1 and len(parts := _parts(ranks, token, rank)) == 2:
            merges.append((spell(parts[0]), spell(parts[1])))
    tokenizer = assemble(models.BPE(vocab={spell(token): rank for token, rank in ranks.items()}, merges=merges))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _PLAIN])
    return wrapped(tokenizer)


def _parts(ranks: dict[bytes, int], token: bytes, limit: int) -> list[bytes]:
    """The two tokens that merge into this one: BPE with the merges ranked below it."""
    parts = [bytes([byte]) for byte in token]
    while True:
        pairs = [(ranks.get(a + b, limit), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        rank, i = min(pairs, default=(limit, 0))
        if rank >= limit:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _byte_letters() -> list[str]:
    """The printable letter that stands for every byte in a byte-level vocabulary (GPT-2, encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]
