"""FLUX.2 against diffusers: values, gradients, names and shapes; references, padding."""

import dataclasses
import functools

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

from metacanvas_jax.dit.flux2.network import Flux2, Flux2Config, flux2_klein_4b
from metacanvas_jax.dit.flux2.table import table
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.types import Given, States

TINY = Flux2Config(
    latent_channels=12,
    layers_double=2,
    layers_single=2,
    heads=2,
    head_width=16,
    context_width=20,
    rope_axes=(4, 4, 6, 2),
)
LENGTH = 5  # text states
ENDS = np.array([[True] * 5, [True] * 3 + [False] * 2])
GAPS = np.array([[True, False, True, False, True], [True] * 5])


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def build(config):
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=config.latent_channels,
        num_layers=config.layers_double,
        num_single_layers=config.layers_single,
        attention_head_dim=config.head_width,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context_width,
        mlp_ratio=float(config.mlp_ratio),
        axes_dims_rope=config.rope_axes,
        rope_theta=int(config.theta),
        guidance_embeds=False,
    )


def inputs(config, size=(4, 6), references=(), mask=None, batch=2):
    latents = jnp.asarray(random(batch, 1, *size, config.latent_channels, seed=1))
    text = States(jnp.asarray(random(batch, LENGTH, config.context_width, seed=2)))
    if mask is not None:
        text = text.replace(mask=jnp.asarray(mask))
    pictures = [random(batch, 1, *side, config.latent_channels, seed=3 + i) for i, side in enumerate(references)]
    time = jnp.array([0.9, 0.25], jnp.float32)[:batch]
    return latents, time, text, Given(reference=tuple(jnp.asarray(picture) for picture in pictures))


def run_torch(torch, torch_net, latents, time, text, given=None):
    """The target's velocity ``[b 1 h w c]``, with the numbers that diffusers' pipeline gives to its tokens."""
    from diffusers import Flux2KleinPipeline as pipeline

    images = (latents, *(given.reference if given is not None else ()))
    folded = [torch.from_numpy(np.array(z[:, 0])).permute(0, 3, 1, 2) for z in images]
    ids = [pipeline._prepare_latent_ids(folded[0])[0]]
    if folded[1:]:
        ids += [pipeline._prepare_image_ids([z[:1] for z in folded[1:]])[0]]
    states = torch.from_numpy(np.array(text.states))
    packed = torch.cat([pipeline._pack_latents(z) for z in folded], 1)
    seen = None
    if text.mask is not None:
        rest = torch.ones(packed.shape[:2], dtype=torch.bool)
        seen = {"attention_mask": torch.cat([torch.from_numpy(np.array(text.mask)), rest], 1)[:, None, None]}
    out = torch_net(
        hidden_states=packed,
        encoder_hidden_states=states,
        timestep=torch.from_numpy(np.array(time)),
        img_ids=torch.cat(ids),
        txt_ids=pipeline._prepare_text_ids(states)[0],
        joint_attention_kwargs=seen,
    ).sample[:, : folded[0][0, 0].numel()]
    return out.unflatten(1, (1, *folded[0].shape[2:]))


@pytest.fixture(scope="module")
def klein(torch, tmp_path_factory):
    """The tiny network in torch, and its parameters through the importer."""
    from torch_support import randomize

    torch_net = randomize(build(TINY))
    latents, _, *conditions = inputs(TINY)
    folder = tmp_path_factory.mktemp("flux2")
    return torch_net, imported(Flux2(TINY), table(TINY), torch_net, folder, latents, *conditions)


@pytest.fixture(scope="module")
def random_params():
    """Parameters that need no torch, all of them random."""
    latents, _, *conditions = inputs(TINY)
    return random_like(shapes(Flux2(TINY), latents, *conditions))


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def velocity(config, params, latents, time, *conditions):
    return Flux2(config).apply({"params": params}, latents, time, *conditions)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("size", "references", "mask"),
    [((3, 5), [], None), ((2, 3), [(4, 1), (3, 6)], ENDS)],
    ids=["words", "two_references_and_padding"],
)
def test_velocity_equals_diffusers(torch, klein, size, references, mask):
    torch_net, params = klein
    latents, time, *conditions = inputs(TINY, size, references, mask)
    with torch.no_grad():
        expected = run_torch(torch, torch_net, latents, time, *conditions).numpy()
    assert relative(velocity(TINY, params, latents, time, *conditions), expected) <= 2e-5


@pytest.mark.torch
def test_every_parameter_gradient_equals_torch_autograd(torch, klein):
    torch_net, params = klein
    latents, time, *conditions = inputs(TINY, (2, 3), [(3, 2)])
    weights = random(*latents.shape, seed=9)
    torch_net.zero_grad()
    (run_torch(torch, torch_net, latents, time, *conditions) * torch.from_numpy(weights)).sum().backward()

    def loss(params):
        return jnp.sum(Flux2(TINY).apply({"params": params}, latents, time, *conditions) * weights)

    ours = jax.jit(jax.grad(loss), compiler_options=FAST_COMPILE)(params)
    assert_gradients_equal(ours, torch_gradients(table(TINY), torch_net), 2e-4)


@pytest.mark.torch
def test_full_size_names_and_shapes_are_those_of_the_published_model(torch):
    config = flux2_klein_4b()
    latents, _, *conditions = inputs(config, (2, 2), batch=1)
    check_manifest(Flux2(config), table(config), lambda: build(config), latents, *conditions, parameters=3_875_544_576)


def test_states_that_the_mask_hides_take_no_place(random_params):
    latents, time, text, given = inputs(TINY, (2, 3), mask=GAPS)
    full = velocity(TINY, random_params, latents, time, text, given)
    kept = text.states[0][np.flatnonzero(GAPS[0])][None]
    alone = velocity(TINY, random_params, latents[:1], time[:1], States(kept), given)
    assert relative(full[:1], alone) <= 2e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooled": jnp.zeros((2, 8))}, "Given.pooled"),
        ({"guidance": jnp.zeros((2,))}, "Given.guidance"),
        ({"reference": (jnp.zeros((2, 1, 5, 6, 8)),)}, r"reference 0 .*\[1, 5, 6, 8\]"),
    ],
    ids=["pooled", "guidance", "channels_of_a_reference"],
)
def test_conditions_that_flux2_cannot_use_are_refused(change, message):
    latents, time, text, given = inputs(TINY, (2, 3))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(Flux2(TINY).init, jax.random.key(0), latents, time, text, given.replace(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_axes": (4, 4, 4, 2)}, "rope_axes"),
        ({"layers_single": 0}, "need one of each"),
        ({"lora": LoraConfig(2, 2.0, targets=("to_q",))}, r"unknown LoRA targets \['to_q'\]"),
    ],
    ids=["rope_axes", "layers", "targets"],
)
def test_configs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_computes_in_bfloat16_with_float32_parameters_and_velocity():
    config = dataclasses.replace(TINY, dtype="bfloat16", remat="dots")
    latents, _, *conditions = inputs(config, references=[(2, 2)], mask=ENDS)
    assert dtypes_in_bfloat16(Flux2(config), latents, *conditions) == ({"float32"}, "bfloat16", "float32")
