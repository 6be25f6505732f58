"""The method itself: what the canvas changes, and what it must not."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax.connectors.canvas import CanvasConnector, CanvasConnectorConfig
from metacanvas_jax.connectors.context import ContextConnector, ContextConnectorConfig
from metacanvas_jax.connectors.queries import Queries, QueriesConfig
from metacanvas_jax.diffusion.flow import TimeConfig
from metacanvas_jax.dit.sana.network import Sana, SanaConfig
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.mllm.canvas import CanvasConfig, CanvasTokens, canvas_positions
from metacanvas_jax.mllm.qwen2_5_vl.language import LanguageConfig
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig, Qwen25VL
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.train.objectives import Prepared, painting
from metacanvas_jax.trees import flat, merge, partition
from metacanvas_jax.types import MllmInputs
from metacanvas_jax.vae.patch_pca.network import PatchPca, PatchPcaConfig

QUICK = True
WIDTH = 32
LANGUAGE = LanguageConfig(
    vocab=50,
    width=WIDTH,
    layers=2,
    heads=2,
    kv_heads=1,
    mlp=48,
    rope_sections=(2, 3, 3),
    tied=True,
    lora=LoraConfig(rank=4, alpha=8.0),
)
SANA = SanaConfig(latent_channels=4, heads=2, head_width=32, cross_heads=2, layers=2, context_width=24)
CONNECTOR = CanvasConnectorConfig(width=64)


def make(*, canvas=True, queries=None, connector=CONNECTOR):
    return MetaCanvas(
        mllm=Qwen25VL(MllmConfig(LANGUAGE)),
        context_connector=ContextConnector(ContextConnectorConfig(out_width=24, dropout=0.0)),
        dit=Sana(SANA),
        canvas=CanvasTokens(CanvasConfig(rows=3, columns=4), WIDTH) if canvas else None,
        canvas_connector=CanvasConnector(connector) if canvas else None,
        queries=None if queries is None else Queries(QueriesConfig(queries), WIDTH),
    )


def data():
    keys = jax.random.split(jax.random.key(0), 3)
    mask = jnp.arange(6)[None] < jnp.array([[6], [4]])
    positions = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (3, 2, 6))
    inputs = MllmInputs(jax.random.randint(keys[0], (2, 6), 0, 50, jnp.int32), positions, mask)
    return inputs, jax.random.normal(keys[1], (2, 1, 3, 4, 4)), jnp.array([0.3, 0.8])


def fresh(model):
    inputs, latents, time = data()
    return nn.meta.unbox(jax.jit(model.init)(jax.random.key(1), inputs, latents, time))["params"]


def perturbed(params, seed=2):
    """Every parameter moved away from its initial value, zeros included. NumPy's numbers need no compilation."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + np.float32(0.1) * rng.standard_normal(leaf.shape, np.float32), params)


def trained(model):
    """Parameters of which none is zero."""
    inputs, latents, time = data()
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(1), inputs, latents, time))["params"]

    def start(path, leaf):
        if len(leaf.shape) < 2:
            return jnp.ones(leaf.shape) if path[-1].key in ("scale", "weight") else jnp.zeros(leaf.shape)
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / np.sqrt(np.prod(leaf.shape[:-1])), jnp.float32)

    rng = np.random.default_rng(1)
    return perturbed(jax.tree_util.tree_map_with_path(start, shapes))


@pytest.fixture(scope="module")
def model_and_params():
    model = make()
    return model, fresh(model)


def test_zero_initialised_canvas_changes_nothing_bit_for_bit(model_and_params):
    model, params = model_and_params
    # The output layers of a trained network are not zero: without this the comparison would be of zeros.
    params = params | {"dit": perturbed(params["dit"])}
    inputs, latents, time = data()
    with_canvas = jax.jit(model.apply)({"params": params}, inputs, latents, time)
    text_only = {name: params[name] for name in ("mllm", "context_connector", "dit")}
    without = jax.jit(make(canvas=False).apply)({"params": text_only}, inputs, latents, time)
    assert np.abs(np.asarray(without)).max() > 0.01
    np.testing.assert_array_equal(np.asarray(with_canvas), np.asarray(without))


