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
    published="AutoencoderKL",
    read=published.read,
    table=table,
    subfolder="vae",
    free=("dtype",),
)
