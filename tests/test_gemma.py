"""Gemma-2 against transformers, and SANA's prompt rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dit_torch_support import random, relative
from vae_support import FAST_COMPILE

from metacanvas_jax.text.gemma2.network import Gemma2, Gemma2Config
from metacanvas_jax.text.gemma2.table import table
from metacanvas_jax.text.prompts import INSTRUCTION, first_and_last, prompt_tokens
from metacanvas_jax.types import States, Text
from metacanvas_jax.weights.hf_import import load_params
from metacanvas_jax.weights.table import count, published_shapes

# Four layers: two of each kind. A window of 3 is shorter than the prompts; a small cap bends every score.
TINY = Gemma2Config(
    vocab=96, width=32, layers=4, heads=4, kv_heads=2, head_width=8, mlp=48, query_scalar=24.0, softcap=2.0, window=3
)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def build(c: Gemma2Config):
    from transformers import Gemma2Config as TorchConfig
    from transformers import Gemma2Model

    config = TorchConfig(
        vocab_size=c.vocab,
        hidden_size=c.width,
        intermediate_size=c.mlp,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_width,
        query_pre_attn_scalar=int(c.query_scalar),
        attn_logit_softcapping=c.softcap,
        sliding_window=c.window,
        attn_implementation="eager",
    )
    return Gemma2Model(config)


def abstract(config):
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 4), bool)
    init = jax.eval_shape(Gemma2(config).init, jax.random.key(0), Text(tokens, mask))
    return jax.tree.map(lambda x: x.value, init, is_leaf=lambda x: hasattr(x, "names"))["params"]


@pytest.mark.torch
def test_states_of_right_padded_prompts_equal_transformers(torch, tmp_path):
    from torch_support import randomize

    net = randomize(build(TINY))
    net.save_pretrained(tmp_path)
    params = load_params(tmp_path, table(TINY), abstract(TINY), progress=False)
    ids = np.random.default_rng(0).integers(3, 90, (2, 9))
    mask = np.arange(9)[None] < np.array([[9], [6]])
    with torch.no_grad():
        expected = net(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64)))
    apply = jax.jit(Gemma2(TINY).apply, compiler_options=FAST_COMPILE)
    actual = apply({"params": params}, Text(jnp.asarray(ids, jnp.int32), jnp.asarray(mask)))
    assert relative(actual.states[mask], expected.last_hidden_state.numpy()[mask]) <= 2e-5


@pytest.mark.torch
def test_full_size_names_and_shapes_are_those_of_gemma_2_2b(torch):
    config = Gemma2Config()
    with torch.device("meta"):
        published = {name: tuple(x.shape) for name, x in build(config).named_parameters()}
    params = abstract(config)
    assert published_shapes(table(config), params) == published
    assert count(params) == 2_614_341_888


def test_bfloat16_stays_close_and_keeps_its_dtype():
    import dataclasses

    shapes = abstract(TINY)
    params = jax.tree.map(lambda x: jnp.asarray(random(*x.shape, seed=x.size) * x.shape[-1] ** -0.5), shapes)
    ids, mask = jnp.arange(8, dtype=jnp.int32)[None] + 5, jnp.ones((1, 8), bool)
    run = {
        dtype: jax.jit(Gemma2(dataclasses.replace(TINY, dtype=dtype)).apply, compiler_options=FAST_COMPILE)(
            {"params": params}, Text(ids, mask)
        ).states
        for dtype in ("float32", "bfloat16")
    }
    assert run["bfloat16"].dtype == jnp.bfloat16
    assert 1e-5 < relative(np.asarray(run["bfloat16"], np.float32), run["float32"]) < 0.1


def characters(text):
    """A tokenizer of one token per character behind a beginning-of-sequence token."""
    return [2, *map(ord, text)]


def test_prompts_keep_the_first_token_and_the_last_299_behind_the_instruction():
    ids, mask = prompt_tokens(characters, [" A Cat ", "b" * 1000])
    assert ids.shape == mask.shape == (2, len(INSTRUCTION) + 1 + 298)
    assert ids.dtype == np.int32
    text = first_and_last(States(jnp.asarray(ids, jnp.float32)[..., None], jnp.asarray(mask)), 300)
    hidden, kept = text.states, text.mask
    assert hidden.shape == (2, 300, 1)
    # One state of the beginning, one of the end of the instruction, then the prompt.
    text = "".join(map(chr, np.asarray(hidden[0, 1:8, 0], int)))
    assert hidden[0, 0, 0] == 2
    assert text.rstrip("\0") == " a cat"
    assert np.asarray(kept[0]).sum() == 2 + len("a cat")
    assert np.asarray(kept[1]).all()


def test_unconditional_prompt_has_no_instruction():
    ids, mask = prompt_tokens(characters, [""], instruction="")
    assert ids.shape == (1, 300)
    assert mask.sum() == 1
    text = first_and_last(States(jnp.asarray(ids, jnp.float32)[..., None], jnp.asarray(mask)), 300)
    hidden, kept = text.states, text.mask
    assert np.array_equal(hidden[0, :, 0], ids[0])
    assert np.array_equal(kept, mask)


@pytest.mark.torch
def test_prompt_rules_equal_the_sana_pipeline(torch):
    """The pipeline's own tokenisation, with a stand-in for the tokenizer and an encoder that returns the ids."""
    from types import SimpleNamespace

    from diffusers import SanaPipeline

    class Tokenizer:
        padding_side = "left"

        def encode(self, text):
            return characters(text)

        def __call__(self, prompts, padding, max_length, truncation, add_special_tokens, return_tensors):
            rows = [characters(prompt)[:max_length] for prompt in prompts]
            ids = [row + [0] * (max_length - len(row)) for row in rows]
            mask = [[1] * len(row) + [0] * (max_length - len(row)) for row in rows]
            return SimpleNamespace(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))

    pipeline = SimpleNamespace(
        tokenizer=Tokenizer(),
        text_encoder=lambda ids, attention_mask: (ids[..., None].float(),),
        _text_preprocessing=lambda text, clean_caption: [x.lower().strip() for x in text],
    )
    prompts = ["A red ball", "x" * 400]
    states, seen = SanaPipeline._get_gemma_prompt_embeds(
        pipeline,
        prompts,
        "cpu",
        torch.float32,
        max_sequence_length=300,
        complex_human_instruction=INSTRUCTION.split("\n"),
    )
    ids, mask = prompt_tokens(characters, prompts)
    assert np.array_equal(ids, states[..., 0].numpy())
    assert np.array_equal(mask, seen.numpy())
