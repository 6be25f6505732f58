import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
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
from metacanvas_jax.vae.kl.network import KL_F8C16, Kl, KlConfig
from metacanvas_jax.vae.kl.table import table

TINY = KlConfig(channels=(8, 16, 16), blocks=1, latent_channels=4, groups=4, scale=0.3611, shift=0.1159)


def diffusers_model(config):
    AutoencoderKL = pytest.importorskip("diffusers").AutoencoderKL
    stages = len(config.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=config.channels,
        layers_per_block=config.blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        scaling_factor=config.scale,
        shift_factor=config.shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


@functools.cache
def compiled(method, dtype="float32"):
    network = Kl(dataclasses.replace(TINY, dtype=dtype))
    return jax.jit(lambda params, x: network.apply(params, x, method=method), compiler_options=FAST_COMPILE)


@pytest.fixture(scope="module")
def model():
    return randomize(diffusers_model(TINY))


@pytest.fixture(scope="module")
def params(model, tmp_path_factory):
    return imported(Kl(TINY), table(TINY), model, tmp_path_factory.mktemp("kl"))


@pytest.mark.torch
@pytest.mark.parametrize("batch, frames, size", [(2, 1, (16, 24)), (1, 3, (20, 8))])
def test_encode_is_the_normalised_posterior_mean_of_diffusers(model, params, batch, frames, size):
    x = random(batch, frames, *size, 3, clip=1)
    mean = images_from_torch(model.encode(images_to_torch(x)).latent_dist.mode(), x)
    assert_close(compiled("encode")(params, x), (mean - TINY.shift) * TINY.scale)


@pytest.mark.torch
@pytest.mark.parametrize("batch, frames, size", [(2, 1, (4, 6)), (1, 3, (5, 2))])
def test_decode_equals_diffusers(model, params, batch, frames, size):
    z = random(batch, frames, *size, TINY.latent_channels, seed=1)
    reference = images_from_torch(model.decode(images_to_torch(z / TINY.scale + TINY.shift)).sample, z)
    assert_close(compiled("decode")(params, z), reference)


@pytest.mark.torch
def test_bfloat16_keeps_latents_in_float32_and_pixels_near_those_of_float32(params):
    z = random(2, 1, 4, 6, TINY.latent_channels, seed=1)
    pixels = compiled("decode", "bfloat16")(params, z)
    assert pixels.dtype == "bfloat16"
    assert_close(pixels, np.asarray(compiled("decode")(params, z)), 0.05)
    assert jax.eval_shape(compiled("encode", "bfloat16"), params, pixels).dtype == "float32"


@pytest.mark.torch
def test_full_size_names_shapes_and_count_are_those_of_flux():
    check_manifest(Kl(KL_F8C16), table(KL_F8C16), lambda: diffusers_model(KL_F8C16), 83_819_683)


def test_wrong_sizes_and_channels_are_named():
    network = Kl(TINY)
    with pytest.raises(UserError, match=r"divisible by 4, found 16x22"):
        network.apply({}, jnp.zeros((1, 1, 16, 22, 3)), method="encode")
    with pytest.raises(UserError, match=r"latents of 4 channels, found 16"):
        network.apply({}, jnp.zeros((1, 1, 4, 4, 16)), method="decode")


def test_config_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"multiples of groups 32"):
        dataclasses.replace(KL_F8C16, channels=(128, 250))
