"""Weights of the image autoencoder: diffusers ``AutoencoderKL``, subfolder ``vae``."""

from metacanvas_jax.vae import stage_names
from metacanvas_jax.vae.kl.network import KlConfig
from metacanvas_jax.weights.table import Entry


def table(config: KlConfig) -> list[Entry]:
    """Every tensor of the published file; paths are relative to the parameters of ``Kl``."""
    return stage_names.table(config)
