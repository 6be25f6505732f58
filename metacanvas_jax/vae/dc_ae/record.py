"""What the registry knows of DC-AE."""

from metacanvas_jax.vae.base import smallest_arguments
from metacanvas_jax.vae.dc_ae import published
from metacanvas_jax.vae.dc_ae.network import DcAe, DcAeConfig
from metacanvas_jax.vae.dc_ae.table import table
from metacanvas_jax.weights.record import Network

RECORD = Network(
    family="vae",
    name="dc_ae",
    config=DcAeConfig,
    module=DcAe,
    arguments=smallest_arguments,
    tiny={
        "channels": (8, 16, 16),
        "encoder_blocks": (1, 2, 1),
        "decoder_blocks": (2, 1, 2),
        "attention_from": 1,
        "latent_channels": 4,
        "head_width": 8,
        "scale": 1.0,
    },
    published="AutoencoderDC",
    read=published.read,
    table=table,
    subfolder="vae",
    free=("dtype",),
)
