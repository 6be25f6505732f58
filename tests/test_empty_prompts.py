"""Prompts without words, beside others in a batch, against the text states of diffusers' SanaPipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_support import GEMMA, bytes_tokenizer, sana_pipeline

from metacanvas_jax import registry
from metacanvas_jax.text.prompts import INSTRUCTION, first_and_last, prompt_tokens
from metacanvas_jax.types import Text

torch = pytest.importorskip("torch", reason="needs the [torch] extra")
pytest.importorskip("diffusers", reason="needs the [torch] extra")
pytestmark = pytest.mark.torch

LENGTH = 300
BATCHES = {
    "empty": [""],
    "blank": ["  "],
    "beside words": ["", "a red cat", ""],
    "beside a long prompt": ["", "words " * 90, "A cat "],
}


@pytest.fixture(scope="module")
def pipeline():
    return sana_pipeline()


@pytest.fixture(scope="module")
def ours(pipeline, tmp_path_factory):
    """``ours(prompts, instruction)``: states and mask of this project's encoder with the pipeline's weights."""
    folder = tmp_path_factory.mktemp("gemma")
    pipeline.text_encoder.save_pretrained(folder)
    network = registry.module(GEMMA)
    params = registry.of(GEMMA).load(folder, GEMMA, registry.abstract_params(GEMMA), "text", progress=False)
    run = jax.jit(lambda text: network.apply({"params": params}, text))
    tokenizer = bytes_tokenizer()

    def read(prompts, instruction):
        pad = tokenizer.pad_token_id
        ids, mask = prompt_tokens(tokenizer.encode, prompts, instruction=instruction, length=LENGTH, pad=pad)
        states = run(Text(jnp.asarray(ids), jnp.asarray(mask)))
        return first_and_last(states, LENGTH)

    return read


def theirs(pipeline, prompts):
    """States and masks of prompts with the instruction, and of guidance's empty prompts, as the pipeline makes them."""
    with torch.no_grad():
        states, mask, empty, empty_mask = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=True,
            negative_prompt="",
            device=torch.device("cpu"),
            clean_caption=False,
            max_sequence_length=LENGTH,
            complex_human_instruction=INSTRUCTION.split("\n"),
        )
    return [(x.float().numpy(), m.bool().numpy()) for x, m in ((states, mask), (empty, empty_mask))]


def same(found, expected):
    states, mask = expected
    np.testing.assert_array_equal(np.asarray(found.mask), mask)
    np.testing.assert_allclose(np.asarray(found.states)[mask], states[mask], atol=1e-4)


@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)
def test_prompts_without_words_have_the_states_of_the_pipeline(pipeline, ours, prompts):
    asked, empty = theirs(pipeline, prompts)
    same(ours(prompts, INSTRUCTION), asked)
    same(ours([""] * len(prompts), ""), empty)


@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)
def test_an_export_gives_prompts_without_words_the_states_of_the_pipeline(pipeline, prompts):
    from metacanvas_jax.text.gemma2.torch_side import Side

    config = {"length": LENGTH, "instruction": INSTRUCTION, "reads_prompt": True}
    side = Side(pipeline.text_encoder, pipeline.tokenizer, config)
    for instructed, expected in zip((True, False), theirs(pipeline, prompts), strict=True):
        states, mask = side(prompts if instructed else [""] * len(prompts), [instructed] * len(prompts))
        np.testing.assert_array_equal(mask.numpy(), expected[1])
        np.testing.assert_allclose(states.numpy()[expected[1]], expected[0][expected[1]], atol=1e-4)


def test_an_empty_prompt_that_a_user_asks_for_follows_the_instruction_and_one_of_guidance_does_not(ours):
    asked, empty = ours([""], INSTRUCTION), ours([""], "")
    assert np.asarray(empty.mask).sum() == 1
    assert np.abs(np.asarray(asked.states)[0, 0] - np.asarray(empty.states)[0, 0]).max() < 1e-5, "the first token"
