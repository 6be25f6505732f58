import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vae_support import FAST_COMPILE, assert_close, check_manifest, imported, random, randomize

from metacanvas_jax import registry
from metacanvas_jax.errors import UserError
from metacanvas_jax.vae.wan.network import WAN21_VAE, WAN22_VAE, WanVae, WanVaeConfig
from metacanvas_jax.vae.wan.table import table

Z = 5
TINY = WanVaeConfig(
    encoder_width=4,
    decoder_width=6,
    multipliers=(1, 2, 2, 2),
    blocks=1,
    halve_time=(False, True, True),
    latent_mean=tuple(0.1 * i for i in range(Z)),
    latent_std=tuple(1 + 0.1 * i for i in range(Z)),
)


OLDER = dataclasses.replace(TINY, decoder_width=4, folded=1, shortcuts=False)  # Wan 2.1's kind


def diffusers_model(config):
    if not config.shortcuts:
        return older_model("AutoencoderKLWan", config)
    return pytest.importorskip("diffusers").AutoencoderKLWan(
        base_dim=config.encoder_width,
        decoder_base_dim=config.decoder_width,
        z_dim=config.latent_channels,
        dim_mult=list(config.multipliers),
        num_res_blocks=config.blocks,
        temperal_downsample=list(config.halve_time),
        latents_mean=list(config.latent_mean),
        latents_std=list(config.latent_std),
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=config.temporal,
        scale_factor_spatial=config.spatial,
    )


def older_model(name, config):
    return getattr(pytest.importorskip("diffusers"), name)(
        base_dim=config.encoder_width,
        z_dim=config.latent_channels,
        dim_mult=list(config.multipliers),
        num_res_blocks=config.blocks,
        temperal_downsample=list(config.halve_time),
        latents_mean=list(config.latent_mean),
        latents_std=list(config.latent_std),
    )


@functools.cache
def compiled(method, chunk, config=TINY):
    network = WanVae(dataclasses.replace(config, chunk=chunk))
    return jax.jit(lambda params, x: network.apply(params, x, method=method), compiler_options=FAST_COMPILE)


def to_torch(x):
    import torch

    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 4, 1, 2, 3)))


def from_torch(x):
    return x.detach().numpy().transpose(0, 2, 3, 4, 1)


@pytest.fixture(scope="module")
def model():
    import torch

    model = randomize(diffusers_model(TINY))
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(3)  # so that some pixels leave [-1, 1], where decode clamps
    return model


@pytest.fixture(scope="module")
def params(model, tmp_path_factory):
    return imported(WanVae(TINY), table(TINY), model, tmp_path_factory.mktemp("wan"))


@pytest.mark.torch
@pytest.mark.parametrize(
    "batch, frames, size", [(1, 1, (16, 32)), (2, 5, (32, 16)), (1, 9, (16, 32)), (1, 17, (16, 32))]
)
def test_encode_and_decode_at_once_equal_diffusers(model, params, batch, frames, size):
    x = random(batch, frames, *size, 3, clip=1)
    reference = from_torch(model.encode(to_torch(x)).latent_dist.mode())
    z = (reference - np.float32(TINY.latent_mean)) / np.float32(TINY.latent_std)
    assert_close(compiled("encode", 0)(params, x), z)
    pixels = from_torch(model.decode(to_torch(reference)).sample)
    assert 0.3 < np.mean(np.abs(pixels) < 1) < 0.99
    assert_close(compiled("decode", 0)(params, z), pixels)


@pytest.mark.torch
@pytest.mark.parametrize("chunk, frames", [(1, 9), (2, 17), (3, 17)])
def test_chunks_equal_the_whole_clip(params, chunk, frames):
    x = random(1, frames, 16, 32, 3, clip=1)
    z = compiled("encode", 0)(params, x)
    assert_close(compiled("encode", chunk)(params, x), np.asarray(z), 1e-5)
    assert_close(compiled("decode", chunk)(params, z), np.asarray(compiled("decode", 0)(params, z)), 1e-5)


@pytest.mark.torch
def test_the_first_frame_does_not_depend_on_later_ones(params):
    x = random(1, 9, 16, 32, 3, clip=1)
    z = np.asarray(compiled("encode", 0)(params, x))
    alone = compiled("encode", 0)(params, x[:, :1])
    assert_close(alone, z[:, :1], 1e-5)
    pixels = np.asarray(compiled("decode", 0)(params, z))
    assert_close(compiled("decode", 0)(params, alone), pixels[:, :1], 1e-5)


@pytest.mark.torch
def test_full_size_names_shapes_and_count_are_those_of_wan22():
    check_manifest(WanVae(WAN22_VAE), table(WAN22_VAE), lambda: diffusers_model(WAN22_VAE), 704_688_668)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLQwenImage"])
