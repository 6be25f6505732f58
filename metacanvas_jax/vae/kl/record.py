"""What the registry knows of the autoencoder of images."""

from metacanvas_jax.vae.base import smallest_arguments
from metacanvas_jax.vae.kl import published
from metacanvas_jax.vae.kl.network import Kl, KlConfig
from metacanvas_jax.vae.kl.table import table
from metacanvas_jax.weights.record import Network

RECORD = Network(
    family="vae",
    name="kl",
    config=KlConfig,
    module=Kl,
    arguments=smallest_arguments,
    tiny={"channels": (8, 16), "blocks": 1, "latent_channels": 4, "groups": 4, "scale": 1.0, "shift": 0.0},
    published="AutoencoderKL",
    read=published.read,
    table=table,
    subfolder="vae",
    free=("dtype",),
)
