"""What the registry knows of FLUX.2's autoencoder."""

from metacanvas_jax.vae.base import smallest_arguments
from metacanvas_jax.vae.flux2 import published
from metacanvas_jax.vae.flux2.network import Flux2Vae, Flux2VaeConfig
from metacanvas_jax.vae.flux2.table import IGNORE, table
from metacanvas_jax.weights.record import Network

RECORD = Network(
    family="vae",
    name="flux2",
    config=Flux2VaeConfig,
    module=Flux2Vae,
    arguments=smallest_arguments,
    tiny={"channels": (8, 16), "blocks": 1, "means": 4, "groups": 4},
    published="AutoencoderKLFlux2",
    read=published.read,
    table=table,
    ignore=lambda config: IGNORE,
    subfolder="vae",
    free=("dtype",),
)
