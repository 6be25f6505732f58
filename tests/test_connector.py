"""The connectors: against a torch transcription of the paper's Algorithm 1, and property by property."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dit_torch_support import assert_gradients_equal, random, relative, torch_gradients
from vae_support import FAST_COMPILE

from metacanvas_jax.connectors.canvas import CanvasConnector, CanvasConnectorConfig
from metacanvas_jax.connectors.context import ContextConnector, ContextConnectorConfig, joined, without_first
from metacanvas_jax.connectors.queries import Queries, QueriesConfig
from metacanvas_jax.connectors.table import canvas_connector
from metacanvas_jax.mllm.canvas import canvas_positions
from metacanvas_jax.nn.resize import linear_resize
from metacanvas_jax.types import States, Tokens

MLLM = 24  # width of the MLLM
CONFIG = CanvasConnectorConfig(width=64, vanilla_width=32, vanilla_head_width=16)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


jit = functools.partial(jax.jit, compiler_options=FAST_COMPILE)


def inputs(time=(0.9, 0.3), canvas=(2, 2, 3), grid=(4, 4, 6), width=64):
    hidden = jnp.asarray(random(2, *canvas, MLLM, seed=1))
    tokens = Tokens(grid=jnp.asarray(random(2, *grid, width, seed=2)), time=jnp.array(time, jnp.float32))
    return hidden, tokens


def random_params(net, *args, **kwargs):
    """Random values everywhere, so that no zero-initialised path is dead."""
    abstract = nn.meta.unbox(jax.eval_shape(lambda: net.init(jax.random.key(0), *args, **kwargs)))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * random(*x.shape, seed=x.size)), abstract)


def fresh_params(net, *args):
    return nn.meta.unbox(jit(net.init)(jax.random.key(0), *args))


def torch_connector():
    """Algorithm 1 in torch, with the SANA block of diffusers: the connector of the exported package."""
    from metacanvas_jax.torch_export.connector import CanvasConnector as TorchConnector

    return TorchConnector(dataclasses.asdict(CONFIG), MLLM)


@pytest.mark.torch
def test_values_and_every_gradient_equal_the_torch_transcription(torch):
    from flax.traverse_util import unflatten_dict
    from torch_support import randomize

    net = randomize(torch_connector())
    state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    params = {e.path: jnp.asarray(e.transform.forward(state.pop(e.name))) for e in canvas_connector(CONFIG)}
    assert not state
    params = {"params": unflatten_dict(params, sep="/")}
    # A time per frame: the last one counts.
    hidden, tokens = inputs(time=((0.0, 0.7, 0.7, 0.7), (0.1, 0.2, 0.2, 0.25)))
    weights = random(*tokens.grid.shape, seed=3)

    result = net(*(torch.from_numpy(np.array(x)) for x in (hidden, tokens.grid, tokens.time)))
    (result * torch.from_numpy(weights)).sum().backward()

    @jit
    def run(params):
        def loss(params):
            out = CanvasConnector(CONFIG).apply(params, hidden, tokens).grid
            return jnp.sum(out * weights), out

        (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return out, gradient["params"]

    out, gradient = run(params)
    assert relative(out, result.detach().numpy()) <= 2e-5
    expected = torch_gradients(canvas_connector(CONFIG), net)
    # Softmax ignores a bias of its keys: what both frameworks find there is rounding.
    assert max(np.abs(x).max() for x in (expected.pop("block/k/bias"), gradient["block"]["k"].pop("bias"))) < 1e-3
    assert_gradients_equal(gradient, expected, 1e-4)


@pytest.fixture(scope="module")
def fresh():
    """A fresh connector: parameters, tokens before and after, and the gradient of a plain sum."""
    hidden, tokens = inputs()
    net = CanvasConnector(CONFIG)
    params = fresh_params(net, hidden, tokens)

    def loss(params):
        out = net.apply(params, hidden, tokens)
        return jnp.sum(out.grid), out

    (_, out), gradient = jit(jax.value_and_grad(loss, has_aux=True))(params)
    return tokens, out, gradient["params"]


def test_fresh_connector_changes_nothing_bit_for_bit(fresh):
    before, after, _ = fresh
    assert np.asarray(before.grid).tobytes() == np.asarray(after.grid).tobytes()


def test_both_zero_linears_learn_from_the_first_step_on(fresh):
    _, _, gradient = fresh
    for name in ("zero", "dit_zero"):
        assert np.abs(gradient[name]["kernel"]).max() > 1e-3, name


def test_bfloat16_fresh_connector_changes_nothing_bit_for_bit():
    hidden, tokens = inputs()
    net = CanvasConnector(dataclasses.replace(CONFIG, dtype="bfloat16"))
    tokens = tokens.replace(grid=tokens.grid.astype(jnp.bfloat16))
    params = fresh_params(net, hidden, tokens)
    out = jit(net.apply)(params, hidden.astype(jnp.bfloat16), tokens)
    assert np.asarray(out.grid).tobytes() == np.asarray(tokens.grid).tobytes()


def test_reference_tokens_time_and_private_parts_are_left_alone():
    hidden, tokens = inputs()
    tokens = tokens.replace(reference=jnp.ones((2, 5, 64)), private=(jnp.ones(3), None))
    net = CanvasConnector(CONFIG)
    params = random_params(net, hidden, tokens)
    out = jit(net.apply)(params, hidden, tokens)
    assert np.abs(out.grid - tokens.grid).max() > 0.1
    same = jax.tree.map(np.array_equal, out.replace(grid=None), tokens.replace(grid=None))
    assert jax.tree.all(same)


def test_frames_share_one_block_that_sees_one_frame_at_a_time():
    hidden, tokens = inputs(canvas=(4, 4, 6))
    net = CanvasConnector(CONFIG)
    params = random_params(net, hidden, tokens)
    add = jit(lambda tokens: net.apply(params, tokens, jnp.zeros((2, 4, 4, 6, 64)), method="add").grid)
    base, changed = add(tokens), add(tokens.replace(grid=tokens.grid.at[:, 1].add(1.0)))
    differs = np.abs(base - changed).max(axis=(0, 2, 3, 4)) > 0
    assert differs.tolist() == [False, True, False, False]


def test_canvas_tokens_of_all_keyframes_see_each_other_both_ways():
    hidden, tokens = inputs()
    net = CanvasConnector(CONFIG)
    params = random_params(net, hidden, tokens)
    read = jit(lambda hidden: net.apply(params, hidden, method="read"))
    for place in ((0, 0, 0, 0), (0, 1, 1, 2)):
        moved = np.abs(read(hidden) - read(hidden.at[place].multiply(-1.0))).max(axis=-1)
        assert (moved[0] > 0).all()
        assert (moved[1] == 0).all()


def test_without_dit_block_the_tokens_get_the_interpolated_canvas():
    config = dataclasses.replace(CONFIG, dit_block=False)
    hidden, tokens = inputs()
    net = CanvasConnector(config)
    params = random_params(net, hidden, tokens)
    assert set(params["params"]) == {"norm", "project", "block", "zero"}
    canvas = net.apply(params, hidden, method="read")
    out = net.apply(params, tokens, canvas, method="add")
    np.testing.assert_allclose(out.grid, tokens.grid + linear_resize(canvas, (4, 4, 6)), rtol=1e-6)


def test_without_vanilla_block_every_canvas_token_is_projected_by_itself():
    config = dataclasses.replace(CONFIG, vanilla_block=False)
    hidden, tokens = inputs()
    net = CanvasConnector(config)
    params = random_params(net, hidden, tokens)["params"]
    assert set(params) == {"norm", "zero", "time", "dit", "dit_zero"}
    read = net.apply({"params": params}, hidden, method="read")
    hidden, params = np.asarray(hidden), jax.tree.map(np.asarray, params)
    normed = hidden / np.sqrt(np.mean(np.square(hidden), axis=-1, keepdims=True) + 1e-6) * params["norm"]["scale"]
    np.testing.assert_allclose(read, normed @ params["zero"]["kernel"] + params["zero"]["bias"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("time_modulation", [True, False])
def test_noise_level_matters_only_with_time_modulation(time_modulation):
    net = CanvasConnector(dataclasses.replace(CONFIG, time_modulation=time_modulation))
    hidden, tokens = inputs()
    params = random_params(net, hidden, tokens)
    assert ("time" in params["params"]) == time_modulation
    apply = jit(lambda tokens: net.apply(params, hidden, tokens).grid)
    one, other = apply(tokens), apply(tokens.replace(time=tokens.time / 2))
    assert np.array_equal(one, other) != time_modulation


def test_canvas_fused_before_patchification_is_added_to_the_latents_and_not_to_the_tokens():
    config = dataclasses.replace(CONFIG, fuse="before_patchify", latent_channels=5)
    hidden, tokens = inputs()
    net = CanvasConnector(config)
    params = random_params(net, hidden, tokens)
    canvas = net.apply(params, hidden, method="read")
    assert canvas.shape == (2, 2, 2, 3, 5)
    latents = jnp.asarray(random(2, 4, 8, 12, 5))
    fused = net.apply(params, latents, canvas, method="add_to_latents")
    np.testing.assert_allclose(fused, latents + linear_resize(canvas, (4, 8, 12)), rtol=1e-6)
    add = jit(lambda canvas: net.apply(params, tokens, canvas, method="add").grid)
    assert np.array_equal(add(canvas), add(canvas + 1.0))


def test_canvas_fused_after_patchification_leaves_the_latents_alone():
    hidden, tokens = inputs()
    net = CanvasConnector(CONFIG)
    latents = jnp.asarray(random(2, 4, 8, 12, 5))
    params = random_params(net, hidden, tokens)
    out = net.apply(params, latents, jnp.ones((2, 2, 2, 3, 64)), method="add_to_latents")
    assert np.array_equal(out, latents)


@pytest.mark.parametrize(
    "change",
    [{"width": 60}, {"vanilla_width": 40}, {"fuse": "before_patchify"}],
    ids=lambda change: "-".join(map(str, change.values())),
)
def test_canvas_configs_that_do_not_fit_together_raise(change):
    with pytest.raises(ValueError, match="CanvasConnectorConfig"):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.torch
@pytest.mark.parametrize("grid", [(5, 4, 7), (2, 3, 3), (7, 1, 2), (3, 3, 4)], ids=str)
def test_interpolation_equals_torch(torch, grid):
    x = random(2, 3, 3, 4, 5)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x).movedim(-1, 1), size=grid, mode="trilinear", align_corners=False
    ).movedim(1, -1)
    np.testing.assert_allclose(linear_resize(jnp.asarray(x), grid), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_interpolation_to_the_same_grid_is_the_identity_and_keeps_bfloat16():
    x = jnp.asarray(random(1, 3, 4, 5), jnp.bfloat16)
    assert linear_resize(x, (3, 4)) is x
    assert linear_resize(x, (6, 4)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="one size per axis"):
        linear_resize(x, (3, 4, 5))


@pytest.mark.torch
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_context_connector_equals_a_torch_mlp(torch, activation):
    acts = {"gelu": torch.nn.GELU(), "gelu_tanh": torch.nn.GELU(approximate="tanh"), "silu": torch.nn.SiLU()}
    mlp = torch.nn.Sequential(torch.nn.Linear(12, 48), acts[activation], torch.nn.Linear(48, 7))
    x = random(2, 5, 12)
    params = {
        name: {"kernel": jnp.asarray(layer.weight.detach().numpy().T), "bias": jnp.asarray(layer.bias.detach().numpy())}
        for name, layer in (("fc1", mlp[0]), ("fc2", mlp[2]))
    }
    out = ContextConnector(ContextConnectorConfig(out_width=7, activation=activation)).apply(
        {"params": params}, jnp.asarray(x)
    )
    with torch.no_grad():
        assert relative(out, mlp(torch.from_numpy(x)).numpy()) <= 1e-6


def test_context_dropout_drops_a_tenth_of_the_hidden_layer_in_training_only():
    net = ContextConnector(ContextConnectorConfig(out_width=1, hidden=10000))
    x = jnp.ones((1, 1, 3))
    params = {
        "fc1": {"kernel": jnp.zeros((3, 10000)), "bias": jnp.full(10000, 20.0)},
        "fc2": {"kernel": jnp.full((10000, 1), 1 / 10000), "bias": jnp.zeros(1)},
    }
    apply = lambda **kwargs: float(net.apply({"params": params}, x, **kwargs)[0, 0, 0])  # noqa: E731
    assert apply() == pytest.approx(20.0, rel=1e-5)
    kept = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}
    assert apply(**kept) == pytest.approx(20.0, rel=0.02)
    assert apply(**kept) != apply()


def test_context_connector_refuses_another_width_and_bad_configs():
    net = ContextConnector(ContextConnectorConfig(out_width=7, in_width=12))
    with pytest.raises(ValueError, match="width 12, not 11"):
        net.init(jax.random.key(0), jnp.zeros((1, 2, 11)))
    with pytest.raises(ValueError, match="ContextConnectorConfig"):
        ContextConnectorConfig(out_width=7, dropout=1.0)


def test_an_identity_passes_states_on_and_the_first_real_ones_can_be_left_out():
    net = ContextConnector(ContextConnectorConfig(out_width=4, kind="identity", skip=2))
    x = jnp.asarray(random(1, 3, 4))
    assert not net.init(jax.random.key(0), x)
    assert np.array_equal(net.apply({}, x), x)
    mask = jnp.array([[True, True, True, True, False], [False, True, True, True, True]])  # padding right and left
    expected = [[False, False, True, True, False], [False, False, False, True, True]]
    assert np.array_equal(without_first(mask, 2), expected)
    assert without_first(mask, 0) is mask


def test_context_output_norm_gives_states_of_unit_size():
    net = ContextConnector(ContextConnectorConfig(out_width=16, out_norm=True))
    x = 50.0 * jnp.asarray(random(1, 3, 4))
    out = net.apply(nn.meta.unbox(net.init(jax.random.key(0), x)), x)
    np.testing.assert_allclose(np.mean(np.square(out), -1), 1.0, rtol=1e-3)


def test_queries_stand_after_the_text_and_are_always_seen():
    hidden, mask = jnp.asarray(random(2, 3, 8)), jnp.array([[True, True, False], [True, False, False]])
    queries = jnp.asarray(random(2, 4, 8, seed=1))
    text = joined(States(hidden, mask), States(queries, jnp.ones((2, 4), bool)))
    assert np.array_equal(text.states[:, :3], hidden)
    assert np.array_equal(text.states[:, 3:], queries)
    assert np.array_equal(text.mask, [[1, 1, 0, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1, 1]])


def test_queries_are_numbered_like_text():
    net = Queries(QueriesConfig(count=4), width=8)
    params = net.init(jax.random.key(0))
    assert net.apply(params).shape == (1, 1, 4, 8)
    positions = canvas_positions(jnp.array([5, 9]), (1, 1, 4), net.config.positions)
    assert np.array_equal(positions, np.broadcast_to([[5, 6, 7, 8], [9, 10, 11, 12]], (3, 2, 4)))
    with pytest.raises(ValueError, match="at least 1"):
        QueriesConfig(count=0)
