import dataclasses

import jax
import numpy as np
import pytest
from vae_support import assert_close, check_manifest, images_from_torch, images_to_torch, imported, random

from metacanvas_jax.ckpt.tables.kl import table
from metacanvas_jax.errors import UserError
from metacanvas_jax.vae.kl import FLUX_KL, Kl, KlConfig

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


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    from vae_support import randomize

    model = randomize(diffusers_model(TINY))
    return model, imported(Kl(TINY), table(TINY), model, tmp_path_factory.mktemp("kl"))


@pytest.mark.torch
@pytest.mark.parametrize("size", [(16, 24), (20, 8)])
def test_encode_is_the_normalised_posterior_mean_of_diffusers(pair, size):
    model, params = pair
    x = random(2, 1, *size, 3, clip=1)
    mean = images_from_torch(model.encode(images_to_torch(x)).latent_dist.mode())
    latents = jax.jit(lambda p, v: Kl(TINY).apply(p, v, method="encode"))(params, x)
    assert_close(latents, (mean - TINY.shift) * TINY.scale)


@pytest.mark.torch
@pytest.mark.parametrize("size", [(4, 6), (5, 2)])
def test_decode_equals_diffusers(pair, size):
    model, params = pair
    z = random(2, 1, *size, TINY.latent_channels, seed=1)
    reference = images_from_torch(model.decode(images_to_torch(z / TINY.scale + TINY.shift)).sample)
    assert_close(jax.jit(lambda p, v: Kl(TINY).apply(p, v, method="decode"))(params, z), reference)


@pytest.mark.torch
def test_full_size_names_shapes_and_count_are_those_of_flux():
    check_manifest(Kl(FLUX_KL), table(FLUX_KL), lambda: diffusers_model(FLUX_KL), 83_819_683)


def test_frames_of_a_video_are_coded_one_by_one():
    network, video = Kl(TINY), random(2, 3, 8, 8, 3, clip=1)
    params = jax.jit(network.init)(jax.random.key(0), video[:, :1])
    both = jax.jit(lambda p, v: (network.apply(p, v, method="encode"), network.apply(p, v)))
    latents, pixels = both(params, video)
    alone = [both(params, video[:, i : i + 1]) for i in range(3)]
    assert_close(latents, np.concatenate([z for z, _ in alone], axis=1), 1e-5)
    assert_close(pixels, np.concatenate([y for _, y in alone], axis=1), 1e-5)


def test_wrong_sizes_and_channels_are_named():
    network = Kl(TINY)
    with pytest.raises(UserError, match=r"divisible by 4, found 16x22"):
        network.apply({}, np.zeros((1, 1, 16, 22, 3), np.float32), method="encode")
    with pytest.raises(UserError, match=r"latents of 4 channels, found 16"):
        network.apply({}, np.zeros((1, 1, 4, 4, 16), np.float32), method="decode")


def test_bfloat16_keeps_latents_in_float32_and_pixels_near_those_of_float32():
    z = random(1, 1, 4, 4, 4)
    network = Kl(TINY)
    params = jax.jit(network.init)(jax.random.key(0), np.zeros((1, 1, 8, 8, 3), np.float32))
    half = Kl(dataclasses.replace(TINY, dtype="bfloat16"))
    pixels = jax.jit(lambda p, v: half.apply(p, v, method="decode"))(params, z)
    assert pixels.dtype == "bfloat16"
    assert_close(pixels, np.asarray(network.apply(params, z, method="decode")), 0.05)
    shapes = jax.eval_shape(lambda p, v: half.apply(p, v, method="encode"), params, pixels)
    assert shapes.dtype == "float32"


def test_config_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"multiples of groups 32"):
        dataclasses.replace(FLUX_KL, channels=(128, 250))
