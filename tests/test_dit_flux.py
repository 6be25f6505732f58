"""FLUX against diffusers: values, gradients, names and shapes; and what the port adds to it."""

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

from metacanvas_jax.dit.flux.network import Flux, FluxConfig, flux_dev, flux_kontext_dev
from metacanvas_jax.dit.flux.table import fresh, table
from metacanvas_jax.types import Given, States

TINY = FluxConfig(
    latent_channels=4,
    layers_double=2,
    layers_single=2,
    heads=2,
    head_width=16,
    context_width=20,
    pooled_width=12,
    rope_axes=(4, 6, 6),
)
LENGTH = 5  # context tokens


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def build(config):
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * config.latent_channels,
        num_layers=config.layers_double,
        num_single_layers=config.layers_single,
        attention_head_dim=config.head_width,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context_width,
        pooled_projection_dim=config.pooled_width,
        guidance_embeds=config.guidance,
        axes_dims_rope=config.rope_axes,
    )


def inputs(config, size=(8, 12), references=(), batch=2):
    latents = random(batch, 1, *size, config.latent_channels, seed=1)
    text = States(jnp.asarray(random(batch, LENGTH, config.context_width, seed=2)))
    given = Given(
        reference=tuple(
            jnp.asarray(random(batch, 1, *side, config.latent_channels, seed=3 + i))
            for i, side in enumerate(references)
        ),
        pooled=jnp.asarray(random(batch, config.pooled_width, seed=8)) if config.pooled == "given" else None,
        guidance=jnp.array([2.5, 3.5], jnp.float32)[:batch] if config.guidance else None,
    )
    return jnp.asarray(latents), jnp.array([0.9, 0.25], jnp.float32)[:batch], text, given


