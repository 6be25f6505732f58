"""Writing a canvas on an encoded context."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from qwen_support import LANGUAGE, VISION, random_media, random_params, tokenizer

from metacanvas_jax.mllm import decoder
from metacanvas_jax.mllm.canvas import CanvasConfig, CanvasTokens, canvas_positions
from metacanvas_jax.mllm.prompt import PromptConfig, Prompter
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig, Qwen25VL
from metacanvas_jax.nn.lora import LoraConfig

QUICK = True

CANVAS = CanvasConfig(keyframes=3, rows=2, columns=2, spacing=1.0)
LENGTH, N = 64, 12
SMALL_VISION = dataclasses.replace(VISION, depth=1, full_attention_layers=(0,))  # windows have their own tests
WITHOUT_LORA = MllmConfig(LANGUAGE, SMALL_VISION)
WITH_LORA = MllmConfig(dataclasses.replace(LANGUAGE, lora=LoraConfig(rank=3, alpha=1.5)), SMALL_VISION)


def shifted(inputs, row, by):
    """One row of a batch moved to the right: padding on both sides."""
    roll = lambda x, axis: x.at[row].set(jnp.roll(x[row], by, axis))  # noqa: E731
    media = tuple(
        dataclasses.replace(m, slots=m.slots.at[row].set(jnp.where(m.slots[row] < LENGTH, m.slots[row] + by, LENGTH)))
        for m in inputs.media
    )
    positions = inputs.positions.at[:, row].set(jnp.roll(inputs.positions[:, row], by, 1))
    return dataclasses.replace(
        inputs, tokens=roll(inputs.tokens, 0), mask=roll(inputs.mask, 0), positions=positions, media=media
    )


@pytest.fixture(scope="module")
def inputs():
    """A short text, right padded, and a longer one with an image, moved to the left-padded end."""
    prompter = Prompter(tokenizer(), PromptConfig(system="You"))
    prompts = [prompter("A red cat"), prompter(["What is", random_media((1, 4, 8)), "a blue house"])]
    batch = jax.tree.map(jnp.asarray, prompter.batch(prompts, length=LENGTH))
    return shifted(batch, 1, LENGTH - len(prompts[1].tokens))


@pytest.fixture(scope="module")
def params():
    return random_params(WITH_LORA)


@pytest.fixture(scope="module")
def canvas():
    return jnp.asarray(np.random.default_rng(5).standard_normal((2, N, LANGUAGE.width)), jnp.float32)


@pytest.fixture(scope="module")
def encode():
    return jax.jit(lambda params, inputs: Qwen25VL(WITH_LORA).apply({"params": params}, inputs, method="encode"))


@pytest.fixture(scope="module")
def context(encode, params, inputs):
    return encode(params, inputs)


def writer(**options):
    def write(params, canvas, context):
        positions = canvas_positions(context.next_position, CANVAS.shape, CANVAS)
        return Qwen25VL(WITH_LORA).apply({"params": params}, canvas, positions, context, method="write", **options)

    return jax.jit(write)


@pytest.fixture(scope="module")
def write():
    return writer()


def joint(params, inputs, canvas, next_position):
    positions = canvas_positions(next_position, CANVAS.shape, CANVAS)
    return Qwen25VL(WITH_LORA).apply({"params": params}, inputs, canvas, positions, method="joint")


def close(got, expected, tolerance=1e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def split_lora(params):
    flat = flatten_dict(params)
    lora = {path: leaf for path, leaf in flat.items() if any("lora" in name for name in path)}
    return lora, {path: leaf for path, leaf in flat.items() if path not in lora}


def test_canvas_written_after_encode_equals_the_joint_forward_in_values_and_gradients(params, inputs, canvas, context):
    rng = np.random.default_rng(6)
    connector = jnp.asarray(rng.standard_normal((LANGUAGE.width, 8)) / 8, jnp.float32)
    target = jnp.asarray(rng.standard_normal((2, N, 8)), jnp.float32)
    lora, frozen = split_lora(params)
    assert len(lora) == 2 * 7

    def loss(trainable, hidden_of):
        canvas, connector, lora = trainable
        hidden = hidden_of(unflatten_dict(frozen | lora), canvas)
        return jnp.mean((jnp.tanh(hidden @ connector) - target) ** 2), hidden

    @jax.jit
    def both(trainable, context, inputs):
        split = lambda params, canvas: writer()(params, canvas, jax.lax.stop_gradient(context))  # noqa: E731
        whole = lambda params, canvas: joint(params, inputs, canvas, context.next_position)[1]  # noqa: E731
        return [jax.value_and_grad(loss, has_aux=True)(trainable, hidden_of) for hidden_of in (split, whole)]

    ((_, hidden), gradient), ((_, expected_hidden), expected) = both((canvas, connector, lora), context, inputs)
    close(hidden, expected_hidden)
    for path, leaf in jax.tree.leaves_with_path(expected):
        assert np.abs(leaf).max() > 0, path
    jax.tree.map(close, gradient, expected)


def test_lora_present_leaves_the_context_bit_identical(params, inputs, context):
    frozen = unflatten_dict(split_lora(params)[1])
    apply = jax.jit(lambda params, inputs: Qwen25VL(WITHOUT_LORA).apply({"params": params}, inputs, method="encode"))
    jax.tree.map(np.testing.assert_array_equal, context, apply(frozen, inputs))


def test_lora_changes_canvas_tokens_only_in_the_joint_forward(params, inputs, canvas, context):
    lora, frozen = split_lora(params)
    run = jax.jit(joint)
    hidden, written = run(params, inputs, canvas, context.next_position)
    other = unflatten_dict(frozen | {path: 2 * leaf for path, leaf in lora.items()})
    hidden2, written2 = run(other, inputs, canvas, context.next_position)
    np.testing.assert_array_equal(hidden[inputs.mask], hidden2[inputs.mask])
    assert (np.abs(written - written2).max(axis=-1) > 1e-3).all()


def test_canvas_does_not_depend_on_padding(encode, write, params, inputs, canvas, context):
    moved = shifted(shifted(inputs, 0, 9), 1, -5)
    moved = dataclasses.replace(moved, tokens=jnp.where(moved.mask, moved.tokens, 7))
    again = encode(params, moved)
    np.testing.assert_array_equal(again.next_position, context.next_position)
    close(again.hidden[moved.mask], context.hidden[inputs.mask])
    close(write(params, canvas, again), write(params, canvas, context))


def reach(function, canvas):
    """``[n m]``: whether token ``n`` of the output changes with token ``m`` of the canvas."""
    start = function(canvas)
    rows = [np.abs(function(canvas.at[:, i].add(1.0)) - start).max(axis=(0, 2)) > 1e-4 for i in range(N)]
    return np.stack(rows, axis=1)


def test_canvas_tokens_are_causal_or_bidirectional_among_each_other(write, params, canvas, context):
    causal = reach(lambda canvas: write(params, canvas, context), canvas)
    np.testing.assert_array_equal(causal, np.tril(np.ones((N, N), bool)))
    both_ways = writer(bidirectional=True)
    assert reach(lambda canvas: both_ways(params, canvas, context), canvas).all()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_tokens_that_fill_up_tiles_change_nothing(monkeypatch, params, canvas, context, bidirectional):
    expected = writer(bidirectional=bidirectional)(params, canvas, context)
    monkeypatch.setattr(decoder, "FEW", 1)
    filled = writer(bidirectional=bidirectional)
    assert N % decoder.WHOLE and f"{N + -N % decoder.WHOLE},{LANGUAGE.width}" in str(
        jax.make_jaxpr(filled)(params, canvas, context)
    )
    close(filled(params, canvas, context), expected)


def test_canvas_gradients_with_remat_equal_those_without(params, canvas, context):
    remat = MllmConfig(dataclasses.replace(WITH_LORA.language, remat="full"), SMALL_VISION)
    lora, frozen = split_lora(params)

    def gradient(config):
        def loss(lora):
            positions = canvas_positions(context.next_position, CANVAS.shape, CANVAS)
            tree = {"params": unflatten_dict(frozen | lora)}
            return jnp.sum(Qwen25VL(config).apply(tree, canvas, positions, context, method="write") ** 2)

        return jax.jit(jax.grad(loss))(lora)

    jax.tree.map(close, gradient(remat), gradient(WITH_LORA))


def test_canvas_needs_a_context_with_its_cache(params, inputs, canvas):
    model = Qwen25VL(WITH_LORA)
    bare = jax.eval_shape(lambda p: model.apply({"params": p}, inputs, cache=False, method="encode"), params)
    assert bare.cache is None
    with pytest.raises(ValueError, match="encode it with cache=True"):
        model.apply({"params": params}, canvas, jnp.zeros((3, 2, N), jnp.int32), bare, method="write")


def test_canvas_tokens_are_interpolated_to_another_grid():
    module = CanvasTokens(CanvasConfig(rows=2, columns=4), width=3)
    tokens = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 4, 3)), jnp.float32)
    np.testing.assert_array_equal(module.apply({"params": {"tokens": tokens}}), tokens)
    wide = module.apply({"params": {"tokens": tokens}}, (1, 2, 8))
    assert wide.shape == (1, 2, 8, 3)
    np.testing.assert_allclose(wide[:, :, 0], tokens[:, :, 0], rtol=1e-6)
    np.testing.assert_allclose(wide[:, :, 1], 0.75 * tokens[:, :, 0] + 0.25 * tokens[:, :, 1], rtol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [({"rows": 0}, "at least one"), ({"spacing": -1.0}, "must not be negative")],
)
def test_canvas_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        CanvasConfig(**({"rows": 2, "columns": 2} | change))
