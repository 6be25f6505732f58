"""SANA against diffusers: values, gradients, names and shapes; what it refuses; how a fresh network starts."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dit_torch_support import assert_gradients_equal, check_manifest, imported, random, relative, torch_gradients
from vae_support import FAST_COMPILE

from metacanvas_jax.dit.sana.network import Sana, SanaConfig, sana_1_5_1600m, sana_600m, sana_1600m
from metacanvas_jax.dit.sana.table import table
from metacanvas_jax.types import Given, States

TINY = SanaConfig(latent_channels=8, heads=4, head_width=16, cross_heads=2, layers=2, context_width=48, sample_size=8)
CASES = {
    "published": TINY,
    "qk_norm_and_positions": dataclasses.replace(TINY, qk_norm="across_heads", interpolation_scale=1.0),
    "patch_2": dataclasses.replace(TINY, patch=2),
}


jit = functools.partial(jax.jit, compiler_options=FAST_COMPILE)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def build(c: SanaConfig):
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=c.latent_channels,
        out_channels=c.latent_channels,
        num_attention_heads=c.heads,
        attention_head_dim=c.head_width,
        num_layers=c.layers,
        num_cross_attention_heads=c.cross_heads,
        cross_attention_head_dim=c.width // c.cross_heads,
        cross_attention_dim=c.width,
        caption_channels=c.context_width,
        mlp_ratio=c.mlp_ratio,
        sample_size=c.sample_size,
        patch_size=c.patch,
        interpolation_scale=c.interpolation_scale,
        qk_norm=None if c.qk_norm is None else "rms_norm_across_heads",
    )


def inputs(config, size=(6, 10), batch=2):  # neither square nor the sample size
    latents = jnp.asarray(random(batch, 1, *size, config.latent_channels, seed=1))
    mask = jnp.array([[True] * 7, [True] * 4 + [False] * 3])[:batch]
    text = States(jnp.asarray(random(batch, 7, config.context_width, seed=2)), mask)
    return latents, jnp.array([0.999, 0.2505], jnp.float32)[:batch], text


def run_torch(torch, torch_net, latents, time, text):
    mask = None if text.mask is None else torch.from_numpy(np.array(text.mask, np.int64))
    out = torch_net(
        torch.from_numpy(np.array(latents[:, 0])).permute(0, 3, 1, 2),
        encoder_hidden_states=torch.from_numpy(np.array(text.states)),
        timestep=torch.from_numpy(1000.0 * np.array(time)),
        encoder_attention_mask=mask,
    ).sample
    return out.permute(0, 2, 3, 1)[:, None]


@pytest.fixture(scope="module", params=CASES)
def pair(request, torch, tmp_path_factory):
    """A tiny network in torch, and its parameters through the importer."""
    from torch_support import randomize

    config = CASES[request.param]
    torch_net = randomize(build(config))
    latents, _, text = inputs(config)
    folder = tmp_path_factory.mktemp(request.param)
    return config, torch_net, imported(Sana(config), table(config), torch_net, folder, latents, text)


@pytest.mark.torch
@pytest.mark.parametrize("masked", [True, False], ids=["masked_captions", "no_mask"])
def test_velocity_equals_diffusers(torch, pair, masked):
    config, torch_net, params = pair
    latents, time, text = inputs(config)
    text = text if masked else text.replace(mask=None)
    with torch.no_grad():
        expected = run_torch(torch, torch_net, latents, time, text).numpy()
    actual = jit(Sana(config).apply)({"params": params}, latents, time, text)
    assert relative(actual, expected) <= 2e-5


@pytest.mark.torch
@pytest.mark.parametrize("pair", ["qk_norm_and_positions"], indirect=True)  # it has every kind of parameter
def test_every_parameter_gradient_equals_torch_autograd(torch, pair):
    config, torch_net, params = pair
    latents, time, text = inputs(config)
    weights = random(*latents.shape, seed=9)
    torch_net.zero_grad()
    (run_torch(torch, torch_net, latents, time, text) * torch.from_numpy(weights)).sum().backward()

    def loss(params):
        return jnp.sum(Sana(config).apply({"params": params}, latents, time, text) * weights)

    assert_gradients_equal(jit(jax.grad(loss))(params), torch_gradients(table(config), torch_net), 1e-4)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("preset", "parameters"), [(sana_1600m, 1_604_462_752), (sana_600m, 591_747_872), (sana_1_5_1600m, 1_604_641_952)]
)
def test_full_size_names_and_shapes_are_those_of_the_published_model(torch, preset, parameters):
    config = preset()
    latents, _, text = inputs(config, (2, 2), batch=1)
    check_manifest(Sana(config), table(config), lambda: build(config), latents, text, parameters=parameters)


@pytest.mark.torch
def test_every_transform_of_the_table_is_undone_exactly(torch, pair):
    config, torch_net, _ = pair
    tensors = torch_net.state_dict()
    for entry in table(config):
        tensor = tensors[entry.names(entry.tensors[-1])[0]].numpy()
        assert np.array_equal(entry.transform.backward(entry.transform.forward(tensor)), tensor), entry.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": jnp.zeros((2, 3, 4, 4, 8))}, r"\[3, 4, 4, 8\]: expected one frame"),
        ({"latents": jnp.zeros((2, 1, 4, 4, 7))}, r"\[1, 4, 4, 7\]: expected one frame, 8 channels"),
        ({"latents": jnp.zeros((2, 1, 4, 5, 8))}, r"\[1, 4, 5, 8\]: .* multiples of \(2, 2\)"),
        ({"time": jnp.zeros((2, 1))}, "one noise level per sample"),
        ({"states": jnp.zeros((2, 3, 47))}, "width 48, not 47"),
        ({"guidance": jnp.zeros(2)}, "Given.guidance"),
        ({"pooled": jnp.zeros((2, 5))}, "Given.pooled"),
        ({"channels": jnp.zeros((2, 1, 4, 4, 8))}, "Given.channels"),
        ({"reference": (jnp.zeros((2, 1, 4, 4, 8)),)}, "Given.reference"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_inputs_that_sana_cannot_use_raise(change, message):
    given = {"latents": jnp.zeros((2, 1, 4, 4, 8)), "time": jnp.zeros(2), "states": jnp.zeros((2, 3, 48))} | change
    latents, time, text = given.pop("latents"), given.pop("time"), States(given.pop("states"))
    with pytest.raises(ValueError, match=message):
        net = Sana(CASES["patch_2"])
        jax.eval_shape(lambda: net.init(jax.random.key(0), latents, time, text, Given(**given), method="embed"))


@pytest.mark.parametrize(
    "change",
    [
        {"cross_heads": 3},
        {"heads": 2, "head_width": 15, "interpolation_scale": 1.0},
        {"least_time": 0.0},
    ],
    ids=["cross_heads", "width_of_positions", "least_time"],
)
def test_configs_that_do_not_fit_together_raise(change):
    with pytest.raises(ValueError, match="SanaConfig"):
        dataclasses.replace(TINY, **change)


def test_fresh_network_with_zero_out_predicts_zero_and_its_blocks_ignore_the_caption():
    net = Sana(dataclasses.replace(TINY, zero_init_out=True))
    latents, time, text = inputs(net.config, (4, 4))
    other = text.replace(states=text.states[::-1])
    params = nn.meta.unbox(jit(net.init)(jax.random.key(0), latents, time, text))
    assert np.all(params["params"]["caption_norm"]["scale"] == 0.01)

    def inner(net, text):
        tokens = net.run(net.embed(latents, time, text, Given()), text)
        return tokens.grid, net.unembed(tokens)

    apply = jit(lambda text: net.apply(params, text, method=inner))
    (grid, velocity), (other_grid, _) = apply(text), apply(other)
    assert not np.any(velocity)
    assert np.array_equal(grid, other_grid)


def test_a_network_that_predicts_data_gives_the_velocity_that_leads_there():
    config = dataclasses.replace(TINY, predicts="data", least_time=0.3)
    latents, time, text = inputs(config, (4, 4))
    params = jit(Sana(config).init)(jax.random.key(0), latents, time, text)
    velocity = jit(Sana(config).apply)(params, latents, time, text)
    data = jit(Sana(TINY).apply)(params, latents, time, text)
    levels = np.array([0.999, 0.3], np.float32).reshape(2, 1, 1, 1, 1)  # the second noise level is below the least
    np.testing.assert_allclose(velocity, (latents - data) / levels, rtol=1e-5, atol=1e-5)