@pytest.mark.parametrize("fuse", ["after_patchify", "before_patchify"])
def test_a_sample_whose_canvas_is_left_out_is_drawn_without_one(fuse):
    model = make(connector=dataclasses.replace(CONNECTOR, fuse=fuse, latent_channels=4))
    params = trained(model)
    inputs, latents, time = data()
    planned = jax.jit(lambda inputs: model.apply({"params": params}, inputs, method=lambda m, x: m.plan(m.read(x))))
    plan = planned(inputs)
    velocity = jax.jit(lambda plan: model.apply({"params": params}, latents, time, plan, method="velocity"))
    drawn, without = velocity(plan), velocity(plan.replace(canvas=None))
    assert np.abs(drawn - without).max(axis=(1, 2, 3, 4)).min() > 1e-3
    found = velocity(plan.replace(kept=jnp.array([True, False])))
    np.testing.assert_allclose(found, jnp.stack([drawn[0], without[1]]), rtol=1e-5, atol=1e-6)


def test_trained_canvas_changes_the_velocity(model_and_params):
    model, params = model_and_params
    params = perturbed(params)
    inputs, latents, time = data()
    apply = jax.jit(model.apply)
    first = apply({"params": params}, inputs, latents, time)
    moved = params | {"canvas": jax.tree.map(lambda x: x + 1.0, params["canvas"])}
    assert np.abs(np.asarray(first - apply({"params": moved}, inputs, latents, time))).max() > 1e-3


def test_canvas_gets_a_gradient_once_the_zero_layers_have_moved(model_and_params):
    model, params = model_and_params
    params = perturbed(params)
    inputs, latents, time = data()
    grads = jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, inputs, latents, time) ** 2)))(params)
    for part in ("canvas/.*", "context_connector/.*", "canvas_connector/.*", ".*lora.*"):
        reached = {path: grad for path, grad in flat(grads).items() if re.fullmatch(part, path)}
        assert reached, part
        assert not [path for path, grad in reached.items() if not np.abs(np.asarray(grad)).max() > 0]


def test_frozen_prefix_once_equals_the_joint_forward_and_backward(model_and_params):
    model, params = model_and_params
    params = perturbed(params)
    trainable, frozen = partition(params, (("mllm/.*_lora/.*", "train"), ("mllm/.*", "freeze"), (".*", "train")))
    inputs, latents, time = data()

    def joint(model, inputs, latents, time):
        context = model.read(inputs)
        shape = model.canvas.config.shape
        tokens = model.canvas().reshape(1, -1, WIDTH).repeat(2, axis=0)
        positions = canvas_positions(context.next_position, shape, model.canvas.config)
        hidden, written = model.mllm.joint(inputs, tokens, positions)
        plan = model.plan(dataclasses.replace(context, hidden=hidden))
        plan = plan.replace(canvas=model.canvas_connector.read(written.reshape(2, *shape, WIDTH)))
        return model.velocity(latents, time, plan)

    def split(trainable, context):
        variables = {"params": merge(trainable, frozen)}
        plan = model.apply(variables, context, method="plan")
        return jnp.mean(model.apply(variables, latents, time, plan, method="velocity") ** 2)

    def whole(trainable):
        return jnp.mean(model.apply({"params": merge(trainable, frozen)}, inputs, latents, time, method=joint) ** 2)

    context = jax.jit(lambda: model.apply({"params": frozen}, inputs, method="read"))()
    value, grads = jax.jit(jax.value_and_grad(split))(trainable, context)
    expected, expected_grads = jax.jit(jax.value_and_grad(whole))(trainable)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # Relative to the largest gradient: that of a key's bias is zero but for rounding.
    scale = max(np.abs(np.asarray(grad)).max() for grad in flat(expected_grads).values())
    for path, grad in flat(grads).items():
        np.testing.assert_allclose(grad, flat(expected_grads)[path], atol=1e-5 * scale, err_msg=path)


