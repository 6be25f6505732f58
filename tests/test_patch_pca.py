"""The fitted patch codec of the miniature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax.vae.patch_pca.network import PatchPca, PatchPcaConfig, fit, from_patches, to_patches

CONFIG = PatchPcaConfig(patch=4, channels=12, whitening=0.5)


@pytest.fixture(scope="module")
def pictures():
    """White pictures with soft blobs of colour: patches that lie near a few directions, and blank ones."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:12, :16]
    out = np.full((60, 12, 16, 3), 255.0)
    for image in out:
        for _ in range(2):
            cy, cx, colour = rng.uniform(0, 12), rng.uniform(0, 16), rng.uniform(0, 200, 3)
            blob = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 8)[..., None]
            image[:] = image * (1 - blob) + colour * blob
    return out.round().astype(np.uint8)


@pytest.fixture(scope="module")
def fitted(pictures):
    return fit(pictures, CONFIG)


@pytest.fixture(scope="module")
def codec(fitted):
    model, params = PatchPca(CONFIG), fitted[0]
    encode = jax.jit(lambda video: model.apply({"params": params}, video, method="encode"))
    decode = jax.jit(lambda latents: model.apply({"params": params}, latents, method="decode"))
    return encode, decode


def as_video(pictures):
    return jnp.asarray(pictures[:, None].astype(np.float32) / 127.5 - 1)


def test_reported_psnr_is_that_of_the_decoded_patches(pictures, fitted, codec):
    encode, decode = codec
    video = as_video(pictures)
    latents = encode(video)
    assert latents.shape == (60, 1, 3, 4, 12)
    patches = np.asarray(to_patches(video, 4)).reshape(-1, 48)
    back = np.asarray(to_patches(decode(latents), 4)).reshape(-1, 48)
    drawn = np.abs(patches - 1).max(1) > 0.04
    measured = 10 * np.log10(4 / np.mean((patches - back)[drawn] ** 2))
    # Clipping to [-1, 1] can only help, and does so a little at the white border of the blobs.
    assert fitted[1] - 0.01 <= measured < fitted[1] + 0.5
    assert fitted[1] > 30


def test_parameters_that_a_run_keeps_in_bfloat16_give_the_latents_of_their_rounded_values(pictures, fitted):
    model, video = PatchPca(CONFIG), as_video(pictures[:2])
    halves = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), fitted[0])
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), halves)
    for method, given in (("encode", video), ("decode", jnp.ones((2, 1, 3, 4, 12)))):
        found = model.apply({"params": halves}, given, method=method)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, model.apply({"params": rounded}, given, method=method))


def test_latents_have_unit_variance_on_average_and_partly_whitened_channels(pictures, codec):
    encode, _ = codec
    video = as_video(pictures)
    latents = np.asarray(encode(video)).reshape(-1, 12)
    drawn = np.abs(np.asarray(to_patches(video, 4)) - 1).reshape(-1, 48).max(1) > 0.04
    power = np.mean(latents[drawn] ** 2, axis=0)
    np.testing.assert_allclose(power.mean(), 1, rtol=1e-4)
    pixel_std = power / power[0]  # std ** 0.5 * std ** 0.5: the latents' variance goes like the pixels' std
    plain, _ = fit(pictures, PatchPcaConfig(patch=4, channels=12, whitening=0.0))
    patches = np.asarray(to_patches(video, 4)).reshape(-1, 48)[drawn] - 1
    std = np.sqrt(np.mean((patches @ plain["basis"]) ** 2, axis=0))
    np.testing.assert_allclose(pixel_std, std / std[0], rtol=1e-3)
    assert np.all(np.diff(std) <= 1e-6)


def test_white_is_the_zero_latent_and_back(codec):
    encode, decode = codec
    white = jnp.ones((1, 2, 8, 8, 3), jnp.float32)
    np.testing.assert_array_equal(encode(white), 0)
    np.testing.assert_array_equal(decode(jnp.zeros((1, 2, 2, 2, 12), jnp.float32)), 1)


