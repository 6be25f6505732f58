"""What the registry knows of the autoencoders of Wan."""

from metacanvas_jax.vae.base import smallest_arguments
from metacanvas_jax.vae.wan import published
from metacanvas_jax.vae.wan.network import WanVae, WanVaeConfig
from metacanvas_jax.vae.wan.table import table
from metacanvas_jax.weights.record import Network

RECORD = Network(
    family="vae",
    name="wan",
    config=WanVaeConfig,
    module=WanVae,
    arguments=smallest_arguments,
    tiny={
        "encoder_width": 8,
        "decoder_width": 16,
        "multipliers": (1, 2, 2),
        "blocks": 1,
        "halve_time": (False, True),
        "latent_mean": (0.0,) * 16,
        "latent_std": (1.0,) * 16,
    },
    published="AutoencoderKLWan",
    also_published=("AutoencoderKLQwenImage",),
    read=published.read,
    table=table,
    subfolder="vae",
    free=("dtype", "chunk"),
    settings={"chunk": 1},
)
