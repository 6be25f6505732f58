import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import reduce
from vae_support import FAST_COMPILE, assert_close, random

from metacanvas_jax.vae.kl.network import Kl, KlConfig
from metacanvas_jax.vae.tiling import blend_weights, tile_starts, tiled_decode, tiled_encode

KL = KlConfig(channels=(4, 8), blocks=1, latent_channels=4, groups=4, scale=0.5, shift=0.1)


def double(z):
    return jnp.repeat(jnp.repeat(z[..., :3], 2, axis=2), 2, axis=3)


def halve(x):
    return reduce(x, "b t (h r) (w s) c -> b t h w c", "mean", r=2, s=2)


@pytest.mark.parametrize(
    "rows, columns, tile, overlap", [(7, 12, 4, 1), (9, 5, 5, 4), (3, 20, 6, 2), (8, 8, 4, 0), (2, 2, 9, 3)]
)
def test_tiles_of_a_pointwise_network_give_back_the_whole(rows, columns, tile, overlap):
    z, x = random(2, 1, rows, columns, 4), random(1, 3, 2 * rows, 2 * columns, 3)
    pixels = jax.jit(lambda z: tiled_decode(double, z, spatial=2, tile=tile, overlap=overlap))(z)
    assert_close(pixels, double(z), 1e-6)
    latents = jax.jit(lambda x: tiled_encode(halve, x, spatial=2, tile=tile, overlap=overlap))(x)
    assert_close(latents, halve(x), 1e-6)


@pytest.mark.parametrize(
    "length, tile, overlap", [(128, 64, 16), (100, 64, 16), (65, 64, 16), (64, 64, 16), (31, 7, 6)]
)
def test_tiles_cover_the_row_with_the_overlap_asked_for(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] + tile == length
    assert all(tile - step >= overlap for step in np.diff(starts))
    assert np.all(np.diff(blend_weights(starts, tile, overlap)[0][-overlap:]) <= 0)


def test_seams_are_blended_over_the_whole_overlap():
    def flat(z):  # every tile one colour: the hardest seam
        return jnp.broadcast_to(z[:, :, :1, :1, :3], (*z.shape[:2], 4 * z.shape[2], 4 * z.shape[3], 3))

    z = jnp.broadcast_to(jnp.arange(20.0)[None, None, None, :, None], (1, 1, 4, 20, 3))
    pixels = np.asarray(tiled_decode(flat, z, spatial=4, tile=8, overlap=2))
    assert pixels.min() == 0 and pixels.max() == 12
    assert np.abs(np.diff(pixels, axis=3)).max() <= 6 / (2 * 4)  # a step of 6 over 8 pixels


def test_one_tile_is_the_network_itself_and_small_tiles_bound_memory():
    network, z = Kl(KL), random(1, 1, 24, 32, 4)
    params = jax.jit(network.init, compiler_options=FAST_COMPILE)(jax.random.key(0), jnp.zeros((1, 1, 4, 4, 3)))

    def decode(z, params):
        return network.apply(params, z, method="decode")

    def by_tiles(z, params, tile):
        return tiled_decode(lambda part: decode(part, params), z, spatial=2, tile=tile, overlap=2)

    whole = jax.jit(decode, compiler_options=FAST_COMPILE).lower(z, params).compile()
    one = jax.jit(lambda z, p: by_tiles(z, p, 32), compiler_options=FAST_COMPILE)(z, params)
    assert_close(one, np.asarray(whole(z, params)), 1e-6)
    small = jax.jit(lambda z, p: by_tiles(z, p, 8), compiler_options=FAST_COMPILE).lower(z, params).compile()
    assert small.memory_analysis().temp_size_in_bytes < 0.2 * whole.memory_analysis().temp_size_in_bytes


def test_an_overlap_as_large_as_the_tile_is_refused():
    with pytest.raises(ValueError, match=r"overlap 8 must lie in 0 .. tile - 1 = 7"):
        tiled_decode(double, jnp.zeros((1, 1, 16, 16, 4)), spatial=2, tile=8, overlap=8)