def test_all_directions_lose_nothing(pictures):
    rng = np.random.default_rng(1)
    noisy = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    config = PatchPcaConfig(patch=2, channels=12, whitening=1.0)
    params, psnr = fit(noisy, config)
    video = as_video(noisy)
    back = PatchPca(config).apply(
        {"params": params}, PatchPca(config).apply({"params": params}, video, method="encode"), method="decode"
    )
    np.testing.assert_allclose(back, video, atol=2e-5)
    assert psnr > 100


def test_frames_of_a_video_are_coded_one_by_one(pictures, codec):
    encode, decode = codec
    frames = as_video(pictures[:4])
    video = jnp.swapaxes(frames, 0, 1)
    latents = encode(video)
    np.testing.assert_allclose(latents[0], encode(frames)[:, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(decode(latents)[0], decode(encode(frames))[:, 0], rtol=1e-5, atol=1e-5)


def test_values_of_a_patch_are_its_rows_columns_and_colours():
    video = jnp.arange(4 * 6 * 3, dtype=jnp.float32).reshape(1, 1, 4, 6, 3)
    patches = to_patches(video, 2)
    assert patches.shape == (1, 1, 2, 3, 12)
    np.testing.assert_array_equal(patches[0, 0, 1, 2].reshape(2, 2, 3), video[0, 0, 2:4, 4:6])
    np.testing.assert_array_equal(from_patches(patches, 2), video)


def test_fit_does_not_depend_on_how_the_pictures_are_ordered(pictures, fitted):
    shuffled, _ = fit(pictures[::-1].copy(), CONFIG)
    for name, value in fitted[0].items():
        np.testing.assert_allclose(shuffled[name], value, atol=1e-4)
        assert value.dtype == np.float32
    basis = fitted[0]["basis"]
    assert (basis.max(0) >= -basis.min(0)).all()  # eigenvectors come with any sign


def test_fitted_parameters_have_the_shapes_of_the_module(fitted):
    abstract = jax.eval_shape(
        lambda: PatchPca(CONFIG).init(jax.random.key(0), jnp.ones((1, 1, 8, 8, 3), jnp.float32), method="encode")
    )
    shapes = jax.tree.map(lambda box: box.value.shape, abstract["params"], is_leaf=lambda x: hasattr(x, "names"))
    assert shapes == {name: value.shape for name, value in fitted[0].items()}
    model = PatchPca(CONFIG)
    assert (model.spatial, model.temporal, model.channels) == (4, 1, 12)


def test_the_torch_side_codes_bfloat16_in_float32(fitted):
    torch = pytest.importorskip("torch")
    from metacanvas_jax.vae.patch_pca.torch_side import Side

    params = fitted[0]
    side = Side(*(torch.tensor(np.asarray(params[name])) for name in ("mean", "basis", "scale")))
    latents = torch.randn(1, CONFIG.channels, 1, 2, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    pixels = side.decode(latents)
    assert pixels.dtype == torch.bfloat16
    torch.testing.assert_close(pixels, side.decode(latents.float()).bfloat16())
    assert side.encode(pixels).dtype == torch.bfloat16


def test_bad_input_is_refused_with_sizes(pictures, codec):
    with pytest.raises(ValueError, match="13 x 16"):
        fit(np.full((2, 13, 16, 3), 9, np.uint8), CONFIG)
    with pytest.raises(ValueError, match="8x10"):
        codec[0](jnp.ones((1, 1, 8, 10, 3), jnp.float32))
    with pytest.raises(ValueError, match="blank"):
        fit(np.full((2, 8, 8, 3), 255, np.uint8), CONFIG)
    with pytest.raises(ValueError, match=r"1 directions.*12 channels"):
        fit(np.full((2, 8, 8, 3), 9, np.uint8), CONFIG)
    with pytest.raises(ValueError, match="49 channels"):
        PatchPcaConfig(patch=4, channels=49)
    with pytest.raises(ValueError, match="whitening"):
        PatchPcaConfig(whitening=-0.1)
