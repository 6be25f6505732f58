"""What every diffusion transformer promises to the connectors and samplers (``dit/base.py``)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dit_support import BACKBONES, draw, finish
from vae_support import FAST_COMPILE

from metacanvas_jax.connectors.canvas import CanvasConnector, CanvasConnectorConfig
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.nn.resize import linear_resize
from metacanvas_jax.paint.sampling import canvas_features
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh, on_mesh, put_batch
from metacanvas_jax.parallel.rules import shardings
from metacanvas_jax.types import Plan

MLLM = 12  # width of the MLLM
jit = functools.partial(jax.jit, compiler_options=FAST_COMPILE)


class Case:
    """One backbone, compiled once."""

    def __init__(self, backbone):
        self.backbone, self.net, self.params = backbone, backbone.build(), backbone.params()
        self.latents, self.time, self.text, self.given = backbone.inputs()
        self.embed = jit(lambda *inputs: self.net.apply({"params": self.params}, *inputs, method="embed"))
        self.finish = jit(lambda *inputs: finish(self.net, self.params, *inputs))
        self.tokens = self.embed(self.latents, self.time, self.text, self.given)
        self.velocity = self.finish(self.tokens, self.text)
        self.canvas_hidden = jnp.asarray(draw(2, 2, 2, 3, MLLM, seed=5))

    def add_canvas(self, *, random: bool):
        """Tokens with a canvas on them, by a fresh connector or one with random parameters."""
        net = CanvasConnector(CanvasConnectorConfig(self.net.width, vanilla_width=16, vanilla_head_width=16))
        init = jit(lambda *inputs: nn.meta.unbox(net.init(jax.random.key(0), *inputs)))
        params = init(self.canvas_hidden, self.tokens)
        if random:
            params = jax.tree.map(lambda x: jnp.asarray(0.3 * draw(*x.shape, seed=x.size)), params)
        return jit(net.apply)(params, self.canvas_hidden, self.tokens)


@pytest.fixture(scope="module", params=BACKBONES)
def case(request):
    return Case(BACKBONES[request.param])


def test_tokens_stand_on_the_latent_grid_divided_by_the_patch(case):
    t, h, w, _ = case.backbone.grid
    o, p, q = case.net.patch
    assert case.tokens.grid.shape == (2, t // o, h // p, w // q, case.net.width)
    assert np.array_equal(case.tokens.time, case.time)


def test_velocity_has_the_shape_of_the_latents_and_depends_on_every_input(case):
    assert case.velocity.shape == case.latents.shape
    assert np.isfinite(case.velocity).all()
    for changed in (
        (case.latents.at[:, -1, -1, -1, -1].add(1.0), case.time, case.text),
        (case.latents, 0.5 * case.time, case.text),
        (case.latents, case.time, case.text.replace(states=-case.text.states)),
    ):
        velocity = case.finish(case.embed(*changed, case.given), changed[2])
        assert np.abs(velocity - case.velocity).max() > 1e-3


def test_samples_do_not_see_each_other(case):
    latents = case.latents.at[1].add(1.0)
    text = case.text.replace(states=case.text.states.at[1].add(1.0))
    velocity = case.finish(case.embed(latents, case.time, text, case.given), text)
    assert np.array_equal(velocity[0], case.velocity[0])
    assert not np.array_equal(velocity[1], case.velocity[1])


def test_padding_of_the_context_is_never_seen(case):
    padded = case.text.replace(states=case.text.states.at[1, 4:].set(50.0))
    velocity = case.finish(case.embed(case.latents, case.time, padded, case.given), padded)
    np.testing.assert_allclose(velocity, case.velocity, rtol=0, atol=1e-6 * np.abs(case.velocity).max())


def test_fresh_canvas_connector_changes_nothing_bit_for_bit(case):
    tokens = case.add_canvas(random=False)
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), tokens, case.tokens)
    assert jax.tree.all(same)


def test_trained_canvas_reaches_the_velocity_and_touches_the_grid_only(case):
    tokens = case.add_canvas(random=True)
    assert jax.tree.all(jax.tree.map(np.array_equal, tokens.replace(grid=None), case.tokens.replace(grid=None)))
    velocity = case.finish(tokens, case.text)
    assert np.abs(velocity - case.velocity).max() > 1e-2 * np.abs(case.velocity).max()


def test_canvas_features_are_what_the_canvas_adds_whatever_the_task_gives(case):
    config = CanvasConnectorConfig(case.net.width, vanilla_block=False, dit_block=False)
    model = MetaCanvas(dit=case.net, canvas_connector=CanvasConnector(config))
    canvas = jnp.asarray(draw(2, 1, 2, 3, case.net.width, seed=6))
    apply = jit(functools.partial(model.apply, method=canvas_features))
    inputs = (case.latents, case.time, Plan(case.text, canvas), case.given)
    features = apply({"params": {"dit": case.params}}, *inputs)
    np.testing.assert_allclose(features, linear_resize(canvas, case.tokens.grid.shape[1:4]), atol=1e-5)


def test_recomputed_blocks_have_the_same_gradients(case):
    def gradient(remat):
        net = case.backbone.build(remat=remat)

        def loss(params, grid):
            return jnp.sum(finish(net, params, case.tokens.replace(grid=grid), case.text) ** 2)

        return jit(jax.grad(loss, argnums=(0, 1)))(case.params, case.tokens.grid)

    kept, recomputed = gradient("none"), gradient("full")
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(kept))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * scale)


def test_sharded_network_gives_the_same_velocity(case):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    layout = shardings(case.backbone.abstract(), mesh)
    params = jax.tree.map(jax.device_put, case.params, layout)
    split = {axis for x in jax.tree.leaves(layout) for part in x.spec if part for axis in np.atleast_1d(part)}
    assert {"fsdp", "context", "tensor"} <= split
    inputs = put_batch((case.latents, case.time, case.text, case.given), mesh)
    with on_mesh(mesh):
        apply = jit(lambda params, inputs: case.net.apply({"params": params}, *inputs))
        velocity = apply(params, inputs)
    np.testing.assert_allclose(velocity, case.velocity, rtol=0, atol=1e-5 * np.abs(case.velocity).max())


def test_bfloat16_computes_the_same_velocity_roughly_from_float32_parameters(case):
    net = case.backbone.build(dtype="bfloat16")
    apply = jit(lambda params: net.apply({"params": params}, case.latents, case.time, case.text, case.given))
    velocity = np.asarray(apply(case.params), np.float32)
    error = np.sqrt(np.mean((velocity - case.velocity) ** 2) / np.mean(np.square(case.velocity)))
    assert 1e-5 < error < 0.05