def run_torch(torch, torch_net, latents, time, text, given, pooled=None):
    """The target's velocity ``[b 1 h w c]``, packed and numbered as diffusers ``FluxKontextPipeline`` does."""
    tokens, ids = [], []
    for index, z in enumerate((latents, *given.reference)):
        z = torch.from_numpy(np.array(z[:, 0])).permute(0, 3, 1, 2)
        batch, channels, rows, columns = z.shape
        z = z.view(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 1, 3, 5)
        tokens.append(z.reshape(batch, rows * columns // 4, 4 * channels))
        grid = torch.meshgrid(torch.arange(rows // 2), torch.arange(columns // 2), indexing="ij")
        ids.append(torch.stack([torch.full_like(grid[0], index), *grid], dim=-1).reshape(-1, 3).float())
    out = torch_net(
        hidden_states=torch.cat(tokens, 1),
        encoder_hidden_states=torch.from_numpy(np.array(text.states)),
        pooled_projections=torch.from_numpy(np.array(given.pooled if pooled is None else pooled)),
        timestep=torch.from_numpy(np.array(time)),
        guidance=None if given.guidance is None else torch.from_numpy(np.array(given.guidance)),
        img_ids=torch.cat(ids),
        txt_ids=torch.zeros(LENGTH, 3),
    ).sample[:, : tokens[0].shape[1]]
    batch, _, rows, columns, channels = latents.shape
    out = out.view(batch, rows // 2, columns // 2, channels, 2, 2).permute(0, 1, 4, 2, 5, 3)
    return out.reshape(batch, 1, rows, columns, channels)


@pytest.fixture(scope="module")
def kontext(torch, tmp_path_factory):
    """The tiny guided network in torch, and its parameters through the importer."""
    from torch_support import randomize

    torch_net = randomize(build(TINY))
    latents, _, *conditions = inputs(TINY)
    params = imported(Flux(TINY), table(TINY), torch_net, tmp_path_factory.mktemp("flux"), latents, *conditions)
    return torch_net, params


@pytest.fixture(scope="module")
def random_params():
    """Parameters that need no torch, all of them random."""
    latents, _, *conditions = inputs(TINY)
    return random_like(shapes(Flux(TINY), latents, *conditions))


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def velocity(config, params, latents, time, *conditions):
    return Flux(config).apply({"params": params}, latents, time, *conditions)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("size", "references"),
    [((8, 12), [(6, 10)]), ((6, 10), []), ((4, 6), [(8, 2), (6, 6)])],
    ids=["reference_of_another_size", "odd_token_count", "two_references"],
)
def test_velocity_equals_diffusers(torch, kontext, size, references):
    torch_net, params = kontext
    latents, time, *conditions = inputs(TINY, size, references)
    with torch.no_grad():
        expected = run_torch(torch, torch_net, latents, time, *conditions).numpy()
    actual = velocity(TINY, params, latents, time, *conditions)
    assert relative(actual, expected) <= 2e-5


@pytest.mark.torch
def test_without_guidance_and_zero_pooled_vector_equals_diffusers(torch, tmp_path):
    from torch_support import randomize

    config = dataclasses.replace(TINY, guidance=False, pooled="zeros", layers_double=1, layers_single=1)
    torch_net = randomize(build(config), seed=5)
    latents, time, *conditions = inputs(config, (4, 6))
    with torch.no_grad():
        zeros = np.zeros((2, config.pooled_width), np.float32)
        expected = run_torch(torch, torch_net, latents, time, *conditions, zeros).numpy()
    params = imported(Flux(config), table(config), torch_net, tmp_path, latents, *conditions)
    actual = velocity(config, params, latents, time, *conditions)
    assert relative(actual, expected) <= 2e-5


@pytest.mark.torch
def test_every_parameter_gradient_equals_torch_autograd(torch, kontext):
    torch_net, params = kontext
    latents, time, *conditions = inputs(TINY, references=[(6, 10)])
    weights = random(*latents.shape, seed=9)
    torch_net.zero_grad()
    (run_torch(torch, torch_net, latents, time, *conditions) * torch.from_numpy(weights)).sum().backward()

    def loss(params):
        return jnp.sum(Flux(TINY).apply({"params": params}, latents, time, *conditions) * weights)

    assert_gradients_equal(
        jax.jit(jax.grad(loss), compiler_options=FAST_COMPILE)(params), torch_gradients(table(TINY), torch_net), 2e-4
    )


@pytest.mark.torch
@pytest.mark.parametrize("preset", [flux_kontext_dev, flux_dev])
def test_full_size_names_and_shapes_are_those_of_the_published_model(torch, preset):
    config = preset()
    latents, _, *conditions = inputs(config, (2, 2), batch=1)
    check_manifest(Flux(config), table(config), lambda: build(config), latents, *conditions, parameters=11_901_408_320)


def test_context_padding_is_invisible_when_masked(random_params):
    config = dataclasses.replace(TINY, mask_context=True)
    latents, time, text, given = inputs(config, (4, 6))
    mask = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
    text = text.replace(mask=mask)
    padded = States(
        jnp.pad(text.states, ((0, 0), (0, 3), (0, 0)), constant_values=7.0), jnp.pad(mask, ((0, 0), (0, 3)))
    )
    short, long = (velocity(config, random_params, latents, time, t, given) for t in (text, padded))
    assert relative(long, short) <= 2e-6
    seen = velocity(config, random_params, latents, time, padded.replace(mask=jnp.ones_like(padded.mask)), given)
    assert relative(seen, short) > 1e-3


def test_learned_pooled_vector_starts_as_zeros_and_reads_only_unmasked_context(random_params):
    learned, zeros = (dataclasses.replace(TINY, pooled=pooled) for pooled in ("learned", "zeros"))
    latents, time, text, given = inputs(zeros, (4, 6))
    text = text.replace(mask=jnp.array([[True] * 5, [True] * 3 + [False] * 2]))
    init = jax.jit(
        lambda: Flux(learned).init(jax.random.key(0), latents, time, text, given)["params"]["pool"],
        compiler_options=FAST_COMPILE,
    )
    pool = nn.meta.unbox(init())
    assert {f"pool/{name}" for name in pool} == set(fresh(learned))

    @functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
    def vector(config, params, text):
        return Flux(config).apply({"params": params}, latents, time, text, given, method="embed").private.vector

    start = {**random_params, "pool": pool}
    np.testing.assert_array_equal(vector(learned, start, text), vector(zeros, random_params, text))
    trained = {**random_params, "pool": random_like(pool)}
    expected = vector(learned, trained, text)
    other = text.replace(states=text.states.at[1, 3:].set(9.0))
    np.testing.assert_allclose(vector(learned, trained, other), expected, rtol=1e-6)
    other = text.replace(states=text.states.at[1, 2].set(9.0))
    assert relative(vector(learned, trained, other), expected) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance": None}, "guidance must be set"),
        ({"pooled": None}, "pooled must be set"),
        ({"channels": jnp.zeros((2, 1, 4, 6, 4))}, "Given.channels"),
        ({"reference": (jnp.zeros((2, 1, 5, 6, 4)),)}, r"reference 0 .*\[1, 5, 6, 4\]"),
        ({"states": jnp.zeros((2, 5, 21))}, "width 20, not 21"),
    ],
    ids=["no_guidance", "no_pooled", "channels", "odd_reference", "context_width"],
)
def test_conditions_that_flux_cannot_use_are_refused(change, message):
    latents, time, text, given = inputs(TINY, (4, 6))
    text, given = (text.replace(**change), given) if "states" in change else (text, given.replace(**change))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(Flux(TINY).init, jax.random.key(0), latents, time, text, given)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rope_axes": (4, 6, 8)}, "rope_axes"), ({"layers_single": 0}, "single blocks")],
    ids=["rope_axes", "layers"],
)
def test_configs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_computes_in_bfloat16_with_float32_parameters_and_velocity(remat):
    config = dataclasses.replace(TINY, dtype="bfloat16", remat=remat)
    latents, _, *conditions = inputs(config)
    assert dtypes_in_bfloat16(Flux(config), latents, *conditions) == ({"float32"}, "bfloat16", "float32")
