"""Tokenizers as Hugging Face folders: reading and writing them, and training a small one on the texts of a world."""

import os
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from metacanvas_jax import files
from metacanvas_jax.errors import Unreachable, UserError, first_line
from metacanvas_jax.mllm.byte_level import assemble, wrapped
from metacanvas_jax.mllm.prompt import END, IMAGE, PADDING, START, VIDEO, VISION_END, VISION_START
from metacanvas_jax.weights.hf_export import new_folder
from metacanvas_jax.weights.repositories import how_to_fetch

SPECIAL = (PADDING, START, END, VISION_START, VISION_END, "<|vision_pad|>", IMAGE, VIDEO)
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TEMPLATES = ("added_tokens.json", "chat_template.jinja", "chat_template.json")
"""What else of a folder transformers reads for a tokenizer of this kind."""
_CHAT = "system user assistant\nYou are a helpful assistant. , . ? 0 1 2 3 4 5 6 7 8 9"


def train_tokenizer(texts: Iterable[str], max_vocabulary: int = 8192) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the texts is one token, with and without a space before it.

    Merging goes on until no word has two tokens; a UserError says so when ``max_vocabulary`` is too small for that.
    """
    words = sorted({word for text in (*texts, _CHAT) for word in text.split()} | {"\n"})
    forms = [form for word in words for form in (word, f" {word}")]
    tokenizer = _trained(forms, max_vocabulary)
    pieces = [piece for form in forms for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(form)]
    if split := [piece for piece in pieces if piece not in tokenizer.get_vocab()]:
        raise UserError(
            f"a vocabulary of {max_vocabulary} is too small: {len(split)} words, {split[0]!r} among them, split"
        )
    return _with_special(tokenizer)


def fitted_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``vocabulary`` tokens, special ones included, whose merges are the most frequent.

    It reads any text; rare words have several tokens. Raises UserError where there is no room for the 256 bytes.
    """
    least = len(pre_tokenizers.ByteLevel.alphabet()) + len(SPECIAL)
    if vocabulary < least:
        raise UserError(f"a vocabulary of {vocabulary} is too small: bytes and special tokens are {least}")
    return _with_special(_trained([*texts, _CHAT], vocabulary - len(SPECIAL)))


def _trained(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer = assemble(models.BPE())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _with_special(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return wrapped(tokenizer)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | os.PathLike) -> None:
    """Write a new tokenizer folder that `load_tokenizer` and transformers' AutoTokenizer read."""
    try:
        with new_folder(folder) as draft:
            tokenizer.save_pretrained(str(draft))
    except UserError:
        raise
    except Exception as error:  # the tokenizers package raises bare Exceptions
        raise UserError(f"cannot write {folder}: {first_line(error)}") from error


def load_tokenizer(folder: str | os.PathLike) -> PreTrainedTokenizerFast:
    """Read a tokenizer folder. Raises UserError when there is none."""
    folder = files.folder(folder)
    if not (folder / "tokenizer.json").is_file():
        how = how_to_fetch(folder) or "expected a tokenizer folder in Hugging Face format"
        raise UserError(f"{folder}: no tokenizer.json in it; {how}")
    for name in FILES:
        if (folder / name).exists():
            files.read_json(folder / name)
    try:
        with files.local_copy(folder, *FILES, *TEMPLATES) as near:
            return PreTrainedTokenizerFast.from_pretrained(str(near), local_files_only=True)
    except Unreachable:
        raise
    except Exception as error:  # the tokenizers package raises bare Exceptions
        raise UserError(f"{folder}: its tokenizer files are damaged ({first_line(error)})") from error
