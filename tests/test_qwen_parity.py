"""Qwen2.5-VL against transformers on tiny random checkpoints, through the real import.

One batch holds a row for every case, so the JAX side is compiled once; transformers runs each case alone, with padding
only where the case is about padding.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_support import TINY, abstract_params, random_media, tokenizer

from metacanvas_jax.mllm.canvas import CanvasConfig, canvas_positions
from metacanvas_jax.mllm.prompt import PromptConfig, Prompter
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig, Qwen25VL
from metacanvas_jax.mllm.qwen2_5_vl.table import table
from metacanvas_jax.weights.hf_import import load_params

support = pytest.importorskip("qwen_torch_support")

pytestmark = pytest.mark.torch
TOLERANCE = 2e-5  # of the largest value of the reference
LENGTH = 224

ROWS = {  # name: (position rule, prompt)
    "text": ("published", ["A red cat beside a blue house"]),
    "image": ("transformers5", ["What is in ", random_media((1, 12, 20)), "this picture?"]),
    "small image": ("transformers5", ["A cat", random_media((1, 4, 8), seed=1)]),
    "image of whole windows": ("transformers5", [random_media((1, 8, 16), seed=2), "A cat"]),
    "two images": ("transformers5", [random_media((1, 4, 8), seed=3), "and", random_media((1, 4, 8), seed=4)]),
    "image and video": (
        "transformers5",
        ["A", random_media((1, 12, 20), seed=5), " and", random_media((5, 8, 12), seconds=1.0, seed=6), "so"],
    ),
    "image and video, published rule": (
        "published",
        ["A", random_media((1, 12, 20), seed=5), " and", random_media((5, 8, 12), seconds=1.0, seed=6), "so"],
    ),
    "videos of 0.5 and 0.8 seconds per grid": (
        "transformers5",
        [random_media((3, 4, 8), seconds=0.5, seed=7), "b", random_media((3, 4, 8), seconds=0.8, seed=8), "so"],
    ),
    "videos of 4.0 and 0.25 seconds per grid": (
        "transformers5",
        [random_media((3, 4, 8), seconds=4.0, seed=9), "b", random_media((3, 4, 8), seconds=0.25, seed=10), "so"],
    ),
}
CASES = {  # rows that transformers runs in one batch
    "text only": ["text"],
    "one image, not divisible by the window": ["image"],
    "one image, smaller than the window": ["small image"],
    "one image of whole windows": ["image of whole windows"],
    "two images in one prompt": ["two images"],
    "two images with left padding": ["small image", "image"],
    "image and video": ["image and video"],
    "image and video, published rule": ["image and video, published rule"],
    "several second_per_grid_ts": [
        "videos of 0.5 and 0.8 seconds per grid",
        "videos of 4.0 and 0.25 seconds per grid",
    ],
}


def everything(module, inputs):
    """Vision features where they were placed, output of every layer, hidden states after the final norm, logits."""
    embeddings = module.embed(inputs)
    features = [
        jax.vmap(lambda row, slots: row.at[slots].get(mode="fill", fill_value=0))(embeddings, media.slots)
        for media in inputs.media
    ]
    layers = module.language.every_layer(embeddings, inputs.positions, inputs.mask)
    hidden, _ = module.language.read(embeddings, inputs.positions, inputs.mask, cache=False)
    return features, layers, hidden, module.logits(hidden)


def outputs(config, params, inputs):
    """``everything`` as numpy arrays."""
    apply = jax.jit(lambda params, inputs: Qwen25VL(config).apply({"params": params}, inputs, method=everything))
    return jax.tree.map(lambda x: np.asarray(x, np.float32), apply(params, jax.tree.map(jnp.asarray, inputs)))


def make_prompts():
    prompters = {rule: Prompter(tokenizer(), PromptConfig(rule=rule)) for rule in ("published", "transformers5")}
    return {name: prompters[rule](parts) for name, (rule, parts) in ROWS.items()}


def select(ours, inputs, prompts, names):
    """What ``run_reference`` returns for the rows ``names``, out of the outputs of the batch of all rows."""
    features, layers, hidden, logits = ours
    rows = [list(ROWS).index(name) for name in names]
    own = []
    for row, name in zip(rows, names, strict=True):
        taken = dict.fromkeys([media.grid for media in inputs.media], 0)
        for patches, _ in prompts[name].media:
            group = [media.grid for media in inputs.media].index(patches.grid)
            own.append(features[group][row, taken[patches.grid]])
            taken[patches.grid] += 1
    real = [(row, inputs.mask[row]) for row in rows]
    joined = np.concatenate([layers[:, row, mask] for row, mask in real], axis=1)
    return [*own, joined, *(np.concatenate([x[row, mask] for row, mask in real]) for x in (hidden, logits))]


def relative_errors(got, expected):
    """Largest difference over the largest value: of every medium's features, every layer, hidden states, logits."""
    pairs = [*zip(got[:-3], expected[:-3], strict=True), *zip(got[-3], expected[-3], strict=True)]
    pairs += [(got[-2], expected[-2]), (got[-1], expected[-1])]
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]