def test_padding_of_the_prompt_changes_nothing(model_and_params):
    model, params = model_and_params
    params = perturbed(params)
    inputs, latents, time = data()
    pad = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 3)])  # noqa: E731
    longer = MllmInputs(pad(inputs.tokens), pad(inputs.positions), pad(inputs.mask))
    short = jax.jit(model.apply)({"params": params}, inputs, latents, time)
    long = jax.jit(model.apply)({"params": params}, longer, latents, time)
    np.testing.assert_allclose(short, long, atol=2e-5)


def test_queries_are_the_paper_s_baseline_and_reach_the_dit():
    model = make(canvas=False, queries=5)
    params = trained(model)
    assert params["queries"]["tokens"].shape == (5, WIDTH)
    inputs, latents, time = data()
    apply = jax.jit(model.apply)
    first = apply({"params": params}, inputs, latents, time)
    moved = params | {"queries": jax.tree.map(lambda x: x + 1.0, params["queries"])}
    assert np.abs(np.asarray(first - apply({"params": moved}, inputs, latents, time))).max() > 1e-3


def test_canvas_fused_before_patchification_is_added_to_the_latents():
    model = make(connector=dataclasses.replace(CONNECTOR, fuse="before_patchify", latent_channels=4, dit_block=False))
    params = trained(model)
    inputs, latents, time = data()

    def by_hand(model, inputs, latents, time):
        plan = model.plan(model.read(inputs))
        return model.velocity(latents + plan.canvas, time, plan.replace(canvas=None))

    found = jax.jit(model.apply)({"params": params}, inputs, latents, time)
    expected = jax.jit(lambda *a: model.apply(*a, method=by_hand))({"params": params}, inputs, latents, time)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_init_makes_the_language_head_that_nothing_reads():
    config = MllmConfig(dataclasses.replace(LANGUAGE, tied=False))
    params = jax.eval_shape(make().clone(mllm=Qwen25VL(config)).init, jax.random.key(0), *data())["params"]
    assert "head" in params["mllm"]["language"]


def test_loss_is_the_squared_error_of_the_velocity(model_and_params):
    model, params = model_and_params
    vae = PatchPca(PatchPcaConfig(patch=2, channels=4))
    _, loss = painting(model, vae, TimeConfig())
    inputs, latents, _ = data()
    context = jax.jit(lambda p: model.apply({"params": p}, inputs, method="read"))(params)
    # A fresh DiT whose last layer is zero predicts zero, so the loss is the mean of (noise - latents) squared.
    params = params | {"dit": params["dit"] | {"out": jax.tree.map(jnp.zeros_like, params["dit"]["out"])}}
    key = jax.random.key(7)
    value, _ = jax.jit(lambda p: loss(p, {}, Prepared(context, latents), key))(params)
    noise = jax.random.normal(jax.random.split(key, 3)[1], latents.shape)
    np.testing.assert_allclose(value, jnp.mean((noise - latents) ** 2), rtol=1e-5)


def test_canvases_are_dropped_at_the_given_share_beside_the_same_noise(model_and_params):
    model, params = model_and_params
    params = perturbed(params)
    vae = PatchPca(PatchPcaConfig(patch=2, channels=4))
    inputs, latents, _ = data()
    prepared = Prepared(jax.jit(lambda p: model.apply({"params": p}, inputs, method="read"))(params), latents)
    keys = jax.random.split(jax.random.key(7), 200)

    def losses(model, params, **options):
        loss = painting(model, vae, TimeConfig(), **options)[1]
        return np.asarray(jax.jit(jax.vmap(lambda key: loss(params, {}, prepared, key)[0]))(keys))

    text_only = {name: params[name] for name in ("mllm", "context_connector", "dit")}
    without, drawn = losses(make(canvas=False), text_only), losses(model, params)
    np.testing.assert_allclose(losses(model, params, canvas_dropout=1.0), without, rtol=1e-4)
    half = losses(model, params, canvas_dropout=0.3)
    whole, none = np.isclose(half, drawn, rtol=1e-5), np.isclose(half, without, rtol=1e-5)
    assert (whole & none).sum() == 0
    assert whole.mean() == pytest.approx(0.7**2, abs=0.12)  # both samples of the batch keep their canvas
    assert none.mean() == pytest.approx(0.3**2, abs=0.07)
