"""Contexts kept on disk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_support import TEXT_ONLY, random_media, random_params, tokenizer

from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.context_cache import ContextCache, context_key
from metacanvas_jax.mllm.prompt import PromptConfig, Prompter
from metacanvas_jax.mllm.qwen import Qwen25VL


@pytest.fixture(scope="module")
def prompter():
    return Prompter(tokenizer(), PromptConfig(buckets=(48,), system=None))


@pytest.fixture(scope="module")
def prompts(prompter):
    return prompter.texts(["A red cat", "a blue house beside a cat", "What is this picture?"])


@pytest.fixture(scope="module")
def encode():
    params = random_params(TEXT_ONLY)
    return jax.jit(lambda inputs: Qwen25VL(TEXT_ONLY).apply({"params": params}, inputs, method="encode"))


def assert_same(got, expected):
    np.testing.assert_array_equal(got.mask, expected.mask)
    np.testing.assert_array_equal(got.next_position, expected.next_position)
    mask = expected.mask
    np.testing.assert_array_equal(got.hidden[mask], np.asarray(expected.hidden)[mask])
    if expected.cache is not None:
        np.testing.assert_array_equal(got.cache.keys[:, mask], np.asarray(expected.cache.keys)[:, mask])
        np.testing.assert_array_equal(got.cache.values[:, mask], np.asarray(expected.cache.values)[:, mask])


@pytest.mark.parametrize("pad_left", [False, True])
def test_qwen_context_from_the_cache_is_the_computed_one(tmp_path, prompter, prompts, encode, pad_left):
    cache = ContextCache(tmp_path, "weights")
    calls = []

    def counted(inputs):
        calls.append(1)
        return encode(inputs)

    assert cache.fill(prompts, prompter, counted, batch=2) == 3 and len(calls) == 2
    assert cache.fill(prompts, prompter, counted, batch=2) == 0 and len(calls) == 2
    side = Prompter(tokenizer(), dataclasses.replace(prompter.config, pad_left=pad_left))
    got = cache.load(prompts, 48, pad_left=pad_left)
    assert not got.hidden[~got.mask].any() and not got.cache.keys[:, ~got.mask].any()
    if pad_left:
        assert got.mask[:, -1].all() and not got.mask[:, 0].any()
        np.testing.assert_array_equal(got.mask, side.batch(prompts).mask)
    else:
        assert_same(got, jax.device_get(encode(prompter.batch(prompts))))


def test_qwen_context_cache_without_keys_and_values_keeps_hidden_states_only(tmp_path, prompter, prompts, encode):
    cache = ContextCache(tmp_path, "weights", keys_values=False)
    context = encode(prompter.batch(prompts))
    cache.store(prompts, context)
    assert_same(cache.load(prompts, 48), jax.device_get(context.replace(cache=None)))
    assert ContextCache(tmp_path, "weights").missing(prompts) == list(prompts)
    with pytest.raises(ValueError, match="no keys and values to store"):
        ContextCache(tmp_path, "weights").store(prompts, context.replace(cache=None))


def test_qwen_context_cache_keeps_bfloat16(tmp_path, prompter, prompts, encode):
    context = encode(prompter.batch(prompts))
    context = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, context)
    cache = ContextCache(tmp_path, "weights")
    cache.store(prompts, context)
    got = cache.load(prompts, 48)
    assert got.hidden.dtype == got.cache.keys.dtype == jnp.bfloat16
    assert_same(got, jax.device_get(context))


def test_qwen_context_key_depends_on_prompt_media_and_weights(prompter):
    image = random_media((1, 4, 4))
    changed = dataclasses.replace(image, values=image.values + np.float32(1e-6))
    slow, fast = (random_media((2, 4, 4), seconds=seconds) for seconds in (1.0, 4.0))
    parts = [["a cat", image], ["a Cat", image], [image, "a cat"], ["a cat", changed], ["a", slow], ["a", fast]]
    keys = [context_key(prompter(part), "weights") for part in parts]
    assert len({*keys, context_key(prompter(parts[0]), "other weights")}) == 7
    assert keys[0] == context_key(prompter(parts[0]), "weights")


def test_qwen_context_that_is_missing_damaged_or_too_long_is_named(tmp_path, prompter, prompts, encode):
    cache = ContextCache(tmp_path, "weights")
    with pytest.raises(UserError, match="no stored context"):
        cache.load(prompts, 48)
    cache.store(prompts, encode(prompter.batch(prompts)))
    with pytest.raises(UserError, match="does not fit length 4"):
        cache.load(prompts, 4)
    path = cache.path(prompts[1])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{path.name}: damaged stored context"):
        cache.load(prompts, 48)