@pytest.fixture(scope="module")
def reference():
    return support.reference_model()


@pytest.fixture(scope="module")
def params(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    reference.save_pretrained(folder)
    return load_params(folder, table(TINY), abstract_params(TINY), progress=False)


@pytest.fixture(scope="module")
def prompts():
    return make_prompts()


@pytest.fixture(scope="module")
def inputs(prompts):
    return Prompter(tokenizer(), PromptConfig()).batch(list(prompts.values()), length=LENGTH)


@pytest.fixture(scope="module")
def ours(params, inputs):
    return outputs(TINY, params, inputs)


@pytest.mark.parametrize("case", CASES)
def test_qwen_equals_transformers(case, reference, prompts, inputs, ours):
    names = CASES[case]
    published = ROWS[names[0]][0] == "published"
    expected = support.run_reference(reference, [prompts[name] for name in names], published)
    errors = relative_errors(select(ours, inputs, prompts, names), expected)
    assert max(errors) <= TOLERANCE, [f"{error:.1e}" for error in errors]


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])
def test_qwen_canvas_equals_transformers_with_an_explicit_mask(bidirectional, reference, params, prompts):
    shape = CanvasConfig(keyframes=2, rows=2, columns=3)
    canvas = np.random.default_rng(3).standard_normal((1, 12, TINY.language.width), np.float32)
    inputs = Prompter(tokenizer(), PromptConfig()).batch([prompts["text"]], length=48)

    def run(module, inputs, canvas):
        context = module.encode(inputs)
        positions = canvas_positions(context.next_position, shape.shape, shape)
        return module.write(canvas, positions, context, bidirectional=bidirectional), positions

    apply = jax.jit(lambda *args: Qwen25VL(TINY).apply({"params": params}, *args, method=run))
    written, positions = apply(jax.tree.map(jnp.asarray, inputs), jnp.asarray(canvas))

    real = inputs.mask[0]
    length = int(real.sum())
    visible = np.tril(np.ones((length + 12, length + 12), bool))
    visible[length:, length:] |= bidirectional
    torch = support.torch
    with torch.no_grad():
        tokens = reference.model.language_model.embed_tokens(torch.from_numpy(inputs.tokens[:, real]).long())
        places = np.concatenate([inputs.positions[:, :, real], positions], axis=2)
        expected = reference.model.language_model(
            inputs_embeds=torch.cat([tokens, torch.from_numpy(canvas)], dim=1),
            position_ids=torch.from_numpy(places).long(),
            attention_mask=torch.from_numpy(visible)[None, None],
            use_cache=False,
        ).last_hidden_state[:, length:]
    error = np.abs(written - expected.numpy()).max() / np.abs(expected.numpy()).max()
    assert error <= TOLERANCE, error


def test_qwen_in_bfloat16_is_as_close_to_float32_as_transformers_in_bfloat16(reference, params, prompts):
    own = [prompts[name] for name in ("small image", "text")]
    inputs = Prompter(tokenizer(), PromptConfig()).batch(own, length=64)
    config = MllmConfig(*(dataclasses.replace(part, dtype="bfloat16") for part in (TINY.language, TINY.vision)))
    _, _, hidden, logits = outputs(config, params, inputs)
    got = {"hidden": hidden[inputs.mask], "logits": logits[inputs.mask]}
    exact = dict(zip(got, support.run_reference(reference, own, False)[-2:], strict=True))
    rounded = dict(
        zip(got, support.run_reference(reference.bfloat16(), own, False, support.torch.bfloat16)[-2:], strict=True)
    )
    reference.float()
    for name in got:
        error = np.abs(got[name] - exact[name]) / np.abs(exact[name]).max()
        theirs = np.abs(rounded[name] - exact[name]) / np.abs(exact[name]).max()
        assert error.max() <= 0.04 and error.mean() <= 0.005, (name, error.max(), error.mean())
        assert error.mean() <= 1.1 * theirs.mean(), (name, error.mean(), theirs.mean())
