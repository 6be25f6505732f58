"""Real pretrained weights in the decoder: SmolLM2-135M, a member of the family without qkv biases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_support import abstract_params
from safetensors.numpy import save_file
from smollm2_support import CONFIG, FOLDER, fetch, published_tensors

from metacanvas_jax.mllm.qwen2_5_vl.network import Qwen25VL
from metacanvas_jax.mllm.qwen2_5_vl.table import table
from metacanvas_jax.types import MllmInputs
from metacanvas_jax.weights.hf_import import load_params

pytestmark = [pytest.mark.slow, pytest.mark.torch]
LENGTH = 32
TEXT = "A red bus and a small white dog on the street. The color of the bus is"


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("torch")
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = fetch()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def run(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    save_file(published_tensors(FOLDER / fetch().name), folder / "model.safetensors")
    params = load_params(folder, table(CONFIG), abstract_params(CONFIG), progress=False)

    @jax.jit
    def apply(params, tokens, real):
        positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (3, 1, LENGTH))
        inputs = MllmInputs(tokens, positions, jnp.arange(LENGTH)[None] < real)
        model = Qwen25VL(CONFIG)
        hidden = model.apply({"params": params}, inputs, cache=False, method="encode").hidden
        return hidden, model.apply({"params": params}, hidden, method="logits")

    def padded(ids):
        tokens = np.zeros((1, LENGTH), np.int32)
        tokens[0, : len(ids)] = ids
        hidden, logits = apply(params, tokens, len(ids))
        return np.asarray(hidden[0, : len(ids)]), np.asarray(logits[0, : len(ids)])

    return padded


def test_qwen_decoder_with_pretrained_weights_equals_transformers(reference, run):
    import torch

    model, tokenizer = reference
    ids = tokenizer(TEXT)["input_ids"]
    hidden, logits = run(ids)
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
    expected = out.hidden_states[-1][0].numpy()
    print("last hidden state: max", np.abs(expected).max(), "difference", np.abs(hidden - expected).max())
    assert np.abs(hidden - expected).max() <= 1e-3
    assert (logits.argmax(-1) == out.logits[0].numpy().argmax(-1)).all()


def test_qwen_decoder_with_pretrained_weights_writes_sensible_text(reference, run):
    tokenizer = reference[1]
    for text, answer in ((TEXT, "red"), ("The capital of France is", "Paris")):
        ids = tokenizer(text)["input_ids"]
        for _ in range(4):
            ids = [*ids, int(run(ids)[1][-1].argmax())]
        assert answer in tokenizer.decode(ids[-4:]), tokenizer.decode(ids)
