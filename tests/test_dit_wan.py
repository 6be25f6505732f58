"""Wan against diffusers: values, gradients, names and shapes; and what the port adds to it."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dit_torch_support import (
    assert_gradients_equal,
    check_manifest,
    dtypes_in_bfloat16,
    imported,
    random,
    random_like,
    relative,
    shapes,
    torch_gradients,
)
from vae_support import FAST_COMPILE

from metacanvas_jax.dit.wan.network import (
    Wan,
    WanConfig,
    wan2_1_t2v_1_3b,
    wan2_1_t2v_14b,
    wan2_2_ti2v_5b,
)
from metacanvas_jax.dit.wan.table import fresh, table
from metacanvas_jax.nn.stack import REMAT_CHOICES
from metacanvas_jax.types import Given, States

TINY = WanConfig(latent_channels=6, heads=2, head_width=20, mlp=48, layers=2, context_width=24, freq=32)
LENGTH = 5  # context tokens


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def build(config):
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=config.patch,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_width,
        in_channels=config.latent_channels + config.extra_channels,
        out_channels=config.latent_channels,
        text_dim=config.context_width,
        freq_dim=config.freq,
        ffn_dim=config.mlp,
        num_layers=config.layers,
        cross_attn_norm=config.cross_norm,
        eps=config.eps,
    )


def inputs(config=TINY, grid=(3, 4, 6), references=(), batch=2):
    latents = jnp.asarray(random(batch, *grid, config.latent_channels, seed=1))
    text = States(jnp.asarray(random(batch, LENGTH, config.context_width, seed=2)))
    given = Given(
        reference=tuple(
            jnp.asarray(random(batch, frames, *grid[1:], config.latent_channels, seed=3 + i))
            for i, frames in enumerate(references)
        ),
    )
    if config.extra_channels:
        given = given.replace(channels=jnp.asarray(random(batch, *grid, config.extra_channels, seed=7)))
    return latents, jnp.array([0.999, 0.3], jnp.float32)[:batch], text, given


def run_torch(torch, torch_net, latents, time, text):
    """The velocity ``[b t h w c]`` with ``time`` given per sample, or per frame and then spread over its tokens."""
    levels = 1000.0 * np.asarray(time)
    if levels.ndim == 2:
        levels = np.repeat(levels, latents.shape[2] * latents.shape[3] // 4, axis=1)
    out = torch_net(
        hidden_states=torch.from_numpy(np.array(latents)).permute(0, 4, 1, 2, 3),
        timestep=torch.from_numpy(levels),
        encoder_hidden_states=torch.from_numpy(np.array(text.states)),
    ).sample
    return out.permute(0, 2, 3, 4, 1)


@pytest.fixture(scope="module")
def pair(torch, tmp_path_factory):
    """The tiny network in torch, and its parameters through the importer."""
    from torch_support import randomize

    torch_net = randomize(build(TINY))
    latents, _, *conditions = inputs()
    params = imported(Wan(TINY), table(TINY), torch_net, tmp_path_factory.mktemp("wan"), latents, *conditions)
    return torch_net, params


@pytest.fixture(scope="module")
def random_params():
    """Parameters that need no torch, all of them random."""
    latents, _, *conditions = inputs()
    return random_like(shapes(Wan(TINY), latents, *conditions))


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def velocity(config, params, latents, time, *conditions):
    return Wan(config).apply({"params": params}, latents, time, *conditions)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def embed(config, params, latents, time, text, given):
    return Wan(config).apply({"params": params}, latents, time, text, given, method="embed")


def per_frame(time, frames):
    """The noise levels of first-frame image-to-video."""
    return jnp.pad(jnp.repeat(time[:, None], frames - 1, axis=1), ((0, 0), (1, 0)))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("grid", "by_frame"),
    [((1, 6, 10), False), ((3, 4, 6), False), ((5, 2, 6), True)],
    ids=["one_frame", "three_frames", "five_frames_each_with_its_time"],
)
def test_velocity_equals_diffusers(torch, pair, grid, by_frame):
    torch_net, params = pair
    latents, time, text, given = inputs(grid=grid)
    if by_frame:
        time = per_frame(time, grid[0])
    with torch.no_grad():
        expected = run_torch(torch, torch_net, latents, time, text).numpy()
    assert relative(velocity(TINY, params, latents, time, text, given), expected) <= 2e-5


@pytest.mark.torch
def test_references_are_clean_frames_in_front_and_leave_the_velocity(torch, pair):
    torch_net, params = pair
    latents, time, text, given = inputs(grid=(2, 4, 6), references=(1, 2))
    frames = jnp.concatenate([*given.reference, latents], axis=1)
    levels = jnp.pad(jnp.repeat(time[:, None], 2, axis=1), ((0, 0), (3, 0)))
    with torch.no_grad():
        expected = run_torch(torch, torch_net, frames, levels, text).numpy()[:, 3:]
    assert relative(velocity(TINY, params, latents, time, text, given), expected) <= 2e-5


@pytest.mark.torch
def test_without_cross_norm_and_with_more_input_channels_equals_diffusers(torch, tmp_path):
    """A widened input layer is one convolution over all channels; here its new rows are random, as after training."""
    from torch_support import randomize

    config = dataclasses.replace(TINY, extra_channels=3, cross_norm=False, layers=1)
    torch_net = randomize(build(config), seed=5)
    latents, time, text, given = inputs(config, (1, 4, 6))
    joined = jnp.concatenate([latents, given.channels], axis=-1)
    with torch.no_grad():
        expected = run_torch(torch, torch_net, joined, time, text).numpy()

        kernel = torch_net.patch_embedding.weight
        first, extra = kernel[:, : config.latent_channels], kernel[:, config.latent_channels :].numpy()
        torch_net.patch_embedding.weight = torch.nn.Parameter(first.clone())
    narrow = dataclasses.replace(config, extra_channels=0)
    params = imported(Wan(narrow), table(narrow), torch_net, tmp_path, latents, text, Given())
    params["extra_in"] = {"kernel": jnp.asarray(extra.reshape(config.width, -1).T)}
    assert relative(velocity(config, params, latents, time, text, given), expected) <= 2e-5


@pytest.mark.torch
def test_padded_context_is_zeroed_and_attended_to_as_in_the_reference(torch, pair):
    torch_net, params = pair
    latents, time, text, _ = inputs(grid=(1, 6, 10))
    mask = jnp.array([[True] * 5, [True] * 2 + [False] * 3])
    zeroed = text.replace(states=text.states * mask[:, :, None].astype(jnp.float32))
    with torch.no_grad():
        expected = run_torch(torch, torch_net, latents, time, zeroed).numpy()
    assert relative(velocity(TINY, params, latents, time, text.replace(mask=mask)), expected) <= 2e-5


@pytest.mark.torch
def test_every_parameter_gradient_equals_torch_autograd(torch, pair):
    torch_net, params = pair
    latents, time, text, given = inputs(grid=(3, 4, 6))
    time = per_frame(time, 3)
    weights = random(*latents.shape, seed=9)
    torch_net.zero_grad()
    (run_torch(torch, torch_net, latents, time, text) * torch.from_numpy(weights)).sum().backward()

    def loss(params):
        return jnp.sum(Wan(TINY).apply({"params": params}, latents, time, text, given) * weights)

    assert_gradients_equal(
        jax.jit(jax.grad(loss), compiler_options=FAST_COMPILE)(params), torch_gradients(table(TINY), torch_net), 1e-4
    )


@pytest.mark.torch
@pytest.mark.parametrize(
    ("config", "parameters"),
    [(wan2_2_ti2v_5b(), 4_999_787_712), (wan2_1_t2v_1_3b(), 1_418_996_800), (wan2_1_t2v_14b(), 14_288_491_584)],
    ids=["2.2_ti2v_5b", "2.1_t2v_1.3b", "2.1_t2v_14b"],
)
def test_full_size_names_and_shapes_are_those_of_the_published_model(torch, config, parameters):
    latents, _, *conditions = inputs(config, (1, 2, 2), batch=1)
    check_manifest(Wan(config), table(config), lambda: build(config), latents, *conditions, parameters=parameters)


def test_one_noise_level_for_all_frames_equals_the_same_level_per_frame(random_params):
    latents, time, text, given = inputs()
    expected = velocity(TINY, random_params, latents, time, text, given)
    actual = velocity(TINY, random_params, latents, jnp.repeat(time[:, None], 3, axis=1), text, given)
    assert relative(actual, expected) <= 1e-5


def test_new_input_channels_change_nothing_bit_for_bit(random_params):
    config = dataclasses.replace(TINY, extra_channels=7)
    latents, time, text, given = inputs(config, references=(1,))
    init = jax.jit(
        lambda: Wan(config).init(jax.random.key(0), latents, time, text, given)["params"]["extra_in"],
        compiler_options=FAST_COMPILE,
    )
    extra = nn.meta.unbox(init())
    assert fresh(config) == ["extra_in/kernel"]
    assert extra["kernel"].shape == (4 * 7, TINY.width)

    params = {**random_params, "extra_in": extra}
    wide = embed(config, params, latents, time, text, given)
    narrow = embed(TINY, random_params, latents, time, text, given.replace(channels=None))
    for name in ("grid", "reference"):
        np.testing.assert_array_equal(getattr(wide, name), getattr(narrow, name))

    params["extra_in"] = jax.tree.map(jnp.ones_like, extra)
    trained = embed(config, params, latents, time, text, given)
    assert relative(trained.grid, narrow.grid) > 1e-3
    np.testing.assert_array_equal(trained.reference, narrow.reference)  # channels of the noisy frames only: zeros here
    covering = jnp.concatenate([jnp.ones((2, 1, 4, 6, 7), jnp.float32), given.channels], axis=1)
    covered = embed(config, params, latents, time, text, given.replace(channels=covering))
    np.testing.assert_allclose(covered.grid, trained.grid, rtol=1e-6)
    np.testing.assert_allclose(covered.reference, narrow.reference + 28.0, rtol=1e-5)


def test_context_padding_is_invisible_when_masked(random_params):
    config = dataclasses.replace(TINY, mask_context=True)
    latents, time, text, given = inputs(config, (1, 6, 10))
    mask = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
    text = text.replace(mask=mask)
    padded = States(
        jnp.pad(text.states, ((0, 0), (0, 3), (0, 0)), constant_values=7.0), jnp.pad(mask, ((0, 0), (0, 3)))
    )
    short, long = (velocity(config, random_params, latents, time, t, given) for t in (text, padded))
    assert relative(long, short) <= 2e-6
    seen = velocity(config, random_params, latents, time, padded.replace(mask=jnp.ones_like(padded.mask)), given)
    assert relative(seen, short) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": jnp.zeros((2, 3, 5, 6, 6))}, r"\[3, 5, 6, 6\]"),
        ({"latents": jnp.zeros((2, 3, 4, 6, 5))}, "6 channels"),
        ({"states": jnp.zeros((2, 5, 23))}, "width 24, not 23"),
        ({"channels": jnp.zeros((2, 3, 4, 6, 1))}, "extra_channels"),
        ({"reference": (jnp.zeros((2, 1, 4, 8, 6)),)}, r"reference 0 .*\[4, 8, 6\]"),
        ({"guidance": jnp.zeros(2)}, "guidance"),
    ],
    ids=["odd_rows", "channels", "context_width", "extra_channels", "reference_size", "guidance"],
)
def test_inputs_that_wan_cannot_use_are_refused(change, message):
    latents, time, text, given = inputs()
    change = dict(change)
    latents = change.pop("latents", latents)
    text = text.replace(states=change.pop("states", text.states))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(Wan(TINY).init, jax.random.key(0), latents, time, text, given.replace(**change))


@pytest.mark.parametrize("frames", [2, 4], ids=["neither_noisy", "nor_all"])
def test_channels_of_another_number_of_frames_are_refused(frames):
    config = dataclasses.replace(TINY, extra_channels=2)
    latents, time, text, given = inputs(config, references=(2,))
    given = given.replace(channels=jnp.zeros((2, frames, 4, 6, 2)))
    with pytest.raises(ValueError, match=r"3 noisy frames \(or 5 with the references\)"):
        jax.eval_shape(Wan(config).init, jax.random.key(0), latents, time, text, given)


@pytest.mark.parametrize("remat", REMAT_CHOICES)
def test_computes_in_bfloat16_with_float32_parameters_and_velocity(remat):
    config = dataclasses.replace(TINY, dtype="bfloat16", remat=remat)
    latents, _, *conditions = inputs(config)
    assert dtypes_in_bfloat16(Wan(config), latents, *conditions) == ({"float32"}, "bfloat16", "float32")
