"""Qwen3-VL against transformers on a tiny random checkpoint, through the real import.

One batch holds a row for every case, so the JAX side is compiled once; transformers runs each case alone, and makes its
positions itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from qwen3_support import MEDIA, TINY, medium, prompter, reference_model

from metacanvas_jax import registry
from metacanvas_jax.mllm.generation import generate
from metacanvas_jax.mllm.prompt import END
from metacanvas_jax.mllm.qwen3_vl.network import Qwen3VL
from metacanvas_jax.mllm.qwen3_vl.table import table
from metacanvas_jax.weights.hf_import import load_params

support = pytest.importorskip("qwen_torch_support")

pytestmark = pytest.mark.torch
TOLERANCE = 2e-5  # of the largest value of the reference
LENGTH = 144
MOST = 10  # tokens of an answer

IMAGE, VIDEO = (1, 4, 10), (2, 4, 6)  # a grid is a program to compile
ROWS = {
    "text": ["A red cat beside a blue house"],
    "image": ["What is in ", medium(IMAGE), "this picture?"],
    "video": [medium(VIDEO, video=True, seed=1), "A cat"],
    "images and video": [
        medium(IMAGE, seed=2),
        "and",
        medium(IMAGE, seed=3),
        medium(VIDEO, video=True, seed=4),
        " so",
    ],
}
CASES = {  # rows that transformers runs in one batch
    "text only": ["text"],
    "one image, larger than the table of positions": ["image"],
    "a video of several blocks": ["video"],
    "images and a video in one prompt": ["images and video"],
    "left padding": ["text", "video"],
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Compiles without optimising: the networks are tiny."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def reference():
    return reference_model()


@pytest.fixture(scope="module")
def params(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    reference.save_pretrained(folder)
    return load_params(folder, table(TINY), registry.abstract_params(TINY), progress=False)


@pytest.fixture(scope="module")
def prompts():
    return {name: prompter()(parts) for name, parts in ROWS.items()}


def batched(prompts):
    return prompter().batch(list(prompts), length=LENGTH)


def everything(module, inputs):
    """Features of media, output of every layer, hidden states after the final norm, logits."""
    hidden = module.encode(inputs, cache=False).hidden
    features = [module.see(media)[0] for media in inputs.media]
    return features, module.every_layer(inputs), hidden, module.logits(hidden)


@pytest.fixture(scope="module")
def ours(params, prompts):
    """What ``everything`` makes of each row: features of its media in their order, and states of real tokens."""
    inputs = batched(prompts.values())
    apply = jax.jit(lambda params, inputs: Qwen3VL(TINY).apply({"params": params}, inputs, method=everything))
    features, layers, hidden, logits = jax.device_get(apply(params, jax.tree.map(jnp.asarray, inputs)))
    rows = {}
    for i, (name, prompt) in enumerate(prompts.items()):
        taken = dict.fromkeys([media.grid for media in inputs.media], 0)
        own = []
        for patches, _ in prompt.media:
            group = [media.grid for media in inputs.media].index(patches.grid)
            own.append(features[group][i, taken[patches.grid]])
            taken[patches.grid] += 1
        mask = inputs.mask[i]
        rows[name] = own, [layers[:, i, mask], hidden[i, mask], logits[i, mask]]
    return rows


def error(got, expected):
    assert got.shape == expected.shape
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_qwen3_equals_transformers(case, reference, prompts, ours):
    names = CASES[case]
    expected = support.run_reference(reference, [prompts[name] for name in names], False, media_config=MEDIA)
    media = [x for name in names for x in ours[name][0]]
    layers, hidden, logits = (list(parts) for parts in zip(*(ours[name][1] for name in names), strict=True))
    got = [*media, np.concatenate(layers, axis=1), np.concatenate(hidden), np.concatenate(logits)]
    errors = [error(a, b) for a, b in zip(got, expected, strict=True)]
    assert max(errors) <= TOLERANCE, [f"{each:.1e}" for each in errors]


def test_qwen3_gradient_of_every_parameter_equals_transformers(reference, params, prompts):
    prompt = prompts["video"]
    inputs = jax.tree.map(jnp.asarray, batched([prompt]))
    weights = np.random.default_rng(0).standard_normal((len(prompt.tokens), TINY.language.width), np.float32)

    def loss(params):
        hidden = Qwen3VL(TINY).apply({"params": params}, inputs, cache=False, method="encode").hidden
        return jnp.mean(jnp.tanh(hidden[0, : len(weights)]) * weights)

    got = flatten_dict(jax.device_get(jax.jit(jax.grad(loss))(params)), sep="/")
    torch = support.torch
    arguments = support.arguments_of(prompt, timestamps=True)
    hidden = reference.model(**arguments, use_cache=False).last_hidden_state[0]
    torch.mean(torch.tanh(hidden) * torch.from_numpy(weights)).backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    reference.zero_grad(set_to_none=True)
    worst = {}
    for entry in table(TINY):
        if entry.path == "language/head/kernel":
            continue  # hidden states do not depend on it
        for layer in entry.tensors:
            grad = next(expected[name] for name in entry.names(layer) if name in expected)
            own = got[entry.path] if layer is None else got[entry.path][layer]
            assert np.abs(own).max() > 0, entry.path
            worst[entry.names(layer)[0]] = error(own, entry.transform.forward(grad.numpy()))
    assert max(worst.values()) <= TOLERANCE, sorted(worst.items(), key=lambda item: -item[1])[:3]


def test_qwen3_greedy_text_equals_transformers(reference, params):
    asked = prompter(assistant=True)
    prompts = [asked(parts) for parts in ROWS.values()]
    inputs = jax.tree.map(jnp.asarray, asked.batch(prompts, length=LENGTH))
    run = jax.jit(lambda params, inputs: generate(Qwen3VL(TINY), params, inputs, most=MOST, stop=(asked.ids[END],)))
    written = run(params, inputs)
    rows, lengths, answers = np.asarray(written.tokens), np.asarray(written.lengths), []
    for prompt, row, length in zip(prompts, rows, lengths, strict=True):
        answers.append(row[:length].tolist())
        assert answers[-1] == support.greedy(reference, prompt, MOST, timestamps=True)
    assert len({tuple(answer) for answer in answers}) == len(answers) and max(len(set(a)) for a in answers) > 4