def test_wan21_equals_both_classes_of_diffusers_and_has_their_full_size_tensors(name, tmp_path):
    import torch

    model = randomize(older_model(name, OLDER))
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(3)
    params = imported(WanVae(OLDER), table(OLDER), model, tmp_path)
    assert registry.published_config(tmp_path) == OLDER
    for frames, size in ((1, (16, 32)), (5, (24, 16))):
        x = random(1, frames, *size, 3, clip=1)
        reference = from_torch(model.encode(to_torch(x)).latent_dist.mode())
        z = (reference - np.float32(OLDER.latent_mean)) / np.float32(OLDER.latent_std)
        pixels = from_torch(model.decode(to_torch(reference)).sample)
        assert 0.3 < np.mean(np.abs(pixels) < 1) < 0.99
        for chunk in (0, 1):
            assert_close(compiled("encode", chunk, OLDER)(params, x), z)
            assert_close(compiled("decode", chunk, OLDER)(params, z), pixels)
    check_manifest(WanVae(WAN21_VAE), table(WAN21_VAE), lambda: older_model(name, WAN21_VAE), 126_892_531)


@pytest.mark.torch
def test_a_gradient_through_wan21_equals_that_of_torch(tmp_path):

    model = randomize(older_model("AutoencoderKLWan", OLDER))
    params = imported(WanVae(OLDER), table(OLDER), model, tmp_path)
    z, weights = random(1, 1, 2, 4, Z), random(1, 1, 16, 32, 3, seed=1)
    raw = z * np.float32(OLDER.latent_std) + np.float32(OLDER.latent_mean)
    theirs = to_torch(raw).requires_grad_()
    (model.decode(theirs).sample * to_torch(weights)).sum().backward()
    expected = from_torch(theirs.grad) * np.float32(OLDER.latent_std)

    def loss(z):
        return jnp.sum(WanVae(OLDER).apply(params, z, method="decode") * weights)

    ours = jax.jit(jax.grad(loss), compiler_options=FAST_COMPILE)(z)
    assert_close(ours, expected, 2e-4)


def test_memory_of_a_decode_in_chunks_grows_by_the_pixels_alone():
    small = WanVaeConfig(
        encoder_width=4,
        decoder_width=16,
        multipliers=(1, 1),
        blocks=1,
        halve_time=(True,),
        latent_mean=(0.0,) * 4,
        latent_std=(1.0,) * 4,
    )

    def bytes_for(chunk, frames):
        network = WanVae(dataclasses.replace(small, chunk=chunk))
        z = jax.ShapeDtypeStruct((1, frames, 8, 8, 4), "float32")
        shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 1, 4, 4, 3)))
        decode = jax.jit(lambda p, z: network.apply(p, z, method="decode"), compiler_options=FAST_COMPILE)
        return decode.lower(shapes, z).compile().memory_analysis().temp_size_in_bytes

    pixels = (2 * 12) * 32 * 32 * 3 * 4  # of 12 more latent frames
    assert bytes_for(1, 17) - bytes_for(1, 5) < 1.1 * pixels
    assert bytes_for(0, 17) - bytes_for(0, 5) > 3 * pixels


def test_an_image_makes_every_parameter():
    shapes = [
        jax.tree.map(np.shape, jax.eval_shape(WanVae(TINY).init, jax.random.key(0), jnp.zeros((1, t, 16, 16, 3))))
        for t in (1, 5)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("frames, nearest", [(2, "1 or 5"), (4, "1 or 5"), (6, "5 or 9"), (120, "117 or 121")])
def test_wrong_frame_counts_name_the_nearest_right_ones(frames, nearest):
    with pytest.raises(UserError, match=rf"1 \+ 4 k frames, found {frames} \(nearest: {nearest}\)"):
        WanVae(TINY).apply({}, jnp.zeros((1, frames, 16, 16, 3)), method="encode")


def test_sizes_and_channels_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="divisible by 16, found 16x24"):
        WanVae(TINY).apply({}, jnp.zeros((1, 1, 16, 24, 3)), method="encode")
    with pytest.raises(UserError, match="latents of 5 channels, found 16"):
        WanVae(TINY).apply({}, jnp.zeros((1, 1, 2, 2, 16)), method="decode")


def test_bfloat16_in_chunks_keeps_latents_in_float32():
    network = WanVae(dataclasses.replace(TINY, chunk=1, dtype="bfloat16"))
    video = jax.ShapeDtypeStruct((1, 9, 16, 16, 3), "float32")
    params = jax.eval_shape(network.init, jax.random.key(0), video)
    latents = jax.eval_shape(lambda p, v: network.apply(p, v, method="encode"), params, video)
    pixels = jax.eval_shape(lambda p, z: network.apply(p, z, method="decode"), params, latents)
    assert (latents.dtype, pixels.dtype) == ("float32", "bfloat16")
    assert pixels.shape == video.shape


def test_config_names_what_does_not_fit():
    with pytest.raises(ValueError, match="4 stages have 3 steps between them; halve_time lists 2"):
        dataclasses.replace(TINY, halve_time=(True, True))
    with pytest.raises(ValueError, match="same channels"):
        dataclasses.replace(TINY, latent_std=(1.0,))
    with pytest.raises(ValueError, match=r"multipliers \(1, 2, 2, 3\) do not divide"):
        dataclasses.replace(TINY, multipliers=(1, 2, 2, 3))
    with pytest.raises(ValueError, match="up steps halve decoder_width 5"):
        dataclasses.replace(OLDER, decoder_width=5, multipliers=(1, 1, 1, 1))
