"""Qwen3 as a text encoder against transformers: states of several layers, prompts, names and shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dit_torch_support import relative
from vae_support import FAST_COMPILE

from metacanvas_jax import registry
from metacanvas_jax.text.qwen3.network import Qwen3, Qwen3Config, qwen3_4b
from metacanvas_jax.text.qwen3.prompts import AFTER, BEFORE, rows
from metacanvas_jax.text.qwen3.table import table
from metacanvas_jax.types import Text
from metacanvas_jax.weights.table import count, published_shapes

TINY = Qwen3Config(vocab=96, hidden=32, layers=5, heads=4, kv_heads=2, head_width=16, mlp=48, states=(1, 2, 4))


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def build(c: Qwen3Config):
    from transformers import Qwen3Config as TorchConfig
    from transformers import Qwen3ForCausalLM

    config = TorchConfig(
        vocab_size=c.vocab,
        hidden_size=c.hidden,
        intermediate_size=c.mlp,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_width,
        rope_parameters={"rope_type": "default", "rope_theta": c.theta},
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config)


@pytest.mark.torch
def test_states_of_right_padded_prompts_equal_transformers(torch, tmp_path):
    from torch_support import randomize

    net = randomize(build(TINY))
    net.save_pretrained(tmp_path)
    record = registry.of(TINY)
    params = record.load(tmp_path, TINY, registry.abstract_params(TINY), "text", progress=False)
    ids = np.random.default_rng(0).integers(3, 90, (2, 9))
    mask = np.arange(9)[None] < np.array([[9], [6]])
    given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
    with torch.no_grad():
        found = net(**given, output_hidden_states=True).hidden_states
        expected = torch.cat([found[layer] for layer in TINY.states], dim=2).numpy()
    actual = jax.jit(Qwen3(TINY).apply, compiler_options=FAST_COMPILE)(
        {"params": params}, Text(jnp.asarray(ids, jnp.int32), jnp.asarray(mask))
    )
    assert expected.shape == (2, 9, TINY.width) and np.asarray(actual.mask).all()
    assert relative(actual.states, expected) <= 2e-5  # those of padding too, which the DiT reads


@pytest.mark.torch
def test_full_size_names_and_shapes_are_those_of_qwen3_4b(torch):
    config = qwen3_4b()
    with torch.device("meta"):
        published = {name: tuple(x.shape) for name, x in build(config).named_parameters()}
    params = registry.abstract_params(config)
    kept = {name: shape for name, shape in published.items() if name != "lm_head.weight"}
    for layer in range(27, 36):  # which nothing reads
        kept = {name: shape for name, shape in kept.items() if not name.startswith(f"model.layers.{layer}.")}
    assert published_shapes(table(config), params) == kept
    assert count(params) == 388_956_160 + 27 * 100_930_816 + 2560


@pytest.mark.torch
def test_prompts_are_worded_cut_and_padded_as_by_the_pipeline(torch):
    from qwen_support import tokenizer

    words = tokenizer()
    words.pad_token = "<|endoftext|>"
    for prompt, length in (("A Red cat", 96), ("", 96), ("a house " * 40, 64)):
        tokens, mask = rows(words, length)(prompt)
        asked = words(
            f"{BEFORE}{prompt}{AFTER}", padding="max_length", truncation=True, max_length=length, return_tensors="np"
        )
        np.testing.assert_array_equal(tokens, asked["input_ids"][0])
        np.testing.assert_array_equal(mask, asked["attention_mask"][0].astype(bool))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"states": (2, 5)}, "layers from 1 to 4"), ({"states": ()}, "layers from 1"), ({"heads": 3}, "multiple of 2")],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.torch
def test_the_torch_side_reads_prompts_alike(torch, tmp_path):
    from qwen_support import tokenizer
    from torch_support import randomize

    from metacanvas_jax.text.qwen3.torch_side import Side

    config = dataclasses.replace(TINY, vocab=320)
    net, words = randomize(build(config)), tokenizer()
    net.save_pretrained(tmp_path)
    words.pad_token = "<|endoftext|>"
    record, prompts, length = registry.of(config), ["A Red cat", ""], 80
    params = record.load(tmp_path, config, registry.abstract_params(config), "text", progress=False)
    tokens, mask = (jnp.asarray(np.stack(x)) for x in zip(*map(rows(words, length), prompts), strict=True))
    ours = jax.jit(Qwen3(config).apply, compiler_options=FAST_COMPILE)({"params": params}, Text(tokens, mask))
    about = {"length": length, "reads_prompt": True, "encoder": dataclasses.asdict(config)}
    states, seen = Side(net.model, words, about)(prompts, [True, False])
    assert relative(ours.states, states.numpy()) <= 2e-5
    np.testing.assert_array_equal(np.asarray(ours.mask), seen.numpy())
