"""FLUX.2's autoencoder against diffusers: latents as its pipeline makes them, pixels, names and shapes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from vae_support import (
    FAST_COMPILE,
    abstract_params,
    assert_close,
    check_manifest,
    images_from_torch,
    images_to_torch,
    random,
    randomize,
)

from metacanvas_jax import registry
from metacanvas_jax.errors import UserError
from metacanvas_jax.vae.flux2.network import FLUX2_VAE, Flux2Vae, Flux2VaeConfig
from metacanvas_jax.vae.flux2.table import table

TINY = Flux2VaeConfig(channels=(8, 16), decoder_channels=(16, 8), blocks=1, means=4, groups=4)


def diffusers_model(config):
    AutoencoderKLFlux2 = pytest.importorskip("diffusers").AutoencoderKLFlux2
    stages = len(config.channels)
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=config.channels,
        decoder_block_out_channels=config.decoder_channels,
        layers_per_block=config.blocks,
        latent_channels=config.means,
        norm_num_groups=config.groups,
        use_quant_conv=config.quant,
        use_post_quant_conv=config.post_quant,
        batch_norm_eps=config.eps,
    )


def random_model(config):
    """Every parameter random, the statistics too."""
    import torch

    model, generator = randomize(diffusers_model(config)), torch.Generator().manual_seed(5)
    model.bn.running_mean.copy_(torch.randn(model.bn.running_mean.shape, generator=generator))
    model.bn.running_var.copy_(0.1 + torch.rand(model.bn.running_var.shape, generator=generator))
    return model


@functools.cache
def compiled(method):
    network = Flux2Vae(TINY)
    return jax.jit(lambda params, x: network.apply(params, x, method=method), compiler_options=FAST_COMPILE)


@pytest.fixture(scope="module")
def model():
    return random_model(TINY)


@pytest.fixture(scope="module")
def params(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux2_vae")
    model.save_pretrained(folder)
    record = registry.of(TINY)
    return {"params": record.load(folder, TINY, abstract_params(Flux2Vae(TINY)), "vae", progress=False)}


def pipeline(vae):
    from types import SimpleNamespace

    from diffusers import Flux2KleinPipeline

    return SimpleNamespace(vae=vae, _patchify_latents=Flux2KleinPipeline._patchify_latents)


@pytest.mark.torch
def test_encode_makes_the_latents_of_the_pipeline(model, params):
    import torch
    from diffusers import Flux2KleinPipeline

    x = random(2, 1, 12, 8, 3, clip=1)
    with torch.no_grad():
        expected = Flux2KleinPipeline._encode_vae_image(pipeline(model), images_to_torch(x), None)
    assert_close(compiled("encode")(params, x), images_from_torch(expected, x))


@pytest.mark.torch
@pytest.mark.parametrize("batch, frames", [(2, 1), (1, 3)])
def test_decode_makes_the_pixels_of_the_pipeline(model, params, batch, frames):
    import torch
    from diffusers import Flux2KleinPipeline

    z = random(batch, frames, 3, 2, TINY.latent_channels, seed=1)
    with torch.no_grad():
        mean = model.bn.running_mean.view(1, -1, 1, 1)
        deviation = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps)
        latents = Flux2KleinPipeline._unpatchify_latents(images_to_torch(z) * deviation + mean)
        expected = images_from_torch(model.decode(latents).sample, z)
    assert_close(compiled("decode")(params, z), expected)


@pytest.mark.torch
def test_the_torch_side_codes_alike(model, params):
    import torch

    from metacanvas_jax.vae.flux2.torch_side import Side

    x, side = random(1, 1, 8, 12, 3, clip=1), Side(model)
    with torch.no_grad():
        latents = side.encode(torch.from_numpy(x).movedim(-1, 1))
        pixels = side.decode(latents)
    ours = compiled("encode")(params, x)
    assert_close(ours, latents.movedim(1, -1).numpy())
    assert_close(compiled("decode")(params, ours), pixels.movedim(1, -1).numpy())


@pytest.mark.torch
@pytest.mark.parametrize(
    ("change", "parameters"), [({}, 84_046_371), ({"quant": False, "post_quant": False}, 84_041_155)]
)
def test_full_size_names_shapes_and_count_are_those_of_diffusers(change, parameters):
    config = dataclasses.replace(FLUX2_VAE, **change)

    def build():
        model = diffusers_model(config)
        del model.bn.num_batches_tracked  # which is not read
        return model

    check_manifest(Flux2Vae(config), table(config), build, parameters)


def test_wrong_sizes_and_channels_are_named():
    network = Flux2Vae(TINY)
    assert (TINY.spatial, TINY.latent_channels, FLUX2_VAE.spatial, FLUX2_VAE.latent_channels) == (4, 16, 16, 128)
    with pytest.raises(UserError, match=r"divisible by 4, found 16x22"):
        network.apply({}, jnp.zeros((1, 1, 16, 22, 3)), method="encode")
    with pytest.raises(UserError, match=r"latents of 16 channels, found 4"):
        network.apply({}, jnp.zeros((1, 1, 4, 4, 4)), method="decode")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"channels": (8, 18)}, "multiples of groups 4"), ({"decoder_channels": (8,)}, "as many as channels")],
)
def test_config_names_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
