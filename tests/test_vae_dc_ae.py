import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from vae_support import (
    FAST_COMPILE,
    assert_close,
    check_manifest,
    images_from_torch,
    images_to_torch,
    imported,
    random,
    randomize,
)

from metacanvas_jax.errors import UserError
from metacanvas_jax.vae.dc_ae.network import DC_AE_F32C32, DcAe, DcAeConfig
from metacanvas_jax.vae.dc_ae.table import table

# All three relations of widths across a step: equal, double, and one with residual blocks on one side only.
TINY = DcAeConfig(
    channels=(8, 16, 16, 32),
    encoder_blocks=(1, 2, 2, 1),
    decoder_blocks=(2, 1, 3, 1),
    attention_from=2,
    latent_channels=4,
    head_width=8,
    scale=0.41407,
)


def diffusers_model(config):
    AutoencoderDC = pytest.importorskip("diffusers").AutoencoderDC
    stages = range(len(config.channels))
    blocks = tuple("EfficientViTBlock" if i >= config.attention_from else "ResBlock" for i in stages)
    scales = tuple((config.window,) if i >= config.attention_from else () for i in stages)
    return AutoencoderDC(
        latent_channels=config.latent_channels,
        attention_head_dim=config.head_width,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=config.channels,
        decoder_block_out_channels=config.channels,
        encoder_layers_per_block=config.encoder_blocks,
        decoder_layers_per_block=config.decoder_blocks,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        scaling_factor=config.scale,
    )


@functools.cache
def compiled(method, dtype="float32"):
    network = DcAe(dataclasses.replace(TINY, dtype=dtype))
    return jax.jit(lambda params, x: network.apply(params, x, method=method), compiler_options=FAST_COMPILE)


@pytest.fixture(scope="module")
def model():
    return randomize(diffusers_model(TINY))


@pytest.fixture(scope="module")
def params(model, tmp_path_factory):
    return imported(DcAe(TINY), table(TINY), model, tmp_path_factory.mktemp("dc_ae"))


# The second size leaves 2 x 1 positions to the deepest stage, where diffusers takes its quadratic branch.
@pytest.mark.torch
@pytest.mark.parametrize("batch, frames, size", [(2, 1, (32, 48)), (1, 3, (16, 8))])
def test_encode_equals_diffusers(model, params, batch, frames, size):
    x = random(batch, frames, *size, 3, clip=1)
    reference = images_from_torch(model.encode(images_to_torch(x)).latent, x)
    assert_close(compiled("encode")(params, x), reference * TINY.scale)


@pytest.mark.torch
@pytest.mark.parametrize("batch, frames, size", [(2, 1, (4, 6)), (1, 3, (2, 1))])
def test_decode_equals_diffusers(model, params, batch, frames, size):
    z = random(batch, frames, *size, TINY.latent_channels, seed=1)
    reference = images_from_torch(model.decode(images_to_torch(z / TINY.scale)).sample, z)
    assert_close(compiled("decode")(params, z), reference)


@pytest.mark.torch
def test_bfloat16_keeps_latents_in_float32_and_pixels_near_those_of_float32(params):
    z = random(2, 1, 4, 6, TINY.latent_channels, seed=1)
    pixels = compiled("decode", "bfloat16")(params, z)
    assert pixels.dtype == "bfloat16"
    assert_close(pixels.astype("float32"), compiled("decode")(params, z), 0.05)
    assert jax.eval_shape(compiled("encode", "bfloat16"), params, pixels).dtype == "float32"


@pytest.mark.torch
def test_full_size_names_shapes_and_count_are_those_of_f32c32():
    check_manifest(DcAe(DC_AE_F32C32), table(DC_AE_F32C32), lambda: diffusers_model(DC_AE_F32C32), 312_250_275)


def test_wrong_sizes_and_channels_are_named():
    network = DcAe(TINY)
    with pytest.raises(UserError, match=r"divisible by 8, found 16x20"):
        network.apply({}, jnp.zeros((1, 1, 16, 20, 3)), method="encode")
    with pytest.raises(UserError, match=r"latents of 4 channels, found 16"):
        network.apply({}, jnp.zeros((1, 1, 4, 4, 16)), method="decode")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"decoder_blocks": (3, 3)}, "must list the same stages"),
        ({"encoder_blocks": (2, 2, 0, 1)}, "every stage needs a block"),
        ({"head_width": 12}, "multiples of head_width 12 from stage 2"),
        ({"latent_channels": 5}, "multiple of latent_channels 5"),
        ({"channels": (8, 16, 24, 32), "attention_from": 3}, "divide 4 times the one before"),
    ],
)
def test_config_names_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
