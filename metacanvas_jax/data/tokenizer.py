"""Tokenizers in Qwen's form: a small byte-level BPE trained on a world's texts, or Qwen's own from its tiktoken file.

Both have Qwen's pre-tokenizer, NFC normaliser and special tokens, and are kept as a Hugging Face tokenizer folder.
"""

import base64
import binascii
import itertools
import json
import pathlib
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from metacanvas_jax.errors import UserError

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

_SMALL_SPECIAL = tuple(
    token for token in SPECIAL if token.startswith(("<|endof", "<|im_", "<|vision", "<|image", "<|video"))
)
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
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT = "system user assistant\nYou are a helpful assistant. , . ? 0 1 2 3 4 5 6 7 8 9"


def train_tokenizer(texts: Iterable[str], max_vocabulary: int = 8192) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the texts is one token, with and without a space before it.

    Merging goes on until no word has two tokens; a UserError says so when ``max_vocabulary`` is too small for that.
    """
    words = sorted({word for text in (*texts, _CHAT) for word in text.split()} | {"\n"})
    tokenizer = _assemble(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=max_vocabulary,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    forms = [form for word in words for form in (word, f" {word}")]
    tokenizer.train_from_iterator(forms, trainer)
    pieces = [piece for form in forms for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(form)]
    if split := [piece for piece in pieces if piece not in tokenizer.get_vocab()]:
        raise UserError(
            f"a vocabulary of {max_vocabulary} is too small: {len(split)} words, {split[0]!r} among them, split"
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SMALL_SPECIAL])
    return _wrap(tokenizer)


def qwen_tokenizer(path: str | pathlib.Path) -> PreTrainedTokenizerFast:
    """Qwen's tokenizer from its ``qwen.tiktoken`` file (the `dashscope` package has it in dashscope/resources/).

    Gives the vocabulary, merges and special tokens of Qwen2.5-VL. Raises UserError when the file is missing or is none.
    """
    path = pathlib.Path(path)
    try:
        lines = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except OSError as error:
        raise UserError(f"{path}: no tiktoken file ({error.strerror}); `pip download dashscope` has one") from error
    except (ValueError, binascii.Error) as error:
        raise UserError(f"{path}: wanted lines of a base64 token and its rank ({error})") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path}: wanted ranks 0 to {len(ranks) - 1} that include every byte")
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1 and len(parts := _parts(ranks, token, rank)) == 2:
            merges.append((spell(parts[0]), spell(parts[1])))
    tokenizer = _assemble(models.BPE(vocab={spell(token): rank for token, rank in ranks.items()}, merges=merges))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _PLAIN])
    return _wrap(tokenizer)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | pathlib.Path) -> None:
    """Write a tokenizer folder that `load_tokenizer` and transformers' AutoTokenizer read."""
    tokenizer.save_pretrained(str(folder))


def load_tokenizer(folder: str | pathlib.Path) -> PreTrainedTokenizerFast:
    """Read a tokenizer folder. Raises UserError when there is none."""
    folder = pathlib.Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer.json in it; expected a tokenizer folder in Hugging Face format")
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except json.JSONDecodeError as error:
        raise UserError(f"{folder}: its tokenizer files are not valid JSON ({error})") from error


def _assemble(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


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
