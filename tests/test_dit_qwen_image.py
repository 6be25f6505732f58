"""Qwen-Image against diffusers: values, gradients, names and shapes; references, padding, adapters."""

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

from metacanvas_jax.dit.qwen_image.network import QwenImage, QwenImageConfig, qwen_image, qwen_image_edit_2511
from metacanvas_jax.dit.qwen_image.table import table
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.trees import flat, nested
from metacanvas_jax.types import Given, States

TINY = QwenImageConfig(latent_channels=4, layers=2, heads=2, head_width=16, context_width=20, rope_axes=(4, 6, 6))
LENGTH = 5  # text states
ENDS = np.array([[True] * 5, [True] * 3 + [False] * 2])
GAPS = np.array([[True, False, True, False, True], [True] * 5])


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def build(config):
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=4 * config.latent_channels,
        out_channels=config.latent_channels,
        num_layers=config.layers,
        attention_head_dim=config.head_width,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context_width,
        axes_dims_rope=config.rope_axes,
        zero_cond_t=config.zero_cond_t,
    )


def inputs(config, size=(8, 12), references=(), mask=None, batch=2):
    latents = jnp.asarray(random(batch, 1, *size, config.latent_channels, seed=1))
    text = States(jnp.asarray(random(batch, LENGTH, config.context_width, seed=2)))
    if mask is not None:
        text = text.replace(mask=jnp.asarray(mask))
    pictures = [random(batch, 1, *side, config.latent_channels, seed=3 + i) for i, side in enumerate(references)]
    time = jnp.array([0.9, 0.25], jnp.float32)[:batch]
    return latents, time, text, Given(reference=tuple(jnp.asarray(picture) for picture in pictures))


