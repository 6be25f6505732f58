"""Tokenizers: trained on the words of a world, published as tiktoken files, broken."""

import base64

import numpy as np
import pytest

from metacanvas_jax.data import tokenizer
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.qwen2_5_vl import tokenizer as published
from metacanvas_jax.worlds import questions, scenes
from metacanvas_jax.worlds.scenes import SceneWorld

WORLD = SceneWorld()


@pytest.fixture(scope="module")
def small():
    return tokenizer.train_tokenizer(questions.sample_texts(WORLD, 60))


@pytest.mark.miniature
def test_every_word_of_the_world_is_one_token(small):
    rng = np.random.default_rng(99)
    for index in range(200):
        scene = scenes.training_scene(WORLD, 99, index)
        exchanges = questions.picture_exchanges(rng, WORLD, scene)
        exchanges += questions.text_exchanges(rng, WORLD, scene.request, scene.prompt)
        for text in [scene.prompt, *(text for exchange in exchanges for text in exchange)]:
            pieces = text.replace(",", " ,").split()
            digits = sum(piece.isdigit() for piece in pieces[1:])  # as in Qwen, a digit stands apart from its space
            assert len(small(text).input_ids) == len(pieces) + digits, text
            assert small.decode(small(text).input_ids) == text


@pytest.mark.miniature
def test_small_tokenizer_is_small_and_keeps_any_text(small, tmp_path):
    assert len(small) < 600
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    for token in special:
        assert len(small(token).input_ids) == 1
    assert small.pad_token == "<|endoftext|>" and small.eos_token == "<|im_end|>"
    text = "<|im_start|>user\na red cat<|im_end|>\nEin Käse für 12 ①🙂"
    tokenizer.save_tokenizer(small, tmp_path)
    again = tokenizer.load_tokenizer(tmp_path)
    assert again(text).input_ids == small(text).input_ids
    assert again.decode(again(text).input_ids) == text


@pytest.mark.miniature
def test_vocabulary_too_small_for_whole_words_is_refused():
    with pytest.raises(UserError, match="too small"):
        tokenizer.train_tokenizer(questions.sample_texts(WORLD, 5), max_vocabulary=300)


def _tiktoken_lines(small):
    """A trained byte-level BPE written as a tiktoken file: its ids are ranks in order of merging."""
    letters = {letter: byte for byte, letter in enumerate(published._byte_letters())}
    tokens = {bytes(letters[c] for c in word): i for word, i in small.get_vocab().items() if not word.startswith("<|")}
    order = sorted(tokens, key=lambda token: (len(token) > 1, tokens[token]))
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(order))


@pytest.mark.miniature
def test_tiktoken_file_gives_back_the_tokenizer(small, tmp_path):
    """The small tokenizer, through the form that Qwen publishes its own in."""
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(_tiktoken_lines(small))
    qwen = published.qwen_tokenizer(path)
    count = len(path.read_bytes().splitlines())
    assert qwen.convert_tokens_to_ids(list(published.SPECIAL)) == list(range(count, count + 14))
    assert qwen("Ka\u0308se").input_ids == qwen("K\u00e4se").input_ids
    for text in (*questions.sample_texts(WORLD, 5)[:200], "Ein Käse 12 🙂", "x<|im_start|>y"):
        assert qwen.convert_ids_to_tokens(qwen(text).input_ids) == small.convert_ids_to_tokens(small(text).input_ids)


def test_broken_tokenizer_files_are_named(tmp_path):
    path = tmp_path / "x.tiktoken"
    with pytest.raises(UserError, match="expected a tiktoken file"):
        published.qwen_tokenizer(path)
    path.write_text("!!!! 0\n")
    with pytest.raises(UserError, match="expected lines of a base64 token"):
        published.qwen_tokenizer(path)
    path.write_text("YQ== 0\n")
    with pytest.raises(UserError, match="every byte"):
        published.qwen_tokenizer(path)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        tokenizer.load_tokenizer(tmp_path)
