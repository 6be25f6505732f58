"""Contexts kept on disk."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_support import TEXT_ONLY, random_media, random_params, tokenizer
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from metacanvas_jax.data.batch import batch_of, mllm_inputs
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.context_cache import ContextCache, context_key, context_keys
from metacanvas_jax.mllm.prompt import PromptConfig, Prompter
from metacanvas_jax.mllm.qwen2_5_vl.network import Qwen25VL
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh
from metacanvas_jax.parallel.rules import RULES
from metacanvas_jax.train.contexts import samples_first, stored_contexts


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
    got = cache.load(cache.keys(prompts), 48, pad_left=pad_left)
    assert not got.hidden[~got.mask].any() and not got.cache.keys[:, ~got.mask].any()
    if pad_left:
        assert got.mask[:, -1].all() and not got.mask[:, 0].any()
        np.testing.assert_array_equal(got.mask, side.batch(prompts).mask)
    else:
        assert_same(got, jax.device_get(encode(prompter.batch(prompts))))


def test_qwen_context_cache_without_keys_and_values_keeps_hidden_states_only(tmp_path, prompter, prompts, encode):
    cache = ContextCache(tmp_path, "weights", keys_values=False)
    context = encode(prompter.batch(prompts))
    keys = cache.keys(prompts)
    cache.store(keys, context)
    assert_same(cache.load(keys, 48), jax.device_get(context.replace(cache=None)))
    assert not any(ContextCache(tmp_path, "weights").path(key).exists() for key in keys)
    with pytest.raises(ValueError, match="no keys and values to store"):
        ContextCache(tmp_path, "weights").store(keys, context.replace(cache=None))


def test_qwen_context_cache_keeps_bfloat16(tmp_path, prompter, prompts, encode):
    context = encode(prompter.batch(prompts))
    context = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, context)
    cache = ContextCache(tmp_path, "weights")
    cache.store(cache.keys(prompts), context)
    got = cache.load(cache.keys(prompts), 48)
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


@pytest.mark.parametrize("pad_left", [False, True])
def test_qwen_context_keys_of_a_batch_are_those_of_its_prompts(pad_left):
    side = Prompter(tokenizer(), PromptConfig(buckets=(64,), system=None, pad_left=pad_left))
    image, video, other = random_media((1, 4, 4)), random_media((2, 4, 4), seconds=1.0), random_media((1, 4, 4), seed=1)
    prompts = [
        side(parts) for parts in (["a", video, "cat", image], ["a cat"], [image, other, "a cat"], [other, image])
    ]
    assert context_keys(side.batch(prompts), "weights") == [context_key(prompt, "weights") for prompt in prompts]


def test_qwen_training_reads_every_prompt_once(tmp_path, prompter, prompts):
    params, mesh = random_params(TEXT_ONLY), make_mesh(MeshConfig(data=2), jax.devices()[:2])

    def read(params, inputs):
        return Qwen25VL(TEXT_ONLY).apply({"params": params}, inputs, method="encode")

    def batch(some):
        return batch_of(prompter.batch(some)) | {"pixels": np.zeros((len(some), 1))}

    def changed(params):
        return jax.tree.map(lambda x: x + 1, params)

    expected = jax.device_get(jax.jit(read)(params, prompter.batch(prompts[:2])))
    enrich = stored_contexts(ContextCache(tmp_path, "weights"), mllm_inputs, read)
    for weights, some in ((params, [0, 1]), (changed(params), [1, 0])):  # the second time no weight is looked at
        got = enrich(weights, batch([prompts[i] for i in some]), mesh, RULES)
        assert got.keys() == {"pixels", "context"}
        assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(got))
        np.testing.assert_allclose(
            got["context"].hidden, expected.hidden[some] * expected.mask[some, :, None], atol=1e-5
        )
        restored = samples_first(got["context"])
        same = jax.tree.map(lambda a, b: a.shape == b.shape, restored, expected)
        assert all(jax.tree.leaves(same))
    # One prompt of the batch is new: it alone is added.
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    enrich(changed(params), batch([prompts[0], prompts[2]]), mesh, RULES)
    after = {file.name: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert len(after) == 3 and before.items() <= after.items()


@pytest.mark.parametrize("on_disk", [False, True])
def test_qwen_contexts_are_kept_in_memory_and_the_oldest_are_dropped(tmp_path, prompter, prompts, encode, on_disk):
    def cache(memory):
        return ContextCache(tmp_path if on_disk else None, "weights", memory=memory)

    def again(kept, some):
        calls = []

        def counted(inputs):
            calls.append(1)
            return encode(inputs)

        return kept.read(prompter.batch([prompts[i] for i in some], length=48), counted), len(calls)

    large = cache(2**20)
    first, calls = again(large, (0, 1))
    assert calls == 1
    assert_same(first, jax.device_get(encode(prompter.batch(prompts[:2], length=48))))
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()  # what is in memory is not read again
    second, calls = again(large, (0, 1))
    assert calls == 0
    jax.tree.map(np.testing.assert_array_equal, second, first)
    small = cache(large.held // 2 + 1)
    again(small, (0, 1))
    again(small, (2,))
    assert 0 < small.held <= large.held // 2 + 1
    assert again(small, (2,))[1] == 0
    assert again(small, (0,))[1] == (0 if on_disk else 1)


def test_qwen_context_that_is_missing_damaged_or_too_long_is_named(tmp_path, prompter, prompts, encode):
    cache = ContextCache(tmp_path, "weights")
    keys = cache.keys(prompts)
    with pytest.raises(UserError, match="no stored context"):
        cache.load(keys, 48)
    cache.store(keys, encode(prompter.batch(prompts)))
    with pytest.raises(UserError, match="does not fit length 4"):
        cache.load(keys, 4)
    path = cache.path(keys[1])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{path.name}: damaged stored context"):
        cache.load(keys, 48)


def zeroed(path, other):
    tensors, about = load_file(path), {}
    with safe_open(path, "np") as file:
        about = file.metadata()
    save_file({name: np.zeros_like(x) for name, x in tensors.items()}, path, about)


def without_hash(path, other):
    save_file(load_file(path), path)


DAMAGES = {
    "zeroed": zeroed,
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[:-10]),
    "of another prompt": lambda path, other: shutil.copy(other, path),
    "a bit": lambda path, other: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "from before there were hashes": without_hash,
    "empty": lambda path, other: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_qwen_context_that_is_damaged_is_computed_again(tmp_path, prompter, prompts, encode, damage, caplog):
    cache = ContextCache(tmp_path, "weights")
    inputs = prompter.batch(prompts)
    expected = cache.read(inputs, encode)
    first, second = (cache.path(key) for key in cache.keys(prompts)[:2])
    DAMAGES[damage](first, second)
    if damage != "from before there were hashes":
        with pytest.raises(UserError, match=f"{first.name}: damaged stored context"):
            cache.load(cache.keys(prompts), 48)
    jax.tree.map(np.testing.assert_array_equal, cache.read(inputs, encode), expected)
    assert first.name in caplog.text
    calls = []
    cache.read(inputs, lambda inputs: calls.append(1))
    assert not calls
    DAMAGES[damage](first, second)
    assert cache.fill(prompts, prompter, encode, batch=3) == 1
