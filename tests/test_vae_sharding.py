import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vae_support import FAST_COMPILE, assert_close, random

from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh, on_mesh
from metacanvas_jax.vae.dc_ae.network import DcAe, DcAeConfig
from metacanvas_jax.vae.kl.network import Kl, KlConfig
from metacanvas_jax.vae.wan.network import WanVae, WanVaeConfig

NETWORKS = {
    "kl": Kl(KlConfig(channels=(4, 8), blocks=1, latent_channels=4, groups=4, scale=0.5, shift=0.1)),
    "dc_ae": DcAe(
        DcAeConfig(
            channels=(4, 8),
            encoder_blocks=(1, 1),
            decoder_blocks=(1, 1),
            attention_from=1,
            latent_channels=4,
            head_width=4,
            scale=0.5,
        )
    ),
    "wan": WanVae(
        WanVaeConfig(
            encoder_width=4,
            decoder_width=4,
            multipliers=(1, 1),
            blocks=1,
            halve_time=(True,),
            latent_mean=(0.0, 0.1, 0.2, 0.3),
            latent_std=(1.0, 1.1, 1.2, 1.3),
            chunk=1,
        )
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_decode_in_bands_of_rows_on_a_mesh_equals_one_device(name):
    network, z = NETWORKS[name], random(1, 3, 4, 3, 4)
    video = jnp.zeros((1, 1, network.spatial, network.spatial, 3))
    params = jax.jit(network.init, compiler_options=FAST_COMPILE)(jax.random.key(0), video)

    def decode(params, z):
        return network.apply(params, z, method="decode")

    alone = jax.jit(decode, compiler_options=FAST_COMPILE)(params, z)
    mesh = make_mesh(MeshConfig(context=2), jax.devices()[:2])
    with on_mesh(mesh):
        compiled = jax.jit(decode).lower(params, z).compile(FAST_COMPILE)
    assert "collective-permute" in compiled.as_text()  # bands of rows pass their borders on
    assert_close(compiled(params, z), np.asarray(alone), 1e-5)