def run_torch(torch, torch_net, latents, time, text, given):
    """The target's velocity ``[b 1 h w c]``, packed as diffusers ``QwenImageEditPlusPipeline`` does."""
    tokens, images = [], []
    for z in (latents, *given.reference):
        z = torch.from_numpy(np.array(z[:, 0])).permute(0, 3, 1, 2)
        batch, channels, rows, columns = z.shape
        z = z.view(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 1, 3, 5)
        tokens.append(z.reshape(batch, rows * columns // 4, 4 * channels))
        images.append((1, rows // 2, columns // 2))
    out = torch_net(
        hidden_states=torch.cat(tokens, 1),
        encoder_hidden_states=torch.from_numpy(np.array(text.states)),
        encoder_hidden_states_mask=None if text.mask is None else torch.from_numpy(np.array(text.mask)),
        timestep=torch.from_numpy(np.array(time)),
        img_shapes=[images] * len(latents),
    ).sample[:, : tokens[0].shape[1]]
    batch, _, rows, columns, channels = latents.shape
    out = out.view(batch, rows // 2, columns // 2, channels, 2, 2).permute(0, 1, 4, 2, 5, 3)
    return out.reshape(batch, 1, rows, columns, channels)


@pytest.fixture(scope="module")
def pair(torch, tmp_path_factory):
    """``pair(zero_cond_t)``: the config, the tiny network in torch, and its parameters through the importer."""
    from torch_support import randomize

    @functools.cache
    def make(zero_cond_t):
        config = dataclasses.replace(TINY, zero_cond_t=zero_cond_t)
        torch_net = randomize(build(config))
        latents, _, *conditions = inputs(config)
        folder = tmp_path_factory.mktemp("qwen_image")
        return config, torch_net, imported(QwenImage(config), table(config), torch_net, folder, latents, *conditions)

    return make


@pytest.fixture(scope="module")
def random_params():
    """Parameters that need no torch, all of them random."""
    latents, _, *conditions = inputs(TINY)
    return random_like(shapes(QwenImage(TINY), latents, *conditions))


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def velocity(config, params, latents, time, *conditions):
    return QwenImage(config).apply({"params": params}, latents, time, *conditions)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("zero_cond_t", "size", "references", "mask"),
    [
        (False, (8, 12), [(6, 10)], None),
        (False, (6, 10), [], ENDS),
        (True, (4, 6), [(8, 2), (6, 26)], ENDS),
    ],
    ids=["reference_of_another_size", "odd_sides_and_padding", "two_references_at_level_zero"],
)
def test_velocity_equals_diffusers(torch, pair, zero_cond_t, size, references, mask):
    config, torch_net, params = pair(zero_cond_t)
    latents, time, *conditions = inputs(config, size, references, mask)
    with torch.no_grad():
        expected = run_torch(torch, torch_net, latents, time, *conditions).numpy()
    assert relative(velocity(config, params, latents, time, *conditions), expected) <= 2e-5


@pytest.mark.torch
def test_every_parameter_gradient_equals_torch_autograd(torch, pair):
    config, torch_net, params = pair(True)
    latents, time, *conditions = inputs(config, (4, 6), [(6, 4)], ENDS)
    weights = random(*latents.shape, seed=9)
    torch_net.zero_grad()
    (run_torch(torch, torch_net, latents, time, *conditions) * torch.from_numpy(weights)).sum().backward()

    def loss(params):
        return jnp.sum(QwenImage(config).apply({"params": params}, latents, time, *conditions) * weights)

    ours = jax.jit(jax.grad(loss), compiler_options=FAST_COMPILE)(params)
    # The last block's text stream reaches no velocity, except through the keys and values.
    missing = {name: p for name, p in torch_net.named_parameters() if p.grad is None}
    for parameter in missing.values():
        parameter.grad = torch.zeros_like(parameter)
    assert_gradients_equal(ours, torch_gradients(table(config), torch_net), 2e-4)


@pytest.mark.torch
@pytest.mark.parametrize("preset", [qwen_image, qwen_image_edit_2511])
def test_full_size_names_and_shapes_are_those_of_the_published_model(torch, preset):
    config = preset()
    latents, _, *conditions = inputs(config, (2, 2), batch=1)
    count = 20_430_401_088
    check_manifest(QwenImage(config), table(config), lambda: build(config), latents, *conditions, parameters=count)


def test_states_that_the_mask_hides_take_no_position(random_params):
    latents, time, text, given = inputs(TINY, (4, 6), mask=GAPS)
    full = velocity(TINY, random_params, latents, time, text, given)
    kept = text.states[0][np.flatnonzero(GAPS[0])][None]
    alone = velocity(TINY, random_params, latents[:1], time[:1], States(kept), given)
    assert relative(full[:1], alone) <= 2e-6
    moved = text.replace(states=text.states.at[0, 1].set(9.0))
    assert relative(velocity(TINY, random_params, latents, time, moved, given)[:1], alone) <= 2e-6


def test_references_are_modulated_at_level_zero_when_asked_to(random_params):
    config = dataclasses.replace(TINY, zero_cond_t=True)
    latents, time, text, given = inputs(TINY, (4, 6), [(4, 4)])
    plain, zero = (velocity(c, random_params, latents, time, text, given) for c in (TINY, config))
    assert relative(zero, plain) > 1e-3
    at_zero = jnp.zeros_like(time)
    plain, zero = (velocity(c, random_params, latents, at_zero, text, given) for c in (TINY, config))
    assert relative(zero, plain) <= 2e-6


def test_adapters_stand_beside_the_layers_they_target_and_start_at_zero(random_params):
    lora = LoraConfig(rank=3, alpha=3.0, targets=("q", "out", "up", "modulation"))
    config = dataclasses.replace(TINY, lora=lora)
    latents, time, text, given = inputs(TINY, (4, 6), [(4, 4)])
    abstract = shapes(QwenImage(config), latents, text, given)
    stream = abstract["blocks"]["image"]
    assert {name for name in (*stream, *stream["attention"]) if "lora" in name} == {
        *("q_lora", "out_lora", "up_lora", "modulation_lora")
    }
    expected = velocity(TINY, random_params, latents, time, text, given)
    for b, differs in ((0.0, False), (0.3, True)):
        params = {path: flat(random_params).get(path) for path in flat(abstract)}
        for path, leaf in flat(abstract).items():
            if params[path] is None:
                params[path] = jnp.full(leaf.shape, b) if path.endswith("/b") else jnp.asarray(random(*leaf.shape))
        found = relative(velocity(config, nested(params), latents, time, text, given), expected)
        assert found > 1e-3 if differs else found <= 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooled": jnp.zeros((2, 8))}, "Given.pooled"),
        ({"guidance": jnp.zeros((2,))}, "Given.guidance"),
        ({"reference": (jnp.zeros((2, 1, 5, 6, 4)),)}, r"reference 0 .*\[1, 5, 6, 4\]"),
        ({"states": jnp.zeros((2, 5, 21))}, "width 20, not 21"),
    ],
    ids=["pooled", "guidance", "odd_reference", "context_width"],
)
def test_conditions_that_qwen_image_cannot_use_are_refused(change, message):
    latents, time, text, given = inputs(TINY, (4, 6))
    text, given = (text.replace(**change), given) if "states" in change else (text, given.replace(**change))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(QwenImage(TINY).init, jax.random.key(0), latents, time, text, given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_axes": (4, 6, 8)}, "rope_axes"),
        ({"lora": LoraConfig(2, 2.0, targets=("to_q",))}, r"unknown LoRA targets \['to_q'\]"),
        ({"lora": LoraConfig(2, 2.0, dropout=0.1, targets=("q",))}, "no dropout"),
    ],
    ids=["rope_axes", "targets", "dropout"],
)
def test_configs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_computes_in_bfloat16_with_float32_parameters_and_velocity(remat):
    config = dataclasses.replace(TINY, dtype="bfloat16", remat=remat, zero_cond_t=True)
    latents, _, *conditions = inputs(config, references=[(4, 4)], mask=ENDS)
    assert dtypes_in_bfloat16(QwenImage(config), latents, *conditions) == ({"float32"}, "bfloat16", "float32")
